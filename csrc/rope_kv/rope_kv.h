// SPDX-License-Identifier: Apache-2.0
// rope_kv: queries and keys normed and rotated; keys and values written once into the cache.
//
//   y = rotate(heads(x / sqrt(mean(x^2) + eps) * weight) * sm_scale, table)
//
// The mean is over all H * D channels of a token.  rotate: pairs (2i, 2i + 1) as complex numbers,
// times (cos, sin).  Blocks are 64 tokens, ragged at the end of a frame or of the queries.
// Source: Vidu S1, section 2.3.1.
#pragma once
#include "common/dtype.h"

namespace reeltime {

enum class Phi : int32_t { kSoftmax, kElu, kRelu };

// Of a query per offset, or of raw keys.
struct RotateRowsParams {
  const void* x;       // [B, T, N, H, D], any strides
  const void* weight;  // [H * D] contiguous, or null: no norm
  const float* table;  // [O, T * N, D] contiguous pairs (cos, sin), or null: no rotation
  void* out;           // [O, B, T, N, H, D] of x's dtype, contiguous
  int B, T, N, H, D, O;
  int64_t stride_xb, stride_xt, stride_xn, stride_xh, stride_xd;
  int64_t stride_to, stride_tl;
  float eps, sm_scale;
  Dtype dtype, weight_dtype;  // kFloat32, kBfloat16 or kFloat16, as all those below
};

struct QueryInt8Params {
  const void* q;       // [B, L, H * D], channels contiguous
  const void* weight;  // [H * D] contiguous, or null: no norm
  const float* table;  // [O, L, D] contiguous pairs (cos, sin), or null: no rotation
  float* inverse;      // [B, L], 1 / rms, between two kernels; null without weight
  void* out;           // [O, B, L, H, D] of q's dtype, contiguous
  int8_t* code;        // [O, B, L, H, D] contiguous: out / scale
  float* scale;        // [O, B, ceil(L / 64), H] contiguous
  int B, L, H, D, O;   // D <= 256
  int64_t stride_qb, stride_ql;
  int64_t stride_to, stride_tl;
  float eps, sm_scale;
  Dtype dtype, weight_dtype;
  int processors;  // SMs of the device
};

// What k_scale, k_mean, v_scale, h, z, slot_h and slot_z lack (null) is not made.  With k_scale the
// cache is INT8; with slot_h, h and z are workspaces, of frames [B, F, ...] and not of slots.
struct WriteCacheParams {
  const void* k;         // [B, F * N, H * D], channels contiguous
  const void* v;         // [B, F * N, H * D], channels contiguous
  const void* weight;    // [H * D] contiguous, or null: no norm
  const float* table;    // [F * N, D] contiguous pairs (cos, sin), or null: no rotation
  const int64_t* slots;  // [F]; a frame whose slot is not in [0, S) is left out
  float* inverse;        // [B, F * N], 1 / rms of k, between two kernels; null without weight
  void* cache_k;         // [B, S, N, H, D] keys, or with k_scale int8 (key - mean) / scale
  void* cache_v;         // [B, S, N, H, D] values, or with v_scale e4m3 or float16, v / scale
  float* k_scale;        // [B, S, ceil(N / 64), H]
  void* k_mean;          // [B, S, ceil(N / 64), H, D]
  float* v_scale;        // [B, S, ceil(N / 64), H, D]
  float* h;              // [B, S, ceil(N / 64), H, D, D]: phi(K)^T V
  float* z;              // [B, S, ceil(N / 64), H, D]: sum of phi(K)
  float* slot_h;         // [B, S, H, D, D]: h summed over the blocks of a slot
  float* slot_z;         // [B, S, H, D]
  int B, F, N, H, D, S;  // D <= 256
  int64_t stride_kb, stride_kl, stride_vb, stride_vl;
  int64_t stride_tl, stride_s;
  float eps;
  Phi phi;
  Dtype k_dtype, v_dtype, weight_dtype;
  Dtype cache_k_dtype, cache_v_dtype, mean_dtype;
  int processors;
};

cudaError_t rotate_rows_sm80(const RotateRowsParams& params, cudaStream_t stream);
cudaError_t query_int8_sm80(const QueryInt8Params& params, cudaStream_t stream);
cudaError_t write_cache_sm80(const WriteCacheParams& params, cudaStream_t stream);

}  // namespace reeltime
