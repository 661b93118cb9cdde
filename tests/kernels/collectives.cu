// What threads of a warp, of a block and of a grid can do together, one struct for each.
#include "async_copy.cuh"
#include "mma.cuh"

namespace rawkern {

// output[kind][thread]: what each kind of shuffle delivers.
struct Shuffles {
  struct Params {
    const int* input;
    int* output;
    int distance;
  };
  static constexpr int kThreads = 64;
  static constexpr int kMinBlocks = 1;

  __device__ static void run(const Params& p) {
    int t = threadIdx.x, value = p.input[t];
    p.output[t] = __shfl_sync(kFullMask, value, p.distance);
    p.output[kThreads + t] = __shfl_up_sync(kFullMask, value, p.distance);
    p.output[2 * kThreads + t] = __shfl_down_sync(kFullMask, value, p.distance);
    p.output[3 * kThreads + t] = __shfl_xor_sync(kFullMask, value, p.distance);
  }
};

struct Votes {
  struct Params {
    const int* input;
    unsigned* output;
  };
  static constexpr int kThreads = 64;
  static constexpr int kMinBlocks = 1;

  __device__ static void run(const Params& p) {
    int t = threadIdx.x, value = p.input[t];
    p.output[t] = __ballot_sync(kFullMask, value > 0);
    p.output[kThreads + t] = __any_sync(kFullMask, value > 0);
    p.output[2 * kThreads + t] = __all_sync(kFullMask, value > 0);
  }
};

// Every thread adds its number to the same three totals and its number to a maximum.
struct Atomics {
  struct Params {
    int* count;
    float* sum;
    double* precise_sum;
    int* largest;
  };
  static constexpr int kThreads = 96;
  static constexpr int kMinBlocks = 1;

  __device__ static void run(const Params& p) {
    int number = int(linear_block()) * kThreads + threadIdx.x;
    atomicAdd(p.count, 1);
    atomicAdd(p.sum, 0.5f);
    atomicAdd(p.precise_sum, double(number));
    atomicMax(p.largest, number);
  }
};

// Reverses each block's numbers through shared memory, in rounds, so that a missing barrier would mix rounds.
struct Reverse {
  struct Params {
    const double* input;
    double* output;
    int rounds;
  };
  struct Shared {
    double values[160];
  };
  static constexpr int kThreads = 160;
  static constexpr int kMinBlocks = 1;

  __device__ static void run(const Params& p) {
    RAWKERN_SHARED(Shared, shared);
    int64 i = linear_block() * kThreads + threadIdx.x;
    double value = p.input[i];
    for (int round = 0; round < p.rounds; ++round) {
      shared.values[threadIdx.x] = value;
      __syncthreads();
      value = shared.values[kThreads - 1 - threadIdx.x];
      __syncthreads();
    }
    p.output[i] = value;
  }
};

// Dynamic shared memory: one row of `kThreads` numbers, read back from the neighbour.
struct Rotate {
  struct Params {
    const float* input;
    float* output;
  };
  struct Shared {
    float values[20000];  // more than static shared memory can be
  };
  static constexpr int kThreads = 128;
  static constexpr int kMinBlocks = 1;

  __device__ static void run(const Params& p) {
    RAWKERN_DYNAMIC_SHARED(Shared, shared);
    shared.values[19000 + threadIdx.x] = p.input[threadIdx.x];
    __syncthreads();
    p.output[threadIdx.x] = shared.values[19000 + (threadIdx.x + 1) % kThreads];
  }
};

// Copies four floats per thread into shared memory and reads them back, after waiting for them if `wait` says so.
struct Copies {
  struct Params {
    const float* input;
    float* output;
    int wait;
  };
  struct Shared {
    float4 values[64];
  };
  static constexpr int kThreads = 64;
  static constexpr int kMinBlocks = 1;

  __device__ static void run(const Params& p) {
    RAWKERN_SHARED(Shared, shared);
    async_copy_16(&shared.values[threadIdx.x], p.input + 4 * threadIdx.x);
    if (p.wait) async_wait_all();
    __syncthreads();
    float4 value = shared.values[kThreads - 1 - threadIdx.x];
    float* output = p.output + 4 * threadIdx.x;
    output[0] = value.x, output[1] = value.y, output[2] = value.z, output[3] = value.w;
  }
};

// D += A B for one warp, with A as 16 x 8 words, B as 8 words x 8 columns, D as 16 x 8 floats, each row by row.
template <class Operand>
struct Product {
  struct Params {
    const unsigned* a;
    const unsigned* b;
    float* d;
  };
  static constexpr int kThreads = 32;
  static constexpr int kMinBlocks = 1;

  __device__ static void run(const Params& p) {
    int g = threadIdx.x / 4, t = threadIdx.x % 4;
    unsigned a[4] = {p.a[g * 8 + t], p.a[(g + 8) * 8 + t], p.a[g * 8 + t + 4], p.a[(g + 8) * 8 + t + 4]};
    unsigned b[2] = {p.b[t * 8 + g], p.b[(t + 4) * 8 + g]};
    float* rows[4] = {p.d + g * 8 + 2 * t, p.d + g * 8 + 2 * t + 1, p.d + (g + 8) * 8 + 2 * t,
                      p.d + (g + 8) * 8 + 2 * t + 1};
    float d[4] = {*rows[0], *rows[1], *rows[2], *rows[3]};
    mma_16x8<Operand>(d, a, b);
    for (int i = 0; i < 4; ++i) *rows[i] = d[i];
  }
};

template <bool kOperand>  // by tf32_operand
struct RoundTf32 {
  struct Params {
    const float* input;
    unsigned* output;
    int64 count;
  };
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 1;

  __device__ static void run(const Params& p) {
    int64 i = linear_block() * kThreads + threadIdx.x;
    if (i < p.count) p.output[i] = kOperand ? tf32_operand(p.input[i]) : tf32_round(p.input[i]);
  }
};

// Converts elements to T from float and from T to float.
template <class T>
struct Convert {
  struct Params {
    const T* elements;
    float* widened;
    const float* numbers;
    T* rounded;
    int64 count;
  };
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 1;

  __device__ static void run(const Params& p) {
    int64 i = linear_block() * kThreads + threadIdx.x;
    if (i >= p.count) return;
    p.widened[i] = to_accumulator(p.elements[i]);
    p.rounded[i] = from_accumulator<T>(p.numbers[i]);
  }
};

// Each block writes down where it is in the grid.
struct Places {
  struct Params {
    int64* output;
  };
  static constexpr int kThreads = 32;
  static constexpr int kMinBlocks = 1;

  __device__ static void run(const Params& p) {
    int64 block = (int64(blockIdx.z) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    if (threadIdx.x == 0) p.output[block] = (int64(blockIdx.z) * 1000 + blockIdx.y) * 1000 + blockIdx.x;
  }
};

}  // namespace rawkern
