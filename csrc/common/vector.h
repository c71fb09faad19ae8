// SPDX-License-Identifier: Apache-2.0
// Global memory in 16-byte pieces: the widest access of a thread, and what bandwidth needs.
//
// Pointers must be aligned to 16 bytes; the emulator checks that and the range.
#pragma once
#include "common/types.h"

namespace reeltime {

template <class T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T at[kSize];
};

// Read once: does not evict what other threads reuse from L1.
template <class T>
DEVICE Vector<T> load_streaming(const T* pointer) {
  Vector<T> v;
#if REELTIME_EMULATED
  emulator::check_global(pointer, 16, 16, false, "ld.global");
  memcpy(&v, pointer, 16);
#else
  uint32_t* r = reinterpret_cast<uint32_t*>(&v);
  asm volatile("ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "l"(pointer));
#endif
  return v;
}

// Constant for the whole launch, which the emulator checks, and reused: cached in L1.
// NOTE: volatile, or the compiler moves it out of loops and of the conditions that guard it.
template <class T>
DEVICE Vector<T> load_cached(const T* pointer) {
  Vector<T> v;
#if REELTIME_EMULATED
  emulator::check_constant(pointer, 16, 16, "ld.global.nc");
  memcpy(&v, pointer, 16);
#else
  uint32_t* r = reinterpret_cast<uint32_t*>(&v);
  asm volatile("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "l"(pointer));
#endif
  return v;
}

// Brings the cache line of an address into L2, and waits for nothing.
DEVICE void prefetch_l2(const void* pointer) {
#if REELTIME_EMULATED
  emulator::check_global(pointer, 1, 1, false, "prefetch");
#else
  asm volatile("prefetch.global.L2 [%0];" ::"l"(pointer));
#endif
}

template <class T>
DEVICE void store_vector(T* pointer, const Vector<T>& v) {
#if REELTIME_EMULATED
  emulator::check_global(pointer, 16, 16, true, "st.global");
  memcpy(pointer, &v, 16);
#else
  const uint32_t* r = reinterpret_cast<const uint32_t*>(&v);
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(pointer), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
#endif
}

}  // namespace reeltime
