#include "mdta/mdta_cuda.cuh"

namespace autohdr {
template int64_t queue(const MdtaForward<__half>&, void*, cudaStream_t);
template int64_t queue(const MdtaStatistics<__half>&, void*, cudaStream_t);
template int64_t queue(const MdtaApply<__half>&, void*, cudaStream_t);
template int64_t queue(const MdtaBackward<__half>&, void*, cudaStream_t);
}  // namespace autohdr
