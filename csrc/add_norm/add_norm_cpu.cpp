// add_norm on a CPU.
#include "add_norm/add_norm_host.h"

#define AUTOHDR_BODY "add_norm/add_norm_cpu_kernel.h"
#include "common/cpu_each_isa.h"

AUTOHDR_REGISTER(CPU, CpuKernels)
