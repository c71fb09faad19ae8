// SPDX-License-Identifier: Apache-2.0
// rope_kv on every architecture: each projection read from HBM once, each result written once.
//
// Without 8 bits nothing spans tokens, and rows.h does it all while a token is in registers.
// Floor: B L C itemsize (1 + O) + 4 O L D bytes.
//
// INT8 spans 64 tokens of one head, RMSNorm all heads of one token, and 64 rows of all heads do not
// fit shared memory.  So inverse_kernel leaves 1 / rms, 4 bytes per token, and blocks of threads
// that own some heads of 64 tokens read their part of the rows again, from L2.  The table's 64 rows
// stay in L1 from head to head.
// Floor of query_int8: as above and B L C O more.  Of write_cache, bytes per token and head:
// D (2 itemsize + 2) + (6 D + 4) / 64, and with summaries D (D + 1) / 16, most of it all.
//
// h = phi(K)^T V on tensor cores as if in float: phi is the sum of three bfloat16, v of as many as
// it needs, and products of terms below 2^-24 are left out.  For bfloat16 values that is 3 * 64
// multiplications per element of h, which take a tensor core less time than its 4 bytes take HBM.
// For summaries of slots, slots.h adds those of blocks up: blocks of threads that kept a head's sum
// as they went through a frame would be B F H, too few to fill a GPU.
#include "common/encode.h"
#include "common/launch.h"
#include "common/shared.h"
#include "rope_kv/block.h"
#include "rope_kv/rope_kv.h"
#include "rope_kv/rows.h"
#include "rope_kv/slots.h"

namespace reeltime {
namespace rope_kv_sm80 {

template <int kLanes>
struct QueryStorage {
  float peak[2][Config<kLanes>::kWarps];  // of even and of odd heads
};

// Tiles take the place of statistics that are read by then.
template <int kLanes>
struct WriteStorage {
  float peak[Config<kLanes>::kWarps];
  union alignas(128) {
    Statistics<kLanes> statistics;
    Tiles<kLanes> tiles;  // the last of which there are as many as values have terms
  };
};
static_assert(sizeof(WriteStorage<32>) <= 99 * 1024, "what every GPU lets a block have");

// Blocks that an SM holds at least, to have so many threads (512 of float); the general kernel
// takes the registers that it needs.
template <int kLanes, class T, int kThreads>
constexpr int kBlocks = kWide<T> ? (sizeof(T) == 2 ? kThreads : 512) / Config<kLanes>::kThreads : 1;

// Every head of a block, which for Any is one: no loop that values could wait across.
template <class T, class F>
DEVICE void for_heads(int begin, int end, F process) {
  if constexpr (kWide<T>)
    for (int head = begin; head < end; head++) process(head);
  else
    process(begin);
}

// --- Query ---------------------------------------------------------------------------------------

template <int kLanes, class T>
__global__ void __launch_bounds__(Config<kLanes>::kThreads, kBlocks<kLanes, T, 768>)
    query_int8_kernel(const QueryInt8Params p, const int group) {
  using C = Config<kLanes>;
  auto& shared = shared_storage<QueryStorage<kLanes>>();

  // Which tokens, offset and heads.  Neighbouring blocks of threads share the table's rows, or with
  // other offsets the queries, in L2
  const int blocks = ceil_div(p.L, kTokens), groups = ceil_div(p.H, group), width = p.H * p.D;
  int rest = static_cast<int>(blockIdx.x);
  const int first_head = rest % groups * group;
  rest /= groups;
  const int64_t o = rest % p.O;
  rest /= p.O;
  const int block = rest % blocks, start = block * kTokens;
  const int64_t b = rest / blocks;
  const int thread = static_cast<int>(threadIdx.x), count = min(kTokens, p.L - start);
  const float* table = p.table ? p.table + o * p.stride_to + start * p.stride_tl : nullptr;

  float factor[C::kRows];
#pragma unroll
  for (int i = 0; i < C::kRows; i++) {
    const int token = thread / kLanes + i * C::kSpan;
    factor[i] = p.sm_scale;
    if (p.inverse && token < count) factor[i] *= p.inverse[b * p.L + start + token];
  }

  auto process = [&](int head) {
    const Owner<kLanes> me(opaque(thread), p.D, count);  // or addresses of all heads take registers
    const int channel = head * p.D;
    const int64_t to = ((o * p.B + b) * p.L + start) * width + channel;

    // Norm and rotate
    float x[C::kCount], peak = 0.0f;
    const Incoming<kLanes, T> queries(me, p.q, p.dtype,
                                      b * p.stride_qb + start * p.stride_ql + channel, p.stride_ql);
#pragma unroll
    for (int i = 0; i < C::kRows; i++) queries.read(i, x + i * kChunk);
    norm_and_rotate<kLanes, T>(x, p, factor, table, channel, me);

    // Round and store
    with_type<T>(p.dtype, [&](auto type) {
      using X = decltype(type);
#pragma unroll
      for (int j = 0; j < C::kCount; j++) x[j] = to_float(from_float<X>(x[j]));
      me.template store<T>(static_cast<X*>(p.out) + to, x, width);
    });

    // Encode what was stored.  Two places for peaks: a warp may be a head ahead of the readers
#pragma unroll
    for (int j = 0; j < C::kCount; j++) peak = max_magnitude(peak, x[j]);
    peak = block_reduce<C::kWarps>(peak, shared.peak[head % 2], MaxMagnitude());
    const float scale = block_scale(peak, kLimit<int8_t>);
    encode_block(x, scale, kLimit<int8_t>);
    me.template store<T>(p.code + to, x, width);
    if (thread == 0) p.scale[((o * p.B + b) * blocks + block) * p.H + head] = scale;
  };
  for_heads<T>(first_head, min(first_head + group, p.H), process);
}

// --- Write ---------------------------------------------------------------------------------------

// The slot of each thread: mean key and scale of the values of a channel, stored here and there.
template <int kLanes>
DEVICE void finish_statistics(const WriteCacheParams& p, Statistics<kLanes>& statistics,
                              int64_t first, int count) {
  const int slot = static_cast<int>(threadIdx.x), channel = channel_of<kLanes>(slot);
  if (slot >= Config<kLanes>::kColumns) return;
  const bool exists = channel < p.D;
  if (p.k_mean) {  // subtracted as stored, so that q.(k - mean) + q.mean is exact
    const float sum = combine<kLanes>(statistics.sum, Sum());
    with_type(p.mean_dtype, [&](auto type) {
      const auto mean =
          from_float<decltype(type)>(sum * reciprocal_approx(static_cast<float>(count)));
      statistics.mean[slot] = to_float(mean);
      if (exists) static_cast<decltype(type)*>(p.k_mean)[first + channel] = mean;
    });
  }
  if (p.v_scale) {
    const float limit = p.cache_v_dtype == Dtype::kE4m3 ? kLimit<e4m3> : 1.0f;
    const float scale = block_scale(combine<kLanes>(statistics.peak, MaxMagnitude()), limit);
    statistics.scale[slot] = scale;
    statistics.inverse[slot] = Divisor(scale).inverse;
    if (exists) p.v_scale[first + channel] = scale;
  }
}

template <int kLanes, class T>
__global__ void __launch_bounds__(Config<kLanes>::kThreads, kBlocks<kLanes, T, 512>)
    write_cache_kernel(const WriteCacheParams p, const int group) {
  using C = Config<kLanes>;
  constexpr bool kOneTile = C::kColumns == C::kSlice;
  static_assert(sizeof(Statistics<kLanes>) <= sizeof(Tiles<kLanes>::phi), "not over the values");
  auto& shared = shared_storage<WriteStorage<kLanes>>();
  auto& statistics = shared.statistics;

  // Which tokens and heads, and which slice of h where it has several, the first of which does all
  // else.  A slot out of range is nobody's memory
  const int blocks = ceil_div(p.N, kTokens), groups = ceil_div(p.H, group), width = p.H * p.D;
  const int side = kOneTile ? 1 : ceil_div(p.D, C::kSlice), slices = p.h ? side * side : 1;
  int rest = static_cast<int>(blockIdx.x);
  const int slice = kOneTile ? 0 : rest % slices;
  const int d0 = slice / side * C::kSlice, e0 = slice % side * C::kSlice;
  if (!kOneTile) rest /= slices;
  const int first_head = rest % groups * group;
  const int unit = rest / groups, block = unit % blocks, frame = unit / blocks;
  const int64_t f = frame % p.F, b = frame / p.F;
  const int64_t slot = p.slots[f * p.stride_s];
  if (slot < 0 || slot >= p.S) return;
  const int64_t start = f * p.N + block * kTokens;
  const int thread = static_cast<int>(threadIdx.x), count = min(kTokens, p.N - block * kTokens);
  const float* table = p.table ? p.table + start * p.stride_tl : nullptr;
  const int terms = terms_of<T>(p.v_dtype);

  float factor[C::kRows];
#pragma unroll
  for (int i = 0; i < C::kRows; i++) {
    const int token = thread / kLanes + i * C::kSpan;
    factor[i] = p.inverse && token < count ? p.inverse[b * p.F * p.N + start + token] : 1.0f;
  }

  auto process = [&](int head) {
    const Owner<kLanes> me(opaque(thread), p.D, count);  // or addresses of all heads take registers
    const int channel = head * p.D;
    const int64_t to = ((b * p.S + slot) * blocks + block) * p.H + head;  // of a block and head
    const int64_t token_to = ((b * p.S + slot) * p.N + block * kTokens) * width + channel;

    // Load both, norm and rotate keys.  Values wait as they came, half the registers of floats
    const Incoming<kLanes, T> keys(me, p.k, p.k_dtype,
                                   b * p.stride_kb + start * p.stride_kl + channel, p.stride_kl);
    const Incoming<kLanes, T> values(me, p.v, p.v_dtype,
                                     b * p.stride_vb + start * p.stride_vl + channel, p.stride_vl);
    float k[C::kCount];
#pragma unroll
    for (int i = 0; i < C::kRows; i++) keys.read(i, k + i * kChunk);
    norm_and_rotate<kLanes, T>(k, p, factor, table, channel, me);

    // Mean key and largest value of each channel; values into their tiles, which overlap nothing
    float sum[kChunk] = {}, peak[kChunk] = {};
#pragma unroll
    for (int i = 0; i < C::kRows; i++) {
      float v[kChunk];
      values.read(i, v);
#pragma unroll
      for (int e = 0; e < kChunk; e++) {
        sum[e] += k[i * kChunk + e];
        peak[e] = max_magnitude(peak[e], v[e]);
      }
      if (p.h) store_values<kLanes>(shared.tiles, v, me.token(i), (me.column - e0) / kChunk, terms);
    }
    if (slice == 0) {
      if (p.k_mean || p.v_scale) {
        leave_partial<kLanes>(sum, statistics.sum[warp_index()], Sum());
        leave_partial<kLanes>(peak, statistics.peak[warp_index()], MaxMagnitude());
        sync_block();  // every warp has left its part
        finish_statistics<kLanes>(p, statistics, to * p.D, me.count);
        sync_block();  // and every channel is finished
      }

      // Values, encoded with the scale of their channel
      float scale[kChunk], inverse[kChunk];
      if (p.v_scale) {
        read_slots<kLanes>(scale, statistics.scale);
        read_slots<kLanes>(inverse, statistics.inverse);
      }
#pragma unroll
      for (int i = 0; i < C::kRows; i++) {
        const int64_t at = token_to + me.offset(i, width);
        float v[kChunk];
        values.read(i, v);
        if (p.v_scale)
          encode_values(v, scale, inverse, p.cache_v_dtype == Dtype::kE4m3 ? kLimit<e4m3> : 1.0f);
        if (p.cache_v_dtype == Dtype::kE4m3)
          store_chunk<kWide<T>>(static_cast<e4m3*>(p.cache_v) + at, v, me.inside_of(i));
        else
          with_type(p.cache_v_dtype, [&](auto type) {
            store_chunk<kWide<T>>(static_cast<decltype(type)*>(p.cache_v) + at, v, me.inside_of(i));
          });
      }

      // Keys, or what is left of them without their mean
      if (p.k_scale) {
        float mean[kChunk], peak = 0.0f;
        read_slots<kLanes>(mean, statistics.mean);
#pragma unroll
        for (int j = 0; j < C::kCount; j++)
          if (me.token(j / kChunk) < me.count) peak = max_magnitude(peak, k[j] - mean[j % kChunk]);
        peak = block_reduce<C::kWarps>(peak, shared.peak, MaxMagnitude());
        const float scale = block_scale(peak, kLimit<int8_t>);
        if (thread == 0) p.k_scale[to] = scale;
#pragma unroll
        for (int i = 0; i < C::kRows; i++) {
          float y[kChunk];
#pragma unroll
          for (int e = 0; e < kChunk; e++) y[e] = k[i * kChunk + e] - mean[e];
          encode_block(y, scale, kLimit<int8_t>);
          int8_t* at = static_cast<int8_t*>(p.cache_k) + token_to + me.offset(i, width);
          store_chunk<kWide<T>>(at, y, me.inside_of(i));
        }
      } else {
        with_type(p.cache_k_dtype, [&](auto type) {
          me.template store<T>(static_cast<decltype(type)*>(p.cache_k) + token_to, k, width);
        });
      }
    }
    if (!p.h) return;

    // Features times values.  Statistics have been read: by all before the barrier in block_reduce,
    // or, of a plain cache, before the one that finished them
    store_features<kLanes>(shared.tiles, k, p.phi, (me.column - d0) / kChunk, me);
    sync_block();  // the tiles are whole
    const int64_t sums_to = p.slot_h ? int64_t{unit} * p.H + head : to;
    multiply_tiles<kLanes, kWide<T>>(shared.tiles, p.h + (sums_to * p.D + d0) * p.D + e0,
                                     e0 == 0 ? p.z + sums_to * p.D + d0 : nullptr, p.D,
                                     min(p.D - d0, C::kSlice), min(p.D - e0, C::kSlice), me.count,
                                     terms);
    sync_block();  // the next head's statistics replace the tiles
  };
  for_heads<T>(first_head, min(first_head + group, p.H), process);
}

// --- Launchers -----------------------------------------------------------------------------------

// Whether chunks may move in 16 bytes: of pointers, null or not, and the strides of what is walked.
struct Alignment {
  bool wide;

  Alignment& pointer(const void* address) {
    wide &= reinterpret_cast<uintptr_t>(address) % 16 == 0;
    return *this;
  }
  Alignment& stride(int64_t stride, int itemsize, int64_t length) {
    wide &= length <= 1 || stride * itemsize % 16 == 0;
    return *this;
  }
};

inline bool fits_grid(int64_t blocks) { return blocks <= 0x7fffff00; }

// Whether an offset in a block of tokens has 32 bits.
inline bool fits_block(int64_t stride) { return stride * kTokens <= 0xffffffff; }

// Heads of one block, of which an SM holds `resident`: as many as make the fewest rounds over all
// SMs times the length of a round, its heads and half of one to begin.  In general one.
template <class T>
int heads_of_block(int64_t blocks_per_head, int H, int64_t processors, int resident) {
  const int64_t slots = (processors > 0 ? processors : 1) * resident;
  int best = 1;
  int64_t least = -1;
  for (int group = 1; group <= (kWide<T> ? H : 1); group++) {
    const int64_t rounds = (blocks_per_head * ceil_div(H, group) + slots - 1) / slots;
    const int64_t time = rounds * (2 * group + 1);
    if (least < 0 || time < least) least = time, best = group;
  }
  return best;
}

inline cudaError_t launch_inverse(const InverseParams& p, bool wide, cudaStream_t stream) {
  const Launch how{dim3(static_cast<unsigned>(ceil_div(p.rows, 8))), 256};
  return wide ? launch(inverse_kernel<true>, how, stream, p)
              : launch(inverse_kernel<false>, how, stream, p);
}

inline cudaError_t launch_add_blocks(const WriteCacheParams& p, cudaStream_t stream) {
  const int64_t blocks = int64_t{p.B} * p.F * slot_pieces(p);
  if (!fits_grid(blocks)) return cudaErrorInvalidValue;
  Alignment at{p.H * p.D % 4 == 0};
  at.pointer(p.h).pointer(p.z).pointer(p.slot_h).pointer(p.slot_z);
  const Launch how{dim3(static_cast<unsigned>(blocks)), kSlotThreads};
  const int nb = ceil_div(p.N, kTokens);
  return at.wide ? launch(add_blocks_kernel<true>, how, stream, p, nb)
                 : launch(add_blocks_kernel<false>, how, stream, p, nb);
}

// launch_of(T()) with the type to compile for.
template <class F>
cudaError_t for_type(bool wide, Dtype dtype, F launch_of) {
  if (!wide) return launch_of(Any{});
  if (dtype == Dtype::kBfloat16) return launch_of(bfloat16{});
  return dtype == Dtype::kFloat16 ? launch_of(float16{}) : launch_of(float{});
}

template <int kLanes, class T>
cudaError_t launch_query(const QueryInt8Params& p, cudaStream_t stream) {
  const int64_t units = int64_t{p.O} * p.B * ceil_div(p.L, kTokens);
  const int group = heads_of_block<T>(units, p.H, p.processors, kBlocks<kLanes, T, 768>);
  const int64_t blocks = units * ceil_div(p.H, group);
  if (!fits_grid(blocks)) return cudaErrorInvalidValue;
  const Launch how{dim3(static_cast<unsigned>(blocks)), Config<kLanes>::kThreads,
                   sizeof(QueryStorage<kLanes>)};
  return launch(query_int8_kernel<kLanes, T>, how, stream, p, group);
}

template <int kLanes, class T>
cudaError_t launch_write(const WriteCacheParams& p, cudaStream_t stream) {
  using Storage = WriteStorage<kLanes>;
  const int64_t units = int64_t{p.B} * p.F * ceil_div(p.N, kTokens);
  const int group = heads_of_block<T>(units, p.H, p.processors, kBlocks<kLanes, T, 512>);
  const int side = p.h ? ceil_div(p.D, Config<kLanes>::kSlice) : 1;
  const int64_t blocks = units * ceil_div(p.H, group) * side * side;
  if (!fits_grid(blocks)) return cudaErrorInvalidValue;
  size_t shared = offsetof(Storage, statistics) + sizeof(Statistics<kLanes>);
  const size_t with_tiles =
      offsetof(Storage, tiles) + Config<kLanes>::kTileBytes * (kTerms + terms_of<Any>(p.v_dtype));
  if (p.h && shared < with_tiles) shared = with_tiles;
  const Launch how{dim3(static_cast<unsigned>(blocks)), Config<kLanes>::kThreads, shared};
  return launch(write_cache_kernel<kLanes, T>, how, stream, p, group);
}

}  // namespace rope_kv_sm80

cudaError_t rotate_rows_sm80(const RotateRowsParams& p, cudaStream_t stream) {
  using namespace rope_kv_sm80;
  if (p.B == 0 || p.T == 0 || p.N == 0 || p.H == 0 || p.D == 0 || p.O == 0) return cudaSuccess;
  const int64_t rows = int64_t{p.B} * p.T * p.N;
  if (!fits_grid(rows)) return cudaErrorInvalidValue;
  const int filled = ceil_div(p.H * p.D, RowConfig::kChunks * RowConfig::kStride);
  const int warps = filled > 2 ? RowConfig::kWarps : filled, own = RowConfig::kWarps / warps;
  const int size = size_of(p.dtype);
  Alignment at{p.D % kChunk == 0 && p.stride_xd == 1 && (p.stride_xh == p.D || p.H == 1) &&
               filled <= RowConfig::kWarps};
  at.pointer(p.x).pointer(p.weight).pointer(p.table).pointer(p.out);
  at.stride(p.stride_xb, size, p.B).stride(p.stride_xt, size, p.T).stride(p.stride_xn, size, p.N);
  at.stride(p.stride_to, 4, p.O).stride(p.stride_tl, 4, p.T * p.N);
  const Launch how{dim3(static_cast<unsigned>((rows + own - 1) / own)), 32 * RowConfig::kWarps,
                   sizeof(RowStorage)};
  return for_type(at.wide, p.dtype, [&](auto type) {
    return launch(rotate_rows_kernel<decltype(type)>, how, stream, p, warps);
  });
}

cudaError_t query_int8_sm80(const QueryInt8Params& p, cudaStream_t stream) {
  using namespace rope_kv_sm80;
  if (p.B == 0 || p.L == 0 || p.H == 0 || p.D == 0 || p.O == 0) return cudaSuccess;
  if (p.D > 256 || !fits_block(p.stride_ql) || !fits_block(p.stride_tl) ||
      !fits_grid(int64_t{p.B} * p.L))
    return cudaErrorInvalidValue;
  const int size = size_of(p.dtype);
  Alignment at{p.D % kChunk == 0};
  at.pointer(p.q).pointer(p.weight).pointer(p.table).pointer(p.out).pointer(p.code);
  at.stride(p.stride_qb, size, p.B).stride(p.stride_ql, size, p.L);
  at.stride(p.stride_to, 4, p.O).stride(p.stride_tl, 4, p.L);
  if (p.weight) {
    const InverseParams q{p.q,         p.inverse,   p.B * p.L, p.L,    p.H * p.D,
                          p.stride_qb, p.stride_ql, p.eps,     p.dtype};
    const cudaError_t error = launch_inverse(q, at.wide, stream);
    if (error != cudaSuccess) return error;
  }
  return for_type(at.wide && p.D <= 128, p.dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (!kWide<T>)
      return launch_query<32, T>(p, stream);
    else if constexpr (sizeof(T) == 2)
      return p.D <= 64 ? launch_query<8, T>(p, stream) : launch_query<16, T>(p, stream);
    else
      return launch_query<16, T>(p, stream);
  });
}

cudaError_t write_cache_sm80(const WriteCacheParams& p, cudaStream_t stream) {
  using namespace rope_kv_sm80;
  if (p.B == 0 || p.F == 0 || p.N == 0 || p.H == 0 || p.D == 0) return cudaSuccess;
  if (p.D > 256 || !fits_block(p.stride_kl) || !fits_block(p.stride_vl) ||
      !fits_block(p.stride_tl) || !fits_grid(int64_t{p.B} * p.F * p.N))
    return cudaErrorInvalidValue;
  if (!p.k_scale != !p.v_scale || (p.k_scale && !p.k_mean) || !p.h != !p.z ||
      !p.slot_h != !p.slot_z || (p.slot_h && !p.h))
    return cudaErrorInvalidValue;
  const int size = size_of(p.k_dtype), L = p.F * p.N;
  Alignment at{p.D % kChunk == 0};
  at.pointer(p.k).pointer(p.weight).pointer(p.table);
  at.stride(p.stride_kb, size, p.B).stride(p.stride_kl, size, L).stride(p.stride_tl, 4, L);
  if (p.weight) {
    const InverseParams k{p.k,         p.inverse,   p.B * L, L,        p.H * p.D,
                          p.stride_kb, p.stride_kl, p.eps,   p.k_dtype};
    const cudaError_t error = launch_inverse(k, at.wide, stream);
    if (error != cudaSuccess) return error;
  }
  at.pointer(p.v).pointer(p.cache_k).pointer(p.cache_v).pointer(p.h);
  at.stride(p.stride_vb, size, p.B).stride(p.stride_vl, size, L);
  const bool wide = at.wide && p.v_dtype == p.k_dtype && p.D <= 128;
  const cudaError_t error = for_type(wide, p.k_dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (!kWide<T>)
      return launch_write<32, T>(p, stream);
    else if constexpr (sizeof(T) == 2)
      return p.D <= 64 ? launch_write<8, T>(p, stream) : launch_write<16, T>(p, stream);
    else
      return launch_write<16, T>(p, stream);
  });
  return error != cudaSuccess || !p.slot_h ? error : launch_add_blocks(p, stream);
}

}  // namespace reeltime
