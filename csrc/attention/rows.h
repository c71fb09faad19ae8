// SPDX-License-Identifier: Apache-2.0
// Rows of float32, bfloat16 or float16, as they come; and q.mu, what smoothing takes from scores.
#pragma once
#include "common/dtype.h"
#include "common/mma.h"
#include "common/vector.h"

namespace reeltime {

// Rows of D numbers in memory, D a multiple of eight; what lies outside reads as zero.
struct Rows {
  const char* first;
  int64_t stride;  // bytes
  int count, D;
  Dtype dtype;

  DEVICE bool wide() const {  // 16 bytes at a time
    return (reinterpret_cast<uintptr_t>(first) | static_cast<uintptr_t>(stride)) % 16 == 0;
  }
  DEVICE bool holds(int row, int column) const { return row < count && column < D; }
  DEVICE const char* at(int row, int column) const {
    return first + row * stride + column * size_of(dtype);
  }
};

// From element `start` of an array on; the stride is in elements.
DEVICE Rows make_rows(const void* array, int64_t start, int64_t stride, int count, int D,
                      Dtype dtype) {
  const int size = size_of(dtype);
  return {static_cast<const char*>(array) + start * size, stride * size, count, D, dtype};
}

// Some of these rows, by their numbers; a negative one reads as zeros.
struct ListedRows : Rows {
  const int* numbers;

  DEVICE bool holds(int row, int column) const { return numbers[row] >= 0 && column < D; }
  DEVICE const char* at(int row, int column) const { return Rows::at(numbers[row], column); }
};

template <class R>
DEVICE const uint32_t* words(const R& rows, int row, int column) {
  return reinterpret_cast<const uint32_t*>(rows.at(row, column));
}

// d = 16 rows of q, from `row` on, times 8 rows of mu, from `column` on: an mma accumulator.  Every
// bit counts: by tensor cores where q and mu are of one 16-bit type, whose products are exact in
// float, and by FFMA where not.
DEVICE void multiply_means(float (&d)[4], const Rows& q, const ListedRows& mu, int row,
                           int column) {
  const int group = static_cast<int>(lane_index()) / 4, t = static_cast<int>(lane_index()) % 4;
#pragma unroll
  for (int e = 0; e < 4; e++) d[e] = 0.0f;

  // Lane 4 g + t reads 16 bytes of a row, elements 8 t to 8 t + 7 of 32, where mma wants 2 t,
  // 2 t + 1 and so on; sums do not mind the order, as long as q and mu are read in the same.
  if (q.dtype == mu.dtype && q.dtype != Dtype::kFloat32 && q.wide() && mu.wide()) {
#pragma unroll 2
    for (int i = 8 * t; i - 8 * t < q.D; i += 32) {
      Vector<uint32_t> b{}, upper{}, lower{};
      if (mu.holds(column + group, i)) b = load_cached(words(mu, column + group, i));
      if (q.holds(row + group, i)) upper = load_cached(words(q, row + group, i));
      if (q.holds(row + group + 8, i)) lower = load_cached(words(q, row + group + 8, i));
#pragma unroll
      for (int half = 0; half < 4; half += 2) {
        const uint32_t a[4] = {upper.at[half], lower.at[half], upper.at[half + 1],
                               lower.at[half + 1]};
        if (q.dtype == Dtype::kBfloat16)
          mma_bf16(d, a, b.at[half], b.at[half + 1]);
        else
          mma_f16(d, a, b.at[half], b.at[half + 1]);
      }
    }
    return;
  }
#pragma unroll 4
  for (int i = 0; i < q.D; i++) {
    float x[2], y[2];
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int r = row + group + 8 * e, c = column + 2 * t + e;
      x[e] = q.holds(r, i) ? load_float(q.at(r, i), q.dtype, 0) : 0.0f;
      y[e] = mu.holds(c, i) ? load_float(mu.at(c, i), mu.dtype, 0) : 0.0f;
    }
#pragma unroll
    for (int e = 0; e < 4; e++) d[e] = fmaf(x[e / 2], y[e % 2], d[e]);
  }
}

}  // namespace reeltime
