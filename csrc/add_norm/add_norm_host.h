// add_norm's checks and allocation, the same on every device. Kernels::run(parameters, x) runs them where x is.
#pragma once
#include <optional>
#include <tuple>

#include "add_norm/add_norm.h"
#include "common/registration.h"
#include "common/sequence_check.h"

namespace autohdr {
namespace {

constexpr const char* kOp = "add_norm";

struct AddNormArguments {
  int64_t rows, channels;
  AddNormWeights weights;

  AddNormArguments(const Tensor& x, const Tensor& scale, const Tensor& norm_weight, const Tensor& norm_bias, double eps) {
    STD_TORCH_CHECK(x.dim() > 0 && x.size(x.dim() - 1) > 0, kOp, ": x must have channels, got ", shape_of(x));
    channels = x.size(x.dim() - 1), rows = x.numel() / channels;
    weights = {parameter(kOp, "scale", scale, channels), parameter(kOp, "norm_weight", norm_weight, channels),
               parameter(kOp, "norm_bias", norm_bias, channels), static_cast<float>(eps)};
  }
  Rows of(const char* name, const Tensor& t) const {
    STD_TORCH_CHECK(t.numel() == rows * channels && t.is_contiguous(), kOp, ": ", name, " must be contiguous with ", rows,
                    " rows of ", channels, " channels, got ", shape_of(t));
    return {const_cast<void*>(t.const_data_ptr()), dtype_of(kOp, name, t)};
  }
  // The gradient of an output, whose dtype is that of x or of branch: `like`.
  Rows gradient(const char* name, const Tensor& t, const Tensor& like) const {
    STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), kOp, ": ", name, " must have the dtype of its output");
    return of(name, t);
  }
};

// The branch has x's dtype, unless that is float32.
Rows branch_of(const AddNormArguments& a, const Tensor& x, const Tensor& branch) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == branch.scalar_type(), kOp,
                  ": branch must have the dtype of x, or x be float32");
  return a.of("branch", branch);
}

template <class Kernels>
std::tuple<Tensor, Tensor> add_norm(Tensor x, Tensor branch, Tensor scale, Tensor norm_weight, Tensor norm_bias, double eps) {
  const AddNormArguments a(x, scale, norm_weight, norm_bias, eps);
  Tensor y = contiguous_like(x), normed = contiguous_like(branch);
  Kernels::run(AddNormForward{a.rows, a.channels, a.of("x", x), branch_of(a, x, branch), a.weights, a.of("y", y),
                              a.of("normed", normed)},
               x);
  return {y, normed};
}

template <class Kernels>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> add_norm_backward(Tensor dy, std::optional<Tensor> d_normed, Tensor x,
                                                                     Tensor branch, Tensor scale, Tensor norm_weight,
                                                                     Tensor norm_bias, double eps) {
  const AddNormArguments a(x, scale, norm_weight, norm_bias, eps);
  Tensor dx = contiguous_like(x), d_branch = contiguous_like(branch), d_scale = contiguous_like(scale),
         d_norm_weight = contiguous_like(norm_weight), d_norm_bias = contiguous_like(norm_bias);
  Kernels::run(AddNormBackward{a.rows, a.channels, a.of("x", x), branch_of(a, x, branch), a.weights, a.gradient("dy", dy, x),
                               d_normed ? a.gradient("d_normed", *d_normed, branch) : Rows{}, a.of("dx", dx),
                               a.of("d_branch", d_branch), write<float>(d_scale), write<float>(d_norm_weight),
                               write<float>(d_norm_bias)},
               x);
  return {dx, d_branch, d_scale, d_norm_weight, d_norm_bias};
}

template <class Kernels>
void add_kernels(const Registration& r) {
  r.add<&add_norm<Kernels>>("add_norm");
  r.add<&add_norm_backward<Kernels>>("add_norm_backward");
}

}  // namespace
}  // namespace autohdr
