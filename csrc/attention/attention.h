// SPDX-License-Identifier: Apache-2.0
// attention in 8 bits, over plain tensors and over the cached segments of a stream.
//
//   out = softmax(sm_scale * q k^T + mask) v         lse = log(sum(exp(sm_scale * q k^T + mask)))
//   q.k = q_scale k_scale q_code.k_code + q.mu       v = v_scale v_code
//
// Scales of q and k are per 64 tokens and head, those of v per 64 keys and channel; mu is the mean
// key of each 64, of the whole sequence, or nothing.  Plain tensors are one segment, no table.
//
// With lists, 128 queries see the blocks of 64 keys that their list names: block t ceil(N / 64) + j
// is block j of entry t of the table.  With splits, each of which sees its share of the keys, there
// are an out and an lse of every split, which combine_parts makes one:
//
//   out = sum_s exp(lse_s - lse) out_s           lse = log(sum_s exp(lse_s))
//
// Source: SageAttention 2 (arXiv 2411.10958), the mean per block instead of per sequence;
// SpargeAttention (arXiv 2502.18137) for lists and pv_skip; Flash-Decoding for splits.
#pragma once
#include "common/dtype.h"

namespace reeltime {

enum class Smooth : int32_t { kNone, kBlock, kSequence };

// What has no output (null) is not encoded.
struct EncodeQkvParams {
  const void* q;   // [B, S_q, H, D] of x_dtype; last dimensions are contiguous
  const void* k;   // [B, S_kv, H_kv, D]
  const void* v;   // [B, S_kv, H_kv, E]
  void* q_code;    // [B, S_q, H, D] int8 or e4m3, contiguous, as all outputs
  float* q_scale;  // [B, ceil(S_q / 64), H]
  void* k_code;    // [B, S_kv, H_kv, D]: (k - mu) / scale
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
  Dtype x_dtype;   // kFloat32, kBfloat16 or kFloat16
  Dtype qk_dtype;  // of q_code and k_code: kInt8 or kE4m3
  Dtype v_dtype;   // of v_code: kFloat16 or kE4m3
};

struct AttentionParams {
  const void* q;         // [O, B, L, H, D], for q.mu
  const void* q_code;    // [O, B, L, H, D] int8 or e4m3, contiguous
  const float* q_scale;  // [O, B, ceil(L / 64), H] contiguous
  const void* k;         // [B, slots, N, H_kv, D] codes; strides and address multiples of 16 bytes
  const void* v;         // [B, slots, N, H_kv, E] codes; strides and address multiples of 16 bytes
  const float* k_scale;  // [B, slots, ceil(N / 64), H_kv] contiguous
  const void* k_mean;    // [B, slots, ceil(N / 64), H_kv, D] contiguous; kSequence: [B, H_kv, D]
  const float* v_scale;  // [B, slots, ceil(N / 64), H_kv, E] contiguous, 16-byte aligned
  const void* mask;      // [B, H, L, N] by strides: bool (kInt8) or added; or null
  const int64_t* table;  // [T] slots, negative: absent; or null: one segment, slot 0
  const int64_t* offset_index;  // [T] which q scores that slot, or null: 0
  const int* list_bounds;  // of queries 128 i to 128 i + 127: list_blocks[bounds[0] : bounds[1]],
                           // bounds = list_bounds + (b H + h) stride_list_head + i stride_list_row
  const int* list_blocks;  // [B, H, room] contiguous: blocks of keys, ascending; bounds null: all
  const void* added;       // [B, L, H, E] contiguous, of out_dtype, to add to the result, or null
  void* out;               // [splits, B, L, H, E] contiguous, of splits > 1 float32
  float* lse;              // [splits, B, H, L] contiguous, or null
  int B, L, N, H, H_kv, D, E;  // D and E: multiples of 16 up to 256
  int slots, T;
  int splits;  // of the keys: 1 with lists or `added`
  int room;
  int64_t stride_list_head, stride_list_row;
  int causal;  // query i sees the keys up to i + first_last
  int first_last;
  int64_t stride_qo, stride_qb, stride_ql, stride_qh;
  int64_t stride_kb, stride_ks, stride_kn, stride_kh;
  int64_t stride_vb, stride_vs, stride_vn, stride_vh;
  int64_t stride_mb, stride_mh, stride_ml, stride_mn;
  float sm_scale;
  float pv_skip;  // p v of a block may be left out where all scores of 16 or more queries of a list
                  // lie this far below their maxima so far; infinity: never
  Smooth smooth;
  Dtype q_dtype, mean_dtype, mask_dtype;
  Dtype qk_dtype;   // of q_code and k: kInt8 or kE4m3
  Dtype v_dtype;    // kFloat16 or kE4m3
  Dtype out_dtype;  // kFloat32, kBfloat16 or kFloat16
};

struct CombineParams {
  const float* part;      // [splits, B, L, H, E] contiguous
  const float* part_lse;  // [splits, B, H, L] contiguous
  void* out;              // [B, L, H, E] contiguous
  float* lse;             // [B, H, L] contiguous, or null
  int B, L, H, E, splits;
  Dtype out_dtype;  // kFloat32, kBfloat16 or kFloat16
};

cudaError_t encode_qkv_sm80(const EncodeQkvParams& params, cudaStream_t stream);
cudaError_t attention_sm80(const AttentionParams& params, cudaStream_t stream);
cudaError_t combine_parts_sm80(const CombineParams& params, cudaStream_t stream);
cudaError_t attention_sm90(const AttentionParams& params, cudaStream_t stream);
bool attention_sm90_serves(const AttentionParams& params);  // otherwise attention_sm80

}  // namespace reeltime
