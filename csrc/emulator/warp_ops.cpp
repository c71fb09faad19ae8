// SPDX-License-Identifier: Apache-2.0
// Instructions that a warp executes together: shuffles, ldmatrix, stmatrix, mma.
//
// Each lane hands in pointers to its registers; the last lane to arrive computes for all.  Layouts
// are the PTX ISA's, restated in common/ldmatrix.h and common/mma.h.
#include "emulator/block.h"
#include "emulator/numbers.h"

namespace reeltime::emulator {

// --- Registers between lanes -----------------------------------------------------------------

void shuffle(const char* op, unsigned mask, void* value, size_t bytes, unsigned source_lane) {
  KERNEL_SITE();
  struct Lane {
    void* value;
    unsigned source;
    unsigned char before[16];
  } lane{value, source_lane, {}};
  if (bytes > sizeof lane.before) fail("%s of %zu bytes", op, bytes);
  memcpy(lane.before, value, bytes);
  meet(op, mask, &lane, [bytes, op](void** lanes) {
    for (unsigned i = 0; i < 32; i++) {
      if (!lanes[i]) continue;
      const auto& to = *static_cast<Lane*>(lanes[i]);
      if (!lanes[to.source])
        fail("%s: lane %u reads lane %u, which takes no part", op, i, to.source);
      memcpy(to.value, static_cast<Lane*>(lanes[to.source])->before, bytes);
    }
  });
}

unsigned ballot(unsigned mask, bool predicate) {
  KERNEL_SITE();
  struct Lane {
    bool predicate;
    unsigned result;
  } lane{predicate, 0};
  meet("vote.sync.ballot", mask, &lane, [](void** lanes) {
    unsigned result = 0;
    for (unsigned i = 0; i < 32; i++)
      if (lanes[i] && static_cast<Lane*>(lanes[i])->predicate) result |= 1u << i;
    for (unsigned i = 0; i < 32; i++)
      if (lanes[i]) static_cast<Lane*>(lanes[i])->result = result;
  });
  return lane.result;
}

// --- 8x8 matrices ----------------------------------------------------------------------------

namespace {

struct MatrixLane {
  uint32_t* registers;
  uint32_t row;
};

// Runs visit(lane, register bytes, address of row i in matrix j, byte in the row, bytes) for every
// piece of row (or of column) that a lane owns.
template <class Visit>
void for_each_piece(void** lanes, int matrices, bool transposed, const char* op, Visit visit) {
  const Warp& warp = *state.running->warp;
  for (int j = 0; j < matrices; j++) {
    uint32_t rows[8];
    for (int i = 0; i < 8; i++) {
      rows[i] = static_cast<MatrixLane*>(lanes[8 * j + i])->row;
      warp.lanes[8 * j + i]->site = state.running->site;
    }
    Fiber* last = state.running;
    for (int i = 0; i < 8; i++) {
      state.running = warp.lanes[8 * j + i];  // the lane whose address it is, for messages
      resolve(rows[i], 16, 16, op);
    }
    state.running = last;
    count_banks(op, rows, 8);
    for (int l = 0; l < 32; l++) {
      auto* bytes =
          reinterpret_cast<unsigned char*>(&static_cast<MatrixLane*>(lanes[l])->registers[j]);
      state.running = warp.lanes[l];
      for (int half = 0; half < 2; half++) {
        const Position p = matrix_position(l, half, transposed);
        visit(*warp.lanes[l], bytes + 2 * half, resolve(rows[p.row], 16, 16, op), 2 * p.column, 2);
      }
    }
    state.running = last;
  }
}

}  // namespace

void ldmatrix(uint32_t* registers, int matrices, bool transposed, uint32_t row) {
  KERNEL_SITE();
  MatrixLane lane{registers, row};
  meet("ldmatrix", kAllLanes, &lane, [=](void** lanes) {
    for_each_piece(lanes, matrices, transposed, "ldmatrix",
                   [](Fiber& by, unsigned char* to, Place row, int byte, int bytes) {
                     touch_read(*row.block, by, row.offset + byte, bytes, "ldmatrix");
                     memcpy(to, row.pointer() + byte, bytes);
                   });
  });
}

void stmatrix(const uint32_t* registers, int matrices, bool transposed, uint32_t row) {
  KERNEL_SITE();
  MatrixLane lane{const_cast<uint32_t*>(registers), row};
  meet("stmatrix", kAllLanes, &lane, [=](void** lanes) {
    for_each_piece(lanes, matrices, transposed, "stmatrix",
                   [](Fiber& by, unsigned char* from, Place row, int byte, int bytes) {
                     touch_write(*row.block, by, row.offset + byte, bytes, "stmatrix");
                     memcpy(row.pointer() + byte, from, bytes);
                   });
  });
}

// --- Products --------------------------------------------------------------------------------

namespace {

struct MmaLane {
  void* d;
  const uint32_t* a;
  const uint32_t* b;
};

struct Multiply {
  void** lanes;

  template <Element kType>
  void run() {
    using Wide = typename Sums<kType>::Wide;
    using Sum = typename Sums<kType>::Sum;
    constexpr int kPer = 4 / element_bytes(kType), kDepth = 8 * kPer;
    Wide a[16][kDepth], b[8][kDepth];
    for (int l = 0; l < 32; l++) {
      const auto& lane = *static_cast<MmaLane*>(lanes[l]);
      for (int i = 0; i < 4 * kPer; i++) {
        const Position p = a_position(l, i / kPer, i % kPer, kPer);
        a[p.row][p.column] = decode<kType, Wide>(lane.a[i / kPer], i % kPer);
      }
      for (int i = 0; i < 2 * kPer; i++) {
        const Position p = b_position(l, i / kPer, i % kPer, kPer);
        b[p.row][p.column] = decode<kType, Wide>(lane.b[i / kPer], i % kPer);
      }
    }
    for (int l = 0; l < 32; l++) {
      auto* d = static_cast<Sum*>(static_cast<MmaLane*>(lanes[l])->d);
      for (int i = 0; i < 4; i++) {
        const auto [row, column] = d_position(l, i);
        Wide sum = static_cast<Wide>(d[i]);
        for (int k = 0; k < kDepth; k++) sum += a[row][k] * b[column][k];
        d[i] = static_cast<Sum>(sum);
      }
    }
  }
};

}  // namespace

void mma(Element type, void* d, const uint32_t* a, const uint32_t* b) {
  KERNEL_SITE();
  MmaLane lane{d, a, b};
  meet(mma_name(type), kAllLanes, &lane, [type](void** lanes) { dispatch(type, Multiply{lanes}); });
}

// The same product on top of float16 sums, two to a register.
void mma_half(Element type, uint32_t* d, const uint32_t* a, const uint32_t* b) {
  KERNEL_SITE();
  float sums[4];
  for (int i = 0; i < 4; i++) sums[i] = decode_float(Element::kF16, d[i / 2] >> 16 * (i % 2));
  MmaLane lane{sums, a, b};
  meet("mma.sync with f16 sums", kAllLanes, &lane,
       [type](void** lanes) { dispatch(type, Multiply{lanes}); });
  for (int i = 0; i < 2; i++)
    d[i] = soft::to_float16(sums[2 * i]) | static_cast<uint32_t>(soft::to_float16(sums[2 * i + 1]))
                                               << 16;
}

}  // namespace reeltime::emulator
