// SPDX-License-Identifier: Apache-2.0
#include "emulator/library.h"

#include "emulator/block.h"

namespace reeltime::emulator {

void begin_run() {
  state.error.clear();
  state.banks.clear();
}

const char* end_run(cudaError_t result) {
  if (state.error.empty() && result != cudaSuccess)
    state.error = format("the launcher refused: cudaError_t %d", result);
  return state.error.c_str();
}

}  // namespace reeltime::emulator

#define EXPORT extern "C" __attribute__((visibility("default")))
using namespace reeltime::emulator;

EXPORT void emulator_options(const Options* options) { state.options = *options; }

EXPORT void emulator_range(const void* base, size_t bytes, const char* name, int writable) {
  add_range({static_cast<const unsigned char*>(base), bytes, name, writable != 0});
}

EXPORT void emulator_clear_ranges() { clear_ranges(); }
EXPORT void* emulator_stacks() { return shared_stacks(); }
EXPORT void emulator_share_stacks(void* of_another) { share_stacks(of_another); }

// One line per place in the kernel: "ldmatrix [+0x1234]: 512 requests, 512 wavefronts, 512 at
// best".
EXPORT const char* emulator_banks() {
  static std::string text;
  text.clear();
  for (const auto& [site, count] : state.banks)
    text += format("%s%s: %llu requests, %llu wavefronts, %llu at best\n", count.op,
                   site_name(site).c_str(), static_cast<unsigned long long>(count.requests),
                   static_cast<unsigned long long>(count.wavefronts),
                   static_cast<unsigned long long>(count.ideal));
  return text.c_str();
}
