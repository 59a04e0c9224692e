#include "nafblock/nafblock_backward.cuh"

namespace autohdr {
template int64_t queue(const NafblockForward<__half>&, void*, cudaStream_t);
template int64_t queue(const NafblockStatistics<__half>&, void*, cudaStream_t);
template int64_t queue(const NafblockApply<__half>&, void*, cudaStream_t);
template int64_t queue(const NafblockBackward<__half>&, void*, cudaStream_t);
}  // namespace autohdr
