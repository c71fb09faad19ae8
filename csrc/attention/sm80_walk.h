// SPDX-License-Identifier: Apache-2.0
// attention on mma.sync: which keys a block of threads sees, and in which order.
//
// Without lists, the blocks of 64 keys of the table's present entries one after the other, of which
// a split takes its share; with, what the list of these 128 queries names.  A step along a list, or
// to another entry, looks at list and table while the values of the block before are on their way.
#pragma once
#include "attention/attention.h"
#include "attention/sm80_tiles.h"
#include "common/reduce.h"

namespace reeltime {
namespace attend_sm80 {

constexpr int kGroup = 16;  // blocks of keys whose q.mu is one product

// Blocks of keys whose q.mu a warp has: those before `end` that the queries of `offset` see.
struct Group {
  int offset, end;
  float q_scale;      // of those queries, in log2 units
  int means[kGroup];  // rows of k_mean, negative where there is no block
};

// Slot of an entry of the table, -1 if it is absent.
DEVICE int slot_of(const AttentionParams& p, int t) {
  const int64_t slot = p.table ? p.table[t] : 0;
  return slot >= 0 && slot < p.slots ? static_cast<int>(slot) : -1;
}

// Which share of the keys.  Asked for twice, or it would wait in a register.
DEVICE int split_of(const AttentionParams& p) {
  return opaque(static_cast<int>(blockIdx.x)) % p.splits;
}

// At block j of entry t of the table, which is in this slot.  NOTE: registers are few; where that
// is, is computed where it is needed.
struct Walk {
  int t, j, slot;
  int at, end;  // in the list; without one, of the blocks of present entries

  // Row of k_scale; times D or E, of k_mean and v_scale.
  DEVICE int scales(const AttentionParams& p, int h_kv) const {
    const int entry = static_cast<int>(blockIdx.z) * p.slots + slot;
    return (entry * ceil_div(p.N, kBlockN) + j) * p.H_kv + h_kv;
  }
  DEVICE const void* keys(const AttentionParams& p, int h_kv) const {
    return static_cast<const uint8_t*>(p.k) + blockIdx.z * p.stride_kb + slot * p.stride_ks +
           h_kv * p.stride_kh + int64_t{j} * kBlockN * p.stride_kn;
  }
  DEVICE const void* values(const AttentionParams& p, int h_kv) const {
    return static_cast<const uint8_t*>(p.v) +
           (blockIdx.z * p.stride_vb + slot * p.stride_vs + h_kv * p.stride_vh +
            int64_t{j} * kBlockN * p.stride_vn) *
               size_of(p.v_dtype);
  }

  // The first block that the 128 queries of this tile see.
  DEVICE void start(const AttentionParams& p, int tile) {
    const int blocks = ceil_div(p.N, kBlockN);
    t = j = 0;
    if (p.list_bounds) {
      const int* bounds = p.list_bounds + tile * p.stride_list_row +
                          (int64_t{blockIdx.z} * p.H + blockIdx.y) * p.stride_list_head;
      at = max(bounds[0], 0);
      end = min(bounds[1], p.room);
    } else {
      int64_t steps = 0;
#pragma unroll 4
      for (int i = 0; i < p.T; i++) steps += slot_of(p, i) >= 0 ? blocks : 0;
      if (p.causal) {
        const int64_t seen = int64_t{tile + 1} * kBlockM + p.first_last;  // by the last query
        steps = min(steps, (max(seen, int64_t{0}) + kBlockN - 1) / kBlockN);
      }
      at = static_cast<int>(split_of(p) * steps / p.splits);
      end = static_cast<int>((split_of(p) + 1) * steps / p.splits);
      if (at == end) return;
      j = at % blocks;
      for (int before = at / blocks; before > 0; t++) before -= slot_of(p, t) >= 0;
    }
    find(p);
  }

  // From here on, the first block that is present.
  DEVICE void find(const AttentionParams& p) {
    const int blocks = ceil_div(p.N, kBlockN);
    if (p.list_bounds) {
      const int* list = p.list_blocks + (int64_t{blockIdx.z} * p.H + blockIdx.y) * p.room;
      for (; at < end; at++) {
        j = list[at] - t * blocks;
        for (; j >= blocks && t < p.T; t++) j -= blocks;
        if (j >= 0 && t < p.T && (slot = slot_of(p, t)) >= 0) break;
      }
    } else if (at < end) {
      while ((slot = slot_of(p, t)) < 0) t++;
    }
  }

  DEVICE void advance(const AttentionParams& p) {
    at++;
    if (p.list_bounds || ++j * kBlockN >= p.N) {
      if (!p.list_bounds) t++, j = 0;
      find(p);
    }
  }

  // The next ones, by a warp: up to 16 blocks from this one on that the queries of `offset` see.
  DEVICE void gather(Group& group, const AttentionParams& p, int offset, int h_kv) const {
    const int lane = static_cast<int>(lane_index());
    int count = min(kGroup, ceil_div(p.N, kBlockN) - j), mean = scales(p, h_kv) + lane * p.H_kv;
    if (p.list_bounds) {
      Walk it = *this;
      it.at += lane;
      it.end = min(end, it.at + 1);
      it.find(p);
      const bool found = it.at < it.end;
      const bool other = found && p.offset_index && p.offset_index[it.t] != offset;
      count = first_lane(ballot(other) | 1u << kGroup);
      mean = found ? it.scales(p, h_kv) : -1;
    }
    sync_warp();  // the group before has been read
    if (lane < kGroup) group.means[lane] = lane < count ? mean : -1;
    if (lane == 0) {
      group.offset = offset;
      group.end = at + count;
    }
    sync_warp();
  }
};

}  // namespace attend_sm80
}  // namespace reeltime
