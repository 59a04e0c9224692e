// mdta's checks and allocation, the same on every device. Kernels::with_type(op, x, f) calls f(zero of x's element type);
// Kernels::run(parameters, x) runs them where x is.
#pragma once
#include <tuple>

#include "common/registration.h"
#include "mdta/mdta_forward_host.h"

namespace autohdr {
namespace {

inline MdtaWeights weights_from(const MdtaShape& s, const Tensor& norm_weight, const std::optional<Tensor>& norm_bias,
                                const Tensor& qkv, const Tensor& dwconv, const Tensor& temperature, const Tensor& project_out) {
  const int64_t c = s.channels;
  return {parameter("mdta", "norm_weight", norm_weight, c),       parameter("mdta", "norm_bias", norm_bias, c),
          parameter("mdta", "qkv_weight", qkv, 3 * c * c),        parameter("mdta", "dwconv_weight", dwconv, 27 * c),
          parameter("mdta", "temperature", temperature, s.heads), parameter("mdta", "project_out_weight", project_out, c * c)};
}

template <class Kernels>
std::tuple<Tensor, Tensor, Tensor, Tensor> mdta(Tensor x, Tensor norm_weight, std::optional<Tensor> norm_bias, Tensor qkv_weight,
                                                Tensor dwconv_weight, Tensor temperature, Tensor project_out_weight,
                                                int64_t num_heads, double eps) {
  const MdtaShape s = shape_from("mdta", x, num_heads, eps);
  const MdtaWeights w = weights_from(s, norm_weight, norm_bias, qkv_weight, dwconv_weight, temperature, project_out_weight);
  return forward<Kernels>("mdta", x, s, w);
}

template <class Kernels>
std::tuple<Tensor, Tensor, Tensor> mdta_statistics(Tensor x, Tensor norm_weight, std::optional<Tensor> norm_bias,
                                                   Tensor qkv_weight, Tensor dwconv_weight, Tensor temperature,
                                                   Tensor project_out_weight, int64_t num_heads, double eps, int64_t first,
                                                   int64_t end) {
  const MdtaShape s = shape_from("mdta", x, num_heads, eps);
  const MdtaWeights w = weights_from(s, norm_weight, norm_bias, qkv_weight, dwconv_weight, temperature, project_out_weight);
  return statistics<Kernels>("mdta_statistics", x, s, w, first, end);
}

template <class Kernels>
Tensor mdta_apply(Tensor x, Tensor norm_weight, std::optional<Tensor> norm_bias, Tensor qkv_weight, Tensor dwconv_weight,
                  Tensor temperature, Tensor project_out_weight, Tensor gram, Tensor q_norm, Tensor k_norm, int64_t num_heads,
                  double eps) {
  const MdtaShape s = shape_from("mdta", x, num_heads, eps);
  const MdtaWeights w = weights_from(s, norm_weight, norm_bias, qkv_weight, dwconv_weight, temperature, project_out_weight);
  return apply<Kernels>("mdta_apply", x, s, w, attention_from("mdta_apply", s, gram, q_norm, k_norm));
}

template <class Kernels>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mdta_backward(
    Tensor dy, Tensor x, Tensor norm_weight, std::optional<Tensor> norm_bias, Tensor qkv_weight, Tensor dwconv_weight,
    Tensor temperature, Tensor project_out_weight, Tensor gram, Tensor q_norm, Tensor k_norm, int64_t num_heads, double eps) {
  const MdtaShape s = shape_from("mdta", x, num_heads, eps);
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
