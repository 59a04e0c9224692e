#include "gdfn/gdfn_cuda.cuh"

namespace autohdr {
template int64_t queue(const GdfnForward<float>&, void*, cudaStream_t);
template int64_t queue(const GdfnBackward<float>&, void*, cudaStream_t);
}  // namespace autohdr
