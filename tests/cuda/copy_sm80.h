// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "common/target.h"
#include "mistakes.h"

namespace reeltime {

struct CopyParams {
  const uint8_t* x;  // [tiles, 2048]
  uint8_t* y;        // [tiles, 2048]
  int tiles;
  Mistake mistake;
};
cudaError_t copy_sm80(const CopyParams& params, cudaStream_t stream);

}  // namespace reeltime
