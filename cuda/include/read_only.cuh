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
// 16 bytes, from an address that is aligned to as many.
__device__ inline void read_only_unit(const void* from, unsigned (&words)[4]) {
  uint4 unit = __ldg(static_cast<const uint4*>(from));
  words[0] = unit.x, words[1] = unit.y, words[2] = unit.z, words[3] = unit.w;
}
__device__ inline void prefetch_line(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }
#else
template <class T>
inline T read_only(const T* from) {
  return *from;
}
inline void read_only_unit(const void* from, unsigned (&words)[4]) {
  if (uint64(uintptr_t(from)) % 16 != 0) emulator::fail("an access of 16 bytes must be aligned to 16", RAWKERN_PLACE);
  for (int i = 0; i < 4; ++i) words[i] = static_cast<const unsigned*>(from)[i];
}
// Reads, so that AddressSanitizer finds addresses that are none.
inline void prefetch_line(const void* address) { (void)*static_cast<const volatile char*>(address); }
#endif

}  // namespace rawkern
