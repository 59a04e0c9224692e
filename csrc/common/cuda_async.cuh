// Copies from global to shared memory that go on while the thread computes (cp.async), done at once where tests/emulation runs them.
#pragma once
#include <cuda_runtime.h>

namespace autohdr {

// A T of 4, 8 or 16 bytes, of which both addresses are multiples.
template <class T>
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
#ifdef AUTOHDR_EMULATION
  *static_cast<T*>(shared) = *static_cast<const T*>(global);
#else
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))), "l"(global),
               "n"(sizeof(T))
               : "memory");
#endif
}

// Waits for all of this thread's copies; those of others need a barrier too.
__device__ __forceinline__ void wait_for_copies() {
#ifndef AUTOHDR_EMULATION
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

}  // namespace autohdr
