// SPDX-License-Identifier: Apache-2.0
// rope_kv, one head of 64 tokens: who owns what, statistics of a channel, and h = phi(K)^T V.
//
// A thread owns a chunk of four tokens, 16 apart.  Statistics over tokens meet in shared memory,
// those over channels in a shuffle.
#pragma once
#include "common/approx.h"
#include "common/convert.h"
#include "common/encode.h"
#include "common/ldmatrix.h"
#include "common/mma.h"
#include "common/reduce.h"
#include "rope_kv/chunk.h"
#include "rope_kv/rope_kv.h"

namespace reeltime {
namespace rope_kv_sm80 {

constexpr int kTokens = 64;  // of a block

// kLanes: threads that share a token, a power of two so that shuffles find them.
template <int kLanes>
struct Config {
  static constexpr int kSpan = 16;               // tokens side by side
  static constexpr int kRows = kTokens / kSpan;  // of a thread
  static constexpr int kCount = kRows * kChunk;  // its channels of all of them
  static constexpr int kThreads = kSpan * kLanes, kWarps = kThreads / 32;
  static constexpr int kColumns = kLanes * kChunk;                // D is at most that
  static constexpr int kSlice = kColumns < 128 ? kColumns : 128;  // channels of a tile
  static constexpr int kRowBytes = 2 * kSlice, kTileBytes = kTokens * kRowBytes;
  static_assert(kRowBytes % 128 == 0, "the swizzle exchanges eight chunks of 16 bytes");
};

// One value per channel has a slot: the lower halves of all chunks, then the upper ones, so that
// neighbouring lanes meet neighbouring banks.
template <int kLanes>
struct Statistics {
  using C = Config<kLanes>;
  float sum[C::kWarps][C::kColumns], peak[C::kWarps][C::kColumns];
  float mean[C::kColumns], scale[C::kColumns], inverse[C::kColumns];
};

// A float is the sum of three bfloat16, a float16 of two: one tile [64][kSlice] of each term, a
// token after the other, its 16-byte chunks swizzled.
constexpr int kTerms = 3;
template <class T>
HOST_DEVICE int terms_of(Dtype dtype) {
  if constexpr (kWide<T>)
    return std::is_same_v<T, bfloat16> ? 1 : std::is_same_v<T, float16> ? 2 : 3;
  return dtype == Dtype::kBfloat16 ? 1 : dtype == Dtype::kFloat16 ? 2 : 3;
}

template <int kLanes>
struct Tiles {
  unsigned char phi[kTerms][Config<kLanes>::kTileBytes];
  unsigned char v[kTerms][Config<kLanes>::kTileBytes];
};

struct MaxMagnitude {
  DEVICE float operator()(float a, float b) const { return max_magnitude(a, b); }
};

// --- Ownership -----------------------------------------------------------------------------------

// The chunk of a thread, in its tokens row, row + 16, ...
template <int kLanes>
struct Owner {
  using C = Config<kLanes>;
  int row, column, inside, count;  // count: tokens of the block

  DEVICE Owner(int thread, int D, int count) : count(count) {
    row = thread / kLanes;
    column = thread % kLanes * kChunk;
    inside = min(max(D - column, 0), kChunk);
  }
  DEVICE int token(int i) const { return row + i * C::kSpan; }
  DEVICE int inside_of(int i) const { return token(i) < count ? inside : 0; }
  // Of its chunk in a block of tokens.  NOTE: of a signed one the compiler keeps 64-bit products.
  DEVICE uint32_t offset(int i, int64_t stride) const {
    return static_cast<uint32_t>(token(i)) * static_cast<uint32_t>(stride) +
           static_cast<uint32_t>(column);
  }

  template <class T, class X>
  DEVICE void store(X* block, const float (&x)[C::kCount], int64_t stride) const {
#pragma unroll
    for (int i = 0; i < C::kRows; i++)
      store_chunk<kWide<T>>(block + offset(i, stride), x + i * kChunk, inside_of(i));
  }
};

// The thread's chunks of a block of tokens that begins at element `first`.  Those of 16 bits are on
// their way as soon as it is made and stay packed; wider ones would take too many registers, and
// come each time they are read.
template <int kLanes, class T>
struct Incoming {
  const Owner<kLanes>& me;
  const void* array;
  Dtype dtype;
  int64_t first, stride;
  Words<T> words[Config<kLanes>::kRows];

  DEVICE Incoming(const Owner<kLanes>& me, const void* array, Dtype dtype, int64_t first,
                  int64_t stride)
      : me(me), array(array), dtype(dtype), first(first), stride(stride) {
    if constexpr (sizeof(T) == 2)
#pragma unroll
      for (int i = 0; i < Config<kLanes>::kRows; i++) words[i] = load(i);
  }
  DEVICE Words<T> load(int i) const {
    Words<T> row;
    row.load(static_cast<const T*>(array) + first + me.offset(i, stride), me.inside_of(i));
    return row;
  }
  DEVICE void read(int i, float* x) const {
    if constexpr (sizeof(T) == 2) words[i].expand(x);
    if constexpr (sizeof(T) == 4) load(i).expand(x);
    if constexpr (!kWide<T>) {
#pragma unroll
      for (int e = 0; e < kChunk; e++) {
        x[e] = 0.0f;
        if (e < me.inside_of(i)) x[e] = load_float(array, dtype, first + me.offset(i, stride) + e);
      }
    }
  }
};

// x times the factor of each token and the weight of each channel, rotated by the table's rows.
template <int kLanes, class T, class Params>
DEVICE void norm_and_rotate(float (&x)[Config<kLanes>::kCount], const Params& p,
                            const float (&factor)[Config<kLanes>::kRows], const float* table,
                            int channel, const Owner<kLanes>& me) {
  using C = Config<kLanes>;
#pragma unroll
  for (int j = 0; j < C::kCount; j++) x[j] *= factor[j / kChunk];
  if (p.weight)
    with_type(p.weight_dtype, [&](auto type) {
      float weight[kChunk];
      const auto* from = static_cast<const decltype(type)*>(p.weight) + channel + me.column;
      load_shared_chunk<kWide<T>>(weight, from, me.inside);
#pragma unroll
      for (int j = 0; j < C::kCount; j++) x[j] *= weight[j % kChunk];
    });
  if (table)
#pragma unroll
    for (int i = 0; i < C::kRows; i++) {
      float turn[kChunk];
      const float* from = table + me.offset(i, p.stride_tl);
      load_shared_chunk<kWide<T>>(turn, from, me.inside_of(i));
      rotate_chunk(x + i * kChunk, turn);
    }
}

// --- Statistics of a channel ---------------------------------------------------------------------

// This warp's part of a reduction over tokens; x is that of the thread.
template <int kLanes, class Op>
DEVICE void leave_partial(float (&x)[kChunk], float (&partial)[Config<kLanes>::kColumns], Op op) {
#pragma unroll
  for (int distance = kLanes; distance < 32; distance *= 2)
#pragma unroll
    for (int e = 0; e < kChunk; e++) x[e] = op(x[e], shuffle_xor(x[e], distance));
  const int lane = static_cast<int>(lane_index());
  if (lane >= kLanes) return;
#pragma unroll
  for (int half = 0; half < 2; half++)
    *reinterpret_cast<Vector<float>*>(partial + (half * kLanes + lane) * 4) = {
        {x[half * 4], x[half * 4 + 1], x[half * 4 + 2], x[half * 4 + 3]}};
}

// And the whole of it, for the slot of this thread.
template <int kLanes, class Op>
DEVICE float combine(const float (&partial)[Config<kLanes>::kWarps][Config<kLanes>::kColumns],
                     Op op) {
  float x = partial[0][threadIdx.x];
#pragma unroll
  for (int warp = 1; warp < Config<kLanes>::kWarps; warp++) x = op(x, partial[warp][threadIdx.x]);
  return x;
}

template <int kLanes>
DEVICE int channel_of(int slot) {
  return slot / 4 % kLanes * kChunk + slot / (4 * kLanes) * 4 + slot % 4;
}

// The slots of this thread's channels.
template <int kLanes>
DEVICE void read_slots(float (&x)[kChunk], const float (&from)[Config<kLanes>::kColumns]) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const auto four = *reinterpret_cast<const Vector<float>*>(from + (half * kLanes + lane) * 4);
#pragma unroll
    for (int e = 0; e < 4; e++) x[half * 4 + e] = four.at[e];
  }
}

// v / scale of a chunk, in place: encode_block with a scale per channel, and inverses that others
// have computed.
DEVICE void encode_values(float (&v)[kChunk], const float (&scale)[kChunk],
                          const float (&inverse)[kChunk], float limit) {
  bool plain = true;
#pragma unroll
  for (int e = 0; e < kChunk; e++) plain &= scale[e] >= 1e-18f;  // neither lifted nor NaN
  if (plain) {
#pragma unroll
    for (int e = 0; e < kChunk; e++) {
      const float y = v[e] * inverse[e];
      v[e] = fmaf(fmaf(-y, scale[e], v[e]), inverse[e], y);
    }
  } else {
#pragma unroll
    for (int e = 0; e < kChunk; e++) {
      const float y = Divisor(scale[e], inverse[e]).divide(v[e]);
      v[e] = y == y ? min(max(y, -limit), limit) : 0.0f;
    }
  }
}

// --- Summaries -----------------------------------------------------------------------------------

// phi of a chunk, in place; a head's lanes meet for softmax.
template <int kLanes>
DEVICE void feature_map(float (&x)[kChunk], Phi phi, int inside) {
  if (phi == Phi::kSoftmax) {
    const float none = -float_of(0x7f800000u);
    float top = none, sum = 0.0f;
#pragma unroll
    for (int e = 0; e < kChunk; e++) {
      x[e] = e < inside ? x[e] : none;
      top = max(top, x[e]);
    }
    top = warp_reduce<kLanes>(top, Max());
#pragma unroll
    for (int e = 0; e < kChunk; e++) sum += x[e] = exp2_approx((x[e] - top) * kLog2E);
    const float inverse = reciprocal_approx(warp_reduce<kLanes>(sum, Sum()));
#pragma unroll
    for (int e = 0; e < kChunk; e++) x[e] *= inverse;
  } else {
    const bool elu = phi == Phi::kElu;
#pragma unroll
    for (int e = 0; e < kChunk; e++)
      x[e] = x[e] <= 0.0f ? (elu ? exp2_approx(x[e] * kLog2E) : 0.0f) : elu ? x[e] + 1.0f : x[e];
  }
}

// Byte of a 16-byte chunk of a token in a tile.  The chunk's index is xor-ed with the token's, so
// that ldmatrix finds eight tokens in eight groups of banks.
template <int kRowBytes>
DEVICE uint32_t tile_byte(int token, int chunk) {
  return static_cast<uint32_t>(token * kRowBytes + ((chunk ^ token % 8) << 4));
}

// Where in v's tile the channels 16 g + 4 t + 2 part + {0, 1} of t = 0 ... 3 lie: they are columns
// 2 t + {0, 1} of a product.  So the sums that a lane gets of both parts are four neighbours of h.
template <int kRowBytes>
DEVICE int value_chunk(int g, int part) {
  return kRowBytes == 128 ? 2 * g + part : g + part * (kRowBytes / 32);
}

// phi of the thread's keys into its tiles, as 16-byte chunk `chunk` if they have it; zero past the
// last token.
template <int kLanes>
DEVICE void store_features(Tiles<kLanes>& tiles, const float (&k)[Config<kLanes>::kCount], Phi phi,
                           int chunk, const Owner<kLanes>& me) {
  using C = Config<kLanes>;
#pragma unroll
  for (int i = 0; i < C::kRows; i++) {
    float x[kChunk];
#pragma unroll
    for (int e = 0; e < kChunk; e++) x[e] = k[i * kChunk + e];
    feature_map<kLanes>(x, phi, me.inside);
#pragma unroll
    for (int e = 0; e < kChunk; e++) x[e] = me.token(i) < me.count ? x[e] : 0.0f;
    if (chunk < 0 || chunk >= C::kSlice / kChunk) continue;
#pragma unroll
    for (int term = 0; term < kTerms; term++)
      *reinterpret_cast<Vector<uint32_t>*>(tiles.phi[term] +
                                           tile_byte<C::kRowBytes>(me.token(i), chunk)) = {
          {take_term(x[0], x[1]), take_term(x[2], x[3]), take_term(x[4], x[5]),
           take_term(x[6], x[7])}};
  }
}

// A chunk of values into the first tiles of v.
template <int kLanes>
DEVICE void store_values(Tiles<kLanes>& tiles, float (&v)[kChunk], int token, int chunk,
                         int terms) {
  using C = Config<kLanes>;
  if (chunk < 0 || chunk >= C::kSlice / kChunk) return;
#pragma unroll
  for (int term = 0; term < kTerms; term++)
#pragma unroll
    for (int part = 0; part < 2; part++) {
      if (term >= terms) continue;
      float* x = v + 2 * part;
      const int to = value_chunk<C::kRowBytes>(chunk / 2, part);
      const uint32_t byte = tile_byte<C::kRowBytes>(token, to) + chunk % 2 * 8;
      *reinterpret_cast<uint64_t*>(tiles.v[term] + byte) =
          take_term(x[0], x[1]) | uint64_t{take_term(x[4], x[5])} << 32;
    }
}

// h[d, e] = sum_n phi[n, d] v[n, e] of one slice of each, [rows, columns], a warp 16 x 64 at a
// time, and if z is not null z[d] = sum_n phi[n, d], as of one more column of v, of ones.  Both
// operands lie token by token: ldmatrix transposes them.  Of two terms, s and t, products with s +
// t > 2 are below 2^-24 and left out.
template <int kLanes, bool kVectors>
DEVICE void multiply_tiles(const Tiles<kLanes>& tiles, float* h, float* z, int D, int rows,
                           int columns, int tokens, int terms) {
  using C = Config<kLanes>;
  constexpr int kGroups = 4;               // of 16 columns
  constexpr uint32_t kOnes = 0x3f803f80u;  // two bfloat16
  const uint32_t phi = shared_address(tiles.phi), v = shared_address(tiles.v);
  const int lane = static_cast<int>(lane_index());
  const int strips = ceil_div(rows, 16), units = strips * ceil_div(columns, 16 * kGroups);
  for (int unit = static_cast<int>(warp_index()); unit < units; unit += C::kWarps) {
    const int d0 = unit % strips * 16, e0 = unit / strips * 16 * kGroups;
    const bool with_z = z && e0 == 0;
    float sum[kGroups][2][4] = {}, ones[4] = {};  // (16 columns, part, fragment)
    for (int n = 0; n < tokens; n += 16) {
      const uint32_t a_at =
          phi + tile_byte<C::kRowBytes>(n + lane / 16 * 8 + lane % 8, d0 / 8 + lane / 8 % 2);
      uint32_t a[kTerms][4];
#pragma unroll
      for (int term = kTerms - 1; term >= 0; term--) {
        ldmatrix_x4_transposed(a[term], a_at + term * C::kTileBytes);
        if (with_z) mma_bf16(ones, a[term], kOnes, kOnes);
      }
#pragma unroll
      for (int g = 0; g < kGroups; g++) {
        if (e0 + g * 16 >= columns) continue;
        const int chunk = value_chunk<C::kRowBytes>(e0 / 16 + g, lane / 16);
        const uint32_t b_at = v + tile_byte<C::kRowBytes>(n + lane % 16, chunk);
#pragma unroll
        for (int term = kTerms - 1; term >= 0; term--) {  // the smallest first
          if (term >= terms) continue;
          uint32_t b[4];
          ldmatrix_x4_transposed(b, b_at + term * C::kTileBytes);
#pragma unroll
          for (int other = kTerms - 1 - term; other >= 0; other--) {
            mma_bf16(sum[g][0], a[other], b[0], b[1]);
            mma_bf16(sum[g][1], a[other], b[2], b[3]);
          }
        }
      }
    }

    // Rows lane / 4 and eight further, columns 4 * (lane % 4) ... + 3 of each group
#pragma unroll
    for (int below = 0; below < 2; below++) {
      const int d = d0 + lane / 4 + below * 8;
      if (d >= rows) continue;
      if (with_z && lane % 4 == 0) z[d] = ones[2 * below];
#pragma unroll
      for (int g = 0; g < kGroups; g++) {
        const int e = e0 + g * 16 + lane % 4 * 4;
        const auto &left = sum[g][0], &right = sum[g][1];
        const Vector<float> four{
            {left[2 * below], left[2 * below + 1], right[2 * below], right[2 * below + 1]}};
        if constexpr (kVectors) {
          if (e < columns) store_vector(h + d * D + e, four);
        } else {
#pragma unroll
          for (int i = 0; i < 4; i++)
            if (e + i < columns) h[d * D + e + i] = four.at[i];
        }
      }
    }
  }
}

}  // namespace rope_kv_sm80
}  // namespace reeltime
