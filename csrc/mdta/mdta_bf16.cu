#include "mdta/mdta_cuda.cuh"

namespace autohdr {
template int64_t mdta_forward_cuda(const MdtaForward<__nv_bfloat16>&, void*, cudaStream_t);
template int64_t mdta_statistics_cuda(const MdtaStatistics<__nv_bfloat16>&, void*, cudaStream_t);
template int64_t mdta_apply_cuda(const MdtaApply<__nv_bfloat16>&, void*, cudaStream_t);
template int64_t mdta_backward_cuda(const MdtaBackward<__nv_bfloat16>&, void*, cudaStream_t);
}  // namespace autohdr
