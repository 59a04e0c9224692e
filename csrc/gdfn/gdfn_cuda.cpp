// gdfn's CUDA kernels and their registration.
#include "common/cuda_host.h"
#include "gdfn/gdfn_cuda.h"
#include "gdfn/gdfn_host.h"

namespace autohdr {
namespace {

struct CudaKernels {
  template <class F>
  static void with_type(const char* op, const Tensor& x, const F& f) {
    with_cuda_type(op, x, f);
  }
  template <class T>
  static void run(const GdfnForward<T>& a, const Tensor& x) {
    run_with_memory(x, [&](void* memory, cudaStream_t stream) { return gdfn_forward_cuda(a, memory, stream); });
  }
  template <class T>
  static void run(const GdfnBackward<T>& a, const Tensor& x) {
    run_with_memory(x, [&](void* memory, cudaStream_t stream) { return gdfn_backward_cuda(a, memory, stream); });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(autohdr, AUTOHDR_CUDA_KEY, m) {
  m.impl("gdfn", TORCH_BOX(&gdfn<CudaKernels>));
  m.impl("gdfn_backward", TORCH_BOX(&gdfn_backward<CudaKernels>));
}

}  // namespace autohdr
