// mdta's CPU kernels: checks, allocation and registration.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "common/cpu_isa.h"
#include "common/cpu_parallel.h"
#include "common/tensor_check.h"
#include "mdta/mdta.h"

#define AUTOHDR_BODY "mdta/mdta_cpu_kernel.h"
#include "common/cpu_each_isa.h"

namespace autohdr {
namespace {

template <class T>
void statistics(const MdtaStatistics<T>& a) {
  AUTOHDR_CALL(mdta_statistics<T>, a);
}
template <class T>
void apply(const MdtaApply<T>& a) {
  AUTOHDR_CALL(mdta_apply<T>, a);
}
template <class T>
void backward(const MdtaBackward<T>& a) {
  AUTOHDR_CALL(mdta_backward<T>, a);
}

MdtaShape shape_from(const Tensor& x, int64_t heads, double eps) {
  check_image("mdta", "x", x);
  check_sizes("mdta", {x.size(1), x.size(2), x.size(3)});
  STD_TORCH_CHECK(heads > 0 && x.size(1) % heads == 0, "mdta: num_heads must divide the ", x.size(1), " channels of x, got ", heads);
  return {x.size(0), x.size(2), x.size(3), x.size(1), heads, static_cast<float>(eps)};
}

MdtaWeights weights_from(int64_t c, int64_t heads, const Tensor& norm_weight, const std::optional<Tensor>& norm_bias,
                         const Tensor& qkv, const Tensor& dwconv, const Tensor& temperature, const Tensor& project_out) {
  return {parameter("mdta", "norm_weight", norm_weight, c),       parameter("mdta", "norm_bias", norm_bias, c),
          parameter("mdta", "qkv_weight", qkv, 3 * c * c),        parameter("mdta", "dwconv_weight", dwconv, 27 * c),
          parameter("mdta", "temperature", temperature, heads),   parameter("mdta", "project_out_weight", project_out, c * c)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mdta(Tensor x, Tensor norm_weight, std::optional<Tensor> norm_bias, Tensor qkv_weight,
                                                Tensor dwconv_weight, Tensor temperature, Tensor project_out_weight,
                                                int64_t num_heads, double eps) {
  const MdtaShape s = shape_from(x, num_heads, eps);
  const MdtaWeights w =
      weights_from(s.channels, num_heads, norm_weight, norm_bias, qkv_weight, dwconv_weight, temperature, project_out_weight);
  Tensor y = new_like("mdta", x);
  Tensor gram = new_float(x, {s.batch, s.heads, s.head_size(), s.head_size()});
  Tensor q_norm = new_float(x, {s.batch, s.channels}), k_norm = new_float(x, {s.batch, s.channels});
  const int64_t square = s.batch * s.channels * s.head_size(), row = s.batch * s.channels;
  std::vector<double> sums(square + 2 * row);
  const auto root = [](double v) { return static_cast<float>(std::sqrt(v)); };
  with_image_type("mdta", x, [&](auto zero) {
    using T = decltype(zero);
    const T* data = static_cast<const T*>(x.const_data_ptr());
    double *q_square = sums.data() + square, *k_square = q_square + row;
    statistics<T>({s, w, data, 0, s.height, sums.data(), q_square, k_square});
    std::copy(sums.data(), q_square, gram.mutable_data_ptr<float>());
    std::transform(q_square, k_square, q_norm.mutable_data_ptr<float>(), root);
    std::transform(k_square, k_square + row, k_norm.mutable_data_ptr<float>(), root);
    apply<T>({s, w, data, gram.const_data_ptr<float>(), q_norm.const_data_ptr<float>(), k_norm.const_data_ptr<float>(),
              static_cast<T*>(y.mutable_data_ptr())});
  });
  return {y, gram, q_norm, k_norm};
}

std::tuple<Tensor, Tensor, Tensor> mdta_statistics(Tensor x, Tensor norm_weight, std::optional<Tensor> norm_bias,
                                                   Tensor qkv_weight, Tensor dwconv_weight, Tensor temperature,
                                                   Tensor project_out_weight, int64_t num_heads, double eps, int64_t first,
                                                   int64_t end) {
  const MdtaShape s = shape_from(x, num_heads, eps);
  const MdtaWeights w =
      weights_from(s.channels, num_heads, norm_weight, norm_bias, qkv_weight, dwconv_weight, temperature, project_out_weight);
  STD_TORCH_CHECK(0 <= first && first < end && end <= s.height, "mdta_statistics: first and end must be rows of x, which has ",
                  s.height, ", got ", first, " and ", end);
  const auto doubles = [&](std::initializer_list<int64_t> size) {
    return torch::stable::new_empty(x, {size.begin(), size.size()}, ScalarType::Double);
  };
  Tensor gram = doubles({s.batch, s.heads, s.head_size(), s.head_size()});
  Tensor q_square = doubles({s.batch, s.channels}), k_square = doubles({s.batch, s.channels});
  with_image_type("mdta_statistics", x, [&](auto zero) {
    using T = decltype(zero);
    statistics<T>({s, w, static_cast<const T*>(x.const_data_ptr()), first, end, gram.mutable_data_ptr<double>(),
                   q_square.mutable_data_ptr<double>(), k_square.mutable_data_ptr<double>()});
  });
  return {gram, q_square, k_square};
}

Tensor mdta_apply(Tensor x, Tensor norm_weight, std::optional<Tensor> norm_bias, Tensor qkv_weight, Tensor dwconv_weight,
                  Tensor temperature, Tensor project_out_weight, Tensor gram, Tensor q_norm, Tensor k_norm, int64_t num_heads,
                  double eps) {
  const MdtaShape s = shape_from(x, num_heads, eps);
  const MdtaWeights w =
      weights_from(s.channels, num_heads, norm_weight, norm_bias, qkv_weight, dwconv_weight, temperature, project_out_weight);
  const float* gram_data = parameter("mdta_apply", "gram", gram, s.batch * s.channels * s.head_size());
  const float* q_data = parameter("mdta_apply", "q_norm", q_norm, s.batch * s.channels);
  const float* k_data = parameter("mdta_apply", "k_norm", k_norm, s.batch * s.channels);
  Tensor y = new_like("mdta_apply", x);
  with_image_type("mdta_apply", x, [&](auto zero) {
    using T = decltype(zero);
    apply<T>({s, w, static_cast<const T*>(x.const_data_ptr()), gram_data, q_data, k_data, static_cast<T*>(y.mutable_data_ptr())});
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mdta_backward(
    Tensor dy, Tensor x, Tensor norm_weight, std::optional<Tensor> norm_bias, Tensor qkv_weight, Tensor dwconv_weight,
    Tensor temperature, Tensor project_out_weight, Tensor gram, Tensor q_norm, Tensor k_norm, int64_t num_heads, double eps) {
  const MdtaShape s = shape_from(x, num_heads, eps);
  const MdtaWeights w =
      weights_from(s.channels, num_heads, norm_weight, norm_bias, qkv_weight, dwconv_weight, temperature, project_out_weight);
  check_like("mdta_backward", "dy", dy, x);
  const float* gram_data = parameter("mdta_backward", "gram", gram, s.batch * s.channels * s.head_size());
  const float* q_data = parameter("mdta_backward", "q_norm", q_norm, s.batch * s.channels);
  const float* k_data = parameter("mdta_backward", "k_norm", k_norm, s.batch * s.channels);
  const auto like = [](const Tensor& t) { return new_like("mdta_backward", t); };
  Tensor dx = like(x), d_norm_weight = like(norm_weight), d_qkv = like(qkv_weight), d_dwconv = like(dwconv_weight),
         d_temperature = like(temperature), d_project_out = like(project_out_weight);
  Tensor d_norm_bias = norm_bias ? like(*norm_bias) : new_float(x, {0});
  with_image_type("mdta_backward", x, [&](auto zero) {
    using T = decltype(zero);
    backward<T>({s, w, static_cast<const T*>(dy.const_data_ptr()), static_cast<const T*>(x.const_data_ptr()), gram_data, q_data,
                 k_data, static_cast<T*>(dx.mutable_data_ptr()), d_norm_weight.mutable_data_ptr<float>(),
                 d_norm_bias.mutable_data_ptr<float>(), d_qkv.mutable_data_ptr<float>(), d_dwconv.mutable_data_ptr<float>(),
                 d_temperature.mutable_data_ptr<float>(), d_project_out.mutable_data_ptr<float>()});
  });
  return {dx, d_norm_weight, d_norm_bias, d_qkv, d_dwconv, d_temperature, d_project_out};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(autohdr, CPU, m) {
  m.impl("mdta", TORCH_BOX(&mdta));
  m.impl("mdta_statistics", TORCH_BOX(&mdta_statistics));
  m.impl("mdta_apply", TORCH_BOX(&mdta_apply));
  m.impl("mdta_backward", TORCH_BOX(&mdta_backward));
}

}  // namespace autohdr
