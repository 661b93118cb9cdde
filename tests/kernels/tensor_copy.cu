// Boxes of a tensor, copied by the copy engine (tensor_copy.cuh): as they come to lie in shared memory.
#include "tensor_copy.cuh"

namespace rawkern {

template <class T, bool kRound>
struct MakeMap {
  static constexpr int kThreads = 32, kMinBlocks = 1;
  struct Params {
    TensorParams tensor;
    void* map;
  };
  __device__ static void run(const Params& p) {
    RAWKERN_SHARED(TensorMap, shared);
    make_tensor_map<T, kRound>(static_cast<TensorMap*>(p.map), shared, p.tensor);
  }
};

// Block b copies the box at row b of `at` to the b-th place of `output`.
struct CopyBoxes {
  static constexpr int kThreads = 32, kMinBlocks = 1, kMaxBytes = 32768;
  struct Params {
    const void* map;
    const int* at;
    unsigned* output;
    int bytes;
  };
  struct alignas(1024) Memory {
    unsigned words[kMaxBytes / 4];
    Mbarrier full;
  };
  __device__ static void run(const Params& p) {
    RAWKERN_SHARED(Memory, memory);
    if (threadIdx.x == 0) {
      mbarrier_init(memory.full, 1);
      mbarrier_fence_init();
      const TensorMap* map = static_cast<const TensorMap*>(p.map);
      acquire_tensor_map(map);
      int at[kTensorAxes];
      for (int axis = 0; axis < kTensorAxes; ++axis) at[axis] = p.at[linear_block() * kTensorAxes + axis];
      mbarrier_arrive_expect(memory.full, p.bytes);
      tensor_copy(memory.words, map, at, memory.full);
    }
    __syncthreads();
    mbarrier_wait(memory.full, 0);
    for (int i = threadIdx.x; i < p.bytes / 4; i += kThreads)
      p.output[linear_block() * (p.bytes / 4) + i] = memory.words[i];
  }
};

}  // namespace rawkern
