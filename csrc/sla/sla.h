// SPDX-License-Identifier: Apache-2.0
// sla: block-sparse attention over the blocks that matter, linear attention over the rest.
//
//   mask:    means of blocks of tokens, their scores, the blocks that every query block attends to
//   linear:  h = phi(K)^T V and z = sum of phi(K) of key blocks, their sums H and Z for every query
//            block, H W^T, and out = phi(q) H / (phi(q) Z + eps) + bias
//
// Key blocks are numbered through the segments: block j is block j % per_slot of the slot that
// entry j / per_slot of the table names; n = T per_slot.  Plain tensors are one segment, no table.
// Source: SLA (arXiv 2509.24006), SpargeAttention (arXiv 2502.18137).
#pragma once
#include "common/dtype.h"
#include "rope_kv/rope_kv.h"

namespace reeltime {

// Of each block of tokens:  mean = mean(x_i)   similar = mean over pairs cos(x_i, x_j) > similarity
struct PoolBlocksParams {
  const void* x;      // [O, B, S, H, D] of dtype, D contiguous
  float* mean;        // [O, B, ceil(S / block), H, D] contiguous, as all outputs
  uint8_t* similar;   // [O, B, ceil(S / block), H], or null
  int8_t* code;       // [O, B, S, H, D]: x / scale, then block is a multiple of 64; or null
  float* scale;       // [O, B, ceil(S / 64), H]
  int O, B, S, H, D;  // D: multiple of 16 up to 256
  int block;          // tokens
  int64_t stride_xo, stride_xb, stride_xs, stride_xh;
  float similarity;
  Dtype dtype;  // kFloat32, kBfloat16 or kFloat16
};

// score = sm_scale q k^T of pooled q and k; selected: the topk blocks of a row, and the fewest
// whose softmax sums to topp; marginal: neither selected nor in the lowest share.  Ties: the lower
// block.
struct ChooseBlocksParams {
  const void* q;                // [O, B, rows, H, D] of q_dtype, D contiguous
  const void* k;                // [B, slots, per_slot, H_kv, D] of k_dtype, D contiguous
  const uint8_t* similar_q;     // [B, rows, H] by strides, or null; 0: the row selects every block
  const uint8_t* similar_k;     // [B, n, H_kv] by strides, or null; 0: selected, but not ranked
  const int64_t* table;         // [T] slots, negative: absent; or null: one segment, slot 0
  const int64_t* offset_index;  // [T] which q scores that slot, or null: 0
  uint32_t* keys;  // [B, H, rows, n] between two phases of the kernel; null if n <= kMostShared
  int8_t* code;    // [B, H, rows, n]: 0 absent, 1 selected, 2 marginal, 3 negligible; or null
  int* bounds;     // [B, H, rows, 2]: blocks[b, h, bounds[0] : bounds[1]] are those of a row
  int* blocks;     // [B, H, rows * capacity]: selected, ascending, from i * capacity on; or null
  int* count;      // [2, B, H, rows]: selected, marginal; or null
  int O, B, rows, H, H_kv, D, T, per_slot;  // D <= 256
  int capacity;                             // the most blocks that a row can select
  int topk;                                 // 1 to n
  float topp;                               // 0: none
  float negligible;
  float sm_scale;
  int64_t stride_qo, stride_qb, stride_qn, stride_qh;
  int64_t stride_kb, stride_ks, stride_kn, stride_kh;
  int64_t stride_gb, stride_gn, stride_gh;  // similar_q
  int64_t stride_lb, stride_ln, stride_lh;  // similar_k
  Dtype q_dtype, k_dtype;                   // kFloat32, kBfloat16 or kFloat16
};

// Codes to the CSR of the selected and that of the marginal blocks; -1 after the last block.
struct CompressCodesParams {
  const int8_t* code;     // [B, H, rows, n] contiguous
  const int* count;       // [2, B, H, rows]
  int* selected_indptr;   // [B, H, rows + 1]
  int* selected_indices;  // [B, H, rows * capacity], ascending in a row
  int* marginal_indptr;   // [B, H, rows + 1]
  int* marginal_indices;  // [B, H, rows * n]
  int heads, rows, n;     // heads: B H
  int capacity;
};

// And back: a CSR to codes, 1 where a block is listed and 0 elsewhere.
struct ExpandListsParams {
  const int* indptr;   // [B, H, rows + 1] by strides
  const int* indices;  // [B, H, room] by strides
  int8_t* code;        // [B, H, rows, n] contiguous
  int B, H, rows, n, room;
  int64_t stride_pb, stride_ph, stride_pn;
  int64_t stride_ib, stride_ih, stride_in;
};

// --- Linear branch -------------------------------------------------------------------------------

// H = sum_j h_j and Z = sum_j z_j over the blocks j that entries of one offset name: all of them,
// or those whose code is covered, for each row of `code`.  rows of a key head: those of all its
// query heads, one after the other.
struct SumSummariesParams {
  const float* h;               // [B, slots, per_slot, H, D, E] contiguous, 16-byte aligned
  const float* z;               // [B, slots, per_slot, H, D] contiguous, 16-byte aligned
  const int8_t* code;           // [B, H, rows, n] contiguous, or null: all
  const int64_t* table;         // [T] slots, negative: absent; or null: one segment, slot 0
  const int64_t* offset_index;  // [T] or null: 0
  void* sum_h;   // [O, B, H, rows, D, E] float32 or, with terms, [.., terms, D, E] bfloat16
  float* sum_z;  // [O, B, H, rows, D]
  int B, slots, per_slot, H, rows, D, E, T, O;  // D and E: multiples of 16 up to 256
  int covered;                                  // bit c: blocks of code c are summed
  int terms;  // of sum_h, each the nearest bfloat16 to what the ones before it left; 0: float32
};

// h = phi(K)^T V and z = sum of phi(K) of every `run` keys.
struct SummariseKeysParams {
  const void* k;      // [B, S, H, D] of dtype; D, E contiguous, rows 16-byte aligned
  const void* v;      // [B, S, H, E] of dtype
  float* h;           // [B, ceil(S / run), H, D, E] contiguous
  float* z;           // [B, ceil(S / run), H, D] contiguous
  int B, S, H, D, E;  // D and E: multiples of 16 up to 256
  int run;
  int64_t stride_kb, stride_ks, stride_kh;
  int64_t stride_vb, stride_vs, stride_vh;
  Phi phi;
  Dtype dtype;  // kFloat32, kBfloat16 or kFloat16
};

// out = x W^T of matrices x [D, K].
struct ProjectSumsParams {
  const float* x;      // [matrices, D, K] contiguous, 16-byte aligned
  const void* weight;  // [N, K] of weight_dtype, by strides
  void* out;           // [matrices, D, N] float32 or, with terms, [matrices, terms, D, N] bfloat16
  int matrices, D, K, N;  // D, K and N: multiples of 16 up to 256
  int terms;
  int64_t stride_wn, stride_wk;
  Dtype weight_dtype;  // kFloat32, kBfloat16 or kFloat16
  int processors;
};

// out = sum_o phi(q_o) H_o / (sum_o phi(q_o) Z_o + eps) + bias; 0 if no slot of a table is present
struct LinearParams {
  const void* q;         // [O, B, L, H, D] of dtype; D contiguous, rows 16-byte aligned
  const void* h;         // [O, B, H_sum, rows, terms, D, E] bfloat16 contiguous: terms_of(dtype)
  const float* z;        // [O, B, H_sum, rows, D] contiguous
  const void* bias;      // [E] of bias_dtype contiguous, or null
  const int64_t* table;  // [T] slots, negative: absent; or null: there are keys
  void* out;             // [B, L, H, E] of dtype contiguous
  int T;
  int O, B, L, H, H_sum, rows, D, E;  // H % H_sum == 0; rows: one, or one per block_q queries
  int block_q;
  int64_t stride_qo, stride_qb, stride_ql, stride_qh;
  float eps;
  Phi phi;
  Dtype dtype, bias_dtype;  // kFloat32, kBfloat16 or kFloat16
};

cudaError_t pool_blocks_sm80(const PoolBlocksParams& params, cudaStream_t stream);
cudaError_t choose_blocks_sm80(const ChooseBlocksParams& params, cudaStream_t stream);
cudaError_t compress_codes_sm80(const CompressCodesParams& params, cudaStream_t stream);
cudaError_t expand_lists_sm80(const ExpandListsParams& params, cudaStream_t stream);
cudaError_t sum_summaries_sm80(const SumSummariesParams& params, cudaStream_t stream);
cudaError_t summarise_keys_sm80(const SummariseKeysParams& params, cudaStream_t stream);
cudaError_t project_sums_sm80(const ProjectSumsParams& params, cudaStream_t stream);
cudaError_t linear_rows_sm80(const LinearParams& params, cudaStream_t stream);

}  // namespace reeltime
