// SPDX-License-Identifier: Apache-2.0
// The C interface of a kernel library, as Python loads it with ctypes (tests/cuda/emulate.py).
//
//   EMULATED(quant_sm80, QuantParams)   in the file that includes the kernel
//
// exports `const char* run_quant_sm80(const QuantParams*)`: it launches, and returns "" or what
// went wrong.  Around it: emulator_options, emulator_range for each tensor, emulator_banks
// afterwards.
#pragma once
#include <string>

#include "emulator/device.h"

namespace reeltime::emulator {

struct GlobalRange {
  const unsigned char* base;
  size_t bytes;
  std::string name;
  bool writable;
};
void add_range(const GlobalRange& range);
void clear_ranges();
void begin_run();
const char* end_run(cudaError_t result);

}  // namespace reeltime::emulator

#define EMULATED(function, Params)                                              \
  extern "C" __attribute__((visibility("default"))) const char* run_##function( \
      const Params* params) {                                                   \
    ::reeltime::emulator::begin_run();                                          \
    return ::reeltime::emulator::end_run(function(*params, nullptr));           \
  }
