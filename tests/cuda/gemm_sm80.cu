// SPDX-License-Identifier: Apache-2.0
// int8 GEMM on mma.sync: a block computes 64 x 64, four warps 32 x 32 each, K in steps of 64.
//
// Tiles of A and B: 64 rows of 64 bytes, swizzled, three stages of cp.async.  Rows and columns past
// the end are zeros in shared memory and are not stored.
#include "common/barrier.h"
#include "common/convert.h"
#include "common/cp_async.h"
#include "common/launch.h"
#include "common/ldmatrix.h"
#include "common/mma.h"
#include "common/swizzle.h"
#include "gemm.h"

namespace reeltime {
namespace {

struct Config {
  static constexpr int kThreads = 128;
  static constexpr int kBlock = 64;  // M and N
  static constexpr int kBlockK = 64;
  static constexpr int kStages = 3;
};
using Layout = Swizzle<Config::kBlockK>;

struct SharedStorage {
  struct alignas(512) {  // the swizzle's period
    int8_t a[Config::kBlock * Config::kBlockK], b[Config::kBlock * Config::kBlockK];
  } stage[Config::kStages];
};

__global__ void __launch_bounds__(Config::kThreads) gemm_kernel(const GemmParams p) {
  constexpr int kStages = Config::kStages, kBlock = Config::kBlock;
  auto& shared = shared_storage<SharedStorage>();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int m0 = static_cast<int>(blockIdx.y) * kBlock, n0 = static_cast<int>(blockIdx.x) * kBlock;
  const int warp_m = warp % 2 * 32, warp_n = warp / 2 * 32;
  const int steps = ceil_div(p.K, Config::kBlockK);

  auto fetch = [&](int step) {
    if (step < steps) {
      auto& stage = shared.stage[step % kStages];
#pragma unroll
      for (int i = 0; i < 4; i++) {  // 2 tiles x 64 rows x 4 chunks
        const bool is_a = i < 2;
        const int row = i % 2 * 32 + thread / 4, chunk = thread % 4;
        const int k = step * Config::kBlockK + chunk * 16, global = (is_a ? m0 : n0) + row;
        const bool valid = global < (is_a ? p.M : p.N) && k < p.K;
        const int8_t* from = (is_a ? p.a : p.b) + (valid ? int64_t{global} * p.K + k : 0);
        const bool skipped = p.mistake == Mistake::kUninitialised && !is_a && row == 40;
        if (!skipped)
          cp_async(shared_address(is_a ? stage.a : stage.b) + Layout::chunk(row, chunk), from,
                   valid);
      }
    }
    cp_async_commit();
  };

  int32_t acc[2][4][4];  // (rows of 16, columns of 8, fragment)
#pragma unroll
  for (int i = 0; i < 32; i++) acc[i / 16][i / 4 % 4][i % 4] = kIntBias;

  for (int step = 0; step < kStages - 1; step++) fetch(step);
  for (int step = 0; step < steps; step++) {
    // Wait for this step's tiles
    if (p.mistake == Mistake::kShallowWait)
      cp_async_wait<kStages - 1>();
    else if (p.mistake != Mistake::kMissingWait)
      cp_async_wait<kStages - 2>();
    if (p.mistake != Mistake::kMissingBarrier) sync_block();
    fetch(step + kStages - 1);

    // Multiply 32 bytes of K at a time
    const uint32_t a_tile = shared_address(shared.stage[step % kStages].a);
    const uint32_t b_tile = shared_address(shared.stage[step % kStages].b);
#pragma unroll
    for (int k = 0; k < Config::kBlockK / 32; k++) {
      uint32_t a[2][4], b[2][4];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        uint32_t row = a_tile + Layout::chunk(warp_m + i * 16 + lane % 16, k * 2 + lane / 16);
        if (p.mistake == Mistake::kMisaligned && lane == 6) row += 4;
        ldmatrix_x4(a[i], row);
        const int n = warp_n + i * 16 + lane % 8 + lane / 16 * 8;
        ldmatrix_x4(b[i], b_tile + Layout::chunk(n, k * 2 + lane / 8 % 2));
      }
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
          mma_s8(acc[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
  }

  // Store what lies inside
#pragma unroll
  for (int i = 0; i < 32; i++) {
    const int m = m0 + warp_m + i / 16 * 16 + lane / 4 + i % 4 / 2 * 8;
    const int n = n0 + warp_n + i / 4 % 4 * 8 + lane % 4 * 2 + i % 2;
    const bool inside = m < p.M && n < p.N;
    if (inside || p.mistake == Mistake::kGlobalOverrunPlain)
      p.out[int64_t{m} * p.N + n] = acc[i / 16][i / 4 % 4][i % 4] - kIntBias;
  }
}

}  // namespace

cudaError_t gemm_sm80(const GemmParams& p, cudaStream_t stream) {
  const dim3 grid(ceil_div(p.N, Config::kBlock), ceil_div(p.M, Config::kBlock));
  return launch(gemm_kernel, {grid, Config::kThreads, sizeof(SharedStorage)}, stream, p);
}

}  // namespace reeltime
