// SPDX-License-Identifier: Apache-2.0
// The producer of attention on Hopper: which blocks of keys, in which order, and their way into
// shared memory.
//
// Blocks come in groups of up to 16, the next ones that the same rotation of q scores, wherever
// they lie: neighbours mostly, of lists hardly ever two.  Lane l of warp 0 knows block l of the
// group.  A walk of the whole table, of a share of it, or of a list differs in nothing but where a
// lane takes the block's number from.
#pragma once
#include "attention/sm90_tile.h"
#include "common/cp_async.h"
#include "common/tma.h"

namespace reeltime {
namespace attend_sm90 {

constexpr int kStages = 6;  // blocks of keys in the ring
constexpr int kAhead = 3;   // blocks that are loaded ahead of transposition
constexpr int kGroup = 16;  // blocks of keys whose q.mu is one product
constexpr int kGroups = 4;  // in flight
static_assert(kAhead < kStages - 1, "or a transposition waits for the products before it");

template <class Key_, class T, int kD_>
struct Config {
  static constexpr int kD = kD_;  // channels of q, k and v
  static constexpr int kSize = sizeof(T);
  using Key = Key_;
  using K = Keys<Key>;
  using Sum = typename K::Sum;
  using V = Values<T, kD>;
  static_assert(kD == 64 || kD == 128, "whole swizzled rows");
};

template <class C>
struct SharedStorage {
  static constexpr int kPitch = 20;  // floats: columns of a pair of lanes in different banks
  struct alignas(1024) Stage {       // the swizzle's period
    uint8_t k[kKeys * C::kD];
    typename C::V::Tile v;
    alignas(128) float v_scale[C::kD];
    int block;  // number j of its slot's, times kGroup, plus its place in the group; -1: the end
  } stage[kStages];
  struct alignas(1024) Group {
    uint8_t mean[C::kD / 64][kGroup * 128];  // 64 channels of every block
    float k_scale[kGroup];
    int offset;
  } group[kGroups];
  alignas(1024) uint8_t q[8][C::kD / 64][16 * 128];  // of each warp, 16 bits
  float shift[8][kGroup][kPitch];                    // of each warp, [block][row]
  Mbarrier k_full[kStages], v_full[kStages], turned[kStages], empty[kStages];
  Mbarrier group_full[kGroups], group_empty[kGroups];
};
static_assert(sizeof(SharedStorage<Config<int8_t, e4m3, 128>>) <= 227 * 1024, "");

struct Maps {
  TensorMap k, v, v_scale;
};

// --- Order ---------------------------------------------------------------------------------------

// Blocks in the order of their numbers, block j of entry t of the table being t per_entry + j;
// those of absent entries are left out.
struct Walk {
  int at = 0, end;  // numbers, or places in the list
  int per_entry;    // blocks of keys
  const int* list = nullptr;
  int number;  // of this lane's block, that at at + lane, read ahead

  // The group: its size, q's rotation, and of this lane's block its place in slot and caches
  int count = 0, offset = 0, j = 0, entry = 0;

  DEVICE Walk(const AttentionParams& p, const Tile& tile)
      : end(p.T * tile.blocks), per_entry(tile.blocks) {
    if (p.list_bounds) {
      const int64_t head = int64_t{tile.b} * p.H + tile.h;
      const int* bounds =
          p.list_bounds + head * p.stride_list_head + tile.first / kQueries * p.stride_list_row;
      list = p.list_blocks + head * p.room;
      at = bounds[0];
      end = bounds[1];
    } else if (p.splits > 1) {
      int present = 0;
      for (int t = 0; t < p.T; t++) present += slot_of(p, t) >= 0;
      const int64_t steps = int64_t{present} * per_entry, split = blockIdx.y;
      at = number_of(p, static_cast<int>(split * steps / p.splits));
      end = number_of(p, static_cast<int>((split + 1) * steps / p.splits));
    }
    advance(0);
  }

  // The next group; false at the end.
  DEVICE bool find(const AttentionParams& p, const Tile& tile) {
    while (at < end) {
      const int lane = static_cast<int>(lane_index());
      const bool mine = lane < kGroup && at + lane < end;
      const int t = number / per_entry, slot = mine ? slot_of(p, t) : -1;
      const int wanted = slot >= 0 && p.offset_index ? static_cast<int>(p.offset_index[t]) : 0;
      const unsigned present = ballot(slot >= 0);
      if (present & 1) {
        offset = shuffle(wanted, 0);
        count = first_lane(~ballot(slot >= 0 && wanted == offset));
        j = number - t * per_entry;
        entry = tile.b * p.slots + slot;
        advance(count);
        return true;
      }
      advance(present ? first_lane(present) : kGroup);
    }
    return false;
  }

 private:
  // Negative if the entry is absent.
  DEVICE static int slot_of(const AttentionParams& p, int t) {
    const int64_t slot = p.table ? p.table[t] : 0;
    return slot >= 0 && slot < p.slots ? static_cast<int>(slot) : -1;
  }
  // Of a block, by how many come before it in entries that are present.
  DEVICE int number_of(const AttentionParams& p, int before) const {
    int t = 0;
    for (; t < p.T; t++) {
      if (slot_of(p, t) < 0) continue;
      if (before < per_entry) break;
      before -= per_entry;
    }
    return t * per_entry + before;
  }
  DEVICE void advance(int by) {
    at += by;
    const int place = at + static_cast<int>(lane_index());
    number = place;
    if (list) number = place < end ? list[place] : 0;
  }
};

// --- Loads ---------------------------------------------------------------------------------------

// By one warp, all of whose lanes call.
template <class C>
struct Loader {
  const AttentionParams& p;
  const Maps& maps;
  const Tile& tile;
  SharedStorage<C>& shared;
  Walk walk;
  int place = 0;  // of the next block in its group
  bool more = true;
  Ring<kStages> ring;
  Ring<kGroups> groups;

  // A row of all heads' scales and means.
  DEVICE int scale_row(int entry, int j) const { return entry * ceil_div(p.N, kKeys) + j; }

  // Mean keys of the group, on their way.
  DEVICE void load_means() {
    constexpr int kChunks = C::kD / 8;
    const int lane = static_cast<int>(lane_index()), row = scale_row(walk.entry, walk.j);
    const uint16_t* means = static_cast<const uint16_t*>(p.k_mean);
#pragma unroll
    for (int i = 0; i < kGroup * kChunks; i += 32) {
      const int r = (i + lane) / kChunks, chunk = (i + lane) % kChunks;
      const int64_t from = int64_t{shuffle(row, r)} * p.H_kv + tile.h_kv;
      cp_async(shared_address(shared.group[groups.at].mean[chunk / 8]) +
                   Swizzle<128>::chunk(r, chunk % 8),
               r < walk.count ? means + from * C::kD + chunk * 8 : means, r < walk.count);
    }
    cp_async_commit();
  }

  // Of the next block of keys, or word of the end.
  DEVICE void load() {
    if (!more) return;
    const int lane = static_cast<int>(lane_index());
    if (place == walk.count) {
      more = walk.find(p, tile);
      place = 0;
    }
    const bool begins = more && place == 0;
    float scale = 0.0f;
    if (begins) {
      shared.group_empty[groups.at].wait(groups.parity ^ 1);
      if (lane < walk.count)
        scale = p.k_scale[int64_t{scale_row(walk.entry, walk.j)} * p.H_kv + tile.h_kv];
      if (p.smooth == Smooth::kBlock) load_means();
    }

    const int j = shuffle(walk.j, place), entry = shuffle(walk.entry, place);
    auto& stage = shared.stage[ring.at];
    Mbarrier &k_full = shared.k_full[ring.at], &v_full = shared.v_full[ring.at];
    if (lane == 0) {  // lanes that only wait might do so past the release that follows
      shared.empty[ring.at].wait(ring.parity ^ 1);
      stage.block = more ? j * kGroup + place : -1;
      if (more) {
        k_full.arrive_expect(sizeof stage.k);
        tma_load(stage.k, maps.k, k_full, {0, tile.h_kv, j * kKeys, entry});
        v_full.arrive_expect(sizeof stage.v.loaded + sizeof stage.v_scale);
        if constexpr (C::V::kTransposed) {
          tma_load(stage.v.loaded, maps.v, v_full, {0, tile.h_kv, j * kKeys, entry});
        } else {
#pragma unroll
          for (int i = 0; i < C::kD / 64; i++)
            tma_load(stage.v.loaded[i], maps.v, v_full, {64 * i, tile.h_kv, j * kKeys, entry});
        }
        tma_load(stage.v_scale, maps.v_scale, v_full, {0, tile.h_kv, scale_row(entry, j)});
      } else {
        k_full.arrive();
        v_full.arrive();
      }
    }
    ring.advance();

    // The group's own, behind the keys
    if (begins) {
      auto& group = shared.group[groups.at];
      if (lane < kGroup) group.k_scale[lane] = scale;
      if (lane == 0) group.offset = walk.offset;
      cp_async_wait<0>();
      sync_warp();
      if (lane == 0) shared.group_full[groups.at].arrive();
      groups.advance();
    }
    place++;
  }
};

template <class C>
DEVICE void produce(const AttentionParams& p, const Maps& maps, SharedStorage<C>& shared) {
  const Tile tile(p);
  const int warp = static_cast<int>(warp_index()), lane = static_cast<int>(lane_index());
  if (warp > 0 && !C::V::kTransposed) return;
  Loader<C> loader{p, maps, tile, shared, Walk(p, tile)};
  if constexpr (!C::V::kTransposed) {
    while (loader.more) loader.load();
  } else {
    for (int s = 0; s < kStages; s++) C::V::write_ones(shared.stage[s].v, threadIdx.x);
    Ring<kStages> ring;  // the first loads come without a transposition
#pragma unroll 1
    for (int step = -kAhead;; step++) {
      if (warp == 0) loader.load();
      if (step < 0) continue;
      // The stage was empty when its values were loaded, and so were its transposed ones
      auto& stage = shared.stage[ring.at];
      shared.v_full[ring.at].wait(ring.parity);
      if (stage.block < 0) break;
      sync_warp();
      C::V::transpose(stage.v, warp, lane);
      fence_async_proxy();
      sync_warp();
      if (lane == 0) shared.turned[ring.at].arrive();
      ring.advance();
    }
  }
}

}  // namespace attend_sm90
}  // namespace reeltime
