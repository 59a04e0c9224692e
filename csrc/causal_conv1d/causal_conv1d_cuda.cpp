// causal_conv1d on a GPU.
#include "causal_conv1d/causal_conv1d_host.h"
#include "common/cuda_host.h"

AUTOHDR_REGISTER(AUTOHDR_CUDA_KEY, CudaKernels)
