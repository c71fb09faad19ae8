// SPDX-License-Identifier: Apache-2.0
// quant: dynamic per-block quantisation, and back.
//
//   scale[i, j] = amax(block i, j of x) / limit       code = round(x / scale)
//
// with blocks of bm x 128, ragged at the edges; the arithmetic is that of common/encode.h.
// Source: Vidu S1, section 2.3.2.
#pragma once
#include "common/dtype.h"

namespace reeltime {

struct QuantizeParams {
  const void* x;   // [M, K] float32, bfloat16 or float16, K contiguous
  void* xq;        // [M, K] int8 or e4m3, contiguous
  float* x_scale;  // [ceil(M / bm), ceil(K / 128)] contiguous
  int M, K;
  int64_t stride_xm;
  int block_rows;  // bm: 1 or 128
  Dtype x_dtype, dtype;
};

struct DequantizeParams {
  const void* xq;        // [M, K] int8 or e4m3, any strides
  const float* x_scale;  // [ceil(M / bm), ceil(K / 128)], any strides
  void* x;               // [M, K] float32, bfloat16 or float16, contiguous
  int M, K;
  int64_t stride_qm, stride_qk, stride_sm, stride_sk;
  int block_rows;
  Dtype dtype, x_dtype;
};

cudaError_t quantize_sm80(const QuantizeParams& params, cudaStream_t stream);
cudaError_t dequantize_sm80(const DequantizeParams& params, cudaStream_t stream);

}  // namespace reeltime
