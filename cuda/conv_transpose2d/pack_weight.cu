// Repacks weights for gather.cuh: packed[group][tap][word][row], a word holding kPack neighbouring input channels
// (depth) in the multiplication's operand format, rows being output channels. Rows and depth are padded with zeros.
//
// One thread per word; writes are coalesced, reads follow the weights' own strides. The weights are small (and stay in
// the L2 cache for the kernel that follows), so this is a few microseconds. Meant for sm_80 and later.
#include "block_math.cuh"

namespace rawkern {

template <class Math>
struct PackWeight {
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 2;

  struct Params {
    const void* weight;
    void* packed;
    int64 group_stride, depth_stride, row_stride, tap_strides[2];
    int64 words;  // of the whole packed buffer
    int kernel_h, kernel_w, depth, depth_words, rows, rows_padded;
  };

  __device__ static void run(const Params& p) {
    using T = typename Math::Element;
    int64 index = linear_block() * kThreads + threadIdx.x;
    if (index >= p.words) return;
    int row = int(index % p.rows_padded);
    int64 rest = index / p.rows_padded;
    int word = int(rest % p.depth_words);
    rest /= p.depth_words;
    int tap_w = int(rest % p.kernel_w);
    rest /= p.kernel_w;
    int tap_h = int(rest % p.kernel_h);
    int64 group = rest / p.kernel_h;
    const T* source = static_cast<const T*>(p.weight) + group * p.group_stride + row * p.row_stride +
                      tap_h * p.tap_strides[0] + tap_w * p.tap_strides[1];
    typename Math::Value values[Math::kPack];
#pragma unroll
    for (int i = 0; i < Math::kPack; ++i) {
      int channel = word * Math::kPack + i;
      bool exists = row < p.rows && channel < p.depth;
      values[i] = exists ? to_accumulator(source[channel * p.depth_stride]) : typename Math::Value(0);
    }
    static_cast<typename Math::Word*>(p.packed)[index] = Math::make_word(values);
  }
};

}  // namespace rawkern
