// SPDX-License-Identifier: Apache-2.0
// attention in 8 bits, over plain tensors and over the cached segments of a stream.
//
//   out = softmax(sm_scale * q k^T + mask) v         lse = log(sum(exp(sm_scale * q k^T + mask)))
//   q.k = q_scale k_scale q_code.k_code + q.mu       v = v_scale v_code
//
// Scales of q and k are per 64 tokens and head, those of v per 64 keys and channel; mu is the mean
// key of each 64, of the whole sequence, or nothing.  Plain tensors are one segment, no table.
//
// Source: SageAttention 2 (arXiv 2411.10958), the mean per block instead of per sequence.
#pragma once
#include "common/dtype.h"

namespace reeltime {

enum class Smooth : int32_t { kNone, kBlock, kSequence };

// What has no output (null) is not encoded.
struct EncodeQkvParams {
  const void* q;   // [B, S_q, H, D] of x_dtype; last dimensions are contiguous
  const void* k;   // [B, S_kv, H_kv, D]
  const void* v;   // [B, S_kv, H_kv, E]
  int8_t* q_code;  // [B, S_q, H, D] contiguous, as all outputs
  float* q_scale;  // [B, ceil(S_q / 64), H]
  int8_t* k_code;  // [B, S_kv, H_kv, D]: (k - mu) / scale
  float* k_scale;  // [B, ceil(S_kv / 64), H_kv]
  void* k_mean;  // kBlock: [B, ceil(S_kv / 64), H_kv, D] of x_dtype; kSequence: [B, H_kv, D] float
  float* partial;  // kSequence: [B, ceil(S_kv / 1024), H_kv, D], between two kernels
  void* v_code;    // [B, S_kv, H_kv, E] float16 or e4m3
  float* v_scale;  // [B, ceil(S_kv / 64), H_kv, E]
  int B, S_q, S_kv, H, H_kv, D, E;  // D and E: multiples of 16 up to 256
  int64_t stride_qb, stride_qs, stride_qh;
  int64_t stride_kb, stride_ks, stride_kh;
  int64_t stride_vb, stride_vs, stride_vh;
  Smooth smooth;
  Dtype x_dtype;  // kFloat32, kBfloat16 or kFloat16
  Dtype v_dtype;  // of v_code: kFloat16 or kE4m3
};

struct AttentionParams {
  const void* q;         // [O, B, L, H, D], for q.mu
  const int8_t* q_code;  // [O, B, L, H, D] contiguous
  const float* q_scale;  // [O, B, ceil(L / 64), H] contiguous
  const int8_t* k;       // [B, slots, N, H_kv, D] codes; strides and address multiples of 16 bytes
  const void* v;         // [B, slots, N, H_kv, E] codes; strides and address multiples of 16 bytes
  const float* k_scale;  // [B, slots, ceil(N / 64), H_kv] contiguous
  const void* k_mean;    // [B, slots, ceil(N / 64), H_kv, D] contiguous; kSequence: [B, H_kv, D]
  const float* v_scale;  // [B, slots, ceil(N / 64), H_kv, E] contiguous, 16-byte aligned
  const void* mask;      // [B, H, L, N] by strides: bool (kInt8) or added; or null
  const int64_t* table;  // [T] slots, negative: absent; or null: one segment, slot 0
  const int64_t* offset_index;  // [T] which q scores that slot, or null: 0
  void* out;                    // [B, L, H, E] contiguous
  float* lse;                   // [B, H, L] contiguous, or null
  int B, L, N, H, H_kv, D, E;   // D and E: multiples of 16 up to 256
  int slots, T;
  int causal;  // query i sees the keys up to i + first_last
  int first_last;
  int64_t stride_qo, stride_qb, stride_ql, stride_qh;
  int64_t stride_kb, stride_ks, stride_kn, stride_kh;
  int64_t stride_vb, stride_vs, stride_vn, stride_vh;
  int64_t stride_mb, stride_mh, stride_ml, stride_mn;
  float sm_scale;
  Smooth smooth;
  Dtype q_dtype, mean_dtype, mask_dtype;
  Dtype v_dtype;    // kFloat16 or kE4m3
  Dtype out_dtype;  // kFloat32, kBfloat16 or kFloat16
};

cudaError_t encode_qkv_sm80(const EncodeQkvParams& params, cudaStream_t stream);
cudaError_t attention_sm80(const AttentionParams& params, cudaStream_t stream);
cudaError_t attention_sm90(const AttentionParams& params, cudaStream_t stream);
bool attention_sm90_serves(const AttentionParams& params);  // otherwise attention_sm80

}  // namespace reeltime
