// SPDX-License-Identifier: Apache-2.0
// The online softmax in base 2 over the accumulators of mma.sync: 16 rows and 64 keys of a warp.
//
//   x[n][e]: row g + 8 (e / 2), key 8 n + 2 t + e % 2, with g = lane / 4 and t = lane % 4
//
// An int8 score is 12582912 + sum, read as a float (convert.h), and means scale * x + bias[row]:
// one FFMA takes it to the exponent (take_scores).
#pragma once
#include "common/approx.h"
#include "common/convert.h"
#include "common/mma.h"
#include "common/reduce.h"

namespace reeltime {

constexpr float kMinusInfinity = -__builtin_inff();

constexpr float kCoarse = 0.0009765625f;  // 2^-10: probabilities are off by 2^-11 of themselves

// Scores as scale * x + bias[row].  The bias takes in -12582912 scale and is rounded: by 0.75 scale
// at most, the same for a row's 64 keys, below what one step of q and k is worth.  Where steps are
// coarse, in blocks of zeros, whose scale is 1, or of outliers, x is made exact instead.
DEVICE void take_scores(int32_t (&x)[8][4], float scale, float (&bias)[2]) {
  if (scale < kCoarse) {
#pragma unroll
    for (int r = 0; r < 2; r++) bias[r] = fmaf(-kIntBiasFloat, scale, bias[r]);
  } else {
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) x[n][e] = static_cast<int32_t>(bits_of(biased_to_float(x[n][e])));
  }
}

// Of two rows, g and g + 8.
struct SoftmaxRows {
  float largest[2], total[2];  // the running maximum; of this lane's keys, the sum
  float behind[2];             // how far below it the keys that came last are

  DEVICE void reset() {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      largest[r] = kMinusInfinity;
      total[r] = 0.0f;
    }
  }

  // The largest x of a row.
  DEVICE static float top_of(const int32_t (&x)[8][4], int r) {
    float top = kMinusInfinity;
#pragma unroll
    for (int n = 0; n < 8; n++)
      top = max(top, max(as_float(x[n][2 * r]), as_float(x[n][2 * r + 1])));
    return warp_reduce<4>(top, [](float a, float b) { return max(a, b); });
  }

  // Takes in the scores' maximum.  bias then leads to exponents; what was summed before counts
  // `past` times.  Returns whether that is 1 for all rows of the warp, as it mostly is.
  DEVICE bool raise(const int32_t (&x)[8][4], float scale, float (&bias)[2], float (&past)[2]) {
    return raise({top_of(x, 0), top_of(x, 1)}, scale, bias, past);
  }
  DEVICE bool raise(const float (&tops)[2], float scale, float (&bias)[2], float (&past)[2]) {
    bool same = true;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const float before = largest[r], top = fmaf(scale, tops[r], bias[r]);
      largest[r] = max(before, top);  // NaN is not a maximum
      const float finite = largest[r] == kMinusInfinity ? 0.0f : largest[r];
      behind[r] = finite - top;
      past[r] = exp2_approx(before - finite);
      bias[r] -= finite;
      same &= before == largest[r];
    }
    return ballot(same) == kFullWarp;
  }

  // Probabilities, of which the largest is 1, as the A operands of four products of 16 keys.  NaN
  // in scale or bias makes those of its rows NaN.  Rounding to float16 is unbiased, so that the sum
  // needs none of it, and the lse is exact.
  DEVICE void exponentiate(uint32_t (&p)[4][4], const int32_t (&x)[8][4], float scale,
                           const float (&bias)[2], const float (&past)[2]) {
    float sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const float low = exp2_approx(fmaf(scale, as_float(x[n][2 * r]), bias[r]));
        const float high = exp2_approx(fmaf(scale, as_float(x[n][2 * r + 1]), bias[r]));
        sum[r] += low + high;
        p[n / 2][n % 2 * 2 + r] = pack2<float16>(low, high);
      }
#pragma unroll
    for (int r = 0; r < 2; r++) total[r] = fmaf(total[r], past[r], sum[r]);
  }

  // Over the four lanes of a row, once at the end.
  DEVICE void finish() {
#pragma unroll
    for (int r = 0; r < 2; r++) total[r] = warp_reduce<4>(total[r], Sum());
  }

  DEVICE static float as_float(int32_t x) { return float_of(static_cast<uint32_t>(x)); }
};

}  // namespace reeltime
