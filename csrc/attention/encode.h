// SPDX-License-Identifier: Apache-2.0
// Plain tensors to the 8-bit operands of attention, one launch for q, k and v (attention.h).
//
//   q   code and one scale           k   minus the mean, then as q           v   a scale per
//   channel
//
// A block of threads owns 64 tokens of one head and holds them in registers, read once: a thread
// has eight channels of every kGroups-th token, so that neighbouring lanes read neighbouring bytes.
// What all tokens share (sums, largest magnitudes) meets in shared memory, in a fixed order.
// The mean of a whole sequence takes two more kernels: sums of 1024 tokens, and the sum of those.
// Floor: tokens * channels * (itemsize + 1 or 2) bytes over the memory bandwidth.
#pragma once
#include "attention/attention.h"
#include "attention/rows.h"
#include "common/encode.h"
#include "common/launch.h"
#include "common/reduce.h"
#include "common/shared.h"
#include "common/vector.h"

namespace reeltime {
namespace attend_sm80 {

constexpr int kScaleRows = 64;  // tokens under one scale
constexpr int kSumRows = 1024;  // tokens of one partial sum: enough blocks to fill a GPU
constexpr int kEncodeThreads = 256, kEncodeWarps = 8;

// kChunks of eight channels, at least those of the tensor.
template <int kChunks>
struct EncodeConfig {
  static constexpr int kGroups = kEncodeThreads / kChunks;
  static constexpr int kTokens = kScaleRows / kGroups;  // of a thread
  static_assert(kChunks <= 32 && kTokens >= 1, "lanes of a warp have different channels");
};

struct EncodeStorage {
  float part[kEncodeWarps][256];  // of each warp, by channel
  float channel[256];
  float amax[kEncodeWarps];
};

// What a thread owns.
template <int kChunks>
struct Tokens {
  static constexpr int kGroups = EncodeConfig<kChunks>::kGroups;
  static constexpr int kTokens = EncodeConfig<kChunks>::kTokens;
  Rows from;
  int channel, group;  // the first of each
  float x[kTokens][8];

  DEVICE int token(int i) const { return group + i * kGroups; }
  DEVICE bool holds(int i) const { return from.holds(token(i), channel); }

  // Every load is issued before the first is used.
  DEVICE explicit Tokens(const Rows& rows) : from(rows) {
    channel = static_cast<int>(threadIdx.x) % kChunks * 8;
    group = static_cast<int>(threadIdx.x) / kChunks;
    const bool floats = from.dtype == Dtype::kFloat32, wide = from.wide();
    Vector<uint32_t> raw[kTokens][2];
#pragma unroll
    for (int i = 0; i < kTokens; i++) {
      raw[i][0] = raw[i][1] = Vector<uint32_t>{};
      if (!holds(i)) continue;
      const char* at = from.at(token(i), channel);
      if (wide) {
        raw[i][0] = load_streaming(reinterpret_cast<const uint32_t*>(at));
        if (floats) raw[i][1] = load_streaming(reinterpret_cast<const uint32_t*>(at) + 4);
      } else {
#pragma unroll
        for (int e = 0; e < 8; e++) {
          if (floats)
            raw[i][e / 4].at[e % 4] = reinterpret_cast<const uint32_t*>(at)[e];
          else
            raw[i][0].at[e / 2] |= uint32_t{reinterpret_cast<const uint16_t*>(at)[e]}
                                   << 16 * (e % 2);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kTokens; i++)
#pragma unroll
      for (int e = 0; e < 8; e++) {
        const uint32_t pair = raw[i][0].at[e / 2];
        x[i][e] = floats                           ? float_of(raw[i][e / 4].at[e % 4])
                  : from.dtype == Dtype::kBfloat16 ? unpack<bfloat16>(pair, e % 2)
                                                   : unpack<float16>(pair, e % 2);
      }
  }
};

// Lanes and warps that hold the same channels: shared.part then has one row per warp.
template <int kChunks, class Op>
DEVICE void gather_channels(EncodeStorage& shared, float (&y)[8], int channel, Op op) {
#pragma unroll
  for (int distance = kChunks; distance < 32; distance *= 2)
#pragma unroll
    for (int e = 0; e < 8; e++) y[e] = op(y[e], shuffle_xor(y[e], distance));
  if (lane_index() < kChunks)
#pragma unroll
    for (int e = 0; e < 8; e++) shared.part[warp_index()][channel + e] = y[e];
  sync_block();
}

template <class Op>
DEVICE float over_warps(const EncodeStorage& shared, int channel, Op op) {
  float y = shared.part[0][channel];
#pragma unroll
  for (int warp = 1; warp < kEncodeWarps; warp++) y = op(y, shared.part[warp][channel]);
  return y;
}

// As `dtype` stores it, which it stores.
DEVICE float store_rounded(void* array, Dtype dtype, int64_t index, float x) {
  if (dtype == Dtype::kBfloat16)
    return to_float(static_cast<bfloat16*>(array)[index] = from_float<bfloat16>(x));
  if (dtype == Dtype::kFloat16)
    return to_float(static_cast<float16*>(array)[index] = from_float<float16>(x));
  return static_cast<float*>(array)[index] = x;
}

// x minus the mean of its tokens, as the mean is stored, so that q.(k - mu) + q.mu is exact.
template <int kChunks>
DEVICE void subtract_mean(EncodeStorage& shared, Tokens<kChunks>& k, const EncodeQkvParams& p,
                          int64_t block_head, int64_t batch_head) {
  const int channel = static_cast<int>(threadIdx.x);
  if (p.smooth == Smooth::kBlock) {
    float sum[8] = {};
#pragma unroll
    for (int i = 0; i < k.kTokens; i++)
#pragma unroll
      for (int e = 0; e < 8; e++) sum[e] += k.x[i][e];
    gather_channels<kChunks>(shared, sum, k.channel, Sum());
    if (channel < p.D)
      shared.channel[channel] = store_rounded(p.k_mean, p.x_dtype, block_head * p.D + channel,
                                              over_warps(shared, channel, Sum()) / k.from.count);
  } else if (channel < p.D) {
    shared.channel[channel] = static_cast<const float*>(p.k_mean)[batch_head * p.D + channel];
  }
  sync_block();
#pragma unroll
  for (int i = 0; i < k.kTokens; i++)
    if (k.holds(i))
#pragma unroll
      for (int e = 0; e < 8; e++) k.x[i][e] -= shared.channel[k.channel + e];
}

// One scale for all.
template <int kChunks>
DEVICE void encode_tokens(EncodeStorage& shared, Tokens<kChunks>& it, Dtype dtype, uint8_t* code,
                          int64_t stride, float* scale) {
  const bool integer = dtype == Dtype::kInt8;
  const float limit = integer ? kLimit<int8_t> : kLimit<e4m3>;
  float amax = 0.0f;
#pragma unroll
  for (int i = 0; i < it.kTokens; i++)
#pragma unroll
    for (int e = 0; e < 8; e++) amax = max_magnitude(amax, it.x[i][e]);
  amax = block_reduce<kEncodeWarps>(magnitude(amax), shared.amax, Max());
  const float step = block_scale(amax, limit);
  if (threadIdx.x == 0) *scale = step;
#pragma unroll
  for (int i = 0; i < it.kTokens; i++) {
    float (&x)[8] = it.x[i];
    encode_block(x, step, limit);
    uint32_t pieces[2];
#pragma unroll
    for (int e = 0; e < 2; e++)
      pieces[e] = integer ? pack4<int8_t>(x[4 * e], x[4 * e + 1], x[4 * e + 2], x[4 * e + 3])
                          : pack4<e4m3>(x[4 * e], x[4 * e + 1], x[4 * e + 2], x[4 * e + 3]);
    if (it.holds(i))
      *reinterpret_cast<uint64_t*>(code + it.token(i) * stride + it.channel) =
          uint64_t{pieces[1]} << 32 | pieces[0];
  }
}

// A scale for every channel; `first` counts elements of v_code.
template <int kChunks>
DEVICE void encode_channels(EncodeStorage& shared, Tokens<kChunks>& v, const EncodeQkvParams& p,
                            int64_t first, int64_t stride, float* scale) {
  const float limit = p.v_dtype == Dtype::kE4m3 ? kLimit<e4m3> : 1.0f;
  float amax[8] = {};
#pragma unroll
  for (int i = 0; i < v.kTokens; i++)
#pragma unroll
    for (int e = 0; e < 8; e++) amax[e] = max(amax[e], magnitude(v.x[i][e]));
  gather_channels<kChunks>(shared, amax, v.channel, Max());
  const int channel = static_cast<int>(threadIdx.x);
  if (channel < p.E) {
    const float step = block_scale(over_warps(shared, channel, Max()), limit);
    scale[channel] = step;
    shared.channel[channel] = step;
  }
  sync_block();
#pragma unroll
  for (int e = 0; e < 8; e++) {
    if (v.channel >= p.E) return;
    float column[Tokens<kChunks>::kTokens];
#pragma unroll
    for (int i = 0; i < v.kTokens; i++) column[i] = v.x[i][e];
    encode_block(column, shared.channel[v.channel + e], limit);
#pragma unroll
    for (int i = 0; i < v.kTokens; i++) v.x[i][e] = column[i];
  }
#pragma unroll
  for (int i = 0; i < v.kTokens; i++) {
    const float (&x)[8] = v.x[i];
    const int64_t at = first + v.token(i) * stride + v.channel;
    if (!v.holds(i)) continue;
    if (p.v_dtype == Dtype::kE4m3) {
      const uint64_t high = pack4<e4m3>(x[4], x[5], x[6], x[7]);
      *reinterpret_cast<uint64_t*>(static_cast<uint8_t*>(p.v_code) + at) =
          high << 32 | pack4<e4m3>(x[0], x[1], x[2], x[3]);
    } else {
      Vector<uint32_t> pairs;
#pragma unroll
      for (int e = 0; e < 8; e += 2) pairs.at[e / 2] = pack2<float16>(x[e], x[e + 1]);
      store_vector(reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(p.v_code) + at), pairs);
    }
  }
}

// --- The kernels ---------------------------------------------------------------------------------

// Blocks of threads: those of q, of k, of v; of each, heads first: together they read whole tokens.
template <int kChunks>
__global__ void __launch_bounds__(kEncodeThreads)
    encode_kernel(const EncodeQkvParams p, const unsigned of_q, const unsigned of_k) {
  auto& shared = shared_storage<EncodeStorage>();
  const bool is_q = blockIdx.x < of_q, is_v = blockIdx.x >= of_q + of_k;
  const int64_t item = blockIdx.x - (is_q ? 0 : is_v ? of_q + of_k : of_q);
  const int heads = is_q ? p.H : p.H_kv, tokens = is_q ? p.S_q : p.S_kv;
  const int channels = is_v ? p.E : p.D, blocks = ceil_div(tokens, kScaleRows);
  const int h = static_cast<int>(item % heads), block = static_cast<int>(item / heads % blocks);
  const int64_t b = item / heads / blocks, s = int64_t{block} * kScaleRows;
  const int64_t stride_b = is_q ? p.stride_qb : is_v ? p.stride_vb : p.stride_kb;
  const int64_t stride_s = is_q ? p.stride_qs : is_v ? p.stride_vs : p.stride_ks;
  const int64_t stride_h = is_q ? p.stride_qh : is_v ? p.stride_vh : p.stride_kh;
  Tokens<kChunks> it(make_rows(is_q   ? p.q
                               : is_v ? p.v
                                      : p.k,
                               b * stride_b + s * stride_s + h * stride_h, stride_s,
                               min(tokens - block * kScaleRows, kScaleRows), channels, p.x_dtype));

  const int64_t first = ((b * tokens + s) * heads + h) * channels;  // of the codes
  const int64_t stride = int64_t{heads} * channels;
  if (is_v) {
    encode_channels(shared, it, p, first, stride, p.v_scale + item * channels);
  } else {
    if (!is_q && p.smooth != Smooth::kNone) subtract_mean(shared, it, p, item, b * heads + h);
    encode_tokens(shared, it, p.qk_dtype, static_cast<uint8_t*>(is_q ? p.q_code : p.k_code) + first,
                  stride, (is_q ? p.q_scale : p.k_scale) + item);
  }
}

// The sum of up to 1024 keys of one head.
template <int kChunks>
__global__ void __launch_bounds__(kEncodeThreads) sum_kernel(const EncodeQkvParams p) {
  auto& shared = shared_storage<EncodeStorage>();
  const int parts = ceil_div(p.S_kv, kSumRows), item = static_cast<int>(blockIdx.x);
  const int h = item % p.H_kv, part = item / p.H_kv % parts;
  const int64_t b = item / p.H_kv / parts;
  float sum[8] = {};
  int first_channel = 0;
#pragma unroll 1
  for (int s = part * kSumRows; s < min(p.S_kv, (part + 1) * kSumRows); s += kScaleRows) {
    const int64_t at = b * p.stride_kb + int64_t{s} * p.stride_ks + h * p.stride_kh;
    const Tokens<kChunks> k(
        make_rows(p.k, at, p.stride_ks, min(p.S_kv - s, kScaleRows), p.D, p.x_dtype));
    first_channel = k.channel;
#pragma unroll
    for (int i = 0; i < k.kTokens; i++)
#pragma unroll
      for (int e = 0; e < 8; e++) sum[e] += k.x[i][e];
  }
  gather_channels<kChunks>(shared, sum, first_channel, Sum());
  const int channel = static_cast<int>(threadIdx.x);
  if (channel < p.D) p.partial[int64_t{item} * p.D + channel] = over_warps(shared, channel, Sum());
}

// A thread per channel of every head.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) mean_kernel(const EncodeQkvParams p) {
  const int64_t row = int64_t{p.H_kv} * p.D;  // of the partial sums
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= p.B * row) return;
  const int parts = ceil_div(p.S_kv, kSumRows);
  const float* partial = p.partial + at / row * parts * row + at % row;
  float sum = 0.0f;
  for (int part = 0; part < parts; part++) sum += partial[part * row];
  static_cast<float*>(p.k_mean)[at] = sum / p.S_kv;
}

// --- Launchers -----------------------------------------------------------------------------------

template <int kChunks>
inline cudaError_t launch_encode(const EncodeQkvParams& p, cudaStream_t stream) {
  const unsigned blocks_q = p.B * ceil_div(p.S_q, kScaleRows) * p.H;
  const unsigned blocks_kv = p.B * ceil_div(p.S_kv, kScaleRows) * p.H_kv;
  const unsigned of_q = p.q_code ? blocks_q : 0, of_k = p.k_code ? blocks_kv : 0;
  const unsigned all = of_q + of_k + (p.v_code ? blocks_kv : 0);
  if (of_k && p.smooth == Smooth::kSequence) {
    const unsigned parts = p.B * ceil_div(p.S_kv, kSumRows) * p.H_kv;
    const Launch sums{dim3(parts), kEncodeThreads, sizeof(EncodeStorage)};
    cudaError_t error = launch(sum_kernel<kChunks>, sums, stream, p);
    if (error != cudaSuccess) return error;
    const int64_t means = int64_t{p.B} * p.H_kv * p.D;
    const dim3 grid(static_cast<unsigned>((means + kEncodeThreads - 1) / kEncodeThreads));
    error = launch(mean_kernel<kEncodeThreads>, {grid, kEncodeThreads}, stream, p);
    if (error != cudaSuccess) return error;
  }
  if (all == 0) return cudaSuccess;
  const Launch with{dim3(all), kEncodeThreads, sizeof(EncodeStorage)};
  return launch(encode_kernel<kChunks>, with, stream, p, of_q, of_k);
}

}  // namespace attend_sm80
}  // namespace reeltime
