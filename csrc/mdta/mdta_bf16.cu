#include "mdta/mdta_cuda.cuh"

namespace autohdr {
template int64_t queue(const MdtaForward<__nv_bfloat16>&, void*, cudaStream_t);
template int64_t queue(const MdtaStatistics<__nv_bfloat16>&, void*, cudaStream_t);
template int64_t queue(const MdtaApply<__nv_bfloat16>&, void*, cudaStream_t);
template int64_t queue(const MdtaBackward<__nv_bfloat16>&, void*, cudaStream_t);
}  // namespace autohdr
