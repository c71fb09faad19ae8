// SPDX-License-Identifier: Apache-2.0
// cp.async, mbarrier and TMA: copies whose effect shows later than their issue.
//
// When the bytes arrive is drawn (Landing): at the issue, at the wait, or at random between.  The
// race check does not depend on the draw: from issue to completion the bytes belong to the copy.
#include <algorithm>

#include "emulator/block.h"

namespace reeltime::emulator {

namespace {

void land(AsyncCopy& copy) {
  if (!copy.landed) copy.land();
  copy.landed = true;
}

void issue(CopyQueue& queue, AsyncCopy copy) {
  if (lands_now()) land(copy);
  queue.open.push_back(std::move(copy));
}

void commit(CopyQueue& queue) {
  queue.committed.push_back(std::move(queue.open));
  queue.open.clear();
}

void wait(CopyQueue& queue, uint32_t pending_groups) {
  while (queue.committed.size() > pending_groups) {
    for (AsyncCopy& copy : queue.committed.front()) {
      land(copy);
      copy.complete();
    }
    queue.committed.pop_front();
  }
}

}  // namespace

// --- cp.async --------------------------------------------------------------------------------

void cp_async(uint32_t destination, const void* source, uint32_t bytes, uint32_t valid_bytes) {
  KERNEL_SITE();
  const bool watched =
      valid_bytes && check_registered(source, valid_bytes, bytes, false, "cp.async");
  const Place to = resolve(destination, bytes, bytes, "cp.async");
  const uint32_t reading =
      watched ? begin_global_read(source, valid_bytes, Touch::kAsyncRead, "cp.async") : 0;
  begin_write(*to.block, to.offset, bytes, "cp.async");
  Fiber* by = state.running;
  AsyncCopy copy;
  copy.land = [=] {
    if (valid_bytes) memcpy(to.pointer(), source, valid_bytes);
    memset(to.pointer() + valid_bytes, 0, bytes - valid_bytes);
  };
  // The waiting thread knows the bytes, as if it had stored them; others need a barrier after it.
  copy.complete = [=] {
    if (state.options.check_races) complete_write(*to.block, to.offset, bytes, epoch_of(*by));
    if (reading) complete_global_read(source, valid_bytes, reading, epoch_of(*by));
  };
  issue(by->cp_async, std::move(copy));
}

void cp_async_commit() {
  KERNEL_SITE();
  commit(state.running->cp_async);
}

void cp_async_wait(uint32_t pending_groups) {
  KERNEL_SITE();
  wait(state.running->cp_async, pending_groups);
}

// --- mbarrier --------------------------------------------------------------------------------

namespace {

Mbarrier& find(const Place& place, const char* op) {
  const auto found = place.block->mbarriers.find(place.offset);
  if (found == place.block->mbarriers.end())
    fail("%s: there is no mbarrier at shared byte %u", op, place.offset);
  if (state.options.check_races && !knows(*state.running, found->second.initialised))
    fail("race: %s at shared byte %u: no barrier orders its initialisation before", op,
         place.offset);
  return found->second;
}

void complete_phase(Mbarrier& barrier) {
  if (barrier.pending || barrier.bytes) return;
  barrier.phase ^= 1;
  barrier.pending = barrier.expected;
  barrier.completed = everything(barrier.gathering);
  barrier.gathering = {};
  auto& waiting = barrier.waiting;
  for (auto& [fiber, parity] : waiting)
    if (barrier.phase != parity) {
      join(fiber->order, barrier.completed);
      wake(fiber);
    }
  waiting.erase(std::remove_if(waiting.begin(), waiting.end(),
                               [&](const auto& w) { return barrier.phase != w.second; }),
                waiting.end());
}

void land_bytes(Block* block, uint32_t offset, uint32_t bytes) {
  Mbarrier& barrier = block->mbarriers[offset];
  release_engine(barrier.gathering, *block);
  barrier.bytes -= bytes;
  complete_phase(barrier);
}

}  // namespace

void mbarrier_init(uint32_t address, uint32_t arrivals) {
  KERNEL_SITE();
  const Place place = resolve(address, 8, 8, "mbarrier.init");
  if (arrivals == 0 || arrivals >= 1u << 20) fail("mbarrier.init: %u arrivals", arrivals);
  touch_write(*place.block, *state.running, place.offset, 8, "mbarrier.init");
  if (state.options.check_races)
    for (int i = 0; i < 8; i++) place.block->shadow[place.offset + i].barrier = true;
  Mbarrier barrier;
  barrier.expected = barrier.pending = arrivals;
  if (state.options.check_races) barrier.initialised = epoch_of(*state.running);
  place.block->mbarriers[place.offset] = std::move(barrier);
}

void mbarrier_arrive(uint32_t address, uint32_t arrivals, uint32_t transaction_bytes) {
  KERNEL_SITE();
  const Place place = resolve(address, 8, 8, "mbarrier.arrive");
  touch_remote(*place.block, "mbarrier.arrive");
  Mbarrier& barrier = find(place, "mbarrier.arrive");
  barrier.bytes += transaction_bytes;
  if (barrier.bytes >= 1 << 20) fail("mbarrier: %lld bytes announced", (long long)barrier.bytes);
  if (barrier.pending < arrivals)
    fail("mbarrier.arrive at shared byte %u: more arrivals than the %u it was initialised for",
         place.offset, barrier.expected);
  barrier.pending -= arrivals;
  release(barrier.gathering);
  complete_phase(barrier);
}

bool mbarrier_test(uint32_t address, uint32_t parity) {
  KERNEL_SITE();
  const Place place = resolve(address, 8, 8, "mbarrier.try_wait");
  Mbarrier& barrier = find(place, "mbarrier.try_wait");
  if (barrier.phase == parity) {
    // A thread that polls must let the others run.
    switch_context(state.running->context, state.scheduler);
    return false;
  }
  acquire(barrier.completed);
  return true;
}

void mbarrier_wait(uint32_t address, uint32_t parity) {
  KERNEL_SITE();
  const Place place = resolve(address, 8, 8, "mbarrier.try_wait");
  Mbarrier& barrier = find(place, "mbarrier.try_wait");
  if (parity > 1) fail("mbarrier.try_wait: parity %u", parity);
  if (barrier.phase != parity) {
    acquire(barrier.completed);
    return;
  }
  barrier.waiting.emplace_back(state.running, parity);
  block_until_woken(
      {"%1$s at shared byte %2$u, parity %3$u", "mbarrier.try_wait", place.offset, parity});
}

// --- TMA -------------------------------------------------------------------------------------

namespace {

// A box at its coordinates, in the tensor and in shared memory.
struct Box {
  TensorMapFields map;
  int64_t at[4];
  bool watched;  // somebody may write the tensor

  uint32_t rows() const {
    return map.box[1] * (map.rank > 2 ? map.box[2] : 1) * (map.rank > 3 ? map.box[3] : 1);
  }
  uint32_t row_bytes() const { return map.box[0] * map.element_bytes; }
  uint32_t bytes() const { return rows() * row_bytes(); }

  // Runs visit(byte in the box's shared memory, byte in global memory or null when outside, bytes)
  // for pieces of at most 16 bytes, which no swizzle tears apart.
  template <class Visit>
  void for_each_piece(uint32_t shared_start, Visit visit) const {
    const int64_t size = map.element_bytes, width = map.size[0] * size, first = at[0] * size;
    for (uint32_t row = 0; row < rows(); row++) {
      const uint32_t index[4] = {0, row % map.box[1],
                                 map.rank > 2 ? row / map.box[1] % map.box[2] : 0,
                                 map.rank > 3 ? row / map.box[1] / map.box[2] : 0};
      const unsigned char* global = map.base;
      bool inside = true;
      for (int i = 1; i < map.rank; i++) {
        const int64_t c = at[i] + index[i];
        inside &= c >= 0 && c < static_cast<int64_t>(map.size[i]);
        global += inside ? c * static_cast<int64_t>(map.stride[i]) : 0;
      }
      const int64_t end = row_bytes();
      for (int64_t x = 0; x < end;) {
        const int64_t c = first + x;
        const bool in = inside && c >= 0 && c < width;
        int64_t next = std::min(end, x / 16 * 16 + 16);
        if (c < 0) next = std::min(next, -first);
        if (c < width) next = std::min(next, width - first);
        const uint32_t linear = shared_start + row * row_bytes() + static_cast<uint32_t>(x);
        visit(swizzle(linear, map.swizzle_bytes), in ? global + c : nullptr,
              static_cast<size_t>(next - x));
        x = next;
      }
    }
  }
};

Box make_box(const void* map, const int* coordinates, int rank, uint32_t shared, const char* op) {
  Box box{};
  memcpy(&box.map, map, sizeof box.map);  // the map may be gone when the copy lands
  if (box.map.valid != 1) fail("%s: the tensor map was not made by make_tensor_map", op);
  if (box.map.rank != rank) fail("%s of rank %d with a map of rank %d", op, rank, box.map.rank);
  for (int i = 0; i < rank; i++) box.at[i] = coordinates[i];
  const size_t alignment = box.map.swizzle_bytes ? 8 * box.map.swizzle_bytes : 128;
  resolve(shared, box.bytes(), alignment, op);
  // The whole tensor must be the host's: also the part that this box does not touch.
  size_t span = box.map.size[0] * box.map.element_bytes;
  for (int i = 1; i < rank; i++) span += (box.map.size[i] - 1) * box.map.stride[i];
  box.watched = check_registered(box.map.base, span, 16, strcmp(op, "TMA store") == 0, op);
  box.watched &= state.options.check_races != 0;
  return box;
}

}  // namespace

void tma_load(uint32_t destination, const void* map, uint32_t barrier, const int* coordinates,
              int rank, uint32_t cluster_mask) {
  KERNEL_SITE();
  const Box box = make_box(map, coordinates, rank, destination, "TMA load");
  Block* mine = state.running->block;
  const uint32_t ranks = cluster_mask ? cluster_mask : 1u << mine->rank;
  if (ranks >> state.blocks.size()) fail("TMA load: ranks %x of %zu", ranks, state.blocks.size());
  const uint32_t to = resolve(destination, 1, 1, "TMA load").offset;
  const uint32_t at = resolve(barrier, 8, 8, "TMA load").offset;
  for (Block& block : state.blocks) {
    if (!(ranks >> block.rank & 1)) continue;
    find({&block, at}, "TMA load");
    begin_write(block, to, box.bytes(), "TMA load");
    uint32_t reading = 0;
    if (box.watched)
      box.for_each_piece(to, [&](uint32_t, const unsigned char* global, size_t bytes) {
        if (global)
          reading = begin_global_read(global, bytes, Touch::kBulkRead, "TMA load", reading);
      });
    AsyncCopy copy;
    copy.land = [=, target = &block] {
      const Epoch tick = state.options.check_races ? tick_engine(*target) : 0;
      box.for_each_piece(to, [&](uint32_t byte, const unsigned char* global, size_t bytes) {
        if (global)
          memcpy(target->shared + byte, global, bytes);
        else
          memset(target->shared + byte, 0, bytes);
        if (global && reading) complete_global_read(global, bytes, reading, tick);
      });
      complete_write(*target, to, box.bytes(), tick);
      land_bytes(target, at, box.bytes());
    };
    if (state.options.landing == Landing::kAtIssue)
      copy.land();
    else
      state.flying.push_back(std::move(copy));
  }
}

void tma_store(const void* map, uint32_t source, const int* coordinates, int rank) {
  KERNEL_SITE();
  const Box box = make_box(map, coordinates, rank, source, "TMA store");
  const Place from = resolve(source, box.bytes(), 16, "TMA store");
  touch_read(*from.block, *state.running, from.offset, box.bytes(), "TMA store", Proxy::kAsync);
  begin_read(*from.block, from.offset, box.bytes());
  if (box.watched)
    box.for_each_piece(from.offset, [&](uint32_t, const unsigned char* global, size_t bytes) {
      if (global) touch_global(global, bytes, Touch::kBulkWrite, "TMA store");
    });
  Fiber* by = state.running;
  AsyncCopy copy;
  copy.land = [box, from] {
    box.for_each_piece(from.offset, [&](uint32_t byte, const unsigned char* global, size_t bytes) {
      if (global) memcpy(const_cast<unsigned char*>(global), from.block->shared + byte, bytes);
    });
  };
  copy.complete = [=] { complete_read(*from.block, from.offset, box.bytes(), *by); };
  issue(by->bulk, std::move(copy));
}

void bulk_commit() {
  KERNEL_SITE();
  commit(state.running->bulk);
}

void bulk_wait(uint32_t pending_groups, bool) {
  KERNEL_SITE();
  wait(state.running->bulk, pending_groups);
}

}  // namespace reeltime::emulator
