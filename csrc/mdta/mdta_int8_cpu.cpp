// mdta in 8 bits on a CPU.
#include "common/cpu_steps.h"
#include "mdta/mdta_int8_host.h"

#define AUTOHDR_BODY "mdta/mdta_int8_cpu_kernel.h"
#define AUTOHDR_WITH_VNNI 1
#include "common/cpu_each_isa.h"
#include "mdta/mdta_cpu_passes.h"

AUTOHDR_REGISTER(CPU, MdtaCpuKernels)
