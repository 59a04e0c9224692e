// Without PyTorch or CUDA, for host code of either.
#pragma once

namespace autohdr {

// Whether PyTorch may multiply float32 as TF32 on the current GPU: torch.backends.cuda.matmul.fp32_precision, which
// torch.set_float32_matmul_precision sets too. The answer is this thread's until it is forgotten: one for a call of an op, whose
// memory is counted by it.
bool tf32_allowed();
void forget_tf32_allowed();

}  // namespace autohdr
