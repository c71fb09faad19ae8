// SPDX-License-Identifier: Apache-2.0
// stmatrix (sm_90 and later): the inverse of ldmatrix, from fragments to shared memory.
//
// Addresses and ownership are those of ldmatrix.h.  An accumulator packed to 16 bits is such a
// fragment, so an epilogue writes 16-byte rows without bank conflicts where single stores of 4
// bytes would take four times as many.  PTX ISA, "Warp-level matrix store instruction: stmatrix".
#pragma once
#include "common/shared.h"

namespace reeltime {

DEVICE void stmatrix_x4(uint32_t row, const uint32_t (&r)[4]) {
#if REELTIME_EMULATED
  emulator::stmatrix(r, 4, false, row);
#else
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
#endif
}

DEVICE void stmatrix_x4_transposed(uint32_t row, const uint32_t (&r)[4]) {
#if REELTIME_EMULATED
  emulator::stmatrix(r, 4, true, row);
#else
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
#endif
}

DEVICE void stmatrix_x2(uint32_t row, const uint32_t (&r)[2]) {
#if REELTIME_EMULATED
  emulator::stmatrix(r, 2, false, row);
#else
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(row), "r"(r[0]),
               "r"(r[1])
               : "memory");
#endif
}

}  // namespace reeltime
