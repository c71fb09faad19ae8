// SPDX-License-Identifier: Apache-2.0
// Barriers of a warp, of a block, of a named part of a block, of a cluster.
//
// Each orders the shared and global memory accesses of those who pass it: what was written before
// is seen after.  PTX ISA, "Parallel Synchronization and Communication Instructions: bar, barrier".
#pragma once
#include "common/target.h"

namespace reeltime {

DEVICE void sync_warp(unsigned mask = kFullWarp) {
#if REELTIME_EMULATED
  emulator::sync_warp(mask);
#else
  __syncwarp(mask);
#endif
}

DEVICE void sync_block() {
#if REELTIME_EMULATED
  emulator::barrier(0, 0, true);
#else
  __syncthreads();
#endif
}

// Barriers 1 to 15 synchronise `threads` threads, whole warps: those that wait and those that only
// announce that they got here.  NOTE: 0 is the one of sync_block.
DEVICE void named_barrier_sync(int id, int threads) {
#if REELTIME_EMULATED
  emulator::barrier(id, threads, true);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

DEVICE void named_barrier_arrive(int id, int threads) {
#if REELTIME_EMULATED
  emulator::barrier(id, threads, false);
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// --- sm_90 and later ---------------------------------------------------------------------------

DEVICE unsigned cluster_rank() {
#if REELTIME_EMULATED
  return emulator::current->cluster_rank;
#else
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#endif
}

// NOTE: before a block exits, or first touches another block's shared memory, all must get here.
DEVICE void sync_cluster() {
#if REELTIME_EMULATED
  emulator::cluster_barrier();
#else
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
#endif
}

// The address of the same place in another block of the cluster.  PTX ISA, "mapa".
DEVICE uint32_t address_in_rank(uint32_t shared, unsigned rank) {
#if REELTIME_EMULATED
  return emulator::map_to_rank(shared, rank);
#else
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared), "r"(rank));
  return remote;
#endif
}

// Writes of this thread, and all it knows of through barriers, become visible to the asynchronous
// proxy, that is to wgmma and TMA.  Needed between an ordinary store (or cp.async) to shared memory
// and the barrier after which wgmma or a TMA store reads it.  PTX ISA, "Async proxy".
DEVICE void fence_async_proxy() {
#if REELTIME_EMULATED
  emulator::fence_async_proxy();
#else
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Moves registers between warpgroups: executed by all warps of one.  kCount is a multiple of 8 from
// 24 to 256; the sum over the block's threads must fit the register file.  PTX ISA, "setmaxnreg".
// NOTE: without `__launch_bounds__(kThreads, 1)`, the 1 included, ptxas drops it silently.
template <int kCount>
DEVICE void increase_registers() {
  static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256, "");
#if !REELTIME_EMULATED
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

template <int kCount>
DEVICE void decrease_registers() {
  static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256, "");
#if !REELTIME_EMULATED
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

}  // namespace reeltime
