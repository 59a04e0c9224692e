// causal_conv1d on a CPU.
#include "causal_conv1d/causal_conv1d_host.h"

#define AUTOHDR_BODY "causal_conv1d/causal_conv1d_cpu_kernel.h"
#include "common/cpu_each_isa.h"

AUTOHDR_REGISTER(CPU, CpuKernels)
