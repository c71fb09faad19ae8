// SPDX-License-Identifier: Apache-2.0
// Every number format through mma.sync, and matrices through ldmatrix and stmatrix, both ways.
#include "common/barrier.h"
#include "common/convert.h"
#include "common/launch.h"
#include "common/ldmatrix.h"
#include "common/mma.h"
#include "common/stmatrix.h"
#include "common/vector.h"
#include "fragments.h"

namespace reeltime {
namespace {

struct SharedStorage {
  alignas(16) uint8_t a[16][32], b[8][32];
  alignas(16) uint16_t in[4][8][8], out[4][8][8];
};

DEVICE void store(uint32_t* d, const int32_t (&acc)[4], int i) {
  d[i] = static_cast<uint32_t>(acc[i]);
}
DEVICE void store(uint32_t* d, const float (&acc)[4], int i) { d[i] = bits_of(acc[i]); }

template <class Sum, class Multiply>
DEVICE void multiply(const FragmentParams& p, const SharedStorage& shared, Multiply mma) {
  const int lane = static_cast<int>(lane_index());
  uint32_t a[4], b[2];
  ldmatrix_x4(a, shared_address(&shared.a[lane % 16][lane / 16 * 16]));
  ldmatrix_x2(b, shared_address(&shared.b[lane % 8][lane / 8 % 2 * 16]));
  Sum acc[4] = {0, 0, 0, 0};
  mma(acc, a, b[0], b[1]);
  uint32_t bits[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    store(bits, acc, i);
    p.d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = bits[i];
  }
}

__global__ void fragments_kernel(const FragmentParams p) {
  auto& shared = shared_storage<SharedStorage>();
  const int lane = static_cast<int>(lane_index());
  auto copy_in = [&](void* to, const void* from) {
    const auto v = load_cached(static_cast<const uint8_t*>(from) + lane * 16);
    memcpy(static_cast<uint8_t*>(to) + lane * 16, &v, 16);
  };
  copy_in(shared.a, p.a);
  if (lane < 16) copy_in(shared.b, p.b);
  copy_in(shared.in, p.matrices);
  sync_warp();

  // d = a * b^T
  using F = float[4];
  using I = int32_t[4];
  using A = const uint32_t[4];
  switch (p.type) {
    case Number::kInt8:
      multiply<int32_t>(p, shared,
                        [](I& d, A& a, uint32_t b0, uint32_t b1) { mma_s8(d, a, b0, b1); });
      break;
    case Number::kE4m3:
      multiply<float>(p, shared,
                      [](F& d, A& a, uint32_t b0, uint32_t b1) { mma_e4m3(d, a, b0, b1); });
      break;
    case Number::kFloat16:
      multiply<float>(p, shared,
                      [](F& d, A& a, uint32_t b0, uint32_t b1) { mma_f16(d, a, b0, b1); });
      break;
    case Number::kBfloat16:
      multiply<float>(p, shared,
                      [](F& d, A& a, uint32_t b0, uint32_t b1) { mma_bf16(d, a, b0, b1); });
      break;
    case Number::kE4m3HalfSums:
      multiply<float>(p, shared, [](F& d, A& a, uint32_t b0, uint32_t b1) {
        uint32_t sums[2] = {0, 0};
        mma_e4m3_half(sums, a, b0, b1);
#pragma unroll
        for (int i = 0; i < 4; i++) d[i] = unpack<float16>(sums[i / 2], i % 2);
      });
      break;
  }

  // Transposed on the way in
  uint32_t r[4];
  const uint32_t in = shared_address(&shared.in[lane / 8][lane % 8]);
  const uint32_t out = shared_address(&shared.out[lane / 8][lane % 8]);
  ldmatrix_x4_transposed(r, in);
  stmatrix_x4(out, r);
  sync_warp();
#pragma unroll
  for (int i = 0; i < 8; i++) p.transposed[lane * 8 + i] = (&shared.out[0][0][0])[lane * 8 + i];
  sync_warp();

  // Transposed in and out; the last two matrices in two loads of two
  uint32_t low[2];
  ldmatrix_x2_transposed(low, shared_address(&shared.in[2 + lane / 8 % 2][lane % 8]));
  r[2] = low[0];
  r[3] = low[1];
  stmatrix_x4_transposed(out, r);
  sync_warp();
#pragma unroll
  for (int i = 0; i < 8; i++) p.again[lane * 8 + i] = (&shared.out[0][0][0])[lane * 8 + i];
}

}  // namespace

cudaError_t fragments_sm90(const FragmentParams& p, cudaStream_t stream) {
  return launch(fragments_kernel, {dim3(1), 32, sizeof(SharedStorage)}, stream, p);
}

}  // namespace reeltime
