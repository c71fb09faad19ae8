// SPDX-License-Identifier: Apache-2.0
// Where a tile's 16-byte chunks lie in shared memory, so that no access conflicts on banks.
//
// Shared memory has 32 banks of 4 bytes: 128 bytes per clock.  ldmatrix reads eight 16-byte chunks
// at once, one from each of eight rows; in a plain row-major tile with 128-byte rows all eight
// start in the same bank.  Xor-ing the chunk's index with the row's puts them into eight different
// groups.
//
//   kRowBytes  128: chunk ^ row % 8        64: chunk ^ row / 2 % 4        32: chunk ^ row / 4 % 2
//
// As a function of the byte address, for a tile aligned to 8 * kRowBytes, this is
// `address ^ (address >> 3 & (kRowBytes - 16))`: bits 4 to 6 are xor-ed with bits 7 to 9.  It is
// also what TMA and wgmma do in hardware (PTX ISA, "Swizzling Modes"), so the same function serves
// both.
#pragma once
#include "common/target.h"

namespace reeltime {

template <int kRowBytes>
struct Swizzle {
  static_assert(kRowBytes == 32 || kRowBytes == 64 || kRowBytes == 128, "");
  static constexpr int kChunks = kRowBytes / 16;  // of 16 bytes, per row

  HOST_DEVICE static constexpr uint32_t apply(uint32_t address) {
    return address ^ (address >> 3 & (kRowBytes - 16));
  }
  // Byte offset of a chunk in the tile.
  HOST_DEVICE static constexpr uint32_t chunk(int row, int chunk) {
    return apply(static_cast<uint32_t>(row * kRowBytes + chunk * 16));
  }
  // Byte offset of any byte in the tile.
  HOST_DEVICE static constexpr uint32_t byte(int row, int column) {
    return apply(static_cast<uint32_t>(row * kRowBytes + column));
  }
};

}  // namespace reeltime
