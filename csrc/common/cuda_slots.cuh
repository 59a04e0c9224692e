// Sums over slots: what each of many blocks or threads has left of a parameter's gradient, added up in order.
#pragma once
#include <cstdint>

#include "common/cuda_launch.cuh"

namespace autohdr {

constexpr int kSlotGroups = 32;  // of slots that a block sums side by side

// put(i, the sum of element i of `size` over slots [count][size]): a block sums 32 elements.
template <class Put>
__global__ void __launch_bounds__(32 * kSlotGroups) add_slots(const float* slots, int64_t count, int64_t size, Put put) {
  __shared__ double partial[kSlotGroups][32];
  const int lane = threadIdx.x % 32, group = threadIdx.x / 32;
  const int64_t i = int64_t{blockIdx.x} * 32 + lane;
  double sum = 0;
  if (i < size)
    for (int64_t k = group; k < count; k += kSlotGroups) sum += slots[k * size + i];
  partial[group][lane] = sum;
  __syncthreads();
  if (group || i >= size) return;
  for (int k = 1; k < kSlotGroups; ++k) sum += partial[k][lane];
  put(i, static_cast<float>(sum));
}

template <class Put>
void sum_slots(const float* slots, int64_t count, int64_t size, const Put& put, cudaStream_t stream) {
  launch(add_slots<Put>, dim3((size + 31) / 32), dim3(32 * kSlotGroups), 0, stream, slots, count, size, put);
}

}  // namespace autohdr
