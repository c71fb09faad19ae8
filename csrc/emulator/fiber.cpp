// SPDX-License-Identifier: Apache-2.0
#include "emulator/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <vector>

// AddressSanitizer must know on which stack the program runs.  The references are weak: the same
// object file serves the plain build, where they are null.
extern "C" {
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** save, const void* stack, size_t n);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* save, const void** old, size_t* n);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void* address, size_t n);
}

namespace reeltime::emulator {

#if !defined(REELTIME_SWITCH_BY_UCONTEXT)

// System V ABI: rbx, rbp, r12 to r15, MXCSR and the x87 control word survive a call; all other
// state is the caller's.  So a switch is a call that returns on another stack.
extern "C" void reeltime_switch_stack(void** save, void* restore);
asm(R"(
.text
.p2align 4
.globl reeltime_switch_stack
.hidden reeltime_switch_stack
.type reeltime_switch_stack,@function
reeltime_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  subq $8, %rsp
  stmxcsr (%rsp)
  fnstcw 4(%rsp)
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  ldmxcsr (%rsp)
  fldcw 4(%rsp)
  addq $8, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size reeltime_switch_stack, .-reeltime_switch_stack
)");

#endif

namespace {
std::vector<char*> own_stacks;
std::vector<char*>* stacks = &own_stacks;
}  // namespace

void* shared_stacks() { return stacks; }
void share_stacks(void* of_another) { stacks = static_cast<std::vector<char*>*>(of_another); }

char* fiber_stack(unsigned n) {
  std::vector<char*>& pool = *stacks;  // for the life of the process: mapping costs more than use
  const size_t guard = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  while (pool.size() <= n) {
    void* region = mmap(nullptr, guard + kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (region == MAP_FAILED || mprotect(region, guard, PROT_NONE) != 0) std::abort();
    pool.push_back(static_cast<char*>(region) + guard);
  }
  return pool[n];
}

void prepare(Context& context, char* stack, void (*entry)()) {
  context = {};
  context.stack = stack;
  context.stack_bytes = kStackBytes;
  // An aborted launch leaves the marks of frames that were never left.
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(stack, kStackBytes);
#if !defined(REELTIME_SWITCH_BY_UCONTEXT)
  // As if entry had been called and had just suspended itself: a null return address (which keeps
  // rsp % 16 == 8 at entry, as after a call), entry, six saved registers, the control words.
  void** top = reinterpret_cast<void**>(stack + kStackBytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  *--top = nullptr;
  uint32_t control[2];
  asm volatile("stmxcsr %0\n\tfnstcw %1" : "=m"(control[0]), "=m"(control[1]));
  reinterpret_cast<uint32_t*>(top)[0] = control[0];
  reinterpret_cast<uint32_t*>(top)[1] = control[1] & 0xffff;
  context.stack_pointer = top;
#else
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = stack;
  context.state.uc_stack.ss_size = kStackBytes;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
#endif
}

void switch_context(Context& from, Context& to, bool last) {
  if (__sanitizer_start_switch_fiber) {
    const void* stack = to.stack ? to.stack : to.sanitizer_stack;
    __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, stack, to.stack_bytes);
  }
#if !defined(REELTIME_SWITCH_BY_UCONTEXT)
  reeltime_switch_stack(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.state, &to.state);
#endif
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
}

void fiber_started(Context& scheduler) {
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler.sanitizer_stack, &scheduler.stack_bytes);
}

}  // namespace reeltime::emulator
