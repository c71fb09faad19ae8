// SPDX-License-Identifier: Apache-2.0
// sla on every architecture: the entry points.
#include "sla/linear.h"
#include "sla/mask.h"
#include "sla/pool.h"

namespace reeltime {

// --- Mask ----------------------------------------------------------------------------------------

cudaError_t pool_blocks_sm80(const PoolBlocksParams& p, cudaStream_t stream) {
  using namespace sla_sm80;
  if (p.O == 0 || p.B == 0 || p.S == 0 || p.H == 0 || p.D == 0) return cudaSuccess;
  if (p.D % 16 || p.D > kWidest || p.block < 1 || !is_float(p.dtype)) return cudaErrorInvalidValue;
  if (p.code && (!p.scale || p.block % attend_sm80::kScaleRows)) return cudaErrorInvalidValue;
  if (p.D <= 64) return launch_pool<8>(p, stream);
  if (p.D <= 128) return launch_pool<16>(p, stream);
  return launch_pool<32>(p, stream);
}

cudaError_t choose_blocks_sm80(const ChooseBlocksParams& p, cudaStream_t stream) {
  using namespace sla_sm80;
  if (p.B == 0 || p.rows == 0 || p.H == 0) return cudaSuccess;
  const int64_t n = int64_t{p.T} * p.per_slot;
  if (n < 1 || n >= kMostBlocks || n * p.rows > 0x7fffffff || (!p.keys && n > kMostShared) ||
      p.D > kWidest || p.H_kv < 1 || !is_float(p.q_dtype) || !is_float(p.k_dtype))
    return cudaErrorInvalidValue;
  const int64_t strides = p.stride_kb | p.stride_ks | p.stride_kn | p.stride_kh;
  if (p.D % kChunk || strides * size_of(p.k_dtype) % 16 || reinterpret_cast<uintptr_t>(p.k) % 16)
    return launch_choose<Any>(p, stream);
  if (p.k_dtype == Dtype::kBfloat16) return launch_choose<bfloat16>(p, stream);
  if (p.k_dtype == Dtype::kFloat16) return launch_choose<float16>(p, stream);
  return launch_choose<float>(p, stream);
}

cudaError_t compress_codes_sm80(const CompressCodesParams& p, cudaStream_t stream) {
  if (p.heads == 0 || p.rows == 0) return cudaSuccess;
  if (int64_t{p.rows} * p.n > 0x7fffffff || p.capacity > p.n) return cudaErrorInvalidValue;
  const int64_t rows = 2 * int64_t{p.heads} * p.rows;
  return sla_sm80::launch_rows(sla_sm80::compress_kernel, p, rows, stream);
}

cudaError_t expand_lists_sm80(const ExpandListsParams& p, cudaStream_t stream) {
  const int64_t rows = int64_t{p.B} * p.H * p.rows;
  if (rows == 0 || p.n == 0) return cudaSuccess;
  return sla_sm80::launch_rows(sla_sm80::expand_kernel, p, rows, stream);
}

cudaError_t sum_summaries_sm80(const SumSummariesParams& p, cudaStream_t stream) {
  return sla_sm80::launch_sum(p, stream);
}
cudaError_t summarise_keys_sm80(const SummariseKeysParams& p, cudaStream_t stream) {
  return sla_sm80::launch_summarise(p, stream);
}
cudaError_t project_sums_sm80(const ProjectSumsParams& p, cudaStream_t stream) {
  return sla_sm80::launch_project(p, stream);
}
cudaError_t linear_rows_sm80(const LinearParams& p, cudaStream_t stream) {
  return sla_sm80::launch_linear(p, stream);
}

}  // namespace reeltime
