// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "common/target.h"

namespace reeltime {

enum class Number : int { kInt8, kE4m3, kFloat16, kBfloat16, kE4m3HalfSums };

// One warp: d = a * b^T by mma.sync, and four 8x8 matrices of 16 bits there and back.
struct FragmentParams {
  const uint8_t* a;          // [16, 32 bytes]
  const uint8_t* b;          // [8, 32 bytes]
  uint32_t* d;               // [16, 8] int32 or float
  const uint16_t* matrices;  // [4, 8, 8]
  uint16_t* transposed;      // [4, 8, 8], each transposed: ldmatrix.trans, stmatrix
  uint16_t* again;  // [4, 8, 8], each as it was: ldmatrix, ldmatrix.x2, stmatrix.trans twice
  Number type;
};
cudaError_t fragments_sm90(const FragmentParams& params, cudaStream_t stream);

// One warpgroup: d = a * b^T by wgmma, K 128 bytes.
struct WgmmaParams {
  const uint8_t* a;  // [64, 128 bytes]
  const uint8_t* b;  // [N, 128 bytes], or with transposed_b [64, N] of 16 bits
  uint32_t* d;       // [64, N] int32 or float
  int N;
  Number type;
  int a_in_registers, transposed_b;
};
cudaError_t wgmma_sm90(const WgmmaParams& params, cudaStream_t stream);

}  // namespace reeltime
