// nafblock on a CPU.
#include "common/cpu_steps.h"
#include "nafblock/nafblock_host.h"

#define AUTOHDR_BODY "nafblock/nafblock_cpu_kernel.h"
#include "common/cpu_each_isa.h"

AUTOHDR_REGISTER(CPU, CpuKernels)
