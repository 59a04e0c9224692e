// selective_scan on a GPU.
#include "selective_scan/selective_scan_host.h"
#include "common/cuda_host.h"

AUTOHDR_REGISTER(AUTOHDR_CUDA_KEY, CudaKernels)
