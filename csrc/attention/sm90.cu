// SPDX-License-Identifier: Apache-2.0
// attention on Hopper: wgmma fed by TMA, by warpgroups that take turns (attention.h says what).
//
// A block owns 128 queries of one head and walks that head's keys, 64 at a time, the keys that
// share scales: entry after entry of the table, of plain tensors the only one.
//
//   producer    warpgroup 0: TMA loads by one thread, as far ahead as the ring allows; values of
//               e4m3 it also transposes (sm90_values.h)
//   consumers   warpgroups 1 and 2, 64 queries each: scores, softmax, products with values
//
//   k_full[s], v_full[s]    keys, values and their scales have landed
//   turned[s]               values are transposed; of float16 nobody asks
//   empty[s]                both consumers are done with the stage
//   group_full, group_empty the same of what 16 blocks of keys need: scales of keys, and mean keys,
//                           for q.mu is one product of mma.sync ahead of their walk
//
// While one consumer turns scores into probabilities the tensor cores work for the other: they wait
// for each other in front of their products, those of a block's probabilities with values and, for
// the next softmax, of q with the next block's keys.  Registers of a thread, D = 128:
//
//   x      32   scores, 12582912 + q_code.k_code read as floats (softmax.h)
//   q      16   codes of the queries: A operands from registers leave shared memory to B
//   p      8    probabilities, of float16 16
//   sums   68   probabilities times values of one block of keys, of float16 64
//   out    64   += v_scale * sums, the second level: tensor cores keep few bits of e4m3 sums
//
// Floor: 2 B H S_q S_kv D operations over the int8 rate plus as many over that of the values.  Per
// 64 queries and keys, D = 128, in clocks of an SM: products 128 + 136 (of float16 128 + 256), exp2
// 256, and a warp issues 32 scores times some 11 instructions, 350.  A consumer's products hide
// under the other's softmax, and instructions are what is short: hence no polynomial for a share of
// exp2, int32 to float by where sums begin, sums of probabilities by tensor cores.
//
// Source: FlashAttention-3 (arXiv 2407.08608); SageAttention 2 (arXiv 2411.10958).
#include "attention/attention.h"
#include "attention/sm90_tile.h"
#include "attention/sm90_values.h"
#include "common/cp_async.h"
#include "common/launch.h"
#include "common/tma.h"

namespace reeltime {
namespace attend_sm90 {

constexpr int kThreads = 384;  // three warpgroups
constexpr int kStages = 6;     // blocks of keys in the ring
constexpr int kAhead = 3;      // blocks that are loaded ahead of transposition
constexpr int kGroup = 16;     // blocks of keys whose q.mu is one product
constexpr int kGroups = 4;     // in flight
static_assert(kAhead < kStages - 1, "or a transposition waits for the products before it");

template <class T, int kD_>
struct Config {
  static constexpr int kD = kD_;  // channels of q, k and v
  static constexpr int kSize = sizeof(T);
  using V = Values<T, kD>;
  static_assert(kD == 64 || kD == 128, "whole swizzled rows");
};

template <class C>
struct SharedStorage {
  static constexpr int kPitch = 20;  // floats: columns of a pair of lanes in different banks
  struct alignas(1024) Stage {       // the swizzle's period
    uint8_t k[kKeys * C::kD];
    typename C::V::Tile v;
    alignas(128) float v_scale[C::kD];
  } stage[kStages];
  struct alignas(1024) Group {
    uint8_t mean[C::kD / 64][kGroup * 128];  // 64 channels of every block
    float k_scale[kGroup];
  } group[kGroups];
  alignas(1024) uint8_t q[8][C::kD / 64][16 * 128];  // of each warp, 16 bits
  float shift[8][kGroup][kPitch];                    // of each warp, [block][row]
  Mbarrier k_full[kStages], v_full[kStages], turned[kStages], empty[kStages];
  Mbarrier group_full[kGroups], group_empty[kGroups];
};
static_assert(sizeof(SharedStorage<Config<e4m3, 128>>) <= 227 * 1024, "");

struct Maps {
  TensorMap k, v, v_scale, k_mean;
};

// --- Producer ------------------------------------------------------------------------------------

// Loads in the order of the walk, by one warp, all of whose lanes call.
template <class C>
struct Loader {
  const AttentionParams& p;
  const Maps& maps;
  const Tile& tile;
  SharedStorage<C>& shared;
  Walk walk;
  Ring<kStages> ring;
  Ring<kGroups> groups;

  // Of 16 blocks of keys, but not past those of the slot.
  DEVICE void load_group(int row) {
    auto& group = shared.group[groups.at];
    Mbarrier& full = shared.group_full[groups.at];
    const int lane = static_cast<int>(lane_index());
    float scale = 0.0f;
    if (lane < kGroup && walk.j + lane < tile.blocks)
      scale = p.k_scale[int64_t{row + lane} * p.H_kv + tile.h_kv];
    shared.group_empty[groups.at].wait(groups.parity ^ 1);
    if (lane < kGroup) group.k_scale[lane] = scale;
    sync_warp();
    if (lane == 0) {
      if (p.smooth == Smooth::kBlock) {
        full.arrive_expect(sizeof group.mean);
#pragma unroll
        for (int i = 0; i < C::kD / 64; i++)
          tma_load(group.mean[i], maps.k_mean, full, {64 * i, tile.h_kv, row});
      } else {
        full.arrive();
      }
    }
    groups.advance();
  }

  // Of the next block of keys, if there is one.
  DEVICE void load() {
    if (!walk.more(p)) return;
    const int row = walk.scale_row(p, tile), entry = tile.b * p.slots + walk.slot;
    if (walk.j % kGroup == 0) load_group(row);
    auto& stage = shared.stage[ring.at];
    Mbarrier &k_full = shared.k_full[ring.at], &v_full = shared.v_full[ring.at];
    if (lane_index() == 0) {  // lanes that only wait might do so past the release that follows
      shared.empty[ring.at].wait(ring.parity ^ 1);
      k_full.arrive_expect(sizeof stage.k);
      tma_load(stage.k, maps.k, k_full, {0, tile.h_kv, walk.j * kKeys, entry});
      v_full.arrive_expect(sizeof stage.v.loaded + sizeof stage.v_scale);
      if constexpr (C::V::kTransposed) {
        tma_load(stage.v.loaded, maps.v, v_full, {0, tile.h_kv, walk.j * kKeys, entry});
      } else {
#pragma unroll
        for (int i = 0; i < C::kD / 64; i++)
          tma_load(stage.v.loaded[i], maps.v, v_full, {64 * i, tile.h_kv, walk.j * kKeys, entry});
      }
      tma_load(stage.v_scale, maps.v_scale, v_full, {0, tile.h_kv, row});
    }
    ring.advance();
    walk.advance(p, tile);
  }
};

template <class C>
DEVICE void produce(const AttentionParams& p, const Maps& maps, SharedStorage<C>& shared) {
  const Tile tile(p);
  const int warp = static_cast<int>(warp_index()), lane = static_cast<int>(lane_index());
  Loader<C> loader{p, maps, tile, shared, Walk(p, tile), {}, {}};
  if constexpr (!C::V::kTransposed) {
    if (warp == 0)
      while (loader.walk.more(p)) loader.load();
  } else {
    for (int s = 0; s < kStages; s++) C::V::write_ones(shared.stage[s].v, threadIdx.x);
    Ring<kStages> ring;  // the first loads come without a transposition
#pragma unroll 1
    for (int step = -kAhead, steps = count_steps(p, tile); step < steps; step++) {
      if (warp == 0) loader.load();
      if (step < 0) continue;
      // The stage was empty when its values were loaded, and so were its transposed ones
      shared.v_full[ring.at].wait(ring.parity);
      sync_warp();
      C::V::transpose(shared.stage[ring.at].v, warp, lane);
      fence_async_proxy();
      sync_warp();
      if (lane == 0) shared.turned[ring.at].arrive();
      ring.advance();
    }
  }
}

// --- Queries -------------------------------------------------------------------------------------

// 16 queries of a warp, from `row` on, as the current entry of the table sees them.
template <class C>
struct Query {
  int row, offset = -1;
  uint32_t codes[C::kD / 32][4];  // A operands
  float scale;                    // log2 units of a score per unit of q_code.k_code k_scale
  float group_scale;              // the same with k_scale, of block lane % 16 of the group
  Ring<kGroups> groups;

  DEVICE static int warp() { return static_cast<int>(warp_index()) - 4; }
  DEVICE void load(const AttentionParams& p, const Tile& tile, SharedStorage<C>& shared) {
    const int lane = static_cast<int>(lane_index()), t = lane % 4;
    const int64_t batch = int64_t{offset} * p.B + tile.b, stride = int64_t{p.H} * C::kD;
    const int8_t* from = p.q_code + (batch * p.L + row) * stride + tile.h * C::kD + 4 * t;
#pragma unroll
    for (int k = 0; k < C::kD / 32; k++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int r = lane / 4 + e % 2 * 8, byte = k * 32 + e / 2 * 16;
        codes[k][e] =
            row + r < p.L ? *reinterpret_cast<const uint32_t*>(from + r * stride + byte) : 0u;
      }
    const int blocks = ceil_div(p.L, kKeys), block = min(row / kKeys, blocks - 1);
    scale = p.sm_scale * kLog2E * p.q_scale[(batch * blocks + block) * p.H + tile.h];
    if (p.smooth != Smooth::kBlock) return;

    // 16 bits, for the means: only this warp reads them, and has done so with those before
    constexpr int kChunks = C::kD / 8;
    const uint16_t* q = static_cast<const uint16_t*>(p.q) + offset * p.stride_qo +
                        tile.b * p.stride_qb + tile.h * p.stride_qh;
#pragma unroll
    for (int i = 0; i < 16 * kChunks; i += 32) {
      const int r = (i + lane) / kChunks, chunk = (i + lane) % kChunks;
      const bool inside = row + r < p.L;
      cp_async(shared_address(shared.q[warp()][chunk / 8]) + Swizzle<128>::chunk(r, chunk % 8),
               inside ? q + (row + r) * p.stride_ql + chunk * 8 : q, inside);
    }
    cp_async_commit();
    cp_async_wait<0>();
    sync_warp();
  }

  // What the next 16 blocks of keys need: their scales in a register, q.mu in shared memory.
  DEVICE void begin_group(const AttentionParams& p, SharedStorage<C>& shared) {
    const int lane = static_cast<int>(lane_index());
    const auto& group = shared.group[groups.at];
    shared.group_full[groups.at].wait(groups.parity);
    group_scale = scale * group.k_scale[lane % kGroup];
    if (p.smooth == Smooth::kBlock) {
      float d[2][4] = {};  // (rows, blocks by 8)
#pragma unroll
      for (int k = 0; k < C::kD / 16; k++) {
        uint32_t a[4], b[4];
        const uint32_t q = shared_address(shared.q[warp()][k / 4]);
        const uint32_t mean = shared_address(group.mean[k / 4]);
        ldmatrix_x4(a, q + Swizzle<128>::chunk(lane % 16, k % 4 * 2 + lane / 16));
        ldmatrix_x4(b,
                    mean + Swizzle<128>::chunk(lane / 16 * 8 + lane % 8, k % 4 * 2 + lane / 8 % 2));
#pragma unroll
        for (int n = 0; n < 2; n++)
          if (p.q_dtype == Dtype::kBfloat16)
            mma_bf16(d[n], a, b[2 * n], b[2 * n + 1]);
          else
            mma_f16(d[n], a, b[2 * n], b[2 * n + 1]);
      }
      sync_warp();  // the group before has been read
#pragma unroll
      for (int n = 0; n < 2; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          shared.shift[warp()][8 * n + lane % 4 * 2 + e % 2][lane / 4 + e / 2 * 8] =
              p.sm_scale * kLog2E * d[n][e];
    }
    sync_warp();
    if (lane == 0) shared.group_empty[groups.at].arrive();
    groups.advance();
  }

  // Before the scores of another block of keys.
  DEVICE void meet(const AttentionParams& p, const Tile& tile, const Walk& walk,
                   SharedStorage<C>& shared) {
    if (walk.j % kGroup) return;
    const int wanted = p.offset_index ? static_cast<int>(p.offset_index[walk.t]) : 0;
    if (wanted != offset) {
      offset = wanted;
      load(p, tile, shared);
    }
    begin_group(p, shared);
  }
};

// --- Scores and probabilities --------------------------------------------------------------------

// x = 12582912 + q.k as the bits of floats, 16 queries of each warp by 64 keys; issued.
template <class C>
DEVICE void multiply_keys(int32_t (&x)[8][4], const Query<C>& query, const uint8_t* keys) {
  const uint64_t first = wgmma_descriptor<C::kD>(shared_address(keys));
#pragma unroll
  for (int k = 0; k < C::kD; k += 32)
    Wgmma<int8_t, kKeys>::rs(reinterpret_cast<int32_t (&)[32]>(x), query.codes[k / 32],
                             wgmma_later(first, k));
}

// Scores to probabilities.  What was summed before counts `past` times; returns whether that is 1.
template <class C>
DEVICE bool weigh(typename C::V::Probabilities& probability, int32_t (&x)[8][4], float (&past)[2],
                  SoftmaxRows& rows, const AttentionParams& p, const Tile& tile, const Walk& walk,
                  const Query<C>& query, const SharedStorage<C>& shared) {
  const int lane = static_cast<int>(lane_index()), block = walk.j % kGroup;
  float scale = shuffle(query.group_scale, block), bias[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    bias[r] = 0.0f;
    if (p.smooth == Smooth::kBlock) bias[r] = shared.shift[query.warp()][block][lane / 4 + 8 * r];
  }
  take_scores(x, scale, bias);
  if (walk.j >= tile.free) mask_scores(x, scale, bias, p, query.row, walk.j * kKeys);
  const bool same = rows.raise(x, scale, bias, past);
  C::V::exponentiate(probability, rows, x, scale, bias, past);
  return same;
}

// --- Consumers -----------------------------------------------------------------------------------

// Consumer `group`, 0 or 1, waits for the other before it issues products.
struct Turn {
  int group;
  DEVICE void begin() const {
    if (group == 1) named_barrier_arrive(1, 256);
  }
  DEVICE void take() const { named_barrier_sync(1 + group, 256); }
  DEVICE void pass(bool last) const {
    if (group == 0 || !last) named_barrier_arrive(2 - group, 256);
  }
};

template <class C>
DEVICE void consume(const AttentionParams& p, SharedStorage<C>& shared) {
  const Tile tile(p);
  const int lane = static_cast<int>(lane_index());
  const Turn turn{static_cast<int>(threadIdx.x) / 128 - 1};
  Query<C> query;
  query.row = tile.first + 16 * query.warp();
  Walk walk(p, tile);
  Ring<kStages> ring;
  SoftmaxRows rows;
  rows.reset();
  float out[C::kD / 2] = {}, past[2];
  const int steps = count_steps(p, tile);
  auto* ready = C::V::kTransposed ? shared.turned : shared.v_full;

  if (steps > 0) {
    // The first scores
    int32_t x[8][4];
    float sums[C::V::kSums];
    typename C::V::Probabilities probability;
    turn.begin();
    query.meet(p, tile, walk, shared);
    preset(x);
    shared.k_full[0].wait(0);
    wgmma_fence();
    multiply_keys<C>(x, query, shared.stage[0].k);
    wgmma_commit();
    wgmma_wait<0>();
    tie(x);

    for (int step = 1; step < steps; step++) {
      const bool same = weigh<C>(probability, x, past, rows, p, tile, walk, query, shared);
      walk.advance(p, tile);
      query.meet(p, tile, walk, shared);

      // Products of this block's values and of the next one's keys
      auto& stage = shared.stage[ring.at];
      Mbarrier& empty = shared.empty[ring.at];
      ready[ring.at].wait(ring.parity);
      ring.advance();
      shared.k_full[ring.at].wait(ring.parity);
      preset(x);
      turn.take();
      wgmma_fence();
      C::V::multiply(sums, probability, stage.v);
      wgmma_commit();
      multiply_keys<C>(x, query, shared.stage[ring.at].k);
      wgmma_commit();
      turn.pass(false);

      // The second level, while scores are on their way
      wgmma_wait<1>();
      tie_registers(sums);
      add_products<typename C::V>(out, rows, sums, same, past, stage.v_scale);
      tie_registers(out);  // here, not behind the wait for scores

      // Release, a lane per warp
      sync_warp();  // all lanes have read their scales
      if (lane == 0) empty.arrive();
      wgmma_wait<0>();
      tie(x);
    }

    // The last values
    const bool same = weigh<C>(probability, x, past, rows, p, tile, walk, query, shared);
    ready[ring.at].wait(ring.parity);
    turn.take();
    wgmma_fence();
    C::V::multiply(sums, probability, shared.stage[ring.at].v);
    wgmma_commit();
    turn.pass(true);
    wgmma_wait<0>();
    tie_registers(sums);
    add_products<typename C::V>(out, rows, sums, same, past, shared.stage[ring.at].v_scale);
  }
  finish<typename C::V>(p, tile, rows, out, query.row);
}

// --- Kernel --------------------------------------------------------------------------------------

template <class C>
__global__ void __launch_bounds__(kThreads, 1)
    attention_kernel(const AttentionParams p, const __grid_constant__ Maps maps) {
  auto& shared = shared_storage<SharedStorage<C>>();

  // Barriers, by one thread
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; s++) {
      shared.k_full[s].init(1);
      shared.v_full[s].init(1);
      shared.turned[s].init(4);
      shared.empty[s].init(8);
    }
    for (int s = 0; s < kGroups; s++) {
      shared.group_full[s].init(1);
      shared.group_empty[s].init(8);
    }
    fence_mbarrier_init();
  }
  sync_block();

  // Registers: 128 * 40 + 256 * 232 of 65536
  if (threadIdx.x < 128) {
    decrease_registers<40>();
    produce<C>(p, maps, shared);
  } else {
    increase_registers<232>();
    consume<C>(p, shared);
  }
}

// --- Launch --------------------------------------------------------------------------------------

// [B, slots, N, H_kv, D] as four dimensions, in boxes of 64 keys of one head.
inline cudaError_t map_cache(TensorMap& map, const AttentionParams& p, const void* base, int size,
                             int64_t stride_b, int64_t stride_s, int64_t stride_n,
                             int64_t stride_h) {
  const auto bytes = [&](int count, int64_t stride) {  // dimensions of size 1 may have any
    return static_cast<uint64_t>(count == 1 ? p.D : stride) * size;
  };
  const uint64_t D = p.D, H = p.H_kv, N = p.N, entries = static_cast<uint64_t>(p.B) * p.slots;
  const uint32_t channels = size == 1 ? p.D : 64;
  const TensorShape<4> shape{{D, H, N, entries},
                             {bytes(p.H_kv, stride_h), bytes(p.N, stride_n),
                              bytes(p.B * p.slots, p.slots == 1 ? stride_b : stride_s)},
                             {channels, 1, kKeys, 1}};
  return make_tensor_map(map, base, size, shape, channels * size);
}

template <class C>
cudaError_t launch_attention(const AttentionParams& p, cudaStream_t stream) {
  Maps maps{};
  if (p.N > 0 && p.T > 0 && p.slots > 0) {
    const uint64_t D = p.D, H = p.H_kv;
    const uint64_t rows = static_cast<uint64_t>(p.B) * p.slots * ceil_div(p.N, kKeys);
    const TensorShape<3> v_scale{
        {D, H, rows}, {D * 4, D * H * 4}, {static_cast<uint32_t>(p.D), 1, 1}};
    const TensorShape<3> k_mean{{D, H, rows}, {D * 2, D * H * 2}, {64, 1, kGroup}};
    cudaError_t error =
        map_cache(maps.k, p, p.k, 1, p.stride_kb, p.stride_ks, p.stride_kn, p.stride_kh);
    if (error == cudaSuccess)
      error =
          map_cache(maps.v, p, p.v, C::kSize, p.stride_vb, p.stride_vs, p.stride_vn, p.stride_vh);
    if (error == cudaSuccess) error = make_tensor_map(maps.v_scale, p.v_scale, 4, v_scale, 0);
    if (error == cudaSuccess && p.smooth == Smooth::kBlock)
      error = make_tensor_map(maps.k_mean, p.k_mean, 2, k_mean, 128);
    if (error != cudaSuccess) return error;
  }
  const dim3 grid(ceil_div(p.L, kQueries) * p.H * p.B);
  return launch(attention_kernel<C>, {grid, kThreads, sizeof(SharedStorage<C>)}, stream, p, maps);
}

template <class T>
cudaError_t launch_type(const AttentionParams& p, cudaStream_t stream) {
  if (p.D == 64) return launch_attention<Config<T, 64>>(p, stream);
  return launch_attention<Config<T, 128>>(p, stream);
}

}  // namespace attend_sm90

// Whether attention_sm90 takes it; attention_sm80 takes the rest.
bool attention_sm90_serves(const AttentionParams& p) {
  const auto strides_fit = [&](int64_t b, int64_t s, int64_t n, int64_t h) {
    const bool one = p.B == 1 || p.slots == 1 || b == s * p.slots;  // dimension
    const bool apart = (p.N == 1 || n > 0) && (p.H_kv == 1 || h > 0) && (p.slots == 1 || s > 0) &&
                       (p.B == 1 || b > 0);
    return one && apart;
  };
  const bool sixteen = p.q_dtype == Dtype::kBfloat16 || p.q_dtype == Dtype::kFloat16;
  const bool aligned =
      (reinterpret_cast<uintptr_t>(p.q) | reinterpret_cast<uintptr_t>(p.k_mean)) % 16 == 0 &&
      (p.stride_qo | p.stride_qb | p.stride_ql | p.stride_qh) % 8 == 0;
  const bool means =
      p.smooth != Smooth::kBlock || (sixteen && p.q_dtype == p.mean_dtype && aligned);
  return (p.D == 64 || p.D == 128) && p.D == p.E && !p.mask && means &&
         (p.v_dtype == Dtype::kFloat16 || p.v_dtype == Dtype::kE4m3) &&
         strides_fit(p.stride_kb, p.stride_ks, p.stride_kn, p.stride_kh) &&
         strides_fit(p.stride_vb, p.stride_vs, p.stride_vn, p.stride_vh);
}

cudaError_t attention_sm90(const AttentionParams& p, cudaStream_t stream) {
  if (p.B == 0 || p.L == 0 || p.H == 0) return cudaSuccess;
  if (!attention_sm90_serves(p)) return cudaErrorInvalidValue;
  if (p.v_dtype == Dtype::kFloat16) return attend_sm90::launch_type<float16>(p, stream);
  return attend_sm90::launch_type<e4m3>(p, stream);
}

}  // namespace reeltime
