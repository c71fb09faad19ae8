// SPDX-License-Identifier: Apache-2.0
// gemm_w8a8: per-block W8A8 matrix product with a fused epilogue.
//
//   y[m, n] = sum_kb a_scale[m / bm, kb] * b_scale[n / 128, kb] * sum_{k in kb} a[m, k] * b[n, k]
//   out     = y + bias | gelu_tanh(y + bias) | residual + gate[frame(m)] * (y + bias)
//
// K blocks kb of 128, ragged at the end.  int8 sums are exact inside a block, e4m3 sums float32;
// float32 across blocks.  With out_scale the result is quantised, from the float32 sums, in blocks
// of bm x 128.  Source: Vidu S1, section 2.3.2.
#pragma once
#include "common/dtype.h"

namespace reeltime {

enum class Epilogue : int32_t { kNone, kGelu, kGatedResidual };

struct GemmParams {
  const void* a;         // [M, K] int8 or e4m3, K contiguous; 16-byte aligned, K % 16 == 0
  const void* b;         // [N, K], type of a
  const float* a_scale;  // [ceil(M / bm), ceil(K / 128)], any strides
  const float* b_scale;  // [ceil(N / 128), ceil(K / 128)], any strides
  const void* bias;      // [N] or null
  const void* residual;  // [M, N] or null
  const void* gate;      // [F, N] or null: 1
  void* out;             // [M, N] contiguous
  float* out_scale;      // [ceil(M / bm), ceil(N / 128)] contiguous, or null
  int M, N, K;
  int block_rows;              // bm: 1 or 128
  int frame_rows;              // M / F: frame(m) = m / frame_rows
  int64_t stride_a, stride_b;  // from row to row of a and b, multiples of 16
  int stride_am, stride_ak;    // of a_scale
  int stride_bn, stride_bk;    // of b_scale
  int stride_bias;
  int64_t stride_rm, stride_rn;                  // of residual
  int64_t stride_gf, stride_gn;                  // of gate
  Dtype dtype;                                   // of a and b: kInt8 or kE4m3
  Dtype bias_dtype, residual_dtype, gate_dtype;  // kFloat32, kBfloat16 or kFloat16
  Dtype out_dtype;                               // those, or with out_scale kInt8 or kE4m3
  Epilogue epilogue;
  int processors;  // SMs of the device
};

cudaError_t gemm_w8a8_sm80(const GemmParams& params, cudaStream_t stream);
cudaError_t gemm_w8a8_sm90(const GemmParams& params, cudaStream_t stream);

}  // namespace reeltime
