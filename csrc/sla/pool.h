// SPDX-License-Identifier: Apache-2.0
// sla's pooling: mean, likeness and INT8 codes of blocks of tokens, of one read.
//
// A block of threads owns one block of tokens of one head, in registers 64 at a time, and encodes
// them as attention does (attention/encode.h).
// Floor: O B S H D (itemsize + 1, of codes) bytes over the memory bandwidth.
#pragma once
#include "attention/encode.h"
#include "sla/sla.h"

namespace reeltime {
namespace sla_sm80 {

constexpr int kWidest = 256;  // channels of a head

// The sum of the tokens, each over its norm.  A token lies in kChunks neighbouring lanes.
template <int kChunks>
DEVICE void add_units(float (&sum)[8], const attend_sm80::Tokens<kChunks>& it) {
#pragma unroll
  for (int i = 0; i < it.kTokens; i++) {
    float square = 0.0f;
#pragma unroll
    for (int e = 0; e < 8; e++) square = fmaf(it.x[i][e], it.x[i][e], square);
    const float inverse = 1.0f / max(sqrtf(warp_reduce<kChunks>(square, Sum())), 1e-12f);
#pragma unroll
    for (int e = 0; e < 8; e++) sum[e] = fmaf(it.x[i][e], inverse, sum[e]);
  }
}

// Blocks of threads: heads first, which together read whole tokens.
template <int kChunks>
__global__ void __launch_bounds__(attend_sm80::kEncodeThreads)
    pool_kernel(const PoolBlocksParams p) {
  using namespace attend_sm80;
  auto& shared = shared_storage<EncodeStorage>();
  const int blocks = ceil_div(p.S, p.block), h = static_cast<int>(blockIdx.x % p.H);
  const int first = static_cast<int>(blockIdx.x / p.H % blocks) * p.block;
  const int64_t ob = blockIdx.x / p.H / blocks;
  const int64_t start = ob / p.B * p.stride_xo + ob % p.B * p.stride_xb + h * p.stride_xh;
  const int end = min(p.S, first + p.block), channel = static_cast<int>(threadIdx.x);

  // Sums over tokens, and their codes
  float sum[8] = {}, unit[8] = {};
  int first_channel = 0;
#pragma unroll 1
  for (int s = first; s < end; s += kScaleRows) {
    Tokens<kChunks> it(make_rows(p.x, start + s * p.stride_xs, p.stride_xs,
                                 min(end - s, kScaleRows), p.D, p.dtype));
    first_channel = it.channel;
#pragma unroll
    for (int i = 0; i < it.kTokens; i++)
#pragma unroll
      for (int e = 0; e < 8; e++) sum[e] += it.x[i][e];
    if (p.similar) add_units(unit, it);
    if (p.code) {
      if (s > first) sync_block();  // the maximum of the tokens before has been read
      const int64_t to = ob * ceil_div(p.S, kScaleRows) + s / kScaleRows;
      encode_tokens(shared, it, Dtype::kInt8,
                    reinterpret_cast<uint8_t*>(p.code) + ((ob * p.S + s) * p.H + h) * p.D,
                    int64_t{p.H} * p.D, p.scale + to * p.H + h);
    }
  }

  // Means over the block
  const float count = static_cast<float>(end - first);
  gather_channels<kChunks>(shared, sum, first_channel, Sum());
  if (channel < p.D)
    p.mean[int64_t{blockIdx.x} * p.D + channel] = over_warps(shared, channel, Sum()) / count;
  if (p.similar) {
    sync_block();  // the sums have been read
    gather_channels<kChunks>(shared, unit, first_channel, Sum());
    const float mean = channel < p.D ? over_warps(shared, channel, Sum()) / count : 0.0f;
    const float cosine = block_reduce<kEncodeWarps>(mean * mean, shared.amax, Sum());
    if (channel == 0) p.similar[blockIdx.x] = cosine > p.similarity;
  }
}

// --- Launchers -----------------------------------------------------------------------------------

inline bool fits_grid(int64_t blocks) { return blocks <= 0x7fffff00; }
inline bool is_float(Dtype dtype) { return size_of(dtype) > 1; }

template <int kChunks>
cudaError_t launch_pool(const PoolBlocksParams& p, cudaStream_t stream) {
  const int64_t blocks = int64_t{p.O} * p.B * ceil_div(p.S, p.block) * p.H;
  if (!fits_grid(blocks)) return cudaErrorInvalidValue;
  const Launch how{dim3(static_cast<unsigned>(blocks)), attend_sm80::kEncodeThreads,
                   sizeof(attend_sm80::EncodeStorage)};
  return launch(pool_kernel<kChunks>, how, stream, p);
}

}  // namespace sla_sm80
}  // namespace reeltime
