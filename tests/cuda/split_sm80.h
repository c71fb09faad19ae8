// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "common/target.h"
#include "mistakes.h"

namespace reeltime {

enum class Way : int { kPlain, kStreaming, kAsync };  // how partial is read

struct SplitParams {
  const int* x;  // [S, M, 256]
  int* partial;  // [S, M, 256], zero before and after
  int* count;    // [M + 1], zero before and after
  int* out;      // [M, 256]
  int* total;    // [256]
  int* begun;    // [M]
  int M, S;
  Way way;
  Mistake mistake;
};
cudaError_t split_sm80(const SplitParams& params, cudaStream_t stream);

}  // namespace reeltime
