// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "common/types.h"

namespace reeltime {

// Every conversion, of n floats (a multiple of four) and of every bit pattern.
struct ConvertParams {
  const float* x;  // [n]
  uint8_t* to_e4m3;
  uint16_t* to_float16;
  uint16_t* to_bfloat16;
  int8_t* to_int8;
  uint32_t* four_e4m3;     // [n / 4]
  uint32_t* four_int8;     // [n / 4]
  uint32_t* two_float16;   // [n / 2]
  uint32_t* two_bfloat16;  // [n / 2]
  float* exp2;             // [n], of x clamped to [-126, 0]
  float* exp2_by_fma;      // [n]
  float* of_e4m3;          // [65536], of the low byte
  float* of_float16;       // [65536]
  float* of_bfloat16;      // [65536]
  float* of_sum;           // [65536], of the biased sums 64 * i - 2^21
  int n;
};
cudaError_t convert(const ConvertParams& params, cudaStream_t stream);

}  // namespace reeltime
