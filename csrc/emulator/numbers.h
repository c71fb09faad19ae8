// SPDX-License-Identifier: Apache-2.0
// Tensor core operands, decoded.
#pragma once
#include "common/types.h"
#include "emulator/device.h"

namespace reeltime::emulator {

constexpr unsigned kAllLanes = 0xffffffffu;

constexpr int element_bytes(Element type) {
  return type == Element::kS8 || type == Element::kE4m3 ? 1 : 2;
}

inline const char* mma_name(Element type) {
  const char* names[] = {"mma.sync s8", "mma.sync e4m3", "mma.sync f16", "mma.sync bf16"};
  return names[static_cast<int>(type)];
}

// The bits of one number as a float; for int8 see decode.
inline float decode_float(Element type, uint32_t bits) {
  if (type == Element::kE4m3) {
    static const auto* table = [] {
      static float values[256];
      for (int i = 0; i < 256; i++) values[i] = soft::from_e4m3(static_cast<uint8_t>(i));
      return values;
    }();
    return table[bits & 0xff];
  }
  if (type == Element::kF16) return soft::from_float16(static_cast<uint16_t>(bits));
  return float_of(bits << 16);
}

// The i-th number of a register.
template <Element kType, class Wide>
Wide decode(uint32_t packed, int i) {
  if (kType == Element::kS8) return static_cast<Wide>(static_cast<int8_t>(packed >> 8 * i & 0xff));
  return static_cast<Wide>(decode_float(
      kType, element_bytes(kType) == 1 ? packed >> 8 * i & 0xff : packed >> 16 * i & 0xffff));
}

// Integer sums are unsigned here, so that one that overflows wraps, as it does on the device;
// others are exact products added in double and rounded once.
template <Element kType>
struct Sums {
  using Wide = double;
  using Sum = float;
};
template <>
struct Sums<Element::kS8> {
  using Wide = uint32_t;
  using Sum = uint32_t;
};

// Calls visit.template run<kType>().
template <class Visit>
void dispatch(Element type, Visit visit) {
  switch (type) {
    case Element::kS8:
      return visit.template run<Element::kS8>();
    case Element::kE4m3:
      return visit.template run<Element::kE4m3>();
    case Element::kF16:
      return visit.template run<Element::kF16>();
    case Element::kBf16:
      return visit.template run<Element::kBf16>();
  }
}

}  // namespace reeltime::emulator
