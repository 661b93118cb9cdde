// Fibers: several stacks in one OS thread, switched by hand. A switch saves the registers that a function call must
// preserve and swaps the stack pointer, a few nanoseconds; ucontext would make a system call.
#pragma once

#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#if defined(__SANITIZE_ADDRESS__)
#define RAWKERN_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define RAWKERN_ASAN 1
#endif
#endif

#ifdef RAWKERN_ASAN
extern "C" void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
extern "C" void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
extern "C" void __asan_unpoison_memory_region(const void* begin, size_t size);
#endif

namespace rawkern {
namespace emulator {

#ifdef RAWKERN_ASAN
constexpr size_t kStackBytes = 512 * 1024;  // redzones around every local make frames large
#else
constexpr size_t kStackBytes = 128 * 1024;
#endif

struct Fiber {
  void* stack_pointer;
  const void* bottom;
  size_t size;
  void* fake_stack;
  Fiber* next;
};

extern "C" void rawkern_switch_stack(void** save, void* load) __attribute__((visibility("hidden")));

#if defined(__APPLE__)
#define RAWKERN_SYMBOL(name) "_" #name
#define RAWKERN_HIDDEN(name) ".private_extern _" #name "\n"
#else
#define RAWKERN_SYMBOL(name) #name
#define RAWKERN_HIDDEN(name) ".hidden " #name "\n"
#endif

#if defined(__x86_64__)
asm(".text\n.globl " RAWKERN_SYMBOL(rawkern_switch_stack) "\n" RAWKERN_HIDDEN(rawkern_switch_stack)
    RAWKERN_SYMBOL(rawkern_switch_stack) ":\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n");
constexpr int kReturnWord = 6;
constexpr int kFrameWords = 8;  // keeps the stack at 8 modulo 16 on entry, as after a call
#elif defined(__aarch64__)
asm(".text\n.globl " RAWKERN_SYMBOL(rawkern_switch_stack) "\n" RAWKERN_HIDDEN(rawkern_switch_stack)
    RAWKERN_SYMBOL(rawkern_switch_stack) ":\n"
    "  sub sp, sp, #160\n"
    "  stp x19, x20, [sp, #0]\n  stp x21, x22, [sp, #16]\n  stp x23, x24, [sp, #32]\n  stp x25, x26, [sp, #48]\n"
    "  stp x27, x28, [sp, #64]\n  stp x29, x30, [sp, #80]\n"
    "  stp d8, d9, [sp, #96]\n  stp d10, d11, [sp, #112]\n  stp d12, d13, [sp, #128]\n  stp d14, d15, [sp, #144]\n"
    "  mov x9, sp\n  str x9, [x0]\n  mov sp, x1\n"
    "  ldp x19, x20, [sp, #0]\n  ldp x21, x22, [sp, #16]\n  ldp x23, x24, [sp, #32]\n  ldp x25, x26, [sp, #48]\n"
    "  ldp x27, x28, [sp, #64]\n  ldp x29, x30, [sp, #80]\n"
    "  ldp d8, d9, [sp, #96]\n  ldp d10, d11, [sp, #112]\n  ldp d12, d13, [sp, #128]\n  ldp d14, d15, [sp, #144]\n"
    "  add sp, sp, #160\n  ret\n");
constexpr int kReturnWord = 11;  // x30
constexpr int kFrameWords = 20;
#else
#error "rawkern's emulator knows x86-64 and 64-bit Arm"
#endif

// Switches from the running fiber to another one; returns when something switches back.
inline void switch_fiber(Fiber* from, Fiber* to) {
#ifdef RAWKERN_ASAN
  __sanitizer_start_switch_fiber(&from->fake_stack, to->bottom, to->size);
#endif
  rawkern_switch_stack(&from->stack_pointer, to->stack_pointer);
#ifdef RAWKERN_ASAN
  __sanitizer_finish_switch_fiber(from->fake_stack, nullptr, nullptr);
#endif
}

inline Fiber* new_fiber() {
  void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (stack == MAP_FAILED) {
    fprintf(stderr, "rawkern: no memory for the stack of an emulated thread\n");
    abort();
  }
  Fiber* fiber = static_cast<Fiber*>(calloc(1, sizeof(Fiber)));
  fiber->bottom = stack;
  fiber->size = kStackBytes;
  return fiber;
}

// Makes the next switch to `fiber` call entry() on an empty stack; entry must never return. Called on entry, it must
// begin with entered_fiber().
inline void start_fiber(Fiber* fiber, void (*entry)()) {
  void** top = reinterpret_cast<void**>(const_cast<char*>(static_cast<const char*>(fiber->bottom)) + fiber->size);
  void** frame = top - kFrameWords;
  for (int i = 0; i < kFrameWords; ++i) frame[i] = nullptr;
  frame[kReturnWord] = reinterpret_cast<void*>(entry);
  fiber->stack_pointer = frame;
}

inline void entered_fiber() {
#ifdef RAWKERN_ASAN
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

// Makes the stack of a fiber that will not be continued usable for another start.
inline void forget_stack(Fiber* fiber) {
#ifdef RAWKERN_ASAN
  __asan_unpoison_memory_region(fiber->bottom, fiber->size);
#else
  (void)fiber;
#endif
}

// Fibers that nobody uses, for all kernels of the process: each kernel is a library of its own, and stacks that
// hundreds of them kept would fill the memory. All zeros at first.
struct FiberPool {
  int locked;
  Fiber* idle;

  // One of them, or null.
  Fiber* take() {
    lock();
    Fiber* fiber = idle;
    if (fiber) idle = fiber->next;
    unlock();
    return fiber;
  }
  // Adds a list of fibers.
  void give(Fiber* first) {
    if (!first) return;
    Fiber* last = first;
    for (forget_stack(last); last->next; forget_stack(last)) last = last->next;
    lock();
    last->next = idle;
    idle = first;
    unlock();
  }

 private:
  void lock() {
    while (__atomic_exchange_n(&locked, 1, __ATOMIC_ACQUIRE)) sched_yield();
  }
  void unlock() { __atomic_store_n(&locked, 0, __ATOMIC_RELEASE); }
};

// Describes the OS thread's own stack, to which the fibers return.
inline void adopt_thread_stack(Fiber* fiber) {
#ifdef RAWKERN_ASAN
  pthread_attr_t attributes;
  void* bottom;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &bottom, &fiber->size);
  pthread_attr_destroy(&attributes);
  fiber->bottom = bottom;
#else
  (void)fiber;
#endif
}

}  // namespace emulator
}  // namespace rawkern
