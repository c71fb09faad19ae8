// SPDX-License-Identifier: Apache-2.0
// Attention of several splits of the keys to that of all of them (attention.h has the equation), in
// the order of the splits.
//
// A thread owns four channels of a query and a head; the weights of a row, a few exponentials, are
// made by every thread of it.
// Floor: B L H E (4 splits + itemsize) bytes over the memory bandwidth.
#pragma once
#include "attention/attention.h"
#include "attention/softmax.h"
#include "common/launch.h"
#include "common/vector.h"

namespace reeltime {
namespace attend_sm80 {

constexpr int kCombineThreads = 256;

template <int kThreads>
__global__ void __launch_bounds__(kThreads) combine_kernel(const CombineParams p) {
  const int pieces = p.E / 4;
  const int64_t rows = int64_t{p.B} * p.L * p.H;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= rows * pieces) return;
  const int64_t row = at / pieces, b = row / p.H / p.L;
  const int64_t lse_at = (b * p.H + row % p.H) * p.L + row / p.H % p.L;

  // Of the largest weight 1; a split that saw nothing has none
  float largest = kMinusInfinity, total = 0.0f, sum[4] = {};
#pragma unroll 4
  for (int s = 0; s < p.splits; s++) largest = max(largest, p.part_lse[s * rows + lse_at]);
  const float finite = largest == kMinusInfinity ? 0.0f : largest;
#pragma unroll 4
  for (int s = 0; s < p.splits; s++) {
    const float weight = exp2_approx(kLog2E * (p.part_lse[s * rows + lse_at] - finite));
    const Vector<float> part = load_cached(p.part + (s * rows * pieces + at) * 4);
    total += weight;
#pragma unroll
    for (int e = 0; e < 4; e++) sum[e] = fmaf(weight, part.at[e], sum[e]);
  }
  const float factor = total == 0.0f ? 0.0f : 1.0f / total;
  if (p.lse && at % pieces == 0) p.lse[lse_at] = largest + log2f(total) * kLn2;

#pragma unroll
  for (int e = 0; e < 4; e++) sum[e] *= factor;
  if (p.out_dtype == Dtype::kFloat32) {
    store_vector(static_cast<float*>(p.out) + at * 4,
                 Vector<float>{{sum[0], sum[1], sum[2], sum[3]}});
    return;
  }
  const bool brain = p.out_dtype == Dtype::kBfloat16;
  const uint64_t low = brain ? pack2<bfloat16>(sum[0], sum[1]) : pack2<float16>(sum[0], sum[1]);
  const uint64_t high = brain ? pack2<bfloat16>(sum[2], sum[3]) : pack2<float16>(sum[2], sum[3]);
  static_cast<uint64_t*>(p.out)[at] = high << 32 | low;
}

inline cudaError_t launch_combine(const CombineParams& p, cudaStream_t stream) {
  const int64_t threads = int64_t{p.B} * p.L * p.H * (p.E / 4);
  const dim3 grid(static_cast<unsigned>((threads + kCombineThreads - 1) / kCombineThreads));
  if (threads == 0) return cudaSuccess;
  return launch(combine_kernel<kCombineThreads>, {grid, kCombineThreads}, stream, p);
}

}  // namespace attend_sm80
}  // namespace reeltime
