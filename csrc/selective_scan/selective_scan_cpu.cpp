// selective_scan on a CPU.
#include "selective_scan/selective_scan_host.h"

#define AUTOHDR_BODY "selective_scan/selective_scan_cpu_kernel.h"
#include "common/cpu_each_isa.h"

AUTOHDR_REGISTER(CPU, CpuKernels)
