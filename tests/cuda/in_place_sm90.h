// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "common/target.h"
#include "mistakes.h"

namespace reeltime {

struct InPlaceParams {
  int* y;          // [tiles, 32, 32], one is added
  int* note;       // [tiles]: the tile's number
  int* neighbour;  // [tiles]: the note of the other tile of its pair
  int tiles;       // even
  Mistake mistake;
};
cudaError_t in_place_sm90(const InPlaceParams& params, cudaStream_t stream);

}  // namespace reeltime
