// SPDX-License-Identifier: Apache-2.0
// y += 1, tile by tile, by TMA to shared memory and back; and notes that two blocks of a cluster
// exchange through global memory.
#include "common/launch.h"
#include "common/tma.h"
#include "in_place_sm90.h"

namespace reeltime {
namespace {

struct Config {
  static constexpr int kThreads = 128;
  static constexpr int kElements = 32 * 32;
};

struct SharedStorage {
  alignas(128) int tile[Config::kElements];
  Mbarrier full;
};

__global__ void __launch_bounds__(Config::kThreads)
    in_place_kernel(const InPlaceParams p, const __grid_constant__ TensorMap map) {
  auto& shared = shared_storage<SharedStorage>();
  const int thread = static_cast<int>(threadIdx.x), tile = static_cast<int>(blockIdx.x);
  const int row = (p.mistake == Mistake::kOverlap ? tile % 2 : tile) * 32;
  int* y = p.y + tile * Config::kElements;

  // In, add, out
  if (thread == 0) {
    shared.full.init(1);
    fence_mbarrier_init();
    if (p.mistake == Mistake::kMissingProxyFence) y[9] = 0;
    shared.full.arrive_expect(Config::kElements * 4);
    tma_load(shared.tile, map, shared.full, {0, row});
    if (p.mistake == Mistake::kMissingWait) y[9] = 0;
  }
  sync_block();
  shared.full.wait(0);
  for (int i = thread; i < Config::kElements; i += Config::kThreads) shared.tile[i]++;
  fence_async_proxy();
  sync_block();
  if (thread == 0) {
    tma_store(map, shared.tile, {0, row});
    tma_store_commit();
    tma_store_wait_read<0>();
    if (p.mistake == Mistake::kReadBack) p.neighbour[tile] = y[9];
  }

  // Notes
  if (thread == 0) p.note[tile] = tile;
  if (p.mistake == Mistake::kEarlyRead && thread == 32) p.neighbour[tile] = p.note[tile];
  if (p.mistake == Mistake::kMissingBarrier)
    sync_block();  // not enough: the other block writes it
  else
    sync_cluster();
  if (thread == 32) p.neighbour[tile] = p.note[tile ^ 1];
}

}  // namespace

cudaError_t in_place_sm90(const InPlaceParams& p, cudaStream_t stream) {
  const uint64_t rows = static_cast<uint64_t>(p.tiles) * 32;
  TensorMap map;
  const TensorShape<2> shape{{32, rows}, {128}, {32, 32}};
  const cudaError_t error = make_tensor_map(map, p.y, 4, shape, 0);
  if (error != cudaSuccess) return error;
  const unsigned tiles = static_cast<unsigned>(p.tiles);
  return launch(in_place_kernel, {dim3(tiles), Config::kThreads, sizeof(SharedStorage), 2}, stream,
                p, map);
}

}  // namespace reeltime
