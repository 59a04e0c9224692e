// mdta's CPU kernels and their registration.
#include <algorithm>
#include <cmath>
#include <vector>

#include "common/cpu_isa.h"
#include "common/cpu_steps.h"
#include "mdta/mdta_host.h"

#define AUTOHDR_BODY "mdta/mdta_cpu_kernel.h"
#include "common/cpu_each_isa.h"

namespace autohdr {
namespace {

struct CpuKernels {
  template <class F>
  static void with_type(const char* op, const Tensor& x, const F& f) {
    with_image_type(op, x, f);
  }
  template <class T>
  static void run(const MdtaStatistics<T>& a, const Tensor&) {
    AUTOHDR_CALL(mdta_statistics<T>, a);
  }
  template <class T>
  static void run(const MdtaApply<T>& a, const Tensor&) {
    AUTOHDR_CALL(mdta_apply<T>, a);
  }
  template <class T>
  static void run(const MdtaForward<T>& a, const Tensor& x) {
    const MdtaShape& s = a.shape;
    const int64_t square = s.batch * s.channels * s.head_size(), row = s.batch * s.channels;
    std::vector<double> sums(square + 2 * row);
    double *q_square = sums.data() + square, *k_square = q_square + row;
    const auto root = [](double v) { return static_cast<float>(std::sqrt(v)); };
    run(MdtaStatistics<T>{s, a.weights, a.x, 0, s.height, sums.data(), q_square, k_square}, x);
    std::copy(sums.data(), q_square, a.gram);
    std::transform(q_square, k_square, a.q_norm, root);
    std::transform(k_square, k_square + row, a.k_norm, root);
    run(MdtaApply<T>{s, a.weights, a.x, {a.gram, a.q_norm, a.k_norm}, a.y}, x);
  }
  template <class T>
  static void run(const MdtaBackward<T>& a, const Tensor&) {
    AUTOHDR_CALL(mdta_backward<T>, a);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(autohdr, CPU, m) {
  m.impl("mdta", TORCH_BOX(&mdta<CpuKernels>));
  m.impl("mdta_statistics", TORCH_BOX(&mdta_statistics<CpuKernels>));
  m.impl("mdta_apply", TORCH_BOX(&mdta_apply<CpuKernels>));
  m.impl("mdta_backward", TORCH_BOX(&mdta_backward<CpuKernels>));
}

}  // namespace autohdr
