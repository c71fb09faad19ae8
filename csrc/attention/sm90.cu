// SPDX-License-Identifier: Apache-2.0
// attention on Hopper: wgmma fed by TMA, by warpgroups that take turns (attention.h says what).
//
// A block owns 128 queries of one head and walks that head's keys, 64 at a time, the keys that
// share scales: entry after entry of the table, of plain tensors the only one; all of them, a
// share, or those of a list.
//
//   producer    warpgroup 0: loads by one warp, as far ahead as the ring allows; values of e4m3 it
//               also transposes (sm90_producer.h, sm90_values.h)
//   consumers   warpgroups 1 and 2, 64 queries each: scores, softmax, products with values
//
//   k_full[s], v_full[s]    keys, values and their scales have landed, and which block they are
//   turned[s]               values are transposed; of float16 nobody asks
//   empty[s]                both consumers are done with the stage
//   group_full, group_empty the same of what 16 blocks of keys need: scales of keys, and mean keys,
//                           for q.mu is one product of mma.sync ahead of their walk
//
// Only the producer knows the order: consumers take what comes until a stage says that it was all.
//
// While one consumer turns scores into probabilities the tensor cores work for the other: they wait
// for each other in front of their products, those of a block's probabilities with values and, for
// the next softmax, of q with the next block's keys.  Registers of a thread, D = 128:
//
//   x      32   scores: floats, or 12582912 + q_code.k_code read as such (softmax.h)
//   q      16   codes of the queries: A operands from registers leave shared memory to B
//   p      8    probabilities, of float16 16
//   sums   68   probabilities times values of one block of keys, of float16 64
//   out    64   += v_scale * sums, the second level: tensor cores keep few bits of e4m3 sums
//
// Floor: 2 B H S_q S_kv D operations over the 8-bit rate plus as many over that of the values.  Per
// 64 queries and keys, D = 128, in clocks of an SM: products 128 + 136 (of float16 128 + 256), exp2
// 256, and a warp issues some 310 instructions (values of float16 50 more, keys of e4m3 20 fewer).
// A consumer's products hide under the other's softmax, and instructions are what is short: hence
// no polynomial for a share of exp2, int32 to float by where sums begin, maxima of integers three
// at a time, sums of probabilities by tensor cores.
//
// pv_skip is left unused: a product is of four warps, which would have to agree, by a barrier more
// per block.  It would spare values of e4m3 little: 136 clocks that are hidden, and a quarter of
// the instructions, the second level, but not the sums of probabilities, which come from that
// product. Those of float16 would gain where most blocks are skipped: two consumers' products take
// 768 clocks, more than their instructions.
//
// Source: FlashAttention-3 (arXiv 2407.08608); SageAttention 2 (arXiv 2411.10958).
#include "attention/attention.h"
#include "attention/sm90_producer.h"
#include "attention/sm90_tile.h"
#include "attention/sm90_values.h"
#include "common/cp_async.h"
#include "common/launch.h"

namespace reeltime {
namespace attend_sm90 {

constexpr int kThreads = 384;  // three warpgroups

// --- Queries -------------------------------------------------------------------------------------

// 16 queries of a warp, from `row` on, as the current group of blocks sees them.
template <class C>
struct Query {
  int row, offset = 0;
  uint32_t codes[C::kD / 32][4];  // A operands
  float scale;                    // log2 units of a score per unit of q_code.k_code k_scale
  float group_scale;              // the same with k_scale, of block lane % 16 of the group
  int shift;                      // where q.mu of this lane's rows is
  Ring<kGroups> groups;

  DEVICE static int warp() { return static_cast<int>(warp_index()) - 4; }
  DEVICE void load(const AttentionParams& p, const Tile& tile, SharedStorage<C>& shared) {
    const int lane = static_cast<int>(lane_index()), t = lane % 4;
    const int64_t batch = int64_t{offset} * p.B + tile.b, stride = int64_t{p.H} * C::kD;
    const uint8_t* from = static_cast<const uint8_t*>(p.q_code) + (batch * p.L + row) * stride +
                          tile.h * C::kD + 4 * t;
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

  // What the next group needs: scales of keys in a register, q.mu in shared memory.
  DEVICE void begin_group(const AttentionParams& p, const Tile& tile, SharedStorage<C>& shared) {
    const int lane = static_cast<int>(lane_index());
    const auto& group = shared.group[groups.at];
    shared.group_full[groups.at].wait(groups.parity);
    if (group.offset != offset) {
      offset = group.offset;
      load(p, tile, shared);
    }
    group_scale = scale * group.k_scale[lane % kGroup];
    float d[2][4] = {};  // (rows, blocks by 8)
    if (p.smooth == Smooth::kBlock) {
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
    }
    sync_warp();  // the group before has been read
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        shared.shift[warp()][8 * n + lane % 4 * 2 + e % 2][lane / 4 + e / 2 * 8] =
            p.sm_scale * kLog2E * d[n][e];
    sync_warp();
    if (lane == 0) shared.group_empty[groups.at].arrive();
    groups.advance();
  }
};

// --- Scores and probabilities --------------------------------------------------------------------

// x = q.k, of int8 12582912 more, read as floats; issued.
template <class C>
DEVICE void multiply_keys(typename C::Sum (&x)[32], const Query<C>& query, const uint8_t* keys) {
  const uint64_t first = wgmma_descriptor<C::kD>(shared_address(keys));
#pragma unroll
  for (int k = 0; k < C::kD; k += 32)
    Wgmma<typename C::Key, kKeys>::rs(x, query.codes[k / 32], wgmma_later(first, k),
                                      C::K::kPreset || k > 0);
}

// Scores to probabilities.  What was summed before counts `past` times; returns whether that is 1.
template <class C>
DEVICE bool weigh(typename C::V::Probabilities& probability, const typename C::Sum (&x)[32],
                  float (&past)[2], SoftmaxRows& rows, const AttentionParams& p, const Tile& tile,
                  unsigned block, const Query<C>& query, const SharedStorage<C>& shared) {
  const int place = block % kGroup, j = block / kGroup;
  float scale = shuffle(query.group_scale, place);
  const float* shift = &shared.shift[0][0][0] + query.shift + place * shared.kPitch;
  float bias[2] = {shift[0], shift[8]}, tops[2];
  int32_t y[8][4];
  C::K::take(y, tops, x, scale, bias);
  if (j >= tile.free) mask_scores(y, tops, scale, bias, p, query.row, j * kKeys);
  const bool same = rows.raise(tops, scale, bias, past);
  C::V::exponentiate(probability, rows, y, scale, bias, past);
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
  query.shift = opaque(query.warp() * kGroup * shared.kPitch + lane / 4);  // or made for each block
  query.load(p, tile, shared);  // as most groups see them, while the first is on its way
  Ring<kStages> ring;
  SoftmaxRows rows;
  rows.reset();
  float out[C::kD / 2] = {}, past[2];
  auto* ready = C::V::kTransposed ? shared.turned : shared.v_full;

  shared.k_full[0].wait(0);
  int block = shared.stage[0].block;
  if (block >= 0) {
    // The first scores
    typename C::Sum x[32];
    float sums[C::V::kSums];
    typename C::V::Probabilities probability;
    bool same;
    turn.begin();
    query.begin_group(p, tile, shared);
    C::K::preset(x);
    wgmma_fence();
    multiply_keys<C>(x, query, shared.stage[0].k);
    wgmma_commit();
    wgmma_wait<0>();
    tie_registers(x);

    while (true) {
      same = weigh<C>(probability, x, past, rows, p, tile, block, query, shared);
      auto& stage = shared.stage[ring.at];
      Mbarrier& empty = shared.empty[ring.at];
      Ring<kStages> next = ring;
      next.advance();
      shared.k_full[next.at].wait(next.parity);
      block = shared.stage[next.at].block;
      ready[ring.at].wait(ring.parity);
      C::K::preset(x);
      if (block < 0) break;
      if (block % kGroup == 0) query.begin_group(p, tile, shared);
      ring = next;

      // Products of this block's values and of the next one's keys
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
      tie_registers(x);
    }

    // The last values
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

  // Registers: 128 * 56 + 256 * 224 of 65536
  if (threadIdx.x < 128) {
    decrease_registers<56>();
    produce<C>(p, maps, shared);
  } else {
    increase_registers<224>();
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
    cudaError_t error =
        map_cache(maps.k, p, p.k, 1, p.stride_kb, p.stride_ks, p.stride_kn, p.stride_kh);
    if (error == cudaSuccess)
      error =
          map_cache(maps.v, p, p.v, C::kSize, p.stride_vb, p.stride_vs, p.stride_vn, p.stride_vh);
    if (error == cudaSuccess) error = make_tensor_map(maps.v_scale, p.v_scale, 4, v_scale, 0);
    if (error != cudaSuccess) return error;
  }
  const dim3 grid(ceil_div(p.L, kQueries) * p.H * p.B, p.splits);
  return launch(attention_kernel<C>, {grid, kThreads, sizeof(SharedStorage<C>)}, stream, p, maps);
}

template <class Key, class T>
cudaError_t launch_types(const AttentionParams& p, cudaStream_t stream) {
  if (p.D == 64) return launch_attention<Config<Key, T, 64>>(p, stream);
  return launch_attention<Config<Key, T, 128>>(p, stream);
}

template <class Key>
cudaError_t launch_keys(const AttentionParams& p, cudaStream_t stream) {
  if (p.v_dtype == Dtype::kFloat16) return launch_types<Key, float16>(p, stream);
  return launch_types<Key, e4m3>(p, stream);
}

}  // namespace attend_sm90

// Whether attention_sm90 takes it; attention_sm80 takes the rest.  What that has no products for,
// keys in e4m3, lacks_products of attention/cuda.py refuses by this rule before they are encoded.
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
  const bool whole = p.splits == 1 && reinterpret_cast<uintptr_t>(p.added) % 16 == 0;
  const bool part = p.splits > 1 && !p.list_bounds && !p.added && p.out_dtype == Dtype::kFloat32;
  return (p.D == 64 || p.D == 128) && p.D == p.E && !p.mask && means && (whole || part) &&
         !(p.list_bounds && p.causal) &&
         (p.qk_dtype == Dtype::kInt8 || p.qk_dtype == Dtype::kE4m3) &&
         (p.v_dtype == Dtype::kFloat16 || p.v_dtype == Dtype::kE4m3) &&
         strides_fit(p.stride_kb, p.stride_ks, p.stride_kn, p.stride_kh) &&
         strides_fit(p.stride_vb, p.stride_vs, p.stride_vn, p.stride_vh);
}

cudaError_t attention_sm90(const AttentionParams& p, cudaStream_t stream) {
  if (p.B == 0 || p.L == 0 || p.H == 0) return cudaSuccess;
  if (!attention_sm90_serves(p)) return cudaErrorInvalidValue;
  if (p.qk_dtype == Dtype::kInt8) return attend_sm90::launch_keys<int8_t>(p, stream);
  return attend_sm90::launch_keys<e4m3>(p, stream);
}

}  // namespace reeltime
