// SPDX-License-Identifier: Apache-2.0
// cp.async (sm_80): 16 bytes from global to shared memory, without passing through registers.
//
//   cp_async(...)  cp_async(...)  cp_async_commit()     one group, of this thread
//   cp_async_wait<1>()                                  all but the newest group have landed
//   sync_block()                                        and now for every thread
//
// NOTE: the wait covers the copies of the calling thread only; without the barrier after it, other
// threads' copies may still be missing.  PTX ISA, "Data Movement: cp.async".
#pragma once
#include "common/shared.h"

namespace reeltime {

// Fills 16 bytes; with `valid` false they are zeros and the source is not read (but must be a
// pointer that may be formed).  Bypasses L1: each byte is used by one block.
DEVICE void cp_async(uint32_t destination, const void* source, bool valid = true) {
#if REELTIME_EMULATED
  emulator::cp_async(destination, source, 16, valid ? 16 : 0);
#else
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(destination),
               "l"(source), "r"(valid ? 16 : 0)
               : "memory");
#endif
}

DEVICE void cp_async_commit() {
#if REELTIME_EMULATED
  emulator::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int kPending>
DEVICE void cp_async_wait() {
#if REELTIME_EMULATED
  emulator::cp_async_wait(kPending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace reeltime
