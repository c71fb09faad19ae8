// SPDX-License-Identifier: Apache-2.0
// Atomic additions and maxima, in global or shared memory, and the fence of "the last block
// finishes".
//
//   all threads: store partial results;  sync_block();
//   one of them: fence_device();  last = atomic_add(counter, 1) == blocks - 1;  fence_device();
//   all threads: learn of it;  sync_block();  if last, combine what all blocks have stored
//
// NOTE: both fences are needed, by the thread of the atomic: the first hands over what it knows,
// the second takes what others handed over.  The emulator reports a race where one is missing.
// NOTE: sums of floats depend on the order of arrival; kernels that must repeat bit for bit use
// integers.  The emulator runs blocks one after another: a block must not wait for another.
#pragma once
#include "common/target.h"

namespace reeltime {

// Returns the value before.  T: int, unsigned or float.
template <class T>
DEVICE T atomic_add(T* pointer, T value) {
#if REELTIME_EMULATED
  T before;
  emulator::atomic(
      pointer, sizeof(T), &before, "atom.add",
      [](void* p, const void* v) { *static_cast<T*>(p) += *static_cast<const T*>(v); }, &value);
  return before;
#else
  return atomicAdd(pointer, value);
#endif
}

// T: int or unsigned; of non-negative floats by their bits.
template <class T>
DEVICE T atomic_max(T* pointer, T value) {
#if REELTIME_EMULATED
  T before;
  emulator::atomic(
      pointer, sizeof(T), &before, "atom.max",
      [](void* p, const void* v) {
        T& x = *static_cast<T*>(p);
        x = max(x, *static_cast<const T*>(v));
      },
      &value);
  return before;
#else
  return atomicMax(pointer, value);
#endif
}

// What the thread wrote before it, or knows through barriers, is seen by the whole device before
// what it writes after; and what it read before, before what it reads after.
DEVICE void fence_device() {
#if REELTIME_EMULATED
  emulator::fence_device();
#else
  __threadfence();
#endif
}

}  // namespace reeltime
