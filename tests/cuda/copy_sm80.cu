// SPDX-License-Identifier: Apache-2.0
// y[tile][i] = x[tile][kTile - 1 - i], 16-byte chunks reversed inside tiles of 2 KiB.
//
// Each thread copies one chunk with cp.async, kStages tiles ahead, and stores the chunk that
// another thread copied: right only if waits and barriers are.  A block walks kTilesPerBlock tiles.
#include "common/barrier.h"
#include "common/cp_async.h"
#include "common/launch.h"
#include "common/vector.h"
#include "copy_sm80.h"

namespace reeltime {
namespace {

struct Config {
  static constexpr int kThreads = 128;
  static constexpr int kStages = 3;
  static constexpr int kTilesPerBlock = 8;
  static constexpr int kTileBytes = kThreads * 16;
};

struct SharedStorage {
  uint8_t tile[Config::kStages][Config::kTileBytes];
};

__global__ void __launch_bounds__(Config::kThreads) copy_kernel(const CopyParams p) {
  constexpr int kThreads = Config::kThreads, kStages = Config::kStages;
  auto& shared = shared_storage<SharedStorage>();
  const int thread = static_cast<int>(threadIdx.x);
  const int first = static_cast<int>(blockIdx.x) * Config::kTilesPerBlock;
  const int count = min(Config::kTilesPerBlock, p.tiles - first);

  auto fetch = [&](int i) {
    if (i < count) {
      int64_t byte = (static_cast<int64_t>(first + i) * kThreads + thread) * 16;
      if (p.mistake == Mistake::kGlobalOverrun && thread == 77) byte += p.tiles * int64_t{2048};
      uint32_t to = shared_address(&shared.tile[i % kStages][thread * 16]);
      if (p.mistake == Mistake::kMisaligned && thread == 5) to += 8;
      if (p.mistake == Mistake::kSharedOverrun && thread == 127 && i == 2) to += 16;
      cp_async(to, p.x + byte);
    }
    cp_async_commit();
  };

  // Fill the pipeline
  for (int i = 0; i < kStages - 1; i++) fetch(i);
  for (int i = 0; i < count; i++) {
    // Wait for tile i, of all threads
    if (p.mistake == Mistake::kShallowWait)
      cp_async_wait<kStages - 1>();
    else if (p.mistake != Mistake::kMissingWait)
      cp_async_wait<kStages - 2>();
    if (p.mistake != Mistake::kMissingBarrier) sync_block();
    // Refill the stage that everybody has left
    fetch(i + kStages - 1);
    int chunk = kThreads - 1 - thread;
    if (p.mistake == Mistake::kSharedOverrunPlain && i == 2) chunk += kThreads;
    Vector<uint8_t> v;
    memcpy(&v, &shared.tile[i % kStages][chunk * 16], 16);
    int64_t out = (static_cast<int64_t>(first + i) * kThreads + thread) * 16;
    if (p.mistake == Mistake::kGlobalOverrunPlain && thread == 3) {
      p.y[p.tiles * int64_t{2048} + 2] = v.at[0];
      out = 0;
    }
    if (p.mistake == Mistake::kWriteToInput && thread == 9)
      const_cast<uint8_t*>(p.x)[out] = v.at[0];
    store_vector(p.y + out, v);
  }
}

}  // namespace

cudaError_t copy_sm80(const CopyParams& p, cudaStream_t stream) {
  const dim3 grid(ceil_div(p.tiles, Config::kTilesPerBlock));
  return launch(copy_kernel, {grid, Config::kThreads, sizeof(SharedStorage)}, stream, p);
}

}  // namespace reeltime
