// SPDX-License-Identifier: Apache-2.0
// Where the elements of tensor core operands are: in whose register, and in shared memory.
//
// The only statement of these layouts in the emulator; tests/cuda/layouts_check.cpp holds it
// against CUTLASS's traits.  PTX ISA: "Matrix Fragments for mma.m16n8k16" and "... k32", "Register
// Fragments for wgmma", "Shared Memory Matrix Layout", "Swizzling Modes".
#pragma once
#include <cstdint>

namespace reeltime::emulator {

struct Position {
  int row, column;
};

// --- Registers -------------------------------------------------------------------------------

// Element i of register r; `per` elements fit a register: 4 of 8 bits or 2 of 16.
constexpr Position a_position(int lane, int r, int i, int per) {  // in A [16, K]
  return {lane / 4 + 8 * (r % 2), per * (lane % 4 + 4 * (r / 2)) + i};
}
constexpr Position b_position(int lane, int r, int i, int per) {  // in B [8, K]
  return {lane / 4, per * (lane % 4 + 4 * r) + i};
}
constexpr Position d_position(int lane, int i) {  // in D [16, 8]
  return {lane / 4 + 8 * (i / 2), 2 * (lane % 4) + i % 2};
}

// The two 16-bit elements of a register after ldmatrix, in their 8x8 matrix.
constexpr Position matrix_position(int lane, int half, bool transposed) {
  return transposed ? Position{2 * (lane % 4) + half, lane / 4}
                    : Position{lane / 4, 2 * (lane % 4) + half};
}

// A warpgroup holds four such A, one under the other, and D [64, N] as N / 8 of the small ones.
constexpr Position wgmma_a_position(int thread, int r, int i, int per) {  // in A [64, K]
  const Position p = a_position(thread % 32, r, i, per);
  return {thread / 32 * 16 + p.row, p.column};
}
constexpr Position wgmma_d_position(int thread, int i) {  // in D [64, N]
  const Position p = d_position(thread % 32, i % 4);
  return {thread / 32 * 16 + p.row, i / 4 * 8 + p.column};
}

// --- Shared memory ---------------------------------------------------------------------------

// Rows of 128, 64 or 32 bytes: bits 4 to 6 of the address are xor-ed with as many from bit 7 on.
constexpr uint32_t swizzle(uint32_t address, uint32_t bytes) {
  return bytes ? address ^ (address >> 3 & (bytes - 16)) : address;
}

// The address of element (row, k) behind a wgmma descriptor; row counts along M or N.
constexpr uint32_t element_address(uint64_t descriptor, int row, int k, int bytes,
                                   bool transposed) {
  const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  const uint32_t leading = static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4;
  const uint32_t stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  const int mode = static_cast<int>(descriptor >> 62);
  const uint32_t width = mode == 1 ? 128 : mode == 2 ? 64 : mode == 3 ? 32 : 0;
  if (transposed) {  // K rows of `width` bytes along M or N, `leading` to the next columns
    const int columns = static_cast<int>(width) / bytes;
    return swizzle(
        start + row / columns * leading + k / 8 * stride + k % 8 * width + row % columns * bytes,
        width);
  }
  const uint32_t byte = k * bytes;
  if (width) return swizzle(start + row / 8 * stride + row % 8 * width + byte, width);
  return start + row / 8 * stride + byte / 16 * leading + row % 8 * 16 + byte % 16;
}

}  // namespace reeltime::emulator
