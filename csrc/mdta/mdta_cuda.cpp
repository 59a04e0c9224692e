// mdta on a GPU.
#include "mdta/mdta_host.h"
#include "common/cuda_host.h"

AUTOHDR_REGISTER(AUTOHDR_CUDA_KEY, CudaKernels)
