// The pybind11 module autohdr._C. Loading it registers the kernels; what it offers itself is build_info(), and two switches
// for tests.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/cpu_isa.h"

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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "autohdr's compiled kernels";
  m.def("build_info", &build_info, "What was compiled, and the CPU instruction set the kernels run with here.");
  m.def("poison_scratch", &autohdr::Scratch::poison, "Makes the CPU kernels' scratch memory hold NaN before use, for tests.");
  m.def("use_cpu_isa", &autohdr::use_isa, "Makes the CPU kernels run with one of build_info()['cpu_isas_here'].");
}
