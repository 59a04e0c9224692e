// causal_conv1d's checks and allocation, the same on every device. Kernels::run(parameters, x) runs them where x is.
#pragma once
#include <optional>
#include <tuple>

#include "causal_conv1d/causal_conv1d.h"
#include "common/registration.h"
#include "common/sequence_check.h"

namespace autohdr {
namespace {

constexpr const char* kOp = "causal_conv1d";

struct ConvArguments {
  const Tensor &x, &weight;
  const std::optional<Tensor>& bias;
  ConvShape shape;

  ConvArguments(const Tensor& x_, const Tensor& weight_, const std::optional<Tensor>& bias_, bool reverse, bool channel_last)
      : x(x_), weight(weight_), bias(bias_) {
    STD_TORCH_CHECK(x.dim() == 3 && weight.dim() == 2 && x.size(1) > 0 && x.size(2) > 0 && weight.size(1) > 0, kOp,
                    ": x must have 3 dimensions, weight 2, and neither be empty, got ", shape_of(x), ", ", shape_of(weight));
    shape = {x.size(0), x.size(channel_last ? 1 : 2), x.size(channel_last ? 2 : 1), weight.size(1), reverse, channel_last};
  }
  Sequence sequence(const char* name, const Tensor& t) const {
    const ConvShape& s = shape;
    STD_TORCH_CHECK(t.dim() == 3 && (t.numel() == 0 || t.size(2) == 1 || t.stride(2) == 1), kOp, ": ", name,
                    " must have 3 dimensions and a contiguous last axis, got ", shape_of(t));
    return sequence_from(kOp, name, t, s.channel_last, s.batch, s.seqlen, s.dim, s.dim);
  }
  const float* taps() const { return parameter(kOp, "weight", weight, shape.dim * shape.width); }
  const float* shift() const { return parameter(kOp, "bias", bias, shape.dim); }
};

template <class Kernels>
Tensor causal_conv1d(Tensor x, Tensor weight, std::optional<Tensor> bias, bool reverse, bool channel_last) {
  const ConvArguments a(x, weight, bias, reverse, channel_last);
  Tensor y = contiguous_like(x);
  Kernels::run(ConvForward{a.shape, a.sequence("x", x), a.taps(), a.shift(), a.sequence("y", y)}, x);
  return y;
}

template <class Kernels>
std::tuple<Tensor, Tensor, Tensor> causal_conv1d_backward(Tensor dy, Tensor x, Tensor weight, std::optional<Tensor> bias,
                                                          bool reverse, bool channel_last) {
  const ConvArguments a(x, weight, bias, reverse, channel_last);
  STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type(), kOp, ": dy must have the dtype of x");
  Tensor dx = contiguous_like(x), d_weight = contiguous_like(weight), d_bias = bias ? contiguous_like(*bias) : new_float(x, {0});
  Kernels::run(ConvBackward{a.shape, a.sequence("x", x), a.taps(), a.shift(), a.sequence("dy", dy), a.sequence("dx", dx),
                            write<float>(d_weight), bias ? write<float>(d_bias) : nullptr},
               x);
  return {dx, d_weight, d_bias};
}

template <class Kernels>
void add_kernels(const Registration& r) {
  r.add<&causal_conv1d<Kernels>>("causal_conv1d");
  r.add<&causal_conv1d_backward<Kernels>>("causal_conv1d_backward");
}

}  // namespace
}  // namespace autohdr
