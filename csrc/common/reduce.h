// SPDX-License-Identifier: Apache-2.0
// Shuffles, and sums and maxima over a warp or a block.
//
// A shuffle moves registers and orders nothing in memory.  Reductions are butterflies: after
// log2(width) steps every lane holds the result, and all lanes the same bits.
#pragma once
#include "common/barrier.h"

namespace reeltime {

// The value of lane (lane ^ distance).
template <class T>
DEVICE T shuffle_xor(T value, int distance, unsigned mask = kFullWarp) {
#if REELTIME_EMULATED
  emulator::shuffle("shfl.sync.bfly", mask, &value, sizeof(T), lane_index() ^ distance);
  return value;
#else
  return __shfl_xor_sync(mask, value, distance);
#endif
}

// The value of one lane.
template <class T>
DEVICE T shuffle(T value, int source_lane, unsigned mask = kFullWarp) {
#if REELTIME_EMULATED
  emulator::shuffle("shfl.sync.idx", mask, &value, sizeof(T), source_lane % 32);
  return value;
#else
  return __shfl_sync(mask, value, source_lane);
#endif
}

// One bit per lane.
DEVICE unsigned ballot(bool predicate, unsigned mask = kFullWarp) {
#if REELTIME_EMULATED
  return emulator::ballot(mask, predicate);
#else
  return __ballot_sync(mask, predicate);
#endif
}

// Of a ballot's lanes, at least one, the first.
DEVICE int first_lane(unsigned lanes) {
#if REELTIME_EMULATED
  return __builtin_ctz(lanes);
#else
  return __ffs(static_cast<int>(lanes)) - 1;
#endif
}

DEVICE int count_bits(unsigned bits) {
#if REELTIME_EMULATED
  return __builtin_popcount(bits);
#else
  return __popc(bits);
#endif
}

// The largest of three: one instruction from sm_90 on.
DEVICE int32_t max3(int32_t a, int32_t b, int32_t c) {
#if REELTIME_EMULATED
  return max(a, max(b, c));
#else
  return __vimax3_s32(a, b, c);
#endif
}

struct Sum {
  template <class T>
  DEVICE T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {
  template <class T>
  DEVICE T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};

// Over groups of kWidth neighbouring lanes; 4 is a row of an mma accumulator.
template <int kWidth = 32, class T, class Op>
DEVICE T warp_reduce(T value, Op op) {
  static_assert(kWidth >= 1 && kWidth <= 32 && (kWidth & (kWidth - 1)) == 0, "");
#pragma unroll
  for (int distance = kWidth / 2; distance > 0; distance /= 2)
    value = op(value, shuffle_xor(value, distance));
  return value;
}

// Over the block, `scratch` in shared memory holding one T per warp.  All threads get the result,
// in the same order of summation. NOTE: scratch may be reused only after the next barrier.
template <int kWarps, class T, class Op>
DEVICE T block_reduce(T value, T* scratch, Op op) {
  static_assert(kWarps >= 1 && kWarps <= 32, "");
  value = warp_reduce(value, op);
  if (kWarps == 1) return value;
  if (lane_index() == 0) scratch[warp_index()] = value;
  sync_block();
  value = scratch[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; warp++) value = op(value, scratch[warp]);
  return value;
}

}  // namespace reeltime
