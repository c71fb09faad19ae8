// SPDX-License-Identifier: Apache-2.0
// The 8- and 16-bit numbers: plain bits, and the conversion that each GPU instruction makes.
//
//   e4m3      1 sign, 4 exponent, 3 mantissa bits; largest 448; no infinity; NaN is s.1111.111
//   float16   1, 5, 10          bfloat16  1, 8, 7
//
// from_float rounds to nearest even; subnormals are kept.  e4m3 saturates (448 also for infinity),
// float16 and bfloat16 overflow to infinity.  NaN becomes the one NaN that cvt produces, 0x7f or
// 0x7fff.  PTX ISA, "Data Movement and Conversion Instructions: cvt".  The integer code below is
// the host twin, and e4m3's only way before sm_89.
#pragma once
#include "common/target.h"

namespace reeltime {

struct float16 {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};
struct e4m3 {
  uint8_t bits;
};

HOST_DEVICE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
HOST_DEVICE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// --- Conversions by integer arithmetic ---------------------------------------------------------

namespace soft {

// The bits of |x| (those of a float, not NaN) with fewer exponent and mantissa bits, rounded to
// nearest even.  The carry out of the mantissa lands in the exponent, which is what it should do;
// the caller handles overflow.
HOST_DEVICE constexpr uint32_t narrow(uint32_t magnitude, int mantissa_bits, int bias) {
  const int float_exponent = static_cast<int>(magnitude >> 23);
  const uint32_t hidden = float_exponent ? 1u << 23 : 0;
  const uint32_t significand = (magnitude & 0x7fffffu) | hidden;
  // A float subnormal has the exponent of the smallest normal one.
  const int exponent = (float_exponent ? float_exponent : 1) - 127 + bias;
  const int below = exponent < 1 ? 1 - exponent : 0;  // how far under the smallest normal number
  const int drop = 23 - mantissa_bits + below;
  if (drop > 24) return 0;  // less than half of the smallest subnormal number
  uint32_t kept = significand >> drop;
  const uint32_t rest = significand - (kept << drop), half = 1u << (drop - 1);
  kept += rest > half || (rest == half && (kept & 1));
  // The hidden bit, still in `kept`, adds the last 1 to the exponent.
  return kept + (exponent > 1 ? static_cast<uint32_t>(exponent - 1) << mantissa_bits : 0);
}

// The float with the value of narrower bits, which must not be NaN or infinite.
HOST_DEVICE float widen(uint32_t magnitude, int mantissa_bits, int bias) {
  const uint32_t exponent = magnitude >> mantissa_bits;
  if (exponent == 0) {  // subnormal: an integer times the smallest one
    const float unit = float_of(static_cast<uint32_t>(127 + 1 - bias - mantissa_bits) << 23);
    return static_cast<float>(magnitude) * unit;
  }
  return float_of((magnitude << (23 - mantissa_bits)) + (static_cast<uint32_t>(127 - bias) << 23));
}

HOST_DEVICE bool is_nan(uint32_t float_bits) { return (float_bits & 0x7fffffffu) > 0x7f800000u; }

HOST_DEVICE uint8_t to_e4m3(float x) {
  const uint32_t bits = bits_of(x);
  if (is_nan(bits)) return 0x7f;
  const uint32_t magnitude = narrow(min(bits & 0x7fffffffu, 0x43e00000u /* 448.0f */), 3, 7);
  return static_cast<uint8_t>(magnitude | (bits >> 31) << 7);
}

HOST_DEVICE float from_e4m3(uint8_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x80) << 24;
  if ((bits & 0x7f) == 0x7f) return float_of(0x7fffffffu);
  return float_of(bits_of(widen(bits & 0x7f, 3, 7)) | sign);
}

HOST_DEVICE uint16_t to_float16(float x) {
  const uint32_t bits = bits_of(x);
  if (is_nan(bits)) return 0x7fff;
  const uint32_t infinity = 0x7c00;
  const uint32_t limit = min(bits & 0x7fffffffu, 0x47800000u /* 65536.0f: past the last */);
  return static_cast<uint16_t>(min(narrow(limit, 10, 15), infinity) | (bits >> 31) << 15);
}

HOST_DEVICE float from_float16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
  if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000u | (magnitude & 0x3ff) << 13);
  return float_of(bits_of(widen(magnitude, 10, 15)) | sign);
}

HOST_DEVICE uint16_t to_bfloat16(float x) {
  const uint32_t bits = bits_of(x);
  if (is_nan(bits)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace soft

// --- One number --------------------------------------------------------------------------------

template <class T>
DEVICE T from_float(float x);

template <>
DEVICE float from_float<float>(float x) {
  return x;
}

template <>
DEVICE float16 from_float<float16>(float x) {
#if REELTIME_EMULATED
  return {soft::to_float16(x)};
#else
  float16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#endif
}

template <>
DEVICE bfloat16 from_float<bfloat16>(float x) {
#if REELTIME_EMULATED
  return {soft::to_bfloat16(x)};
#else
  bfloat16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#endif
}

template <>
DEVICE e4m3 from_float<e4m3>(float x) {
#if REELTIME_EMULATED || __CUDA_ARCH__ < 890
  return {soft::to_e4m3(x)};
#else
  uint16_t pair;  // the instruction makes two
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(x));
  return {static_cast<uint8_t>(pair & 0xff)};
#endif
}

// Nearest even, saturated to [-128, 127]; NaN becomes 0.  cvt.rni.sat.s8.f32
template <>
DEVICE int8_t from_float<int8_t>(float x) {
#if REELTIME_EMULATED
  return x != x ? int8_t{0} : static_cast<int8_t>(std::nearbyint(min(max(x, -128.0f), 127.0f)));
#else
  int32_t y;
  asm("cvt.rni.sat.s8.f32 %0, %1;" : "=r"(y) : "f"(x));
  return static_cast<int8_t>(y);
#endif
}

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(int8_t x) { return static_cast<float>(x); }
DEVICE float to_float(bfloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
DEVICE float to_float(float16 x) {
#if REELTIME_EMULATED
  return soft::from_float16(x.bits);
#else
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#endif
}
DEVICE float to_float(e4m3 x) {
#if REELTIME_EMULATED || __CUDA_ARCH__ < 890
  return soft::from_e4m3(x.bits);
#else
  uint32_t pair;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(static_cast<uint16_t>(x.bits)));
  return to_float(float16{static_cast<uint16_t>(pair & 0xffff)});
#endif
}

}  // namespace reeltime
