#include "nafblock/nafblock_backward.cuh"

namespace autohdr {
template int64_t queue(const NafblockForward<float>&, void*, cudaStream_t);
template int64_t queue(const NafblockStatistics<float>&, void*, cudaStream_t);
template int64_t queue(const NafblockApply<float>&, void*, cudaStream_t);
template int64_t queue(const NafblockBackward<float>&, void*, cudaStream_t);
}  // namespace autohdr
