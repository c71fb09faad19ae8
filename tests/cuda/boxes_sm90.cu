// SPDX-License-Identifier: Apache-2.0
// TMA in 2 to 4 dimensions, and multicast in a cluster of two.
#include "boxes.h"
#include "common/launch.h"
#include "common/swizzle.h"
#include "common/tma.h"
#include "common/vector.h"

namespace reeltime {
namespace {

// --- Boxes ---------------------------------------------------------------------------------------

HOST_DEVICE constexpr int box_size(int i) { return i == 0 ? 16 : i == 1 ? 5 : i == 2 ? 3 : 2; }

struct BoxStorage {
  alignas(128) uint16_t box[16 * 5 * 3 * 2];
  Mbarrier full;
};

template <int kRank>
__global__ void box_kernel(const __grid_constant__ TensorMap x_map,
                           const __grid_constant__ TensorMap y_map, const int boxes0,
                           const int boxes1, const int boxes2) {
  auto& shared = shared_storage<BoxStorage>();
  int index = static_cast<int>(blockIdx.x), at[kRank], elements = 1;
  const int boxes[4] = {boxes0, boxes1, boxes2, 1 << 30};
#pragma unroll
  for (int i = 0; i < kRank; i++) {
    at[i] = index % boxes[i] * box_size(i);
    index /= boxes[i];
    elements *= box_size(i);
  }
  if (threadIdx.x == 0) {
    shared.full.init(1);
    fence_mbarrier_init();
    shared.full.arrive_expect(elements * 2);
    tma_load(shared.box, x_map, shared.full, at);
    shared.full.wait(0);
    tma_store(y_map, shared.box, at);
    tma_store_commit();
    tma_store_wait_read<0>();
  }
}

template <int kRank>
cudaError_t launch_boxes(const BoxParams& p, cudaStream_t stream) {
  TensorMap maps[2];
  TensorShape<kRank> shape;
  unsigned grid = 1;
  int boxes[4] = {1, 1, 1, 1};
  for (int i = 0; i < kRank; i++) {
    shape.size[i] = p.size[i];
    shape.box[i] = box_size(i);
    if (i > 0) shape.stride[i - 1] = i == 1 ? p.size[0] * 2 : shape.stride[i - 2] * p.size[i - 1];
    boxes[i] = ceil_div(p.size[i], box_size(i));
    grid *= boxes[i];
  }
  cudaError_t error = make_tensor_map(maps[0], p.x, 2, shape, 0);
  if (error == cudaSuccess) error = make_tensor_map(maps[1], p.y, 2, shape, 0);
  if (error != cudaSuccess) return error;
  return launch(box_kernel<kRank>, {dim3(grid), 32, sizeof(BoxStorage)}, stream, maps[0], maps[1],
                boxes[0], boxes[1], boxes[2]);
}

// --- Multicast -----------------------------------------------------------------------------------

struct MulticastStorage {
  alignas(1024) uint8_t tile[64 * 128];
  Mbarrier full, empty;
};

__global__ void __launch_bounds__(128)
    multicast_kernel(const MulticastParams p, const __grid_constant__ TensorMap x_map) {
  auto& shared = shared_storage<MulticastStorage>();
  const int thread = static_cast<int>(threadIdx.x), rank = static_cast<int>(cluster_rank());
  if (thread == 0) {
    shared.full.init(1);
    shared.empty.init(8);  // four warps of each block: this block's half goes to both
    fence_mbarrier_init();
  }
  if (p.mistake == Mistake::kMissingBarrier)
    sync_block();  // not enough: the other block's barriers are used too
  else
    sync_cluster();
  for (int step = 0; step < p.steps; step++) {
    if (thread == 0) {
      shared.empty.wait((step + 1) % 2);
      shared.full.arrive_expect(64 * 128);
      tma_load<3, true>(shared.tile + rank * 32 * 128, x_map, shared.full, {0, rank * 32, step}, 3);
    }
    shared.full.wait(step % 2);
    for (int i = thread; i < 512; i += 128) {
      Vector<uint8_t> v;
      memcpy(&v, shared.tile + Swizzle<128>::chunk(i / 8, i % 8), 16);
      store_vector(p.out + ((rank * p.steps + step) * 512 + i) * 16, v);
    }
    sync_warp();
    if (lane_index() == 0) {
      shared.empty.arrive_at(0);
      if (p.mistake != Mistake::kHalfRelease) shared.empty.arrive_at(1);
      if (p.mistake == Mistake::kHalfRelease) shared.empty.arrive_at(rank);
    }
  }
  sync_cluster();  // nobody exits while another may still arrive on its barriers
}

}  // namespace

cudaError_t boxes_sm90(const BoxParams& p, cudaStream_t stream) {
  if (p.rank == 2) return launch_boxes<2>(p, stream);
  if (p.rank == 3) return launch_boxes<3>(p, stream);
  return p.rank == 4 ? launch_boxes<4>(p, stream) : cudaErrorInvalidValue;
}

cudaError_t multicast_sm90(const MulticastParams& p, cudaStream_t stream) {
  TensorMap x_map;
  const TensorShape<3> x{{128, 64, static_cast<uint64_t>(p.steps)}, {128, 64 * 128}, {128, 32, 1}};
  const cudaError_t error = make_tensor_map(x_map, p.x, 1, x, 128);
  if (error != cudaSuccess) return error;
  return launch(multicast_kernel, {dim3(2), 128, sizeof(MulticastStorage), 2}, stream, p, x_map);
}

}  // namespace reeltime
