// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "common/target.h"
#include "mistakes.h"

namespace reeltime {

// y = x, moved as 4-D boxes of [2, 3, 5, 16] 16-bit elements that overhang the edges.
struct BoxParams {
  const uint16_t* x;  // [size[3], size[2], size[1], size[0]], size[0] a multiple of 8
  uint16_t* y;
  int size[4];
  int rank;  // 2 to 4; with less, the outer sizes are 1
};
cudaError_t boxes_sm90(const BoxParams& params, cudaStream_t stream);

// out[r, step] = x[step] for both blocks r of a cluster; each block loads half and multicasts it.
struct MulticastParams {
  const uint8_t* x;  // [steps, 64, 128]
  uint8_t* out;      // [2, steps, 64, 128]
  int steps;
  Mistake mistake;
};
cudaError_t multicast_sm90(const MulticastParams& params, cudaStream_t stream);

}  // namespace reeltime
