// SPDX-License-Identifier: Apache-2.0
// attention on mma.sync: INT8 or e4m3 q.k, float16 p v (attention.h has the equations).
//
// A block of threads owns 128 queries of one head and walks that head's keys, or a share of them,
// 64 at a time, the keys that share scales: entry after entry of the table, of plain tensors the
// only one, or what a list names (sm80_walk.h).  A warp owns 32 of the queries (16 where D > 128),
// so that what it reads of k and v serves as many.
//
//   q, k, v   codes in shared memory, by cp.async: v lands behind q.k and the softmax, the next k
//             behind p v; rows of 128 bytes, or panels of them, swizzled
//   x         16 x 64 sums of a tile of 16 rows, int32 or of e4m3 float, then
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
// q.k in e4m3, summed in float, takes twice as long as in INT8.  pv_skip is decided by a warp for
// its queries and saves the products of p v, not the reading of v, which is under way by then.
//
// Source: FlashAttention-2 (arXiv 2307.08691); SageAttention 2 (arXiv 2411.10958);
// SpargeAttention (arXiv 2502.18137).
#include "attention/attention.h"
#include "attention/combine.h"
#include "attention/encode.h"
#include "attention/rows.h"
#include "attention/sm80_tiles.h"
#include "attention/sm80_walk.h"
#include "attention/softmax.h"
#include "common/barrier.h"
#include "common/cp_async.h"
#include "common/launch.h"

namespace reeltime {
namespace attend_sm80 {

// kD: channels of q, k and v, filled up with zeros.  K_, of the codes of q and k: int8_t or e4m3.
// V: float16 or e4m3.
template <int kD_, class K_, class V_>
struct Config {
  using V = V_;
  static constexpr bool kInteger = std::is_same<K_, int8_t>::value;
  static constexpr bool kExists = kInteger || kHasMmaE4m3;
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
  Group group[C::kWarps];
  int h_kv;  // of this head
};
static_assert(2 * (sizeof(SharedStorage<Config<128, int8_t, float16>>) + 1024) <= 100 * 1024, "");
static_assert(sizeof(SharedStorage<Config<256, int8_t, float16>>) <= 99 * 1024, "sm_86 and sm_120");

// This warp's; where, is computed again each time, or it would wait in a register.
template <class T>
DEVICE T& own(T* of_warps) {
  return of_warps[opaque(static_cast<int>(threadIdx.x)) / 32];
}

// --- Global memory to shared memory --------------------------------------------------------------

template <class C>
DEVICE void fetch_keys(SharedStorage<C>& shared, const AttentionParams& p, const Walk& walk) {
  copy_tile<TileK<C>, C::kThreads>(shared_address(shared.codes.k), walk.keys(p, shared.h_kv),
                                   p.stride_kn, p.N - walk.j * kBlockN, p.D);
}

template <class C>
DEVICE void fetch_values(SharedStorage<C>& shared, const AttentionParams& p, const Walk& walk) {
  constexpr int kSize = sizeof(typename C::V);
  copy_tile<TileV<C>, C::kThreads>(shared_address(shared.codes.v), walk.values(p, shared.h_kv),
                                   p.stride_vn * kSize, p.N - walk.j * kBlockN, p.E * kSize);
  const int channel = 4 * opaque(static_cast<int>(threadIdx.x));
  if (channel < C::kD)
    cp_async(shared_address(&shared.v_scale[channel]),
             p.v_scale + int64_t{walk.scales(p, shared.h_kv)} * p.E + channel, channel < p.E);
}

// This warp's queries as an entry of the table sees them, and their scale, which is one: they are
// of one block of 64.  Those before were read ahead of a barrier; gather() has the next one.
template <class C>
DEVICE void fetch_query(SharedStorage<C>& shared, const AttentionParams& p, int64_t offset,
                        int from_row) {
  using T = TileQ<C>;
  const int row = opaque(from_row);  // or what depends on it waits in registers
  const int64_t batch = offset * p.B + blockIdx.z, stride = int64_t{p.H} * p.D;
  const int h = static_cast<int>(blockIdx.y), first = row % kBlockM;
  const uint8_t* from =
      static_cast<const uint8_t*>(p.q_code) + (batch * p.L + row) * stride + h * p.D;
#pragma unroll 1
  for (int i = static_cast<int>(lane_index()); i < 16 * C::kTiles * T::kChunks; i += 32) {
    const int r = i / T::kChunks, chunk = i % T::kChunks;
    const bool valid = row + r < p.L && chunk * 16 < p.D;
    cp_async(shared_address(shared.codes.q) + T::place(first + r, chunk),
             valid ? from + r * stride + chunk * 16 : from, valid);
  }
  const int64_t scale = (batch * ceil_div(p.L, kScaleRows) + row / kScaleRows) * p.H + h;
  if (lane_index() == 0)
    shared.group[warp_index()].q_scale = p.sm_scale * kLog2E * p.q_scale[scale];
  cp_async_commit();
  cp_async_wait<0>();
}

// --- Scores --------------------------------------------------------------------------------------

// q.mu of the group that begins `at` this block of keys, in log2 units, by block and query.
template <class C>
DEVICE void correct(SharedStorage<C>& shared, const AttentionParams& p, int row, int at) {
  const int group = static_cast<int>(lane_index()) / 4, t = static_cast<int>(lane_index()) % 4;
  const Group& of = shared.group[warp_index()];
  const int64_t first = of.offset * p.stride_qo + blockIdx.z * p.stride_qb + row * p.stride_ql +
                        blockIdx.y * p.stride_qh;
  const Rows q = make_rows(p.q, first, p.stride_ql, p.L - row, p.D, p.q_dtype);
  const ListedRows mu{make_rows(p.k_mean, 0, p.D, 0, p.D, p.mean_dtype), of.means};
  auto& shift = shared.shift[warp_index()];
#pragma unroll 1
  for (int tile = 0; tile < 2 * C::kTiles; tile++) {
    const int query = tile / 2 * 16, column = tile % 2 * 8;
    float d[4];
    if (at + column >= of.end) continue;
    multiply_means(d, q, mu, query, column);
#pragma unroll
    for (int e = 0; e < 4; e++)
      shift[(at + column + 2 * t + e % 2) % kGroup][query + group + e / 2 * 8] =
          p.sm_scale * kLog2E * d[e];
  }
  sync_warp();
}

// --- The result ----------------------------------------------------------------------------------

// x += eight numbers of an array.
DEVICE void add_eight(float* x, const void* array, Dtype dtype, int64_t at) {
  const auto* from =
      reinterpret_cast<const uint32_t*>(static_cast<const char*>(array) + at * size_of(dtype));
  const bool floats = dtype == Dtype::kFloat32;
  Vector<uint32_t> raw[2] = {load_streaming(from), {}};
  if (floats) raw[1] = load_streaming(from + 4);
#pragma unroll
  for (int e = 0; e < 8; e++)
    x[e] += floats                      ? float_of(raw[e / 4].at[e % 4])
            : dtype == Dtype::kBfloat16 ? unpack<bfloat16>(raw[0].at[e / 2], e % 2)
                                        : unpack<float16>(raw[0].at[e / 2], e % 2);
}

// Eight rows of acc through shared memory, so that lanes store 16 bytes of a row.
template <class C>
DEVICE void store_rows(const float (&acc)[C::kD / 8][4], int half, float factor, float* staged,
                       const AttentionParams& p, int64_t batch, int row) {
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
    float* x = staged + r * kPitch + channel;
    const int64_t at = ((batch * p.L + row + r) * p.H + blockIdx.y) * p.E + channel;
    if (p.added) add_eight(x, p.added, p.out_dtype, at);
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
  if constexpr (C::kExists) {
    auto& shared = shared_storage<SharedStorage<C>>();
    const int lane = static_cast<int>(lane_index()), warp = static_cast<int>(warp_index());

    // Which queries: last ones first, causal rows are the longest there
    const int tile = static_cast<int>(gridDim.x - 1 - blockIdx.x) / p.splits;
    const int row = opaque(tile * kBlockM + warp * 16 * kTiles);  // this warp's

    // Which keys
    Walk next;
    next.start(p, tile);
    if (threadIdx.x == 0) shared.h_kv = static_cast<int>(blockIdx.y) / (p.H / p.H_kv);
    if (lane == 0) shared.group[warp].offset = shared.group[warp].end = -1;
    sync_block();

    SoftmaxRows rows[kTiles];
#pragma unroll
    for (int i = 0; i < kTiles; i++) rows[i].reset();
    float acc[kTiles][C::kD / 8][4] = {};
    float k_scale = 0.0f;

    // First keys on their way
    if (next.at < next.end) {
      fetch_keys(shared, p, next);
      k_scale = p.k_scale[next.scales(p, shared.h_kv)];
    }
    cp_async_commit();

    while (next.at < next.end) {
      // These keys have landed, of this thread's copies, of everyone's; and everyone has left v
      cp_async_wait<0>();
      sync_block();
      fetch_values(shared, p, next);
      cp_async_commit();

      const int first_key = next.j * kBlockN;
      const bool busy = row < p.L && !(p.causal && first_key >= row + 16 * kTiles + p.first_last);
      bool heard = busy;                        // p is not all but zero
      uint32_t probability[kTiles][4][4] = {};  // NOTE: or they would live on from keys to keys
      if (busy) {
        // The queries as this entry sees them, and what smoothing took from their scores
        if (next.at >= own(shared.group).end) {
          Group& group = own(shared.group);
          const int wanted = p.offset_index ? static_cast<int>(p.offset_index[next.t]) : 0;
          if (wanted != group.offset) fetch_query(shared, p, wanted, row);
          next.gather(group, p, wanted, shared.h_kv);
          if (p.smooth == Smooth::kBlock) correct(shared, p, row, next.at);
        }

        // Scores and probabilities
        const bool free = first_key + kBlockN <= p.N && !p.mask &&
                          (!p.causal || first_key + kBlockN <= row + p.first_last + 1);
        int32_t x[kTiles][8][4];
        multiply_keys<C>(x, shared_address(shared.codes.q), shared_address(shared.codes.k));
        bool far = true;
#pragma unroll
        for (int i = 0; i < kTiles; i++) {
          float scale = own(shared.group).q_scale * k_scale, bias[2], past[2];
#pragma unroll
          for (int r = 0; r < 2; r++) {
            const float* shift = own(shared.shift)[next.at % kGroup];
            bias[r] = p.smooth == Smooth::kBlock ? shift[16 * i + 8 * r + lane / 4] : 0.0f;
          }
          if constexpr (C::kInteger) take_scores(x[i], scale, bias);
          if (!free) mask_scores(x[i], scale, bias, p, row + 16 * i, first_key);
          if (!rows[i].raise(x[i], scale, bias, past)) {
#pragma unroll
            for (int n = 0; n < C::kD / 8; n++)
#pragma unroll
              for (int e = 0; e < 4; e++) acc[i][n][e] *= past[e / 2];
          }
#pragma unroll
          for (int r = 0; r < 2; r++) far &= rows[i].behind[r] > p.pv_skip * kLog2E;
          rows[i].exponentiate(probability[i], x[i], scale, bias, past);
        }
        heard = ballot(far) != kFullWarp;
      }

      // The values have landed, and everyone has left k
      next.advance(p);
      cp_async_wait<0>();
      sync_block();
      if (next.at < next.end) {
        fetch_keys(shared, p, next);
        k_scale = p.k_scale[next.scales(p, shared.h_kv)];
      }
      cp_async_commit();
      if (heard)
        add_values<C>(acc, probability, shared_address(shared.codes.v), shared.v_scale, p.E);
    }

    // Normalise and store
    sync_block();  // v has been read
    if (row >= p.L) return;
    const int64_t batch = int64_t{split_of(p)} * p.B + blockIdx.z;
    if (p.smooth == Smooth::kSequence && p.lse) {
      Group& group = own(shared.group);
      if (lane < kGroup)
        group.means[lane] = lane ? -1 : static_cast<int>(blockIdx.z) * p.H_kv + shared.h_kv;
      if (lane == 0) group.offset = 0, group.end = 1;
      sync_warp();
      correct(shared, p, row, 0);
    }
#pragma unroll
    for (int i = 0; i < kTiles; i++) {
      rows[i].finish();
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const float total = rows[i].total[r];
        const int first = row + 16 * i + 8 * r, mine = first + lane / 4;
        const float factor = total == 0.0f ? 0.0f : (C::kOperands == 1 ? 1.0f : 256.0f) / total;
        store_rows<C>(acc[i], r, factor, shared.staged[warp], p, batch, first);
        if (p.lse && lane % 4 == 0 && mine < p.L) {
          const float* shift = shared.shift[warp][0];
          const float more =
              p.smooth == Smooth::kSequence ? shift[16 * i + 8 * r + lane / 4] : 0.0f;
          p.lse[(batch * p.H + blockIdx.y) * p.L + mine] =
              total == 0.0f ? kMinusInfinity : (rows[i].largest[r] + log2f(total) + more) * kLn2;
        }
      }
    }
  }
}

// --- Launchers -----------------------------------------------------------------------------------

template <class C>
inline cudaError_t launch_attention(const AttentionParams& p, cudaStream_t stream) {
  const dim3 grid(ceil_div(p.L, kBlockM) * p.splits, p.H, p.B);
  return launch(attention_kernel<C>, {grid, C::kThreads, sizeof(SharedStorage<C>)}, stream, p);
}

template <class K, class V>
inline cudaError_t attend(const AttentionParams& p, cudaStream_t stream) {
  const int channels = max(p.D, p.E);
  if (channels <= 64) return launch_attention<Config<64, K, V>>(p, stream);
  if (channels <= 128) return launch_attention<Config<128, K, V>>(p, stream);
  return launch_attention<Config<256, K, V>>(p, stream);
}

inline bool serves(int D, int E) {
  return D % 16 == 0 && E % 16 == 0 && D > 0 && E > 0 && D <= 256 && E <= 256;
}

}  // namespace attend_sm80

cudaError_t encode_qkv_sm80(const EncodeQkvParams& p, cudaStream_t stream) {
  const int E = p.v_code ? p.E : p.D;
  const bool known = p.v_dtype == Dtype::kFloat16 || p.v_dtype == Dtype::kE4m3 || !p.v_code;
  if (!attend_sm80::serves(p.D, E) || !known || size_of(p.x_dtype) == 1 || size_of(p.qk_dtype) != 1)
    return cudaErrorInvalidValue;
  const int channels = max(p.D, E);
  if (channels <= 64) return attend_sm80::launch_encode<8>(p, stream);
  if (channels <= 128) return attend_sm80::launch_encode<16>(p, stream);
  return attend_sm80::launch_encode<32>(p, stream);
}

cudaError_t combine_parts_sm80(const CombineParams& p, cudaStream_t stream) {
  if (p.E % 16 || p.splits < 1 || size_of(p.out_dtype) == 1) return cudaErrorInvalidValue;
  return attend_sm80::launch_combine(p, stream);
}

// NOTE: e4m3 q.k would store nothing where kHasMmaE4m3 is false; Python refuses it.
cudaError_t attention_sm80(const AttentionParams& p, cudaStream_t stream) {
  const bool known =
      (p.v_dtype == Dtype::kFloat16 || p.v_dtype == Dtype::kE4m3) && size_of(p.qk_dtype) == 1;
  if (!attend_sm80::serves(p.D, p.E) || !known) return cudaErrorInvalidValue;
  const bool plain = !p.list_bounds && !p.added;
  if (reinterpret_cast<uintptr_t>(p.added) % 16 != 0) return cudaErrorInvalidValue;
  if (p.splits < 1 || (p.splits > 1 && (!plain || p.out_dtype != Dtype::kFloat32)) ||
      (p.list_bounds && (p.causal || p.mask)) || (p.table && p.causal))
    return cudaErrorInvalidValue;
  if (p.B == 0 || p.L == 0 || p.H == 0) return cudaSuccess;
  const bool integer = p.qk_dtype == Dtype::kInt8, half = p.v_dtype == Dtype::kFloat16;
  if (integer && half) return attend_sm80::attend<int8_t, float16>(p, stream);
  if (integer) return attend_sm80::attend<int8_t, e4m3>(p, stream);
  if (half) return attend_sm80::attend<e4m3, float16>(p, stream);
  return attend_sm80::attend<e4m3, e4m3>(p, stream);
}

}  // namespace reeltime
