// SPDX-License-Identifier: Apache-2.0
// Launching a kernel on a stream, with clusters and programmatic overlap; on the emulator the same
// call runs it on the CPU.
#pragma once
#include "common/target.h"
#if !REELTIME_EMULATED
#include "common/record.h"
#endif

namespace reeltime {

struct Launch {
  dim3 grid;
  unsigned threads;
  size_t shared_bytes = 0;
  unsigned cluster = 1;           // blocks along x that run together; divides grid.x
  bool overlap_previous = false;  // may start while the kernel before it on the stream still runs
};

// Never synchronises; the result tells whether the launch was accepted.
template <class... Parameters, class... Arguments>
inline cudaError_t launch(void (*kernel)(Parameters...), const Launch& with, cudaStream_t stream,
                          const Arguments&... arguments) {
#if REELTIME_EMULATED
  (void)stream;
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> arguments;
  };
  const Call call{kernel, {arguments...}};
  return emulator::launch(
      {with.grid, dim3(with.threads), with.cluster, with.shared_bytes},
      reinterpret_cast<const void*>(kernel),
      [](const void* p) {
        const Call& call = *static_cast<const Call*>(p);
        std::apply(call.kernel, call.arguments);
      },
      &call, sizeof call);
#else
  if (recorded_launches) {
    record({reinterpret_cast<const void*>(kernel), with.grid.x, with.grid.y, with.grid.z,
            with.threads, with.cluster, with.shared_bytes});
    return cudaSuccess;
  }
  if (with.shared_bytes > 48 * 1024) {  // more than every GPU has needs asking for
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(with.shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = with.grid;
  config.blockDim = dim3(with.threads);
  config.dynamicSmemBytes = with.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (with.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim.x = with.cluster;
    attributes[config.numAttrs].val.clusterDim.y = 1;
    attributes[config.numAttrs++].val.clusterDim.z = 1;
  }
  if (with.overlap_previous) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
#endif
}

// With overlap_previous (sm_90): returns when the kernel before is complete and its writes visible.
// NOTE: nothing that it writes may be read before.  PTX ISA, "griddepcontrol".
DEVICE void wait_for_previous_kernel() {
#if !REELTIME_EMULATED
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel may start its prologue: once all blocks have said so, or exited.
DEVICE void let_next_kernel_start() {
#if !REELTIME_EMULATED
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace reeltime
