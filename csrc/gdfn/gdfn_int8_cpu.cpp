// gdfn in 8 bits on a CPU.
#include "common/cpu_steps.h"
#include "gdfn/gdfn_int8_host.h"

#define AUTOHDR_BODY "gdfn/gdfn_int8_cpu_kernel.h"
#define AUTOHDR_WITH_VNNI 1
#include "common/cpu_each_isa.h"

AUTOHDR_REGISTER(CPU, CpuKernels)
