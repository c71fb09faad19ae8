// SPDX-License-Identifier: Apache-2.0
// Fast functions of one instruction, with the error that the PTX ISA promises.
//
// The host twins are the exact functions: a test must allow the documented error, never compare
// bits.  Subnormal inputs and results count as zero (.ftz), on the host too.
#pragma once
#include "common/types.h"

namespace reeltime {

// exp(x) = 2^(x kLog2E), log(x) = log2(x) kLn2.
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

#if REELTIME_EMULATED
namespace soft {
inline float flush(float x) { return x < 1.17549435e-38f && x > -1.17549435e-38f ? x * 0.0f : x; }
}  // namespace soft
#endif

// 2^x, relative error at most 2^-22.  16 per clock and SM: in attention the bound, see exp2_fma.
DEVICE float exp2_approx(float x) {
#if REELTIME_EMULATED
  return soft::flush(std::exp2(soft::flush(x)));
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// 2^x for x in [-126, 0] on the FMA pipe, relative error at most 1.1e-4: below the rounding of e4m3
// (2^-4) and of bfloat16 (2^-8).  Splits x = n + f with |f| <= 1/2: adding 1.5 * 2^23 leaves n in
// the low bits, which then are the exponent; 2^f is the cubic of least relative error that is 1 at
// 0.  Below -126 the result is clamped to 2^-126.
DEVICE float exp2_fma(float x) {
  x = x < -126.0f ? -126.0f : x;
  const float shifted = x + 12582912.0f;
  const float f = x - (shifted - 12582912.0f);
  float y = fmaf(f, 0.05500893f, 0.242211f);
  y = fmaf(f, y, 0.69328293f);
  y = fmaf(f, y, 1.0f);
  return float_of(bits_of(y) + (bits_of(shifted) << 23));
}

// 1 / sqrt(x), relative error at most 2^-22.9.
DEVICE float rsqrt_approx(float x) {
#if REELTIME_EMULATED
  return 1.0f / std::sqrt(soft::flush(x));
#else
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// 1 / x, at most 1 ulp off.
DEVICE float reciprocal_approx(float x) {
#if REELTIME_EMULATED
  return soft::flush(1.0f / soft::flush(x));
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// tanh(x), relative error at most 2^-11: enough in front of an 8-bit or bfloat16 store.
DEVICE float tanh_approx(float x) {
#if REELTIME_EMULATED
  return std::tanh(x);
#else
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

}  // namespace reeltime
