// gdfn's checks and allocation, the same on every device. Kernels::with_type(op, x, f) calls f(zero of x's element type);
// Kernels::run(parameters, x) runs them where x is.
#pragma once
#include <tuple>

#include "common/kept.h"
#include "common/registration.h"
#include "common/tensor_check.h"
#include "gdfn/gdfn.h"

namespace autohdr {
namespace {

inline GdfnShape shape_from(const Tensor& x, const Tensor& project_out_weight, double eps) {
  check_image("gdfn", "x", x);
  STD_TORCH_CHECK(project_out_weight.dim() >= 2, "gdfn: project_out_weight must be [channels, hidden, 1, 1], got ",
                  shape_of(project_out_weight));
  check_sizes("gdfn", {x.size(1), x.size(2), x.size(3), project_out_weight.size(1)});
  return {x.size(0), x.size(2), x.size(3), x.size(1), project_out_weight.size(1), static_cast<float>(eps)};
}

inline GdfnWeights weights_from(const GdfnShape& s, const Tensor& norm_weight, const std::optional<Tensor>& norm_bias,
                                const Tensor& project_in, const Tensor& dwconv, const Tensor& project_out) {
  return {parameter("gdfn", "norm_weight", norm_weight, s.channels), parameter("gdfn", "norm_bias", norm_bias, s.channels),
          parameter("gdfn", "project_in_weight", project_in, 2 * s.hidden * s.channels),
          parameter("gdfn", "dwconv_weight", dwconv, 18 * s.hidden),
          parameter("gdfn", "project_out_weight", project_out, s.channels * s.hidden)};
}

template <class Kernels>
std::tuple<Tensor, Tensor> gdfn(Tensor x, Tensor norm_weight, std::optional<Tensor> norm_bias, Tensor project_in_weight,
                                Tensor dwconv_weight, Tensor project_out_weight, double eps, bool keep) {
  const GdfnShape s = shape_from(x, project_out_weight, eps);
  const GdfnWeights w = weights_from(s, norm_weight, norm_bias, project_in_weight, dwconv_weight, project_out_weight);
  Tensor y = new_like("gdfn", x), kept = new_kept(x, 2 * s.hidden, keep);
  Kernels::with_type("gdfn", x, [&](auto zero) {
    using T = decltype(zero);
    Kernels::run(GdfnForward<T>{s, w, read<T>(x), write_kept<T>(kept), write<T>(y)}, x);
  });
  return {y, kept};
}

template <class Kernels>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gdfn_backward(Tensor dy, Tensor x, Tensor norm_weight,
                                                                         std::optional<Tensor> norm_bias,
                                                                         Tensor project_in_weight, Tensor dwconv_weight,
                                                                         Tensor project_out_weight, Tensor kept, double eps) {
  const GdfnShape s = shape_from(x, project_out_weight, eps);
  const GdfnWeights w = weights_from(s, norm_weight, norm_bias, project_in_weight, dwconv_weight, project_out_weight);
  check_like("gdfn_backward", "dy", dy, x);
  check_kept("gdfn_backward", "kept", kept, x, 2 * s.hidden);
  const auto like = [](const Tensor& t) { return new_like("gdfn_backward", t); };
  Tensor dx = like(x), d_norm_weight = like(norm_weight), d_project_in = like(project_in_weight), d_dwconv = like(dwconv_weight),
         d_project_out = like(project_out_weight);
  Tensor d_norm_bias = norm_bias ? like(*norm_bias) : new_float(x, {0});
  Kernels::with_type("gdfn_backward", x, [&](auto zero) {
    using T = decltype(zero);
    Kernels::run(GdfnBackward<T>{s, w, read<T>(dy), read<T>(x), read_kept<T>(kept), write<T>(dx), write<float>(d_norm_weight),
                                 write<float>(d_norm_bias), write<float>(d_project_in), write<float>(d_dwconv),
                                 write<float>(d_project_out)},
                 x);
  });
  return {dx, d_norm_weight, d_norm_bias, d_project_in, d_dwconv, d_project_out};
}

template <class Kernels>
void add_kernels(const Registration& r) {
  r.add<&gdfn<Kernels>>("gdfn");
  r.add<&gdfn_backward<Kernels>>("gdfn_backward");
}

}  // namespace
}  // namespace autohdr
