#include "mdta/mdta_cuda.cuh"

namespace autohdr {
template int64_t mdta_forward_cuda(const MdtaForward<float>&, void*, cudaStream_t);
template int64_t mdta_statistics_cuda(const MdtaStatistics<float>&, void*, cudaStream_t);
template int64_t mdta_apply_cuda(const MdtaApply<float>&, void*, cudaStream_t);
template int64_t mdta_backward_cuda(const MdtaBackward<float>&, void*, cudaStream_t);
}  // namespace autohdr
