// A value that the compiler must take as it comes: what is computed from opaque(value) in a loop is computed in every
// round, and not once before the loop, from where it would take registers through all of it. An address that goes on by
// opaque(step) is a sum each time, and not a product.
#pragma once
#include "platform.cuh"

namespace rawkern {

__device__ inline int opaque(int value) {
#if RAWKERN_GPU
  asm volatile("" : "+r"(value));
#endif
  return value;
}
__device__ inline int64 opaque(int64 value) {
#if RAWKERN_GPU
  asm volatile("" : "+l"(value));
#endif
  return value;
}
template <class T>
__device__ inline T* opaque(T* pointer) {
#if RAWKERN_GPU
  asm volatile("" : "+l"(pointer));
#endif
  return pointer;
}

// A value that all lanes of a warp have in common, which the compiler then knows, and computes with it once for the
// warp.
__device__ inline int uniform(int value) { return __shfl_sync(kFullMask, value, 0); }

}  // namespace rawkern
