// SPDX-License-Identifier: Apache-2.0
// gemm_w8a8 on mma.sync: int8 on every GPU, e4m3 from sm_89 on (gemm_w8a8.h has the equation).
//
// A block owns a tile of kBlockM x 128 of the result, a warp 32 x 64 of it.  K goes by in blocks of
// 128, those of the scales: one stage of cp.async, one barrier, and sums that end with it.
//
//   stage[kStages]  a [kBlockM, 128] and b [128, 128] bytes, swizzled: a ring in shared memory
//   a               the warp's 32 rows of the K block, 32 registers, read once
//   d[2]            sums over the K block of the left and right 32 columns: int32 (float of e4m3)
//   total[2]        sums over K blocks, float32: total += a_scale * b_scale * d, called promotion
//
// Promotion is a third of the loop's instructions, so it runs beside products: of the left half
// beside those of the right, of the right half beside those of the next K block's left half.  That
// of int8 is FADD + FFMA: the first product adds to kIntBias in place of zero (types.h), which is
// free, since mma.sync takes its addend from any registers.
// NOTE: what keeps the halves apart is the branch around the fetch between them.  Without it ptxas
// merges them, issues products first and promotions last, and runs out of registers.
//
// Floor: 2 M N K over the int8 rate, or (M + N) K + M N itemsize bytes over the bandwidth.  Shared
// memory, per K block of 128 x 128: 8 warps read (32 + 64) x 128 bytes, and 32 KiB are written: 128
// KiB at 128 bytes per clock are 1024 clocks, as many as the 128^3 products of it take on sm_80
// (2048 per clock), and half of what they take on sm_86, sm_89 and sm_120 (1024 per clock).
#include "common/barrier.h"
#include "common/cp_async.h"
#include "common/launch.h"
#include "common/ldmatrix.h"
#include "common/mma.h"
#include "common/swizzle.h"
#include "gemm_w8a8/epilogue.h"

namespace reeltime {
namespace gemm_sm80 {

template <int kBlockM_, int kStages_>
struct Config {
  static constexpr int kBlockM = kBlockM_;
  static constexpr int kBlockN = kTileColumns;
  static constexpr int kBlockK = 128;
  static constexpr int kStages = kStages_;
  static constexpr int kWarpM = 32, kWarpN = 64;
  static constexpr int kWarpsM = kBlockM / kWarpM;
  static constexpr int kWarps = kWarpsM * (kBlockN / kWarpN);
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kStrip = 1024 / kBlockM;  // tiles: rows of a that stay in L2
  static_assert(kWarps * kStripRows == kBlockM, "each warp finishes one strip");
  static_assert(kStages >= 2, "one K block is fetched while another is multiplied");
};
using Large = Config<128, 3>;
using Small = Config<64, 3>;  // for few rows: twice as many tiles; two fit an SM of sm_80

using Layout = Swizzle<128>;  // of a tile's rows, one K block long

template <class Config>
struct SharedStorage {
  struct alignas(1024) Stage {  // the swizzle's period
    uint8_t a[Config::kBlockM * Config::kBlockK], b[Config::kBlockN * Config::kBlockK];
  };
  union {
    Stage stage[Config::kStages];
    float staged[Config::kBlockM * kStagedPitch];  // after the last product
  };
  float amax[Config::kWarps];
};
static_assert(sizeof(SharedStorage<Large>) <= 99 * 1024, "sm_86, sm_89, sm_120");
static_assert(sizeof(SharedStorage<Small>) <= 99 * 1024, "sm_86, sm_89, sm_120");

// --- Products of one type --------------------------------------------------------------------

template <class T>
struct Product;

template <>
struct Product<int8_t> {
  using Sum = int32_t;
  static constexpr bool kExists = true;
  static constexpr Sum kZero = kIntBias;
  DEVICE static void add(Sum (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_s8(d, a, b0, b1);
  }
  DEVICE static float value(Sum d) { return biased_to_float(d); }
};

template <>
struct Product<e4m3> {
  using Sum = float;
  static constexpr bool kExists = kHasMmaE4m3;
  static constexpr Sum kZero = 0.0f;
  DEVICE static void add(Sum (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_e4m3(d, a, b0, b1);
  }
  DEVICE static float value(Sum d) { return d; }
};

// --- Global memory to the ring ---------------------------------------------------------------

// A thread copies the same 16-byte column of every kRows-th row, of a and of b.
template <class Config>
struct Loader {
  static constexpr int kRows = Config::kThreads / Layout::kChunks;
  using Stage = typename SharedStorage<Config>::Stage;

  const uint8_t *a, *b;  // this thread's first chunk
  int rows_a, rows_b;    // from its first row to the end of a and b
  int64_t stride_a, stride_b;
  int k, K;
  uint32_t place;  // of the first chunk in a tile

  DEVICE Loader(const GemmParams& p, int m, int n)
      : stride_a(p.stride_a), stride_b(p.stride_b), K(p.K) {
    const int row = static_cast<int>(threadIdx.x) / Layout::kChunks;
    const int chunk = static_cast<int>(threadIdx.x) % Layout::kChunks;
    k = chunk * 16;
    rows_a = p.M - (m + row);
    rows_b = p.N - (n + row);
    a = static_cast<const uint8_t*>(p.a) + (m + row) * stride_a + k;
    b = static_cast<const uint8_t*>(p.b) + (n + row) * stride_b + k;
    place = Layout::chunk(row, chunk);  // kRows is a multiple of 8: later rows swizzle alike
  }

  // Fills a stage with the K block that this thread has come to.  What lies outside is zeros.
  DEVICE void fetch(Stage& stage) {
    copy<Config::kBlockM>(shared_address(stage.a), a, stride_a, rows_a);
    copy<Config::kBlockN>(shared_address(stage.b), b, stride_b, rows_b);
    a += Config::kBlockK;
    b += Config::kBlockK;
    k += Config::kBlockK;
  }

  template <int kTileRows>
  DEVICE void copy(uint32_t tile, const uint8_t* from, int64_t stride, int rows) const {
    static_assert(kRows % 8 == 0 && kTileRows % kRows == 0, "");
#pragma unroll
    for (int i = 0; i < kTileRows; i += kRows) {
      const bool valid = i < rows && k < K;
      cp_async(tile + place + i * Config::kBlockK, valid ? from + i * stride : from, valid);
    }
  }
};

// --- Scales --------------------------------------------------------------------------------------

// Of a thread's four rows (8 r + lane / 4 of its warp's 32) and of the tile's columns, loaded one
// K block before they are used.
struct Scales {
  const float *a, *b;
  int64_t stride_row;  // eight rows on
  int stride_ak, stride_bk, rows;
  float next_a[4], next_b;

  DEVICE Scales(const GemmParams& p, int m, int n)
      : stride_ak(p.stride_ak), stride_bk(p.stride_bk) {
    const int per_row = p.block_rows == 1;
    a = p.a_scale + int64_t{per_row ? m : m / 128} * p.stride_am;
    b = p.b_scale + int64_t{n / kTileColumns} * p.stride_bn;
    stride_row = per_row ? int64_t{8} * p.stride_am : 0;
    rows = p.M - m;
  }

  DEVICE void load() {
#pragma unroll
    for (int r = 0; r < 4; r++) next_a[r] = 8 * r < rows ? a[r * stride_row] : 0.0f;
    next_b = *b;
    a += stride_ak;
    b += stride_bk;
  }

  DEVICE void take(float (&scale)[4]) const {
#pragma unroll
    for (int r = 0; r < 4; r++) scale[r] = next_a[r] * next_b;
  }
};

// --- Shared memory to sums -----------------------------------------------------------------------

// A warp's 32 rows x 32 columns of the tile, a half of what it owns.
template <class Sum>
using Half = Sum[2][4][4];  // (rows by 16, columns by 8, fragment)

// d = the warp's rows of a times 32 columns of b, over a K block.  With kLoad, fills `a` on the
// way; the tiles start at the first of those rows and columns.
template <class T, bool kLoad>
DEVICE void multiply(Half<typename Product<T>::Sum>& d, uint32_t (&a)[4][2][4], uint32_t a_tile,
                     uint32_t b_tile) {
  const int lane = static_cast<int>(lane_index());
  const int column = lane % 8 + lane / 16 * 8, chunk = lane / 8 % 2;
#pragma unroll
  for (int i = 0; i < 32; i++) d[i / 16][i / 4 % 4][i % 4] = Product<T>::kZero;
#pragma unroll
  for (int k = 0; k < 4; k++) {
#pragma unroll
    for (int i = 0; i < 2 && kLoad; i++)
      ldmatrix_x4(a[k][i], a_tile + Layout::chunk(i * 16 + lane % 16, k * 2 + lane / 16));
    uint32_t b[2][4];  // (columns by 16, of each eight: K bytes 0 to 15, 16 to 31)
#pragma unroll
    for (int j = 0; j < 2; j++)
      ldmatrix_x4(b[j], b_tile + Layout::chunk(j * 16 + column, k * 2 + chunk));
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int j = 0; j < 4; j++)
        Product<T>::add(d[i][j], a[k][i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
  }
}

template <class T>
DEVICE void promote(Half<float>& total, const float (&scale)[4],
                    const Half<typename Product<T>::Sum>& d) {
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        total[i][j][e] = fmaf(scale[2 * i + e / 2], Product<T>::value(d[i][j][e]), total[i][j][e]);
}

// --- The kernel ----------------------------------------------------------------------------------

template <class Config, class T>
__global__ void __launch_bounds__(Config::kThreads) gemm_kernel(const GemmParams p) {
  if constexpr (Product<T>::kExists) {
    constexpr int kStages = Config::kStages;
    auto& shared = shared_storage<SharedStorage<Config>>();
    const int lane = static_cast<int>(lane_index()), warp = static_cast<int>(warp_index());
    const int warp_m = warp % Config::kWarpsM * Config::kWarpM;
    const int warp_n = warp / Config::kWarpsM * Config::kWarpN;
    const int tiles_m = ceil_div(p.M, Config::kBlockM), tiles_n = ceil_div(p.N, Config::kBlockN);
    const Tile tile = tile_at(static_cast<int>(blockIdx.x), tiles_m, tiles_n, Config::kStrip);
    const int m = tile.m * Config::kBlockM, n = tile.n * Config::kBlockN;
    const int steps = ceil_div(p.K, Config::kBlockK);

    // First K blocks on their way
    Loader<Config> loader(p, m, n);
#pragma unroll
    for (int step = 0; step < kStages - 1; step++) {
      if (step < steps) loader.fetch(shared.stage[step]);
      cp_async_commit();
    }
    Scales scales(p, m + warp_m + lane / 4, n);
    if (steps > 0) scales.load();
    prefetch_residual<Config::kBlockM, Config::kThreads>(p, m, n);

    // Sum over K blocks
    Half<float> total[2] = {};
    Half<typename Product<T>::Sum> d[2];
    float scale[4] = {};
#pragma unroll
    for (int i = 0; i < 32; i++) d[1][i / 16][i / 4 % 4][i % 4] = Product<T>::kZero;
    int full = 0, empty = kStages - 1;  // stages: of this K block, of the next to be fetched
    for (int step = 0; step < steps; step++) {
      cp_async_wait<kStages - 2>();  // this K block has landed, of this thread's copies
      sync_block();                  // of everyone's; and everyone has left the one before
      const auto& stage = shared.stage[full];
      const uint32_t a_tile = shared_address(stage.a) + warp_m * Config::kBlockK;
      const uint32_t b_tile = shared_address(stage.b) + warp_n * Config::kBlockK;
      uint32_t a[4][2][4];  // (K by 32 bytes, rows by 16, fragment)
      multiply<T, true>(d[0], a, a_tile, b_tile);
      promote<T>(total[1], scale, d[1]);  // of the K block before

      scales.take(scale);
      if (step + 1 < steps) scales.load();
      if (step + kStages - 1 < steps) loader.fetch(shared.stage[empty]);
      cp_async_commit();
      multiply<T, false>(d[1], a, a_tile, b_tile + 32 * Config::kBlockK);
      promote<T>(total[0], scale, d[0]);
      full = full + 1 < kStages ? full + 1 : 0;
      empty = empty + 1 < kStages ? empty + 1 : 0;
    }
    promote<T>(total[1], scale, d[1]);

    // Sums to whole rows
    sync_block();  // the ring has been read
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int j = 0; j < 8; j++)
        stage(shared.staged, warp_m + i * 16, warp_n + j * 8, total[j / 4][i][j % 4]);
    sync_block();
    float* strip = shared.staged + warp * kStripRows * kStagedPitch;
    const int first = m + warp * kStripRows;
    float amax = finish_rows(p, strip, first, n);
    if (!p.out_scale || p.block_rows == 1) return;

    // One scale for the tile
    amax = block_reduce<Config::kWarps>(amax, shared.amax, Max());
    const float out_scale = block_scale(amax, limit_of(p.out_dtype));
    if (threadIdx.x == 0) p.out_scale[int64_t{tile.m} * tiles_n + tile.n] = out_scale;
    store_codes(p, strip, first, n, out_scale);
  }
}

template <class Config>
inline cudaError_t launch_tiles(const GemmParams& p, cudaStream_t stream) {
  const int tiles = ceil_div(p.M, Config::kBlockM) * ceil_div(p.N, Config::kBlockN);
  const Launch with{dim3(tiles), Config::kThreads, sizeof(SharedStorage<Config>)};
  if (p.dtype == Dtype::kInt8) return launch(gemm_kernel<Config, int8_t>, with, stream, p);
  return launch(gemm_kernel<Config, e4m3>, with, stream, p);
}

// Time of all waves of tiles: rows of a that one SM multiplies.  A small tile reads half as much
// again per product and is taken for a quarter slower.
template <class Config>
inline int64_t cost(const GemmParams& p, int percent) {
  const int tiles = ceil_div(p.M, Config::kBlockM) * ceil_div(p.N, Config::kBlockN);
  return int64_t{ceil_div(tiles, p.processors)} * Config::kBlockM * percent;
}

}  // namespace gemm_sm80

// NOTE: e4m3 below sm_89 would store nothing; Python refuses it.
cudaError_t gemm_w8a8_sm80(const GemmParams& p, cudaStream_t stream) {
  using namespace gemm_sm80;
  const bool codes_in = p.dtype == Dtype::kInt8 || p.dtype == Dtype::kE4m3;
  const bool codes_out = p.out_dtype == Dtype::kInt8 || p.out_dtype == Dtype::kE4m3;
  const auto addresses = reinterpret_cast<uintptr_t>(p.a) | reinterpret_cast<uintptr_t>(p.b);
  if (addresses % 16 != 0 || (p.K && (p.stride_a | p.stride_b) % 16 != 0) || !codes_in ||
      codes_out != (p.out_scale != nullptr) || p.K % 16 != 0 || p.processors < 1 ||
      (p.block_rows != 1 && p.block_rows != 128))
    return cudaErrorInvalidValue;
  if (p.M == 0 || p.N == 0) return cudaSuccess;
  const bool whole_blocks = p.out_scale && p.block_rows == 128;  // only a large tile has them
  if (!whole_blocks && cost<Small>(p, 125) < cost<Large>(p, 100))
    return launch_tiles<Small>(p, stream);
  return launch_tiles<Large>(p, stream);
}

}  // namespace reeltime
