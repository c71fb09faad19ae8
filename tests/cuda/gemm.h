// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "common/target.h"
#include "mistakes.h"

namespace reeltime {

// out[m, n] = sum_k a[m, k] * b[n, k], exact.  K a multiple of 16; any M and N, on sm90 N % 4 == 0.
struct GemmParams {
  const int8_t* a;  // [M, K]
  const int8_t* b;  // [N, K]
  int32_t* out;     // [M, N]
  int M, N, K;
  Mistake mistake;
};
cudaError_t gemm_sm80(const GemmParams& params, cudaStream_t stream);
cudaError_t gemm_sm90(const GemmParams& params, cudaStream_t stream);

}  // namespace reeltime
