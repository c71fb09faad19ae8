// SPDX-License-Identifier: Apache-2.0
// Shared memory: one struct per kernel, placed at the start of the dynamic window.
//
// A kernel declares `struct SharedStorage { ... };`, its whole plan in one place, takes
// `auto& shared = shared_storage<SharedStorage>();` and passes sizeof(SharedStorage) to launch().
// `__shared__` variables are not used: the emulator checks and poisons the one window.
#pragma once
#include "common/target.h"

namespace reeltime {

// NOTE: 1024-byte alignment is what the 128-byte swizzle of TMA and wgmma needs.
template <class Storage>
DEVICE Storage& shared_storage() {
  static_assert(alignof(Storage) <= 1024, "");
#if REELTIME_EMULATED
  return *reinterpret_cast<Storage*>(emulator::current->shared);
#else
  extern __shared__ __align__(1024) unsigned char reeltime_shared_window[];
  return *reinterpret_cast<Storage*>(reeltime_shared_window);
#endif
}

// The 32-bit address that ldmatrix, cp.async, mbarrier, TMA and descriptors take.
DEVICE uint32_t shared_address(const void* pointer) {
#if REELTIME_EMULATED
  return emulator::shared_address(pointer);
#else
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
#endif
}

}  // namespace reeltime
