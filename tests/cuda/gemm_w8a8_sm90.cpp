// SPDX-License-Identifier: Apache-2.0
// Which tile gemm_w8a8 takes on Hopper, for Python.
#include "gemm_w8a8/gemm_w8a8.h"

namespace reeltime::gemm_sm90 {
struct Choice {
  int groups, columns, cluster;
};
Choice choose(int M, int N, int processors, int block_rows);
}  // namespace reeltime::gemm_sm90

// Rows, columns and blocks in a cluster.
extern "C" __attribute__((visibility("default"))) void chosen(int M, int N, int processors,
                                                              int block_rows, int* tile) {
  const auto choice = reeltime::gemm_sm90::choose(M, N, processors, block_rows);
  tile[0] = choice.groups * 64;
  tile[1] = choice.columns;
  tile[2] = choice.cluster;
}
