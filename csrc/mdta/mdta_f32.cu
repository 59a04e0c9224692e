#include "mdta/mdta_cuda.cuh"

namespace autohdr {
template int64_t queue(const MdtaForward<float>&, void*, cudaStream_t);
template int64_t queue(const MdtaStatistics<float>&, void*, cudaStream_t);
template int64_t queue(const MdtaApply<float>&, void*, cudaStream_t);
template int64_t queue(const MdtaBackward<float>&, void*, cudaStream_t);
}  // namespace autohdr
