// mdta's checks and allocation, the same on every device. Kernels::with_type(op, x, f) calls f(zero of x's element type);
// Kernels::run(parameters, x) runs them where x is.
#pragma once
#include <tuple>

#include "common/registration.h"
#include "common/tensor_check.h"
#include "mdta/mdta.h"

namespace autohdr {
namespace {

inline MdtaShape shape_from(const Tensor& x, int64_t heads, double eps) {
  check_image("mdta", "x", x);
  check_sizes("mdta", {x.size(1), x.size(2), x.size(3)});
  STD_TORCH_CHECK(heads > 0 && x.size(1) % heads == 0, "mdta: num_heads must divide the ", x.size(1), " channels of x, got ",
                  heads);
  return {x.size(0), x.size(2), x.size(3), x.size(1), heads, static_cast<float>(eps)};
}

inline MdtaWeights weights_from(const MdtaShape& s, const Tensor& norm_weight, const std::optional<Tensor>& norm_bias,
                                const Tensor& qkv, const Tensor& dwconv, const Tensor& temperature, const Tensor& project_out) {
  const int64_t c = s.channels;
  return {parameter("mdta", "norm_weight", norm_weight, c),       parameter("mdta", "norm_bias", norm_bias, c),
          parameter("mdta", "qkv_weight", qkv, 3 * c * c),        parameter("mdta", "dwconv_weight", dwconv, 27 * c),
          parameter("mdta", "temperature", temperature, s.heads), parameter("mdta", "project_out_weight", project_out, c * c)};
}

inline MdtaAttention attention_from(const char* op, const MdtaShape& s, const Tensor& gram, const Tensor& q_norm,
                                    const Tensor& k_norm) {
  return {parameter(op, "gram", gram, s.batch * s.channels * s.head_size()),
          parameter(op, "q_norm", q_norm, s.batch * s.channels), parameter(op, "k_norm", k_norm, s.batch * s.channels)};
}

template <class Kernels>
std::tuple<Tensor, Tensor, Tensor, Tensor> mdta(Tensor x, Tensor norm_weight, std::optional<Tensor> norm_bias, Tensor qkv_weight,
                                                Tensor dwconv_weight, Tensor temperature, Tensor project_out_weight,
                                                int64_t num_heads, double eps) {
  const MdtaShape s = shape_from(x, num_heads, eps);
  const MdtaWeights w = weights_from(s, norm_weight, norm_bias, qkv_weight, dwconv_weight, temperature, project_out_weight);
  Tensor y = new_like("mdta", x);
  Tensor gram = new_float(x, {s.batch, s.heads, s.head_size(), s.head_size()});
  Tensor q_norm = new_float(x, {s.batch, s.channels}), k_norm = new_float(x, {s.batch, s.channels});
  Kernels::with_type("mdta", x, [&](auto zero) {
    using T = decltype(zero);
    Kernels::run(MdtaForward<T>{s, w, read<T>(x), write<float>(gram), write<float>(q_norm), write<float>(k_norm), write<T>(y)},
                 x);
  });
  return {y, gram, q_norm, k_norm};
}

template <class Kernels>
std::tuple<Tensor, Tensor, Tensor> mdta_statistics(Tensor x, Tensor norm_weight, std::optional<Tensor> norm_bias,
                                                   Tensor qkv_weight, Tensor dwconv_weight, Tensor temperature,
                                                   Tensor project_out_weight, int64_t num_heads, double eps, int64_t first,
                                                   int64_t end) {
  const MdtaShape s = shape_from(x, num_heads, eps);
  const MdtaWeights w = weights_from(s, norm_weight, norm_bias, qkv_weight, dwconv_weight, temperature, project_out_weight);
  STD_TORCH_CHECK(0 <= first && first < end && end <= s.height, "mdta_statistics: first and end must be rows of x, which has ",
                  s.height, ", got ", first, " and ", end);
  const auto doubles = [&](std::initializer_list<int64_t> size) {
    return torch::stable::new_empty(x, {size.begin(), size.size()}, ScalarType::Double);
  };
  Tensor gram = doubles({s.batch, s.heads, s.head_size(), s.head_size()});
  Tensor q_square = doubles({s.batch, s.channels}), k_square = doubles({s.batch, s.channels});
  Kernels::with_type("mdta_statistics", x, [&](auto zero) {
    using T = decltype(zero);
    Kernels::run(MdtaStatistics<T>{s, w, read<T>(x), first, end, write<double>(gram), write<double>(q_square),
                                   write<double>(k_square)},
                 x);
  });
  return {gram, q_square, k_square};
}

template <class Kernels>
Tensor mdta_apply(Tensor x, Tensor norm_weight, std::optional<Tensor> norm_bias, Tensor qkv_weight, Tensor dwconv_weight,
                  Tensor temperature, Tensor project_out_weight, Tensor gram, Tensor q_norm, Tensor k_norm, int64_t num_heads,
                  double eps) {
  const MdtaShape s = shape_from(x, num_heads, eps);
  const MdtaWeights w = weights_from(s, norm_weight, norm_bias, qkv_weight, dwconv_weight, temperature, project_out_weight);
  const MdtaAttention attention = attention_from("mdta_apply", s, gram, q_norm, k_norm);
  Tensor y = new_like("mdta_apply", x);
  Kernels::with_type("mdta_apply", x, [&](auto zero) {
    using T = decltype(zero);
    Kernels::run(MdtaApply<T>{s, w, read<T>(x), attention, write<T>(y)}, x);
  });
  return y;
}

template <class Kernels>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mdta_backward(
    Tensor dy, Tensor x, Tensor norm_weight, std::optional<Tensor> norm_bias, Tensor qkv_weight, Tensor dwconv_weight,
    Tensor temperature, Tensor project_out_weight, Tensor gram, Tensor q_norm, Tensor k_norm, int64_t num_heads, double eps) {
  const MdtaShape s = shape_from(x, num_heads, eps);
  const MdtaWeights w = weights_from(s, norm_weight, norm_bias, qkv_weight, dwconv_weight, temperature, project_out_weight);
  check_like("mdta_backward", "dy", dy, x);
  const MdtaAttention attention = attention_from("mdta_backward", s, gram, q_norm, k_norm);
  const auto like = [](const Tensor& t) { return new_like("mdta_backward", t); };
  Tensor dx = like(x), d_norm_weight = like(norm_weight), d_qkv = like(qkv_weight), d_dwconv = like(dwconv_weight),
         d_temperature = like(temperature), d_project_out = like(project_out_weight);
  Tensor d_norm_bias = norm_bias ? like(*norm_bias) : new_float(x, {0});
  Kernels::with_type("mdta_backward", x, [&](auto zero) {
    using T = decltype(zero);
    Kernels::run(MdtaBackward<T>{s, w, read<T>(dy), read<T>(x), attention, write<T>(dx), write<float>(d_norm_weight),
                                 write<float>(d_norm_bias), write<float>(d_qkv), write<float>(d_dwconv),
                                 write<float>(d_temperature), write<float>(d_project_out)},
                 x);
  });
  return {dx, d_norm_weight, d_norm_bias, d_qkv, d_dwconv, d_temperature, d_project_out};
}

template <class Kernels>
void add_kernels(const Registration& r) {
  r.add<&mdta<Kernels>>("mdta");
  r.add<&mdta_statistics<Kernels>>("mdta_statistics");
  r.add<&mdta_apply<Kernels>>("mdta_apply");
  r.add<&mdta_backward<Kernels>>("mdta_backward");
}

}  // namespace
}  // namespace autohdr
