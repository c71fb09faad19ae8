// SPDX-License-Identifier: Apache-2.0
// Eight bits and a scale: the arithmetic of reeltime.quant, bit for bit.
//
//   scale = amax / limit, 1 for a block of zeros, NaN for one that holds NaN or Inf
//   code  = round(x / scale), to nearest even, saturated; zeros where the scale is NaN
#pragma once
#include "common/convert.h"

namespace reeltime {

// The largest magnitude that a format stores.
template <class T>
constexpr float kLimit = 0.0f;
template <>
inline constexpr float kLimit<int8_t> = 127.0f;
template <>
inline constexpr float kLimit<e4m3> = 448.0f;

// |x|, with infinity for NaN, which a maximum cannot lose.
DEVICE float magnitude(float x) {
  return x == x ? float_of(bits_of(x) & 0x7fffffffu) : float_of(0x7f800000u);
}

// max(amax, |x|), NaN once either is: one instruction per element where magnitude() and max take
// four.  block_scale() makes the same of NaN and of infinity.  PTX ISA, "max": .NaN.
DEVICE float max_magnitude(float amax, float x) {
#if REELTIME_EMULATED
  const float size = float_of(bits_of(x) & 0x7fffffffu);
  return amax == amax && size == size ? max(amax, size) : float_of(0x7fffffffu);
#else
  float y;
  asm("{\n.reg .f32 size;\nabs.f32 size, %2;\nmax.NaN.f32 %0, %1, size;\n}"
      : "=f"(y)
      : "f"(amax), "f"(x));
  return y;
#endif
}

DEVICE float block_scale(float amax, float limit) {
  const float scale = amax / limit;  // correctly rounded: never compile with fast division
  if (scale == 0.0f) return 1.0f;
  return scale < float_of(0x7f800000u) ? scale : float_of(0x7fffffffu);
}

// x / scale, correctly rounded, with one division per scale instead of one per element: a Newton
// step from the rounded reciprocal gives the rounded quotient (Markstein, IBM Journal of Research
// and Development 34(1), 1990).  Lifting keeps the reciprocal of tiny scales finite; -0
// becomes 0.
struct Divisor {
  float step, inverse, lift;

  DEVICE explicit Divisor(float scale) : Divisor(scale, 0.0f) { inverse = 1.0f / step; }
  // With the inverse that somebody else has computed from the same scale.
  DEVICE Divisor(float scale, float inverse) : inverse(inverse) {
    lift = scale < 8.673617379884035e-19f ? 1.2089258196146292e24f : 1.0f;  // 2^-60, 2^80
    step = scale * lift;
  }
  DEVICE float divide(float x) const {
    x *= lift;
    const float y = x * inverse;
    return fmaf(fmaf(-y, step, x), inverse, y);
  }
  // Ready for pack4<T>: within the limit of T, zero where the scale is NaN.
  template <class T>
  DEVICE float encode(float x) const {
    const float y = divide(x);
    return y == y ? min(max(y, -kLimit<T>), kLimit<T>) : 0.0f;
  }
};

// encode() of several numbers under the scale that the largest of their block made, in place.  Then
// a quotient exceeds the limit by no more than its own rounding, which that of pack4 undoes:
// lifting, clamping and the test for NaN, most of the work, are left to tiny scales and NaN.
template <int kCount>
DEVICE void encode_block(float (&x)[kCount], const Divisor& by, float limit) {
  if (by.lift == 1.0f && by.step == by.step) {
#pragma unroll
    for (int i = 0; i < kCount; i++) {
      const float y = x[i] * by.inverse;
      x[i] = fmaf(fmaf(-y, by.step, x[i]), by.inverse, y);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; i++) {
      const float y = by.divide(x[i]);
      x[i] = y == y ? min(max(y, -limit), limit) : 0.0f;
    }
  }
}

template <int kCount>
DEVICE void encode_block(float (&x)[kCount], float scale, float limit) {
  encode_block(x, Divisor(scale), limit);
}

}  // namespace reeltime
