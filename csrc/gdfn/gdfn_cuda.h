// gdfn's launchers on a GPU, for float, __nv_bfloat16 and __half. They return the bytes of working memory that they need; with
// memory, they also queue the work on the stream.
#pragma once
#include <cuda_runtime.h>

#include "gdfn/gdfn.h"

namespace autohdr {

template <class T>
int64_t gdfn_forward_cuda(const GdfnForward<T>& a, void* memory, cudaStream_t stream);
template <class T>
int64_t gdfn_backward_cuda(const GdfnBackward<T>& a, void* memory, cudaStream_t stream);

}  // namespace autohdr
