// SPDX-License-Identifier: Apache-2.0
// How an entry point becomes a function of reeltime._C: one keyword per field of its parameters.
//
//   bind<QuantizeParams>(m, "quantize", {{80, quantize_sm80}},
//                        field("x", &QuantizeParams::x), ...);
//
//   _C.quantize(90, stream, x=address, ..., M=6120)    by the code for sm_90, on a stream's address
//
// Pointers are addresses, 0 or None for null; numbers are checked against their type.  Returns what
// reeltime._C.record() collected, if anything; raises RuntimeError with what CUDA said.
#pragma once
#define REELTIME_BINDING 1
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <functional>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

namespace reeltime {

namespace py = pybind11;

// --- Fields --------------------------------------------------------------------------------------

template <class Params>
struct Field {
  std::string name;
  std::function<void(Params&, py::handle)> set;
};

inline std::string type_of(py::handle value) {
  return py::str(py::type::handle_of(value).attr("__name__"));
}

[[noreturn]] inline void refuse(const std::string& name, const char* expected, py::handle value) {
  throw py::type_error(name + ": expected " + expected + ", got " + type_of(value) + " " +
                       std::string(py::repr(value)));
}

template <class T>
T integer(const std::string& name, py::handle value, const char* expected) {
  int overflow = 0;
  const long long wide =
      PyLong_Check(value.ptr()) ? PyLong_AsLongLongAndOverflow(value.ptr(), &overflow) : 0;
  if (!PyLong_Check(value.ptr()) || overflow || wide < std::numeric_limits<T>::min() ||
      wide > std::numeric_limits<T>::max())
    refuse(name, expected, value);
  return static_cast<T>(wide);
}

template <class T>
T convert(const std::string& name, py::handle value) {
  if constexpr (std::is_pointer_v<T>) {
    if (value.is_none()) return nullptr;
    if (!PyLong_Check(value.ptr())) refuse(name, "an address or None", value);
    void* address = PyLong_AsVoidPtr(value.ptr());
    if (PyErr_Occurred()) throw py::error_already_set();
    return static_cast<T>(address);
  } else if constexpr (std::is_enum_v<T>) {
    return static_cast<T>(integer<std::underlying_type_t<T>>(name, value, "an enumerator"));
  } else if constexpr (std::is_same_v<T, float>) {
    const double number = PyFloat_AsDouble(value.ptr());
    if (PyErr_Occurred()) {
      PyErr_Clear();
      refuse(name, "a number", value);
    }
    return static_cast<float>(number);
  } else {
    static_assert(std::is_same_v<T, int> || std::is_same_v<T, int64_t>);
    return integer<T>(name, value, sizeof(T) == 4 ? "a 32-bit integer" : "a 64-bit integer");
  }
}

template <class Params, class T>
Field<Params> field(const char* name, T Params::* member) {
  return {name, [name = std::string(name), member](Params& params, py::handle value) {
            params.*member = convert<T>(name, value);
          }};
}

// --- Entry points --------------------------------------------------------------------------------

template <class Params>
struct Code {
  int sm;  // of the file: sm80.cu and sm89.cu serve what follows them, any other its own chip
  cudaError_t (*launch)(const Params&, cudaStream_t);
};

template <class Params>
const Code<Params>* code_for(const std::vector<Code<Params>>& codes, int sm) {
  const Code<Params>* found = nullptr;
  for (const auto& code : codes)
    if (code.sm == sm || ((code.sm == 80 || code.sm == 89) && code.sm < sm)) found = &code;
  return found;
}

template <class Params, class... Fields>
void bind(py::module_& m, const char* name, std::vector<Code<Params>> codes,
          const Fields&... fields) {
  std::vector<Field<Params>> all{fields...};
  std::vector<py::object> keys;
  py::list names;
  for (const auto& item : all) {
    keys.push_back(
        py::reinterpret_steal<py::object>(PyUnicode_InternFromString(item.name.c_str())));
    names.append(keys.back());
  }
  py::dict(m.attr("entries"))[name] = py::tuple(names);

  m.def(name, [name = std::string(name), codes = std::move(codes), all = std::move(all),
               keys = std::move(keys)](int sm, uintptr_t stream, const py::kwargs& arguments) {
    // Every field once, and nothing else
    Params params{};
    for (size_t i = 0; i < all.size(); i++) {
      PyObject* value = PyDict_GetItemWithError(arguments.ptr(), keys[i].ptr());
      if (!value) throw py::type_error(name + ": missing argument " + all[i].name);
      all[i].set(params, value);
    }
    if (arguments.size() != all.size()) {
      for (const auto& [key, value] : arguments) {
        bool known = false;
        for (const auto& item : all) known |= item.name == std::string(py::str(key));
        if (!known) throw py::type_error(name + ": unknown argument " + std::string(py::str(key)));
      }
    }

    // Launch on the stream; nothing is waited for
    const Code<Params>* code = code_for(codes, sm);
    if (!code) throw std::runtime_error(name + ": no code for sm_" + std::to_string(sm));
    const cudaError_t error = code->launch(params, reinterpret_cast<cudaStream_t>(stream));
    if (error != cudaSuccess) {
      cudaGetLastError();  // it is reported here, not at somebody's next call
      throw std::runtime_error(name + " on sm_" + std::to_string(sm) + ": " +
                               cudaGetErrorName(error) + ", " + cudaGetErrorString(error));
    }
  });
}

}  // namespace reeltime
