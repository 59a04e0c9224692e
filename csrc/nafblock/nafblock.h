// Parameters of nafblock's kernels. Tensors are contiguous; images are NHWC; everything but x, y, dy, dx is float32.
#pragma once
#include <cstdint>

#include "common/stream.h"

namespace autohdr {

struct NafblockShape {
  int64_t batch, height, width, channels;
  float eps;
};

// F: const float for the weights, float for their gradients.
template <class F>
struct NafblockTensors {
  F *norm1_weight, *norm1_bias;  // [C]
  F *conv1_weight, *conv1_bias;  // [2C, C], [2C]
  F *conv2_weight, *conv2_bias;  // [2C, 3, 3], [2C]
  F *sca_weight, *sca_bias;      // [C, C], [C]
  F *conv3_weight, *conv3_bias;  // [C, C], [C]
  F* beta;                       // [C]
  F *norm2_weight, *norm2_bias;  // [C]
  F *conv4_weight, *conv4_bias;  // [2C, C], [2C]
  F *conv5_weight, *conv5_bias;  // [C, C], [C]
  F* gamma;                      // [C]
};
using NafblockWeights = NafblockTensors<const float>;

// Images that the forward pass may keep (common/kept.h): both sides of the 3×3 convolution, 2C and, gated, C channels; C between
// the halves of the block; and 2C before the second gate.
constexpr int64_t kKeptImages = 6;

template <class T>
struct NafblockForward {
  NafblockShape shape;
  NafblockWeights weights;
  const T* x;    // [B, H, W, C]
  float* means;  // [B, C], of the first gate over the pixels
  T* kept;       // kKeptImages·[B, H, W, C] for the backward pass, or null
  T* y;          // [B, H, W, C]
};

template <class T>
struct NafblockStatistics {
  NafblockShape shape;
  NafblockWeights weights;
  const T* x;          // [B, H, W, C]
  int64_t first, end;  // rows that are summed; the others are neighbours of the first and the last
  double* sums;        // [B, C], of the first gate over the pixels
};

template <class T>
struct NafblockApply {
  NafblockShape shape;
  NafblockWeights weights;
  const T* x;          // [B, H, W, C]
  const float* means;  // [B, C]
  T* y;                // [B, H, W, C]
};

template <class T>
struct NafblockBackward {
  NafblockShape shape;
  NafblockWeights weights;
  const T *dy, *x;     // [B, H, W, C]
  const float* means;  // [B, C], as the forward pass left them
  const T* kept;       // as the forward pass left them, or null
  T* middle;           // [B, H, W, C], for the gradient between both halves of the block
  T* dx;               // [B, H, W, C]
  NafblockTensors<float> grads;
};

template <class T>
int64_t queue(const NafblockForward<T>& a, void* memory, Stream stream);
template <class T>
int64_t queue(const NafblockStatistics<T>& a, void* memory, Stream stream);
template <class T>
int64_t queue(const NafblockApply<T>& a, void* memory, Stream stream);
template <class T>
int64_t queue(const NafblockBackward<T>& a, void* memory, Stream stream);

}  // namespace autohdr
