// How an op's functions become its kernels: <op>_host.h names them in add_kernels, and <op>_cpu.cpp and <op>_cuda.cpp say
// AUTOHDR_REGISTER. What C++ takes and returns is noted, so that Python can compare it with the op's schema, which the dispatcher
// does not.
#pragma once
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/tensor_check.h"

namespace autohdr {

struct Registered {
  std::string key, op, signature;  // such as CPU, gdfn, (Tensor, Optional[Tensor], float) -> (Tensor)
};

inline std::vector<Registered>& registered() {
  static std::vector<Registered> all;
  return all;
}

#ifdef AUTOHDR_EMULATION
// For tests, which see no autohdr._C here: all of them, a line each.
extern "C" __attribute__((weak)) const char* autohdr_signatures() {
  static std::string lines;
  lines.clear();
  for (const Registered& r : registered()) lines += r.key + "\t" + r.op + "\t" + r.signature + "\n";
  return lines.c_str();
}
#endif

// A list of types, by torch's names.
template <class T>
struct Names;
template <>
struct Names<Tensor> {
  static std::string list() { return "Tensor"; }
};
template <>
struct Names<std::optional<Tensor>> {
  static std::string list() { return "Optional[Tensor]"; }
};
template <>
struct Names<int64_t> {
  static std::string list() { return "int"; }
};
template <>
struct Names<double> {
  static std::string list() { return "float"; }
};
template <>
struct Names<bool> {
  static std::string list() { return "bool"; }
};
template <class... T>
struct Names<std::tuple<T...>> {
  static std::string list() {
    std::string all;
    ((all += (all.empty() ? "" : ", ") + Names<T>::list()), ...);
    return all;
  }
};

template <class Result, class... Arguments>
std::string signature_of(Result (*)(Arguments...)) {
  return "(" + Names<std::tuple<Arguments...>>::list() + ") -> (" + Names<Result>::list() + ")";
}

struct __attribute__((visibility("hidden"))) Registration {
  torch::stable::detail::StableLibrary& library;
  const char* key;

  template <auto function>
  void add(const char* op) const {
    library.impl(op, TORCH_BOX(function));
    registered().push_back({key, op, signature_of(function)});
  }
};

}  // namespace autohdr

// Registers add_kernels<Kernels> for tensors of a dispatch key.
#define AUTOHDR_REGISTER(key, Kernels)                                                    \
  STABLE_TORCH_LIBRARY_IMPL(autohdr, key, m) {                                            \
    autohdr::add_kernels<autohdr::Kernels>(autohdr::Registration{m, C10_STRINGIZE(key)}); \
  }
