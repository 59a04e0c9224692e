// gdfn on a CPU.
#include "common/cpu_steps.h"
#include "gdfn/gdfn_host.h"

#define AUTOHDR_BODY "gdfn/gdfn_cpu_kernel.h"
#include "common/cpu_each_isa.h"

AUTOHDR_REGISTER(CPU, CpuKernels)
