// selective_scan's CUDA kernels and their registration.
#include "selective_scan/selective_scan_cuda.h"

#include "common/cuda_host.h"
#include "selective_scan/selective_scan_host.h"

namespace autohdr {
namespace {

struct CudaKernels {
  static void run(const ScanForward& a, const Tensor& u) {
    if (a.shape.batch * a.shape.dim() == 0) return;
    run_with_memory(u, [&](void* memory, cudaStream_t stream) { return selective_scan_forward_cuda(a, memory, stream); });
  }
  static void run(const ScanBackward& a, const Tensor& u) {
    run_with_memory(u, [&](void* memory, cudaStream_t stream) { return selective_scan_backward_cuda(a, memory, stream); });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(autohdr, AUTOHDR_CUDA_KEY, m) {
  m.impl("selective_scan", TORCH_BOX(&selective_scan<CudaKernels>));
  m.impl("selective_scan_backward", TORCH_BOX(&selective_scan_backward<CudaKernels>));
}

}  // namespace autohdr
