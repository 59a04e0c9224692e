// selective_scan's launchers on a GPU. They return the bytes of working memory that they need; with memory, they also queue the work
// on the stream. How the work is split, and so the last bits of a result, depends on the device's number of multiprocessors.
#pragma once
#include <cuda_runtime.h>

#include "selective_scan/selective_scan.h"

namespace autohdr {

int64_t selective_scan_forward_cuda(const ScanForward& a, void* memory, cudaStream_t stream);
int64_t selective_scan_backward_cuda(const ScanBackward& a, void* memory, cudaStream_t stream);

}  // namespace autohdr
