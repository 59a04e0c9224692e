// The only way a kernel is launched and dynamic shared memory declared, so that the same source runs under nvcc and, with
// AUTOHDR_EMULATION, on the CPU (tests/emulation).
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace autohdr {
// Bytes of shared memory that a block can have on every GPU the kernels are built for: 8.6, 8.9 and 12.x have the least.
constexpr size_t kMaxShared = 99 << 10;
}  // namespace autohdr

#ifdef AUTOHDR_EMULATION
#include "cuda_emulation.h"

#define AUTOHDR_DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(::emulation::block.shared)
#else
// A kernel's dynamic shared memory as type* name, aligned to 16 bytes.
#define AUTOHDR_DYNAMIC_SHARED(type, name)                        \
  extern __shared__ __align__(16) unsigned char autohdr_shared[]; \
  type* name = reinterpret_cast<type*>(autohdr_shared)
#endif

namespace autohdr {

inline void cuda_check(cudaError_t error, const char* what) {
#ifndef AUTOHDR_EMULATION
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // or the next launch would be told of it once more
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
#endif
}

// threadIdx.x, which the compiler does not keep in a register from one use to the next.
__device__ __forceinline__ unsigned thread_read_anew() {
#ifdef AUTOHDR_EMULATION
  return threadIdx.x;
#else
  unsigned x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
#endif
}

// The same number. Where the compiler knows an offset's bits it joins constants to it with OR, and an address takes only sums.
__device__ __forceinline__ int without_known_bits(int offset) {
#ifndef AUTOHDR_EMULATION
  asm volatile("" : "+r"(offset));
#endif
  return offset;
}

// A size that host code chooses for a GPU, and the one in the emulation, which takes several steps of its small images so.
inline int64_t size_for(int64_t gpu, [[maybe_unused]] int64_t emulated) {
#ifdef AUTOHDR_EMULATION
  if (!emulation::recording()) return emulated;
#endif
  return gpu;
}

#ifndef AUTOHDR_EMULATION
// Of the current GPU; what: it, for an error's text.
inline int64_t attribute_of_gpu(cudaDeviceAttr attribute, const char* what) {
  int device = 0, value = 0;
  cuda_check(cudaGetDevice(&device), "the current GPU");
  cuda_check(cudaDeviceGetAttribute(&value, attribute, device), what);
  return value;
}
#endif

inline int64_t multiprocessors() {
#ifdef AUTOHDR_EMULATION
  return emulation::multiprocessors();
#else
  return attribute_of_gpu(cudaDevAttrMultiProcessorCount, "the number of a GPU's multiprocessors");
#endif
}

// Bytes of shared memory that a block of the current GPU can have: kMaxShared or more.
inline int64_t most_shared() {
#ifdef AUTOHDR_EMULATION
  return emulation::most_shared();
#else
  return attribute_of_gpu(cudaDevAttrMaxSharedMemoryPerBlockOptin, "the shared memory of a GPU's blocks");
#endif
}

// Blocks of a kernel that a multiprocessor of the current GPU holds; by_registers: so many at most, which the emulation does not know.
template <class Kernel>
int64_t resident(Kernel* kernel, int threads, size_t shared_bytes, [[maybe_unused]] int64_t by_registers) {
#ifdef AUTOHDR_EMULATION
  return std::min(by_registers, emulation::resident(shared_bytes));
#else
  int blocks = 0;
  cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
             "shared memory of a CUDA kernel");
  cuda_check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes),
             "the blocks that a multiprocessor holds");
  return blocks < 1 ? 1 : blocks;
#endif
}

// Throws std::runtime_error if the launch is refused, or an earlier one has failed since. A grid without blocks is refused.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            const Arguments&... arguments) {
#ifdef AUTOHDR_EMULATION
  emulation::launch(kernel, grid, block, shared_bytes, static_cast<Parameters>(arguments)...);
#else
  if (shared_bytes > 48 * 1024)
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
               "shared memory of a CUDA kernel");
  // clang-format off: it takes the angle brackets apart
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
  // clang-format on
  cuda_check(cudaGetLastError(), "launch of a CUDA kernel");
#endif
}

}  // namespace autohdr
