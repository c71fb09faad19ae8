// SPDX-License-Identifier: Apache-2.0
// The emulator's state: a cluster of thread blocks, its fibers, and everything they wait for.
//
// One cluster runs at a time, on one OS thread; a fiber runs until it has to wait.  Fibers of a
// cluster are numbered block by block; clocks carry one more entry per block, for its copy engine.
#pragma once
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulator/device.h"
#include "emulator/fiber.h"
#include "emulator/layouts.h"

namespace reeltime::emulator {

enum class Schedule : int32_t { kRandom, kForward, kBackward };  // which ready warp runs next
enum class Landing : int32_t { kRandom, kAtIssue, kAtWait };     // when asynchronous effects show

// Set from Python; the layout is mirrored in tests/cuda/emulate.py.
struct Options {
  Schedule schedule;
  Landing landing;
  uint64_t seed;
  int32_t check_races;  // needs a kernel built with -fsanitize=thread to see plain accesses
  int32_t count_banks;
};

// --- Order between threads -------------------------------------------------------------------

using Clock = std::vector<uint32_t>;               // per thread: how far its history is known
using SharedClock = std::shared_ptr<const Clock>;  // null for nothing
// The same for clusters that ran before, of which only atomics tell; by the cluster's first block.
using Past = std::map<unsigned, SharedClock>;

// What a thread knows of others.  `fenced` is the part of it that also the async proxy (TMA, wgmma)
// sees: PTX ISA, "Async proxy", and fence.proxy.async.
struct Order {
  SharedClock seen, fenced;
  std::shared_ptr<const Past> past;  // null for nothing
};

// What threads hand over, as they arrive.
struct Gathering {
  Clock seen, fenced;
  Order last;  // clocks: of the last that arrived, for the next mostly has the same; past: of all
};

// One access: thread and its clock at that time, 0 for none.
using Epoch = uint32_t;
constexpr int kClockBits = 19;
constexpr uint32_t kNever = (1u << kClockBits) - 1;  // a time that nobody gets to know

// --- Threads ---------------------------------------------------------------------------------

struct Block;
struct Warp;

struct AsyncCopy {
  std::function<void()> land;      // makes the effect visible; run once
  std::function<void()> complete;  // bookkeeping when the thread has waited for it
  bool landed = false;
};
using CopyGroup = std::vector<AsyncCopy>;

struct CopyQueue {  // of one thread: groups in order of commit, the open group last
  std::deque<CopyGroup> committed;
  CopyGroup open;
};

// What a thread waits for.  Put into words only when somebody asks: threads wait a million times.
struct Waiting {
  const char* format;  // of op, first and second: "%1$s of lanes %2$08x"
  const char* op;
  unsigned first, second;
  std::string text() const;
};

struct Fiber {
  Thread view;
  Context context;
  Block* block = nullptr;
  Warp* warp = nullptr;
  unsigned id = 0, linear = 0, lane = 0;
  Waiting waiting{};                 // what for, when blocked
  const void* site = nullptr;        // the kernel's line in the runtime call in progress
  uint32_t now = 1, fenced_now = 0;  // its own clock, and what the async proxy sees of it
  Order order;
  Order released, observed;  // at the last fence_device; by atomics since then
  CopyQueue cp_async, bulk;
  bool wgmma_fenced = false;
  struct Registers {
    const char* begin;
    size_t bytes;
  };
  std::vector<Registers> in_flight;  // accumulators that a wgmma may still write
};

// Lanes that wait for each other.  Several may be open in a warp, for disjoint masks.
struct Rendezvous {
  const char* op;
  unsigned mask, arrived;
  void* arguments[32];
};

struct Warp {
  Block* block = nullptr;
  unsigned index = 0;
  // Lanes, as masks: that the block has; that can run; that have exited.  The others wait, some in
  // a barrier that all lanes must reach together.
  unsigned existing = 0, ready = 0, done = 0, in_barrier = 0;
  std::vector<Fiber*> lanes;
  std::vector<Rendezvous> open;
};

struct BlockBarrier {
  unsigned expected = 0, arrived = 0;
  std::vector<Fiber*> waiting;
  Gathering order;
};

struct Mbarrier {
  uint32_t phase = 0, expected = 0, pending = 0;
  int64_t bytes = 0;  // announced and not yet landed
  Gathering gathering;
  Order completed;
  Epoch initialised = 0;
  std::vector<std::pair<Fiber*, uint32_t>> waiting;  // and the parity each waits for
};

struct WgmmaOp {
  WgmmaOperands shared;  // descriptors and shape, equal in all threads
  void* d[128];
  uint32_t a[128][4];
  bool landed = false;
};

struct Warpgroup {
  const char* op = nullptr;
  unsigned arrived = 0;
  WgmmaOperands operands[128];
  std::vector<Fiber*> waiting;
  std::deque<std::vector<WgmmaOp>> committed;
  std::vector<WgmmaOp> open;
};

// --- Memory ----------------------------------------------------------------------------------

struct Read {
  Epoch epoch;
  uint32_t site;
};
struct Shadow {  // of one byte of shared memory
  static constexpr int kReaders = 8;
  Epoch write = 0;
  uint32_t write_site = 0;
  Read reads[kReaders] = {};   // those that no later access is ordered after
  uint32_t pending_write = 0;  // thread + 1 that issued an asynchronous write still in flight
  uint16_t pending_reads = 0;  // asynchronous reads in flight
  bool barrier = false;        // part of an mbarrier
  bool atomic = false;         // last written by an atomic operation
};

constexpr uint32_t kSharedBase = 1024;   // so that address 0 is never valid
constexpr size_t kSharedMargin = 16384;  // around a window, nobody's
constexpr int kRankShift = 24;           // shared::cluster address: (rank + 1) << 24 | address

struct Block {
  unsigned rank = 0, threads = 0, live = 0;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  BlockBarrier barriers[16];
  std::unordered_map<uint32_t, Mbarrier> mbarriers;  // by offset
  std::vector<Shadow> shadow;
  std::map<unsigned, Read> remote;  // the last access from another block, by its thread
  uint32_t engine_clock = 0;
};

struct BankCount {
  const char* op = "";
  uint64_t requests = 0, wavefronts = 0, ideal = 0;
};

// Loads or stores of one line of the kernel by one warp: lane l's n-th with the others' n-th.
struct WarpAccesses {
  struct Access {
    uint32_t offset, bytes;
  };
  uint32_t count[32] = {};
  std::vector<std::vector<Access>> together;
};

struct State {
  Options options{};
  std::mt19937_64 random;
  std::vector<Block> blocks;  // of the running cluster
  BlockBarrier cluster;
  unsigned threads = 0;           // of the cluster
  unsigned first_block = 0;       // of the cluster, in the grid
  std::vector<AsyncCopy> flying;  // TMA loads on their way
  Fiber* running = nullptr;
  bool inside_atomic = false;
  SharedClock last_joins[3][3];  // of seen, fenced, past: two clocks and the join of both
  Context scheduler;
  void (*body)(const void*) = nullptr;
  const void* arguments = nullptr;
  size_t argument_bytes = 0;
  std::string kernel, error;
  std::map<const void*, BankCount> banks;
  std::map<std::pair<const void*, const Warp*>, WarpAccesses> plain_accesses;
};
extern State state;

// --- schedule.cpp ----------------------------------------------------------------------------

// Ends the launch.  The message is completed with kernel, block, thread and line.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string format(const char* text, ...) __attribute__((format(printf, 1, 2)));
std::string site_name(const void* site);  // "[+0x1234]": emulate.py turns it into file:line
const void* module_base();
void block_until_woken(const Waiting& waiting);
void wake(Fiber* fiber);
bool lands_now();  // drawn for an asynchronous effect at its issue

// Meets the other lanes in `mask`; the last to arrive runs all(arguments of all lanes).
void meet(const char* op, unsigned mask, void* argument, const std::function<void(void**)>& all);
std::string thread_name(const Fiber& fiber);

// --- clocks.cpp ------------------------------------------------------------------------------

void release(Gathering& to);  // what the running thread did so far becomes part of `to`
Order everything(Gathering& from);
void join(Order& to, const Order& from);
void acquire(const Order& from);  // the running thread now knows it
void release_engine(Gathering& to, Block& block);
bool is_fenced(const Fiber& fiber, Epoch epoch);
Epoch tick_engine(Block& block);

inline Epoch epoch_of(const Fiber& fiber) { return fiber.id << kClockBits | fiber.now; }

inline bool covers(const SharedClock& clock, Epoch epoch) {
  const size_t thread = epoch >> kClockBits;
  return clock && thread < clock->size() && (*clock)[thread] >= (epoch & kNever);
}

inline bool knows(const Fiber& fiber, Epoch epoch) {
  return epoch == 0 || epoch >> kClockBits == fiber.id || covers(fiber.order.seen, epoch);
}

// --- races.cpp -------------------------------------------------------------------------------

uint32_t short_site(const void* site);
std::string long_site(uint32_t site);
enum class Proxy { kGeneric, kAsync };
void touch_read(Block& block, const Fiber& by, uint32_t offset, size_t bytes, const char* op,
                Proxy proxy = Proxy::kGeneric);
void touch_write(Block& block, const Fiber& by, uint32_t offset, size_t bytes, const char* op);
void touch_atomic(Block& block, const Fiber& by, uint32_t offset, size_t bytes, const char* op);
// An access from another block of the cluster, and the end of the block: none may come after it.
void touch_remote(Block& block, const char* op);
void check_exit(const Block& block);
// An asynchronous write is legal from its issue, where it must follow all earlier accesses, and
// forbids any other access until it is complete.
void begin_write(Block& block, uint32_t offset, size_t bytes, const char* op);
void complete_write(Block& block, uint32_t offset, size_t bytes, Epoch by);
void begin_read(Block& block, uint32_t offset, size_t bytes);
// A read by several warps is in flight until the `last` of them is done.
void complete_read(Block& block, uint32_t offset, size_t bytes, const Fiber& by, bool last = true);

// --- global_races.cpp ------------------------------------------------------------------------

// Accesses to global memory that somebody may write; others cannot race.
enum class Touch : uint8_t {
  kRead,
  kConstant,  // ld.global.nc: of what nobody writes in this launch
  kAsyncRead,
  kBulkRead,
  kWrite,
  kBulkWrite,
  kAtomic
};
void forget_global();  // at the end of a launch
void touch_global(const void* pointer, size_t bytes, Touch how, const char* op);
// A read by a copy lasts from its issue, here, to its completion.  Returns what to complete.
uint32_t begin_global_read(const void* pointer, size_t bytes, Touch how, const char* op,
                           uint32_t copy = 0);
void complete_global_read(const void* pointer, size_t bytes, uint32_t copy, Epoch by);
void synchronise(const void* atomic);  // what the running thread's fences hand over by an atomic

// --- memory.cpp ------------------------------------------------------------------------------

struct Place {
  Block* block;
  uint32_t offset;
  unsigned char* pointer() const { return block->shared + offset; }
};
// Checks range and alignment of a 32-bit shared address.
Place resolve(uint32_t address, size_t bytes, size_t alignment, const char* op);
// check_global without a new KERNEL_SITE, for use inside the runtime.  Returns whether accesses to
// this range may race: not if it is an input.
bool check_registered(const void* pointer, size_t bytes, size_t alignment, bool write,
                      const char* op);
std::string global_byte(const void* pointer);  // "byte 12 of out"
void count_banks(const char* op, const uint32_t* rows, int count);
void count_plain_banks();  // at the end of a cluster

}  // namespace reeltime::emulator

// Every runtime function called by a kernel begins with this.
#define KERNEL_SITE() (state.running->site = __builtin_return_address(0))
