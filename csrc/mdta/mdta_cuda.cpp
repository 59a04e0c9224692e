// mdta's CUDA kernels and their registration.
#include "common/cuda_host.h"
#include "mdta/mdta_cuda.h"
#include "mdta/mdta_host.h"

namespace autohdr {
namespace {

struct CudaKernels {
  template <class F>
  static void with_type(const char* op, const Tensor& x, const F& f) {
    with_cuda_type(op, x, f);
  }
  template <class T>
  static void run(const MdtaForward<T>& a, const Tensor& x) {
    run_with_memory(x, [&](void* memory, cudaStream_t stream) { return mdta_forward_cuda(a, memory, stream); });
  }
  template <class T>
  static void run(const MdtaStatistics<T>& a, const Tensor& x) {
    run_with_memory(x, [&](void* memory, cudaStream_t stream) { return mdta_statistics_cuda(a, memory, stream); });
  }
  template <class T>
  static void run(const MdtaApply<T>& a, const Tensor& x) {
    run_with_memory(x, [&](void* memory, cudaStream_t stream) { return mdta_apply_cuda(a, memory, stream); });
  }
  template <class T>
  static void run(const MdtaBackward<T>& a, const Tensor& x) {
    run_with_memory(x, [&](void* memory, cudaStream_t stream) { return mdta_backward_cuda(a, memory, stream); });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(autohdr, AUTOHDR_CUDA_KEY, m) {
  m.impl("mdta", TORCH_BOX(&mdta<CudaKernels>));
  m.impl("mdta_statistics", TORCH_BOX(&mdta_statistics<CudaKernels>));
  m.impl("mdta_apply", TORCH_BOX(&mdta_apply<CudaKernels>));
  m.impl("mdta_backward", TORCH_BOX(&mdta_backward<CudaKernels>));
}

}  // namespace autohdr
