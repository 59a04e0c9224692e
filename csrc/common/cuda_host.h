// What <op>_cuda.cpp needs of torch's stable ABI: key, device, stream, element types.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>

#include "common/cuda_tf32.h"
#include "common/tensor_check.h"

// The dispatch key of the CUDA kernels: STABLE_TORCH_LIBRARY_IMPL(autohdr, AUTOHDR_CUDA_KEY, m). In the emulation they take the
// place of the CPU kernels.
#ifdef AUTOHDR_EMULATION
#define AUTOHDR_CUDA_KEY CPU
#else
#define AUTOHDR_CUDA_KEY CUDA
// Weak: a torch without CUDA does not have it, but loads the module all the same.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace autohdr {

// Makes t's device the current one as long as this lives; `stream` is torch's current stream there.
class __attribute__((visibility("hidden"))) OnDevice {
 public:
#ifdef AUTOHDR_EMULATION
  explicit OnDevice(const Tensor&) {}
#else
  explicit OnDevice(const Tensor& t) : guard_(t.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch was built without CUDA");
    void* current = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &current) == AOTI_TORCH_SUCCESS,
                    "torch names no stream");
    stream = static_cast<cudaStream_t>(current);
  }
#endif
  cudaStream_t stream = nullptr;

#ifndef AUTOHDR_EMULATION
 private:
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

// run(zero of x's element type), for the types that a CUDA kernel takes.
template <class F>
void with_cuda_type(const char* op, const Tensor& x, const F& run) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return run(float{});
    case ScalarType::BFloat16: return run(__nv_bfloat16{});
    case ScalarType::Half: return run(__half{});
    default: STD_TORCH_CHECK(false, op, ": the CUDA kernel takes float32, bfloat16 or float16");
  }
}

// work(memory, stream) with as many bytes on x's device as work(null, stream) says. The memory goes back at once: whoever gets it
// next uses it on the same stream, later.
template <class F>
void run_with_memory(const Tensor& x, const F& work) {
  const OnDevice device(x);
  forget_tf32_allowed();
  const int64_t bytes = work(nullptr, device.stream);
  Tensor memory = [&] {
    try {
      return torch::stable::new_empty(x, {std::max<int64_t>(bytes, 1)}, ScalarType::Byte);  // an address even for none
    } catch (const std::exception&) {  // its message is lost on the way, as new_like's is
      STD_TORCH_CHECK(false, "cannot allocate ", bytes, " bytes of scratch memory");
    }
  }();
  work(memory.mutable_data_ptr(), device.stream);
}

// The op's functions queue(parameters, memory, stream), as <op>_host.h calls them.
struct CudaKernels {
  template <class F>
  static void with_type(const char* op, const Tensor& x, const F& f) {
    with_cuda_type(op, x, f);
  }
  template <class Parameters>
  static void run(const Parameters& a, const Tensor& x) {
    run_with_memory(x, [&](void* memory, cudaStream_t stream) { return queue(a, memory, stream); });
  }
};

}  // namespace autohdr
