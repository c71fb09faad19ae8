// SPDX-License-Identifier: Apache-2.0
// Which tile gemm_w8a8 takes on Hopper, what its clusters share, and into how many parts they split
// K: the choice that a model of clocks says ends first.
//
// A launch costs whole waves of tiles.  Waves that M and N fill badly are what the choice is about:
//
//   1560 x 1536    13 x 8 tiles of 128 x 192 are 104 on 132 SMs, 13 x 10 of 128 x 160 are 130; 13
//                  is odd, so that pairs of tiles are neighbours along N
//   512 x 1536     4 x 12 tiles of 128 x 128 leave two SMs of three idle: two blocks for each
//
// The model compares, and leaves out what all choices pay alike.
#pragma once
#include "gemm_w8a8/fragments.h"

namespace reeltime {
namespace gemm_sm90 {

constexpr int kBlockK = 128;  // of a K block, in bytes too

// What two blocks with neighbouring tiles load half each, for both.
enum class Multicast : int32_t { kNone, kA, kB };

struct Choice {
  int groups, columns;  // of a tile: 64 rows each, and columns
  Multicast multicast;  // pairs of tiles; kA: neighbours along N, kB: along M
  int parts;            // blocks that share K of one tile

  int rows() const { return groups * Slab::kRows; }
  int high() const { return multicast == Multicast::kB ? 2 : 1; }  // tiles of a cluster
  int wide() const { return multicast == Multicast::kA ? 2 : 1; }
  int cluster() const { return high() * wide() * parts; }
};

// Clusters that run at once.  A GPC, 16 or 18 SMs, holds whole ones: four of four blocks.
inline int clusters_at_once(int cluster, int processors) {
  return min(processors / cluster, cluster == 4 ? ceil_div(processors, 18) * 4 : processors);
}

// Clocks of a K block of a tile, where `blocks` are at work: the most of what the tensor cores,
// shared memory and L2 need.  Of an SM 4096 products, 128 bytes of shared memory and 64 from L2 per
// clock; of L2 kL2Bytes for each SM of the GPU.  TMA writes each byte of a stage once, wgmma reads
// it once, b for each warpgroup.
inline int64_t clocks_per_block(const Choice& choice, int64_t blocks, int processors) {
  constexpr int kL2Bytes = 40;
  const int rows = choice.rows(), columns = choice.columns;
  const int64_t products = rows * columns * kBlockK / 4096;
  const int64_t moved = ((rows + columns) + (rows + choice.groups * columns)) * kBlockK / 128;
  const int64_t bytes = (rows / choice.wide() + columns / choice.high()) * kBlockK;
  const int64_t fetched = max(bytes / 64, bytes * blocks / (kL2Bytes * processors));
  return max(products, max(moved, fetched));
}

// Clocks in which the sums of all parts meet: rounds of one slab, or of all if one block ends them
// all.  Per clock an SM takes 16 bytes from others of its cluster (arXiv:2402.13499: 3.3 TB/s, by
// 114 SMs at 1.755 GHz).
inline int64_t clocks_of_exchange(const Choice& choice, bool apart) {
  constexpr int kClusterBytes = 16;
  const int slabs = apart ? 1 : choice.groups, rounds = choice.parts / 2;
  return int64_t{rounds} * slabs * Slab::kRows * choice.columns * 4 / kClusterBytes;
}

// Of the whole product; INT64_MAX for what cannot be.  `block_rows`: of a requantised result, or 0.
inline int64_t clocks(const Choice& choice, int M, int N, int K, int processors, int block_rows) {
  const int64_t slots = clusters_at_once(choice.cluster(), processors);
  const int64_t tiles = int64_t{ceil_div(M, choice.rows() * choice.high())} *
                        ceil_div(N, choice.columns * choice.wide());
  if (slots == 0 || (choice.parts > 1 && tiles > slots) ||
      (block_rows > 0 && choice.columns != kTileColumns) ||
      (block_rows > 1 && choice.rows() != block_rows))
    return INT64_MAX;
  const int64_t waves = (tiles + slots - 1) / slots;
  const int share = ceil_div(max(ceil_div(K, kBlockK), 1), choice.parts);
  const int64_t block = clocks_per_block(choice, min(tiles, slots) * choice.cluster(), processors);
  return waves * share * block + clocks_of_exchange(choice, block_rows <= 1);
}

inline Choice choose(int M, int N, int K, int processors, int block_rows) {
  constexpr auto kNone = Multicast::kNone, kA = Multicast::kA, kB = Multicast::kB;
  // Of equals the first
  constexpr Choice kChoices[] = {
      {2, 192, kB, 1},    {3, 128, kA, 1},    {2, 160, kB, 1},    {2, 128, kB, 1},     //
      {2, 192, kA, 1},    {3, 128, kB, 1},    {2, 160, kA, 1},    {2, 128, kA, 1},     //
      {2, 192, kNone, 1}, {3, 128, kNone, 1}, {2, 160, kNone, 1}, {2, 128, kNone, 1},  //
      {2, 192, kNone, 2}, {2, 160, kNone, 2}, {2, 128, kNone, 2},                      //
      {2, 192, kNone, 4}, {2, 160, kNone, 4}, {2, 128, kNone, 4}};
  Choice best{};
  int64_t least = INT64_MAX;
  for (const Choice& choice : kChoices) {
    const int64_t needed = clocks(choice, M, N, K, processors, block_rows);
    if (needed < least) best = choice, least = needed;
  }
  return best;
}

}  // namespace gemm_sm90
}  // namespace reeltime
