// mdta's launchers on a GPU, for float, __nv_bfloat16 and __half. They return the bytes of working memory that they need; with
// memory, they also queue the work on the stream.
#pragma once
#include <cuda_runtime.h>

#include "mdta/mdta.h"

namespace autohdr {

template <class T>
int64_t mdta_forward_cuda(const MdtaForward<T>& a, void* memory, cudaStream_t stream);
template <class T>
int64_t mdta_statistics_cuda(const MdtaStatistics<T>& a, void* memory, cudaStream_t stream);
template <class T>
int64_t mdta_apply_cuda(const MdtaApply<T>& a, void* memory, cudaStream_t stream);
template <class T>
int64_t mdta_backward_cuda(const MdtaBackward<T>& a, void* memory, cudaStream_t stream);

}  // namespace autohdr
