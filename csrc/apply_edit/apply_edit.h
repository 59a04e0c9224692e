// Parameters of apply_edit's kernels. Images are channels-last, in their own dtype; parameters are contiguous float32.
#pragma once
#include <cstdint>

#include "common/stream.h"

namespace autohdr {

struct EditShape {
  int64_t batch, height, width, knots;
  int64_t rows, columns, bins;  // of the grid; 0 without one
};

struct EditParameters {
  const float* curves;  // [batch, 3, knots]
  const float* matrix;  // [batch, 3, 4]
  const float* grid;    // [batch, rows, columns, bins, 3, 4], or null
};

template <class T>
struct EditForward {
  EditShape shape;
  EditParameters parameters;
  const T* x;
  T* y;
};

template <class T>
struct EditBackward {
  EditShape shape;
  EditParameters parameters;
  const T *dy, *x;
  T* dx;
  float *d_curves, *d_matrix, *d_grid;  // as the parameters
};

template <class T>
int64_t queue(const EditForward<T>& a, void* memory, Stream stream);
template <class T>
int64_t queue(const EditBackward<T>& a, void* memory, Stream stream);

}  // namespace autohdr
