// SPDX-License-Identifier: Apache-2.0
// mbarrier (sm_90): a barrier in shared memory that counts arrivals and bytes.
//
// A phase completes when the announced arrivals have come and the announced bytes have landed; the
// barrier then starts its next phase by itself.  Phases alternate in parity, from 0.  wait(parity)
// returns once the phase of that parity is complete, so a ring of kStages buffers is used as
//
//   consumer: full[stage].wait(round % 2)            round = iteration / kStages
//   producer: empty[stage].wait((round + 1) % 2)     passes at once in round 0: as if the phase
//   before
//                                                    the first, of parity 1, were complete
//
// PTX ISA, "Parallel Synchronization and Communication Instructions: mbarrier".
#pragma once
#include "common/barrier.h"
#include "common/shared.h"

namespace reeltime {

struct alignas(8) Mbarrier {
  uint64_t bits;  // opaque; touched through the functions only

  DEVICE uint32_t address() const { return shared_address(this); }

  // By one thread.  Then fence_mbarrier_init() by it, and a barrier before anybody's first use.
  DEVICE void init(int arrivals) {
#if REELTIME_EMULATED
    emulator::mbarrier_init(address(), arrivals);
#else
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address()), "r"(arrivals)
                 : "memory");
#endif
  }

  // What the thread did before is seen by those who wait for this phase.
  DEVICE void arrive() {
#if REELTIME_EMULATED
    emulator::mbarrier_arrive(address(), 1, 0);
#else
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address()) : "memory");
#endif
  }

  // Arrives, and announces bytes that TMA copies will count down.
  DEVICE void arrive_expect(int bytes) {
#if REELTIME_EMULATED
    emulator::mbarrier_arrive(address(), 1, bytes);
#else
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address()),
                 "r"(bytes)
                 : "memory");
#endif
  }

  // At the same barrier of another block of the cluster.
  DEVICE void arrive_at(unsigned rank) {
    const uint32_t remote = address_in_rank(address(), rank);
#if REELTIME_EMULATED
    emulator::mbarrier_arrive(remote, 1, 0);
#else
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(remote)
                 : "memory");
#endif
  }

  // The same, to give back a buffer that this thread has only read: no fence, which arrive_at needs
  // for what the thread wrote, and which would wait for all of its memory accesses.
  DEVICE void give_back_at(unsigned rank) {
    const uint32_t remote = address_in_rank(address(), rank);
#if REELTIME_EMULATED
    emulator::mbarrier_arrive(remote, 1, 0);
#else
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(remote) : "memory");
#endif
  }

  // Whether the phase of that parity is complete; may take a moment to say no.
  DEVICE bool try_wait(uint32_t parity) {
#if REELTIME_EMULATED
    return emulator::mbarrier_test(address(), parity);
#else
    uint32_t complete;
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(complete)
        : "r"(address()), "r"(parity)
        : "memory");
    return complete != 0;
#endif
  }

  DEVICE void wait(uint32_t parity) {
#if REELTIME_EMULATED
    emulator::mbarrier_wait(address(), parity);
#else
    while (!try_wait(parity)) {
    }
#endif
  }
};

// Makes initialised barriers visible to the asynchronous proxy and to the cluster.
DEVICE void fence_mbarrier_init() {
#if !REELTIME_EMULATED
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

}  // namespace reeltime
