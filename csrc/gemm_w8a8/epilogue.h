// SPDX-License-Identifier: Apache-2.0
// Around the products of gemm_w8a8: which tile a block owns, and the way of float32 sums from mma
// fragments through shared memory to the result.
//
//   prefetch_residual  early: what the end will wait for
//   stage              a warp puts its fragments into a staged tile, rows of 128 floats
//   finish_rows        a warp takes 16 whole rows and ends the equation: bias, gate, residual and
//                      result are accessed in vectors of eight neighbouring columns
//   store_codes        requantised in blocks of 128 rows: those rows again, once the scale is known
//
// Half a warp has a row, a lane eight of its columns; a lane's columns never change, so bias and
// gate stay in registers.  Between stage and finish_rows stands a barrier of the warps that staged
// the 16 rows: of the warp alone, if it staged them all.
#pragma once
#include "common/approx.h"
#include "common/encode.h"
#include "common/reduce.h"
#include "common/types.h"
#include "common/vector.h"
#include "gemm_w8a8/gemm_w8a8.h"

namespace reeltime {

// --- Tiles ---------------------------------------------------------------------------------------

// Columns of a tile: one block of b_scale, and of a requantised result.
constexpr int kTileColumns = 128;

struct Tile {
  int m, n;  // indices of the tile
};

// Tiles in strips `strip` high, each walked column by column: blocks that run together share rows
// of a and of b in L2.
DEVICE Tile tile_at(int index, int tiles_m, int tiles_n, int strip) {
  const int first = index / (strip * tiles_n) * strip;
  const int height = min(tiles_m - first, strip), place = index - first * tiles_n;
  return {first + place % height, place / height};
}

// --- The staged tile -----------------------------------------------------------------------------

constexpr int kStripRows = 16;  // that a warp finishes at a time

// Floats from row to row.  Eight more than a row has: the four rows that half a warp writes at once
// lie in four different groups of eight banks.
constexpr int kStagedPitch = kTileColumns + 8;

// Place of a column in its row.  A lane reads eight columns, two 16-byte chunks: were chunks in
// order, lanes 0 and 4 would meet in a bank.
DEVICE int staged_column(int column) { return column ^ (column >> 5 & 3) << 2; }

struct alignas(8) StagedPair {
  float at[2];
};
struct alignas(16) StagedChunk {
  float at[4];
};

// One mma accumulator, 16 rows x 8 columns with its first element at (row, column) of the tile.
DEVICE void stage(float* tile, int row, int column, const float (&y)[4]) {
  const int lane = static_cast<int>(lane_index());
  float* to = tile + (row + lane / 4) * kStagedPitch + staged_column(column + lane % 4 * 2);
  *reinterpret_cast<StagedPair*>(to) = {y[0], y[1]};
  *reinterpret_cast<StagedPair*>(to + 8 * kStagedPitch) = {y[2], y[3]};
}

// --- A lane's rows and columns ------------------------------------------------------------------

// 0.5 x (1 + tanh(u)) = x / (1 + exp(-2 u)),  u = sqrt(2 / pi) (x + 0.044715 x^3); relative error
// about 2^-21, which float32 results need.
DEVICE float gelu_tanh(float x) {
  const float u = x * fmaf(0.044715f * x, x, 1.0f);
  return x * reciprocal_approx(1.0f + exp2_approx(-2.302208198144325f * u));
}

// Four rows of a lane: two apart, since the other half of the warp has those between.
constexpr int kLaneRows = 4;
constexpr int kLaneColumns = 8;
using LaneTile = float[kLaneRows][kLaneColumns];

struct LanePlace {
  int m, n;           // of its first element in the result
  int rows, columns;  // from there to the end of the result: none if <= 0
};

// Whether groups of eight columns are whole vectors of `bytes` each, in every row.
DEVICE bool in_vectors(const void* array, int64_t row_bytes, int N, int bytes) {
  const int64_t address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(array));
  return ((address | row_bytes) & (bytes - 1)) == 0 && N % kLaneColumns == 0;
}

// bias, residual or gate.
struct Operand {
  const void* array;
  int64_t stride_row, stride_column;
  Dtype dtype;
  bool vectors;

  DEVICE Operand(const void* array, int64_t stride_row, int64_t stride_column, Dtype dtype, int N)
      : array(array), stride_row(stride_row), stride_column(stride_column), dtype(dtype) {
    vectors = stride_column == 1 && in_vectors(array, stride_row * size_of(dtype), N, 16);
  }

  // Rows `row`, row + 2, ... of which `rows` lie inside, columns from n on; zeros outside.
  template <int kRows>
  DEVICE void load(float (&x)[kRows][kLaneColumns], int row, int rows, int n, int columns) const {
    if (dtype == Dtype::kBfloat16)
      load_as<bfloat16>(x, row, rows, n, columns);
    else if (dtype == Dtype::kFloat16)
      load_as<float16>(x, row, rows, n, columns);
    else
      load_as<float>(x, row, rows, n, columns);
  }

  template <class T, int kRows>
  DEVICE void load_as(float (&x)[kRows][kLaneColumns], int row, int rows, int n,
                      int columns) const {
    constexpr int kSize = Vector<T>::kSize, kVectors = kLaneColumns / kSize;
    Vector<T> v[kRows][kVectors];  // all on their way before the first is used
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      const T* from = static_cast<const T*>(array) + (row + 2 * r) * stride_row + n * stride_column;
#pragma unroll
      for (int i = 0; i < kVectors; i++) v[r][i] = {};
      if (2 * r >= rows) continue;
      if (vectors && columns > 0) {
#pragma unroll
        for (int i = 0; i < kVectors; i++) v[r][i] = load_cached(from + i * kSize);
      } else {
#pragma unroll
        for (int i = 0; i < kLaneColumns; i++)
          if (i < columns) v[r][i / kSize].at[i % kSize] = from[i * stride_column];
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; r++)
#pragma unroll
      for (int i = 0; i < kLaneColumns; i++) x[r][i] = to_float(v[r][i / kSize].at[i % kSize]);
  }
};

// --- Rows to the result --------------------------------------------------------------------------

DEVICE StagedChunk* staged_chunk(float* strip, int r, int half) {
  const int lane = static_cast<int>(lane_index());
  const int column = staged_column(lane % 16 * kLaneColumns + half * 4);
  return reinterpret_cast<StagedChunk*>(strip + (2 * r + lane / 16) * kStagedPitch + column);
}

DEVICE void read_staged(float* strip, LaneTile& y) {
#pragma unroll
  for (int r = 0; r < kLaneRows; r++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const StagedChunk chunk = *staged_chunk(strip, r, half);
#pragma unroll
      for (int i = 0; i < 4; i++) y[r][half * 4 + i] = chunk.at[i];
    }
}

DEVICE void write_staged(float* strip, const LaneTile& y) {
#pragma unroll
  for (int r = 0; r < kLaneRows; r++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float* from = y[r] + half * 4;
      *staged_chunk(strip, r, half) = {from[0], from[1], from[2], from[3]};
    }
}

// The end of the equation.  `gate_end`: the first row to which `gate` does not belong.
DEVICE void apply_epilogue(const GemmParams& p, const LanePlace& at, const Operand& residual,
                           const Operand& gates, const float (&bias)[1][kLaneColumns],
                           float (&gate)[1][kLaneColumns], int& gate_end, LaneTile& y) {
  if (p.epilogue != Epilogue::kGatedResidual) {
#pragma unroll
    for (int r = 0; r < kLaneRows; r++)
#pragma unroll
      for (int i = 0; i < kLaneColumns; i++) y[r][i] += bias[0][i];
    if (p.epilogue != Epilogue::kGelu) return;
#pragma unroll
    for (int r = 0; r < kLaneRows; r++)
#pragma unroll
      for (int i = 0; i < kLaneColumns; i++) y[r][i] = gelu_tanh(y[r][i]);
    return;
  }
  LaneTile x;
  residual.load(x, at.m, at.rows, at.n, at.columns);
#pragma unroll
  for (int r = 0; r < kLaneRows; r++) {
    const int m = at.m + 2 * r;
    if (m >= gate_end && 2 * r < at.rows) {
      const int frame = m / p.frame_rows;
      gates.load(gate, frame, 1, at.n, at.columns);
      gate_end = (frame + 1) * p.frame_rows;
    }
#pragma unroll
    for (int i = 0; i < kLaneColumns; i++)
      y[r][i] = fmaf(gate[0][i], y[r][i] + bias[0][i], x[r][i]);
  }
}

template <class T>
DEVICE void store_rows(const GemmParams& p, const LanePlace& at, const LaneTile& y) {
  constexpr int kSize = Vector<T>::kSize;
  const bool vectors = in_vectors(p.out, int64_t{p.N} * sizeof(T), p.N, 16);
#pragma unroll
  for (int r = 0; r < kLaneRows; r++) {
    if (2 * r >= at.rows) break;
    T* to = static_cast<T*>(p.out) + int64_t{at.m + 2 * r} * p.N + at.n;
    if (!vectors) {
#pragma unroll
      for (int i = 0; i < kLaneColumns; i++)
        if (i < at.columns) to[i] = from_float<T>(y[r][i]);
    } else if (at.columns > 0) {
#pragma unroll
      for (int v = 0; v < kLaneColumns / kSize; v++) {
        Vector<uint32_t> words;
#pragma unroll
        for (int i = 0; i < 4; i++) {
          if constexpr (sizeof(T) == 2)
            words.at[i] = pack2<T>(y[r][2 * i], y[r][2 * i + 1]);
          else
            words.at[i] = bits_of(y[r][v * kSize + i]);
        }
        store_vector(reinterpret_cast<uint32_t*>(to + v * kSize), words);
      }
    }
  }
}

// Eight codes of row `r`: half a warp stores the 128 bytes of a row at once.
template <class T>
DEVICE void store_encoded(const GemmParams& p, const LanePlace& at, int r,
                          const float (&x)[kLaneColumns]) {
  if (2 * r >= at.rows) return;
  const uint64_t low = pack4<T>(x[0], x[1], x[2], x[3]);
  const uint64_t codes = low | static_cast<uint64_t>(pack4<T>(x[4], x[5], x[6], x[7])) << 32;
  uint8_t* to = static_cast<uint8_t*>(p.out) + int64_t{at.m + 2 * r} * p.N + at.n;
  if (in_vectors(p.out, p.N, p.N, 8)) {
    if (at.columns > 0) *reinterpret_cast<uint64_t*>(to) = codes;
  } else {
#pragma unroll
    for (int i = 0; i < kLaneColumns; i++)
      if (i < at.columns) to[i] = static_cast<uint8_t>(codes >> 8 * i & 0xff);
  }
}

DEVICE float limit_of(Dtype dtype) { return dtype == Dtype::kInt8 ? kLimit<int8_t> : kLimit<e4m3>; }

DEVICE void encode_and_store(const GemmParams& p, const LanePlace& at, int r, float scale,
                             float (&y)[kLaneColumns]) {
  encode_block(y, scale, limit_of(p.out_dtype));
  if (p.out_dtype == Dtype::kInt8)
    store_encoded<int8_t>(p, at, r, y);
  else
    store_encoded<e4m3>(p, at, r, y);
}

// The largest magnitude of a row's eight columns and `amax`; infinity for NaN, which the maximum
// over lanes cannot lose.  Columns outside are zeros, or NaN where the row is.
DEVICE float largest(float amax, const float (&y)[kLaneColumns]) {
#pragma unroll
  for (int i = 0; i < kLaneColumns; i++) amax = max_magnitude(amax, y[i]);
  return magnitude(amax);
}

// Each row its own scale, from the 16 lanes that hold it.
DEVICE void quantize_rows(const GemmParams& p, const LanePlace& at, LaneTile& y) {
  const int blocks = ceil_div(p.N, kTileColumns);
#pragma unroll
  for (int r = 0; r < kLaneRows; r++) {
    const float amax = warp_reduce<16>(largest(0.0f, y[r]), Max());
    const float scale = block_scale(amax, limit_of(p.out_dtype));
    if (lane_index() % 16 == 0 && 2 * r < at.rows)
      p.out_scale[int64_t{at.m + 2 * r} * blocks + at.n / kTileColumns] = scale;
    encode_and_store(p, at, r, scale, y[r]);
  }
}

// --- What kernels call ---------------------------------------------------------------------------

// The tile's part of the residual on its way from memory to L2, while the products are made.
template <int kRows, int kThreads>
DEVICE void prefetch_residual(const GemmParams& p, int m, int n) {
  if (!p.residual || p.stride_rn != 1) return;
  const int bytes = size_of(p.residual_dtype), columns = 128 / bytes;  // of a cache line
  const int lines = kTileColumns / columns;                            // of a row
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < kRows * lines; i += kThreads) {
    const int row = m + i / lines, column = n + i % lines * columns;
    if (row < p.M && column < p.N)
      prefetch_l2(static_cast<const char*>(p.residual) + (row * p.stride_rm + column) * bytes);
  }
}

DEVICE LanePlace lane_place(const GemmParams& p, int m, int n) {
  const int lane = static_cast<int>(lane_index());
  m += lane / 16;
  n += lane % 16 * kLaneColumns;
  return {m, n, p.M - m, p.N - n};
}

// A warp ends the equation for rows m to m + 15 of the result, columns n to n + 127, whose sums
// `strip`, the first of 16 rows of a staged tile, holds.  Stores the result; with out_scale and
// block_rows 128, keeps it in the strip instead, for store_codes, and returns the largest
// magnitude that this lane saw.
DEVICE float finish_rows(const GemmParams& p, float* strip, int m, int n) {
  const Operand residual(p.residual, p.stride_rm, p.stride_rn, p.residual_dtype, p.N);
  const Operand gates(p.gate, p.stride_gf, p.stride_gn, p.gate_dtype, p.N);
  LanePlace at = lane_place(p, m, n);
  float bias[1][kLaneColumns] = {}, gate[1][kLaneColumns];
  if (p.bias)
    Operand(p.bias, 0, p.stride_bias, p.bias_dtype, p.N).load(bias, 0, 1, at.n, at.columns);
#pragma unroll
  for (int i = 0; i < kLaneColumns; i++) gate[0][i] = 1.0f;
  int gate_end = p.gate ? 0 : p.M;
  float amax = 0.0f;

#pragma unroll 1
  for (int first = 0; first < kStripRows; first += 2 * kLaneRows) {
    LaneTile y;
    read_staged(strip, y);
    apply_epilogue(p, at, residual, gates, bias, gate, gate_end, y);
    if (p.out_scale && p.block_rows == 1) {
      quantize_rows(p, at, y);
    } else if (p.out_scale) {
      write_staged(strip, y);
#pragma unroll
      for (int r = 0; r < kLaneRows; r++)
        if (2 * r < at.rows) amax = largest(amax, y[r]);
    } else if (p.out_dtype == Dtype::kBfloat16) {
      store_rows<bfloat16>(p, at, y);
    } else if (p.out_dtype == Dtype::kFloat16) {
      store_rows<float16>(p, at, y);
    } else {
      store_rows<float>(p, at, y);
    }
    strip += 2 * kLaneRows * kStagedPitch;
    at.m += 2 * kLaneRows;
    at.rows -= 2 * kLaneRows;
  }
  return amax;
}

// Stores what finish_rows kept, divided by the scale of the block of 128 x 128.
DEVICE void store_codes(const GemmParams& p, float* strip, int m, int n, float scale) {
  LanePlace at = lane_place(p, m, n);
#pragma unroll 1
  for (int first = 0; first < kStripRows; first += 2 * kLaneRows) {
    LaneTile y;
    read_staged(strip, y);
#pragma unroll
    for (int r = 0; r < kLaneRows; r++) encode_and_store(p, at, r, scale, y[r]);
    strip += 2 * kLaneRows * kStagedPitch;
    at.m += 2 * kLaneRows;
    at.rows -= 2 * kLaneRows;
  }
}

}  // namespace reeltime
