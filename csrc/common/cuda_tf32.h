// Without PyTorch or CUDA, for host code of either.
#pragma once

namespace autohdr {

// Whether PyTorch may multiply float32 as TF32 on the current GPU: torch.backends.cuda.matmul.fp32_precision, which
// torch.set_float32_matmul_precision sets too.
bool tf32_allowed();

}  // namespace autohdr
