// apply_edit on a CPU.
#include "apply_edit/apply_edit_host.h"

#define AUTOHDR_BODY "apply_edit/apply_edit_cpu_kernel.h"
#include "common/cpu_each_isa.h"

AUTOHDR_REGISTER(CPU, CpuKernels)
