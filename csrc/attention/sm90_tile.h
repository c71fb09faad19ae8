// SPDX-License-Identifier: Apache-2.0
// What a block of threads owns on Hopper: which queries, what of the keys they see, what scores are
// made of, and where the result goes.
#pragma once
#include "attention/attention.h"
#include "attention/sm90_values.h"
#include "common/dtype.h"

namespace reeltime {
namespace attend_sm90 {

constexpr int kQueries = 128;  // of a block of threads, 16 of each consumer's warps

// Place in a ring; parity is that of its round.
template <int kSize>
struct Ring {
  int at = 0;
  uint32_t parity = 0;
  DEVICE void advance() {
    if (++at == kSize) {
      at = 0;
      parity ^= 1;
    }
  }
};

// The queries of this block of threads, and how many blocks of 64 keys of every slot they see.
struct Tile {
  int first, h, h_kv, b;  // first query
  int blocks, free;       // free: how many of them all queries see in full
  int out_b;              // which of the batches of out, those of all splits

  DEVICE explicit Tile(const AttentionParams& p) {
    const int tiles = ceil_div(p.L, kQueries);
    const int head = static_cast<int>(blockIdx.x) / tiles;
    first = (tiles - 1 - static_cast<int>(blockIdx.x) % tiles) * kQueries;  // causal: longest first
    b = head / p.H;
    h = head % p.H;
    h_kv = h / (p.H / p.H_kv);
    out_b = static_cast<int>(blockIdx.y) * p.B + b;
    blocks = ceil_div(p.N, kKeys);
    free = p.N / kKeys;
    if (p.causal) {
      const int64_t by_first = max(int64_t{first} + p.first_last + 1, int64_t{0});  // query sees
      const int64_t by_last = max(int64_t{first} + p.first_last + kQueries, int64_t{0});
      blocks = static_cast<int>(min(int64_t{blocks}, (by_last + kKeys - 1) / kKeys));
      free = static_cast<int>(min(int64_t{free}, by_first / kKeys));
    }
  }
};

// --- Scores --------------------------------------------------------------------------------------

// Codes of q and k, and what their products are, x: numbers of 16 queries of a warp and 64 keys.
template <class T>
struct Keys;

template <>
struct Keys<int8_t> {
  using Sum = int32_t;
  static constexpr bool kPreset = true;

  // Where products will be added, for all of them to be floats.
  DEVICE static void preset(Sum (&x)[32]) {
#pragma unroll
    for (int i = 0; i < 32; i++) x[i] = kIntBias;
    tie_registers(x);  // here, not between the products
  }
  // As softmax.h wants them, and the largest of each row: floats above 0 are in the order of their
  // bits.
  DEVICE static void take(int32_t (&y)[8][4], float (&tops)[2], const Sum (&x)[32], float scale,
                          float (&bias)[2]) {
#pragma unroll
    for (int i = 0; i < 32; i++) y[i / 4][i % 4] = x[i];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const auto at = [&](int i) { return y[i / 2][2 * r + i % 2]; };
      Sum top[5];
#pragma unroll
      for (int i = 0; i < 5; i++) top[i] = max3(at(3 * i), at(3 * i + 1), at(3 * i + 2));
      top[0] = max(max3(top[0], top[1], top[2]), max3(top[3], top[4], at(15)));
      top[0] = warp_reduce<4>(top[0], Max());
      tops[r] = scale < kCoarse ? SoftmaxRows::as_float(top[0]) : biased_to_float(top[0]);
    }
    take_scores(y, scale, bias);
  }
};

template <>
struct Keys<e4m3> {
  using Sum = float;
  static constexpr bool kPreset = false;
  DEVICE static void preset(Sum (&)[32]) {}
  DEVICE static void take(int32_t (&y)[8][4], float (&tops)[2], const Sum (&x)[32], float,
                          float (&)[2]) {
#pragma unroll
    for (int i = 0; i < 32; i++) y[i / 4][i % 4] = static_cast<int32_t>(bits_of(x[i]));
#pragma unroll
    for (int r = 0; r < 2; r++) tops[r] = SoftmaxRows::top_of(y, r);
  }
};

// Where a row may not see all of a block: scores in log2 units, -inf for what is not seen.
DEVICE void mask_scores(int32_t (&x)[8][4], float (&tops)[2], float& scale, float (&bias)[2],
                        const AttentionParams& p, int row, int first_key) {
  const int lane = static_cast<int>(lane_index());
  int seen[2];  // keys of this lane's rows
#pragma unroll
  for (int r = 0; r < 2; r++) {
    seen[r] = p.N;
    if (p.causal) seen[r] = min(p.N, row + lane / 4 + 8 * r + p.first_last + 1);
    seen[r] -= first_key + lane % 4 * 2;
  }
#pragma unroll
  for (int n = 0; n < 8; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const float y = fmaf(scale, SoftmaxRows::as_float(x[n][e]), bias[e / 2]);
      const float masked = 8 * n + e % 2 < seen[e / 2] ? y : kMinusInfinity;
      x[n][e] = static_cast<int32_t>(bits_of(masked));
    }
  scale = 1.0f;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    bias[r] = 0.0f;
    tops[r] = SoftmaxRows::top_of(x, r);
  }
}

// out = out * past + v_scale * sums
template <class V, int kSums>
DEVICE void add_products(float (&out)[kSums], SoftmaxRows& rows, const float (&sums)[V::kSums],
                         bool same, const float (&past)[2], const float* v_scale) {
  V::add_total(rows, sums, past);
  if (!same)
#pragma unroll
    for (int i = 0; i < kSums; i++) out[i] *= past[i / 2 % 2];
  const int t = static_cast<int>(lane_index()) % 4;
#pragma unroll
  for (int c = 0; c < kSums / 8; c++) {
    float scale[4];
    V::scales_of(scale, v_scale, c, t);
#pragma unroll
    for (int i = 0; i < 8; i++)
      out[8 * c + i] = fmaf(scale[i / 4 * 2 + i % 2], sums[8 * c + i], out[8 * c + i]);
  }
}

// --- The result ----------------------------------------------------------------------------------

template <class Out, class V, int kSums>
DEVICE void store(const AttentionParams& p, const Tile& tile, const float (&out)[kSums],
                  const float (&factor)[2], int row) {
  const int lane = static_cast<int>(lane_index());
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int mine = row + lane / 4 + 8 * r;
    if (mine >= p.L) continue;
    const int64_t at = ((int64_t{tile.out_b} * p.L + mine) * p.H + tile.h) * p.D;
#pragma unroll
    for (int c = 0; c < kSums / 8; c++) {
      float y[4] = {};
      if (p.added) V::load(y, static_cast<const Out*>(p.added) + at, c, lane % 4);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float sum = out[8 * c + 2 * r + i / 2 * 4 + i % 2];
        y[i] += factor[r] == 0.0f ? 0.0f : sum * factor[r];  // whatever unseen values hold
      }
      V::store(static_cast<Out*>(p.out) + at, c, lane % 4, y);
    }
  }
}

// q.mu of one mean key for all, by the four lanes of a row: nothing but lse wants it.
DEVICE float multiply_mean(const AttentionParams& p, const Tile& tile, int row) {
  const int64_t q = tile.b * p.stride_qb + row * p.stride_ql + tile.h * p.stride_qh;
  const int64_t mean = (int64_t{tile.b} * p.H_kv + tile.h_kv) * p.D;
  float sum = 0.0f;
  for (int d = static_cast<int>(lane_index()) % 4; d < p.D; d += 4)
    sum =
        fmaf(load_float(p.q, p.q_dtype, q + d), load_float(p.k_mean, p.mean_dtype, mean + d), sum);
  return warp_reduce<4>(sum, Sum());
}

// Of 16 queries from `row` on: divides, stores.
template <class V, int kSums>
DEVICE void finish(const AttentionParams& p, const Tile& tile, SoftmaxRows& rows,
                   const float (&out)[kSums], int row) {
  const int lane = static_cast<int>(lane_index());
  V::finish(rows);
  float factor[2];
#pragma unroll
  for (int r = 0; r < 2; r++) factor[r] = rows.total[r] == 0.0f ? 0.0f : 1.0f / rows.total[r];
  if (p.out_dtype == Dtype::kBfloat16)
    store<bfloat16, V>(p, tile, out, factor, row);
  else if (p.out_dtype == Dtype::kFloat16)
    store<float16, V>(p, tile, out, factor, row);
  else
    store<float, V>(p, tile, out, factor, row);
  if (!p.lse) return;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int mine = row + lane / 4 + 8 * r;
    const float score = rows.largest[r] + log2f(rows.total[r]) - V::kTop;
    const float shift =
        p.smooth == Smooth::kSequence ? multiply_mean(p, tile, min(mine, p.L - 1)) : 0.0f;
    const float lse = kLn2 * score + p.sm_scale * shift;
    if (mine < p.L && lane % 4 == 0)
      p.lse[(int64_t{tile.out_b} * p.H + tile.h) * p.L + mine] =
          rows.total[r] == 0.0f ? kMinusInfinity : lse;
  }
}

}  // namespace attend_sm90
}  // namespace reeltime
