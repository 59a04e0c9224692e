// Parameters of gdfn's kernels. Tensors are contiguous; images are NHWC; everything but x, y, dy, dx is float32.
#pragma once
#include <cstdint>

#include "common/stream.h"

namespace autohdr {

struct GdfnShape {
  int64_t batch, height, width, channels, hidden;
  float eps;
};

struct GdfnWeights {
  const float* norm_weight;  // [C]
  const float* norm_bias;    // [C], or null: the bias-free norm
  const float* project_in;   // [2·hidden, C]
  const float* dwconv;       // [2·hidden, 3, 3]
  const float* project_out;  // [C, hidden]
};

template <class T>
struct GdfnForward {
  GdfnShape shape;
  GdfnWeights weights;
  const T* x;  // [B, H, W, C]
  T* kept;     // [B, H, W, 2·hidden], before the 3×3 convolution, for the backward pass, or null
  T* y;        // [B, H, W, C]
};

// For the 1×1 convolutions in 8 bits. What the norm and the gate give are codes already: by the norm's weight and bias, and by the
// 3×3 weights of the gate's second half.
struct GdfnInt8Weights {
  const float* norm_weight;        // [C]
  const float* norm_bias;          // [C], or null
  const int8_t* project_in;        // [2·hidden, C], from -127 to 127
  const float* project_in_scale;   // [2·hidden]
  const float* dwconv;             // [2·hidden, 3, 3]
  const int8_t* project_out;       // [C, hidden]
  const float* project_out_scale;  // [C]
};

template <class T>
struct GdfnInt8Forward {
  GdfnShape shape;
  GdfnInt8Weights weights;
  const T* x;  // [B, H, W, C]
  T* y;        // [B, H, W, C]
};

template <class T>
struct GdfnBackward {
  GdfnShape shape;
  GdfnWeights weights;
  const T *dy, *x;                                 // [B, H, W, C]
  const T* kept;                                   // as the forward pass left it, or null
  T* dx;                                           // [B, H, W, C]
  float *d_norm_weight, *d_norm_bias;              // [C]; the bias's unused without one
  float *d_project_in, *d_dwconv, *d_project_out;  // as the weights
};

template <class T>
int64_t queue(const GdfnForward<T>& a, void* memory, Stream stream);
template <class T>
int64_t queue(const GdfnBackward<T>& a, void* memory, Stream stream);

}  // namespace autohdr
