// SPDX-License-Identifier: Apache-2.0
// mma.sync: D += A * B on one warp's registers.  A is [16, K] row-major, B [K, 8] column-major
// (that is [N, K] with K contiguous), D [16, 8]; K is 32 for 8-bit and 16 for 16-bit elements, 32
// bytes either way.
//
// With g = lane / 4 and t = lane % 4, and c = 4 * t bytes:
//   a[0] row g,     bytes c ... c + 3       b[0] column g, bytes c ... c + 3
//   a[1] row g + 8, bytes c ... c + 3       b[1] column g, bytes c + 16 ... c + 19
//   a[2] row g,     bytes c + 16 ...        d[0], d[1] row g,     columns 2 * t, 2 * t + 1
//   a[3] row g + 8, bytes c + 16 ...        d[2], d[3] row g + 8, columns 2 * t, 2 * t + 1
// PTX ISA, "Matrix Fragments for mma.m16n8k32" and "... mma.m16n8k16".
//
// int8 sums are exact.  Floating-point sums: the emulator adds exact products in double and rounds
// once; hardware keeps fewer bits while it adds (about 22 for e4m3), in an order of its own.
#pragma once
#include "common/types.h"

namespace reeltime {

#if REELTIME_EMULATED
#define REELTIME_MMA(NAME, D, CONSTRAINT, TYPE, PTX)                                         \
  DEVICE void NAME(D(&d)[4], const uint32_t (&a)[4], const uint32_t b0, const uint32_t b1) { \
    const uint32_t b[2] = {b0, b1};                                                          \
    emulator::mma(emulator::Element::TYPE, d, a, b);                                         \
  }
#else
#define REELTIME_MMA(NAME, D, CONSTRAINT, TYPE, PTX)                                         \
  DEVICE void NAME(D(&d)[4], const uint32_t (&a)[4], const uint32_t b0, const uint32_t b1) { \
    asm volatile("mma.sync.aligned." PTX                                                     \
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"          \
                 : CONSTRAINT(d[0]), CONSTRAINT(d[1]), CONSTRAINT(d[2]), CONSTRAINT(d[3])    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));            \
  }
#endif

REELTIME_MMA(mma_s8, int32_t, "+r", kS8, "m16n8k32.row.col.s32.s8.s8.s32")
// sm_89 and later.  NOTE: on sm_90 and sm_100 it becomes two f16 products; use wgmma there.
REELTIME_MMA(mma_e4m3, float, "+f", kE4m3, "m16n8k32.row.col.f32.e4m3.e4m3.f32")
REELTIME_MMA(mma_f16, float, "+f", kF16, "m16n8k16.row.col.f32.f16.f16.f32")
REELTIME_MMA(mma_bf16, float, "+f", kBf16, "m16n8k16.row.col.f32.bf16.bf16.f32")

#undef REELTIME_MMA

// Whether the GPU being compiled for has mma_e4m3, and not two f16 products in its place: kernels
// for all of them ask, with if constexpr.
#if REELTIME_EMULATED || (__CUDA_ARCH__ >= 890 && __CUDA_ARCH__ < 900) || __CUDA_ARCH__ >= 1200
constexpr bool kHasMmaE4m3 = true;
#else
constexpr bool kHasMmaE4m3 = false;
#endif

// Sums in float16, twice as fast as float on sm_89 and sm_120: d[0] holds row g, columns 2 * t and
// 2 * t + 1, d[1] row g + 8.  NOTE: overflows beyond 65504 and rounds to 11 bits at every
// instruction; scale the operands for it, and move the sums to float every few instructions.
DEVICE void mma_e4m3_half(uint32_t (&d)[2], const uint32_t (&a)[4], const uint32_t b0,
                          const uint32_t b1) {
#if REELTIME_EMULATED
  const uint32_t b[2] = {b0, b1};
  emulator::mma_half(emulator::Element::kE4m3, d, a, b);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.f16.e4m3.e4m3.f16 "
      "{%0, %1}, {%2, %3, %4, %5}, {%6, %7}, {%0, %1};"
      : "+r"(d[0]), "+r"(d[1])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// The same of float16 operands; whether it is faster than mma_f16 on the GPU being compiled for.
#if __CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200
constexpr bool kFastHalfSums = true;
#else
constexpr bool kFastHalfSums = false;
#endif

DEVICE void mma_f16_half(uint32_t (&d)[2], const uint32_t (&a)[4], const uint32_t b0,
                         const uint32_t b1) {
#if REELTIME_EMULATED
  const uint32_t b[2] = {b0, b1};
  emulator::mma_half(emulator::Element::kF16, d, a, b);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 "
      "{%0, %1}, {%2, %3, %4, %5}, {%6, %7}, {%0, %1};"
      : "+r"(d[0]), "+r"(d[1])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

}  // namespace reeltime
