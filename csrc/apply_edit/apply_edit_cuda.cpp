// apply_edit on a GPU.
#include "apply_edit/apply_edit_host.h"
#include "common/cuda_host.h"

AUTOHDR_REGISTER(AUTOHDR_CUDA_KEY, CudaKernels)
