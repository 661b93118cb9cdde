// Asynchronous copies from global to shared memory (cp.async, sm_80 and later).
//
// Sixteen bytes at a time, past the registers and the L1 cache; both addresses aligned to 16 bytes. Or four, eight or
// sixteen bytes, aligned to their size, or zeros in their place. A copy is visible to the thread that issued it after
// async_wait_all(), to others after the barrier that follows. async_commit() closes a group of copies, and
// async_wait<n>() waits until at most n groups are under way.
#pragma once
#include "platform.cuh"

namespace rawkern {

#if RAWKERN_GPU
__device__ inline void async_copy_16(void* shared_destination, const void* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared_destination)), "l"(source)
               : "memory");
}
// Copies a T if it `exists`, else writes zeros; then `source` need not be readable.
template <class T>
__device__ inline void async_copy_or_zero(T* shared_destination, const T* source, bool exists) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "asynchronous copies are of 4, 8 or 16 bytes");
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared_destination)), "l"(source),
               "n"(sizeof(T)), "r"(exists ? unsigned(sizeof(T)) : 0u)
               : "memory");
}
__device__ inline void async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }
__device__ inline void async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroups>
__device__ inline void async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}
#else
#define async_copy_16(destination, source) ::rawkern::emulator::async_copy(destination, source, 16, RAWKERN_PLACE)
template <class T>
inline void async_copy_or_zero(T* destination, const T* source, bool exists) {
  static const T zero{};
  emulator::async_copy(destination, exists ? source : &zero, int(sizeof(T)), RAWKERN_PLACE);
}
inline void async_wait_all() { emulator::async_wait_all(); }
inline void async_commit() { emulator::async_commit(); }
template <int kGroups>
inline void async_wait() {
  emulator::async_wait(kGroups);
}
#endif

}  // namespace rawkern
