#include "common/cuda_tf32.h"

#include <cstdint>
#include <optional>

// PyTorch's stable ABI does not tell the setting, but makes it the mode of the cuBLAS handle that it gives. Weak: a torch without CUDA
// has neither, and one with cuBLAS inside of it not the second.
extern "C" {
__attribute__((weak)) int32_t torch_get_current_cuda_blas_handle(void** handle);
__attribute__((weak)) int cublasGetMathMode(void* handle, int* mode);
}

namespace autohdr {

namespace {
thread_local std::optional<bool> answer;

bool ask() {
  constexpr int kTf32 = 3;  // CUBLAS_TF32_TENSOR_OP_MATH
  if (!torch_get_current_cuda_blas_handle || !cublasGetMathMode) return false;
  void* handle = nullptr;
  int mode = 0;
  return torch_get_current_cuda_blas_handle(&handle) == 0 && cublasGetMathMode(handle, &mode) == 0 && mode == kTf32;
}
}  // namespace

bool tf32_allowed() {
  if (!answer) answer = ask();
  return *answer;
}
void forget_tf32_allowed() { answer.reset(); }

}  // namespace autohdr
