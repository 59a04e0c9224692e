#include "gdfn/gdfn_cuda.cuh"

namespace autohdr {
template int64_t queue(const GdfnForward<__half>&, void*, cudaStream_t);
template int64_t queue(const GdfnBackward<__half>&, void*, cudaStream_t);
}  // namespace autohdr
