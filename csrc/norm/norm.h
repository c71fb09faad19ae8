// SPDX-License-Identifier: Apache-2.0
// norm: LayerNorm or RMSNorm with per-frame modulation, fused with the gated residual before it.
//
//   x_new = x + gate[frame] * h                                   with h, rounded as it is stored
//   y     = (norm(x_new) * weight + bias) * (1 + scale[frame]) + shift[frame]
//
// Token l is of frame l / (L / F).  Statistics are float32.  With y_scale the result is quantised,
// from the float32 y, in blocks of bm x 128.  Source: Peebles and Xie, arXiv 2212.09748 (adaLN).
#pragma once
#include "common/dtype.h"

namespace reeltime {

enum class NormKind : int32_t { kLayer, kRms };

struct NormParams {
  const void* x;       // [B, L, C], C contiguous
  const void* h;       // [B, L, C] of x's dtype, C contiguous, or null
  const void* gate;    // [B, F, C] or null: 1
  const void* weight;  // [C] or null: 1
  const void* bias;    // [C] or null: 0
  const void* scale;   // [B, F, C] or null: 0
  const void* shift;   // [B, F, C] or null: 0
  void* x_new;         // [B, L, C] of x's dtype, contiguous; null without h
  void* y;             // [B, L, C] contiguous
  float* y_scale;      // [ceil(B L / bm), ceil(C / 128)] contiguous, or null
  float* statistics;   // [B L, 2] scratch: mean, 1 / sigma, where one kernel does not suffice
  int B, L, C;
  int block_rows;                         // bm: 1 or 128
  int gate_rows, scale_rows, shift_rows;  // tokens of a frame of each, L / F
  int segment_rows;                       // tokens that share all of them: divides each, and L
  int64_t stride_xb, stride_xl;
  int64_t stride_hb, stride_hl;
  int64_t stride_wc, stride_bc;             // of weight, bias
  int64_t stride_gb, stride_gf, stride_gc;  // of gate
  int64_t stride_cb, stride_cf, stride_cc;  // of scale
  int64_t stride_sb, stride_sf, stride_sc;  // of shift
  float eps;
  NormKind kind;
  Dtype x_dtype;  // kFloat32, kBfloat16 or kFloat16, as those of the next line
  Dtype gate_dtype, weight_dtype, bias_dtype, scale_dtype, shift_dtype;
  Dtype y_dtype;     // x_dtype, or with y_scale kInt8 or kE4m3
  int processors;    // SMs of the device
  int shared_limit;  // bytes of shared memory that a block may use
};

cudaError_t normalise_sm80(const NormParams& params, cudaStream_t stream);

}  // namespace reeltime
