// SPDX-License-Identifier: Apache-2.0
// Shared memory of another block of the cluster (sm_90 and later).
//
//   sync_cluster()                          all blocks run, and the place is free
//   store_in_cluster(address_in_rank(...))
//   sync_cluster()                          the other block may read it
//
// PTX ISA, "State Spaces: shared", shared::cluster.
#pragma once
#include "common/barrier.h"
#include "common/shared.h"
#include "common/vector.h"

namespace reeltime {

// To an address_in_rank, aligned to 16 bytes.
// NOTE: the other block must not exit before it has passed a barrier of the cluster after this.
DEVICE void store_in_cluster(uint32_t address, const Vector<float>& v) {
#if REELTIME_EMULATED
  emulator::store_in_cluster(address, &v, 16);
#else
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(v.at[0]),
               "f"(v.at[1]), "f"(v.at[2]), "f"(v.at[3])
               : "memory");
#endif
}

}  // namespace reeltime
