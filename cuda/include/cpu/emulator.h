// The CUDA a CPU understands: runs an unchanged kernel on the host, one fiber per CUDA thread.
//
// A worker (an OS thread) takes one block at a time. Each CUDA thread of the block is a fiber with its own stack; a
// fiber runs until it must wait (barrier, warp collective) and then hands over to the next runnable one. A thread that
// never waits costs no switch: the fiber that finished it takes the next unstarted thread. The emulator is stricter
// than a GPU:
//   - shared memory starts as NaN (all bits one);
//   - a barrier that not every thread of the block reaches, or that threads reach on different lines, is an error that
//     names the kernel and the line; so is a warp collective that not every lane reaches;
//   - an asynchronous copy lands when it is waited for, not before;
//   - built with AddressSanitizer, shared and global memory out of bounds is an error.
// Only what the kernels use is here; blocks have one dimension, warp collectives take the full mask.
#pragma once

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "fiber.h"

#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))

struct uint3 {
  unsigned x, y, z;
};
struct float4 {
  float x, y, z, w;
};

namespace rawkern {
namespace emulator {

constexpr int kMaxThreads = 1024;
constexpr int kWarpSize = 32;
constexpr int kSlotBytes = 64;
constexpr int kMaxCopies = 256;
constexpr size_t kSharedAlignment = 1024;  // the swizzled layouts of wgmma.cuh follow the address's bits
constexpr size_t kStaticSharedLimit = 48 * 1024;
constexpr size_t kDynamicSharedLimit = 227 * 1024;

enum class State : unsigned char { kUnstarted, kReady, kAtBarrier, kAtWarp, kAtPhase, kDone };

struct Place {
  const char* file;
  int line;
};

inline bool same_place(Place a, Place b) { return a.line == b.line && (a.file == b.file || !strcmp(a.file, b.file)); }

struct Copy {
  void* destination;
  const void* source;
  int bytes;
  int group;
};

struct Thread {
  Fiber* fiber;
  Place place;
  const void* awaited;  // what a thread in state kAtPhase waits for
  int copies;
  int group;  // of the next copy
};

struct Warp {
  int arrived;
  int generation;
  Place place;
  alignas(16) unsigned char slot[2][kWarpSize][kSlotBytes];
};

struct NamedBarrier {
  int arrived;
};

struct SharedMemory {
  void* data = nullptr;
  size_t size = 0;
  bool filled = false;

  // The block's shared memory of this size, NaN-filled the first time a block asks for it.
  void* get(size_t bytes) {
    if (filled && bytes == size) return data;
    if (bytes != size) {
      free(data);
      if (posix_memalign(&data, kSharedAlignment, bytes)) abort();
      size = bytes;
    }
    memset(data, 0xff, bytes);
    filled = true;
    return data;
  }
};

struct Block {
  const char* kernel;
  void (*body)(const void*);
  const void* params;
  uint3 grid, index;
  int threads;
  size_t dynamic_bytes;
  int current;
  int done;
  int at_barrier;
  State state[kMaxThreads];
  Thread thread[kMaxThreads];
  Warp warp[kMaxThreads / kWarpSize];
  NamedBarrier named[16];
  SharedMemory static_shared, dynamic_shared;
  Fiber main;
  Fiber* free_fibers = nullptr;
  char error[512];
  Block* next;                         // in the list of idle blocks
  Copy copy[kMaxThreads][kMaxCopies];  // memory for them only where they are
};

static thread_local Block* block;
static FiberPool* fiber_pool;  // the process's, of which every launch brings the address

inline void switch_to_main() { switch_fiber(block->thread[block->current].fiber, &block->main); }

// Records the first error of a block and leaves the block for good; its fibers are started anew for the next one.
[[noreturn]] inline void fail(const char* what, Place place) {
  if (!block->error[0])
    snprintf(block->error, sizeof block->error, "%s: block (%u, %u, %u), thread %d: %s, %s:%d", block->kernel,
             block->index.x, block->index.y, block->index.z, block->current, what, place.file, place.line);
  switch_to_main();
  abort();
}

inline void report_deadlock() {
  for (int t = 0; t < block->threads; ++t) {
    State state = block->state[t];
    if (state != State::kAtBarrier && state != State::kAtWarp && state != State::kAtPhase) continue;
    int waiting = 0;
    for (int u = 0; u < block->threads; ++u) waiting += block->state[u] == state;
    const char* what = state == State::kAtBarrier ? "barrier divergence: __syncthreads"
                       : state == State::kAtWarp  ? "warp divergence: warp collective"
                                                  : "deadlock: wait for a phase of a barrier that never completes,";
    snprintf(
        block->error, sizeof block->error,
        "%s: block (%u, %u, %u): %s reached by %d of %d threads of the block (thread %d waits, %d returned), %s:%d",
        block->kernel, block->index.x, block->index.y, block->index.z, what, waiting, block->threads, t, block->done,
        block->thread[t].place.file, block->thread[t].place.line);
    return;
  }
}

inline bool runnable(int t) { return block->state[t] == State::kReady || block->state[t] == State::kUnstarted; }

// The next thread that can run, looking first at the lanes of the current warp; -1 if there is none.
inline int next_runnable() {
  int begin = block->current / kWarpSize * kWarpSize;
  int lanes = block->threads - begin < kWarpSize ? block->threads - begin : kWarpSize;
  for (int i = 1; i <= lanes; ++i) {
    int t = begin + (block->current - begin + i) % lanes;
    if (runnable(t)) return t;
  }
  for (int t = block->current + 1; t < block->threads; ++t)
    if (runnable(t)) return t;
  for (int t = 0; t < begin; ++t)
    if (runnable(t)) return t;
  return -1;
}

// Body of every fiber: runs threads to their end, as many as it can get without switching to another fiber.
[[noreturn]] inline void fiber_body() {
  entered_fiber();
  for (;;) {
    int t = block->current;
    block->body(block->params);
    block->state[t] = State::kDone;
    Fiber* self = block->thread[t].fiber;
    if (++block->done == block->threads) break;
    int next = next_runnable();
    if (next < 0) {
      report_deadlock();
      break;
    }
    block->current = next;
    if (block->state[next] == State::kUnstarted) {
      block->state[next] = State::kReady;
      block->thread[next].fiber = self;
      continue;
    }
    self->next = block->free_fibers;
    block->free_fibers = self;
    switch_fiber(self, block->thread[next].fiber);
  }
  switch_to_main();
  abort();
}

inline Fiber* take_fiber() {
  Fiber* fiber = block->free_fibers;
  if (fiber)
    block->free_fibers = fiber->next;
  else if (!(fiber = fiber_pool->take()))
    fiber = new_fiber();
  start_fiber(fiber, fiber_body);
  return fiber;
}

// Leaves the current thread, which must be waiting, until it is made ready again.
inline void yield_thread() {
  int self = block->current;
  int next = next_runnable();
  if (next < 0) {
    report_deadlock();
    switch_to_main();
    abort();
  }
  block->current = next;
  if (block->state[next] == State::kUnstarted) {
    block->state[next] = State::kReady;
    block->thread[next].fiber = take_fiber();
  }
  switch_fiber(block->thread[self].fiber, block->thread[next].fiber);
}

inline void barrier(Place place) {
  Block* b = block;
  int self = b->current;
  b->thread[self].place = place;
  if (b->at_barrier > 0) {
    for (int t = 0; t < b->threads; ++t)
      if (b->state[t] == State::kAtBarrier) {
        if (!same_place(b->thread[t].place, place))
          fail("barrier divergence: threads wait at different barriers", place);
        break;
      }
  }
  if (++b->at_barrier == b->threads) {
    b->at_barrier = 0;
    for (int t = 0; t < b->threads; ++t) b->state[t] = State::kReady;
    return;
  }
  b->state[self] = State::kAtBarrier;
  yield_thread();
}

// Waits until another thread calls wake(awaited).
inline void wait_for(const void* awaited, Place place) {
  int self = block->current;
  block->thread[self].place = place;
  block->thread[self].awaited = awaited;
  block->state[self] = State::kAtPhase;
  yield_thread();
}

inline void wake(const void* awaited) {
  for (int t = 0; t < block->threads; ++t)
    if (block->state[t] == State::kAtPhase && block->thread[t].awaited == awaited) block->state[t] = State::kReady;
}

// A barrier among `threads` threads of the block, such as those of one role (bar.sync id, threads).
inline void named_barrier(int id, int threads, Place place) {
  NamedBarrier& barrier = block->named[id];
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    wake(&barrier);
    return;
  }
  wait_for(&barrier, place);
}

inline int lane_id() { return block->current % kWarpSize; }
inline Warp& this_warp() { return block->warp[block->current / kWarpSize]; }
inline int warp_lanes() {
  int left = block->threads - block->current / kWarpSize * kWarpSize;
  return left < kWarpSize ? left : kWarpSize;
}

struct NoAction {
  void operator()() const {}
};

// All lanes of the warp meet here; the last to arrive runs `action` on behalf of the warp.
template <class Action = NoAction>
inline void warp_barrier(Place place, Action action = Action()) {
  Warp& warp = this_warp();
  int self = block->current;
  block->thread[self].place = place;
  if (warp.arrived == 0)
    warp.place = place;
  else if (!same_place(warp.place, place))
    fail("warp divergence: lanes wait at different warp collectives", place);
  if (++warp.arrived == warp_lanes()) {
    action();
    warp.arrived = 0;
    ++warp.generation;
    int begin = self / kWarpSize * kWarpSize;
    for (int t = begin; t < begin + warp_lanes(); ++t) block->state[t] = State::kReady;
    return;
  }
  block->state[self] = State::kAtWarp;
  yield_thread();
}

inline void check_mask(unsigned mask, Place place) {
  if (mask != 0xffffffffu) fail("the emulator knows warp collectives with the full mask only", place);
}

// Deposits this lane's value and returns the warp's table of values once every lane has deposited its own. The table
// stays valid until the lane's next but one collective, because two tables alternate.
template <class T>
inline unsigned char (*exchange(const T& value, Place place)) [kSlotBytes] {
  static_assert(sizeof(T) <= kSlotBytes, "value too large for a warp collective");
  Warp& warp = this_warp();
  unsigned char (*slots)[kSlotBytes] = warp.slot[warp.generation & 1];
  memcpy(slots[lane_id()], &value, sizeof(T));
  warp_barrier(place);
  return slots;
}

template <class T>
inline T shuffle(Place place, unsigned mask, T value, int source) {
  check_mask(mask, place);
  unsigned char (*slots)[kSlotBytes] = exchange(value, place);
  if (source < 0 || source >= warp_lanes()) return value;
  T result;
  memcpy(&result, slots[source], sizeof(T));
  return result;
}

inline unsigned ballot(Place place, unsigned mask, int predicate) {
  check_mask(mask, place);
  unsigned char (*slots)[kSlotBytes] = exchange(predicate, place);
  unsigned result = 0;
  for (int lane = 0; lane < warp_lanes(); ++lane) {
    int other;
    memcpy(&other, slots[lane], sizeof other);
    result |= unsigned(other != 0) << lane;
  }
  return result;
}

inline unsigned all_lanes() { return warp_lanes() == kWarpSize ? 0xffffffffu : (1u << warp_lanes()) - 1; }

template <class T>
inline T& static_shared() {
  static_assert(sizeof(T) <= kStaticSharedLimit, "more static shared memory than a GPU gives a block (48 KiB)");
  return *static_cast<T*>(block->static_shared.get(sizeof(T)));
}

template <class T>
inline T& dynamic_shared(Place place) {
  static_assert(sizeof(T) <= kDynamicSharedLimit, "more dynamic shared memory than a GPU gives a block (227 KiB)");
  if (block->dynamic_bytes < sizeof(T))
    fail("less dynamic shared memory was asked for at the launch than is used", place);
  return *static_cast<T*>(block->dynamic_shared.get(block->dynamic_bytes));
}

inline void async_copy(void* destination, const void* source, int bytes, Place place) {
  Thread& thread = block->thread[block->current];
  if (thread.copies == kMaxCopies) fail("too many asynchronous copies under way", place);
  block->copy[block->current][thread.copies++] = Copy{destination, source, bytes, thread.group};
}

inline void async_commit() { ++block->thread[block->current].group; }

// Lands the copies of all but the last `groups` groups, through a function of this library, so that AddressSanitizer
// sees both ends.
inline void async_wait(int groups) {
  Thread& thread = block->thread[block->current];
  Copy* copies = block->copy[block->current];
  int kept = 0;
  for (int i = 0; i < thread.copies; ++i) {
    const Copy& copy = copies[i];
    if (copy.group >= thread.group - groups) {
      copies[kept++] = copy;
      continue;
    }
    for (int byte = 0; byte < copy.bytes; ++byte)
      static_cast<char*>(copy.destination)[byte] = static_cast<const char*>(copy.source)[byte];
  }
  thread.copies = kept;
}
inline void async_wait_all() {
  async_commit();
  async_wait(0);
}

inline void free_fiber(Fiber* fiber) {
  fiber->next = block->free_fibers;
  block->free_fibers = fiber;
}

inline void run_block(uint3 index) {
  Block* b = block;
  b->index = index;
  b->done = b->at_barrier = 0;
  b->static_shared.filled = b->dynamic_shared.filled = false;
  for (int t = 0; t < b->threads; ++t) {
    b->state[t] = State::kUnstarted;
    b->thread[t].copies = b->thread[t].group = 0;
  }
  for (int w = 0; w * kWarpSize < b->threads; ++w) b->warp[w].arrived = 0;
  for (NamedBarrier& barrier : b->named) barrier.arrived = 0;
  b->current = 0;
  b->state[0] = State::kReady;
  Fiber* first = take_fiber();
  b->thread[0].fiber = first;
  switch_fiber(&b->main, first);
  free_fiber(b->thread[b->current].fiber);
  if (!b->error[0]) return;
  for (int t = 0; t < b->threads; ++t) {  // after an error, threads were left where they waited
    if (t == b->current || b->state[t] == State::kUnstarted || b->state[t] == State::kDone) continue;
    forget_stack(b->thread[t].fiber);
    free_fiber(b->thread[t].fiber);
  }
}

// One launch, shared by its workers.
struct Launch {
  const char* kernel;
  void (*body)(const void*);
  const void* params;
  uint3 grid;
  int threads;
  size_t dynamic_bytes;
  unsigned long long blocks;
  unsigned long long next_block;
  char* error;
  size_t error_bytes;
  int failed;
};

static pthread_mutex_t idle_mutex = PTHREAD_MUTEX_INITIALIZER;
static Block* idle_blocks = nullptr;

inline Block* take_block() {
  pthread_mutex_lock(&idle_mutex);
  Block* b = idle_blocks;
  if (b) idle_blocks = b->next;
  pthread_mutex_unlock(&idle_mutex);
  // Zeros, which take no memory where they are not used: hundreds of kernels have blocks, most of them of few threads.
  if (!b && !(b = static_cast<Block*>(calloc(1, sizeof(Block))))) abort();
  return b;
}

inline void give_block(Block* b) {
  pthread_mutex_lock(&idle_mutex);
  b->next = idle_blocks;
  idle_blocks = b;
  pthread_mutex_unlock(&idle_mutex);
}

inline void* work(void* argument) {
  Launch* launch = static_cast<Launch*>(argument);
  block = take_block();
  adopt_thread_stack(&block->main);
  block->kernel = launch->kernel;
  block->body = launch->body;
  block->params = launch->params;
  block->grid = launch->grid;
  block->threads = launch->threads;
  block->dynamic_bytes = launch->dynamic_bytes;
  block->error[0] = 0;
  while (!__atomic_load_n(&launch->failed, __ATOMIC_RELAXED)) {
    unsigned long long i = __atomic_fetch_add(&launch->next_block, 1, __ATOMIC_RELAXED);
    if (i >= launch->blocks) break;
    unsigned long long plane = (unsigned long long)launch->grid.x * launch->grid.y;
    run_block(uint3{unsigned(i % launch->grid.x), unsigned(i % plane / launch->grid.x), unsigned(i / plane)});
    if (block->error[0]) {
      if (!__atomic_exchange_n(&launch->failed, 1, __ATOMIC_SEQ_CST))
        snprintf(launch->error, launch->error_bytes, "%s", block->error);
      break;
    }
  }
  fiber_pool->give(block->free_fibers);
  block->free_fibers = nullptr;
  give_block(block);
  block = nullptr;
  return nullptr;
}

inline int run(Launch launch, int workers, FiberPool* pool) {
  constexpr int kMaxWorkers = 256;
  fiber_pool = pool;
  pthread_t helper[kMaxWorkers];
  launch.blocks = (unsigned long long)launch.grid.x * launch.grid.y * launch.grid.z;
  if (workers > kMaxWorkers) workers = kMaxWorkers;
  if ((unsigned long long)workers > launch.blocks) workers = int(launch.blocks);
  int helpers = 0;
  while (helpers < workers - 1 && !pthread_create(&helper[helpers], nullptr, work, &launch)) ++helpers;
  work(&launch);
  for (int i = 0; i < helpers; ++i) pthread_join(helper[i], nullptr);
  return launch.failed;
}

template <class Kernel>
void body(const void* params) {
  Kernel::run(*static_cast<const typename Kernel::Params*>(params));
}

}  // namespace emulator

inline float half_to_float(unsigned short bits) {
  unsigned sign = unsigned(bits & 0x8000) << 16, exponent = bits >> 10 & 31, mantissa = bits & 1023, word;
  float value;
  if (exponent == 0) {
    value = float(mantissa) * 5.9604644775390625e-8f;
    memcpy(&word, &value, 4);
    word |= sign;
  } else {
    word = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
  }
  memcpy(&value, &word, 4);
  return value;
}

inline unsigned short float_to_half(float value) {
  unsigned word;
  memcpy(&word, &value, 4);
  unsigned sign = word >> 16 & 0x8000, magnitude = word & 0x7fffffff;
  if (magnitude > 0x7f800000) return (unsigned short)(sign | 0x7fff);
  if (magnitude >= 0x477ff000) return (unsigned short)(sign | 0x7c00);
  if (magnitude < 0x38800000) {  // subnormal in half: let the float adder round at 2^-24
    float shifted;
    memcpy(&shifted, &magnitude, 4);
    shifted += 0.5f;
    unsigned rounded;
    memcpy(&rounded, &shifted, 4);
    return (unsigned short)(sign | (rounded - 0x3f000000));
  }
  unsigned rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return (unsigned short)(sign | ((rounded - 0x38000000) >> 13));
}

inline unsigned short float_to_bfloat16(float value) {
  unsigned word;
  memcpy(&word, &value, 4);
  if ((word & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return (unsigned short)((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

}  // namespace rawkern

inline float __uint_as_float(unsigned word) {
  float value;
  memcpy(&value, &word, 4);
  return value;
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  unsigned long long bytes = (unsigned long long)high << 32 | low, result = 0;
  for (int i = 0; i < 4; ++i) result |= (bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return unsigned(result);
}
inline unsigned __float_as_uint(float value) {
  unsigned word;
  memcpy(&word, &value, 4);
  return word;
}

inline int __popc(unsigned word) { return __builtin_popcount(word); }
inline int __ffs(unsigned word) { return __builtin_ffs(int(word)); }

#define threadIdx (uint3{unsigned(::rawkern::emulator::block->current), 0u, 0u})
#define blockIdx (::rawkern::emulator::block->index)
#define gridDim (::rawkern::emulator::block->grid)
#define blockDim (uint3{unsigned(::rawkern::emulator::block->threads), 1u, 1u})

#define RAWKERN_PLACE (::rawkern::emulator::Place{__FILE__, __LINE__})
#define __syncthreads() ::rawkern::emulator::barrier(RAWKERN_PLACE)
#define __syncwarp() ::rawkern::emulator::warp_barrier(RAWKERN_PLACE)
#define __shfl_sync(mask, value, source) \
  ::rawkern::emulator::shuffle(RAWKERN_PLACE, mask, value, int(source) & (::rawkern::emulator::kWarpSize - 1))
#define __shfl_xor_sync(mask, value, bits) \
  ::rawkern::emulator::shuffle(RAWKERN_PLACE, mask, value, ::rawkern::emulator::lane_id() ^ (bits))
#define __shfl_down_sync(mask, value, distance) \
  ::rawkern::emulator::shuffle(RAWKERN_PLACE, mask, value, ::rawkern::emulator::lane_id() + int(distance))
#define __shfl_up_sync(mask, value, distance) \
  ::rawkern::emulator::shuffle(RAWKERN_PLACE, mask, value, ::rawkern::emulator::lane_id() - int(distance))
#define __ballot_sync(mask, predicate) ::rawkern::emulator::ballot(RAWKERN_PLACE, mask, (predicate) ? 1 : 0)
#define __any_sync(mask, predicate) (__ballot_sync(mask, predicate) != 0)
#define __all_sync(mask, predicate) (__ballot_sync(mask, predicate) == ::rawkern::emulator::all_lanes())

template <class T>
inline T atomicAdd(T* address, T value) {
  T old = __atomic_load_n(address, __ATOMIC_RELAXED);
  T sum;
  do sum = old + value;
  while (!__atomic_compare_exchange(address, &old, &sum, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
  return old;
}
inline float atomicAdd(float* address, float value) {
  float old = *address, sum;
  do sum = old + value;
  while (!__atomic_compare_exchange(address, &old, &sum, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
  return old;
}
inline double atomicAdd(double* address, double value) {
  double old = *address, sum;
  do sum = old + value;
  while (!__atomic_compare_exchange(address, &old, &sum, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
  return old;
}
inline int atomicMax(int* address, int value) {
  int old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (old < value && !__atomic_compare_exchange_n(address, &old, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
  }
  return old;
}

#define RAWKERN_SHARED(Type, name) Type& name = ::rawkern::emulator::static_shared<Type>()
#define RAWKERN_DYNAMIC_SHARED(Type, name) Type& name = ::rawkern::emulator::dynamic_shared<Type>(RAWKERN_PLACE)
#define RAWKERN_KERNEL(name, ...)                                                                                      \
  extern "C" __attribute__((visibility("default"))) int rawkern_launch(const void* params, const unsigned* grid,       \
                                                                       size_t dynamic_bytes, int workers, char* error, \
                                                                       size_t error_bytes, void* pool) {               \
    using Kernel = __VA_ARGS__;                                                                                        \
    static_assert(Kernel::kThreads <= ::rawkern::emulator::kMaxThreads, "a block has at most 1024 threads");           \
    return ::rawkern::emulator::run(::rawkern::emulator::Launch{#name, ::rawkern::emulator::body<Kernel>, params,      \
                                                                uint3{grid[0], grid[1], grid[2]}, Kernel::kThreads,    \
                                                                dynamic_bytes, 0, 0, error, error_bytes, 0},           \
                                    workers, static_cast<::rawkern::emulator::FiberPool*>(pool));                      \
  }
