// SPDX-License-Identifier: Apache-2.0
// What the kernels of norm do with a piece of a row: kSize neighbouring columns.
//
// A piece is 16 bytes of x, Vector<T>::kSize columns, where every tensor of the launch has its rows
// in such pieces, aligned; otherwise it is one column.  It lies inside of the row or outside:
// outside, zeros are read and nothing is written.
#pragma once
#include <type_traits>

#include "common/encode.h"
#include "common/vector.h"
#include "norm/norm.h"

namespace reeltime {
namespace norm_sm80 {

// NOTE: words, because the compiler gives 16-bit elements of a struct a register each.
template <class T, int kSize>
using Piece = std::conditional_t<kSize == 1, T, Vector<uint32_t>>;

template <class T, int kSize>
DEVICE void widen(const Piece<T, kSize>& from, float (&to)[kSize]) {
#pragma unroll
  for (int e = 0; e < kSize; e++) {
    if constexpr (kSize == 1)
      to[e] = to_float(from);
    else if constexpr (sizeof(T) == 4)
      to[e] = float_of(from.at[e]);
    else
      to[e] = unpack<T>(from.at[e / 2], e % 2);
  }
}

template <class T, int kSize>
DEVICE Piece<T, kSize> narrow(const float (&from)[kSize]) {
  if constexpr (kSize == 1) {
    return from_float<T>(from[0]);
  } else {
    Piece<T, kSize> to;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if constexpr (sizeof(T) == 4)
        to.at[i] = bits_of(from[i]);
      else
        to.at[i] = pack2<T>(from[2 * i], from[2 * i + 1]);
    }
    return to;
  }
}

// --- x, h, x_new and y ---------------------------------------------------------------------------

template <class T>
DEVICE const T* row_of(const void* array, int64_t stride_b, int64_t stride_l, int batch,
                       int token) {
  return static_cast<const T*>(array) + batch * stride_b + token * stride_l;
}

template <int kSize, class T>
DEVICE Piece<T, kSize> load_piece(const T* from, bool inside) {
  Piece<T, kSize> piece{};
  if (inside) {
    if constexpr (kSize == 1)
      piece = *from;
    else
      piece = load_streaming(reinterpret_cast<const uint32_t*>(from));
  }
  return piece;
}

template <int kSize, class T>
DEVICE void store_piece(T* to, bool inside, const Piece<T, kSize>& piece) {
  if (inside) {
    if constexpr (kSize == 1)
      *to = piece;
    else
      store_vector(reinterpret_cast<uint32_t*>(to), piece);
  }
}

// x + gate * h as T stores it, which it stores.
template <class T, int kSize>
DEVICE void add_residual(T* x_new, bool inside, const Piece<T, kSize>& h,
                         const float (&gate)[kSize], float (&x)[kSize]) {
  float residual[kSize];
  widen<T>(h, residual);
#pragma unroll
  for (int e = 0; e < kSize; e++) x[e] = fmaf(gate[e], residual[e], x[e]);
  const Piece<T, kSize> stored = narrow<T>(x);
  store_piece<kSize>(x_new, inside, stored);
  widen<T>(stored, x);
}

// x - mean; outside of the row zeros stay zeros.
template <int kSize>
DEVICE void subtract(float (&x)[kSize], float mean, bool inside) {
  const float centre = inside ? mean : 0.0f;
#pragma unroll
  for (int e = 0; e < kSize; e++) x[e] -= centre;
}

// --- Sums ---------------------------------------------------------------------------------------

template <int kSize>
DEVICE float sum_of(const float (&x)[kSize]) {
  float sum = x[0];
#pragma unroll
  for (int e = 1; e < kSize; e++) sum += x[e];
  return sum;
}

template <int kSize>
DEVICE float squares_of(const float (&x)[kSize]) {
  float sum = x[0] * x[0];
#pragma unroll
  for (int e = 1; e < kSize; e++) sum = fmaf(x[e], x[e], sum);
  return sum;
}

// --- y in 8 bits ---------------------------------------------------------------------------------

// The largest magnitude, NaN if one is.
template <int kSize>
DEVICE float amax_of(const float (&y)[kSize], bool inside) {
  float amax = 0.0f;
#pragma unroll
  for (int e = 0; e < kSize; e++) amax = max_magnitude(amax, y[e]);
  return inside ? amax : 0.0f;
}

struct Larger {
  DEVICE float operator()(float a, float b) const { return max_magnitude(a, b); }
};

DEVICE float limit_of(const NormParams& p) {
  return p.y_dtype == Dtype::kInt8 ? kLimit<int8_t> : kLimit<e4m3>;
}

DEVICE uint32_t codes_of(const NormParams& p, float a, float b, float c, float d) {
  return p.y_dtype == Dtype::kInt8 ? pack4<int8_t>(a, b, c, d) : pack4<e4m3>(a, b, c, d);
}

// NOTE: the column must lie inside of the row.
template <int kSize>
DEVICE void store_codes(const NormParams& p, int64_t row, int column, const Divisor& by,
                        float (&y)[kSize]) {
  encode_block(y, by, limit_of(p));
  uint8_t* to = static_cast<uint8_t*>(p.y) + row * p.C + column;
  if constexpr (kSize == 1) {
    *to = static_cast<uint8_t>(codes_of(p, y[0], 0.0f, 0.0f, 0.0f));
  } else {
    struct alignas(kSize) {
      uint32_t at[kSize / 4];
    } codes;
#pragma unroll
    for (int i = 0; i < kSize; i += 4)
      codes.at[i / 4] = codes_of(p, y[i], y[i + 1], y[i + 2], y[i + 3]);
    *reinterpret_cast<decltype(codes)*>(to) = codes;
  }
}

// --- gate, weight, bias, scale and shift ---------------------------------------------------------

// In float32; they have a dtype each, as pieces of one column also a stride.
template <int kSize>
DEVICE void load_columns(float (&to)[kSize], const void* array, Dtype dtype, int64_t start,
                         int64_t stride, int column, bool inside) {
  if (!inside) {
#pragma unroll
    for (int e = 0; e < kSize; e++) to[e] = 0.0f;
  } else if constexpr (kSize == 1) {
    to[0] = load_float(array, dtype, start + column * stride);
  } else if (dtype == Dtype::kFloat32) {
    const float* from = static_cast<const float*>(array) + start + column;
#pragma unroll
    for (int i = 0; i < kSize; i += 4) {
      const Vector<float> four = load_cached(from + i);
#pragma unroll
      for (int e = 0; e < 4; e++) to[i + e] = four.at[e];
    }
  } else {
    struct alignas(2 * kSize) Pairs {
      uint32_t at[kSize / 2];
    };
    const uint16_t* from = static_cast<const uint16_t*>(array) + start + column;
    const Pairs pairs = *reinterpret_cast<const Pairs*>(from);
#pragma unroll
    for (int e = 0; e < kSize; e++)
      to[e] = dtype == Dtype::kBfloat16 ? unpack<bfloat16>(pairs.at[e / 2], e % 2)
                                        : unpack<float16>(pairs.at[e / 2], e % 2);
  }
}

template <int kSize>
DEVICE void load_gate(const NormParams& p, int batch, int token, int column, bool inside,
                      float (&gate)[kSize]) {
  const int64_t frame = batch * p.stride_gb + token / p.gate_rows * p.stride_gf;
  load_columns(gate, p.gate, p.gate_dtype, frame, p.stride_gc, column, inside);
}

// y = gain * norm(x) + offset in a token's frame.  NOTE: two kernels ask, and must get the same
// bits: what is added to a product is added by fmaf, not as the compiler likes.
template <int kSize>
DEVICE void load_modulation(const NormParams& p, int batch, int token, int column, bool inside,
                            float (&gain)[kSize], float (&offset)[kSize]) {
  float factor[kSize];  // 1 + scale
#pragma unroll
  for (int e = 0; e < kSize; e++) gain[e] = 1.0f, factor[e] = offset[e] = 0.0f;
  if (p.scale) {
    const int64_t frame = batch * p.stride_cb + token / p.scale_rows * p.stride_cf;
    load_columns(factor, p.scale, p.scale_dtype, frame, p.stride_cc, column, inside);
  }
#pragma unroll
  for (int e = 0; e < kSize; e++) factor[e] += 1.0f;
  if (p.shift) {
    const int64_t frame = batch * p.stride_sb + token / p.shift_rows * p.stride_sf;
    load_columns(offset, p.shift, p.shift_dtype, frame, p.stride_sc, column, inside);
  }
  if (p.bias) {
    float bias[kSize];
    load_columns(bias, p.bias, p.bias_dtype, 0, p.stride_bc, column, inside);
#pragma unroll
    for (int e = 0; e < kSize; e++) offset[e] = fmaf(bias[e], factor[e], offset[e]);
  }
  if (p.weight) load_columns(gain, p.weight, p.weight_dtype, 0, p.stride_wc, column, inside);
#pragma unroll
  for (int e = 0; e < kSize; e++) gain[e] *= factor[e];
}

HOST_DEVICE bool is_modulated(const NormParams& p) {
  return p.weight || p.bias || p.scale || p.shift;
}

// Four columns in 16 bytes of shared memory; `table` begins at this thread's.  No bank is asked
// twice.
template <int kSize>
DEVICE void put(Vector<float>* table, int slot, const float (&from)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; i += 4) {
    const Vector<float> four{{from[i], from[i + 1], from[i + 2], from[i + 3]}};
    memcpy(&table[(slot + i / 4) * blockDim.x], &four, 16);
  }
}
template <int kSize>
DEVICE void get(const Vector<float>* table, int slot, float (&to)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; i += 4) {
    Vector<float> four;
    memcpy(&four, &table[(slot + i / 4) * blockDim.x], 16);
#pragma unroll
    for (int e = 0; e < 4; e++) to[i + e] = four.at[e];
  }
}

// --- On the host ---------------------------------------------------------------------------------

// Whether every tensor has its rows in aligned pieces of `size` columns.
inline bool is_aligned(const NormParams& p, int size) {
  uint64_t off = 0;  // a low bit for every misfit
  const auto row = [&](const void* array, Dtype dtype, int64_t stride_b, int64_t stride_row) {
    const int64_t strides = (p.B > 1 ? stride_b : 0) | stride_row;
    if (array) off |= reinterpret_cast<uintptr_t>(array) | strides * size_of(dtype);
  };
  const auto frame = [&](const void* array, Dtype dtype, int64_t stride_b, int64_t stride_f,
                         int64_t stride_c, int rows) {
    row(array, dtype, stride_b, rows < p.L ? stride_f : 0);
    if (array && stride_c != 1) off |= 1;
  };
  row(p.x, p.x_dtype, p.stride_xb, p.L > 1 ? p.stride_xl : 0);
  row(p.h, p.x_dtype, p.stride_hb, p.L > 1 ? p.stride_hl : 0);
  row(p.x_new, p.x_dtype, 0, 0);
  row(p.y, p.y_dtype, 0, 0);
  frame(p.weight, p.weight_dtype, 0, 0, p.stride_wc, p.L);
  frame(p.bias, p.bias_dtype, 0, 0, p.stride_bc, p.L);
  frame(p.gate, p.gate_dtype, p.stride_gb, p.stride_gf, p.stride_gc, p.gate_rows);
  frame(p.scale, p.scale_dtype, p.stride_cb, p.stride_cf, p.stride_cc, p.scale_rows);
  frame(p.shift, p.shift_dtype, p.stride_sb, p.stride_sf, p.stride_sc, p.shift_rows);
  return p.C % size == 0 && off % 16 == 0;
}

}  // namespace norm_sm80
}  // namespace reeltime
