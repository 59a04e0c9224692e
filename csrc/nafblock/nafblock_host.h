// nafblock's checks and allocation. Kernels::with_type(op, x, f) calls f(zero of x's element type); Kernels::run(parameters, x)
// runs them where x is.
#pragma once
#include <array>
#include <tuple>

#include "common/kept.h"
#include "common/registration.h"
#include "common/tensor_check.h"
#include "nafblock/nafblock.h"

namespace autohdr {
namespace {

inline NafblockShape shape_from(const Tensor& x, double eps) {
  check_image("nafblock", "x", x);
  check_sizes("nafblock", {x.size(1), x.size(2), x.size(3)});
  return {x.size(0), x.size(2), x.size(3), x.size(1), static_cast<float>(eps)};
}

// The block's parameters, in the order of the schema.
#define AUTOHDR_NAFBLOCK_PARAMETERS                                                                                       \
  Tensor norm1_weight, Tensor norm1_bias, Tensor conv1_weight, Tensor conv1_bias, Tensor conv2_weight, Tensor conv2_bias, \
      Tensor sca_weight, Tensor sca_bias, Tensor conv3_weight, Tensor conv3_bias, Tensor beta, Tensor norm2_weight,       \
      Tensor norm2_bias, Tensor conv4_weight, Tensor conv4_bias, Tensor conv5_weight, Tensor conv5_bias, Tensor gamma
#define AUTOHDR_NAFBLOCK_ARGUMENTS                                                                                              \
  norm1_weight, norm1_bias, conv1_weight, conv1_bias, conv2_weight, conv2_bias, sca_weight, sca_bias, conv3_weight, conv3_bias, \
      beta, norm2_weight, norm2_bias, conv4_weight, conv4_bias, conv5_weight, conv5_bias, gamma

inline const float* of(const char* name, const Tensor& t, int64_t numel) { return parameter("nafblock", name, t, numel); }

// Up to the first gate.
inline NafblockWeights first_from(const NafblockShape& s, const Tensor& norm1_weight, const Tensor& norm1_bias,
                                  const Tensor& conv1_weight, const Tensor& conv1_bias, const Tensor& conv2_weight,
                                  const Tensor& conv2_bias) {
  const int64_t c = s.channels, two = 2 * c;
  NafblockWeights w{};
  w.norm1_weight = of("norm1_weight", norm1_weight, c), w.norm1_bias = of("norm1_bias", norm1_bias, c);
  w.conv1_weight = of("conv1_weight", conv1_weight, two * c), w.conv1_bias = of("conv1_bias", conv1_bias, two);
  w.conv2_weight = of("conv2_weight", conv2_weight, two * 9), w.conv2_bias = of("conv2_bias", conv2_bias, two);
  return w;
}

inline NafblockWeights weights_from(const NafblockShape& s, AUTOHDR_NAFBLOCK_PARAMETERS) {
  const int64_t c = s.channels, two = 2 * c;
  NafblockWeights w = first_from(s, norm1_weight, norm1_bias, conv1_weight, conv1_bias, conv2_weight, conv2_bias);
  w.sca_weight = of("sca_weight", sca_weight, c * c), w.sca_bias = of("sca_bias", sca_bias, c);
  w.conv3_weight = of("conv3_weight", conv3_weight, c * c), w.conv3_bias = of("conv3_bias", conv3_bias, c);
  w.beta = of("beta", beta, c);
  w.norm2_weight = of("norm2_weight", norm2_weight, c), w.norm2_bias = of("norm2_bias", norm2_bias, c);
  w.conv4_weight = of("conv4_weight", conv4_weight, two * c), w.conv4_bias = of("conv4_bias", conv4_bias, two);
  w.conv5_weight = of("conv5_weight", conv5_weight, c * c), w.conv5_bias = of("conv5_bias", conv5_bias, c);
  w.gamma = of("gamma", gamma, c);
  return w;
}

template <class Kernels>
std::tuple<Tensor, Tensor, Tensor> nafblock(Tensor x, AUTOHDR_NAFBLOCK_PARAMETERS, double eps, bool keep) {
  const NafblockShape s = shape_from(x, eps);
  const NafblockWeights w = weights_from(s, AUTOHDR_NAFBLOCK_ARGUMENTS);
  Tensor y = new_like("nafblock", x), means = new_float(x, {s.batch, s.channels});
  Tensor kept = new_kept(x, kKeptImages * s.channels, keep);
  Kernels::with_type("nafblock", x, [&](auto zero) {
    using T = decltype(zero);
    Kernels::run(NafblockForward<T>{s, w, read<T>(x), write<float>(means), write_kept<T>(kept), write<T>(y)}, x);
  });
  return {y, means, kept};
}

template <class Kernels>
Tensor nafblock_statistics(Tensor x, Tensor norm1_weight, Tensor norm1_bias, Tensor conv1_weight, Tensor conv1_bias,
                           Tensor conv2_weight, Tensor conv2_bias, double eps, int64_t first, int64_t end) {
  const NafblockShape s = shape_from(x, eps);
  const NafblockWeights w = first_from(s, norm1_weight, norm1_bias, conv1_weight, conv1_bias, conv2_weight, conv2_bias);
  STD_TORCH_CHECK(0 <= first && first < end && end <= s.height,
                  "nafblock_statistics: first and end must be rows of x, which has ", s.height, ", got ", first, " and ", end);
  const std::array<int64_t, 2> size{s.batch, s.channels};
  Tensor sums = torch::stable::new_empty(x, {size.data(), size.size()}, ScalarType::Double);
  Kernels::with_type("nafblock_statistics", x, [&](auto zero) {
    using T = decltype(zero);
    Kernels::run(NafblockStatistics<T>{s, w, read<T>(x), first, end, write<double>(sums)}, x);
  });
  return sums;
}

template <class Kernels>
Tensor nafblock_apply(Tensor x, AUTOHDR_NAFBLOCK_PARAMETERS, Tensor means, double eps) {
  const NafblockShape s = shape_from(x, eps);
  const NafblockWeights w = weights_from(s, AUTOHDR_NAFBLOCK_ARGUMENTS);
  const float* given = parameter("nafblock_apply", "means", means, s.batch * s.channels);
  Tensor y = new_like("nafblock_apply", x);
  Kernels::with_type("nafblock_apply", x, [&](auto zero) {
    using T = decltype(zero);
    Kernels::run(NafblockApply<T>{s, w, read<T>(x), given, write<T>(y)}, x);
  });
  return y;
}

template <size_t... I>
auto tuple_of(const Tensor& dx, const std::array<Tensor, sizeof...(I)>& grads, std::index_sequence<I...>) {
  return std::make_tuple(dx, grads[I]...);
}

template <class Kernels>
auto nafblock_backward(Tensor dy, Tensor x, AUTOHDR_NAFBLOCK_PARAMETERS, Tensor means, Tensor kept, double eps) {
  const NafblockShape s = shape_from(x, eps);
  const NafblockWeights w = weights_from(s, AUTOHDR_NAFBLOCK_ARGUMENTS);
  check_like("nafblock_backward", "dy", dy, x);
  const float* given = parameter("nafblock_backward", "means", means, s.batch * s.channels);
  check_kept("nafblock_backward", "kept", kept, x, kKeptImages * s.channels);
  const auto like = [](const Tensor& t) { return new_like("nafblock_backward", t); };
  Tensor dx = like(x), middle = like(x);
  std::array<Tensor, 18> grads{AUTOHDR_NAFBLOCK_ARGUMENTS};
  for (Tensor& t : grads) t = like(t);
  size_t i = 0;
  const auto next = [&] { return write<float>(grads[i++]); };
  const NafblockTensors<float> d{next(), next(), next(), next(), next(), next(), next(), next(), next(),
                                 next(), next(), next(), next(), next(), next(), next(), next(), next()};
  Kernels::with_type("nafblock_backward", x, [&](auto zero) {
    using T = decltype(zero);
    Kernels::run(NafblockBackward<T>{s, w, read<T>(dy), read<T>(x), given, read_kept<T>(kept), write<T>(middle), write<T>(dx), d},
                 x);
  });
  return tuple_of(dx, grads, std::make_index_sequence<18>());
}

template <class Kernels>
void add_kernels(const Registration& r) {
  r.add<&nafblock<Kernels>>("nafblock");
  r.add<&nafblock_statistics<Kernels>>("nafblock_statistics");
  r.add<&nafblock_apply<Kernels>>("nafblock_apply");
  r.add<&nafblock_backward<Kernels>>("nafblock_backward");
}

}  // namespace
}  // namespace autohdr
