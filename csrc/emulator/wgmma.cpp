// SPDX-License-Identifier: Apache-2.0
// wgmma: products of a warpgroup, asynchronous and in order.  Layouts: common/wgmma.h.
//
// From issue to wait the operands in shared memory may not be written, nor the accumulators
// touched; the race check knows both.  A wait is a meeting of the warpgroup here, but orders
// nothing between its warps: each must announce for itself that it is done with a buffer.
#include <memory>

#include "emulator/block.h"
#include "emulator/numbers.h"

namespace reeltime::emulator {

namespace {

Warpgroup& mine() { return state.running->block->warpgroups[state.running->linear / 128]; }

Fiber& member(unsigned thread) {
  return state.running->block->fibers[state.running->linear / 128 * 128 + thread];
}

template <class All>
void meet_warpgroup(const char* op, const WgmmaOperands& operands, const All& all) {
  Fiber& me = *state.running;
  Warpgroup& group = mine();
  if (me.block->threads < (me.linear / 128 + 1) * 128)
    fail("%s: the block has no complete warpgroup here", op);
  for (unsigned warp = 0; warp < 4; warp++)
    if (const unsigned gone = me.block->warps[me.linear / 128 * 4 + warp].done)
      fail("divergent collective: %s, but %s has exited", op,
           thread_name(member(32 * warp + __builtin_ctz(gone))).c_str());
  if (group.arrived && strcmp(group.op, op) != 0)
    fail("divergent collective: %s meets %s in the warpgroup", op, group.op);
  group.op = op;
  group.operands[me.linear % 128] = operands;
  if (++group.arrived < 128) {
    group.waiting.push_back(&me);
    block_until_woken({"%1$s of the warpgroup", op, 0, 0});
    return;
  }
  group.arrived = 0;
  for (Fiber* fiber : group.waiting) wake(fiber);
  group.waiting.clear();
  all(group);
}

// --- Operands in shared memory ---------------------------------------------------------------

struct Operand {
  uint64_t descriptor;
  int rows;
  Element type;
  bool transposed;

  int k_size() const { return 32 / element_bytes(type); }
  // Runs visit(row, first k, offset in the window) for pieces of consecutive bytes.
  template <class Visit>
  void for_each_piece(Visit visit) const {
    const int size = element_bytes(type), piece = transposed ? 1 : 16 / size;
    for (int row = 0; row < rows; row++)
      for (int k = 0; k < k_size(); k += piece)
        visit(row, k, element_address(descriptor, row, k, size, transposed), piece * size);
  }
};

Operand operand_a(const WgmmaOperands& o) { return {o.a, 64, o.type, false}; }
Operand operand_b(const WgmmaOperands& o) { return {o.b, o.n, o.type, o.b_transposed}; }

// --- Values ----------------------------------------------------------------------------------

template <Element kType, class Wide>
std::vector<Wide> load(const Block& block, const Operand& operand) {
  constexpr int kBytes = element_bytes(kType), kDepth = 32 / kBytes;
  std::vector<Wide> values(operand.rows * kDepth);
  operand.for_each_piece([&](int row, int k, uint32_t address, int bytes) {
    const unsigned char* p = block.shared + (address - kSharedBase);
    for (int i = 0; i < bytes / kBytes; i++) {
      const uint32_t bits = kBytes == 1 ? p[i] : p[2 * i] | p[2 * i + 1] << 8;
      values[row * kDepth + k + i] = decode<kType, Wide>(bits, 0);
    }
  });
  return values;
}

struct Multiply {
  const Block& block;
  const WgmmaOp& op;

  template <Element kType>
  void run() {
    using Wide = typename Sums<kType>::Wide;
    using Sum = typename Sums<kType>::Sum;
    constexpr int kPer = 4 / element_bytes(kType), kDepth = 8 * kPer;
    const WgmmaOperands& o = op.shared;
    const std::vector<Wide> b = load<kType, Wide>(block, operand_b(o));
    std::vector<Wide> a(64 * kDepth);
    if (!o.a_registers) a = load<kType, Wide>(block, operand_a(o));
    for (int t = 0; t < 128 && o.a_registers; t++)
      for (int i = 0; i < 4 * kPer; i++) {
        const Position p = wgmma_a_position(t, i / kPer, i % kPer, kPer);
        a[p.row * kDepth + p.column] = decode<kType, Wide>(op.a[t][i / kPer], i % kPer);
      }
    for (int t = 0; t < 128; t++) {
      auto* d = static_cast<Sum*>(op.d[t]);
      for (int i = 0; i < o.n / 2; i++) {
        const auto [row, column] = wgmma_d_position(t, i);
        const Wide *a_row = &a[row * kDepth], *b_row = &b[column * kDepth];
        Wide sum = o.accumulate ? static_cast<Wide>(d[i]) : Wide(0);
        for (int k = 0; k < kDepth; k++) sum += a_row[k] * b_row[k];
        d[i] = static_cast<Sum>(sum);
      }
    }
  }
};

void land(const Block& block, WgmmaOp& op) {
  if (!op.landed) dispatch(op.shared.type, Multiply{block, op});
  op.landed = true;
}

// In order: everything issued before lands first.
void land_all(const Block& block, Warpgroup& group) {
  for (auto& ops : group.committed)
    for (WgmmaOp& op : ops) land(block, op);
  for (WgmmaOp& op : group.open) land(block, op);
}

// --- Checks ----------------------------------------------------------------------------------

// Every warp reads all of B, and its own 16 rows of A; a lane speaks for its warp.
template <class Visit>
void for_each_reader(const Operand& operand, bool is_a, Visit visit) {
  operand.for_each_piece([&](int row, int, uint32_t address, int bytes) {
    const Place place = resolve(address, bytes, 1, "wgmma");
    const unsigned first = is_a ? row / 16 : 0, last = is_a ? row / 16 : 3;
    for (unsigned warp = first; warp <= last; warp++)
      visit(place, bytes, member(32 * warp), warp == last);
  });
}

void begin(const Operand& operand, bool is_a) {
  Fiber* me = state.running;
  for_each_reader(operand, is_a, [&](const Place& place, int bytes, Fiber& by, bool last) {
    state.running = &by;
    touch_read(*place.block, by, place.offset, bytes, "wgmma", Proxy::kAsync);
    if (last) begin_read(*place.block, place.offset, bytes);
    state.running = me;
  });
}

void complete(const Operand& operand, bool is_a) {
  for_each_reader(operand, is_a, [](const Place& place, int bytes, Fiber& by, bool last) {
    complete_read(*place.block, place.offset, bytes, by, last);
  });
}

void complete(WgmmaOp& op) {
  if (!state.options.check_races) return;
  complete(operand_b(op.shared), false);
  if (!op.shared.a_registers) complete(operand_a(op.shared), true);
}

}  // namespace

// --- Instructions ----------------------------------------------------------------------------

void wgmma_fence() {
  KERNEL_SITE();
  meet("wgmma.fence", kAllLanes, nullptr, [](void**) {
    for (Fiber* lane : state.running->warp->lanes) lane->wgmma_fenced = true;
  });
}

void wgmma(const WgmmaOperands& operands) {
  KERNEL_SITE();
  if (!state.running->wgmma_fenced)
    fail("wgmma without wgmma.fence: its registers may not be written yet");
  meet_warpgroup("wgmma.mma_async", operands, [](Warpgroup& group) {
    WgmmaOp op{};
    op.shared = group.operands[0];
    for (unsigned i = 0; i < 128; i++) {
      const WgmmaOperands& o = group.operands[i];
      if (o.a != op.shared.a || o.b != op.shared.b || o.accumulate != op.shared.accumulate ||
          o.n != op.shared.n || o.type != op.shared.type)
        fail("wgmma: %s passes other operands than the first of its warpgroup",
             thread_name(member(i)).c_str());
      op.d[i] = o.d;
      if (o.a_registers) memcpy(op.a[i], o.a_registers, sizeof op.a[i]);
      member(i).in_flight.push_back({static_cast<const char*>(o.d), sizeof(float) * o.n / 2});
    }
    begin(operand_b(op.shared), false);
    if (!op.shared.a_registers) begin(operand_a(op.shared), true);
    group.open.push_back(op);
    if (lands_now()) land_all(*state.running->block, group);
  });
}

void wgmma_commit() {
  KERNEL_SITE();
  meet_warpgroup("wgmma.commit_group", {}, [](Warpgroup& group) {
    group.committed.push_back(std::move(group.open));
    group.open.clear();
  });
}

void wgmma_wait(uint32_t pending_groups) {
  KERNEL_SITE();
  meet_warpgroup("wgmma.wait_group", {}, [pending_groups](Warpgroup& group) {
    while (group.committed.size() > pending_groups) {
      for (WgmmaOp& op : group.committed.front()) {
        land(*state.running->block, op);
        complete(op);
        for (unsigned i = 0; i < 128; i++) member(i).in_flight.erase(member(i).in_flight.begin());
      }
      group.committed.pop_front();
    }
    // The lanes of a warp pass together: whichever of them arrives on a barrier speaks for all.
    Fiber* last = state.running;
    for (unsigned warp = 0; warp < 4; warp++) {
      const auto& lanes = last->block->warps[last->linear / 128 * 4 + warp].lanes;
      Gathering arrived;
      for (Fiber* lane : lanes) {
        lane->wgmma_fenced = false;
        state.running = lane;
        release(arrived);
      }
      const Order all = everything(arrived);
      for (Fiber* lane : lanes) join(lane->order, all);
    }
    state.running = last;
  });
}

}  // namespace reeltime::emulator
