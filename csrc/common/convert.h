// SPDX-License-Identifier: Apache-2.0
// Conversions of whole registers: what a kernel stores or feeds to a tensor core.
//
// Packed operands hold their first element in the lowest bits, as memory does.
#pragma once
#include "common/types.h"

namespace reeltime {

// --- int32 sums to float, without the slow conversion instruction --------------------------------

// An accumulator that starts at kIntBias instead of 0 holds, read as a float, 12582912 + sum, as
// long as |sum| < 2^22: the float 1.5 * 2^23 has an ulp of 1.  One exact FADD gives the sum; I2F
// runs at a quarter of the rate or less.  A K block of 128 int8 products stays below 127^2 * 128 <
// 2^21.
constexpr int32_t kIntBias = 0x4b400000;
constexpr float kIntBiasFloat = 12582912.0f;

DEVICE float biased_to_float(int32_t biased_sum) {
  return float_of(static_cast<uint32_t>(biased_sum)) - kIntBiasFloat;
}

// --- Pairs -------------------------------------------------------------------------------------

template <class T>
DEVICE uint32_t pack2(float low, float high);

template <>
DEVICE uint32_t pack2<float16>(float low, float high) {
#if REELTIME_EMULATED
  return soft::to_float16(low) | static_cast<uint32_t>(soft::to_float16(high)) << 16;
#else
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#endif
}

template <>
DEVICE uint32_t pack2<bfloat16>(float low, float high) {
#if REELTIME_EMULATED
  return soft::to_bfloat16(low) | static_cast<uint32_t>(soft::to_bfloat16(high)) << 16;
#else
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#endif
}

// --- Four 8-bit numbers --------------------------------------------------------------------------

template <class T>
DEVICE uint32_t pack4(float x0, float x1, float x2, float x3);

// Two instructions for four numbers where the hardware has them.
template <>
DEVICE uint32_t pack4<e4m3>(float x0, float x1, float x2, float x3) {
#if REELTIME_EMULATED || __CUDA_ARCH__ < 890
  return soft::to_e4m3(x0) | static_cast<uint32_t>(soft::to_e4m3(x1)) << 8 |
         static_cast<uint32_t>(soft::to_e4m3(x2)) << 16 |
         static_cast<uint32_t>(soft::to_e4m3(x3)) << 24;
#else
  uint16_t low, high;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(x1), "f"(x0));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(x3), "f"(x2));
  return low | static_cast<uint32_t>(high) << 16;
#endif
}

// Rounding by the same trick as above: after adding 1.5 * 2^23 the low byte of the float is the
// integer, in two's complement, rounded to nearest even.  |x| <= 127 is the caller's to ensure.
// Three byte permutes gather four of them: 4 FADD + 3 PRMT, no F2I.
template <>
DEVICE uint32_t pack4<int8_t>(float x0, float x1, float x2, float x3) {
  const uint32_t b0 = bits_of(x0 + kIntBiasFloat), b1 = bits_of(x1 + kIntBiasFloat);
  const uint32_t b2 = bits_of(x2 + kIntBiasFloat), b3 = bits_of(x3 + kIntBiasFloat);
#if REELTIME_EMULATED
  return (b0 & 0xff) | (b1 & 0xff) << 8 | (b2 & 0xff) << 16 | b3 << 24;
#else
  uint32_t low, high, all;
  asm("prmt.b32 %0, %1, %2, 0x0040;" : "=r"(low) : "r"(b0), "r"(b1));
  asm("prmt.b32 %0, %1, %2, 0x0040;" : "=r"(high) : "r"(b2), "r"(b3));
  asm("prmt.b32 %0, %1, %2, 0x5410;" : "=r"(all) : "r"(low), "r"(high));
  return all;
#endif
}

// Four bytes of eight, `low` holding bytes 0 to 3: digit i of the selector, in base 16 and 0 to 7,
// names byte i of the result.  PTX ISA, "prmt".
DEVICE uint32_t byte_permute(uint32_t low, uint32_t high, uint32_t selector) {
#if REELTIME_EMULATED
  const uint64_t bytes = low | static_cast<uint64_t>(high) << 32;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++)
    result |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
#else
  return __byte_perm(low, high, selector);
#endif
}

// The i-th number of a register, as a float.
template <class T>
DEVICE float unpack(uint32_t packed, int i) {
  if constexpr (sizeof(T) == 2)
    return to_float(T{static_cast<uint16_t>(packed >> 16 * i & 0xffff)});
  else
    return to_float(T{static_cast<uint8_t>(packed >> 8 * i & 0xff)});
}

template <>
DEVICE float unpack<int8_t>(uint32_t packed, int i) {
  return static_cast<float>(static_cast<int8_t>(packed >> 8 * i & 0xff));
}

// The pair of bfloat16 nearest to x0 and x1, which keep what it leaves: three such terms make up a
// float32.
DEVICE uint32_t take_term(float& x0, float& x1) {
  const uint32_t pair = pack2<bfloat16>(x0, x1);
  x0 -= unpack<bfloat16>(pair, 0), x1 -= unpack<bfloat16>(pair, 1);
  return pair;
}

}  // namespace reeltime
