#include "gdfn/gdfn_cuda.cuh"

namespace autohdr {
template int64_t queue(const GdfnForward<__nv_bfloat16>&, void*, cudaStream_t);
template int64_t queue(const GdfnBackward<__nv_bfloat16>&, void*, cudaStream_t);
}  // namespace autohdr
