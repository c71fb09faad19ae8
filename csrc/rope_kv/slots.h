// SPDX-License-Identifier: Apache-2.0
// rope_kv, summaries of slots: sums of the h and z that write_cache_kernel leaves of blocks.
//
//   slot_h[b, slots[f]] = sum over blocks n, in their order, of h[b, f, n];   slot_z likewise
//
// A thread owns four neighbouring floats of a frame and adds them block after block, so the result
// is the same on every run, and what the slot held before leaves no trace.
// Floor: 4 (nb + 1) D (D + 1) bytes per frame and head, nb = ceil(N / 64).
#pragma once
#include "common/launch.h"
#include "common/vector.h"
#include "rope_kv/rope_kv.h"

namespace reeltime {
namespace rope_kv_sm80 {

constexpr int kSlotThreads = 256;

// Blocks of threads of one frame.
HOST_DEVICE int slot_pieces(const WriteCacheParams& p) {
  const int64_t z_width = int64_t{p.H} * p.D, fours = (z_width * p.D + 3) / 4 + (z_width + 3) / 4;
  return static_cast<int>((fours + kSlotThreads - 1) / kSlotThreads);
}

// Floats from `first` on of [nb, width], added over nb.
template <bool kVectors>
DEVICE void add_blocks(const float* x, float* sum, int64_t first, int64_t width, int nb) {
  if constexpr (kVectors) {
    Vector<float> total{};
#pragma unroll 8
    for (int n = 0; n < nb; n++) {
      const Vector<float> four = load_streaming(x + n * width + first);
#pragma unroll
      for (int e = 0; e < 4; e++) total.at[e] += four.at[e];
    }
    store_vector(sum + first, total);
  } else {
    for (int64_t e = first; e < min(first + 4, width); e++) {
      float total = 0.0f;
#pragma unroll 8
      for (int n = 0; n < nb; n++) total += x[n * width + e];
      sum[e] = total;
    }
  }
}

template <bool kVectors>
__global__ void __launch_bounds__(kSlotThreads)
    add_blocks_kernel(const WriteCacheParams p, const int nb) {
  // Which frame, and which four floats of its h and then of its z.  A slot out of range is nobody's
  // memory
  const int64_t z_width = int64_t{p.H} * p.D, h_width = z_width * p.D;
  const int64_t h_end = (h_width + 3) / 4 * 4;
  const int pieces = slot_pieces(p);
  const int64_t frame = blockIdx.x / pieces, slot = p.slots[frame % p.F * p.stride_s];
  if (slot < 0 || slot >= p.S) return;
  const int64_t to = frame / p.F * p.S + slot;
  const int64_t own = (int64_t{blockIdx.x % pieces} * kSlotThreads + threadIdx.x) * 4;
  if (own < h_end)
    add_blocks<kVectors>(p.h + frame * nb * h_width, p.slot_h + to * h_width, own, h_width, nb);
  else if (own - h_end < z_width)
    add_blocks<kVectors>(p.z + frame * nb * z_width, p.slot_z + to * z_width, own - h_end, z_width,
                         nb);
}

}  // namespace rope_kv_sm80
}  // namespace reeltime
