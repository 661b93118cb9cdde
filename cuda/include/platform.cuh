// What every kernel stands on: the two devices behind one set of names.
//
// A kernel is a struct K with
//     struct Params            plain data, passed by value; mirrored field by field by a NumPy structured dtype
//     static constexpr int kThreads        threads of a block (one dimension)
//     static constexpr int kMinBlocks      blocks per multiprocessor the register budget must allow
//     __device__ static void run(const Params&)
// and becomes a launchable function through RAWKERN_KERNEL(name, K), which the runtime appends to the flattened
// source together with static assertions that both languages mean the same layout. On a GPU that is an
// extern "C" __global__ function; on a CPU an entry point of the emulator (cpu/emulator.h).
//
// Shared memory is declared by RAWKERN_SHARED(Type, name), one struct per kernel, so that the emulator can own it
// (NaN-filled, watched by AddressSanitizer). RAWKERN_DYNAMIC_SHARED(Type, name) is the same for dynamic shared memory.
#pragma once

#if defined(__CUDACC__)
#define RAWKERN_GPU 1
#else
#define RAWKERN_GPU 0
#endif

namespace rawkern {
using int64 = long long;
using uint64 = unsigned long long;
constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;
}  // namespace rawkern

#if RAWKERN_GPU

#define RAWKERN_SHARED(Type, name) __shared__ Type name
#define RAWKERN_DYNAMIC_SHARED(Type, name)                           \
  extern __shared__ __align__(1024) unsigned char rawkern_dynamic[]; \
  Type& name = *reinterpret_cast<Type*>(rawkern_dynamic)
#define RAWKERN_KERNEL(name, ...)                                                              \
  extern "C" __global__ void __launch_bounds__(__VA_ARGS__::kThreads, __VA_ARGS__::kMinBlocks) \
      name(const __grid_constant__ __VA_ARGS__::Params params) {                               \
    __VA_ARGS__::run(params);                                                                  \
  }

#else
#include "cpu/emulator.h"
#endif

namespace rawkern {

// The block's number in a grid that may be larger than one dimension holds (see launchers' linear_grid).
__device__ inline int64 linear_block() { return int64(blockIdx.y) * gridDim.x + blockIdx.x; }

#if RAWKERN_GPU
// An address in shared memory as instructions take it that know no other memory.
__device__ inline unsigned shared_address(const void* shared) { return unsigned(__cvta_generic_to_shared(shared)); }
#endif

template <class T>
__device__ inline T minimum_of(T a, T b) {
  return b < a ? b : a;
}
__host__ __device__ constexpr int64 ceil_div(int64 a, int64 b) { return (a + b - 1) / b; }

}  // namespace rawkern
