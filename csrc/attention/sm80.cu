// SPDX-License-Identifier: Apache-2.0
// attention on mma.sync: INT8 q.k, float16 p v (attention.h has the equations).
//
// A block of threads owns 128 queries of one head and walks that head's keys, 64 at a time, the
// keys that share scales: entry after entry of the table, of plain tensors the only one.  A warp
// owns 32 of the queries (16 where D > 128), so that what it reads of k and v serves as many.
//
//   q, k, v   codes in shared memory, by cp.async: v lands behind q.k and the softmax, the next k
//             behind p v; rows of 128 bytes, or panels of them, swizzled
//   x         16 x 64 int32 sums of a tile of 16 rows, then
//   p         float16, packed: accumulators are laid out as A operands
//   part      p v of these keys and eight channels, whose scale takes it, in one FFMA, to
//   acc       16 x D float32, the second level: 128 registers where D = 128
//   shift     q.mu of 16 blocks of keys at a time, in shared memory (rows.h)
//
// e4m3 values become float16 on the way to the registers: ldmatrix hands out pairs of channels,
// which two shifts and masks make operands of even and of odd channels.  Products of e4m3 would be
// no faster than those of float16 unless both are summed in float16, which codes up to 448
// overflow.
//
// Floor: 2 B H S_q S_kv D operations over the int8 rate plus as many over the float16 rate.  Per
// 128 queries, 64 keys and 128 channels on sm_80: 512 + 1024 clocks of products.  Beside them, in
// clocks of other pipes: shared memory 4 warps x (4 + 8 + 16) KiB read and 24 KiB written at 128
// bytes, 1088; exp2 8192 at 16, 512, which is why no share of it goes to the FMA pipe; other
// arithmetic, 4 per score and 1 per element of acc, at 128, 384.  On sm_86, sm_89 and sm_120
// products take 1024 + 2048 clocks, and would take 1024 + 4096 if part were float.  Two blocks of
// threads per SM hide each other's softmax and waiting; 100 KiB of shared memory hold both.
//
// Keys are not split between blocks of threads: at 128 queries a block, video fills a GPU.  Which
// keys come next is known to Walk alone; a list of blocks per 128 queries would take its place.
//
// Source: FlashAttention-2 (arXiv 2307.08691); SageAttention 2 (arXiv 2411.10958).
#include "attention/attention.h"
#include "attention/encode.h"
#include "attention/rows.h"
#include "attention/sm80_tiles.h"
#include "attention/softmax.h"
#include "common/barrier.h"
#include "common/cp_async.h"
#include "common/launch.h"

namespace reeltime {
namespace attend_sm80 {

constexpr int kGroup = 16;  // blocks of keys whose q.mu is one product

// kD: channels of q, k and v, filled up with zeros.  V: float16 or e4m3.
template <int kD_, class V_>
struct Config {
  using V = V_;
  static constexpr int kD = kD_;
  static constexpr int kTiles = kD <= 128 ? 2 : 1;  // of 16 rows, per warp: acc takes kD / 2 each
  static constexpr int kWarps = kBlockM / (16 * kTiles);
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlocks = kD <= 128 ? 2 : 1;  // per SM, by registers
  static constexpr int kOperands = 2 / sizeof(V);    // of eight channels, in 16 bytes of v
  static constexpr bool kHalfSums = kFastHalfSums;   // part: 64 keys of p <= 1, |v| < 2
  static_assert(kD == 64 || kD == 128 || kD == 256, "whole panels of 128 bytes, or half of one");
};

template <class C>
struct SharedStorage {
  static constexpr int kPitch = C::kD + 8;  // eight rows of four lanes: all banks
  struct alignas(1024) Operands {           // the swizzle's period
    uint8_t q[kBlockM * C::kD];
    uint8_t k[kBlockN * C::kD];
    uint8_t v[kBlockN * C::kD * sizeof(typename C::V)];
  };
  union {
    Operands codes;
    float staged[C::kWarps][8 * kPitch];  // rows of the result, after the last keys
  };
  float v_scale[C::kD];
  float shift[C::kWarps][kGroup][16 * C::kTiles];
};
static_assert(2 * (sizeof(SharedStorage<Config<128, float16>>) + 1024) <= 100 * 1024, "");
static_assert(sizeof(SharedStorage<Config<256, float16>>) <= 99 * 1024, "sm_86, sm_89, sm_120");

// --- Which keys ----------------------------------------------------------------------------------

// Block j of the keys of entry t of the table: where they are, and the row of their scales.
struct Walk {
  int t, j, blocks;
  int scales;  // row of k_scale; times D or E, of k_mean and v_scale
  const int8_t* k;
  const uint8_t* v;

  // From entry t on, the first that is present.
  DEVICE void find(const AttentionParams& p, int h_kv) {
    for (; t < p.T; t++) {
      const int64_t slot = p.table ? p.table[t] : 0, b = blockIdx.z;
      if (slot < 0 || slot >= p.slots) continue;
      j = 0;
      scales = static_cast<int>((b * p.slots + slot) * ceil_div(p.N, kBlockN) * p.H_kv + h_kv);
      k = p.k + b * p.stride_kb + slot * p.stride_ks + h_kv * p.stride_kh;
      v = static_cast<const uint8_t*>(p.v) +
          (b * p.stride_vb + slot * p.stride_vs + h_kv * p.stride_vh) * size_of(p.v_dtype);
      return;
    }
  }
  DEVICE void advance(const AttentionParams& p, int h_kv) {
    if (++j < blocks) {
      scales += p.H_kv;
      k += kBlockN * p.stride_kn;
      v += kBlockN * p.stride_vn * size_of(p.v_dtype);
    } else {
      t++;
      find(p, h_kv);
    }
  }
};

// --- Global memory to shared memory --------------------------------------------------------------

template <class C>
DEVICE void fetch_keys(SharedStorage<C>& shared, const AttentionParams& p, const Walk& walk) {
  copy_tile<TileK<C>, C::kThreads>(shared_address(shared.codes.k), walk.k, p.stride_kn,
                                   p.N - walk.j * kBlockN, p.D);
}

template <class C>
DEVICE void fetch_values(SharedStorage<C>& shared, const AttentionParams& p, const Walk& walk) {
  constexpr int kSize = sizeof(typename C::V);
  copy_tile<TileV<C>, C::kThreads>(shared_address(shared.codes.v), walk.v, p.stride_vn * kSize,
                                   p.N - walk.j * kBlockN, p.E * kSize);
  const int channel = 4 * opaque(static_cast<int>(threadIdx.x));
  if (channel < C::kD)
    cp_async(shared_address(&shared.v_scale[channel]),
             p.v_scale + int64_t{walk.scales} * p.E + channel, channel < p.E);
}

// This warp's queries as an entry of the table sees them; their scale, which is one: they are of
// one block of 64.  Those before were read ahead of a barrier.
template <class C>
DEVICE float fetch_query(SharedStorage<C>& shared, const AttentionParams& p, int64_t offset,
                         int row) {
  using T = TileQ<C>;
  const int64_t batch = offset * p.B + blockIdx.z, stride = int64_t{p.H} * p.D;
  const int h = static_cast<int>(blockIdx.y), first = row % kBlockM;
  const int8_t* from = p.q_code + (batch * p.L + row) * stride + h * p.D;
#pragma unroll 1
  for (int i = static_cast<int>(lane_index()); i < 16 * C::kTiles * T::kChunks; i += 32) {
    const int r = i / T::kChunks, chunk = i % T::kChunks;
    const bool valid = row + r < p.L && chunk * 16 < p.D;
    cp_async(shared_address(shared.codes.q) + T::place(first + r, chunk),
             valid ? from + r * stride + chunk * 16 : from, valid);
  }
  cp_async_commit();
  cp_async_wait<0>();
  sync_warp();
  return p.q_scale[(batch * ceil_div(p.L, kScaleRows) + row / kScaleRows) * p.H + h];
}

// --- Scores --------------------------------------------------------------------------------------

// Queries from `row` on.
DEVICE Rows query_rows(const AttentionParams& p, int64_t offset, int row) {
  const int64_t at = offset * p.stride_qo + blockIdx.z * p.stride_qb + row * p.stride_ql +
                     blockIdx.y * p.stride_qh;
  return make_rows(p.q, at, p.stride_ql, p.L - row, p.D, p.q_dtype);
}

// q.mu of the next 16 blocks of keys, in log2 units, by block and query.
template <class C>
DEVICE void correct(SharedStorage<C>& shared, const Rows& q, const Rows& mu, float scale) {
  const int group = static_cast<int>(lane_index()) / 4, t = static_cast<int>(lane_index()) % 4;
  auto& shift = shared.shift[warp_index()];
#pragma unroll 1
  for (int tile = 0; tile < 2 * C::kTiles; tile++) {
    const int row = tile / 2 * 16, column = tile % 2 * 8;
    float d[4];
    if (column >= mu.count) continue;
    multiply_means(d, q, mu, row, column);
#pragma unroll
    for (int e = 0; e < 4; e++)
      shift[column + 2 * t + e % 2][row + group + e / 2 * 8] = scale * d[e];
  }
  sync_warp();
}

// --- The result ----------------------------------------------------------------------------------

// Eight rows of acc through shared memory, so that lanes store 16 bytes of a row.
template <class C>
DEVICE void store_rows(const float (&acc)[C::kD / 8][4], int half, float factor, float* staged,
                       const AttentionParams& p, int64_t b, int h, int row) {
  constexpr int kPitch = SharedStorage<C>::kPitch, kPieces = C::kD / 8;
  const int lane = static_cast<int>(lane_index());
  sync_warp();  // the rows before have been read
#pragma unroll
  for (int n = 0; n < C::kD / 8; n++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const float y = acc[n][2 * half + e] * factor;
      // A row that saw nothing is zero, whatever the values held
      staged[lane / 4 * kPitch + n / C::kOperands * C::kOperands * 8 +
             channel_of<C>(n % C::kOperands, e)] = factor == 0.0f ? 0.0f : y;
    }
  sync_warp();
#pragma unroll 1
  for (int i = 0; i < kPieces / 4; i++) {
    const int r = (i * 32 + lane) / kPieces, channel = (i * 32 + lane) % kPieces * 8;
    if (row + r >= p.L || channel >= p.E) continue;
    const float* x = staged + r * kPitch + channel;
    const int64_t at = ((b * p.L + row + r) * p.H + h) * p.E + channel;
    if (p.out_dtype == Dtype::kFloat32) {
      float* to = static_cast<float*>(p.out) + at;
      store_vector(to, Vector<float>{{x[0], x[1], x[2], x[3]}});
      store_vector(to + 4, Vector<float>{{x[4], x[5], x[6], x[7]}});
    } else {
      Vector<uint32_t> pairs;
#pragma unroll
      for (int e = 0; e < 8; e += 2)
        pairs.at[e / 2] = p.out_dtype == Dtype::kBfloat16 ? pack2<bfloat16>(x[e], x[e + 1])
                                                          : pack2<float16>(x[e], x[e + 1]);
      store_vector(reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(p.out) + at), pairs);
    }
  }
}

// --- The kernel ----------------------------------------------------------------------------------

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks)
    attention_kernel(const AttentionParams p) {
  constexpr int kTiles = C::kTiles;
  auto& shared = shared_storage<SharedStorage<C>>();
  const int lane = static_cast<int>(lane_index()), warp = static_cast<int>(warp_index());

  // Which queries: last ones first, causal rows are the longest there
  const int first_row = static_cast<int>(gridDim.x - 1 - blockIdx.x) * kBlockM;
  const int h = static_cast<int>(blockIdx.y), h_kv = h / (p.H / p.H_kv);
  const int64_t b = blockIdx.z;
  const int row = first_row + warp * 16 * kTiles;  // this warp's
  const float log2_scale = p.sm_scale * kLog2E;

  // Which keys
  Walk next{0, 0, ceil_div(p.N, kBlockN), 0, nullptr, nullptr};
  if (p.causal) {
    const int64_t seen = int64_t{first_row} + kBlockM + p.first_last;  // by the last query
    next.blocks = static_cast<int>(
        min(int64_t{next.blocks}, (max(seen, int64_t{0}) + kBlockN - 1) / kBlockN));
  }
  if (next.blocks == 0) next.t = p.T;
  next.find(p, h_kv);

  SoftmaxRows rows[kTiles];
#pragma unroll
  for (int i = 0; i < kTiles; i++) rows[i].reset();
  float acc[kTiles][C::kD / 8][4] = {};
  float q_scale = 0.0f, k_scale = 0.0f;
  int offset = -1;

  // First keys on their way
  if (next.t < p.T) {
    fetch_keys(shared, p, next);
    k_scale = p.k_scale[next.scales];
  }
  cp_async_commit();

  while (next.t < p.T) {
    // These keys have landed, of this thread's copies, of everyone's; and everyone has left v
    cp_async_wait<0>();
    sync_block();
    fetch_values(shared, p, next);
    cp_async_commit();

    const int first_key = next.j * kBlockN;
    const bool busy = row < p.L && !(p.causal && first_key >= row + 16 * kTiles + p.first_last);
    uint32_t probability[kTiles][4][4] = {};  // NOTE: or they would live on from keys to keys
    if (busy) {
      // The queries as this entry sees them, and what smoothing took from their scores
      if (next.j % kGroup == 0) {
        const int wanted = p.offset_index ? static_cast<int>(p.offset_index[next.t]) : 0;
        if (wanted != offset) q_scale = log2_scale * fetch_query(shared, p, wanted, row);
        offset = wanted;
        if (p.smooth == Smooth::kBlock)
          correct(shared, query_rows(p, offset, row),
                  make_rows(p.k_mean, int64_t{next.scales} * p.D, int64_t{p.H_kv} * p.D,
                            min(kGroup, next.blocks - next.j), p.D, p.mean_dtype),
                  log2_scale);
      }

      // Scores and probabilities
      const bool free = first_key + kBlockN <= p.N && !p.mask &&
                        (!p.causal || first_key + kBlockN <= row + p.first_last + 1);
      int32_t x[kTiles][8][4];
      multiply_keys<C>(x, shared_address(shared.codes.q), shared_address(shared.codes.k));
#pragma unroll
      for (int i = 0; i < kTiles; i++) {
        float scale = q_scale * k_scale, bias[2], past[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
          const float* shift = shared.shift[warp][next.j % kGroup];
          bias[r] = p.smooth == Smooth::kBlock ? shift[16 * i + 8 * r + lane / 4] : 0.0f;
        }
        take_scores(x[i], scale, bias);
        if (!free) mask_scores(x[i], scale, bias, p, row + 16 * i, first_key);
        if (!rows[i].raise(x[i], scale, bias, past)) {
#pragma unroll
          for (int n = 0; n < C::kD / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) acc[i][n][e] *= past[e / 2];
        }
        rows[i].exponentiate(probability[i], x[i], scale, bias, past);
      }
    }

    // The values have landed, and everyone has left k
    next.advance(p, h_kv);
    cp_async_wait<0>();
    sync_block();
    if (next.t < p.T) {
      fetch_keys(shared, p, next);
      k_scale = p.k_scale[next.scales];
    }
    cp_async_commit();
    if (busy) add_values<C>(acc, probability, shared_address(shared.codes.v), shared.v_scale, p.E);
  }

  // Normalise and store
  sync_block();  // v has been read
  if (row >= p.L) return;
  if (p.smooth == Smooth::kSequence && p.lse)
    correct(shared, query_rows(p, 0, row),
            make_rows(p.k_mean, (b * p.H_kv + h_kv) * p.D, 0, 1, p.D, p.mean_dtype), log2_scale);
#pragma unroll
  for (int i = 0; i < kTiles; i++) {
    rows[i].finish();
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const float total = rows[i].total[r];
      const int first = row + 16 * i + 8 * r, mine = first + lane / 4;
      const float factor = total == 0.0f ? 0.0f : (C::kOperands == 1 ? 1.0f : 256.0f) / total;
      store_rows<C>(acc[i], r, factor, shared.staged[warp], p, b, h, first);
      if (p.lse && lane % 4 == 0 && mine < p.L) {
        const float* shift = shared.shift[warp][0];
        const float more = p.smooth == Smooth::kSequence ? shift[16 * i + 8 * r + lane / 4] : 0.0f;
        p.lse[(b * p.H + h) * p.L + mine] =
            total == 0.0f ? kMinusInfinity : (rows[i].largest[r] + log2f(total) + more) * kLn2;
      }
    }
  }
}

// --- Launchers -----------------------------------------------------------------------------------

template <class C>
inline cudaError_t launch_attention(const AttentionParams& p, cudaStream_t stream) {
  const dim3 grid(ceil_div(p.L, kBlockM), p.H, p.B);
  return launch(attention_kernel<C>, {grid, C::kThreads, sizeof(SharedStorage<C>)}, stream, p);
}

template <class V>
inline cudaError_t attend(const AttentionParams& p, cudaStream_t stream) {
  const int channels = max(p.D, p.E);
  if (channels <= 64) return launch_attention<Config<64, V>>(p, stream);
  if (channels <= 128) return launch_attention<Config<128, V>>(p, stream);
  return launch_attention<Config<256, V>>(p, stream);
}

inline bool serves(int D, int E) {
  return D % 16 == 0 && E % 16 == 0 && D > 0 && E > 0 && D <= 256 && E <= 256;
}

}  // namespace attend_sm80

cudaError_t encode_qkv_sm80(const EncodeQkvParams& p, cudaStream_t stream) {
  const int E = p.v_code ? p.E : p.D;
  const bool known = p.v_dtype == Dtype::kFloat16 || p.v_dtype == Dtype::kE4m3 || !p.v_code;
  if (!attend_sm80::serves(p.D, E) || !known || size_of(p.x_dtype) == 1)
    return cudaErrorInvalidValue;
  const int channels = max(p.D, E);
  if (channels <= 64) return attend_sm80::launch_encode<8>(p, stream);
  if (channels <= 128) return attend_sm80::launch_encode<16>(p, stream);
  return attend_sm80::launch_encode<32>(p, stream);
}

cudaError_t attention_sm80(const AttentionParams& p, cudaStream_t stream) {
  if (!attend_sm80::serves(p.D, p.E)) return cudaErrorInvalidValue;
  if (p.B == 0 || p.L == 0 || p.H == 0) return cudaSuccess;
  if (p.v_dtype == Dtype::kFloat16) return attend_sm80::attend<float16>(p, stream);
  if (p.v_dtype == Dtype::kE4m3) return attend_sm80::attend<e4m3>(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace reeltime
