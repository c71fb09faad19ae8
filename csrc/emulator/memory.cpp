// SPDX-License-Identifier: Apache-2.0
// Addresses: the shared window, the ranges of global memory that the host registered, bank counts.
#include <link.h>

#include <algorithm>

#include "emulator/block.h"
#include "emulator/library.h"

namespace reeltime::emulator {

// --- Shared memory ---------------------------------------------------------------------------

uint32_t shared_address(const void* pointer) {
  KERNEL_SITE();
  const Block& block = *state.running->block;
  const ptrdiff_t offset = static_cast<const unsigned char*>(pointer) - block.shared;
  if (offset < 0 || static_cast<size_t>(offset) > block.shared_bytes)
    fail("shared_address of a pointer that is not into this block's shared memory");
  return static_cast<uint32_t>(offset) + kSharedBase;
}

uint32_t map_to_rank(uint32_t address, unsigned rank) {
  KERNEL_SITE();
  if (rank >= state.blocks.size())
    fail("mapa: rank %u of a cluster of %zu", rank, state.blocks.size());
  return (address & ((1u << kRankShift) - 1)) | (rank + 1) << kRankShift;
}

void store_in_cluster(uint32_t address, const void* value, size_t bytes) {
  KERNEL_SITE();
  const Place place = resolve(address, bytes, bytes, "st.shared::cluster");
  touch_remote(*place.block, "st.shared::cluster");
  touch_write(*place.block, *state.running, place.offset, bytes, "st.shared::cluster");
  memcpy(place.pointer(), value, bytes);
}

Place resolve(uint32_t address, size_t bytes, size_t alignment, const char* op) {
  const uint32_t rank = address >> kRankShift;
  Block* block =
      rank ? &state.blocks[std::min<size_t>(rank, state.blocks.size()) - 1] : state.running->block;
  const int64_t offset = static_cast<int64_t>(address & ((1u << kRankShift) - 1)) - kSharedBase;
  if (offset < 0 || offset + bytes > block->shared_bytes)
    fail("%s: shared bytes %lld to %lld are outside the block's %zu", op,
         static_cast<long long>(offset), static_cast<long long>(offset + bytes) - 1,
         block->shared_bytes);
  if (offset % alignment != 0)
    fail("%s: shared byte %lld is not aligned to %zu", op, static_cast<long long>(offset),
         alignment);
  return {block, static_cast<uint32_t>(offset)};
}

// --- Banks -----------------------------------------------------------------------------------

// 32 banks of 4 bytes: eight 16-byte rows take one wavefront if no two of them, at different
// addresses, start in the same group of four banks.
void count_banks(const char* op, const uint32_t* rows, int count) {
  if (!state.options.count_banks) return;
  unsigned wavefronts = 1;
  for (int group = 0; group < 8; group++) {
    std::vector<uint32_t> distinct;
    for (int i = 0; i < count; i++)
      if (rows[i] / 16 % 8 == static_cast<uint32_t>(group)) distinct.push_back(rows[i]);
    std::sort(distinct.begin(), distinct.end());
    distinct.erase(std::unique(distinct.begin(), distinct.end()), distinct.end());
    wavefronts = std::max<unsigned>(wavefronts, distinct.size());
  }
  BankCount& total = state.banks[state.running->site];
  total.op = op;
  total.requests++;
  total.wavefronts += wavefronts;
  total.ideal++;
}

static void remember_plain(const void* site, const Fiber& by, uint32_t offset, size_t bytes) {
  WarpAccesses& accesses = state.plain_accesses[{site, by.warp}];
  const uint32_t n = accesses.count[by.lane]++;
  if (accesses.together.size() <= n) accesses.together.resize(n + 1);
  accesses.together[n].push_back({offset, static_cast<uint32_t>(bytes)});
}

// The n-th accesses of a warp's lanes at one line are taken for one instruction.  At least as many
// wavefronts as the fullest bank has distinct words; at best all banks are equally full.
void count_plain_banks() {
  for (const auto& [place, accesses] : state.plain_accesses) {
    BankCount& total = state.banks[place.first];
    total.op = "load or store";
    for (const auto& together : accesses.together) {
      std::vector<uint32_t> words;
      for (const auto& access : together)
        for (uint32_t word = access.offset / 4; word <= (access.offset + access.bytes - 1) / 4;
             word++)
          words.push_back(word);
      std::sort(words.begin(), words.end());
      words.erase(std::unique(words.begin(), words.end()), words.end());
      unsigned in_bank[32] = {};
      for (const uint32_t word : words) in_bank[word % 32]++;
      total.requests++;
      total.wavefronts += *std::max_element(in_bank, in_bank + 32);
      total.ideal += (words.size() + 31) / 32;
    }
  }
  state.plain_accesses.clear();
}

// --- Global memory ---------------------------------------------------------------------------

static std::vector<GlobalRange> ranges;

void add_range(const GlobalRange& range) { ranges.push_back(range); }
void clear_ranges() { ranges.clear(); }

std::string global_byte(const void* pointer) {
  const auto* byte = static_cast<const unsigned char*>(pointer);
  for (const GlobalRange& range : ranges)
    if (byte >= range.base && byte < range.base + range.bytes)
      return format("byte %td of %s", byte - range.base, range.name.c_str());
  return "";
}

// Whether what was found may be written.
static bool check_range(const void* pointer, size_t bytes, bool write, const char* op) {
  const auto* begin = static_cast<const unsigned char*>(pointer);
  const GlobalRange* nearest = nullptr;
  size_t distance = ~size_t{0};
  for (const GlobalRange& range : ranges) {
    if (begin >= range.base && begin + bytes <= range.base + range.bytes) {
      if (write && !range.writable)
        fail("%s writes byte %td of %s, which is an input", op, begin - range.base,
             range.name.c_str());
      return range.writable;
    }
    const size_t away =
        begin < range.base ? range.base - begin : begin + bytes - (range.base + range.bytes);
    if (away < distance) {
      distance = away;
      nearest = &range;
    }
  }
  if (!nearest) fail("%s of global memory, but the host registered none", op);
  fail("%s (%s) of %zu bytes of global memory at byte %td of %s, which has %zu", op,
       write ? "write" : "read", bytes, begin - nearest->base, nearest->name.c_str(),
       nearest->bytes);
}

bool check_registered(const void* pointer, size_t bytes, size_t alignment, bool write,
                      const char* op) {
  if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0)
    fail("%s: global address %p is not aligned to %zu", op, pointer, alignment);
  return check_range(pointer, bytes, write, op);
}

void check_global(const void* pointer, size_t bytes, size_t alignment, bool write, const char* op) {
  KERNEL_SITE();
  check_registered(pointer, bytes, alignment, write, op);
}

void check_constant(const void* pointer, size_t bytes, size_t alignment, const char* op) {
  KERNEL_SITE();
  if (check_registered(pointer, bytes, alignment, false, op))
    touch_global(pointer, bytes, Touch::kConstant, op);
}

void atomic(void* pointer, size_t bytes, void* before, const char* op,
            void (*update)(void* pointer, const void* value), const void* value) {
  KERNEL_SITE();
  Block& block = *state.running->block;
  const ptrdiff_t offset = static_cast<unsigned char*>(pointer) - block.shared;
  if (offset >= 0 && offset + bytes <= block.shared_bytes) {
    touch_atomic(block, *state.running, static_cast<uint32_t>(offset), bytes, op);
  } else {
    check_registered(pointer, bytes, bytes, true, op);
    touch_global(pointer, bytes, Touch::kAtomic, op);
    synchronise(pointer);
  }
  memcpy(before, pointer, bytes);
  state.inside_atomic = true;  // update is compiled with the kernel, hooks and all
  update(pointer, value);
  state.inside_atomic = false;
}

// --- Plain accesses --------------------------------------------------------------------------

static bool inside(const void* pointer, const void* base, size_t bytes) {
  return static_cast<const char*>(pointer) >= static_cast<const char*>(base) &&
         static_cast<const char*>(pointer) < static_cast<const char*>(base) + bytes;
}

// Constants of the kernel file lie in its own image.
static bool in_module(const void* pointer) {
  struct Extent {
    const char *begin = nullptr, *end = nullptr;
  };
  static const Extent module = [] {
    Extent found;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* result) {
          Extent extent;
          extent.begin = reinterpret_cast<const char*>(info->dlpi_addr);
          for (int i = 0; i < info->dlpi_phnum; i++)
            if (info->dlpi_phdr[i].p_type == PT_LOAD)
              extent.end = extent.begin + info->dlpi_phdr[i].p_vaddr + info->dlpi_phdr[i].p_memsz;
          const bool mine = extent.begin == module_base();
          if (mine) *static_cast<Extent*>(result) = extent;
          return mine ? 1 : 0;
        },
        &found);
    return found;
  }();
  return pointer >= module.begin && pointer < module.end;
}

void plain_access(const void* pointer, size_t bytes, bool write, const void* site) {
  Fiber* me = state.running;
  if (!me || !state.options.check_races || state.inside_atomic) return;
  if (inside(pointer, me->context.stack, kStackBytes)) {
    for (const Fiber::Registers& registers : me->in_flight)
      if (inside(pointer, registers.begin, registers.bytes)) {
        me->site = site;
        fail("%s of byte %td of an accumulator that wgmma may still write: it was not waited for",
             write ? "write" : "read", static_cast<const char*>(pointer) - registers.begin);
      }
    return;
  }
  const char* op = write ? "store" : "load";
  me->site = site;
  for (Block& block : state.blocks) {
    if (!inside(pointer, block.shared, block.shared_bytes)) continue;
    const auto offset =
        static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - block.shared);
    if (&block != me->block) fail("%s of another block's shared memory by a plain pointer", op);
    if (offset + bytes > block.shared_bytes)
      fail("%s: shared bytes %u to %zu are outside the block's %zu", op, offset, offset + bytes - 1,
           block.shared_bytes);
    if (state.options.count_banks) remember_plain(site, *me, offset, bytes);
    if (write)
      touch_write(block, *me, offset, bytes, op);
    else
      touch_read(block, *me, offset, bytes, op);
    return;
  }
  if (inside(pointer, state.arguments, state.argument_bytes) || in_module(pointer) ||
      inside(pointer, &me->view, sizeof me->view))
    return;
  const Block& mine = *me->block;
  const auto* byte = static_cast<const unsigned char*>(pointer);
  if (byte >= mine.shared - kSharedMargin && byte < mine.shared + mine.shared_bytes + kSharedMargin)
    fail("%s of %zu bytes at shared byte %td, outside the block's %zu", op, bytes,
         byte - mine.shared, mine.shared_bytes);
  if (check_range(pointer, bytes, write, op))
    touch_global(pointer, bytes, write ? Touch::kWrite : Touch::kRead, op);
}

}  // namespace reeltime::emulator
