// SPDX-License-Identifier: Apache-2.0
// Atomic additions and maxima, in global or shared memory, and the fence of "the last block
// finishes".
//
//   store partial results;  fence_device();  if (atomic_add(counter, 1) == blocks - 1) combine them
//
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

// Writes before it are seen, by the whole device, before writes after it.
DEVICE void fence_device() {
#if !REELTIME_EMULATED
  __threadfence();
#endif
}

}  // namespace reeltime
