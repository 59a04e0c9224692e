// Checks on the tensors an op is called with. Errors name op, argument, expected and actual.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <string>

#include "common/cpu_isa.h"

namespace autohdr {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& t) {
  std::string s = "[";
  for (int64_t i = 0; i < t.dim(); ++i) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + "]";
}

// A tensor's elements, of the kernels' own types.
template <class T>
const T* read(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
T* write(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// A contiguous float32 parameter with `numel` elements.
inline const float* parameter(const char* op, const char* name, const Tensor& t, int64_t numel) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.numel() == numel, op, ": ", name,
                  " must be contiguous float32 with ", numel, " elements, got shape ", shape_of(t));
  return t.const_data_ptr<float>();
}

inline const float* parameter(const char* op, const char* name, const std::optional<Tensor>& t, int64_t numel) {
  return t ? parameter(op, name, *t, numel) : nullptr;
}

// Weights of 8 bits, contiguous, with `numel` elements.
inline const int8_t* codes(const char* op, const char* name, const Tensor& t, int64_t numel) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Char && t.is_contiguous() && t.numel() == numel, op, ": ", name,
                  " must be contiguous int8 with ", numel, " elements, got shape ", shape_of(t));
  return t.const_data_ptr<int8_t>();
}

// An image [B, C, H, W] that lies in memory as [B, H, W, C].
inline void check_image(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 4, op, ": ", name, " must be [batch, channels, height, width], got ", shape_of(t));
  if (t.numel() == 0) return;  // nothing lies in memory
  int64_t expected = 1;
  for (int64_t d : {1, 3, 2, 0}) {
    STD_TORCH_CHECK(t.size(d) <= 1 || t.stride(d) == expected, op, ": ", name,
                    " must be contiguous in channels_last, got stride ", t.stride(d), " instead of ", expected, " in dimension ",
                    d, " of ", shape_of(t));
    expected *= t.size(d);
  }
}

inline void check_like(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  check_image(op, name, t);
  bool same = t.scalar_type() == x.scalar_type();
  for (int64_t d = 0; d < 4; ++d) same = same && t.size(d) == x.size(d);
  STD_TORCH_CHECK(same, op, ": ", name, " must have the shape and dtype of x, ", shape_of(x), ", got ", shape_of(t));
}

// A tensor like `like`. All that can fail is the allocation, whose own message is lost on the way through the stable ABI.
inline Tensor new_like(const char* op, const Tensor& like) {
  try {
    return torch::stable::empty_like(like);
  } catch (const std::exception&) {
    STD_TORCH_CHECK(false, op, ": cannot allocate ", like.numel() * static_cast<int64_t>(like.element_size()), " bytes");
  }
}

// run(zero of x's element type), for the types that an image has on a CPU.
template <class F>
void with_image_type(const char* op, const Tensor& x, const F& run) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return run(float{});
    case ScalarType::BFloat16: return run(bf16{});
    default: STD_TORCH_CHECK(false, op, ": the CPU kernel takes float32 or bfloat16");
  }
}

inline Tensor new_float(const Tensor& like, std::initializer_list<int64_t> size) {
  return torch::stable::new_empty(like, {size.begin(), size.size()}, ScalarType::Float);
}

// Images without a pixel or a channel are refused by the public functions; here they would divide by zero.
inline void check_sizes(const char* op, std::initializer_list<int64_t> sizes) {
  for (int64_t s : sizes) STD_TORCH_CHECK(s > 0, op, ": height, width and channels must be above 0, got ", s);
}

}  // namespace autohdr
