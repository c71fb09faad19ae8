// SPDX-License-Identifier: Apache-2.0
// Races in global memory: between threads of a cluster as in races.cpp, and between clusters.
//
// Clusters run one after another here and in any order on a GPU.  A thread knows what one that ran
// before has done only through fences around atomics on one address:
//
//   store;  fence_device();  atomic_add(p, ...)   then   atomic_add(p, ...);  fence_device();  load
//
// the release and acquire patterns of PTX ISA, "Memory Consistency Model".  Atomics do not race
// with each other, and whoever knows the last of them on an address knows those before it.
#include <algorithm>

#include "emulator/block.h"

namespace reeltime::emulator {

namespace {

struct Access {
  unsigned cluster;  // its first block
  Epoch epoch;
  uint32_t site;
  Touch how;
  bool operator==(const Access& other) const {
    return cluster == other.cluster && epoch == other.epoch && site == other.site &&
           how == other.how;
  }
};

// Reads since the last write: a list, newest first, that bytes share.  Numbers of accesses and of
// lists; 0 is none.
struct Readers {
  uint32_t access, others, count;
};
constexpr uint32_t kMostReaders = 64;

struct Cell {  // of one byte
  uint32_t write, readers;
};
constexpr uintptr_t kPageBytes = 1024;
struct Page {
  Cell cells[kPageBytes];
};

// What fences have handed over by an atomic, of a cluster's threads and of clusters before it.
struct Published {
  unsigned cluster;
  Order order;
};

struct Global {
  std::vector<Access> accesses{Access{}};
  std::vector<Readers> lists{Readers{}};
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
  std::unordered_map<const void*, Published> published;
  // Of what was used last, by a hash
  std::pair<uintptr_t, Page*> recent_pages[256] = {};
  uint32_t recent_accesses[256] = {};
} global;

Page& page_at(uintptr_t address) {
  const uintptr_t number = address / kPageBytes;
  auto& [known, page] = global.recent_pages[number % 256];
  if (known != number || !page) {
    auto& found = global.pages[number];
    if (!found) found = std::make_unique<Page>();
    known = number;
    page = found.get();
  }
  return *page;
}

// Runs visit(cell, address) for every byte.
template <class Visit>
void for_each_cell(const void* pointer, size_t bytes, Visit visit) {
  auto at = reinterpret_cast<uintptr_t>(pointer);
  for (const uintptr_t end = at + bytes; at < end;) {
    Page& page = page_at(at);
    const uintptr_t stop = std::min(end, (at / kPageBytes + 1) * kPageBytes);
    for (; at < stop; at++) visit(page.cells[at % kPageBytes], at);
  }
}

uint32_t number_of(const Access& access) {
  const uint32_t hash = access.site * 7 + access.epoch + (access.epoch >> kClockBits);
  uint32_t& recent = global.recent_accesses[hash % 256];
  if (recent && global.accesses[recent] == access) return recent;
  global.accesses.push_back(access);
  return recent = static_cast<uint32_t>(global.accesses.size() - 1);
}

Access access_by(const Fiber& by, Touch how) {
  const bool ends = how == Touch::kRead || how == Touch::kWrite || how == Touch::kAtomic;
  const Epoch epoch = ends ? epoch_of(by) : by.id << kClockBits | kNever;
  return {state.first_block, epoch, short_site(by.site), how};
}

bool knows(const Fiber& by, const Access& access) {
  if ((access.epoch & kNever) == kNever) return false;
  if (access.cluster == state.first_block) return knows(by, access.epoch);
  if (!by.order.past) return false;
  const auto found = by.order.past->find(access.cluster);
  return found != by.order.past->end() && covers(found->second, access.epoch);
}

// --- Words -----------------------------------------------------------------------------------

std::string owner(const Access& access) {
  const Index &grid = state.running->view.grid_dim, &dim = state.running->view.block_dim;
  const unsigned threads = dim.x * dim.y * dim.z, thread = access.epoch >> kClockBits;
  const bool is_copy = thread >= state.threads;
  const unsigned block = access.cluster + (is_copy ? thread - state.threads : thread / threads);
  const unsigned t = thread % threads;
  const std::string name = format("block (%u,%u,%u)", block % grid.x, block / grid.x % grid.y,
                                  block / (grid.x * grid.y));
  return (is_copy ? "a TMA load of " + name
                  : name + format(" thread (%u,%u,%u)", t % dim.x, t / dim.x % dim.y,
                                  t / (dim.x * dim.y))) +
         long_site(access.site);
}

[[noreturn]] void report(const Access& before, uintptr_t byte, bool writes, const char* op) {
  const std::string what = format("race: %s (%s) of ", op, writes ? "write" : "read") +
                           global_byte(reinterpret_cast<const void*>(byte)) + ", ";
  const bool wrote = before.how >= Touch::kWrite, here = before.cluster == state.first_block;
  const std::string text =
      what + format("after a %s by ", wrote ? "write" : "read") + owner(before);
  switch (before.how) {
    case Touch::kConstant:
      fail("%s, which takes it for constant", text.c_str());
    case Touch::kAsyncRead:
    case Touch::kBulkRead:
      fail("%swhich an asynchronous copy issued by %s may still read: it was not waited for",
           what.c_str(), owner(before).c_str());
    case Touch::kBulkWrite:
      fail("%s, a TMA store, whose end nobody can wait for", text.c_str());
    default:
      fail("%s that no %s orders before it", text.c_str(),
           here ? "barrier" : "atomic between fence_device()");
  }
}

// --- Accesses --------------------------------------------------------------------------------

void check_write(const Access& before, uintptr_t byte, const Access& mine, const char* op) {
  if (mine.how == Touch::kAtomic && before.how == Touch::kAtomic) return;
  if (mine.how != Touch::kConstant && !knows(*state.running, before))
    report(before, byte, mine.how >= Touch::kWrite, op);
  const bool bulk = mine.how == Touch::kBulkRead || mine.how == Touch::kBulkWrite;
  if (!bulk && mine.how != Touch::kConstant) return;
  const std::string where = global_byte(reinterpret_cast<const void*>(byte));
  if (bulk)
    fail("race: %s of %s, written by %s without a fence.proxy.async of global memory after it", op,
         where.c_str(), owner(before).c_str());
  fail("%s of %s, which is not constant: this launch writes it, by %s", op, where.c_str(),
       owner(before).c_str());
}

uint32_t add_reader(uint32_t list, uint32_t access) {
  global.lists.push_back({access, list, global.lists[list].count + 1});
  return static_cast<uint32_t>(global.lists.size() - 1);
}

// The list with one more reader.  A full one loses those that this reader knows, and if too few
// are, its older half.
uint32_t with_reader(uint32_t list, uint32_t access) {
  const Readers newest = global.lists[list];
  if (newest.access == access) return list;
  const Access &mine = global.accesses[access], &other = global.accesses[newest.access];
  const bool again = other.how == Touch::kRead && mine.how == Touch::kRead &&
                     other.cluster == mine.cluster &&
                     other.epoch >> kClockBits == mine.epoch >> kClockBits;
  if (again) return add_reader(newest.others, access);
  if (newest.count < kMostReaders) return add_reader(list, access);
  uint32_t kept[kMostReaders], count = 0;
  for (uint32_t at = list; at; at = global.lists[at].others)
    // Who knows of a TMA load that it has landed need not know what its issuer knew.
    if (const uint32_t one = global.lists[at].access;
        mine.how == Touch::kBulkRead || !knows(*state.running, global.accesses[one]))
      kept[count++] = one;
  count = std::min(count, kMostReaders / 2);
  list = 0;
  while (count) list = add_reader(list, kept[--count]);
  return add_reader(list, access);
}

void touch(const void* pointer, size_t bytes, uint32_t number, const char* op) {
  const Access mine = global.accesses[number];
  const bool writes = mine.how >= Touch::kWrite;
  uint32_t checked_write = 0, checked_readers = 0, before = 0, after = 0;
  for_each_cell(pointer, bytes, [&](Cell& cell, uintptr_t byte) {
    if (cell.write != checked_write && cell.write)
      check_write(global.accesses[cell.write], byte, mine, op);
    checked_write = cell.write;
    if (!writes) {
      if (!after || cell.readers != before) {
        before = cell.readers;
        after = with_reader(before, number);
      }
      cell.readers = after;
      return;
    }
    if (cell.readers != checked_readers)
      for (uint32_t at = cell.readers; at; at = global.lists[at].others)
        if (const Access& read = global.accesses[global.lists[at].access];
            !knows(*state.running, read))
          report(read, byte, true, op);
    checked_readers = cell.readers;
    cell = {number, 0};
  });
}

}  // namespace

void forget_global() { global = {}; }

void touch_global(const void* pointer, size_t bytes, Touch how, const char* op) {
  if (!state.options.check_races) return;
  touch(pointer, bytes, number_of(access_by(*state.running, how)), op);
}

uint32_t begin_global_read(const void* pointer, size_t bytes, Touch how, const char* op,
                           uint32_t copy) {
  if (!state.options.check_races) return 0;
  if (!copy) {
    copy = static_cast<uint32_t>(global.accesses.size());
    global.accesses.push_back(access_by(*state.running, how));
  }
  touch(pointer, bytes, copy, op);
  return copy;
}

void complete_global_read(const void* pointer, size_t bytes, uint32_t copy, Epoch by) {
  if (!state.options.check_races) return;
  Access done = global.accesses[copy];
  done.epoch = by;
  done.how = Touch::kRead;
  const uint32_t number = number_of(done);
  uint32_t before = 0, after = 0;
  for_each_cell(pointer, bytes, [&](Cell& cell, uintptr_t) {
    if (cell.readers != before) {
      before = cell.readers;
      uint32_t kept[kMostReaders], count = 0;
      for (uint32_t at = before; at; at = global.lists[at].others)
        kept[count++] = global.lists[at].access;
      after = 0;
      while (count--) after = add_reader(after, kept[count] == copy ? number : kept[count]);
    }
    cell.readers = after;
  });
}

// --- Between clusters --------------------------------------------------------------------------

void synchronise(const void* atomic) {
  if (!state.options.check_races) return;
  Fiber& me = *state.running;
  const auto found = global.published.find(atomic);
  if (found == global.published.end() && !me.released.seen) return;
  Published& published = global.published[atomic];
  if (published.cluster != state.first_block && published.order.seen) {
    Past past = published.order.past ? *published.order.past : Past{};
    past[published.cluster] = published.order.seen;
    published.order = {{}, {}, std::make_shared<const Past>(std::move(past))};
  }
  published.cluster = state.first_block;
  join(me.observed, published.order);
  join(published.order, me.released);
}

}  // namespace reeltime::emulator
