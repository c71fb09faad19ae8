// SPDX-License-Identifier: Apache-2.0
// attention on mma.sync: what its shared memory holds, and the products made of it.
//
// C, a Config of sm80.cu, has kD, kTiles (of 16 queries, per warp), kThreads, kOperands, kHalfSums.
#pragma once
#include <type_traits>

#include "attention/attention.h"
#include "attention/softmax.h"
#include "common/cp_async.h"
#include "common/ldmatrix.h"
#include "common/mma.h"
#include "common/swizzle.h"

namespace reeltime {
namespace attend_sm80 {

constexpr int kBlockM = 128;  // queries of a block of threads
constexpr int kBlockN = 64;   // keys that share scales

// --- Tiles ---------------------------------------------------------------------------------------

// kRows rows of kBytes, in panels of up to 128 bytes.
template <int kRows, int kBytes>
struct Tile {
  static constexpr int kPanel = kBytes < 128 ? kBytes : 128;
  static constexpr int kPer = kPanel / 16, kChunks = kBytes / 16;
  DEVICE static uint32_t place(int row, int chunk) {
    return chunk / kPer * (kRows * kPanel) + Swizzle<kPanel>::chunk(row, chunk % kPer);
  }
  // `rows` down and `chunks` on from a place in the first panel; rows is a multiple of 8, chunks
  // has no bit in common with those of the place.  What differs between lanes stays one register.
  DEVICE static uint32_t later(uint32_t place, int rows, int chunks) {
    return (place ^ chunks % kPer * 16) + rows * kPanel + chunks / kPer * (kRows * kPanel);
  }
};
template <class C>
using TileQ = Tile<kBlockM, C::kD>;
template <class C>
using TileK = Tile<kBlockN, C::kD>;
template <class C>
using TileV = Tile<kBlockN, C::kD * sizeof(typename C::V)>;

// `rows` rows of `bytes` bytes, zeros elsewhere.  A thread copies the same chunk of every kStep-th.
template <class T, int kThreads>
DEVICE void copy_tile(uint32_t tile, const void* from, int64_t stride, int rows, int bytes) {
  constexpr int kStep = kThreads / T::kChunks;
  static_assert(kStep % 8 == 0, "all rows of a thread swizzle alike");
  const int thread = opaque(static_cast<int>(threadIdx.x));  // or it waits in registers, divided
  const int row = thread / T::kChunks, chunk = thread % T::kChunks;
  const uint32_t place = tile + T::place(row, chunk);
  const int left = chunk * 16 < bytes ? rows - row : 0;
  uintptr_t at = reinterpret_cast<uintptr_t>(from) + row * stride + chunk * 16;
#pragma unroll
  for (int i = 0; i < kBlockN; i += kStep, at += kStep * stride)
    cp_async(place + i * T::kPanel, reinterpret_cast<const void*>(at), i < left);
}

// --- Scores --------------------------------------------------------------------------------------

DEVICE void multiply(int32_t (&x)[4], const uint32_t (&q)[4], uint32_t k0, uint32_t k1) {
  mma_s8(x, q, k0, k1);
}
DEVICE void multiply(float (&x)[4], const uint32_t (&q)[4], uint32_t k0, uint32_t k1) {
  mma_e4m3(x, q, k0, k1);
}
DEVICE int32_t bits(int32_t x) { return x; }
DEVICE int32_t bits(float x) { return static_cast<int32_t>(bits_of(x)); }

// x, 16 kTiles queries by 64 keys, as the bits of floats: of int8, 12582912 + q.k; of e4m3, q.k.
template <class C>
DEVICE void multiply_keys(int32_t (&x)[C::kTiles][8][4], uint32_t q_tile, uint32_t k_tile) {
  using Sum = typename std::conditional<C::kInteger, int32_t, float>::type;
  const int lane = static_cast<int>(lane_index()), warp = static_cast<int>(warp_index());
  const uint32_t my_q = q_tile + TileQ<C>::place(warp * 16 * C::kTiles + lane % 16, lane / 16);
  const uint32_t my_k = k_tile + TileK<C>::place(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  Sum sum[C::kTiles][8][4];
#pragma unroll
  for (int i = 0; i < 32 * C::kTiles; i++)
    sum[i / 32][i / 4 % 8][i % 4] = C::kInteger ? kIntBias : 0;
#pragma unroll
  for (int k = 0; k < C::kD / 32; k++) {
    uint32_t a[C::kTiles][4];
#pragma unroll
    for (int i = 0; i < C::kTiles; i++) ldmatrix_x4(a[i], TileQ<C>::later(my_q, i * 16, k * 2));
#pragma unroll
    for (int n = 0; n < 8; n += 2) {
      uint32_t b[4];  // (keys by 8, of each: bytes 0 to 15, 16 to 31)
      ldmatrix_x4(b, TileK<C>::later(my_k, n * 8, k * 2));
#pragma unroll
      for (int i = 0; i < C::kTiles; i++) {
        multiply(sum[i][n], a[i], b[0], b[1]);
        multiply(sum[i][n + 1], a[i], b[2], b[3]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 32 * C::kTiles; i++)
    x[i / 32][i / 4 % 8][i % 4] = bits(sum[i / 32][i / 4 % 8][i % 4]);
}

// Where a row may not see all of a block: scores in log2 units, -inf for what is not seen.
DEVICE void mask_scores(int32_t (&x)[8][4], float& scale, float (&bias)[2],
                        const AttentionParams& p, int row, int first_key) {
  const int group = static_cast<int>(lane_index()) / 4, t = static_cast<int>(lane_index()) % 4;
  const int32_t unseen = static_cast<int32_t>(bits_of(kMinusInfinity));
#pragma unroll
  for (int n = 0; n < 8; n++)
#pragma unroll
    for (int e = 0; e < 4; e++)
      x[n][e] =
          static_cast<int32_t>(bits_of(fmaf(scale, SoftmaxRows::as_float(x[n][e]), bias[e / 2])));
  scale = 1.0f;
  bias[0] = bias[1] = 0.0f;

  // The mask, eight keys at a time.  NOTE: not unrolled; all of it would be most of the kernel.
  if (p.mask) {
#pragma unroll 1
    for (int step = 0; step < 8; step++) {
      float added[4];
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int i = row + group + e / 2 * 8, key = first_key + 8 * step + 2 * t + e % 2;
        const int64_t at = blockIdx.z * p.stride_mb + blockIdx.y * p.stride_mh + i * p.stride_ml +
                           key * p.stride_mn;
        added[e] = 0.0f;
        if (i >= p.L || key >= p.N) continue;
        if (p.mask_dtype == Dtype::kInt8)
          added[e] = static_cast<const int8_t*>(p.mask)[at] ? 0.0f : kMinusInfinity;
        else
          added[e] = load_float(p.mask, p.mask_dtype, at);
      }
#pragma unroll
      for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          // The most negative finite number is a mask, too, and stays finite
          const float y = SoftmaxRows::as_float(x[n][e]) + max(added[e] * kLog2E, -3.4e38f);
          const bool seen = added[e] > kMinusInfinity;
          if (n == step) x[n][e] = seen ? static_cast<int32_t>(bits_of(y)) : unseen;
        }
    }
  }

  // The diagonal and the ragged tail
#pragma unroll
  for (int e = 0; e < 4; e++) {
    const int i = row + group + e / 2 * 8;
    const int end = p.causal ? min(p.N, i + p.first_last + 1) : p.N;
#pragma unroll
    for (int n = 0; n < 8; n++)
      if (first_key + 8 * n + 2 * t + e % 2 >= end) x[n][e] = unseen;
  }
}

// --- Values --------------------------------------------------------------------------------------

// p v of one operand, in float or in float16.
DEVICE void multiply_values(float (&sum)[4], const uint32_t (&p)[4], const uint32_t (&v)[2]) {
  mma_f16(sum, p, v[0], v[1]);
}
DEVICE void multiply_values(uint32_t (&sum)[2], const uint32_t (&p)[4], const uint32_t (&v)[2]) {
  mma_f16_half(sum, p, v[0], v[1]);
}
DEVICE float sum_of(const float (&sum)[4], int e) { return sum[e]; }
DEVICE float sum_of(const uint32_t (&sum)[2], int e) { return unpack<float16>(sum[e / 2], e % 2); }

// The channel of element e of operand n, among those of a 16-byte chunk of v.
template <class C>
DEVICE int channel_of(int n, int e) {
  const int t = static_cast<int>(lane_index()) % 4;
  return C::kOperands == 1 ? 2 * t + e % 2 : 4 * t + 2 * (e % 2) + n;
}

// B operands of 32 keys and one chunk of channels, [keys by 16][operand][keys by 8].  Of e4m3: even
// channels and odd ones, the exponent of e4m3 as that of float16, 256 times too small.  No code is
// NaN: a scale is.
template <class C>
DEVICE void load_values(uint32_t (&b)[2][C::kOperands][2], uint32_t row) {
  uint32_t r[4];
  ldmatrix_x4_transposed(r, row);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (C::kOperands == 1) {
      b[i / 2][0][i % 2] = r[i];
    } else {
      const uint32_t even = r[i] << 8 & 0xff00ff00u, odd = r[i] & 0xff00ff00u;
      b[i / 2][0][i % 2] = (even >> 1 & 0x3f803f80u) | (even & 0x80008000u);
      b[i / 2][1][i % 2] = (odd >> 1 & 0x3f803f80u) | (odd & 0x80008000u);
    }
  }
}

// acc += v_scale * (p v), 16 kTiles queries, 64 keys, in groups of 32 channels up to E.  NOTE:
// asking for E also ends what the compiler may have under way at once; without, registers do not
// suffice.
template <class C>
DEVICE void add_values(float (&acc)[C::kTiles][C::kD / 8][4], const uint32_t (&p)[C::kTiles][4][4],
                       uint32_t tile, const float* v_scale, int E) {
  constexpr int kOperands = C::kOperands;
  const uint32_t mine = tile + TileV<C>::place(static_cast<int>(lane_index()), 0);
#pragma unroll
  for (int chunk = 0; chunk < TileV<C>::kChunks; chunk++) {
    if (chunk * kOperands % 4 == 0 && chunk * kOperands * 8 >= E) return;
    using Part = typename std::conditional<C::kHalfSums, uint32_t[2], float[4]>::type;
    Part part[C::kTiles][kOperands] = {};
#pragma unroll
    for (int k = 0; k < 4; k += 2) {
      uint32_t b[2][kOperands][2];
      load_values<C>(b, TileV<C>::later(mine, k * 16, chunk));
#pragma unroll
      for (int j = 0; j < 2; j++)
#pragma unroll
        for (int i = 0; i < C::kTiles; i++)
#pragma unroll
          for (int n = 0; n < kOperands; n++) multiply_values(part[i][n], p[i][k + j], b[j][n]);
    }
#pragma unroll
    for (int n = 0; n < kOperands; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const float scale = v_scale[chunk * kOperands * 8 + channel_of<C>(n, e)];
#pragma unroll
        for (int i = 0; i < C::kTiles; i++) {
          float& y = acc[i][chunk * kOperands + n][e];
          y = fmaf(sum_of(part[i][n], e), scale, y);
        }
      }
  }
}

}  // namespace attend_sm80
}  // namespace reeltime
