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
// Two blocks with neighbouring tiles form a cluster: each loads half of what both read and
// multicasts it.  Tiles, by what bounds them (choice.h):
//
//   128 x 192   the most products per byte for 64 x kColumns of d and total in registers
//   192 x 128   the same, where a requantised row needs its 128 columns in one tile
//   128 x 160   where it fills its waves better
//   128 x 128   requantised in blocks of 128 rows; where it ends sooner
//
// Where tiles are few, a cluster of 2 or 4 blocks has one of them, each block a share of its K
// blocks.  Sums meet through distributed shared memory, in the rings, which have drained: each slab
// in a block of its own, so that two blocks receive, end the equation and store at once.  Stream-K
// (arXiv:2301.03598) has sums meet in global memory.  For 128 x 128 in two parts that is 32 KB per
// block to L2 and 32 KB back, 1024 clocks at 64 bytes, and trips to L2 for a fence, a counter and
// the other block's sums; here it is 32 KB at 16 bytes, 2048 clocks, and two barriers of a cluster.
// The clocks differ little; but here is no workspace, no counter to reset, and no block that waits
// for one which may not run.
//
// Floor: 2 M N K over the int8 rate, or (M + N) K + M N itemsize bytes over the bandwidth.
#include "common/barrier.h"
#include "common/launch.h"
#include "common/tma.h"
#include "common/wgmma.h"
#include "gemm_w8a8/choice.h"
#include "gemm_w8a8/fragments.h"

namespace reeltime {
namespace gemm_sm90 {

constexpr int kPanelRows = 2048;  // of a, that stay in L2
constexpr int kRegisters = 65536;

template <int kGroups_, int kColumns_>
struct Config {
  static constexpr int kGroups = kGroups_;
  static constexpr int kRows = kGroups * Slab::kRows, kColumns = kColumns_;
  static constexpr int kThreads = (kGroups + 1) * Slab::kThreads;
  static constexpr int kStages = kRows + kColumns > 256 ? 5 : 6;
  // Staged at a time: all of 16 bits, where there is room
  static constexpr int kChunks = kGroups == 3 ? 2 : kColumns == 192 ? 3 : kColumns / 32;
  // Of a thread: d and total alone are kColumns
  static constexpr int kProducerRegisters = 24, kGroupRegisters = kGroups == 2 ? 240 : 160;
  static_assert(kProducerRegisters + kGroups * kGroupRegisters <= kRegisters / Slab::kThreads, "");
  // Three groups have no register left for it, and choose() does not ask
  static constexpr bool kInParts = kGroups == 2;
  // That lie in one block of b_scale, wherever a tile begins
  static constexpr int kScaleColumns = kColumns % 64 == 0 ? 64 : 32;
  static_assert(kColumns % kScaleColumns == 0 && kColumns <= kTileColumns + kScaleColumns, "");
};

template <class Tiles>
struct alignas(1024) Stage {  // the swizzle's period
  uint8_t a[Tiles::kRows * kBlockK], b[Tiles::kColumns * kBlockK];
};

template <class Tiles>
struct SharedStorage {
  union {
    Stage<Tiles> stage[Tiles::kStages];
    PartialSums<Tiles::kColumns> received[2][Tiles::kGroups];  // once the ring has drained
  };
  alignas(1024) Chunk out[Tiles::kGroups][Tiles::kChunks];
  Mbarrier full[Tiles::kStages], left[Tiles::kGroups][Tiles::kStages];
  float columns[Tiles::kGroups][Tiles::kColumns];  // of bias or gate
  float amax[2][8];                                // of every warp, for this tile and the next
};
static_assert(sizeof(SharedStorage<Config<2, 128>>) <= 227 * 1024, "");
static_assert(sizeof(SharedStorage<Config<2, 160>>) <= 227 * 1024, "");
static_assert(sizeof(SharedStorage<Config<2, 192>>) <= 227 * 1024, "");
static_assert(sizeof(SharedStorage<Config<3, 128>>) <= 227 * 1024, "");

struct Share {  // of the K blocks
  int first, end;
};

// What the launcher decided.  Tiles of a cluster count once, and a cluster walks over them in steps
// of `slots`; the second block may get one that lies outside of the result.
struct Plan {
  int high, wide;        // tiles of a cluster, one of them 1: if two, each block has one,
  int parts;             // if one, each block a part of K
  int slots;             // clusters in flight
  int tiles_m, tiles_n;  // of clusters
  int strip;             // for tile_at
  int blocks, share;     // of K, and of that a block's
  int apart;             // sums of the parts meet slab by slab in different blocks
  int staged;            // the result goes by TMA: its rows are multiples of 16 bytes

  DEVICE int pair() const { return high * wide; }
  DEVICE int first() const { return static_cast<int>(blockIdx.x) / (pair() * parts); }
  DEVICE int end() const { return tiles_m * tiles_n; }
  template <class Tiles>
  DEVICE Tile start(int index) const {  // the tile's first row and column
    const int rank = static_cast<int>(cluster_rank());
    const Tile tile = tile_at(index, tiles_m, tiles_n, strip);
    return {(tile.m * high + (rank & (high - 1))) * Tiles::kRows,
            (tile.n * wide + (rank & (wide - 1))) * Tiles::kColumns};
  }
  DEVICE Share blocks_of(unsigned rank) const {
    const int first = min((static_cast<int>(rank) & (parts - 1)) * share, blocks);
    return {first, min(first + share, blocks)};
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

// A box of `rows` of an operand.  Halved: the half that is this block's, to both of the cluster.
DEVICE void load(uint8_t* to, const TensorMap& map, Mbarrier& full, int k, int row, int rows,
                 bool halved) {
  if (!halved) {
    tma_load(to, map, full, {k, row});
  } else {
    const int mine = static_cast<int>(cluster_rank()) * (rows / 2);
    tma_load<2, true>(to + mine * kBlockK, map, full, {k, row + mine}, 3);
  }
}

template <class Tiles>
DEVICE void produce(const Plan& plan, const TensorMap& a_map, const TensorMap& b_map,
                    SharedStorage<Tiles>& shared) {
  const Share blocks = plan.blocks_of(cluster_rank());
  Ring<Tiles> ring;
  for (int index = plan.first(); index < plan.end(); index += plan.slots) {
    const Tile at = plan.template start<Tiles>(index);
    for (int block = blocks.first; block < blocks.end; block++) {
      const int s = ring.stage, k = block * kBlockK;
      auto& stage = shared.stage[s];
      shared.left[Tiles::kGroups - 1][s].wait(ring.parity ^ 1);
      shared.full[s].arrive_expect(sizeof stage);
      load(stage.a, a_map, shared.full[s], k, at.m, Tiles::kRows, plan.wide == 2);
      load(stage.b, b_map, shared.full[s], k, at.n, Tiles::kColumns, plan.high == 2);
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
  constexpr int kSums = Tiles::kColumns / 2, kScaleColumns = Tiles::kScaleColumns;
  constexpr int kScales = Tiles::kColumns / kScaleColumns;
  constexpr bool kTwo = Tiles::kColumns > kTileColumns;  // blocks of b_scale in a tile
  const int group = slab.group();
#pragma unroll
  for (int i = 0; i < kSums; i++) total[i] = 0.0f;

  // Scales: of two rows, and of the two blocks of 128 columns that the tile may have a part in
  const int second = kTileColumns - slab.n0 % kTileColumns;  // the first column of the second
  const unsigned rank = cluster_rank();
  const Share blocks = plan.blocks_of(rank);
  const float* a_scale[2];
  const float* b_scale[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    a_scale[i] = p.a_scale + int64_t{min(slab.row(2 * i), p.M - 1) / p.block_rows} * p.stride_am +
                 int64_t{blocks.first} * p.stride_ak;
    const int n = min(slab.n0 + i * kTileColumns, p.N - 1);
    b_scale[i] =
        p.b_scale + int64_t{n / kTileColumns} * p.stride_bn + int64_t{blocks.first} * p.stride_bk;
  }

  for (int block = blocks.first; block < blocks.end; block++) {
    // Loads of this block's scales, on their way while the products run
    const float a[2] = {a_scale[0][0], a_scale[1][0]};
    const float b[2] = {b_scale[0][0], kTwo ? b_scale[1][0] : b_scale[0][0]};
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
    if (last && slab.lane() < plan.pair()) shared.left[group][s].give_back_at(rank ^ slab.lane());
    if (!last && slab.lane() == 0) shared.left[group][s].arrive();
    ring.advance();

    // Promotion
    float scale[2][kScales];
#pragma unroll
    for (int g = 0; g < kScales; g++) {
      const int column = g * kScaleColumns;
      const bool other = column >= kTileColumns || (kTwo && g > 0 && column >= second);
      const float b_of_column = other ? b[1] : b[0];
      scale[0][g] = a[0] * b_of_column;
      scale[1][g] = a[1] * b_of_column;
    }
#pragma unroll
    for (int i = 0; i < kSums; i++)
      total[i] = fmaf(scale[i / 2 % 2][i * 2 / kScaleColumns], static_cast<float>(d[i]), total[i]);
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
    if (Tiles::kInParts && plan.parts > 1) {  // this is the only tile
      const unsigned owner = plan.apart & slab.group();
      exchange(slab, plan.parts, owner, shared.received, total);
      if (cluster_rank() != owner) break;
    }
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
        shared.left[g][s].init(g == kGroups - 1 ? 4 * plan.pair() : 4);
    }
    fence_mbarrier_init();
  }
  sync_cluster();

  // Roles
  if (threadIdx.x < Slab::kThreads) {
    decrease_registers<Tiles::kProducerRegisters>();
    if (threadIdx.x == 0) produce<Tiles>(plan, a_map, b_map, shared);
    if (Tiles::kInParts && plan.parts > 1) attend_exchange(plan.parts);
  } else {
    increase_registers<Tiles::kGroupRegisters>();
    consume<T, Tiles>(p, plan, out_map, shared);
  }
  sync_cluster();  // the other block may still multicast into this one, and give back its stages
}

// --- Launch --------------------------------------------------------------------------------------

template <class T, int kGroups, int kColumns>
cudaError_t launch_tiles(const GemmParams& p, const Choice& choice, cudaStream_t stream) {
  using Tiles = Config<kGroups, kColumns>;
  const uint64_t M = p.M, N = p.N, K = p.K;
  const int size = size_of(p.out_dtype);
  Plan plan;
  plan.high = choice.high();
  plan.wide = choice.wide();
  plan.parts = choice.parts;
  plan.tiles_m = ceil_div(p.M, Tiles::kRows * plan.high);
  plan.tiles_n = ceil_div(p.N, kColumns * plan.wide);
  plan.slots = min(plan.tiles_m * plan.tiles_n, clusters_at_once(choice.cluster(), p.processors));
  plan.strip = kPanelRows / (Tiles::kRows * plan.high);
  plan.blocks = ceil_div(p.K, kBlockK);
  plan.share = ceil_div(plan.blocks, plan.parts);
  plan.apart = !(p.out_scale && p.block_rows == kTileColumns);
  plan.staged = N * size % 16 == 0 && reinterpret_cast<uintptr_t>(p.out) % 16 == 0;

  TensorMap a_map{}, b_map{}, out_map{};
  const uint32_t a_rows = Tiles::kRows / plan.wide, b_rows = kColumns / plan.high;
  const TensorShape<2> a{{K, M}, {static_cast<uint64_t>(p.stride_a)}, {kBlockK, a_rows}};
  const TensorShape<2> b{{K, N}, {static_cast<uint64_t>(p.stride_b)}, {kBlockK, b_rows}};
  const uint32_t chunk_columns = kChunkBytes / size;
  const TensorShape<2> out{{N, M}, {N * size}, {chunk_columns, Slab::kRows}};
  cudaError_t error = cudaSuccess;
  if (p.K > 0) error = make_tensor_map(a_map, p.a, 1, a, kBlockK);
  if (p.K > 0 && error == cudaSuccess) error = make_tensor_map(b_map, p.b, 1, b, kBlockK);
  if (plan.staged && error == cudaSuccess)
    error = make_tensor_map(out_map, p.out, size, out, kChunkBytes);
  if (error != cudaSuccess) return error;
  const unsigned cluster = choice.cluster();
  const Launch with{dim3(plan.slots * cluster), Tiles::kThreads, sizeof(SharedStorage<Tiles>),
                    cluster};
  return launch(gemm_kernel<T, kGroups, kColumns>, with, stream, p, plan, a_map, b_map, out_map);
}

template <class T>
cudaError_t launch_type(const GemmParams& p, cudaStream_t stream) {
  const Choice choice = choose(p.M, p.N, p.K, p.processors, p.out_scale ? p.block_rows : 0);
  if (choice.groups == 3) return launch_tiles<T, 3, 128>(p, choice, stream);
  if (choice.columns == 192) return launch_tiles<T, 2, 192>(p, choice, stream);
  if (choice.columns == 160) return launch_tiles<T, 2, 160>(p, choice, stream);
  return launch_tiles<T, 2, 128>(p, choice, stream);
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
