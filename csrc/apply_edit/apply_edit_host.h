// apply_edit's checks and allocation, the same on every device. Kernels::run(parameters, x) runs them where x is.
#pragma once
#include <optional>
#include <tuple>

#include "apply_edit/apply_edit.h"
#include "common/registration.h"
#include "common/tensor_check.h"

namespace autohdr {
namespace {

inline EditShape edit_shape(const Tensor& x, const Tensor& curves, const std::optional<Tensor>& grid) {
  check_image("apply_edit", "x", x);
  STD_TORCH_CHECK(
      x.size(1) == 3 && curves.dim() == 3 && curves.size(2) >= 2 && (!grid || grid->dim() == 6),
      "apply_edit: expected x [batch, 3, height, width], curves [batch, 3, knots >= 2] and grid [batch, rows, columns, "
      "bins, 3, 4], got ",
      shape_of(x), ", ", shape_of(curves), ", ", grid ? shape_of(*grid) : "no grid");
  check_sizes("apply_edit", {x.size(2), x.size(3)});
  EditShape s{x.size(0), x.size(2), x.size(3), curves.size(2), 0, 0, 0};
  if (grid) {
    check_sizes("apply_edit", {grid->size(1), grid->size(2), grid->size(3)});
    s.rows = grid->size(1), s.columns = grid->size(2), s.bins = grid->size(3);
  }
  return s;
}

inline EditParameters edit_parameters(const EditShape& s, const Tensor& curves, const Tensor& matrix,
                                      const std::optional<Tensor>& grid) {
  return {parameter("apply_edit", "curves", curves, s.batch * 3 * s.knots),
          parameter("apply_edit", "matrix", matrix, s.batch * 12),
          parameter("apply_edit", "grid", grid, s.batch * s.rows * s.columns * s.bins * 12)};
}

// run(zero of x's element type): with integers, for a photo's own samples, in the forward pass.
template <bool Integers, class F>
void with_sample_type(const Tensor& x, const F& run) {
  if constexpr (Integers) {
    if (x.scalar_type() == ScalarType::Byte) return run(uint8_t{});
    if (x.scalar_type() == ScalarType::UInt16) return run(uint16_t{});
  }
  if (x.scalar_type() == ScalarType::Float) return run(float{});
  if (x.scalar_type() == ScalarType::BFloat16) return run(bf16{});
  STD_TORCH_CHECK(false, "apply_edit: the CPU kernel takes float32 or bfloat16, and uint8 or uint16 in the forward pass");
}

template <class Kernels>
Tensor apply_edit(Tensor x, Tensor curves, Tensor matrix, std::optional<Tensor> grid) {
  const EditShape s = edit_shape(x, curves, grid);
  const EditParameters parameters = edit_parameters(s, curves, matrix, grid);
  Tensor y = new_like("apply_edit", x);
  with_sample_type<true>(x, [&](auto zero) {
    using T = decltype(zero);
    Kernels::run(EditForward<T>{s, parameters, read<T>(x), write<T>(y)}, x);
  });
  return y;
}

template <class Kernels>
std::tuple<Tensor, Tensor, Tensor, Tensor> apply_edit_backward(Tensor dy, Tensor x, Tensor curves, Tensor matrix,
                                                               std::optional<Tensor> grid) {
  const EditShape s = edit_shape(x, curves, grid);
  const EditParameters parameters = edit_parameters(s, curves, matrix, grid);
  check_like("apply_edit_backward", "dy", dy, x);
  const auto like = [](const Tensor& t) { return new_like("apply_edit_backward", t); };
  Tensor dx = like(x), d_curves = like(curves), d_matrix = like(matrix), d_grid = grid ? like(*grid) : new_float(x, {0});
  with_sample_type<false>(x, [&](auto zero) {
    using T = decltype(zero);
    Kernels::run(EditBackward<T>{s, parameters, read<T>(dy), read<T>(x), write<T>(dx), write<float>(d_curves),
                                 write<float>(d_matrix), write<float>(d_grid)},
                 x);
  });
  return {dx, d_curves, d_matrix, d_grid};
}

template <class Kernels>
void add_kernels(const Registration& r) {
  r.add<&apply_edit<Kernels>>("apply_edit");
  r.add<&apply_edit_backward<Kernels>>("apply_edit_backward");
}

}  // namespace
}  // namespace autohdr
