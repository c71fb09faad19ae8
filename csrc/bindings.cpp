// SPDX-License-Identifier: Apache-2.0
// The extension reeltime._C: build facts, then one register_<family>(m) line per kernel family.
// It takes pointers, sizes, strides and a stream, so it links neither torch nor libcuda.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>

#include "common/build_info.h"

namespace py = pybind11;

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
}
