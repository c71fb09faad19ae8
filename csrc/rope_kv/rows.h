// SPDX-License-Identifier: Apache-2.0
// rope_kv, whole rows: 1 / rms of a token, and the rotation of a token once per offset.
//
// A warp holds a token's row, all heads of it, in registers; several warps hold a wide one.  Where
// the chunks of a head divide a warp, a thread has the same channels of every head, and loads the
// cosines once per token and offset.
#pragma once
#include "common/approx.h"
#include "common/launch.h"
#include "common/reduce.h"
#include "common/shared.h"
#include "rope_kv/chunk.h"
#include "rope_kv/rope_kv.h"

namespace reeltime {
namespace rope_kv_sm80 {

struct RowConfig {
  static constexpr int kChunks = 6;            // of a lane: a warp holds 1536 channels
  static constexpr int kStride = 32 * kChunk;  // channels between them
  static constexpr int kWarps = 4;  // of a block: 1, 2 or all for a row; wider ones are read twice
  template <class T>
  static constexpr int kBlocks = sizeof(T) == 2 ? 5 : 3;  // that an SM holds at least
};

struct RowStorage {
  float sum[RowConfig::kWarps];
};

// --- One over the root mean square ---------------------------------------------------------------

struct InverseParams {
  const void* x;   // [B, L, C]
  float* inverse;  // [B, L]
  int rows, L, C;  // rows: B * L
  int64_t stride_xb, stride_xl;
  float eps;
  Dtype dtype;
};

// A warp per token.
template <bool kVectors>
__global__ void __launch_bounds__(256) inverse_kernel(const InverseParams p) {
  constexpr int kChunks = RowConfig::kChunks, kStride = RowConfig::kStride;
  const int row = static_cast<int>(blockIdx.x * 8 + warp_index());
  if (row >= p.rows) return;
  const int64_t start = row / p.L * p.stride_xb + row % p.L * p.stride_xl;
  float squares = 0.0f;
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    const T* x = static_cast<const T*>(p.x) + start;
    int first = static_cast<int>(lane_index()) * (kVectors ? kChunk : 1);
    if constexpr (kVectors) {
      for (; first < p.C; first += kChunks * kStride) {
        Words<T> words[kChunks];
#pragma unroll
        for (int i = 0; i < kChunks; i++)
          words[i].load(x + first + i * kStride, p.C - first - i * kStride);
#pragma unroll
        for (int i = 0; i < kChunks; i++) {
          float y[kChunk];
          words[i].expand(y);
#pragma unroll
          for (int e = 0; e < kChunk; e++) squares = fmaf(y[e], y[e], squares);
        }
      }
    } else {
      for (; first < p.C; first += 32)
        squares = fmaf(to_float(x[first]), to_float(x[first]), squares);
    }
  });
  squares = warp_reduce(squares, Sum());
  const float mean = squares * reciprocal_approx(static_cast<float>(p.C));
  if (lane_index() == 0) p.inverse[row] = rsqrt_approx(mean + p.eps);
}

// --- Rotation ------------------------------------------------------------------------------------

// For a type: heads lie one after another, and registers hold a row.
template <class T>
__global__ void __launch_bounds__(32 * RowConfig::kWarps, RowConfig::kBlocks<T>)
    rotate_rows_kernel(const RotateRowsParams p, const int warps) {
  constexpr int kChunks = RowConfig::kChunks, kStride = RowConfig::kStride;
  auto& shared = shared_storage<RowStorage>();

  // Which token, which channels of it: `span` from `begin`; for Any also those that do not fit in
  // registers, which are read twice
  const int warp = static_cast<int>(warp_index()), width = p.H * p.D, rows = p.B * p.T * p.N;
  const int own = static_cast<int>(blockIdx.x) * (RowConfig::kWarps / warps) + warp / warps;
  const int row = min(own, rows - 1);  // past the end: the last once more, and not stored
  const int b = row / (p.T * p.N), token = row - b * (p.T * p.N);
  const int64_t x_at = b * p.stride_xb + token / p.N * p.stride_xt + token % p.N * p.stride_xn;
  const int span = min(ceil_div(width, warps * kStride), kChunks) * kStride, step = warps * span;
  const int begin = warp % warps * span + static_cast<int>(lane_index()) * kChunk;
  const int end = warp % warps * span + span;

  // The chunks that start at first, first + kStride, ...
  float x[kChunks * kChunk];
  auto load = [&](int first, int limit) {
    with_type<T>(p.dtype, [&](auto type) {
      using X = decltype(type);
      const X* x_row = static_cast<const X*>(p.x) + x_at;
      if constexpr (kWide<T>) {
        Words<X> words[kChunks];  // all on their way before the first is used
#pragma unroll
        for (int i = 0; i < kChunks; i++)
          words[i].load(x_row + first + i * kStride, limit - first - i * kStride);
#pragma unroll
        for (int i = 0; i < kChunks; i++) words[i].expand(x + i * kChunk);
      } else {
#pragma unroll
        for (int j = 0; j < kChunks * kChunk; j++) {
          const int c = first + j / kChunk * kStride + j % kChunk;
          x[j] = c < limit ? to_float(x_row[c / p.D * p.stride_xh + c % p.D * p.stride_xd]) : 0.0f;
        }
      }
    });
  };

  // Norm
  float squares[4] = {}, factor = p.sm_scale;
  for (int at = 0; at < width; at += kWide<T> ? width : step) {
    load(begin + at, min(end + at, width));
#pragma unroll
    for (int j = 0; j < kChunks * kChunk; j++) squares[j % 4] = fmaf(x[j], x[j], squares[j % 4]);
  }
  if (p.weight) {
    float sum = warp_reduce(squares[0] + squares[1] + squares[2] + squares[3], Sum());
    if (warps > 1) {
      if (lane_index() == 0) shared.sum[warp] = sum;
      sync_block();
      sum = 0.0f;
      for (int i = 0; i < warps; i++) sum += shared.sum[warp / warps * warps + i];
    }
    factor *= rsqrt_approx(sum * reciprocal_approx(static_cast<float>(width)) + p.eps);
  }
  if (own >= rows) return;

  for (int at = 0; at < width; at += kWide<T> ? width : step) {
    const int first = begin + at, inside = min(end + at, width) - first;
    if (!kWide<T> && step < width) load(first, first + inside);

    // Weigh
    if (p.weight)
      with_type(p.weight_dtype, [&](auto type) {
        const auto* from = static_cast<const decltype(type)*>(p.weight) + first;
#pragma unroll
        for (int i = 0; i < kChunks; i++) {
          float weight[kChunk];
          load_shared_chunk<kWide<T>>(weight, from + i * kStride, inside - i * kStride);
#pragma unroll
          for (int e = 0; e < kChunk; e++) x[i * kChunk + e] *= weight[e];
        }
      });
#pragma unroll
    for (int j = 0; j < kChunks * kChunk; j++) x[j] *= factor;

    // Rotate once per offset
    for (int o = 0; o < p.O; o++) {
      const float* table = p.table ? p.table + o * p.stride_to + token * p.stride_tl : nullptr;
      const int64_t out_at = (int64_t{o} * rows + row) * width + first;
      int column = first % p.D;
      float turn[kChunk];
#pragma unroll
      for (int i = 0; i < kChunks; i++) {
        float y[kChunk];
#pragma unroll
        for (int e = 0; e < kChunk; e++) y[e] = x[i * kChunk + e];
        if (table) {
          if (kWide<T> && (i == 0 || kStride % p.D != 0))
            load_shared_chunk<true>(turn, table + column, inside - i * kStride);
          if constexpr (!kWide<T>)
#pragma unroll
            for (int e = 0; e < kChunk; e++)
              turn[e] = e < inside - i * kStride ? table[(column + e) % p.D] : 0.0f;
          rotate_chunk(y, turn);
        }
        with_type<T>(p.dtype, [&](auto type) {
          auto* out = static_cast<decltype(type)*>(p.out) + out_at + i * kStride;
          store_chunk<kWide<T>>(out, y, inside - i * kStride);
        });
        column = (column + kStride) % p.D;
      }
    }
  }
}

}  // namespace rope_kv_sm80
}  // namespace reeltime
