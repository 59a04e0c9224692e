// The checks and allocation of mdta in 8 bits; see mdta_host.h.
#pragma once
#include "common/registration.h"
#include "mdta/mdta_forward_host.h"

namespace autohdr {
namespace {

inline MdtaInt8Weights weights_from(const char* op, const MdtaShape& s, const Tensor& norm_weight,
                                    const std::optional<Tensor>& norm_bias, const Tensor& qkv, const Tensor& qkv_scale,
                                    const Tensor& dwconv, const Tensor& temperature, const Tensor& project_out,
                                    const Tensor& v_scale) {
  const int64_t c = s.channels;
  return {parameter(op, "norm_weight", norm_weight, c),
          parameter(op, "norm_bias", norm_bias, c),
          codes(op, "qkv_weight", qkv, 3 * c * c),
          parameter(op, "qkv_scale", qkv_scale, 3 * c),
          parameter(op, "dwconv_weight", dwconv, 27 * c),
          parameter(op, "temperature", temperature, s.heads),
          parameter(op, "project_out_weight", project_out, c * c),
          parameter(op, "v_scale", v_scale, c)};
}

template <class Kernels>
Tensor mdta_int8(Tensor x, Tensor norm_weight, std::optional<Tensor> norm_bias, Tensor qkv_weight, Tensor qkv_scale,
                 Tensor dwconv_weight, Tensor temperature, Tensor project_out_weight, Tensor v_scale, int64_t num_heads,
                 double eps) {
  const char* op = "mdta_int8";
  const MdtaShape s = shape_from(op, x, num_heads, eps);
  const MdtaInt8Weights w =
      weights_from(op, s, norm_weight, norm_bias, qkv_weight, qkv_scale, dwconv_weight, temperature, project_out_weight, v_scale);
  return std::get<0>(forward<Kernels>(op, x, s, w));
}

template <class Kernels>
std::tuple<Tensor, Tensor, Tensor> mdta_int8_statistics(Tensor x, Tensor norm_weight, std::optional<Tensor> norm_bias,
                                                        Tensor qkv_weight, Tensor qkv_scale, Tensor dwconv_weight,
                                                        Tensor temperature, Tensor project_out_weight, Tensor v_scale,
                                                        int64_t num_heads, double eps, int64_t first, int64_t end) {
  const char* op = "mdta_int8_statistics";
  const MdtaShape s = shape_from(op, x, num_heads, eps);
  const MdtaInt8Weights w =
      weights_from(op, s, norm_weight, norm_bias, qkv_weight, qkv_scale, dwconv_weight, temperature, project_out_weight, v_scale);
  return statistics<Kernels>(op, x, s, w, first, end);
}

template <class Kernels>
Tensor mdta_int8_apply(Tensor x, Tensor norm_weight, std::optional<Tensor> norm_bias, Tensor qkv_weight, Tensor qkv_scale,
                       Tensor dwconv_weight, Tensor temperature, Tensor project_out_weight, Tensor v_scale, Tensor gram,
                       Tensor q_norm, Tensor k_norm, int64_t num_heads, double eps) {
  const char* op = "mdta_int8_apply";
  const MdtaShape s = shape_from(op, x, num_heads, eps);
  const MdtaInt8Weights w =
      weights_from(op, s, norm_weight, norm_bias, qkv_weight, qkv_scale, dwconv_weight, temperature, project_out_weight, v_scale);
  return apply<Kernels>(op, x, s, w, attention_from(op, s, gram, q_norm, k_norm));
}

template <class Kernels>
void add_kernels(const Registration& r) {
  r.add<&mdta_int8<Kernels>>("mdta_int8");
  r.add<&mdta_int8_statistics<Kernels>>("mdta_int8_statistics");
  r.add<&mdta_int8_apply<Kernels>>("mdta_int8_apply");
}

}  // namespace
}  // namespace autohdr
