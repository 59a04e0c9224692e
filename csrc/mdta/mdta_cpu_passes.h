// mdta's forward pass on a CPU, in float32 or in 8 bits: its two passes, at the baseline. Behind common/cpu_each_isa.h.
#pragma once

namespace autohdr {
namespace {

struct MdtaCpuKernels : CpuKernels {
  using CpuKernels::run;
  template <class T, class Weights>
  static void run(const MdtaForward<T, Weights>& a, const Tensor& x) {
    const MdtaShape& s = a.shape;
    const int64_t square = s.batch * s.channels * s.head_size(), row = s.batch * s.channels;
    std::vector<double> sums(square + 2 * row);
    double *q_square = sums.data() + square, *k_square = q_square + row;
    const auto root = [](double v) { return static_cast<float>(std::sqrt(v)); };
    run(MdtaStatistics<T, Weights>{s, a.weights, a.x, 0, s.height, sums.data(), q_square, k_square}, x);
    std::copy(sums.data(), q_square, a.gram);
    std::transform(q_square, k_square, a.q_norm, root);
    std::transform(k_square, k_square + row, a.k_norm, root);
    run(MdtaApply<T, Weights>{s, a.weights, a.x, {a.gram, a.q_norm, a.k_norm}, a.y}, x);
  }
};

}  // namespace
}  // namespace autohdr
