// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "common/target.h"
#include "mistakes.h"

namespace reeltime {

struct ReduceParams {
  const float* x;  // [M, N]
  float* sum;      // [M]
  float* largest;  // [M]
  int* positive;   // [M, 2]: by warps 0 and 2, by warps 1 and 3
  int* histogram;  // [M, 4]: x < -1, x < 0, x < 1, others
  int* totals;     // [4], of all rows; zero before
  int M, N;
  Mistake mistake;
};
cudaError_t reduce_rows(const ReduceParams& params, cudaStream_t stream);

}  // namespace reeltime
