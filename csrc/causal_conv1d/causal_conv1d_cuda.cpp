// causal_conv1d's CUDA kernels and their registration.
#include "causal_conv1d/causal_conv1d_cuda.h"

#include "causal_conv1d/causal_conv1d_host.h"
#include "common/cuda_host.h"

namespace autohdr {
namespace {

struct CudaKernels {
  static void run(const ConvForward& a, const Tensor& x) {
    run_with_memory(x, [&](void* memory, cudaStream_t stream) { return causal_conv1d_forward_cuda(a, memory, stream); });
  }
  static void run(const ConvBackward& a, const Tensor& x) {
    run_with_memory(x, [&](void* memory, cudaStream_t stream) { return causal_conv1d_backward_cuda(a, memory, stream); });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(autohdr, AUTOHDR_CUDA_KEY, m) {
  m.impl("causal_conv1d", TORCH_BOX(&causal_conv1d<CudaKernels>));
  m.impl("causal_conv1d_backward", TORCH_BOX(&causal_conv1d_backward<CudaKernels>));
}

}  // namespace autohdr
