// SPDX-License-Identifier: Apache-2.0
// The last accesses to every byte of shared memory.  Two accesses to a byte, one of them a write,
// race unless the later one's thread knows the earlier one (clocks.cpp).
#include <algorithm>

#include "emulator/block.h"

namespace reeltime::emulator {

// --- Words -----------------------------------------------------------------------------------

static std::string owner(uint32_t thread) {
  if (thread >= state.threads) return "a TMA load";
  const unsigned per_block = state.threads / state.blocks.size();
  return thread_name(state.blocks[thread / per_block].fibers[thread % per_block]);
}

uint32_t short_site(const void* site) {
  if (!site) return 0;
  return static_cast<const char*>(site) - static_cast<const char*>(module_base());
}

std::string long_site(uint32_t site) { return site ? format(" [+0x%x]", site - 1) : ""; }

// --- Accesses --------------------------------------------------------------------------------

static Shadow* shadow_of(Block& block, uint32_t offset) {
  return state.options.check_races ? &block.shadow[offset] : nullptr;
}

static void check_pending(const Shadow& cell, uint32_t byte, bool write, const char* op) {
  const char* kind = write ? "write" : "read";
  if (cell.pending_write)
    fail(
        "race: %s (%s) of shared byte %u, which an asynchronous copy issued by %s may still write: "
        "it was not waited for",
        op, kind, byte, owner(cell.pending_write - 1).c_str());
  if (write && cell.pending_reads)
    fail("race: %s (write) of shared byte %u, which an asynchronous operation may still read", op,
         byte);
  if (cell.barrier) fail("%s (%s) of shared byte %u, which is part of an mbarrier", op, kind, byte);
}

static void check_after_write(const Shadow& cell, const Fiber& by, uint32_t byte, bool write,
                              const char* op) {
  if (!knows(by, cell.write))
    fail("race: %s (%s) of shared byte %u, after a write by %s%s that no barrier orders before it",
         op, write ? "write" : "read", byte, owner(cell.write >> kClockBits).c_str(),
         long_site(cell.write_site).c_str());
}

static void check_after_reads(const Shadow& cell, const Fiber& by, uint32_t byte, const char* op) {
  for (const Read& read : cell.reads)
    if (!knows(by, read.epoch))
      fail(
          "race: %s (write) of shared byte %u, after a read by %s%s that no barrier orders before "
          "it",
          op, byte, owner(read.epoch >> kClockBits).c_str(), long_site(read.site).c_str());
}

// Reads that `by` knows are covered by this one; of more than kReaders others, the oldest is lost.
static void remember_read(Shadow& cell, const Fiber& by) {
  const Read read{epoch_of(by), short_site(by.site)};
  for (Read& slot : cell.reads)
    if (knows(by, slot.epoch)) {
      slot = read;
      return;
    }
  cell.reads[read.epoch % Shadow::kReaders] = read;
}

void touch_read(Block& block, const Fiber& by, uint32_t offset, size_t bytes, const char* op,
                Proxy proxy) {
  if (!state.options.check_races) return;
  for (uint32_t byte = offset; byte < offset + bytes; byte++) {
    Shadow& cell = *shadow_of(block, byte);
    check_pending(cell, byte, false, op);
    if (!cell.write) fail("%s reads shared byte %u, which nobody has written", op, byte);
    check_after_write(cell, by, byte, false, op);
    if (proxy == Proxy::kAsync && !is_fenced(by, cell.write))
      fail("race: %s of shared byte %u, written by %s%s without fence.proxy.async after it", op,
           byte, owner(cell.write >> kClockBits).c_str(), long_site(cell.write_site).c_str());
    if (proxy == Proxy::kGeneric) remember_read(cell, by);
  }
}

void touch_write(Block& block, const Fiber& by, uint32_t offset, size_t bytes, const char* op) {
  if (!state.options.check_races) return;
  for (uint32_t byte = offset; byte < offset + bytes; byte++) {
    Shadow& cell = *shadow_of(block, byte);
    check_pending(cell, byte, true, op);
    check_after_write(cell, by, byte, true, op);
    check_after_reads(cell, by, byte, op);
    cell = {};
    cell.write = epoch_of(by);
    cell.write_site = short_site(by.site);
  }
}

// Atomic operations race with ordinary accesses, but not with each other.
void touch_atomic(Block& block, const Fiber& by, uint32_t offset, size_t bytes, const char* op) {
  if (!state.options.check_races) return;
  for (uint32_t byte = offset; byte < offset + bytes; byte++) {
    Shadow& cell = *shadow_of(block, byte);
    check_pending(cell, byte, true, op);
    if (!cell.write) fail("%s reads shared byte %u, which nobody has written", op, byte);
    if (!cell.atomic) check_after_write(cell, by, byte, true, op);
    check_after_reads(cell, by, byte, op);
    cell = {};
    cell.write = epoch_of(by);
    cell.write_site = short_site(by.site);
    cell.atomic = true;
  }
}

void touch_remote(Block& block, const char* op) {
  const Fiber& me = *state.running;
  if (&block == me.block) return;
  if (block.live == 0) fail("%s in the block of rank %u, which has exited", op, block.rank);
  if (state.options.check_races) block.remote[me.id] = {epoch_of(me), short_site(me.site)};
}

void check_exit(const Block& block) {
  for (const auto& [thread, access] : block.remote) {
    const auto known = [&](const Fiber& fiber) { return knows(fiber, access.epoch); };
    if (!std::any_of(block.fibers.begin(), block.fibers.end(), known))
      fail("exits, after an access to its shared memory by %s%s that no barrier orders before it",
           owner(thread).c_str(), long_site(access.site).c_str());
  }
}

void begin_write(Block& block, uint32_t offset, size_t bytes, const char* op) {
  if (!state.options.check_races) return;
  const Fiber& by = *state.running;
  for (uint32_t byte = offset; byte < offset + bytes; byte++) {
    Shadow& cell = *shadow_of(block, byte);
    check_pending(cell, byte, true, op);
    check_after_write(cell, by, byte, true, op);
    check_after_reads(cell, by, byte, op);
    cell.pending_write = by.id + 1;
    cell.write_site = short_site(by.site);
  }
}

void complete_write(Block& block, uint32_t offset, size_t bytes, Epoch by) {
  if (!state.options.check_races) return;
  for (uint32_t byte = offset; byte < offset + bytes; byte++) {
    Shadow& cell = *shadow_of(block, byte);
    const uint32_t site = cell.write_site;
    cell = {};
    cell.write = by;
    cell.write_site = site;
  }
}

void begin_read(Block& block, uint32_t offset, size_t bytes) {
  if (!state.options.check_races) return;
  for (uint32_t byte = offset; byte < offset + bytes; byte++)
    shadow_of(block, byte)->pending_reads++;
}

void complete_read(Block& block, uint32_t offset, size_t bytes, const Fiber& by, bool last) {
  if (!state.options.check_races) return;
  for (uint32_t byte = offset; byte < offset + bytes; byte++) {
    Shadow& cell = *shadow_of(block, byte);
    if (last) cell.pending_reads--;
    remember_read(cell, by);
  }
}

}  // namespace reeltime::emulator

// --- Plain loads and stores ------------------------------------------------------------------

// A kernel built with -fsanitize=thread calls these for each of its loads and stores.  This is not
// libtsan, which must not be linked: the calls end here.
namespace reeltime::emulator {

void plain_access(const void* pointer, size_t bytes, bool write, const void* site);

}  // namespace reeltime::emulator

#define HOOK(name, bytes, write)                                                          \
  extern "C" __attribute__((visibility("default"))) void name(void* address) {            \
    reeltime::emulator::plain_access(address, bytes, write, __builtin_return_address(0)); \
  }
#define HOOKS(n)                           \
  HOOK(__tsan_read##n, n, false)           \
  HOOK(__tsan_write##n, n, true)           \
  HOOK(__tsan_unaligned_read##n, n, false) \
  HOOK(__tsan_unaligned_write##n, n, true) \
  HOOK(__tsan_volatile_read##n, n, false)  \
  HOOK(__tsan_volatile_write##n, n, true)
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)

extern "C" {
__attribute__((visibility("default"))) void __tsan_read_range(void* address, size_t bytes) {
  reeltime::emulator::plain_access(address, bytes, false, __builtin_return_address(0));
}
__attribute__((visibility("default"))) void __tsan_write_range(void* address, size_t bytes) {
  reeltime::emulator::plain_access(address, bytes, true, __builtin_return_address(0));
}
// clang names these; gcc expands small ones into loads and stores.
__attribute__((visibility("default"))) void* __tsan_memcpy(void* to, const void* from, size_t n) {
  reeltime::emulator::plain_access(from, n, false, __builtin_return_address(0));
  reeltime::emulator::plain_access(to, n, true, __builtin_return_address(0));
  return memcpy(to, from, n);
}
__attribute__((visibility("default"))) void* __tsan_memset(void* to, int value, size_t n) {
  reeltime::emulator::plain_access(to, n, true, __builtin_return_address(0));
  return memset(to, value, n);
}
__attribute__((visibility("default"))) void __tsan_init() {}
__attribute__((visibility("default"))) void __tsan_func_entry(void*) {}
__attribute__((visibility("default"))) void __tsan_func_exit() {}
}
