// SPDX-License-Identifier: Apache-2.0
// A chunk: eight neighbouring channels of one token and head, what a thread holds, as floats.
//
// A kernel for type T moves it in pieces of 16 bytes: D is a multiple of eight, and addresses are
// aligned.  The kernel for Any looks at types as it runs, and moves channel by channel: `inside` of
// them exist, the others are zero.  A chunk that is not there has none inside.
#pragma once
#include <type_traits>

#include "common/convert.h"
#include "common/dtype.h"
#include "common/vector.h"

namespace reeltime {

constexpr int kChunk = 8;

struct Any {};

template <class T>
constexpr bool kWide = !std::is_same_v<T, Any>;

// f(T()); for Any with the type that the launch has chosen, a branch that all threads take alike.
template <class T = Any, class F>
DEVICE void with_type(Dtype dtype, F f) {
  if constexpr (kWide<T>)
    f(T{});
  else if (dtype == Dtype::kBfloat16)
    f(bfloat16{});
  else if (dtype == Dtype::kFloat16)
    f(float16{});
  else
    f(float{});
}

// A chunk of T as it comes, in 32-bit words: of an array of 16-bit numbers the compiler would move
// each by itself.
template <class T>
struct Words {
  static constexpr int kVectors = sizeof(T) == 4 ? 2 : 1;
  Vector<uint32_t> at[kVectors];

  DEVICE void load(const T* from, int inside) {
    const uint32_t* first = reinterpret_cast<const uint32_t*>(from);
#pragma unroll
    for (int j = 0; j < kVectors; j++)
      at[j] = inside > 0 ? load_streaming(first + 4 * j) : Vector<uint32_t>{};
  }
  DEVICE void load_shared(const T* from, int inside) {  // what many tokens or heads read
    const uint32_t* first = reinterpret_cast<const uint32_t*>(from);
#pragma unroll
    for (int j = 0; j < kVectors; j++)
      at[j] = inside > 0 ? load_cached(first + 4 * j) : Vector<uint32_t>{};
  }
  DEVICE void expand(float* x) const {
    constexpr int kPer = 4 / sizeof(T);
#pragma unroll
    for (int e = 0; e < kChunk; e++) {
      const uint32_t word = at[e / kPer / 4].at[e / kPer % 4];
      if constexpr (kPer == 1)
        x[e] = float_of(word);
      else
        x[e] = unpack<T>(word, e % kPer);
    }
  }
};

template <bool kVectors, class T>
DEVICE void load_shared_chunk(float (&x)[kChunk], const T* from, int inside) {
  if constexpr (kVectors) {
    Words<T> words;
    words.load_shared(from, inside);
    words.expand(x);
  } else {
#pragma unroll
    for (int e = 0; e < kChunk; e++) x[e] = e < inside ? to_float(from[e]) : 0.0f;
  }
}

// (a + ib)(cos + i sin), four times.
DEVICE void rotate_chunk(float* x, const float (&turn)[kChunk]) {
#pragma unroll
  for (int e = 0; e < kChunk; e += 2) {
    const float a = x[e], b = x[e + 1];
    x[e] = fmaf(a, turn[e], -(b * turn[e + 1]));
    x[e + 1] = fmaf(a, turn[e + 1], b * turn[e]);
  }
}

// Rounded to T; of int8 within 127.
template <bool kVectors, class T>
DEVICE void store_chunk(T* to, const float* x, int inside) {
  if (inside <= 0) return;
  if constexpr (!kVectors) {
#pragma unroll
    for (int e = 0; e < kChunk; e++)
      if (e < inside) to[e] = from_float<T>(x[e]);
  } else if constexpr (sizeof(T) == 4) {
    store_vector(to, Vector<float>{{x[0], x[1], x[2], x[3]}});
    store_vector(to + 4, Vector<float>{{x[4], x[5], x[6], x[7]}});
  } else if constexpr (sizeof(T) == 2) {
    store_vector(reinterpret_cast<uint32_t*>(to),
                 Vector<uint32_t>{{pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]),
                                   pack2<T>(x[6], x[7])}});
  } else {
    *reinterpret_cast<uint64_t*>(to) =
        pack4<T>(x[0], x[1], x[2], x[3]) | uint64_t{pack4<T>(x[4], x[5], x[6], x[7])} << 32;
  }
}

}  // namespace reeltime
