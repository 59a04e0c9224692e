// Checks on the sequences an op is called with, and their allocation.
#pragma once
#include "common/sequence.h"
#include "common/tensor_check.h"

namespace autohdr {

inline Dtype dtype_of(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: STD_TORCH_CHECK(false, op, ": the compiled kernels take ", name, " in float32, bfloat16 or float16");
  }
}

// A tensor [batch, dim, seqlen], or [batch, seqlen, dim] where channel_last, in groups of group_channels.
inline Sequence sequence_from(const char* op, const char* name, const Tensor& t, bool channel_last, int64_t batch, int64_t seqlen,
                              int64_t dim, int64_t group_channels) {
  const int64_t channel = channel_last ? 2 : 1, token = channel_last ? 1 : 2;
  STD_TORCH_CHECK(t.dim() == 3 && t.size(0) == batch && t.size(channel) == dim && t.size(token) == seqlen, op, ": ", name,
                  " must have ", batch, " sequences of ", seqlen, " tokens and ", dim, " channels, got ", shape_of(t));
  STD_TORCH_CHECK(batch == 0 || t.stride(channel) == 1 || t.stride(token) == 1, op, ": ", name,
                  " must have its channels or its tokens one element apart, got strides ", t.stride(0), ", ", t.stride(1), ", ",
                  t.stride(2));
  return {const_cast<void*>(t.const_data_ptr()), dtype_of(op, name, t), t.stride(0),
          t.stride(channel) * group_channels,    t.stride(channel),     t.stride(token)};
}

inline Tensor contiguous_like(const Tensor& t) { return torch::stable::new_empty(t, t.sizes()); }

}  // namespace autohdr
