// Kernels that break the rules, each in its own way. Tests look for the lines marked by a comment.
#include "platform.cuh"

namespace rawkern {

struct Faulty {
  struct Params {
    double* output;
    int count;
  };
  struct Shared {
    double values[64];
  };
  static constexpr int kThreads = 64;
  static constexpr int kMinBlocks = 1;
};

struct UninitialisedShared : Faulty {
  __device__ static void run(const Params& p) {
    RAWKERN_SHARED(Shared, shared);
    p.output[threadIdx.x] = shared.values[threadIdx.x];
    shared.values[threadIdx.x] = 1;  // the next block must not find this
  }
};

struct SomeReturn : Faulty {
  __device__ static void run(const Params& p) {
    if (int(threadIdx.x) >= p.count) return;
    __syncthreads();  // barrier that some do not reach
    p.output[threadIdx.x] = 1;
  }
};

struct DifferentBarriers : Faulty {
  __device__ static void run(const Params& p) {
    if (int(threadIdx.x) < p.count) {
      __syncthreads();  // one barrier
    } else {
      __syncthreads();  // another barrier
    }
    p.output[threadIdx.x] = 1;
  }
};

struct SomeLanes : Faulty {
  __device__ static void run(const Params& p) {
    int value = 0;
    if (int(threadIdx.x) < p.count) value = __shfl_xor_sync(kFullMask, 1, 1);  // collective of some lanes
    p.output[threadIdx.x] = value;
  }
};

struct DifferentCollectives : Faulty {
  __device__ static void run(const Params& p) {
    int value;
    if (int(threadIdx.x) < p.count) {
      value = __shfl_xor_sync(kFullMask, 1, 1);  // one collective
    } else {
      value = __shfl_xor_sync(kFullMask, 1, 1);  // another collective
    }
    p.output[threadIdx.x] = value;
  }
};

struct PartialMask : Faulty {
  __device__ static void run(const Params& p) {
    p.output[threadIdx.x] = __shfl_xor_sync(0xffffu, 1, 1);  // partial mask
  }
};

struct BarrierAgainstCollective : Faulty {
  __device__ static void run(const Params& p) {
    if (threadIdx.x % 2) {
      __syncthreads();  // odd threads
    } else {
      p.output[threadIdx.x] = __shfl_xor_sync(kFullMask, 1, 1);  // even lanes
    }
  }
};

// With count < 64 threads are left in a barrier between small arrays, else one array takes the place of all of them.
struct LeavesFrames : Faulty {
  __device__ __attribute__((noinline)) static double narrow(int depth, int count) {
    volatile double values[3] = {1, 2, 3};
    if (depth > 0) return narrow(depth - 1, count) + values[depth % 3];
    if (int(threadIdx.x) >= count) return 0;
    __syncthreads();
    return values[0];
  }
  __device__ __attribute__((noinline)) static double wide() {
    volatile double values[128];
    for (int i = 0; i < 128; ++i) values[i] = i;
    return values[threadIdx.x];
  }
  __device__ static void run(const Params& p) { p.output[threadIdx.x] = p.count < 64 ? narrow(8, p.count) : wide(); }
};

struct ReadPastEnd : Faulty {
  __device__ static void run(const Params& p) {
    if (threadIdx.x == 0) p.output[0] = p.output[p.count];  // read past the end
  }
};

struct WritePastEnd : Faulty {
  __device__ static void run(const Params& p) {
    if (threadIdx.x == 63) p.output[p.count] = 1;  // write past the end
  }
};

struct SharedPastEnd : Faulty {
  __device__ static void run(const Params& p) {
    RAWKERN_SHARED(Shared, shared);
    shared.values[threadIdx.x] = 1;
    __syncthreads();
    p.output[threadIdx.x] = shared.values[int(threadIdx.x) + p.count];  // shared memory past the end
  }
};

}  // namespace rawkern
