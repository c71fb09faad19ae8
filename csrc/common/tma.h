// SPDX-License-Identifier: Apache-2.0
// TMA (sm_90): one thread moves a whole box of a 2-D to 4-D tensor between global and shared
// memory.
//
// The TensorMap (tensor_map.h), a __grid_constant__ kernel parameter, holds shape, strides, box and
// swizzle; coordinates are in elements, innermost first, and may lie outside: loads fill with zeros
// (and still count all bytes), stores leave out.  A box is stored row after row; with a swizzle its
// innermost extent is at most the swizzle's width, and byte (row, column) lies at
// Swizzle::byte(row, column). PTX ISA, "Data Movement: cp.async.bulk.tensor".
#pragma once
#include "common/mbarrier.h"
#include "common/tensor_map.h"

namespace reeltime {

// --- Loads -------------------------------------------------------------------------------------

// Lands at any time until `full` completes the phase for which the box's bytes were announced.
// With a mask of ranks (kMulticast), every block named in it receives the box at the same place,
// and the bytes count on its own barrier at the same place.
template <int kRank, bool kMulticast = false>
DEVICE void tma_load(void* destination, const TensorMap& map, Mbarrier& full,
                     const int (&coordinate)[kRank], uint16_t ranks = 0) {
  static_assert(kRank >= 2 && kRank <= 4, "");
#if REELTIME_EMULATED
  emulator::tma_load(shared_address(destination), &map, full.address(), coordinate, kRank,
                     kMulticast ? ranks : 0);
#else
  const uint32_t to = shared_address(destination), barrier = full.address();
  const int* c = coordinate;
#define REELTIME_TMA_LOAD(DIM, INDEX, MASK, ...)                                                 \
  if constexpr (!kMulticast)                                                                     \
    asm volatile("cp.async.bulk.tensor." DIM                                                     \
                 ".shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, " INDEX   \
                 "], [%2];" ::"r"(to),                                                           \
                 "l"(&map), "r"(barrier), __VA_ARGS__                                            \
                 : "memory");                                                                    \
  else                                                                                           \
    asm volatile("cp.async.bulk.tensor." DIM                                                     \
                 ".shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster " \
                 "[%0], [%1, " INDEX "], [%2], " MASK ";" ::"r"(to),                             \
                 "l"(&map), "r"(barrier), __VA_ARGS__, "h"(ranks)                                \
                 : "memory")
  if constexpr (kRank == 2)
    REELTIME_TMA_LOAD("2d", "{%3, %4}", "%5", "r"(c[0]), "r"(c[1]));
  else if constexpr (kRank == 3)
    REELTIME_TMA_LOAD("3d", "{%3, %4, %5}", "%6", "r"(c[0]), "r"(c[1]), "r"(c[2]));
  else
    REELTIME_TMA_LOAD("4d", "{%3, %4, %5, %6}", "%7", "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
#undef REELTIME_TMA_LOAD
#endif
}

// --- Stores ------------------------------------------------------------------------------------

// Reads shared memory after fence_async_proxy() by its writers and a barrier.  The issuing thread
// commits, and waits: tma_store_wait_read before the buffer is reused or the block exits.
// NOTE: only the end of the kernel waits for the tensor itself: nobody may touch those bytes again.
template <int kRank>
DEVICE void tma_store(const TensorMap& map, const void* source, const int (&coordinate)[kRank]) {
  static_assert(kRank >= 2 && kRank <= 4, "");
#if REELTIME_EMULATED
  emulator::tma_store(&map, shared_address(source), coordinate, kRank);
#else
  const uint32_t from = shared_address(source);
  const int* c = coordinate;
#define REELTIME_TMA_STORE(DIM, INDEX, ...)                                             \
  asm volatile("cp.async.bulk.tensor." DIM ".global.shared::cta.bulk_group [%0, " INDEX \
               "], [%1];" ::"l"(&map),                                                  \
               "r"(from), __VA_ARGS__                                                   \
               : "memory")
  if constexpr (kRank == 2)
    REELTIME_TMA_STORE("2d", "{%2, %3}", "r"(c[0]), "r"(c[1]));
  else if constexpr (kRank == 3)
    REELTIME_TMA_STORE("3d", "{%2, %3, %4}", "r"(c[0]), "r"(c[1]), "r"(c[2]));
  else
    REELTIME_TMA_STORE("4d", "{%2, %3, %4, %5}", "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
#undef REELTIME_TMA_STORE
#endif
}

DEVICE void tma_store_commit() {
#if REELTIME_EMULATED
  emulator::bulk_commit();
#else
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}

// All but the newest kPending groups have read their shared memory.
template <int kPending>
DEVICE void tma_store_wait_read() {
#if REELTIME_EMULATED
  emulator::bulk_wait(kPending, true);
#else
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
#endif
}

// Brings the descriptor into its cache ahead of the first copy.
DEVICE void tma_prefetch_map(const TensorMap& map) {
#if REELTIME_EMULATED
  (void)map;
#else
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
#endif
}

}  // namespace reeltime
