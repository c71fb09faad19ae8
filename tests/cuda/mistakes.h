// SPDX-License-Identifier: Apache-2.0
// The mistakes that the test kernels can make on request, to show that the emulator notices.
#pragma once

// NOTE: tests/test_emulator.py reads the names from here.
enum class Mistake : int {
  kNone,
  kMissingBarrier,
  kMissingWait,
  kShallowWait,
  kWrongPhase,
  kMissingEmptyWait,
  kMissingRelease,
  kExtraRelease,
  kHalfRelease,
  kMissingProductWait,
  kMissingProductFence,
  kMissingProxyFence,
  kMissingStoreWait,
  kEarlyReuse,
  kSharedOverrun,
  kSharedOverrunPlain,
  kGlobalOverrun,
  kGlobalOverrunPlain,
  kWriteToInput,
  kMisaligned,
  kUninitialised,
  kDivergentCollective,
  kDivergentBarrier,
  kDeadlock,
  kLocalOverrun,
};
