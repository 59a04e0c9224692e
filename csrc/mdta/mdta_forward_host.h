// What the forward passes of mdta, in float32 or in 8 bits, share: see mdta_host.h.
#pragma once
#include <tuple>

#include "common/tensor_check.h"
#include "mdta/mdta.h"

namespace autohdr {
namespace {

inline MdtaShape shape_from(const char* op, const Tensor& x, int64_t heads, double eps) {
  check_image(op, "x", x);
  check_sizes(op, {x.size(1), x.size(2), x.size(3)});
  STD_TORCH_CHECK(heads > 0 && x.size(1) % heads == 0, op, ": num_heads must divide the ", x.size(1), " channels of x, got ",
                  heads);
  return {x.size(0), x.size(2), x.size(3), x.size(1), heads, static_cast<float>(eps)};
}

inline MdtaAttention attention_from(const char* op, const MdtaShape& s, const Tensor& gram, const Tensor& q_norm,
                                    const Tensor& k_norm) {
  return {parameter(op, "gram", gram, s.batch * s.channels * s.head_size()),
          parameter(op, "q_norm", q_norm, s.batch * s.channels), parameter(op, "k_norm", k_norm, s.batch * s.channels)};
}

template <class Kernels, class Weights>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const char* op, const Tensor& x, const MdtaShape& s, const Weights& w) {
  Tensor y = new_like(op, x);
  Tensor gram = new_float(x, {s.batch, s.heads, s.head_size(), s.head_size()});
  Tensor q_norm = new_float(x, {s.batch, s.channels}), k_norm = new_float(x, {s.batch, s.channels});
  Kernels::with_type(op, x, [&](auto zero) {
    using T = decltype(zero);
    Kernels::run(MdtaForward<T, Weights>{s, w, read<T>(x), write<float>(gram), write<float>(q_norm), write<float>(k_norm),
                                         write<T>(y)},
                 x);
  });
  return {y, gram, q_norm, k_norm};
}

template <class Kernels, class Weights>
std::tuple<Tensor, Tensor, Tensor> statistics(const char* op, const Tensor& x, const MdtaShape& s, const Weights& w,
                                              int64_t first, int64_t end) {
  STD_TORCH_CHECK(0 <= first && first < end && end <= s.height, op, ": first and end must be rows of x, which has ", s.height,
                  ", got ", first, " and ", end);
  const auto doubles = [&](std::initializer_list<int64_t> size) {
    return torch::stable::new_empty(x, {size.begin(), size.size()}, ScalarType::Double);
  };
  Tensor gram = doubles({s.batch, s.heads, s.head_size(), s.head_size()});
  Tensor q_square = doubles({s.batch, s.channels}), k_square = doubles({s.batch, s.channels});
  Kernels::with_type(op, x, [&](auto zero) {
    using T = decltype(zero);
    Kernels::run(MdtaStatistics<T, Weights>{s, w, read<T>(x), first, end, write<double>(gram), write<double>(q_square),
                                            write<double>(k_square)},
                 x);
  });
  return {gram, q_square, k_square};
}

template <class Kernels, class Weights>
Tensor apply(const char* op, const Tensor& x, const MdtaShape& s, const Weights& w, const MdtaAttention& attention) {
  Tensor y = new_like(op, x);
  Kernels::with_type(op, x, [&](auto zero) {
    using T = decltype(zero);
    Kernels::run(MdtaApply<T, Weights>{s, w, read<T>(x), attention, write<T>(y)}, x);
  });
  return y;
}

}  // namespace
}  // namespace autohdr
