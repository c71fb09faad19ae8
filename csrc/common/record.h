// SPDX-License-Identifier: Apache-2.0
// Launches noted instead of made: what `reeltime port` reads without a GPU.
#pragma once
#include <cstddef>
#include <vector>

namespace reeltime {

struct RecordedLaunch {
  const void* kernel;  // its host stub, which bears the kernel's symbol
  unsigned grid_x, grid_y, grid_z, threads, cluster;
  size_t shared_bytes;
};

// Of this thread: null, or where launch() leaves a note.  Shared by all files of the extension.
inline thread_local std::vector<RecordedLaunch>* recorded_launches = nullptr;

inline void record(const RecordedLaunch& launch) { recorded_launches->push_back(launch); }

}  // namespace reeltime
