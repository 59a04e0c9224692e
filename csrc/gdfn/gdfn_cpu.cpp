// gdfn's CPU kernels and their registration.
#include <algorithm>
#include <cmath>

#include "common/cpu_isa.h"
#include "common/cpu_steps.h"
#include "gdfn/gdfn_host.h"

#define AUTOHDR_BODY "gdfn/gdfn_cpu_kernel.h"
#include "common/cpu_each_isa.h"

namespace autohdr {
namespace {

struct CpuKernels {
  template <class F>
  static void with_type(const char* op, const Tensor& x, const F& f) {
    with_image_type(op, x, f);
  }
  template <class T>
  static void run(const GdfnForward<T>& a, const Tensor&) {
    AUTOHDR_CALL(gdfn_forward<T>, a);
  }
  template <class T>
  static void run(const GdfnBackward<T>& a, const Tensor&) {
    AUTOHDR_CALL(gdfn_backward<T>, a);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(autohdr, CPU, m) {
  m.impl("gdfn", TORCH_BOX(&gdfn<CpuKernels>));
  m.impl("gdfn_backward", TORCH_BOX(&gdfn_backward<CpuKernels>));
}

}  // namespace autohdr
