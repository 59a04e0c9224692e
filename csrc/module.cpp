// The pybind11 module autohdr._C. Loading it registers the kernels; what it offers itself is build_info(), the kernels'
// signatures, and two switches for tests.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/cpu_isa.h"
#include "common/registration.h"

#define AUTOHDR_STRING_(x) #x
#define AUTOHDR_STRING(x) AUTOHDR_STRING_(x)

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["torch"] = AUTOHDR_STRING(AUTOHDR_TORCH_VERSION);
  info["compiler"] = __VERSION__;
  info["cuda"] = AUTOHDR_STRING(AUTOHDR_CUDA_VERSION);
  info["cuda_architectures"] = AUTOHDR_STRING(AUTOHDR_CUDA_ARCHITECTURES);
  info["cpu_isas"] = autohdr::compiled_isas();
  info["cpu_isas_here"] = autohdr::usable_isas();
  info["cpu_isa"] = autohdr::isa_name(autohdr::current_isa());
  return info;
}

// Each registered kernel as (dispatch key, op, signature).
std::vector<std::tuple<std::string, std::string, std::string>> signatures() {
  std::vector<std::tuple<std::string, std::string, std::string>> all;
  for (const autohdr::Registered& r : autohdr::registered()) all.emplace_back(r.key, r.op, r.signature);
  return all;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "autohdr's compiled kernels";
  m.def("build_info", &build_info, "What was compiled, and the CPU instruction set the kernels run with here.");
  m.def("signatures", &signatures,
        "Each registered kernel as (dispatch key, op, C++ signature in the words of torch's schemas).");
  m.def("poison_scratch", &autohdr::Scratch::poison, "Makes the CPU kernels' scratch memory hold NaN before use, for tests.");
  m.def("use_cpu_isa", &autohdr::use_isa, "Makes the CPU kernels run with one of build_info()['cpu_isas_here'].");
}
