// SPDX-License-Identifier: Apache-2.0
// norm on every architecture: rows in registers, x read once, 16 bytes at a time.
//
//   x, h [B, L, C] float32, bfloat16 or float16      gate, scale, shift [B, F, C], weight, bias [C]
//   x_new, y [B, L, C] of that dtype, or y int8 or e4m3 with y_scale [B L / bm, C / 128]
//
// rows_kernel: the warps of a row hold it in registers from its one load to its store; statistics
// are two passes over registers.  They take several rows, the next one on its way while they work.
// What these rows share, gate, weight (1 + scale) and bias (1 + scale) + shift, each thread folds
// once for its own columns and keeps in shared memory.
//
// A 128 x 128 block of y has one scale, which is known only when all of it is normalised, and 128
// rows fit no register file.  Then rows_kernel leaves mean and 1 / sigma, and tiles_kernel
// normalises again, tile by tile.  It reads x (x_new) a second time, last rows first: out of L2, if
// L2 is larger than x.  The same two serve rows whose modulation does not fit in shared memory:
// 8 C bytes, 12 C with a gate, of 99 KiB on the smallest GPU.
//
// Rows longer than registers hold, 15360 columns or 7680 of float32, and tensors that are not in
// aligned pieces of 16 bytes have their statistics from long_rows_kernel, which reads a row twice.
//
// Floor, in bytes per element: itemsize for each of x, h, x_new and y, or 1 for y in 8 bits.  Tiles
// add itemsize, from L2, and 16 / C.
#include "common/approx.h"
#include "common/launch.h"
#include "common/reduce.h"
#include "common/shared.h"
#include "norm/pieces.h"

namespace reeltime {
namespace norm_sm80 {

constexpr int kBlockK = 128;  // columns under one scale

struct Config {
  static constexpr int kMaxWarps = 20;      // of a row: 640 threads have 96 registers each
  static constexpr int kMaxPieces = 3;      // of a row in one thread
  static constexpr int kNarrowRows = 4;     // in a block at once, where one warp holds a row
  static constexpr int kMaxRows = 8;        // that the same warps take, one after the other
  static constexpr int kLongThreads = 256;  // of long_rows_kernel
};

// How rows_kernel lies over its rows.
struct Plan {
  int pieces;       // of a row in one thread
  int warps;        // of a row; 0: it does not fit
  int rows;         // that these warps take
  float inverse_C;  // 1 / C
};

struct SharedStorage {
  float partial[2][32];    // sums of each warp
  Vector<float> table[1];  // [gate, gain, offset][columns / 4][thread], of each thread its own
};

struct alignas(8) Statistics {
  float mean, inverse;  // 1 / sigma
};

// Over the warps of a row; all threads add in the same order, so that all have the same bits.
// NOTE: two calls take turns with two arrays: who is late may still read the one before.
DEVICE float row_sum(float value, float* partial, int warps) {
  value = warp_reduce(value, Sum());
  if (warps == 1) return value;
  if (lane_index() == 0) partial[warp_index()] = value;
  sync_block();
  value = 0.0f;
#pragma unroll 2
  for (int warp = 0; warp < warps; warp++) value += partial[warp];
  return value;
}

// --- Rows ----------------------------------------------------------------------------------------

template <class T, int kPieces>
__global__ void __launch_bounds__(Config::kMaxWarps * 32, 1)
    rows_kernel(const NormParams p, const Plan plan) {
  constexpr int kSize = Vector<T>::kSize, kFours = kSize / 4;
  constexpr int kLanes = kBlockK / kSize;  // of one scale: 16 or 32
  auto& shared = shared_storage<SharedStorage>();
  const bool modulated = is_modulated(p) && !p.statistics;

  // Which columns: piece i of a thread begins at column(i)
  const bool one_warp = plan.warps == 1;
  const int thread = static_cast<int>(one_warp ? lane_index() : threadIdx.x);
  const auto column = [&](int i) { return (i * plan.warps * 32 + thread) * kSize; };
  const bool last_inside = column(kPieces - 1) < p.C;  // plan_of: all others are
  const auto inside = [&](int i) { return i < kPieces - 1 || last_inside; };

  // Which rows: a run of those of one segment, which have their frames in common
  const int runs = ceil_div(p.segment_rows, plan.rows), block = static_cast<int>(blockIdx.x);
  const int run = one_warp ? block * Config::kNarrowRows + static_cast<int>(warp_index()) : block;
  if (run >= p.B * p.L / p.segment_rows * runs) return;  // a warp of its own
  const int segment = run / runs * p.segment_rows, first = segment + run % runs * plan.rows;
  const int last = min(first + plan.rows, segment + p.segment_rows);
  const int batch = first / p.L;

  Piece<T, kSize> x[kPieces], h[kPieces];
  const auto load_row = [&](int row) {
    const int token = row - batch * p.L;
    const T* x_row = row_of<T>(p.x, p.stride_xb, p.stride_xl, batch, token);
    const T* h_row = row_of<T>(p.h, p.stride_hb, p.stride_hl, batch, token);
#pragma unroll
    for (int i = 0; i < kPieces; i++) {
      x[i] = load_piece<kSize>(x_row + column(i), inside(i));
      if (p.h) h[i] = load_piece<kSize>(h_row + column(i), inside(i));
    }
  };
  load_row(first);

  // Fold what the rows share
  Vector<float>* table = shared.table + threadIdx.x;
  const int gains = p.gate ? kPieces * kFours : 0, offsets = gains + kPieces * kFours;
#pragma unroll
  for (int i = 0; i < kPieces; i++) {
    const int token = first - batch * p.L;
    float gain[kSize], offset[kSize];
    if (p.gate) {
      load_gate(p, batch, token, column(i), inside(i), gain);
      put(table, i * kFours, gain);
    }
    if (modulated) {
      load_modulation(p, batch, token, column(i), inside(i), gain, offset);
      put(table, gains + i * kFours, gain);
      put(table, offsets + i * kFours, offset);
    }
  }

  for (int row = first; row < last; row++) {
    // Add the residual
    float v[kPieces][kSize], sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPieces; i++) {
      widen<T>(x[i], v[i]);
      if (p.h) {
        float gate[kSize];
#pragma unroll
        for (int e = 0; e < kSize; e++) gate[e] = 1.0f;
        if (p.gate) get(table, i * kFours, gate);
        T* x_new = static_cast<T*>(p.x_new) + int64_t{row} * p.C;
        add_residual(x_new + column(i), inside(i), h[i], gate, v[i]);
      }
      sum += sum_of(v[i]);
    }
    if (row + 1 < last) load_row(row + 1);

    // Mean, then centred squares
    const bool layer = p.kind == NormKind::kLayer;
    float mean = 0.0f, squares = 0.0f;
    if (layer) {
      mean = row_sum(sum, shared.partial[1], plan.warps) * plan.inverse_C;
#pragma unroll
      for (int i = 0; i < kPieces; i++) subtract(v[i], mean, inside(i));
    }
#pragma unroll
    for (int i = 0; i < kPieces; i++) squares += squares_of(v[i]);
    const float variance =
        row_sum(squares, shared.partial[layer ? 0 : row & 1], plan.warps) * plan.inverse_C;
    const float inverse = rsqrt_approx(variance + p.eps);
    if (p.statistics) {
      if (thread == 0) reinterpret_cast<Statistics*>(p.statistics)[row] = {mean, inverse};
      continue;
    }

    // Modulate
#pragma unroll
    for (int i = 0; i < kPieces; i++) {
#pragma unroll
      for (int e = 0; e < kSize; e++) v[i][e] *= inverse;
      if (modulated) {
        float gain[kSize], offset[kSize];
        get(table, gains + i * kFours, gain);
        get(table, offsets + i * kFours, offset);
#pragma unroll
        for (int e = 0; e < kSize; e++) v[i][e] = fmaf(v[i][e], gain[e], offset[e]);
      }
    }

    // Store in x's dtype
    if (!p.y_scale) {
      T* y_row = static_cast<T*>(p.y) + int64_t{row} * p.C;
#pragma unroll
      for (int i = 0; i < kPieces; i++)
        store_piece<kSize>(y_row + column(i), inside(i), narrow<T>(v[i]));
      continue;
    }

    // Or in 8 bits with a scale per kLanes pieces: lane i of these makes that of their piece i
    const int lane = thread % kLanes, leader = thread % 32 - lane;
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < kPieces; i++) {
      const float amax = warp_reduce<kLanes>(amax_of(v[i], inside(i)), Larger());
      largest = lane == i ? amax : largest;
    }
    const float scale = block_scale(largest, limit_of(p));
    const Divisor mine(scale);
    const int block = column(lane) / kBlockK, blocks = ceil_div(p.C, kBlockK);
    if (lane < kPieces && block < blocks) p.y_scale[int64_t{row} * blocks + block] = scale;
#pragma unroll
    for (int i = 0; i < kPieces; i++) {
      Divisor by = mine;
      by.step = shuffle(mine.step, leader + i);
      by.inverse = shuffle(mine.inverse, leader + i);
      by.lift = shuffle(mine.lift, leader + i);
      if (inside(i)) store_codes(p, row, column(i), by, v[i]);
    }
  }
}

// Mean and 1 / sigma of any row: a block reads it for the mean and, out of L2, for the squares.
template <class T, int kSize>
__global__ void __launch_bounds__(Config::kLongThreads, 1)
    long_rows_kernel(const NormParams p, const Plan plan) {
  constexpr int kStep = Config::kLongThreads * kSize, kWarps = Config::kLongThreads / 32;
  auto& shared = shared_storage<SharedStorage>();
  const int thread = static_cast<int>(threadIdx.x), row = static_cast<int>(blockIdx.x);
  const int batch = row / p.L, token = row % p.L;
  const T* x_row = row_of<T>(p.x, p.stride_xb, p.stride_xl, batch, token);
  const T* h_row = row_of<T>(p.h, p.stride_hb, p.stride_hl, batch, token);

  float v[kSize], mean = 0.0f, sum = 0.0f, squares = 0.0f;
  for (int column = thread * kSize; column < p.C; column += kStep) {
    widen<T>(load_piece<kSize>(x_row + column, true), v);
    if (p.h) {
      float gate[kSize];
#pragma unroll
      for (int e = 0; e < kSize; e++) gate[e] = 1.0f;
      if (p.gate) load_gate(p, batch, token, column, true, gate);
      const Piece<T, kSize> h = load_piece<kSize>(h_row + column, true);
      T* x_new = static_cast<T*>(p.x_new) + int64_t{row} * p.C;
      add_residual(x_new + column, true, h, gate, v);
    }
    sum += sum_of(v);
  }
  if (p.kind == NormKind::kLayer) mean = row_sum(sum, shared.partial[0], kWarps) * plan.inverse_C;

  // Each thread reads what it wrote itself
  if (p.h) x_row = static_cast<const T*>(p.x_new) + int64_t{row} * p.C;
  for (int column = thread * kSize; column < p.C; column += kStep) {
    widen<T>(load_piece<kSize>(x_row + column, true), v);
    subtract(v, mean, true);
    squares += squares_of(v);
  }
  const float variance = row_sum(squares, shared.partial[1], kWarps) * plan.inverse_C;
  if (thread == 0)
    reinterpret_cast<Statistics*>(p.statistics)[row] = {mean, rsqrt_approx(variance + p.eps)};
}

// --- Tiles of 128 x 128 --------------------------------------------------------------------------

template <class T, int kSize>
struct TileConfig {
  static constexpr int kTileM = 128, kThreads = 256;
  static constexpr int kLanes = kSize < 4 ? 32 : kBlockK / kSize;  // of a row
  static constexpr int kPieces = kBlockK / kLanes / kSize;         // of it in a thread
  static constexpr int kStep = kThreads / kLanes;     // from one row of a thread to its next
  static constexpr int kRows = kTileM / kStep;        // of a thread: 8 or 16
  static constexpr int kBlocks = kSize == 8 ? 2 : 1;  // of an SM, at least
  static_assert(kLanes <= 32, "a row is one warp's");
  static_assert(kRows * kPieces * kSize == 64, "y takes half of the registers of a thread");
};

// A thread keeps its 64 elements of y in registers, from the load to the store.
template <class T, int kSize>
__global__ void __launch_bounds__(TileConfig<T, kSize>::kThreads, TileConfig<T, kSize>::kBlocks)
    tiles_kernel(const NormParams p) {
  using Tile = TileConfig<T, kSize>;
  constexpr int kRows = Tile::kRows, kPieces = Tile::kPieces;
  auto& shared = shared_storage<SharedStorage>();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % Tile::kLanes;
  const int tiles_n = ceil_div(p.C, kBlockK), M = p.B * p.L;
  const int tile_n = static_cast<int>(blockIdx.x) % tiles_n;
  const int tile_m = static_cast<int>(gridDim.x - 1 - blockIdx.x) / tiles_n;  // last rows first
  const int first = tile_m * Tile::kTileM + thread / Tile::kLanes;
  const auto column = [&](int j) { return tile_n * kBlockK + (j * Tile::kLanes + lane) * kSize; };

  // Load, walking down the rows
  Piece<T, kSize> x[kRows][kPieces];
  const T* x_row = row_of<T>(p.x, p.stride_xb, p.stride_xl, first / p.L, first % p.L);
  int token = first % p.L;
#pragma unroll
  for (int i = 0; i < kRows; i++) {
    const bool held = first + i * Tile::kStep < M;
#pragma unroll
    for (int j = 0; j < kPieces; j++)
      x[i][j] = load_piece<kSize>(x_row + column(j), held && column(j) < p.C);
    x_row += Tile::kStep * p.stride_xl;
    for (token += Tile::kStep; token >= p.L; token -= p.L) x_row += p.stride_xb - p.L * p.stride_xl;
  }

  // Normalise
  float y[kRows][kPieces][kSize];
#pragma unroll
  for (int i = 0; i < kRows; i++) {
    const int row = min(first + i * Tile::kStep, M - 1);
    const Statistics of_row = reinterpret_cast<const Statistics*>(p.statistics)[row];
#pragma unroll
    for (int j = 0; j < kPieces; j++) {
      widen<T>(x[i][j], y[i][j]);
      subtract(y[i][j], of_row.mean, column(j) < p.C);
#pragma unroll
      for (int e = 0; e < kSize; e++) y[i][j][e] *= of_row.inverse;
    }
  }

  // Modulate, the rows of one frame after those of another
  const int stop = is_modulated(p) ? min(M, (tile_m + 1) * Tile::kTileM) : 0;
#pragma unroll 1
  for (int begin = first; begin < stop;) {
    const int end = (begin / p.segment_rows + 1) * p.segment_rows;
#pragma unroll
    for (int j = 0; j < kPieces; j++) {
      float gain[kSize], offset[kSize];
      load_modulation(p, begin / p.L, begin % p.L, column(j), column(j) < p.C, gain, offset);
#pragma unroll
      for (int i = 0; i < kRows; i++) {
        const int row = first + i * Tile::kStep;
        if (row < begin || row >= end) continue;
#pragma unroll
        for (int e = 0; e < kSize; e++) y[i][j][e] = fmaf(y[i][j][e], gain[e], offset[e]);
      }
    }
    begin += ceil_div(end - begin, Tile::kStep) * Tile::kStep;
  }

  // Store in x's dtype
  if (!p.y_scale) {
#pragma unroll
    for (int i = 0; i < kRows; i++) {
      const int64_t row = first + i * Tile::kStep;
#pragma unroll
      for (int j = 0; j < kPieces; j++)
        store_piece<kSize>(static_cast<T*>(p.y) + row * p.C + column(j), row < M && column(j) < p.C,
                           narrow<T>(y[i][j]));
    }
    return;
  }

  // Or in 8 bits, with a scale per tile or per row of it
  float amax[kRows], largest = 0.0f;
#pragma unroll
  for (int i = 0; i < kRows; i++) {
    amax[i] = 0.0f;
#pragma unroll
    for (int j = 0; j < kPieces; j++) {
      const bool inside = first + i * Tile::kStep < M && column(j) < p.C;
      amax[i] = max_magnitude(amax[i], amax_of(y[i][j], inside));
    }
    largest = max_magnitude(largest, amax[i]);
  }
  const bool per_tile = p.block_rows > 1;
  if (per_tile) largest = block_reduce<Tile::kThreads / 32>(largest, shared.partial[0], Larger());
  float scale = block_scale(largest, limit_of(p));
  Divisor by(scale);
  if (per_tile && thread == 0) p.y_scale[int64_t{tile_m} * tiles_n + tile_n] = scale;
#pragma unroll
  for (int i = 0; i < kRows; i++) {
    const int64_t row = first + i * Tile::kStep;
    if (!per_tile) {
      scale = block_scale(warp_reduce<Tile::kLanes>(amax[i], Larger()), limit_of(p));
      by = Divisor(scale);
      if (lane == 0 && row < M) p.y_scale[row * tiles_n + tile_n] = scale;
    }
#pragma unroll
    for (int j = 0; j < kPieces; j++)
      if (row < M && column(j) < p.C) store_codes(p, row, column(j), by, y[i][j]);
  }
}

// --- Launchers -----------------------------------------------------------------------------------

// The warps and pieces per thread that leave fewest lanes idle, none but in the last piece; of
// equals, the fewest warps.
inline Plan plan_of(const NormParams& p, int size) {
  Plan best{0, 0, 0, 1.0f / static_cast<float>(p.C)};
  const int chunks = ceil_div(p.C, 32 * size);
  for (int pieces = Config::kMaxPieces; pieces > 0; pieces--) {
    const int warps = ceil_div(chunks, pieces);
    const bool fits = warps <= Config::kMaxWarps && (pieces - 1) * warps <= chunks - 1;
    if (fits && (best.warps == 0 || warps * pieces < best.warps * best.pieces))
      best.warps = warps, best.pieces = pieces;
  }
  if (best.warps == 0) return best;

  // As many rows as fill the registers of every SM once, in runs of equal length
  const int at_once = max(p.processors, 1) * (Config::kMaxWarps / best.warps);
  const int rows = min(ceil_div(p.B * p.L, at_once), Config::kMaxRows);
  best.rows = ceil_div(p.segment_rows, ceil_div(p.segment_rows, rows));
  return best;
}

template <class T>
cudaError_t launch_rows(const NormParams& p, const Plan& plan, size_t bytes, cudaStream_t stream) {
  const int runs = p.B * p.L / p.segment_rows * ceil_div(p.segment_rows, plan.rows);
  const int together = plan.warps == 1 ? Config::kNarrowRows : 1;
  const unsigned threads = plan.warps * 32 * together;
  const Launch how{dim3(ceil_div(runs, together)), threads, bytes};
  switch (plan.pieces) {
    case 1:
      return launch(rows_kernel<T, 1>, how, stream, p, plan);
    case 2:
      return launch(rows_kernel<T, 2>, how, stream, p, plan);
    default:
      return launch(rows_kernel<T, 3>, how, stream, p, plan);
  }
}

template <class T, int kSize>
cudaError_t launch_tiles(NormParams p, cudaStream_t stream) {
  if (p.h) {
    p.x = p.x_new;
    p.stride_xb = int64_t{p.L} * p.C;
    p.stride_xl = p.C;
  }
  using Tile = TileConfig<T, kSize>;
  const dim3 grid(ceil_div(p.B * p.L, Tile::kTileM) * ceil_div(p.C, kBlockK));
  return launch(tiles_kernel<T, kSize>, {grid, Tile::kThreads, sizeof(SharedStorage)}, stream, p);
}

template <class T, int kSize>
cudaError_t launch_long_rows(const NormParams& p, const Plan& plan, cudaStream_t stream) {
  const Launch how{dim3(p.B * p.L), Config::kLongThreads, sizeof(SharedStorage)};
  return launch(long_rows_kernel<T, kSize>, how, stream, p, plan);
}

template <class T>
cudaError_t normalise(const NormParams& p, cudaStream_t stream) {
  constexpr int kSize = Vector<T>::kSize;
  const Plan plan = plan_of(p, kSize);
  const int threads = plan.warps * 32 * (plan.warps == 1 ? Config::kNarrowRows : 1);
  const auto shared_bytes = [&](int folded) {
    return sizeof(SharedStorage) + sizeof(float) * threads * plan.pieces * kSize * folded;
  };
  const int gates = p.gate ? 1 : 0, folded = gates + (is_modulated(p) ? 2 : 0);
  const bool aligned = is_aligned(p, kSize), in_registers = aligned && plan.warps > 0;

  // One kernel, unless a scale spans rows
  const bool fits = in_registers && shared_bytes(folded) <= static_cast<size_t>(p.shared_limit);
  if (fits && !(p.y_scale && p.block_rows > 1)) {
    NormParams whole = p;
    whole.statistics = nullptr;
    return launch_rows<T>(whole, plan, shared_bytes(folded), stream);
  }

  // Statistics, then tiles
  cudaError_t error;
  if (in_registers)
    error = launch_rows<T>(p, plan, shared_bytes(gates), stream);
  else if (aligned)
    error = launch_long_rows<T, kSize>(p, plan, stream);
  else
    error = launch_long_rows<T, 1>(p, plan, stream);
  if (error != cudaSuccess) return error;
  return aligned ? launch_tiles<T, kSize>(p, stream) : launch_tiles<T, 1>(p, stream);
}

}  // namespace norm_sm80

cudaError_t normalise_sm80(const NormParams& p, cudaStream_t stream) {
  if (p.B == 0 || p.L == 0 || p.C == 0) return cudaSuccess;
  const bool bad_scale = p.y_scale
                             ? size_of(p.y_dtype) != 1 || (p.block_rows != 1 && p.block_rows != 128)
                             : p.y_dtype != p.x_dtype;
  if (bad_scale || p.segment_rows < 1 || p.L % p.segment_rows || (p.h && !p.x_new) ||
      !p.statistics || int64_t{p.B} * p.L > (1 << 30))
    return cudaErrorInvalidValue;
  switch (p.x_dtype) {
    case Dtype::kFloat32:
      return norm_sm80::normalise<float>(p, stream);
    case Dtype::kBfloat16:
      return norm_sm80::normalise<bfloat16>(p, stream);
    case Dtype::kFloat16:
      return norm_sm80::normalise<float16>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace reeltime
