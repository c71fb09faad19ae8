// SPDX-License-Identifier: Apache-2.0
// The extension reeltime._C: build facts, and the entry points of every family (binding.h).
// It takes pointers, sizes, strides and a stream, so it links neither torch nor libcuda.
#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>

#include "common/build_info.h"
#include "common/record.h"

namespace py = pybind11;

// REELTIME_FAMILIES, from CMake: FAMILY(quant) FAMILY(norm) ... of those that were compiled.
namespace reeltime {
#define FAMILY(name) void register_##name(py::module_& m);
REELTIME_FAMILIES
#undef FAMILY
}  // namespace reeltime

namespace {

// "a,b" -> ("a", "b").
py::tuple split(const std::string& list) {
  py::list items;
  for (size_t begin = 0; begin < list.size();) {
    const size_t end = std::min(list.find(',', begin), list.size());
    items.append(list.substr(begin, end - begin));
    begin = end + 1;
  }
  return py::tuple(items);
}

py::object string_or_none(const std::string& text) {
  return text.empty() ? py::object(py::none()) : py::object(py::str(text));
}

// (symbol of the kernel, grid, threads, cluster, shared_bytes) of every launch that `call` makes;
// none of them runs.
py::list record(const py::function& call) {
  std::vector<reeltime::RecordedLaunch> launches;
  struct Restore {
    ~Restore() { reeltime::recorded_launches = nullptr; }
  } restore;
  reeltime::recorded_launches = &launches;
  call();
  py::list rows;
  for (const auto& it : launches) {
    Dl_info found{};
    const bool known = dladdr(it.kernel, &found) && found.dli_sname;
    rows.append(py::make_tuple(known ? found.dli_sname : "",
                               py::make_tuple(it.grid_x, it.grid_y, it.grid_z), it.threads,
                               it.cluster, it.shared_bytes));
  }
  return rows;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  namespace info = reeltime::build_info;
  m.doc() = "Build facts and CUDA kernels of reeltime.";

  // has_cuda: CUDA kernels are compiled in.  nvcc: the compiler that was found, used or not.
  const bool has_cuda = info::kCudaFamilies[0] != '\0';
  m.attr("version") = info::kVersion;
  m.attr("has_cuda") = has_cuda;
  m.attr("cuda_version") = has_cuda ? string_or_none(info::kNvcc) : py::none();
  m.attr("nvcc") = string_or_none(info::kNvcc);
  m.attr("archs") = split(info::kCudaArchs);
  m.attr("cuda_families") = split(info::kCudaFamilies);
  m.attr("compiler") = info::kCompiler;
  m.attr("build_type") = info::kBuildType;

  // Entry point -> the names of its parameters, all keywords, after sm and stream (binding.h).
  m.attr("entries") = py::dict();
  m.def("record", &record, py::arg("call"));
#define FAMILY(name) reeltime::register_##name(m);
  REELTIME_FAMILIES
#undef FAMILY
}
