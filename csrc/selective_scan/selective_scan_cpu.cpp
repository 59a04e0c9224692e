// selective_scan's CPU kernels and their registration.
#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/cpu_isa.h"
#include "common/cpu_parallel.h"
#include "selective_scan/selective_scan_host.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC's own AVX-512 intrinsics
#endif

#define AUTOHDR_BODY "selective_scan/selective_scan_cpu_kernel.h"
#include "common/cpu_each_isa.h"

namespace autohdr {
namespace {

struct CpuKernels {
  static void run(const ScanForward& a, const Tensor&) { AUTOHDR_CALL(selective_scan_forward, a); }
  static void run(const ScanBackward& a, const Tensor&) { AUTOHDR_CALL(selective_scan_backward, a); }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(autohdr, CPU, m) {
  m.impl("selective_scan", TORCH_BOX(&selective_scan<CpuKernels>));
  m.impl("selective_scan_backward", TORCH_BOX(&selective_scan_backward<CpuKernels>));
}

}  // namespace autohdr
