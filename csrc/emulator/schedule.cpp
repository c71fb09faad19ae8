// SPDX-License-Identifier: Apache-2.0
// Launch, scheduling, and the ways to wait: warp rendezvous, block and cluster barriers.
#include <dlfcn.h>

#include <algorithm>
#include <cstdarg>
#include <cstdlib>
#include <numeric>

#include "emulator/block.h"

extern "C" {
__attribute__((weak)) void __asan_poison_memory_region(const volatile void* address, size_t n);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void* address, size_t n);
}

namespace reeltime::emulator {

State state;
const Thread* current = nullptr;

// --- Words -----------------------------------------------------------------------------------

static std::string format_list(const char* text, va_list list) {
  char buffer[1024];
  vsnprintf(buffer, sizeof buffer, text, list);
  return buffer;
}

std::string format(const char* text, ...) {
  va_list list;
  va_start(list, text);
  std::string result = format_list(text, list);
  va_end(list);
  return result;
}

std::string Waiting::text() const {
  char buffer[128];
  snprintf(buffer, sizeof buffer, format, op, first, second);
  return buffer;
}

std::string thread_name(const Fiber& fiber) {
  const Index& t = fiber.view.thread;
  const std::string rank = state.blocks.size() > 1 ? format(" of rank %u", fiber.block->rank) : "";
  return format("thread (%u,%u,%u)", t.x, t.y, t.z) + rank;
}

const void* module_base() {
  static const void* base = [] {
    Dl_info info;
    return dladdr(reinterpret_cast<void*>(&module_base), &info) ? info.dli_fbase : nullptr;
  }();
  return base;
}

// A return address; the call itself is the byte before.
std::string site_name(const void* site) {
  if (!site) return "";
  const size_t offset = static_cast<const char*>(site) - static_cast<const char*>(module_base());
  return format(" [+0x%zx]", offset - 1);
}

void fail(const char* text, ...) {
  va_list list;
  va_start(list, text);
  const Fiber& fiber = *state.running;
  const Index& b = fiber.view.block;
  state.error = state.kernel + format(": block (%u,%u,%u) ", b.x, b.y, b.z) + thread_name(fiber) +
                ": " + format_list(text, list) + site_name(fiber.site);
  va_end(list);
  // The fiber is abandoned where it stands: kernels own nothing that needs a destructor, and a
  // sanitizer's hook, which may be our caller, could not pass on an exception.
  switch_context(state.running->context, state.scheduler);
  std::abort();
}

// --- Waiting ---------------------------------------------------------------------------------

void block_until_woken(const Waiting& waiting) {
  Fiber& fiber = *state.running;
  fiber.warp->ready &= ~(1u << fiber.lane);
  fiber.waiting = waiting;
  switch_context(fiber.context, state.scheduler);
}

void wake(Fiber* fiber) { fiber->warp->ready |= 1u << fiber->lane; }

bool lands_now() {
  return state.options.landing == Landing::kAtIssue ||
         (state.options.landing == Landing::kRandom && state.random() & 1);
}

void meet(const char* op, unsigned mask, void* argument, const std::function<void(void**)>& all) {
  Fiber& me = *state.running;
  Warp& warp = *me.warp;
  mask &= warp.existing;
  if (!(mask >> me.lane & 1)) fail("%s: the calling lane %u is not in its mask", op, me.lane);
  if (const unsigned gone = mask & warp.done)
    fail("divergent collective: %s, but lane %d has exited", op, __builtin_ctz(gone));
  if (const unsigned away = mask & warp.in_barrier) {
    const int lane = __builtin_ctz(away);
    fail("divergent collective: %s meets lane %d in %s", op, lane,
         warp.lanes[lane]->waiting.text().c_str());
  }
  auto found = warp.open.end();
  for (auto open = warp.open.begin(); open != warp.open.end(); ++open) {
    if (!(open->mask & mask)) continue;
    if (open->mask != mask || (open->op != op && strcmp(open->op, op) != 0))
      fail("divergent collective: %s of lanes %08x meets %s of lanes %08x", op, mask, open->op,
           open->mask);
    found = open;
  }
  if (found == warp.open.end()) {
    warp.open.push_back({op, mask, 0, {}});
    found = warp.open.end() - 1;
  }
  found->arrived |= 1u << me.lane;
  found->arguments[me.lane] = argument;
  if (found->arrived != mask) {
    block_until_woken({"%1$s of lanes %2$08x", op, mask, 0});
    return;
  }
  Rendezvous full = *found;
  warp.open.erase(found);
  all(full.arguments);
  warp.ready |= mask;
}

void sync_warp(unsigned mask) {
  KERNEL_SITE();
  meet("__syncwarp", mask, nullptr, [mask](void**) {
    // Unlike the other collectives, __syncwarp also orders memory accesses.
    Fiber* last = state.running;
    Gathering arrived;
    for (Fiber* lane : last->warp->lanes)
      if (mask >> lane->lane & 1) state.running = lane, release(arrived);
    const Order all = everything(arrived);
    for (Fiber* lane : last->warp->lanes)
      if (mask >> lane->lane & 1) join(lane->order, all);
    state.running = last;
  });
}

static void open_barrier(BlockBarrier& barrier) {
  const Order all = everything(barrier.order);
  for (Fiber* fiber : barrier.waiting) {
    join(fiber->order, all);
    fiber->warp->in_barrier &= ~(1u << fiber->lane);
    wake(fiber);
  }
  barrier = {};
}

static void pass_barrier(BlockBarrier& barrier, const Waiting& name) {
  Fiber& me = *state.running;
  for (const Rendezvous& open : me.warp->open)
    if (open.mask >> me.lane & 1)
      fail("divergent collective: %s meets %s of lanes %08x", name.text().c_str(), open.op,
           open.mask);
  release(barrier.order);
  barrier.arrived++;
  barrier.waiting.push_back(&me);
  me.warp->in_barrier |= 1u << me.lane;
  if (barrier.arrived == barrier.expected)
    open_barrier(barrier);
  else
    block_until_woken(name);
}

// A warp arrives as one, so that none of its lanes is past the barrier before another has come.
static void announce(BlockBarrier& barrier, unsigned id) {
  meet("bar.arrive", 0xffffffffu, &barrier, [&barrier, id](void** barriers) {
    Fiber* last = state.running;
    for (Fiber* lane : last->warp->lanes) {
      if (barriers[lane->lane] != &barrier) fail("bar.arrive %u: other lanes name another", id);
      state.running = lane;
      release(barrier.order);
      barrier.arrived++;
    }
    state.running = last;
    if (barrier.arrived == barrier.expected) open_barrier(barrier);
  });
}

void barrier(unsigned id, unsigned threads, bool wait) {
  KERNEL_SITE();
  Block& block = *state.running->block;
  if (id > 15) fail("named barrier %u: there are 16", id);
  BlockBarrier& barrier = block.barriers[id];
  Waiting name{"%1$s", "__syncthreads", 0, 0};
  if (threads) name = {"%1$s %2$u, %3$u", wait ? "bar.sync" : "bar.arrive", id, threads};
  if (threads % 32 != 0) fail("%s: the count must be a multiple of 32", name.text().c_str());
  const unsigned expected = threads ? threads : block.live;
  if (barrier.arrived && threads && barrier.expected != expected)
    fail("%s: others wait for %u threads", name.text().c_str(), barrier.expected);
  barrier.expected = expected;
  if (wait)
    pass_barrier(barrier, name);
  else
    announce(barrier, id);
}

void cluster_barrier() {
  KERNEL_SITE();
  state.cluster.expected = state.threads;
  pass_barrier(state.cluster, {"%1$s", "barrier.cluster", 0, 0});
}

// --- One cluster -----------------------------------------------------------------------------

static void run_fiber() {
  fiber_started(state.scheduler);
  state.body(state.arguments);
  Fiber& me = *state.running;
  // Shared memory is given to another block as soon as this one has exited.
  if (!me.bulk.committed.empty() || !me.bulk.open.empty())
    fail("exits while a TMA store may still read shared memory");
  if (me.block->live == 1) check_exit(*me.block);
  me.site = nullptr;
  me.warp->ready &= ~(1u << me.lane);
  me.warp->done |= 1u << me.lane;
  Block& block = *me.block;
  block.live--;
  // __syncthreads waits for the threads that have not exited.
  BlockBarrier& all = block.barriers[0];
  if (all.arrived && all.expected == block.live + 1 && all.arrived == block.live)
    open_barrier(all);
  else if (all.arrived && all.expected == block.live + 1)
    all.expected = block.live;
  switch_context(me.context, state.scheduler, true);
}

static void set_up(Block& block, const LaunchShape& shape, unsigned rank, Index place,
                   unsigned char* window) {
  block.rank = rank;
  block.threads = block.live = shape.block.x * shape.block.y * shape.block.z;
  block.shared = window;
  block.shared_bytes = shape.shared_bytes;
  block.warps.resize((block.threads + 31) / 32);
  block.warpgroups.resize((block.threads + 127) / 128);
  block.fibers.resize(block.threads);
  if (state.options.check_races) block.shadow.assign(block.shared_bytes, {});
  const Index dim{shape.block.x, shape.block.y, shape.block.z};
  for (unsigned i = 0; i < block.threads; i++) {
    Fiber& fiber = block.fibers[i];
    fiber.view = {{i % dim.x, i / dim.x % dim.y, i / (dim.x * dim.y)},
                  place,
                  dim,
                  {shape.grid.x, shape.grid.y, shape.grid.z},
                  window,
                  rank,
                  shape.cluster_size};
    fiber.block = &block;
    fiber.linear = i;
    fiber.id = rank * block.threads + i;
    fiber.lane = i % 32;
    fiber.warp = &block.warps[i / 32];
    fiber.warp->block = &block;
    fiber.warp->index = i / 32;
    fiber.warp->existing |= 1u << fiber.lane;
    fiber.warp->ready = fiber.warp->existing;
    fiber.warp->lanes.push_back(&fiber);
    prepare(fiber.context, fiber_stack(fiber.id), run_fiber);
  }
}

static bool land_one(size_t i) {
  if (i >= state.flying.size()) return false;
  AsyncCopy copy = std::move(state.flying[i]);
  state.flying.erase(state.flying.begin() + i);
  copy.land();
  return true;
}

static std::string describe_deadlock() {
  std::string text = state.kernel + ": deadlock:";
  std::map<std::string, std::vector<const Fiber*>> by_reason;
  for (const Block& block : state.blocks)
    for (const Fiber& fiber : block.fibers)
      if (!(fiber.warp->done >> fiber.lane & 1))
        by_reason[fiber.waiting.text() + site_name(fiber.site)].push_back(&fiber);
  const Index& b = by_reason.begin()->second.front()->view.block;
  text += format(" block (%u,%u,%u)", b.x, b.y, b.z);
  const char* separator = " ";
  for (const auto& [reason, fibers] : by_reason) {
    text += separator + thread_name(*fibers.front());
    if (fibers.size() > 1) text += format(" and %zu more", fibers.size() - 1);
    text += fibers.size() > 1 ? " wait in " + reason : " waits in " + reason;
    separator = "; ";
  }
  return text;
}

static void run_warp(Warp& warp) {
  const size_t n = warp.lanes.size();
  const size_t first = state.options.schedule == Schedule::kRandom ? state.random() % n : 0;
  for (size_t i = 0; i < n && state.error.empty(); i++) {
    const size_t lane = state.options.schedule == Schedule::kBackward ? n - 1 - i : (first + i) % n;
    if (!(warp.ready >> lane & 1)) continue;
    Fiber& fiber = *warp.lanes[lane];
    state.running = &fiber;
    current = &fiber.view;
    switch_context(state.scheduler, fiber.context);
  }
  state.running = nullptr;
  current = nullptr;
}

static void run_cluster() {
  std::vector<Warp*> warps, ready;
  for (Block& block : state.blocks)
    for (Warp& warp : block.warps) warps.push_back(&warp);
  while (state.error.empty()) {
    if (state.options.landing == Landing::kRandom && !state.flying.empty() &&
        state.random() % 4 == 0)
      land_one(state.random() % state.flying.size());
    ready.clear();
    bool done = true;
    for (Warp* warp : warps) {
      if (warp->ready) ready.push_back(warp);
      done &= warp->done == warp->existing;
    }
    if (done && state.flying.empty()) return;
    if (ready.empty()) {
      if (land_one(0)) continue;
      state.error = describe_deadlock();
      return;
    }
    size_t next = 0;
    if (state.options.schedule == Schedule::kBackward) next = ready.size() - 1;
    if (state.options.schedule == Schedule::kRandom) next = state.random() % ready.size();
    run_warp(*ready[next]);
  }
}

// --- Launch ----------------------------------------------------------------------------------

cudaError_t launch(const LaunchShape& shape, const void* kernel, void (*body)(const void*),
                   const void* arguments, size_t argument_bytes) {
  const unsigned cluster = shape.cluster_size,
                 threads = shape.block.x * shape.block.y * shape.block.z;
  if (threads == 0 || threads > 1024 || cluster == 0 || cluster > 8 ||
      shape.grid.x % cluster != 0 || shape.shared_bytes > 227 * 1024 ||
      shape.grid.x * shape.grid.y * shape.grid.z == 0)
    return cudaErrorInvalidValue;
  if (!state.error.empty()) return cudaErrorLaunchFailure;  // as after a fault on the device
  // Kernels have internal linkage: emulate.py finds the name in the debug information.
  state.kernel = format("{+0x%tx}",
                        static_cast<const char*>(kernel) - static_cast<const char*>(module_base()));
  state.body = body;
  state.arguments = arguments;
  state.argument_bytes = argument_bytes;
  state.threads = threads * cluster;

  // Around each block's window lie bytes that belong to nobody, so that an access there is known
  // for what it is.
  const size_t pitch = (shape.shared_bytes + 1023) / 1024 * 1024 + kSharedMargin;
  const size_t region_bytes = kSharedMargin + pitch * cluster;
  auto* region = static_cast<unsigned char*>(std::aligned_alloc(1024, region_bytes));
  unsigned char* windows = region + kSharedMargin;
  std::vector<unsigned> order(shape.grid.x * shape.grid.y * shape.grid.z / cluster);
  std::iota(order.begin(), order.end(), 0);
  state.random.seed(state.options.seed);
  if (state.options.schedule == Schedule::kRandom)
    std::shuffle(order.begin(), order.end(), state.random);
  if (state.options.schedule == Schedule::kBackward) std::reverse(order.begin(), order.end());
  for (unsigned first : order) {
    state.first_block = first * cluster;
    memset(region, 0xA5, region_bytes);  // stale data must never look like zeros
    state.blocks.clear();
    state.blocks.resize(cluster);
    state.cluster = {};
    state.flying.clear();
    for (unsigned rank = 0; rank < cluster; rank++) {
      const unsigned i = first * cluster + rank, x = shape.grid.x, y = shape.grid.y;
      unsigned char* window = windows + rank * pitch;
      if (__asan_poison_memory_region) {
        __asan_poison_memory_region(window - kSharedMargin, kSharedMargin);
        __asan_poison_memory_region(window + shape.shared_bytes, pitch - shape.shared_bytes);
      }
      set_up(state.blocks[rank], shape, rank, {i % x, i / x % y, i / (x * y)}, window);
    }
    run_cluster();
    count_plain_banks();
    if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(region, region_bytes);
    if (!state.error.empty()) break;
  }
  std::free(region);
  forget_global();  // the next launch begins when this one has ended
  state.blocks.clear();
  state.arguments = nullptr;
  return state.error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace reeltime::emulator
