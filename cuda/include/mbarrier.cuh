// Barriers in shared memory, and copies that complete on them (sm_90 and later).
//
// An Mbarrier counts arrivals and, where a copy was announced, bytes. When all have come, its phase completes and the
// next begins; phases alternate in parity, beginning with 0. wait(parity) returns once the phase of that parity is
// complete, so waiting for parity 1 on a fresh barrier returns at once. One thread initialises the barriers, calls
// mbarrier_fence_init(), and the block synchronises. The tensor cores and bulk copies see shared memory through another
// path (the async proxy) than ordinary loads and stores: a thread that has stored what wgmma will read calls
// fence_async_proxy() before it arrives.
#pragma once
#include "platform.cuh"

namespace rawkern {

#if RAWKERN_GPU

struct alignas(8) Mbarrier {
  uint64 word;
};

__device__ inline void mbarrier_init(Mbarrier& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}
__device__ inline void mbarrier_fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ inline void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ inline void mbarrier_arrive(Mbarrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}
// Arrives and announces that copies will bring `bytes`.
__device__ inline void mbarrier_arrive_expect(Mbarrier& barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
               : "memory");
}
__device__ inline void mbarrier_wait(Mbarrier& barrier, unsigned parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
}

// Whether the phase of that parity is complete, without waiting.
__device__ inline bool mbarrier_test(Mbarrier& barrier, unsigned parity) {
  int done;
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.b32 %0, 1, 0, done;\n"
      "}\n"
      : "=r"(done)
      : "r"(shared_address(&barrier)), "r"(parity)
      : "memory");
  return done;
}

// Copies `bytes` (a multiple of 16, both addresses aligned to 16) from global to shared memory.
__device__ inline void bulk_copy(void* destination, const void* source, int bytes, Mbarrier& barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(destination)),
               "l"(source), "r"(bytes), "r"(shared_address(&barrier))
               : "memory");
}

// True for one lane of a warp, all of which must be here. The assembler knows that it is one, which spares the loop
// over lanes that it puts around instructions that take their operands once for a warp, such as copies.
__device__ inline bool elect_lane() {
  unsigned elected;
  asm volatile(
      "{\n"
      ".reg .pred elected;\n"
      "elect.sync _|elected, 0xffffffff;\n"
      "selp.b32 %0, 1, 0, elected;\n"
      "}\n"
      : "=r"(elected));
  return elected;
}

// A barrier among `threads` threads of the block, a multiple of a warp; `id` from 1 to 15.
__device__ inline void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Moves registers between warpgroups: to be called by all warps of one. The kernel must have been given
// (threads of the block) * (registers at launch) of them; see __launch_bounds__.
template <int kCount>
__device__ inline void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ inline void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

#else

struct Mbarrier {
  int arrivals, missing, bytes, phase;
};

inline void mbarrier_init(Mbarrier& barrier, int arrivals) { barrier = Mbarrier{arrivals, arrivals, 0, 0}; }
inline void mbarrier_fence_init() {}
inline void fence_async_proxy() {}
inline bool elect_lane() { return threadIdx.x % kWarp == 0; }
inline bool mbarrier_test(Mbarrier& barrier, unsigned parity) { return (unsigned(barrier.phase) & 1) != parity; }

namespace emulator {
inline void complete_if_done(Mbarrier& barrier) {
  if (barrier.missing || barrier.bytes) return;
  barrier.missing = barrier.arrivals;
  ++barrier.phase;
  wake(&barrier);
}
inline void arrive(Mbarrier& barrier, int bytes, Place place) {
  if (barrier.missing <= 0) fail("more arrivals at an mbarrier than it was initialised for", place);
  --barrier.missing;
  barrier.bytes += bytes;
  complete_if_done(barrier);
}
inline void mbarrier_wait(Mbarrier& barrier, unsigned parity, Place place) {
  while ((unsigned(barrier.phase) & 1) == parity) wait_for(&barrier, place);
}
inline void bulk_copy(void* destination, const void* source, int bytes, Mbarrier& barrier, Place place) {
  if (bytes % 16 || uintptr_t(destination) % 16 || uintptr_t(source) % 16)
    fail("a bulk copy's size and addresses must be multiples of 16", place);
  for (int byte = 0; byte < bytes; ++byte)  // here, so that AddressSanitizer sees both ends
    static_cast<char*>(destination)[byte] = static_cast<const char*>(source)[byte];
  barrier.bytes -= bytes;
  complete_if_done(barrier);
}
}  // namespace emulator

#define mbarrier_arrive(barrier) ::rawkern::emulator::arrive(barrier, 0, RAWKERN_PLACE)
#define mbarrier_arrive_expect(barrier, count) ::rawkern::emulator::arrive(barrier, count, RAWKERN_PLACE)
#define mbarrier_wait(barrier, parity) ::rawkern::emulator::mbarrier_wait(barrier, parity, RAWKERN_PLACE)
#define bulk_copy(destination, source, count, barrier) \
  ::rawkern::emulator::bulk_copy(destination, source, count, barrier, RAWKERN_PLACE)
#define named_barrier(id, threads) ::rawkern::emulator::named_barrier(id, threads, RAWKERN_PLACE)

template <int kCount>
inline void more_registers() {}
template <int kCount>
inline void fewer_registers() {}

#endif

}  // namespace rawkern
