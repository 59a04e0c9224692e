// Parameters of causal_conv1d's kernels. Sequences keep their dtype and strides, but neighbours along the last axis are one element
// apart; parameters are contiguous float32.
#pragma once
#include "common/sequence.h"
#include "common/stream.h"

namespace autohdr {

struct ConvShape {
  int64_t batch, seqlen, dim, width;
  bool reverse, channel_last;
  // Tokens before and after a token that its output reads.
  AUTOHDR_ANYWHERE int64_t before() const { return reverse ? 0 : width - 1; }
  AUTOHDR_ANYWHERE int64_t after() const { return reverse ? width - 1 : 0; }
  // The tap of the j-th token from the first that is read.
  AUTOHDR_ANYWHERE int64_t tap(int64_t j) const { return reverse ? width - 1 - j : j; }
};

struct ConvForward {
  ConvShape shape;
  Sequence x;
  const float* weight;  // [dim, width]
  const float* bias;    // [dim], or null
  Sequence y;
};

struct ConvBackward {
  ConvShape shape;
  Sequence x;
  const float *weight, *bias;
  Sequence dy, dx;
  float *d_weight, *d_bias;  // as the parameters; the bias's unused without one
};

int64_t queue(const ConvForward& a, void* memory, Stream stream);
int64_t queue(const ConvBackward& a, void* memory, Stream stream);

}  // namespace autohdr
