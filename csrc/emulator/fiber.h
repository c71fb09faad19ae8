// SPDX-License-Identifier: Apache-2.0
// A stack of its own for every CUDA thread, and the switch between them.
#pragma once
#include <cstddef>
#include <cstdint>

// Elsewhere ucontext, several times slower, does; REELTIME_UCONTEXT chooses it for a test.
#if !defined(__x86_64__) || defined(REELTIME_UCONTEXT)
#define REELTIME_SWITCH_BY_UCONTEXT 1
#include <ucontext.h>
#endif

namespace reeltime::emulator {

constexpr size_t kStackBytes = 128 << 10;

// A suspended flow of control.  The scheduler's own context keeps the thread's ordinary stack.
struct Context {
#if !defined(REELTIME_SWITCH_BY_UCONTEXT)
  void* stack_pointer = nullptr;
#else
  ucontext_t state;
#endif
  char* stack = nullptr;  // lowest usable byte; null for the scheduler
  size_t stack_bytes = 0;
  const void* sanitizer_stack = nullptr;  // AddressSanitizer's view of the scheduler's stack
  void* fake_stack = nullptr;
};

// The pool of stacks, and another library's in its place: a stack is two mappings, of which a
// process may have some 65,000, and each test that plants a mistake loads a library of its own.
void* shared_stacks();
void share_stacks(void* of_another);

// The n-th stack of the pool, with an inaccessible page below it.
char* fiber_stack(unsigned n);

// Makes `context` start entry() on `stack` at the first switch to it.  entry never returns.
void prepare(Context& context, char* stack, void (*entry)());

// Saves the running flow into `from` and continues `to`.  `last`: `from` never runs again.
void switch_context(Context& from, Context& to, bool last = false);

// To be called first by entry(): completes the switch that started this fiber.
void fiber_started(Context& scheduler);

}  // namespace reeltime::emulator
