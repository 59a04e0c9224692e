// apply_edit's checks and allocation, the same on every device. Kernels::with_type(op, x, f) calls f(zero of x's element type);
// Kernels::run(parameters, x) runs them where x is.
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

template <class Kernels>
Tensor apply_edit(Tensor x, Tensor curves, Tensor matrix, std::optional<Tensor> grid) {
  const EditShape s = edit_shape(x, curves, grid);
  const EditParameters parameters = edit_parameters(s, curves, matrix, grid);
  Tensor y = new_like("apply_edit", x);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    Kernels::run(EditForward<T>{s, parameters, read<T>(x), write<T>(y)}, x);
  };
  switch (x.scalar_type()) {
    case ScalarType::Byte: run(uint8_t{}); break;
    case ScalarType::UInt16: run(uint16_t{}); break;
    default: Kernels::with_type("apply_edit", x, run);
  }
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
  Kernels::with_type("apply_edit_backward", x, [&](auto zero) {
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
