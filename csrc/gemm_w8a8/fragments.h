// SPDX-License-Identifier: Apache-2.0
// The end of the equation where the sums are: in wgmma's registers.
//
// A thread's total[i] belongs to rows m and m + 8 of its slab and to pairs of columns, eight apart.
// What lies along columns (bias, gate) comes through shared memory, the residual directly.  The
// result leaves through chunks, 64 bytes of each of the slab's rows, swizzled as TMA reads them:
// 16, 32 or 64 columns.  Shared memory then carries the result's own bytes, not float32 sums; those
// only go from one block to another, where K is in parts.
#pragma once
#include "common/cluster.h"
#include "common/stmatrix.h"
#include "common/swizzle.h"
#include "common/wgmma.h"
#include "gemm_w8a8/epilogue.h"

namespace reeltime {

// 64 rows of a tile: a warpgroup's, of those from 1 on in the block.
struct Slab {
  static constexpr int kRows = 64;
  static constexpr int kThreads = 128;
  int m0, n0;  // first row and column
  int32_t self[1];

  // The tile's, at (m, n).  Ties the thread's number: all that follows from it is then made where
  // it is used, and not kept in registers through the products of every tile.
  DEVICE Slab(int m, int n) : n0(n), self{static_cast<int32_t>(threadIdx.x)} {
    tie_registers(self);
    m0 = m + group() * kRows;
  }
  DEVICE int group() const { return self[0] / kThreads - 1; }
  DEVICE int thread() const { return self[0] % kThreads; }
  DEVICE int warp() const { return thread() / 32; }
  DEVICE int lane() const { return thread() % 32; }
  DEVICE void sync() const { named_barrier_sync(1 + group(), kThreads); }

  // Of total[i], within the slab and in the result
  DEVICE int row_inside(int i) const { return warp() * 16 + lane() / 4 + i / 2 % 2 * 8; }
  DEVICE int column_inside(int i) const { return lane() % 4 * 2 + i / 4 * 8 + i % 2; }
  DEVICE int row(int i) const { return m0 + row_inside(i); }
  DEVICE int column(int i) const { return n0 + column_inside(i); }
};

constexpr int kPairBarrier = 4;  // of the first two slabs; 1 to 3 are their own

template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T at[2];
};

// --- Sums of parts -------------------------------------------------------------------------------

// Of a slab, as another block of the cluster leaves them here: thread by thread, as its registers
// held them, so that a warp stores and loads 512 bytes at once.
template <int kColumns>
struct PartialSums {
  Vector<float> at[kColumns / 8][Slab::kThreads];
};

// Each block of the cluster holds total over its part of K; block `owner` gets their sum.  Two by
// two, in rounds: in the first, blocks whose ranks differ in bit 0 are partners, and the one unlike
// the owner gives its sums away.  The order of additions is then the same in each launch.
// NOTE: all threads of the cluster take part: the others by attend_exchange.
template <int kColumns, int kGroups>
DEVICE void exchange(const Slab& slab, int parts, unsigned owner,
                     PartialSums<kColumns> (&received)[2][kGroups], float (&total)[kColumns / 2]) {
  const unsigned rank = cluster_rank(), unlike = rank ^ owner;
  sync_cluster();  // nobody needs what `received` lies over
#pragma unroll 1
  for (int round = 0; 1 << round < parts; round++) {
    const unsigned bit = 1u << round, place = unlike & (2 * bit - 1);
    auto& sums = received[round][slab.group()].at;
    if (place == bit) {
      const uint32_t to = address_in_rank(shared_address(&sums[0][slab.thread()]), rank ^ bit);
#pragma unroll
      for (int i = 0; i < kColumns / 8; i++) {
        const float* y = total + i * 4;
        store_in_cluster(to + i * sizeof sums[0], {y[0], y[1], y[2], y[3]});
      }
    }
    sync_cluster();  // what was given has arrived
    if (place == 0) {
#pragma unroll
      for (int i = 0; i < kColumns / 8; i++) {
        const Vector<float> y = sums[i][slab.thread()];
#pragma unroll
        for (int j = 0; j < 4; j++) total[i * 4 + j] += y.at[j];
      }
    }
  }
}

DEVICE void attend_exchange(int parts) {
  sync_cluster();
  for (int round = 0; 1 << round < parts; round++) sync_cluster();
}

// --- Bias, gate, residual ------------------------------------------------------------------------

// A row of bias or gate: each thread fetches its share of the tile's columns, and shares them.
// Past the end the last one again: loads need no mask, and what comes of it is not stored.
template <int kColumns>
struct Columns {
  static constexpr int kEach = ceil_div(kColumns, Slab::kThreads);
  float mine[kEach];

  DEVICE void fetch(const Slab& slab, const void* array, Dtype dtype, int64_t row, int64_t stride,
                    int N) {
#pragma unroll
    for (int i = 0; i < kEach; i++) {
      const int n = min(slab.n0 + slab.thread() + i * Slab::kThreads, N - 1);
      mine[i] = load_float(array, dtype, row + n * stride);
    }
  }
  DEVICE void share(const Slab& slab, float (&all)[kColumns]) const {
    slab.sync();  // nobody reads what was there
#pragma unroll
    for (int i = 0; i < kEach; i++) {
      const int n = slab.thread() + i * Slab::kThreads;
      if (n < kColumns) all[n] = mine[i];
    }
    slab.sync();
  }
};

// From memory to L2, while the products are made.
template <int kColumns>
DEVICE void prefetch_residual(const GemmParams& p, const Slab& slab) {
  if (!p.residual || p.stride_rn != 1) return;
  const int bytes = size_of(p.residual_dtype), columns = 128 / bytes;  // of a cache line
  const int lines = ceil_div(kColumns, columns);
#pragma unroll 1
  for (int i = slab.thread(); i < Slab::kRows * lines; i += Slab::kThreads) {
    const int m = slab.m0 + i / lines, n = slab.n0 + i % lines * columns;
    if (m < p.M && n < p.N)
      prefetch_l2(static_cast<const char*>(p.residual) + (m * p.stride_rm + n) * bytes);
  }
}

// kPairs: neighbours are, in memory, and aligned.  As many loads are on their way at once as there
// are registers for.
template <class T, bool kPairs, int kSums>
DEVICE void add_residual(const GemmParams& p, const Slab& slab, float (&total)[kSums]) {
  constexpr int kBatch = kPairs && sizeof(T) == 2 ? kSums : 16;
  const T* row[2];
#pragma unroll
  for (int r = 0; r < 2; r++)
    row[r] = static_cast<const T*>(p.residual) + min(slab.row(2 * r), p.M - 1) * p.stride_rm;
#pragma unroll
  for (int i = 0; i < kSums; i += 2) {
    const T* from = row[i / 2 % 2];
    const int n = min(slab.column(i), p.N - (kPairs ? 2 : 1));
    Pair<T> x;
    if constexpr (kPairs)
      x = *reinterpret_cast<const Pair<T>*>(from + n);
    else
      x = {from[n * p.stride_rn], from[min(n + 1, p.N - 1) * p.stride_rn]};
    total[i] += to_float(x.at[0]);
    total[i + 1] += to_float(x.at[1]);
    if (i % kBatch == kBatch - 2) sync_warp();  // no load is moved up past it
  }
}

template <class T, int kSums>
DEVICE void add_residual(const GemmParams& p, const Slab& slab, float (&total)[kSums]) {
  const auto address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(p.residual));
  const int64_t row_bytes = p.stride_rm * static_cast<int64_t>(sizeof(T));
  if (p.stride_rn == 1 && p.N % 2 == 0 && ((address | row_bytes) & (2 * sizeof(T) - 1)) == 0)
    add_residual<T, true>(p, slab, total);
  else
    add_residual<T, false>(p, slab, total);
}

// `columns`: the slab's own, in shared memory.
template <int kColumns>
DEVICE void end_equation(const GemmParams& p, const Slab& slab, const Columns<kColumns>& bias,
                         float (&columns)[kColumns], float (&total)[kColumns / 2]) {
  constexpr int kSums = kColumns / 2;
  const auto* pairs = reinterpret_cast<const Pair<float>*>(columns + slab.column_inside(0));
  if (p.bias) {
    bias.share(slab, columns);
#pragma unroll
    for (int i = 0; i < kSums; i++) total[i] += pairs[i / 4 * 4].at[i % 2];
  }
  if (p.epilogue == Epilogue::kGelu) {
#pragma unroll
    for (int i = 0; i < kSums; i++) total[i] = gelu_tanh(total[i]);
  }
  if (p.epilogue != Epilogue::kGatedResidual) return;
  if (p.gate) {  // frame by frame: 64 rows rarely lie in more than one or two
    const int frame[2] = {slab.row(0) / p.frame_rows, slab.row(2) / p.frame_rows};
    const int last = (min(slab.m0 + Slab::kRows, p.M) - 1) / p.frame_rows;
#pragma unroll 1
    for (int f = slab.m0 / p.frame_rows; f <= last; f++) {
      Columns<kColumns> gate;
      gate.fetch(slab, p.gate, p.gate_dtype, f * p.stride_gf, p.stride_gn, p.N);
      gate.share(slab, columns);
#pragma unroll
      for (int i = 0; i < kSums; i++)
        if (frame[i / 2 % 2] == f) total[i] *= pairs[i / 4 * 4].at[i % 2];
    }
  }
  if (p.residual_dtype == Dtype::kFloat32)
    add_residual<float>(p, slab, total);
  else if (p.residual_dtype == Dtype::kBfloat16)
    add_residual<bfloat16>(p, slab, total);
  else
    add_residual<float16>(p, slab, total);
}

// --- Requantisation ------------------------------------------------------------------------------

// Turns sums into numbers for pack4, and stores their scales.  kPair: the tile has two slabs, which
// may be a block of 128 rows; `amax` then is a float per warp, and lasts until the next but one
// call.
template <class Out, bool kPair, int kSums>
DEVICE void quantize(const GemmParams& p, const Slab& slab, float (&amax)[8],
                     float (&total)[kSums]) {
  static_assert(kSums == kTileColumns / 2, "a row of the slab is a row of a block");
  if (slab.m0 + Slab::kRows > p.M || slab.n0 + kTileColumns > p.N) {
#pragma unroll
    for (int i = 0; i < kSums; i++)  // what lies outside must not count
      if (slab.row(i) >= p.M || slab.column(i) >= p.N) total[i] = 0.0f;
  }
  float largest[2] = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < kSums; i++) largest[i / 2 % 2] = max_magnitude(largest[i / 2 % 2], total[i]);
#pragma unroll
  for (int r = 0; r < 2; r++) largest[r] = magnitude(largest[r]);

  const int block = slab.n0 / kTileColumns, blocks = ceil_div(p.N, kTileColumns);
  float scale[2];
  if (!kPair || p.block_rows == 1) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      scale[r] = block_scale(warp_reduce<4>(largest[r], Max()), kLimit<Out>);
      const int m = slab.row(2 * r);
      if (slab.lane() % 4 == 0 && m < p.M && slab.n0 < p.N)
        p.out_scale[int64_t{m} * blocks + block] = scale[r];
    }
  } else {
    largest[0] = warp_reduce(max(largest[0], largest[1]), Max());
    if (slab.lane() == 0) amax[slab.group() * 4 + slab.warp()] = largest[0];
    named_barrier_sync(kPairBarrier, 2 * Slab::kThreads);
#pragma unroll
    for (int warp = 0; warp < 8; warp++) largest[0] = max(largest[0], amax[warp]);
    scale[0] = scale[1] = block_scale(largest[0], kLimit<Out>);
    if (slab.group() == 0 && slab.thread() == 0 && slab.m0 < p.M && slab.n0 < p.N)
      p.out_scale[int64_t{slab.m0 / p.block_rows} * blocks + block] = scale[0];
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float y[kSums / 2];
#pragma unroll
    for (int i = 0; i < kSums / 2; i++) y[i] = total[i / 2 * 4 + r * 2 + i % 2];
    encode_block(y, scale[r], kLimit<Out>);
#pragma unroll
    for (int i = 0; i < kSums / 2; i++) total[i / 2 * 4 + r * 2 + i % 2] = y[i];
  }
}

// --- Chunks --------------------------------------------------------------------------------------

constexpr int kChunkBytes = 64;  // of each row
using Chunk = uint8_t[Slab::kRows * kChunkBytes];
using ChunkLayout = Swizzle<kChunkBytes>;

template <class Out>
constexpr int kChunkColumns = kChunkBytes / static_cast<int>(sizeof(Out));

// y: the total of the chunk's first columns.
template <class Out>
DEVICE void stage_chunk(const Slab& slab, Chunk& chunk, const float* y) {
  const int lane = slab.thread() % 32, row = slab.warp() * 16;
  constexpr int kSums = kChunkColumns<Out> / 2;
  if constexpr (sizeof(Out) == 2) {
    const uint32_t to = shared_address(chunk);
#pragma unroll
    for (int i = 0; i < kSums; i += 8) {
      const uint32_t r[4] = {pack2<Out>(y[i], y[i + 1]), pack2<Out>(y[i + 2], y[i + 3]),
                             pack2<Out>(y[i + 4], y[i + 5]), pack2<Out>(y[i + 6], y[i + 7])};
      stmatrix_x4(to + ChunkLayout::chunk(row + lane % 16, i / 4 + lane / 16), r);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kSums; i += 4) {
      const int byte = (i * 2 + lane % 4 * 2) * static_cast<int>(sizeof(Out));
      uint8_t* upper = chunk + ChunkLayout::byte(row + lane / 4, byte);
      uint8_t* lower = chunk + ChunkLayout::byte(row + lane / 4 + 8, byte);
      if constexpr (sizeof(Out) == 4) {
        *reinterpret_cast<Pair<float>*>(upper) = {y[i], y[i + 1]};
        *reinterpret_cast<Pair<float>*>(lower) = {y[i + 2], y[i + 3]};
      } else {
        const uint32_t codes = pack4<Out>(y[i], y[i + 1], y[i + 2], y[i + 3]);
        *reinterpret_cast<uint16_t*>(upper) = static_cast<uint16_t>(codes & 0xffff);
        *reinterpret_cast<uint16_t*>(lower) = static_cast<uint16_t>(codes >> 16);
      }
    }
  }
}

// What TMA does where it can, one element at a time.
template <class Out>
DEVICE void copy_chunk(const GemmParams& p, const Slab& slab, const Chunk& chunk, int n0) {
  for (int i = slab.thread(); i < Slab::kRows * kChunkColumns<Out>; i += Slab::kThreads) {
    const int row = i / kChunkColumns<Out>, column = i % kChunkColumns<Out>;
    const int byte = column * static_cast<int>(sizeof(Out)), m = slab.m0 + row, n = n0 + column;
    if (m < p.M && n < p.N)
      static_cast<Out*>(p.out)[int64_t{m} * p.N + n] =
          *reinterpret_cast<const Out*>(chunk + ChunkLayout::byte(row, byte));
  }
}

}  // namespace reeltime
