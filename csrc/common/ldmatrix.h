// SPDX-License-Identifier: Apache-2.0
// ldmatrix: a warp loads 8x8 matrices of 16-bit elements from shared memory into mma fragments.
//
// Lane 8 * j + i passes the address of row i of matrix j: 16 bytes, 16-byte aligned.  Afterwards
// register j of lane l holds elements (l / 4, 2 * (l % 4)) and (l / 4, 2 * (l % 4) + 1) of matrix
// j; with `transposed`, elements (2 * (l % 4), l / 4) and (2 * (l % 4) + 1, l / 4).  A row of 8-bit
// data is 16 elements, so register j then holds four of them (bytes 4 * (l % 4) ... + 3 of row l /
// 4). PTX ISA, "Warp-level matrix load instruction: ldmatrix".  Orders nothing: barriers come from
// elsewhere.
#pragma once
#include "common/shared.h"

namespace reeltime {

DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) {
#if REELTIME_EMULATED
  emulator::ldmatrix(r, 4, false, row);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
#endif
}

DEVICE void ldmatrix_x4_transposed(uint32_t (&r)[4], uint32_t row) {
#if REELTIME_EMULATED
  emulator::ldmatrix(r, 4, true, row);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
#endif
}

DEVICE void ldmatrix_x2(uint32_t (&r)[2], uint32_t row) {  // the addresses of lanes 0 to 15 count
#if REELTIME_EMULATED
  emulator::ldmatrix(r, 2, false, row);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(row)
               : "memory");
#endif
}

DEVICE void ldmatrix_x2_transposed(uint32_t (&r)[2], uint32_t row) {
#if REELTIME_EMULATED
  emulator::ldmatrix(r, 2, true, row);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(row)
               : "memory");
#endif
}

}  // namespace reeltime
