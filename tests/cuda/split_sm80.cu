// SPDX-License-Identifier: Apache-2.0
// out[m] = sum of x[s, m] over s, and total = sum of out[m] over m: blocks that hand over to
// others.
//
// Block (m, s) stores its part.  The last one to finish row m adds the row up, and the last of
// those adds up all parts once more and leaves everything zero for the next launch.  It knows the
// parts of other rows only through the blocks that were last there.
#include "common/atomic.h"
#include "common/barrier.h"
#include "common/cp_async.h"
#include "common/launch.h"
#include "common/vector.h"
#include "split_sm80.h"

namespace reeltime {
namespace {

struct Config {
  static constexpr int kThreads = 64;
  static constexpr int kN = 4 * kThreads;
};

struct SharedStorage {
  alignas(16) int piece[Config::kThreads][4];
  int last;
};

// Whether all the others have been here.
DEVICE bool arrive(const SplitParams& p, int* counter, int others) {
  if (p.mistake != Mistake::kMissingFence) fence_device();
  const bool last = atomic_add(counter, 1) == others;
  if (p.mistake != Mistake::kMissingSecondFence) fence_device();
  if (p.mistake == Mistake::kEarlyReset && !last) *counter = 0;
  return last;
}

DEVICE Vector<int> read(const SplitParams& p, int (&to)[4], int* from) {
  Vector<int> v;
  if (p.mistake == Mistake::kStaleCache) {
    v = load_cached(from);
  } else if (p.way == Way::kPlain) {
#pragma unroll
    for (int i = 0; i < 4; i++) v.at[i] = from[i];
  } else if (p.way == Way::kStreaming) {
    v = load_streaming(from);
  } else {
    cp_async(shared_address(to), from);
    cp_async_commit();
    if (p.mistake == Mistake::kEarlyReuse) store_vector(from, Vector<int>{});
    cp_async_wait<0>();
    memcpy(&v, to, 16);
  }
  return v;
}

__global__ void __launch_bounds__(Config::kThreads) split_kernel(const SplitParams p) {
  constexpr int kN = Config::kN;
  auto& shared = shared_storage<SharedStorage>();
  const int thread = static_cast<int>(threadIdx.x);
  const int m = static_cast<int>(blockIdx.x), s = static_cast<int>(blockIdx.y);
  const int mirror = (Config::kThreads - 1 - thread) * 4;  // another thread's piece
  const auto part = [&](int s, int m) { return p.partial + (s * p.M + m) * kN; };

  // This block's part
  const int to = p.mistake == Mistake::kOverlap ? s / 2 : s;
  const auto x = load_cached(p.x + (s * p.M + m) * kN + thread * 4);
  if (p.mistake != Mistake::kOverlap || thread == 9) store_vector(part(to, m) + thread * 4, x);
  if (thread == 0 && (s == 0 || p.mistake == Mistake::kSameValue)) p.begun[m] = 1;
  if (p.mistake != Mistake::kMissingBarrier) sync_block();
  if (thread == 0) shared.last = arrive(p, p.count + m, p.S - 1);
  sync_block();
  if (!shared.last) {
    if (p.mistake == Mistake::kLateRead && thread == 0) shared.piece[0][0] = p.out[m * kN];
    return;
  }

  // The row's
  Vector<int> sum{};
  for (int i = 0; i < p.S; i++) {
    const auto v = read(p, shared.piece[thread], part(i, m) + mirror);
#pragma unroll
    for (int e = 0; e < 4; e++) sum.at[e] += v.at[e];
  }
  store_vector(p.out + m * kN + mirror, sum);
  sync_block();
  if (thread == 0) shared.last = arrive(p, p.count + p.M, p.M - 1);
  sync_block();
  if (!shared.last) return;

  // Everybody's
  sum = {};
  for (int i = 0; i < p.S * p.M; i++) {
    const auto v = read(p, shared.piece[thread], part(0, i) + mirror);
#pragma unroll
    for (int e = 0; e < 4; e++) sum.at[e] += v.at[e];
    store_vector(part(0, i) + mirror, Vector<int>{});
  }
  store_vector(p.total + mirror, sum);
  if (thread <= p.M) p.count[thread] = 0;
}

}  // namespace

cudaError_t split_sm80(const SplitParams& p, cudaStream_t stream) {
  return launch(split_kernel, {dim3(p.M, p.S), Config::kThreads, sizeof(SharedStorage)}, stream, p);
}

}  // namespace reeltime
