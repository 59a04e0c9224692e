// causal_conv1d's launchers on a GPU. They return the bytes of working memory that they need; with memory, they also queue the work
// on the stream.
#pragma once
#include <cuda_runtime.h>

#include "causal_conv1d/causal_conv1d.h"

namespace autohdr {

int64_t causal_conv1d_forward_cuda(const ConvForward& a, void* memory, cudaStream_t stream);
int64_t causal_conv1d_backward_cuda(const ConvBackward& a, void* memory, cudaStream_t stream);

}  // namespace autohdr
