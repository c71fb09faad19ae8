// SPDX-License-Identifier: Apache-2.0
// Element types that a launch chooses: of operands that are read or written once per element, where
// a branch that all threads take alike costs less than one compiled kernel per combination.
//
// NOTE: python/reeltime/native.py has the same numbers.
#pragma once
#include "common/target.h"
#if !defined(REELTIME_BINDING)
#include "common/convert.h"
#endif

namespace reeltime {

enum class Dtype : int32_t { kFloat32, kBfloat16, kFloat16, kInt8, kE4m3 };

HOST_DEVICE constexpr int size_of(Dtype dtype) {
  return dtype == Dtype::kFloat32 ? 4 : dtype == Dtype::kInt8 || dtype == Dtype::kE4m3 ? 1 : 2;
}

#if !defined(REELTIME_BINDING)
// Element `index` of an array of float32, bfloat16 or float16.
DEVICE float load_float(const void* array, Dtype dtype, int64_t index) {
  if (dtype == Dtype::kBfloat16) return to_float(static_cast<const bfloat16*>(array)[index]);
  if (dtype == Dtype::kFloat16) return to_float(static_cast<const float16*>(array)[index]);
  return static_cast<const float*>(array)[index];
}
#endif

}  // namespace reeltime
