// Parameters of add_norm's kernels. Rows are contiguous, each tensor in a dtype of its own; parameters are contiguous float32.
#pragma once
#include "common/sequence.h"
#include "common/stream.h"

namespace autohdr {

struct Rows {
  void* data;  // null: there are none
  Dtype dtype;
};

struct AddNormWeights {
  const float *scale, *norm_weight, *norm_bias;  // each [channels]
  float eps;
};

struct AddNormForward {
  int64_t rows, channels;
  Rows x, branch;
  AddNormWeights weights;
  Rows y, normed;
};

struct AddNormBackward {
  int64_t rows, channels;
  Rows x, branch;
  AddNormWeights weights;
  Rows dy, d_normed;  // d_normed: or none, then it is zero
  Rows dx, d_branch;
  float *d_scale, *d_norm_weight, *d_norm_bias;
};

int64_t queue(const AddNormForward& a, void* memory, Stream stream);
int64_t queue(const AddNormBackward& a, void* memory, Stream stream);

}  // namespace autohdr
