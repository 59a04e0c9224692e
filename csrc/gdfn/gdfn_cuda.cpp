// gdfn on a GPU.
#include "gdfn/gdfn_host.h"
#include "common/cuda_host.h"

AUTOHDR_REGISTER(AUTOHDR_CUDA_KEY, CudaKernels)
