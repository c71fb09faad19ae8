// SPDX-License-Identifier: Apache-2.0
// sla's linear branch: floats for tensor cores, phi of a row, and who holds what of it.
//
// A float32 is the sum of three bfloat16, each the nearest to what the ones before it left; two of
// them hold 16 bits of it and one eight.  Of two such sums, the products of terms s and t with s +
// t past the last term are below what is kept.  Unlike float16, bfloat16 takes sums of any size.
//
// Rows come in slices of 128 channels, four windows of 32.  Lane t of four holds eight neighbouring
// channels of each window, 16 bytes where a channel has 16 bits: where mma wants channels 2 t, 2 t
// + 1, 2 t + 8 and 2 t + 9 of 16, it gets 8 t + 4 s + {0 ... 3} of 32 in its step s, as sums over
// channels do not mind the order, and rows of the other operand are looked up in the same.
#pragma once
#include "common/approx.h"
#include "common/mma.h"
#include "common/reduce.h"
#include "rope_kv/chunk.h"
#include "sla/sla.h"

namespace reeltime {
namespace sla_sm80 {

constexpr int kWindow = 32, kWindows = 4, kSlice = kWindow * kWindows;

// --- Terms ---------------------------------------------------------------------------------------

// How many terms an operand of this type is worth.
template <class T>
constexpr int kTermsOf = std::is_same_v<T, bfloat16>  ? 1
                         : std::is_same_v<T, float16> ? 2
                                                      : 3;

// total += a b.  Tensor cores round towards zero when they add to a large sum, always in the same
// direction: with several terms they add 16 products to zero, and FADD does the rest.
template <int kA, int kB>
DEVICE void multiply(float (&total)[4], const uint32_t (&a)[kA][4], const uint32_t (&b)[kB][2]) {
  constexpr int kTerms = kA > kB ? kA : kB;
  if constexpr (kTerms == 1) {
    mma_bf16(total, a[0], b[0][0], b[0][1]);
  } else {
    float sum[4] = {};
#pragma unroll
    for (int order = kTerms - 1; order >= 0; order--)  // the smallest first
#pragma unroll
      for (int s = 0; s <= order; s++)
        if (s < kA && order - s < kB) mma_bf16(sum, a[s], b[order - s][0], b[order - s][1]);
#pragma unroll
    for (int i = 0; i < 4; i++) total[i] += sum[i];
  }
}

// --- A lane's part of a row ----------------------------------------------------------------------

// How many of `channels` in a slice lie at or past the lane's first.
DEVICE int from_lane_on(int channels) {
  return channels - static_cast<int>(lane_index()) % 4 * kChunk;
}

template <class T>
struct Incoming {
  Words<T> words[kWindows];

  DEVICE void load(const T* slice, int channels) {
    const T* mine = slice + lane_index() % 4 * kChunk;
#pragma unroll
    for (int c = 0; c < kWindows; c++)
      words[c].load(mine + c * kWindow, from_lane_on(channels) - c * kWindow);
  }
};

// --- phi -----------------------------------------------------------------------------------------

// phi of a row of D channels, slice by slice, softmax in units of its sum.  measure() takes a row,
// map() each of its slices; map_first() does both at once where a row is one slice, and so spares
// softmax a second round of exponentials.  All lanes of a warp must get there.
// kUsual: softmax of one slice, so that nothing else takes registers.
template <class T, bool kUsual>
struct Features {
  Phi phi;
  int D;
  float top = -float_of(0x7f800000u), sum = 1.0f;  // of softmax: the largest, all exp(x - top)

  DEVICE Features(Phi phi, int D) : phi(phi), D(D) {}

  DEVICE bool is_softmax() const { return kUsual || phi == Phi::kSoftmax; }
  DEVICE bool is_one() const { return is_softmax() && (kUsual || D <= kSlice); }

  // `row` is read where `held`.
  DEVICE void measure(const T* row, bool held) {
    if (!is_softmax()) return;
    sum = 0.0f;
    for (int d0 = 0; d0 < D; d0 += kSlice) {
      Incoming<T> slice;
      slice.load(row + d0, held ? D - d0 : 0);
      add(slice, D - d0, [](int, const float (&)[kChunk]) {});
    }
  }
  DEVICE void measure(const Incoming<T>& only) {
    sum = 0.0f;
    add(only, D, [](int, const float (&)[kChunk]) {});
  }

  // take(window, x) gets eight channels of each window, zeros past the last channel.
  template <class Take>
  DEVICE void map_first(const Incoming<T>& slice, Take take) {
    sum = 0.0f;
    add(slice, D, take);
  }
  template <class Take>
  DEVICE void map(const Incoming<T>& slice, int d0, Take take) const {
    const float lift = phi == Phi::kElu ? 1.0f : 0.0f;
#pragma unroll
    for (int c = 0; c < kWindows; c++) {
      const bool held = c * kWindow < from_lane_on(D - d0);
      float x[kChunk];
      slice.words[c].expand(x);
#pragma unroll
      for (int e = 0; e < kChunk; e++) {
        const float y = x[e];  // NaN stays
        if (is_softmax())
          x[e] = exponential(y);
        else
          x[e] = y <= 0.0f ? exp2_approx(y * kLog2E) * lift : y + lift;
        x[e] = held ? x[e] : 0.0f;
      }
      take(c, x);
    }
  }

 private:
  DEVICE float base() const { return top == -float_of(0x7f800000u) ? 0.0f : top; }
  DEVICE float exponential(float x) const { return exp2_approx(fmaf(x, kLog2E, -base() * kLog2E)); }

  // Exponentials of a slice, and with them the sum of those up to it, in units of their top.
  template <class Take>
  DEVICE void add(const Incoming<T>& slice, int channels, Take take) {
    const float before = top;
#pragma unroll
    for (int c = 0; c < kWindows; c++) {
      float x[kChunk];
      slice.words[c].expand(x);
#pragma unroll
      for (int e = 0; e < kChunk; e++)
        if (c * kWindow < from_lane_on(channels)) top = max(top, x[e]);
    }
    top = warp_reduce<4>(top, Max());
    float more = 0.0f;
#pragma unroll
    for (int c = 0; c < kWindows; c++) {
      float x[kChunk];
      slice.words[c].expand(x);
#pragma unroll
      for (int e = 0; e < kChunk; e++)
        more += x[e] = c * kWindow < from_lane_on(channels) ? exponential(x[e]) : 0.0f;
      take(c, x);
    }
    sum = sum * exp2_approx((before - base()) * kLog2E) + warp_reduce<4>(more, Sum());
  }
};

}  // namespace sla_sm80
}  // namespace reeltime
