// Sums of a tensor over all axes but one.
//
// ChannelPartials: a warp per unit of channel_walk.cuh reads its part once, up to 16 bytes a lane as memory is aligned
// and four or eight loads under way, adds in the accumulator's precision per lane and writes one double per channel and
// slot. ChannelTotals: a team of threads per channel adds that channel's partial sums in double, in a fixed order, and
// rounds once. It is the second stage of every per-channel sum in the library. Any NVIDIA GPU; bound by memory.
#include "channel_walk.cuh"

namespace rawkern {

template <class T, template <int> class Walk>
struct ChannelPartials {
  static constexpr int kThreads = 256, kMinBlocks = 2;
  struct Params {
    const void* input;
    double* partials;
    ChannelLayout layout;
  };

  struct Sum {
    using A = Accumulator<T>;
    __device__ void operator()(const A* value, A*, A* sums, int) const { sums[0] += value[0]; }
  };

  template <int kWidth>
  __device__ static void run_width(const Params& params) {
    constexpr int kUnroll = kWidth * sizeof(T) < 16 ? 8 : 4;
    Walk<kWidth> walk(params.layout, linear_block() * (kThreads / kWarp) + threadIdx.x / kWarp);
    Accumulator<T> sums[kWidth][1] = {};
    Sum sum;
    walk_channels<T, kWidth, kUnroll, 1, 0>(walk, &params.input, nullptr, sums, sum);
    walk.store(params.partials, sums);
  }

  __device__ static void run(const Params& params) { run_with_width<ChannelPartials, T>(params); }
};

// output[c] is the sum of partials[e / inner * stride + c * inner + e % inner] for e < count.
template <class T, int kTeam>
struct ChannelTotals {
  static constexpr int kThreads = 256, kMinBlocks = 4, kWarps = kThreads / kWarp;
  static_assert(kTeam == kWarp || kTeam == kThreads, "a team is a warp or a block");
  struct Params {
    const double* partials;
    T* output;
    int64 outputs, count, inner, stride;
  };
  struct Shared {
    double sum[kWarps];
  };

  __device__ static void run(const Params& params) {
    RAWKERN_SHARED(Shared, shared);
    int64 output = linear_block() * (kThreads / kTeam) + threadIdx.x / kTeam;
    bool exists = output < params.outputs;
    double sum = 0;
    if (exists) {
      int64 begin = threadIdx.x % kTeam;
      Cursor cursor(begin, kTeam, params.inner);
      const double* partials = params.partials + output * params.inner;
      for (int64 e = begin; e < params.count; e += kTeam) {
        sum += partials[cursor.quotient * params.stride + cursor.remainder];
        cursor.advance();
      }
    }
    for (int distance = kWarp / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(kFullMask, sum, distance);
    if (kTeam > kWarp) {
      if (threadIdx.x % kWarp == 0) shared.sum[threadIdx.x / kWarp] = sum;
      __syncthreads();
      sum = 0;
      for (int warp = 0; warp < kWarps; ++warp) sum += shared.sum[warp];
    }
    if (exists && threadIdx.x % kTeam == 0) params.output[output] = from_accumulator<T>(sum);
  }
};

}  // namespace rawkern
