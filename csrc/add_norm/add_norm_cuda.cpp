// add_norm on a GPU.
#include "add_norm/add_norm_host.h"
#include "common/cuda_host.h"

AUTOHDR_REGISTER(AUTOHDR_CUDA_KEY, CudaKernels)
