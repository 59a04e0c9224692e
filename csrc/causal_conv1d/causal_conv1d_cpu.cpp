// causal_conv1d's CPU kernels and their registration.
#include <algorithm>
#include <type_traits>

#include "causal_conv1d/causal_conv1d_host.h"
#include "common/cpu_isa.h"
#include "common/cpu_parallel.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC's own AVX-512 intrinsics
#endif

#define AUTOHDR_BODY "causal_conv1d/causal_conv1d_cpu_kernel.h"
#include "common/cpu_each_isa.h"

namespace autohdr {
namespace {

struct CpuKernels {
  static void run(const ConvForward& a, const Tensor&) { AUTOHDR_CALL(causal_conv1d_forward, a); }
  static void run(const ConvBackward& a, const Tensor&) { AUTOHDR_CALL(causal_conv1d_backward, a); }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(autohdr, CPU, m) {
  m.impl("causal_conv1d", TORCH_BOX(&causal_conv1d<CpuKernels>));
  m.impl("causal_conv1d_backward", TORCH_BOX(&causal_conv1d_backward<CpuKernels>));
}

}  // namespace autohdr
