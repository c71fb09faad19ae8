// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "common/target.h"
#include "mistakes.h"

namespace reeltime {

// Four blocks of a cluster hand rows on, each to the next.
struct ExchangeParams {
  const float* x;  // [4, 512]
  float* out;      // [4, 512]: row r is row r - 1 of x, 4 elements to the left
  Mistake mistake;
};
cudaError_t exchange_sm90(const ExchangeParams& params, cudaStream_t stream);

}  // namespace reeltime
