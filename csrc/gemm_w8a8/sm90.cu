// SPDX-License-Identifier: Apache-2.0
// gemm_w8a8 on Hopper: wgmma, fed by TMA, in a persistent kernel whose warpgroups have one task
// each (gemm_w8a8.h has the equation).
//
// A block owns a tile of the result, then its next one, and a ring of stages that never drains in
// between.  A stage is one K block of 128, the scales' own: kRows of a and kColumns of b, 128 bytes
// each, swizzled.
//
//   producer   warpgroup 0, one thread: TMA loads, as far ahead as the ring allows
//   group g    warpgroup g + 1, 64 rows of the tile: d, the sums of one K block, 64 x kColumns, and
//              total += a_scale * b_scale * d, float32
//
//   full[s]    the stage has landed: every group waits for it
//   left[g][s] group g has done its products with it: group g + 1 waits, for the last the producer
//
// Promotion, d into total, needs the sums; the tensor cores must not wait for it.  64 x kColumns x
// 128 products take them 2 kColumns clocks.  Promotion takes a warp kColumns: kColumns / 2
// conversions at half rate (I2FP, 2 clocks; e4m3 needs none), and FFMA between them.  So a group
// promotes while the tensor cores work for another, and one d suffices.  That groups take turns is
// what left[] is for: were they in step, all would promote at once.  A group begins a K block when
// the one before it has its sums, hence one K block behind: while one stores its tile, the others
// still have products.  (I2FP, where mma.sync kernels preset d to kIntBias and subtract: wgmma adds
// in place, so that the preset would be a move per sum.)
//
// Two blocks with neighbouring tiles form a cluster: each loads half of what both read, the larger
// operand of the tile, and multicasts it.  Tiles, by what bounds them: see clocks_per_block.
//
//   128 x 192   the most products per byte for 64 x kColumns of d and total in registers
//   192 x 128   the same, where a requantised row needs its 128 columns in one tile
//   128 x 128   requantised in blocks of 128 rows; where it ends sooner
//
// Floor: 2 M N K over the int8 rate, or (M + N) K + M N itemsize bytes over the bandwidth.
#include "common/barrier.h"
#include "common/launch.h"
#include "common/tma.h"
#include "common/wgmma.h"
#include "gemm_w8a8/fragments.h"

namespace reeltime {
namespace gemm_sm90 {

constexpr int kBlockK = 128;      // bytes of a row in a stage
constexpr int kPanelRows = 2048;  // of a, that stay in L2
constexpr int kRegisters = 65536;

template <int kGroups_, int kColumns_>
struct Config {
  static constexpr int kGroups = kGroups_;
  static constexpr int kRows = kGroups * Slab::kRows, kColumns = kColumns_;
  static constexpr int kThreads = (kGroups + 1) * Slab::kThreads;
  static constexpr bool kShareA = kRows > kColumns;  // in a cluster; otherwise b
  static constexpr int kStages = kRows + kColumns > 256 ? 5 : 6;
  static constexpr int kChunks = kGroups == 3 ? 2 : kColumns == 192 ? 3 : 4;  // staged at a time
  // Of a thread: d and total alone are kColumns
  static constexpr int kProducerRegisters = 24, kGroupRegisters = kGroups == 2 ? 240 : 160;
  static_assert(kProducerRegisters + kGroups * kGroupRegisters <= kRegisters / Slab::kThreads, "");
  static_assert(kColumns % 64 == 0, "64 columns lie in one block of b_scale");
};

template <class Tiles>
struct SharedStorage {
  struct alignas(1024) Stage {  // the swizzle's period
    uint8_t a[Tiles::kRows * kBlockK], b[Tiles::kColumns * kBlockK];
  } stage[Tiles::kStages];
  alignas(1024) Chunk out[Tiles::kGroups][Tiles::kChunks];
  Mbarrier full[Tiles::kStages], left[Tiles::kGroups][Tiles::kStages];
  float columns[Tiles::kGroups][Tiles::kColumns];  // of bias or gate
  float amax[2][8];                                // of every warp, for this tile and the next
};
static_assert(sizeof(SharedStorage<Config<2, 128>>) <= 227 * 1024, "");
static_assert(sizeof(SharedStorage<Config<2, 192>>) <= 227 * 1024, "");
static_assert(sizeof(SharedStorage<Config<3, 128>>) <= 227 * 1024, "");

// What the launcher decided.  Tiles of a cluster count once, and a cluster walks over them in steps
// of `slots`; the second block may get one that lies outside of the result.
struct Plan {
  int cluster;           // 1 or 2
  int slots;             // clusters in flight
  int tiles_m, tiles_n;  // of clusters
  int strip;             // for tile_at
  int blocks;            // of K
  int staged;            // the result goes by TMA: its rows are multiples of 16 bytes

  DEVICE int first() const { return static_cast<int>(blockIdx.x) >> (cluster - 1); }
  DEVICE int end() const { return tiles_m * tiles_n; }
  template <class Tiles>
  DEVICE Tile start(int index) const {  // the tile's first row and column
    const int rank = static_cast<int>(cluster_rank());
    Tile tile = tile_at(index, tiles_m, tiles_n, strip);
    int& across = Tiles::kShareA ? tile.n : tile.m;
    across = across * cluster + rank;
    return {tile.m * Tiles::kRows, tile.n * Tiles::kColumns};
  }
};

// Place in the ring; parity is that of its round.
template <class Tiles>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  DEVICE void advance() {
    if (++stage == Tiles::kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// --- Producer ------------------------------------------------------------------------------------

template <class Tiles>
DEVICE void produce(const Plan& plan, const TensorMap& a_map, const TensorMap& b_map,
                    SharedStorage<Tiles>& shared) {
  constexpr bool kShareA = Tiles::kShareA;
  constexpr int kHalf = (kShareA ? Tiles::kRows : Tiles::kColumns) / 2;
  const TensorMap& own_map = kShareA ? b_map : a_map;
  const TensorMap& shared_map = kShareA ? a_map : b_map;
  Ring<Tiles> ring;
  for (int index = plan.first(); index < plan.end(); index += plan.slots) {
    const Tile at = plan.template start<Tiles>(index);
    const int own = kShareA ? at.n : at.m, both = kShareA ? at.m : at.n;
    for (int block = 0; block < plan.blocks; block++) {
      const int s = ring.stage, k = block * kBlockK;
      auto& stage = shared.stage[s];
      uint8_t* halves = kShareA ? stage.a : stage.b;
      shared.left[Tiles::kGroups - 1][s].wait(ring.parity ^ 1);
      shared.full[s].arrive_expect(sizeof stage);
      tma_load(kShareA ? stage.b : stage.a, own_map, shared.full[s], {k, own});
      if (plan.cluster == 1) {
        tma_load(halves, shared_map, shared.full[s], {k, both});
        tma_load(halves + kHalf * kBlockK, shared_map, shared.full[s], {k, both + kHalf});
      } else {
        const int mine = static_cast<int>(cluster_rank()) * kHalf;
        tma_load<2, true>(halves + mine * kBlockK, shared_map, shared.full[s], {k, both + mine}, 3);
      }
      ring.advance();
    }
  }
}

// --- Products and scales -------------------------------------------------------------------------

template <class T>
struct Sum {
  using Type = float;
};
template <>
struct Sum<int8_t> {
  using Type = int32_t;
};

template <class T, class Tiles>
DEVICE void multiply(const GemmParams& p, const Plan& plan, SharedStorage<Tiles>& shared,
                     Ring<Tiles>& ring, const Slab& slab, float (&total)[Tiles::kColumns / 2]) {
  constexpr int kSums = Tiles::kColumns / 2, kParts = Tiles::kColumns / 64;
  const int group = slab.group();
#pragma unroll
  for (int i = 0; i < kSums; i++) total[i] = 0.0f;

  // Scales: of two rows, and of the two blocks of 128 columns that the tile may have a part in
  const bool middle = slab.n0 % kTileColumns != 0;  // whether columns 64 to 127 lie in the second
  const float* a_scale[2];
  const float* b_scale[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    a_scale[i] = p.a_scale + int64_t{min(slab.row(2 * i), p.M - 1) / p.block_rows} * p.stride_am;
    const int n = min(slab.n0 + i * kTileColumns, p.N - 1);
    b_scale[i] = p.b_scale + int64_t{n / kTileColumns} * p.stride_bn;
  }

  for (int block = 0; block < plan.blocks; block++) {
    // Loads of this block's scales, on their way while the products run
    const float a[2] = {a_scale[0][0], a_scale[1][0]};
    const float b[2] = {b_scale[0][0], kParts > 2 ? b_scale[1][0] : b_scale[0][0]};
#pragma unroll
    for (int i = 0; i < 2; i++) {
      a_scale[i] += p.stride_ak;
      b_scale[i] += p.stride_bk;
    }

    // Products of one K block
    const int s = ring.stage;
    shared.full[s].wait(ring.parity);
    if (group > 0) shared.left[group - 1][s].wait(ring.parity);
    const uint32_t rows = shared_address(shared.stage[s].a) + group * Slab::kRows * kBlockK;
    const uint32_t columns = shared_address(shared.stage[s].b);
    typename Sum<T>::Type d[kSums];
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kBlockK; k += 32)
      Wgmma<T, Tiles::kColumns>::ss(d, wgmma_descriptor<128>(rows + k),
                                    wgmma_descriptor<128>(columns + k), k > 0);
    wgmma_commit();
    wgmma_wait<0>();
    tie_registers(d);

    // Release, a lane per warp: its wait covered the warp
    const bool last = group == Tiles::kGroups - 1;
    if (last && slab.lane() < plan.cluster) shared.left[group][s].give_back_at(slab.lane());
    if (!last && slab.lane() == 0) shared.left[group][s].arrive();
    ring.advance();

    // Promotion
    float scale[2][kParts];
#pragma unroll
    for (int g = 0; g < kParts; g++) {
      const bool second = kParts > 2 && (g == 2 || (g == 1 && middle));
      scale[0][g] = a[0] * (second ? b[1] : b[0]);
      scale[1][g] = a[1] * (second ? b[1] : b[0]);
    }
#pragma unroll
    for (int i = 0; i < kSums; i++)
      total[i] = fmaf(scale[i / 2 % 2][i / 32], static_cast<float>(d[i]), total[i]);
  }
}

// --- Consumers -----------------------------------------------------------------------------------

// As many chunks at a time as there is room for.
template <class Out, class Tiles>
DEVICE void store(const GemmParams& p, const Plan& plan, const TensorMap& out_map, const Slab& slab,
                  Chunk (&chunks)[Tiles::kChunks], const float (&total)[Tiles::kColumns / 2]) {
  constexpr int kColumns = kChunkColumns<Out>, kAll = Tiles::kColumns / kColumns;
  constexpr int kTogether = kAll < Tiles::kChunks ? kAll : Tiles::kChunks;
  static_assert(kAll % kTogether == 0, "");
#pragma unroll
  for (int first = 0; first < kAll; first += kTogether) {
    // Wait until what was there has left
    if (slab.thread() == 0) tma_store_wait_read<0>();
    slab.sync();
#pragma unroll
    for (int i = 0; i < kTogether; i++)
      stage_chunk<Out>(slab, chunks[i], total + (first + i) * kColumns / 2);

    // Store what all have staged
    fence_async_proxy();
    slab.sync();
    const int n0 = slab.n0 + first * kColumns;
    if (!plan.staged) {
      for (int i = 0; i < kTogether; i++) copy_chunk<Out>(p, slab, chunks[i], n0 + i * kColumns);
    } else if (slab.thread() == 0) {
#pragma unroll
      for (int i = 0; i < kTogether; i++)
        tma_store(out_map, chunks[i], {n0 + i * kColumns, slab.m0});
      tma_store_commit();
    }
  }
}

template <class T, class Tiles>
DEVICE void consume(const GemmParams& p, const Plan& plan, const TensorMap& out_map,
                    SharedStorage<Tiles>& shared) {
  constexpr int kColumns = Tiles::kColumns;
  Ring<Tiles> ring;
  int turn = 0;
  for (int index = plan.first(); index < plan.end(); index += plan.slots, turn ^= 1) {
    const Tile at = plan.template start<Tiles>(index);
    const Slab slab(at.m, at.n);
    prefetch_residual<kColumns>(p, slab);
    Columns<kColumns> bias;  // fetched early, for later
    if (p.bias) bias.fetch(slab, p.bias, p.bias_dtype, 0, p.stride_bias, p.N);
    float total[kColumns / 2];
    multiply<T>(p, plan, shared, ring, slab, total);
    end_equation(p, slab, bias, shared.columns[slab.group()], total);
    auto& chunks = shared.out[slab.group()];

    if (p.out_dtype == Dtype::kBfloat16) {
      store<bfloat16, Tiles>(p, plan, out_map, slab, chunks, total);
    } else if (p.out_dtype == Dtype::kFloat16) {
      store<float16, Tiles>(p, plan, out_map, slab, chunks, total);
    } else if (p.out_dtype == Dtype::kFloat32) {
      store<float, Tiles>(p, plan, out_map, slab, chunks, total);
    } else if constexpr (kColumns == kTileColumns) {
      auto& amax = shared.amax[turn];
      if (p.out_dtype == Dtype::kInt8) {
        quantize<int8_t, Tiles::kRows == 128>(p, slab, amax, total);
        store<int8_t, Tiles>(p, plan, out_map, slab, chunks, total);
      } else {
        quantize<e4m3, Tiles::kRows == 128>(p, slab, amax, total);
        store<e4m3, Tiles>(p, plan, out_map, slab, chunks, total);
      }
    }
  }
  if (threadIdx.x % Slab::kThreads == 0) tma_store_wait_read<0>();
}

// --- Kernel --------------------------------------------------------------------------------------

template <class T, int kGroups, int kColumns>
__global__ void __launch_bounds__(Config<kGroups, kColumns>::kThreads, 1)
    gemm_kernel(const GemmParams p, const Plan plan, const __grid_constant__ TensorMap a_map,
                const __grid_constant__ TensorMap b_map,
                const __grid_constant__ TensorMap out_map) {
  using Tiles = Config<kGroups, kColumns>;
  auto& shared = shared_storage<SharedStorage<Tiles>>();

  // Barriers, by one thread
  if (threadIdx.x == 0) {
    tma_prefetch_map(a_map);
    tma_prefetch_map(b_map);
    for (int s = 0; s < Tiles::kStages; s++) {
      shared.full[s].init(1);
      for (int g = 0; g < kGroups; g++)
        shared.left[g][s].init(g == kGroups - 1 ? 4 * plan.cluster : 4);
    }
    fence_mbarrier_init();
  }
  sync_cluster();

  // Roles
  if (threadIdx.x < Slab::kThreads) {
    decrease_registers<Tiles::kProducerRegisters>();
    if (threadIdx.x == 0) produce<Tiles>(plan, a_map, b_map, shared);
  } else {
    increase_registers<Tiles::kGroupRegisters>();
    consume<T, Tiles>(p, plan, out_map, shared);
  }
  sync_cluster();  // the other block may still multicast into this one, and give back its stages
}

// --- Launch --------------------------------------------------------------------------------------

struct Choice {
  int groups, columns, cluster;
};

// Clocks that a K block of a tile takes: the most of what the tensor cores, shared memory and L2
// need.  A model, to compare tiles by: 4096 products, 128 bytes of shared memory and kL2Bytes per
// clock and SM; TMA writes each byte of a stage once, wgmma reads it once, b for each warpgroup.
inline int clocks_per_block(const Choice& choice) {
  constexpr int kL2Bytes = 40;
  const int rows = choice.groups * Slab::kRows, columns = choice.columns;
  const int products = rows * columns * kBlockK / 4096;
  const int moved = (rows + columns) + (rows + choice.groups * columns);
  const int halved = choice.cluster == 2 ? max(rows, columns) / 2 : 0;
  const int fetched = (rows + columns - halved) * kBlockK / kL2Bytes;
  return max(products, max(moved * kBlockK / 128, fetched));
}

// The tile that ends first, in whole waves.  `block_rows`: of a requantised result, or 0.
Choice choose(int M, int N, int processors, int block_rows) {
  constexpr Choice kChoices[] = {{2, 192, 2}, {3, 128, 2}, {2, 128, 2},
                                 {2, 192, 1}, {3, 128, 1}, {2, 128, 1}};
  Choice best{};
  int64_t least = INT64_MAX;
  for (const Choice& choice : kChoices) {
    int rows = choice.groups * Slab::kRows, columns = choice.columns;
    if (processors < choice.cluster || (block_rows > 0 && columns != kTileColumns) ||
        (block_rows > 1 && rows != block_rows))
      continue;
    (rows > columns ? columns : rows) *= choice.cluster;
    const int64_t tiles = int64_t{ceil_div(M, rows)} * ceil_div(N, columns);
    const int64_t slots = processors / choice.cluster;
    const int64_t clocks = (tiles + slots - 1) / slots * clocks_per_block(choice);
    if (clocks < least) best = choice, least = clocks;
  }
  return best;
}

template <class T, int kGroups, int kColumns>
cudaError_t launch_tiles(const GemmParams& p, int cluster, cudaStream_t stream) {
  using Tiles = Config<kGroups, kColumns>;
  constexpr bool kShareA = Tiles::kShareA;
  const uint64_t M = p.M, N = p.N, K = p.K;
  const int size = size_of(p.out_dtype);
  Plan plan;
  plan.cluster = cluster;
  plan.tiles_m = ceil_div(p.M, Tiles::kRows * (kShareA ? 1 : cluster));
  plan.tiles_n = ceil_div(p.N, kColumns * (kShareA ? cluster : 1));
  plan.slots = min(plan.tiles_m * plan.tiles_n, p.processors / cluster);
  plan.strip = kPanelRows / (Tiles::kRows * (kShareA ? 1 : cluster));
  plan.blocks = ceil_div(p.K, kBlockK);
  plan.staged = N * size % 16 == 0 && reinterpret_cast<uintptr_t>(p.out) % 16 == 0;

  TensorMap a_map{}, b_map{}, out_map{};
  const TensorShape<2> a{
      {K, M}, {static_cast<uint64_t>(p.stride_a)}, {kBlockK, Tiles::kRows / (kShareA ? 2 : 1)}};
  const TensorShape<2> b{
      {K, N}, {static_cast<uint64_t>(p.stride_b)}, {kBlockK, kColumns / (kShareA ? 1 : 2)}};
  const uint32_t chunk_columns = kChunkBytes / size;
  const TensorShape<2> out{{N, M}, {N * size}, {chunk_columns, Slab::kRows}};
  cudaError_t error = cudaSuccess;
  if (p.K > 0) error = make_tensor_map(a_map, p.a, 1, a, kBlockK);
  if (p.K > 0 && error == cudaSuccess) error = make_tensor_map(b_map, p.b, 1, b, kBlockK);
  if (plan.staged && error == cudaSuccess)
    error = make_tensor_map(out_map, p.out, size, out, kChunkBytes);
  if (error != cudaSuccess) return error;
  const Launch with{dim3(plan.slots * cluster), Tiles::kThreads, sizeof(SharedStorage<Tiles>),
                    static_cast<unsigned>(cluster)};
  return launch(gemm_kernel<T, kGroups, kColumns>, with, stream, p, plan, a_map, b_map, out_map);
}

template <class T>
cudaError_t launch_type(const GemmParams& p, cudaStream_t stream) {
  const Choice choice = choose(p.M, p.N, p.processors, p.out_scale ? p.block_rows : 0);
  if (choice.groups == 3) return launch_tiles<T, 3, 128>(p, choice.cluster, stream);
  if (choice.columns == 192) return launch_tiles<T, 2, 192>(p, choice.cluster, stream);
  return launch_tiles<T, 2, 128>(p, choice.cluster, stream);
}

}  // namespace gemm_sm90

cudaError_t gemm_w8a8_sm90(const GemmParams& p, cudaStream_t stream) {
  const bool requantised = p.out_dtype == Dtype::kInt8 || p.out_dtype == Dtype::kE4m3;
  if (p.M == 0 || p.N == 0) return cudaSuccess;
  if (p.K % 16 || p.processors < 1 || requantised != (p.out_scale != nullptr) ||
      (p.block_rows != 1 && p.block_rows != 128))
    return cudaErrorInvalidValue;
  if (p.dtype == Dtype::kInt8) return gemm_sm90::launch_type<int8_t>(p, stream);
  if (p.dtype == Dtype::kE4m3) return gemm_sm90::launch_type<e4m3>(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace reeltime
