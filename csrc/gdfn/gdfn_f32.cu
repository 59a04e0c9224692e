#include "gdfn/gdfn_cuda.cuh"

namespace autohdr {
template int64_t gdfn_forward_cuda(const GdfnForward<float>&, void*, cudaStream_t);
template int64_t gdfn_backward_cuda(const GdfnBackward<float>&, void*, cudaStream_t);
}  // namespace autohdr
