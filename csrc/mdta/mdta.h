// Parameters of mdta's kernels. Tensors are contiguous; images are NHWC; everything but x, y, dy, dx is float32.
#pragma once
#include <cstdint>

#include "common/stream.h"

namespace autohdr {

// The least length that q and k are divided by.
constexpr float kLeastLength = 1e-12f;

struct MdtaShape {
  int64_t batch, height, width, channels, heads;
  float eps;
  int64_t head_size() const { return channels / heads; }
  bool one_pixel() const { return height * width == 1; }
};

struct MdtaWeights {
  const float* norm_weight;  // [C]
  const float* norm_bias;    // [C], or null: the bias-free norm
  const float* qkv;          // [3C, C]
  const float* dwconv;       // [3C, 3, 3]
  const float* temperature;  // [heads]
  const float* project_out;  // [C, C]
};

// For the 1×1 convolutions in 8 bits. What the norm gives is codes already, by its weight and bias, and so is v, by its 3×3 weights.
struct MdtaInt8Weights {
  const float* norm_weight;  // [C]
  const float* norm_bias;    // [C], or null
  const int8_t* qkv;         // [3C, C], from -127 to 127
  const float* qkv_scale;    // [3C]
  const float* dwconv;       // [3C, 3, 3]
  const float* temperature;  // [heads]
  const float* project_out;  // [C, C]
  const float* v_scale;      // [C], what a code of v stands for
};

// What the attention of every image is made of.
struct MdtaAttention {
  const float* gram;             // [B, heads, C/heads, C/heads], q kᵀ summed over the pixels
  const float *q_norm, *k_norm;  // [B, C], lengths along the pixels
};

template <class T, class Weights = MdtaWeights>
struct MdtaForward {
  MdtaShape shape;
  Weights weights;
  const T* x;                     // [B, H, W, C]
  float *gram, *q_norm, *k_norm;  // as in MdtaAttention
  T* y;                           // [B, H, W, C]
};

template <class T, class Weights = MdtaWeights>
struct MdtaStatistics {
  MdtaShape shape;
  Weights weights;
  const T* x;          // [B, H, W, C]
  int64_t first, end;  // rows that are summed; the others are neighbours of the first and the last
  double* gram;        // [B, heads, C/heads, C/heads]
  double* q_square;    // [B, C], sum of squares over the pixels
  double* k_square;    // [B, C]
};

template <class T, class Weights = MdtaWeights>
struct MdtaApply {
  MdtaShape shape;
  Weights weights;
  const T* x;  // [B, H, W, C]
  MdtaAttention attention;
  T* y;  // [B, H, W, C]
};

template <class T>
struct MdtaBackward {
  MdtaShape shape;
  MdtaWeights weights;
  const T *dy, *x;                                          // [B, H, W, C]
  MdtaAttention attention;                                  // as the forward pass left it
  T* dx;                                                    // [B, H, W, C]
  float *d_norm_weight, *d_norm_bias;                       // [C]; the bias's unused without one
  float *d_qkv, *d_dwconv, *d_temperature, *d_project_out;  // as the weights
};

template <class T>
int64_t queue(const MdtaForward<T>& a, void* memory, Stream stream);
template <class T>
int64_t queue(const MdtaStatistics<T>& a, void* memory, Stream stream);
template <class T>
int64_t queue(const MdtaApply<T>& a, void* memory, Stream stream);
template <class T>
int64_t queue(const MdtaBackward<T>& a, void* memory, Stream stream);

}  // namespace autohdr
