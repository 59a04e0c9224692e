#include "nafblock/nafblock_backward.cuh"

namespace autohdr {
template int64_t queue(const NafblockForward<__nv_bfloat16>&, void*, cudaStream_t);
template int64_t queue(const NafblockStatistics<__nv_bfloat16>&, void*, cudaStream_t);
template int64_t queue(const NafblockApply<__nv_bfloat16>&, void*, cudaStream_t);
template int64_t queue(const NafblockBackward<__nv_bfloat16>&, void*, cudaStream_t);
}  // namespace autohdr
