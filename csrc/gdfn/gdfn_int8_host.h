// The checks and allocation of gdfn in 8 bits; see gdfn_host.h.
#pragma once
#include "common/registration.h"
#include "common/tensor_check.h"
#include "gdfn/gdfn.h"

namespace autohdr {
namespace {

template <class Kernels>
Tensor gdfn_int8(Tensor x, Tensor norm_weight, std::optional<Tensor> norm_bias, Tensor project_in_weight, Tensor project_in_scale,
                 Tensor dwconv_weight, Tensor project_out_weight, Tensor project_out_scale, double eps) {
  const char* op = "gdfn_int8";
  check_image(op, "x", x);
  STD_TORCH_CHECK(project_out_weight.dim() >= 2, op, ": project_out_weight must be [channels, hidden, 1, 1], got ",
                  shape_of(project_out_weight));
  const GdfnShape s{x.size(0), x.size(2), x.size(3), x.size(1), project_out_weight.size(1), static_cast<float>(eps)};
  check_sizes(op, {s.height, s.width, s.channels, s.hidden});
  const GdfnInt8Weights w{parameter(op, "norm_weight", norm_weight, s.channels),
                          parameter(op, "norm_bias", norm_bias, s.channels),
                          codes(op, "project_in_weight", project_in_weight, 2 * s.hidden * s.channels),
                          parameter(op, "project_in_scale", project_in_scale, 2 * s.hidden),
                          parameter(op, "dwconv_weight", dwconv_weight, 18 * s.hidden),
                          codes(op, "project_out_weight", project_out_weight, s.channels * s.hidden),
                          parameter(op, "project_out_scale", project_out_scale, s.channels)};
  Tensor y = new_like(op, x);
  Kernels::with_type(op, x, [&](auto zero) {
    using T = decltype(zero);
    Kernels::run(GdfnInt8Forward<T>{s, w, read<T>(x), write<T>(y)}, x);
  });
  return y;
}

template <class Kernels>
void add_kernels(const Registration& r) {
  r.add<&gdfn_int8<Kernels>>("gdfn_int8");
}

}  // namespace
}  // namespace autohdr
