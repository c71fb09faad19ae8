// SPDX-License-Identifier: Apache-2.0
// For each row of x [M, N]: its sum, its largest magnitude, and how often it is positive.
//
// One block per row, four warps: two reductions over the block with one scratch array, a ballot,
// and named barriers: warps 0 and 1 hand partial counts to warps 2 and 3, which finish.
#include "common/atomic.h"
#include "common/launch.h"
#include "common/reduce.h"
#include "common/shared.h"
#include "reduce_rows.h"

namespace reeltime {
namespace {

struct Config {
  static constexpr int kThreads = 128;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kHandOver = 1;  // named barrier
};

struct SharedStorage {
  float scratch[Config::kWarps];
  int counts[2];
  int bins[4];
};

__global__ void __launch_bounds__(Config::kThreads) reduce_rows_kernel(const ReduceParams p) {
  auto& shared = shared_storage<SharedStorage>();
  const int thread = static_cast<int>(threadIdx.x), row = static_cast<int>(blockIdx.x);
  float sum = 0, largest = 0;
  unsigned positive = 0;
  int histogram[4] = {0, 0, 0, 0};
  for (int base = 0; base < p.N; base += Config::kThreads) {
    const int column = base + thread;
    const float x = column < p.N ? p.x[int64_t{row} * p.N + column] : 0.0f;
    sum += x;
    largest = fmaxf(largest, fabsf(x));
    int bin = x < -1 ? 0 : x < 0 ? 1 : x < 1 ? 2 : 3;
    if (p.mistake == Mistake::kLocalOverrun && x > 1) bin = 4 + p.N % 2;
    histogram[bin] += column < p.N;
    if (p.mistake == Mistake::kDivergentCollective && column == p.N + 5) break;
    const unsigned lanes = ballot(x > 0);
    if (lane_index() == 0) positive += __builtin_popcount(lanes);
  }

  // Sum and maximum, one after the other in the same scratch
  sum = block_reduce<Config::kWarps>(sum, shared.scratch, Sum{});
  if (p.mistake != Mistake::kEarlyReuse) sync_block();
  largest = block_reduce<Config::kWarps>(largest, shared.scratch, Max{});

  // Counts, from the first two warps to the last two
  const int warp = thread / 32;
  if (warp < 2) {
    if (lane_index() == 0) shared.counts[warp] = static_cast<int>(positive);
    const bool silent = p.mistake == Mistake::kDeadlock && warp == 1;
    if (!silent) named_barrier_arrive(Config::kHandOver, Config::kThreads);
  } else {
    if (p.mistake != Mistake::kMissingBarrier)
      named_barrier_sync(Config::kHandOver, Config::kThreads);
    if (p.mistake == Mistake::kDivergentBarrier && thread > 100) sync_warp();
    if (p.mistake == Mistake::kDivergentBarrier && thread <= 100) sync_block();
    positive += warp == 2 || lane_index() == 0 ? shared.counts[warp - 2] : 0;
    positive = shuffle(positive, 0);
    if (lane_index() == 0) p.positive[row * 2 + warp - 2] = static_cast<int>(positive);
  }
  if (thread == 0) {
    p.sum[row] = sum;
    p.largest[row] = largest;
  }

  // Histograms of all threads, then of all rows
  if (thread < 4) shared.bins[thread] = 0;
  sync_block();
  for (int i = 0; i < 4; i++) atomic_add(&shared.bins[i], histogram[i]);
  sync_block();
  if (thread < 4) {
    p.histogram[row * 4 + thread] = shared.bins[thread];
    atomic_add(&p.totals[thread], shared.bins[thread]);
  }
}

}  // namespace

cudaError_t reduce_rows(const ReduceParams& p, cudaStream_t stream) {
  return launch(reduce_rows_kernel, {dim3(p.M), Config::kThreads, sizeof(SharedStorage)}, stream,
                p);
}

}  // namespace reeltime
