// mdta on a CPU.
#include "common/cpu_steps.h"
#include "mdta/mdta_host.h"

#define AUTOHDR_BODY "mdta/mdta_cpu_kernel.h"
#include "common/cpu_each_isa.h"
#include "mdta/mdta_cpu_passes.h"

AUTOHDR_REGISTER(CPU, MdtaCpuKernels)
