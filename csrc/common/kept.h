// What an op's forward pass keeps for its backward pass beside x. On a CPU, of many channels, it keeps hidden ones, which the
// backward pass computes again otherwise: a number spares as many multiply-adds as x has channels, and such images are small.
#pragma once
#include "common/tensor_check.h"

namespace autohdr {

constexpr int64_t kWide = 256;  // WIDE in autohdr/kernels/common.py

// Memory for `channels` numbers a pixel of x, or an empty tensor where nothing is kept.
inline Tensor new_kept(const Tensor& x, int64_t channels, bool keep) {
  const int64_t count = keep && x.size(1) >= kWide && x.is_cpu() ? x.size(0) * x.size(2) * x.size(3) * channels : 0;
  return torch::stable::new_empty(x, {&count, 1});
}

// Its elements, or null.
template <class T>
T* write_kept(const Tensor& kept) {
  return kept.numel() ? write<T>(kept) : nullptr;
}

template <class T>
const T* read_kept(const Tensor& kept) {
  return kept.numel() ? read<T>(kept) : nullptr;
}

inline void check_kept(const char* op, const char* name, const Tensor& kept, const Tensor& x, int64_t channels) {
  const int64_t count = x.size(0) * x.size(2) * x.size(3) * channels;
  STD_TORCH_CHECK(kept.scalar_type() == x.scalar_type() && kept.is_contiguous() && (kept.numel() == 0 || kept.numel() == count),
                  op, ": ", name, " must be contiguous and of x's dtype, with ", count, " elements or none, got shape ",
                  shape_of(kept));
}

}  // namespace autohdr
