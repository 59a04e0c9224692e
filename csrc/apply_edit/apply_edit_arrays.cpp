// The pybind11 module autohdr._C_arrays: apply_edit forward for NumPy's arrays, so that a photo's edit needs no PyTorch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "apply_edit/apply_edit.h"

#define AUTOHDR_WITHOUT_TORCH
#define AUTOHDR_BODY "apply_edit/apply_edit_cpu_kernel.h"
#include "common/cpu_each_isa.h"

namespace {

namespace py = pybind11;

void check(const py::array& array, const char* name, bool right, const char* expected) {
  if (!right || !(array.flags() & py::array::c_style))
    throw std::invalid_argument(std::string("apply_edit: ") + name + " must be a contiguous " + expected);
}

template <class T>
py::array run(const autohdr::EditShape& shape, const autohdr::EditParameters& parameters, const py::array& x, int64_t threads) {
  py::array_t<T> y({shape.batch, shape.height, shape.width, int64_t{3}});
  const autohdr::EditForward<T> forward{shape, parameters, static_cast<const T*>(x.data()), y.mutable_data()};
  const auto call = [&] { AUTOHDR_CALL(run, forward); };
  {
    const py::gil_scoped_release released;
    autohdr::threads_of_call = threads;
    call();
  }
  return y;
}

py::array apply_edit(const py::array& x, const py::array& curves, const py::array& matrix, int64_t threads) {
  const bool image = x.ndim() == 4 && x.shape(3) == 3;
  const bool floats = py::isinstance<py::array_t<float>>(curves) && py::isinstance<py::array_t<float>>(matrix);
  check(x, "x", image, "[batch, height, width, 3]");
  check(curves, "curves",
        floats && curves.ndim() == 3 && curves.shape(0) == x.shape(0) && curves.shape(1) == 3 && curves.shape(2) >= 2,
        "float32 [batch, 3, knots >= 2]");
  check(matrix, "matrix",
        floats && matrix.ndim() == 3 && matrix.shape(0) == x.shape(0) && matrix.shape(1) == 3 && matrix.shape(2) == 4,
        "float32 [batch, 3, 4]");
  const autohdr::EditShape shape{x.shape(0), x.shape(1), x.shape(2), curves.shape(2), 0, 0, 0};
  const autohdr::EditParameters parameters{static_cast<const float*>(curves.data()), static_cast<const float*>(matrix.data()),
                                           nullptr};
  if (py::isinstance<py::array_t<uint8_t>>(x)) return run<uint8_t>(shape, parameters, x, threads);
  if (py::isinstance<py::array_t<uint16_t>>(x)) return run<uint16_t>(shape, parameters, x, threads);
  if (py::isinstance<py::array_t<float>>(x)) return run<float>(shape, parameters, x, threads);
  throw std::invalid_argument("apply_edit: x must be float32, uint8 or uint16");
}

}  // namespace

PYBIND11_MODULE(_C_arrays, m) {
  m.doc() = "autohdr's compiled kernels for NumPy's arrays";
  m.def("apply_edit", &apply_edit, "kernels.apply_edit without a grid, of x [batch, height, width, 3] float32, uint8 or uint16.");
  m.def("poison_scratch", &autohdr::Scratch::poison, "As in autohdr._C.");
  m.def("use_cpu_isa", &autohdr::use_isa, "As in autohdr._C.");
}
