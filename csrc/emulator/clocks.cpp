// SPDX-License-Identifier: Apache-2.0
// Happens-before: vector clocks over the threads of a cluster.
//
// Thread t's clock counts its releases.  An access by t at clock c is known to u once u has passed
// a barrier that t reached after c.  __syncwarp, bar, mbarrier and cluster barriers order memory;
// shuffles, ldmatrix and mma do not, and are not treated as if they did.
#include <algorithm>

#include "emulator/block.h"

namespace reeltime::emulator {

// --- Joins -----------------------------------------------------------------------------------

static void raise(Clock& clock, size_t thread, uint32_t time) {
  if (clock.size() <= thread) clock.resize(thread + 1);
  clock[thread] = std::max(clock[thread], time);
}

static void raise(Clock& to, const Clock& from) {
  if (to.size() < from.size()) to.resize(from.size());
  for (size_t i = 0; i < from.size(); i++) to[i] = std::max(to[i], from[i]);
}

static bool holds(const Clock& all, const Clock& some) {
  bool result = all.size() >= some.size();
  for (size_t i = 0; result && i < some.size(); i++) result = all[i] >= some[i];
  return result;
}

// Threads that have passed a barrier share one clock; a new one is made only if neither of two
// holds the other.  The next thread to ask mostly asks the same.
static void join(SharedClock& to, const SharedClock& from, SharedClock (&last)[3]) {
  if (!from || to == from) return;
  if (!to) {
    to = from;
    return;
  }
  auto& [first, second, result] = last;
  if (first != to || second != from) {
    first = to;
    second = from;
    result = holds(*from, *to) ? from : to;
    if (result == to && !holds(*to, *from)) {
      Clock both = *to;
      raise(both, *from);
      result = std::make_shared<const Clock>(std::move(both));
    }
  }
  to = result;
}

static void join(std::shared_ptr<const Past>& to, const std::shared_ptr<const Past>& from) {
  if (!from || to == from) return;
  if (!to) {
    to = from;
    return;
  }
  Past both = *to;
  for (const auto& [cluster, clock] : *from) join(both[cluster], clock, state.last_joins[2]);
  if (both == *from)
    to = from;
  else if (both != *to)
    to = std::make_shared<const Past>(std::move(both));
}

void join(Order& to, const Order& from) {
  join(to.seen, from.seen, state.last_joins[0]);
  join(to.fenced, from.fenced, state.last_joins[1]);
  join(to.past, from.past);
}

// --- Handing over ----------------------------------------------------------------------------

static void tick(Fiber& me) {
  if (++me.now >= kNever) fail("too many barriers for the race check's clocks");
}

void release(Gathering& to) {
  if (!state.options.check_races) return;
  Fiber& me = *state.running;
  const auto gather = [&](Clock& clock, SharedClock& last, const SharedClock& mine, uint32_t time) {
    if (mine && mine != last) raise(clock, *mine);
    last = mine;
    raise(clock, me.id, time);
  };
  gather(to.seen, to.last.seen, me.order.seen, me.now);
  gather(to.fenced, to.last.fenced, me.order.fenced, me.fenced_now);
  join(to.last.past, me.order.past);
  tick(me);
}

Order everything(Gathering& from) {
  if (!state.options.check_races) return {};
  return {std::make_shared<const Clock>(std::move(from.seen)),
          std::make_shared<const Clock>(std::move(from.fenced)), std::move(from.last.past)};
}

void acquire(const Order& from) { join(state.running->order, from); }

void fence_async_proxy() {
  KERNEL_SITE();
  if (!state.options.check_races) return;
  Fiber& me = *state.running;
  me.order.fenced = me.order.seen;  // all that is known here, the async proxy now sees too
  me.fenced_now = me.now;
  tick(me);
}

void fence_device() {
  KERNEL_SITE();
  Fiber& me = *state.running;
  join(me.order, me.observed);
  me.observed = {};
  Gathering all;
  release(all);
  me.released = everything(all);
}

// The engine's ticks order TMA writes: whoever acquires the mbarrier on which a load landed knows
// it, and nobody else, not even the thread that issued it.
Epoch tick_engine(Block& block) {
  return (state.threads + block.rank) << kClockBits | ++block.engine_clock;
}

void release_engine(Gathering& to, Block& block) {
  if (!state.options.check_races) return;
  raise(to.seen, state.threads + block.rank, block.engine_clock);
  raise(to.fenced, state.threads + block.rank, block.engine_clock);
}

// --- Questions -------------------------------------------------------------------------------

bool is_fenced(const Fiber& fiber, Epoch epoch) {
  if (epoch >> kClockBits >= state.threads) return true;  // written by TMA itself
  const bool mine = epoch >> kClockBits == fiber.id && (epoch & kNever) <= fiber.fenced_now;
  return mine || covers(fiber.order.fenced, epoch);
}

}  // namespace reeltime::emulator
