// Copies from global to shared memory that go on while the thread computes (cp.async). Where tests/emulation runs them, they arrive
// no sooner than they are waited for.
#pragma once
#include <cuda_runtime.h>

#include "common/cuda_launch.cuh"

namespace autohdr {

// A T of 4, 8 or 16 bytes, of which both addresses are multiples.
template <class T>
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
#ifdef AUTOHDR_EMULATION
  emulation::copy_later(static_cast<T*>(shared), static_cast<const T*>(global));
#else
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))),
               "l"(global), "n"(sizeof(T))
               : "memory");
#endif
}

// 16 bytes, or zeros in their place.
__device__ __forceinline__ void copy_async_or_zero(void* shared, const void* global, bool there) {
#ifdef AUTOHDR_EMULATION
  static const uint4 zero{};
  emulation::copy_later(static_cast<uint4*>(shared), there ? static_cast<const uint4*>(global) : &zero);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))),
               "l"(global), "r"(there ? 16 : 0)
               : "memory");
#endif
}

// Makes a group of this thread's copies since the last one.
__device__ __forceinline__ void commit_copies() {
#ifdef AUTOHDR_EMULATION
  emulation::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for all of this thread's groups but the last kLeft; those of others need a barrier too.
template <int kLeft>
__device__ __forceinline__ void wait_for_groups() {
#ifdef AUTOHDR_EMULATION
  emulation::wait_for_copies(kLeft);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#endif
}

// Waits for all of this thread's copies, in a group or not.
__device__ __forceinline__ void wait_for_copies() {
#ifdef AUTOHDR_EMULATION
  emulation::commit_copies();
  emulation::wait_for_copies(0);
#else
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

}  // namespace autohdr
