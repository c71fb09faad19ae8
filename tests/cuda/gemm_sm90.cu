// SPDX-License-Identifier: Apache-2.0
// int8 GEMM on wgmma: a block computes 64 x 64; one thread feeds a ring of TMA boxes to a
// warpgroup.
//
// Warpgroup 0 produces, warpgroup 1 multiplies.  Tiles of A and B: 64 rows of 128 bytes, swizzled
// by TMA.  full[s]: the stage's bytes have landed.  empty[s]: each of the four consumer warps has
// left. The result goes through shared memory and back by TMA, which cuts it at the edges.
#include "common/launch.h"
#include "common/reduce.h"
#include "common/tma.h"
#include "common/wgmma.h"
#include "gemm.h"

namespace reeltime {
namespace {

struct Config {
  static constexpr int kThreads = 256;
  static constexpr int kBlock = 64;  // M and N
  static constexpr int kBlockK = 128;
  static constexpr int kStages = 2;
  static constexpr int kTileBytes = kBlock * kBlockK;
};

struct SharedStorage {
  struct alignas(1024) {  // the swizzle's period
    int8_t a[Config::kTileBytes], b[Config::kTileBytes];
  } stage[Config::kStages];
  alignas(128) int32_t out[Config::kBlock][Config::kBlock];
  Mbarrier full[Config::kStages], empty[Config::kStages];
};

DEVICE void produce(const GemmParams& p, const TensorMap& a_map, const TensorMap& b_map,
                    SharedStorage& shared, int steps) {
  const int m0 = static_cast<int>(blockIdx.y) * Config::kBlock;
  const int n0 = static_cast<int>(blockIdx.x) * Config::kBlock;
  for (int step = 0; step < steps; step++) {
    const int s = step % Config::kStages, round = step / Config::kStages;
    auto& stage = shared.stage[s];
    if (p.mistake != Mistake::kMissingEmptyWait) shared.empty[s].wait((round + 1) % 2);
    const int missing = p.mistake == Mistake::kDeadlock && step == 1 ? 16 : 0;
    shared.full[s].arrive_expect(2 * Config::kTileBytes + missing);
    tma_load(stage.a, a_map, shared.full[s], {step * Config::kBlockK, m0});
    tma_load(stage.b, b_map, shared.full[s], {step * Config::kBlockK, n0});
  }
}

DEVICE void multiply(const GemmParams& p, SharedStorage& shared, int steps, int32_t (&acc)[32]) {
  for (int step = 0; step < steps; step++) {
    const int s = step % Config::kStages, round = step / Config::kStages;
    if (p.mistake == Mistake::kWrongPhase)
      shared.full[s].wait((round + 1) % 2);
    else if (p.mistake != Mistake::kMissingWait)
      shared.full[s].wait(round % 2);
    if (p.mistake != Mistake::kMissingProductFence) wgmma_fence();
    const uint32_t a = shared_address(shared.stage[s].a), b = shared_address(shared.stage[s].b);
#pragma unroll
    for (int k = 0; k < Config::kBlockK / 32; k++)
      Wgmma<int8_t, 64>::ss(acc, wgmma_descriptor<128>(a + k * 32),
                            wgmma_descriptor<128>(b + k * 32), step > 0 || k > 0);
    wgmma_commit();
    if (p.mistake != Mistake::kMissingProductWait) wgmma_wait<0>();
    // One lane per warp: its wgmma_wait covered the warp
    const bool release = p.mistake != Mistake::kMissingRelease &&
                         (p.mistake != Mistake::kHalfRelease || warp_index() != 6);
    if (lane_index() == 0 && release) shared.empty[s].arrive();
    if (lane_index() == 0 && p.mistake == Mistake::kHalfRelease && warp_index() == 4)
      shared.empty[s].arrive();
    if (lane_index() == 0 && p.mistake == Mistake::kExtraRelease && step == 0)
      shared.empty[s].arrive();
  }
}

__global__ void __launch_bounds__(Config::kThreads, 1)
    gemm_kernel(const GemmParams p, const __grid_constant__ TensorMap a_map,
                const __grid_constant__ TensorMap b_map,
                const __grid_constant__ TensorMap out_map) {
  auto& shared = shared_storage<SharedStorage>();
  const int thread = static_cast<int>(threadIdx.x), steps = ceil_div(p.K, Config::kBlockK);

  // Barriers, by one thread
  if (thread == 0) {
    for (int s = 0; s < Config::kStages; s++) {
      shared.full[s].init(1);
      shared.empty[s].init(4);
    }
    fence_mbarrier_init();
  }
  if (p.mistake != Mistake::kMissingBarrier) sync_block();

  // Producer warpgroup
  if (thread < 128) {
    decrease_registers<40>();
    if (thread == 0) produce(p, a_map, b_map, shared, steps);
    return;
  }

  // Consumer warpgroup
  increase_registers<232>();
  int32_t acc[32];
  multiply(p, shared, steps, acc);
  tie_registers(acc);

  // Through shared memory to global memory
  const int t = thread - 128;
#pragma unroll
  for (int i = 0; i < 32; i++) {
    const int row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8;
    shared.out[row][i / 4 * 8 + t % 4 * 2 + i % 2] = acc[i];
  }
  if (p.mistake != Mistake::kMissingProxyFence) fence_async_proxy();
  named_barrier_sync(1, 128);
  if (t == 0) {
    tma_store(out_map, shared.out,
              {static_cast<int>(blockIdx.x) * Config::kBlock,
               static_cast<int>(blockIdx.y) * Config::kBlock});
    tma_store_commit();
    if (p.mistake != Mistake::kMissingStoreWait) tma_store_wait_read<0>();
  }
}

}  // namespace

cudaError_t gemm_sm90(const GemmParams& p, cudaStream_t stream) {
  constexpr unsigned kBlock = Config::kBlock;
  const uint64_t M = p.M, N = p.N, K = p.K;
  TensorMap a_map, b_map, out_map;
  const TensorShape<2> a{{K, M}, {K}, {Config::kBlockK, kBlock}};
  const TensorShape<2> b{{K, N}, {K}, {Config::kBlockK, kBlock}};
  const TensorShape<2> out{{N, M}, {N * 4}, {kBlock, kBlock}};
  cudaError_t error = make_tensor_map(a_map, p.a, 1, a, 128);
  if (error == cudaSuccess) error = make_tensor_map(b_map, p.b, 1, b, 128);
  if (error == cudaSuccess) error = make_tensor_map(out_map, p.out, 4, out, 0);
  if (error != cudaSuccess) return error;
  const dim3 grid(ceil_div(p.N, Config::kBlock), ceil_div(p.M, Config::kBlock));
  return launch(gemm_kernel, {grid, Config::kThreads, sizeof(SharedStorage)}, stream, p, a_map,
                b_map, out_map);
}

}  // namespace reeltime
