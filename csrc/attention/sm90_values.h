// SPDX-License-Identifier: Apache-2.0
// Values of attention on Hopper, by format: how they lie in shared memory, what probabilities they
// are multiplied by, and whose the products are.
//
//   float16  as TMA leaves them, a row per key: 16-bit wgmma takes B in either direction
//   e4m3     8-bit wgmma takes B by channels only, so each tile is transposed once, for two
//   products
//
// Transposition.  ldmatrix takes pairs of channels for numbers of 16 bits: of 32 keys x 16 channels
// lane 4 c + t gets, of each eight keys, keys 2 t and 2 t + 1 of channels 2 c and 2 c + 1.  Two
// byte permutations make of two such registers four keys of either channel, and stmatrix stores
// them as bytes 4 t to 4 t + 3 of a row.  The rows then hold
//
//   byte 16 h + 4 t + 2 g + e   key 16 h + 8 g + 2 t + e     of every 32 keys
//   row 8 o + c                 channel 2 c + o              of every 16 channels
//
// The first is the order in which accumulators of scores pack to A operands of probabilities: no
// shuffles.  The second makes four channels of a thread's products neighbours.  Below the channels
// lie eight rows of ones: their products are the sums of probabilities as rounded, for 1 / 16 more
// work of tensor cores and none of the others.
#pragma once
#include "attention/softmax.h"
#include "common/barrier.h"
#include "common/ldmatrix.h"
#include "common/stmatrix.h"
#include "common/swizzle.h"
#include "common/wgmma.h"

namespace reeltime {

constexpr int kKeys = 64;  // of a block, which share scales

// Neighbours in memory.
template <class T, int kCount>
struct alignas(kCount * sizeof(T)) Some {
  T at[kCount];
};

// sums[i] of a product: two rows, as in softmax.h, and four channels of every 16:
// sums[8 c + 2 r + {0, 1, 4, 5}] are those of row r.
template <class T, int kE>
struct Values;

template <int kE>
struct Values<float16, kE> {
  static constexpr bool kTransposed = false;
  static constexpr float kTop = 0.0f;  // log2 of the largest probability
  static constexpr int kSums = kE / 2;
  using Probabilities = uint32_t[4][4];  // A operands of 16 keys each

  struct alignas(1024) Tile {
    uint8_t loaded[kE / 64][kKeys * 128];  // 64 channels of every key
  };

  DEVICE static void exponentiate(Probabilities& p, SoftmaxRows& rows, const int32_t (&x)[8][4],
                                  float scale, const float (&bias)[2], const float (&past)[2]) {
    rows.exponentiate(p, x, scale, bias, past);
  }

  DEVICE static void multiply(float (&sums)[kSums], const Probabilities& p, const Tile& tile) {
    const uint64_t first = wgmma_descriptor_transposed(shared_address(tile.loaded), kKeys * 128);
#pragma unroll
    for (int k = 0; k < 4; k++)
      Wgmma<float16, kE, true>::rs(sums, p[k], wgmma_later(first, k * 16 * 128), k > 0);
  }

  DEVICE static void add_total(SoftmaxRows&, const float (&)[kSums], const float (&)[2]) {}
  DEVICE static void finish(SoftmaxRows& rows) { rows.finish(); }

  // In the order of sums.
  DEVICE static void scales_of(float (&scale)[4], const float* v_scale, int c, int t) {
    const auto& low = *reinterpret_cast<const Some<float, 2>*>(v_scale + 16 * c + 2 * t);
    const auto& high = *reinterpret_cast<const Some<float, 2>*>(v_scale + 16 * c + 2 * t + 8);
    scale[0] = low.at[0], scale[1] = low.at[1];
    scale[2] = high.at[0], scale[3] = high.at[1];
  }
  template <class Out>
  DEVICE static void store(Out* row, int c, int t, const float (&y)[4]) {
    using Pair = Some<Out, 2>;
    Out* to = row + 16 * c + 2 * t;
    *reinterpret_cast<Pair*>(to) = {from_float<Out>(y[0]), from_float<Out>(y[1])};
    *reinterpret_cast<Pair*>(to + 8) = {from_float<Out>(y[2]), from_float<Out>(y[3])};
  }
  template <class Out>
  DEVICE static void load(float (&y)[4], const Out* row, int c, int t) {
    const auto& low = *reinterpret_cast<const Some<Out, 2>*>(row + 16 * c + 2 * t);
    const auto& high = *reinterpret_cast<const Some<Out, 2>*>(row + 16 * c + 2 * t + 8);
    y[0] = to_float(low.at[0]), y[1] = to_float(low.at[1]);
    y[2] = to_float(high.at[0]), y[3] = to_float(high.at[1]);
  }
};

template <int kE>
struct Values<e4m3, kE> {
  static constexpr bool kTransposed = true;
  static constexpr float kTop = 8.807354922057604f;  // 448
  static constexpr int kSums = kE / 2 + 4;
  using Probabilities = uint32_t[2][4];  // A operands of 32 keys each

  struct alignas(1024) Tile {
    uint8_t loaded[kKeys * kE];
    alignas(1024) uint8_t turned[(kE + 8) * kKeys];
  };

  DEVICE static void exponentiate(Probabilities& p, SoftmaxRows&, const int32_t (&x)[8][4],
                                  float scale, const float (&bias)[2], const float (&)[2]) {
#pragma unroll
    for (int n = 0; n < 8; n += 2)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        float y[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const float score = SoftmaxRows::as_float(x[n + e / 2][2 * r + e % 2]);
          y[e] = exp2_approx(fmaf(scale, score, bias[r] + kTop));
        }
        p[n / 4][n / 2 % 2 * 2 + r] = pack4<e4m3>(y[0], y[1], y[2], y[3]);
      }
  }

  DEVICE static void multiply(float (&sums)[kSums], const Probabilities& p, const Tile& tile) {
    const uint64_t first = wgmma_descriptor<kKeys>(shared_address(tile.turned));
#pragma unroll
    for (int k = 0; k < 2; k++)
      Wgmma<e4m3, kE + 8>::rs(sums, p[k], wgmma_later(first, k * 32), k > 0);
  }

  DEVICE static void add_total(SoftmaxRows& rows, const float (&sums)[kSums],
                               const float (&past)[2]) {
#pragma unroll
    for (int r = 0; r < 2; r++) rows.total[r] = fmaf(rows.total[r], past[r], sums[kE / 2 + 2 * r]);
  }
  DEVICE static void finish(SoftmaxRows&) {}

  DEVICE static void scales_of(float (&scale)[4], const float* v_scale, int c, int t) {
    const auto& four = *reinterpret_cast<const Some<float, 4>*>(v_scale + 16 * c + 4 * t);
    scale[0] = four.at[0], scale[1] = four.at[2];
    scale[2] = four.at[1], scale[3] = four.at[3];
  }
  template <class Out>
  DEVICE static void store(Out* row, int c, int t, const float (&y)[4]) {
    *reinterpret_cast<Some<Out, 4>*>(row + 16 * c + 4 * t) = {
        from_float<Out>(y[0]), from_float<Out>(y[2]), from_float<Out>(y[1]), from_float<Out>(y[3])};
  }
  template <class Out>
  DEVICE static void load(float (&y)[4], const Out* row, int c, int t) {
    const auto& four = *reinterpret_cast<const Some<Out, 4>*>(row + 16 * c + 4 * t);
    y[0] = to_float(four.at[0]), y[1] = to_float(four.at[2]);
    y[2] = to_float(four.at[1]), y[3] = to_float(four.at[3]);
  }

  // --- The producer's --------------------------------------------------------------------------

  // The rows of ones, by 128 threads, once.
  DEVICE static void write_ones(Tile& tile, int thread) {
    *reinterpret_cast<uint32_t*>(tile.turned + kE * kKeys + 4 * thread) = 0x38383838u;
  }

  // By four warps, each all keys of a quarter of the channels.
  DEVICE static void transpose(Tile& tile, int warp, int lane) {
    const uint32_t from = shared_address(tile.loaded), to = shared_address(tile.turned);
#pragma unroll
    for (int i = 0; i < kE / 64; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int c = warp * (kE / 64) + i;  // of 16 channels
        uint32_t r[4];                       // keys by 8, (2 keys, 2 channels) each
        ldmatrix_x4_transposed(r, from + Swizzle<kE>::chunk(half * 32 + lane, c));
        const uint32_t turned[4] = {
            byte_permute(r[0], r[1], 0x6420), byte_permute(r[2], r[3], 0x6420),
            byte_permute(r[0], r[1], 0x7531), byte_permute(r[2], r[3], 0x7531)};
        const int row = c * 16 + lane / 16 * 8 + lane % 8, chunk = half * 2 + lane / 8 % 2;
        stmatrix_x4(to + Swizzle<kKeys>::chunk(row, chunk), turned);
      }
  }
};

}  // namespace reeltime
