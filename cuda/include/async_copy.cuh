// Asynchronous copies from global to shared memory (cp.async, sm_80 and later).
//
// Sixteen bytes at a time, past the registers and the L1 cache; both addresses aligned to 16 bytes. A copy is visible
// to the thread that issued it after async_wait_all(), to the block after the barrier that follows.
#pragma once
#include "platform.cuh"

namespace rawkern {

#if RAWKERN_GPU
__device__ inline void async_copy_16(void* shared_destination, const void* source) {
  unsigned address = unsigned(__cvta_generic_to_shared(shared_destination));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(source) : "memory");
}
__device__ inline void async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }
#else
#define async_copy_16(destination, source) ::rawkern::emulator::async_copy(destination, source, 16, RAWKERN_PLACE)
inline void async_wait_all() { emulator::async_wait_all(); }
#endif

}  // namespace rawkern
