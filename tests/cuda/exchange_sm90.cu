// SPDX-License-Identifier: Apache-2.0
// Shared memory of another block of the cluster: written while its owner still needs what is there,
// read before it is written, and after its owner has left.
#include "common/cluster.h"
#include "common/launch.h"
#include "exchange_sm90.h"

namespace reeltime {
namespace {

constexpr int kThreads = 128, kBlocks = 4;

struct SharedStorage {
  Vector<float> row[kThreads];
  Vector<float> late[kThreads];  // nobody reads
};

DEVICE void barrier(bool cluster) {
  if (cluster)
    sync_cluster();
  else
    sync_block();  // not enough
}

__global__ void __launch_bounds__(kThreads) exchange_kernel(const ExchangeParams p) {
  auto& shared = shared_storage<SharedStorage>();
  const int thread = static_cast<int>(threadIdx.x), rank = static_cast<int>(cluster_rank());
  const unsigned next = p.mistake == Mistake::kWrongRank ? rank + 1 : (rank + 1) % kBlocks;

  // Own row, of which each thread wants its neighbour's part
  shared.row[thread] = load_cached(p.x + (rank * kThreads + thread) * 4);
  sync_block();
  const Vector<float> mine = shared.row[(thread + 1) % kThreads];
  barrier(p.mistake != Mistake::kEarlyReuse);

  // To the next block
  const uint32_t shift = p.mistake == Mistake::kMisaligned      ? 4
                         : p.mistake == Mistake::kSharedOverrun ? sizeof shared
                                                                : 0;
  store_in_cluster(address_in_rank(shared_address(&shared.row[thread]), next) + shift, mine);
  barrier(p.mistake != Mistake::kMissingBarrier);
  store_vector(p.out + (rank * kThreads + thread) * 4, shared.row[thread]);

  // Nobody leaves while another may write
  store_in_cluster(address_in_rank(shared_address(&shared.late[thread]), next), mine);
  if (p.mistake != Mistake::kEarlyExit) sync_cluster();
}

}  // namespace

cudaError_t exchange_sm90(const ExchangeParams& p, cudaStream_t stream) {
  return launch(exchange_kernel, {dim3(kBlocks), kThreads, sizeof(SharedStorage), kBlocks}, stream,
                p);
}

}  // namespace reeltime
