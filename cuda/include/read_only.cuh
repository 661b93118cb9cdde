// Loads from global memory that nothing writes while the kernel runs (ld.global.nc), and requests to bring the line of
// an address into the L2 cache. The compiler knows that such a load is not from shared memory: stores there need not
// wait for it, nor it for them.
#pragma once
#include "element.cuh"

namespace rawkern {

#if RAWKERN_GPU
__device__ inline unsigned read_only(const unsigned* from) { return __ldg(from); }
__device__ inline float read_only(const float* from) { return __ldg(from); }
template <class T>
__device__ inline T read_only(const T* from) {
  T value;
  value.bits = __ldg(&from->bits);
  return value;
}
__device__ inline void prefetch_line(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }
#else
template <class T>
inline T read_only(const T* from) {
  return *from;
}
// Reads, so that AddressSanitizer finds addresses that are none.
inline void prefetch_line(const void* address) { (void)*static_cast<const volatile char*>(address); }
#endif

}  // namespace rawkern
