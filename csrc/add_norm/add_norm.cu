// add_norm on a GPU, forward and backward: bound by memory, so that each element is read once and stays in registers.
//
// A group of threads owns a row, in pieces of kSize channels: a warp where rows are short, else a block. Backward a group walks
// from row to row, computes sum and norm again, and leaves its sums for the parameters in a slot; slots are added up in order.
#include "add_norm/add_norm.h"

#include <algorithm>
#include <type_traits>

#include "common/cuda_launch.cuh"
#include "common/cuda_math.cuh"
#include "common/cuda_sequence.cuh"
#include "common/cuda_slots.cuh"

namespace autohdr {
namespace add_norm {

constexpr int kSize = 4, kPieces = 2;  // elements of a piece, and pieces of a thread

// What a kernel is compiled for: the types of stream and branch, the threads of a group, and whether pieces are loaded and stored
// whole, else element by element.
template <class X_, class B_, int Threads, bool Aligned_>
struct Case {
  using X = X_;
  using B = B_;
  static constexpr int kThreads = Threads, kBlock = Threads < 128 ? 128 : Threads, kGroups = kBlock / Threads;
  static constexpr bool Aligned = Aligned_;
};

using Pieces = float[kPieces][kSize];

template <class T>
__device__ __forceinline__ T* row_of(const Rows& rows, int64_t row, int64_t channels) {
  return static_cast<T*>(rows.data) + row * channels;
}

// A thread's part of a row.
template <class C>
struct Part {
  int channels, lane;

  __device__ int channel(int i) const { return (i * C::kThreads + lane) * kSize; }
  __device__ bool inside(int i, int e) const { return channel(i) + (C::Aligned ? 0 : e) < channels; }

  template <class T>
  __device__ __forceinline__ void load(const T* row, Pieces& v) const {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) load_line<C::Aligned>(row, channel(i), channels, v[i]);
  }
  template <class T>
  __device__ __forceinline__ void store(T* row, const Pieces& v) const {
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
      if (channel(i) < channels) store_line<C::Aligned>(row, channel(i), channels, v[i]);
  }
  template <class F>
  __device__ __forceinline__ void each(const F& f) const {
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
#pragma unroll
      for (int e = 0; e < kSize; ++e) f(i, e);
  }
  // Over all threads of the group, which all get it.
  __device__ __forceinline__ float sum(float v) const {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) v += __shfl_xor_sync(~0u, v, distance);
    if constexpr (C::kThreads > 32) {
      constexpr int kWarps = C::kThreads / 32;
      __shared__ float of_warp[kWarps];
      if (lane % 32 == 0) of_warp[lane / 32] = v;
      __syncthreads();
      v = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) v += of_warp[w];
      __syncthreads();
    }
    return v;
  }
  // v = the row's norm without weight and bias, of what v holds; returns the norm's factor. origin: any of the row's numbers. Summed
  // as differences from it: the mean of equal channels is exact, whose rounding 1 / √eps would multiply.
  __device__ __forceinline__ float normalize(Pieces& v, float origin, float eps) const {
    const float part = 1.0f / channels;
    float total = 0, squares = 0;
    each([&](int i, int e) { total += inside(i, e) ? v[i][e] - origin : 0.0f; });
    const float mean = origin + sum(total) * part;
    each([&](int i, int e) {
      v[i][e] = inside(i, e) ? v[i][e] - mean : 0.0f;
      squares += v[i][e] * v[i][e];
    });
    const float factor = 1.0f / sqrtf(sum(squares) * part + eps);
    each([&](int i, int e) { v[i][e] *= factor; });
    return factor;
  }
  // branch, and x + scale · branch. Returns that of the first channel.
  __device__ __forceinline__ float add(const Rows& x, const Rows& from, const float* scale, int64_t row, Pieces& branch,
                                       Pieces& total) const {
    const auto* x_row = row_of<const typename C::X>(x, row, channels);
    const auto* branch_row = row_of<const typename C::B>(from, row, channels);
    Pieces factor;
    load(x_row, total), load(branch_row, branch), load(scale, factor);
    each([&](int i, int e) { total[i][e] += factor[i][e] * branch[i][e]; });
    return to_float(x_row[0]) + scale[0] * to_float(branch_row[0]);
  }
};

template <class C>
__global__ void __launch_bounds__(C::kBlock) forward(AddNormForward a) {
  const int64_t row = int64_t{blockIdx.x} * C::kGroups + threadIdx.x / C::kThreads;
  if (row >= a.rows) return;  // a warp's whole, or none of a block
  const Part<C> part{static_cast<int>(a.channels), static_cast<int>(threadIdx.x % C::kThreads)};
  Pieces v, weight, bias;
  const float first = part.add(a.x, a.branch, a.weights.scale, row, bias, v);
  part.store(row_of<typename C::X>(a.y, row, a.channels), v);
  part.normalize(v, first, a.weights.eps);
  part.load(a.weights.norm_weight, weight), part.load(a.weights.norm_bias, bias);
  part.each([&](int i, int e) { v[i][e] = v[i][e] * weight[i][e] + bias[i][e]; });
  part.store(row_of<typename C::B>(a.normed, row, a.channels), v);
}

template <class C>
__global__ void __launch_bounds__(C::kBlock) backward(AddNormBackward a, float* slots) {
  const Part<C> part{static_cast<int>(a.channels), static_cast<int>(threadIdx.x % C::kThreads)};
  const int64_t group = int64_t{blockIdx.x} * C::kGroups + threadIdx.x / C::kThreads, stride = int64_t{gridDim.x} * C::kGroups;
  Pieces d_scale = {}, d_weight = {}, d_bias = {};
  for (int64_t row = group; row < a.rows; row += stride) {
    Pieces branch, normal, grad, own;
    const float first = part.add(a.x, a.branch, a.weights.scale, row, branch, normal);
    part.load(row_of<const typename C::X>(a.dy, row, a.channels), grad);
    if (a.d_normed.data) {
      Pieces d;
      part.load(row_of<const typename C::B>(a.d_normed, row, a.channels), d);
      const float factor = part.normalize(normal, first, a.weights.eps);
      part.load(a.weights.norm_weight, own);
      float mean = 0, along = 0;
      part.each([&](int i, int e) {
        d_weight[i][e] += d[i][e] * normal[i][e];
        d_bias[i][e] += d[i][e];
        d[i][e] *= own[i][e];
        mean += d[i][e];
        along += d[i][e] * normal[i][e];
      });
      mean = part.sum(mean) / part.channels, along = part.sum(along) / part.channels;
      part.each([&](int i, int e) { grad[i][e] += factor * (d[i][e] - mean - normal[i][e] * along); });
    }
    part.store(row_of<typename C::X>(a.dx, row, a.channels), grad);
    part.load(a.weights.scale, own);
    part.each([&](int i, int e) {
      d_scale[i][e] += grad[i][e] * branch[i][e];
      grad[i][e] *= own[i][e];
    });
    part.store(row_of<typename C::B>(a.d_branch, row, a.channels), grad);
  }
  float* slot = slots + group * 3 * a.channels;
  part.store(slot, d_scale), part.store(slot + a.channels, d_weight), part.store(slot + 2 * a.channels, d_bias);
}

// Where a sum over the slots [scale, weight, bias][channel] goes.
struct PutGradient {
  float *d_scale, *d_weight, *d_bias;
  int64_t channels;
  __device__ void operator()(int64_t i, float sum) const {
    const int64_t which = i / channels;
    (which == 0 ? d_scale : which == 1 ? d_weight : d_bias)[i % channels] = sum;
  }
};

// run(Case) for the types and the place of these.
template <class F>
void with_case(const Rows& x, const Rows& branch, int64_t channels, std::initializer_list<const void*> all, const F& run) {
  uintptr_t bits = channels * sizeof(float);  // what aligns rows of float aligns those of half precision
  for (const void* data : all) bits |= reinterpret_cast<uintptr_t>(data);
  const auto with_types = [&](auto of_x, auto of_branch) {
    using X = decltype(of_x);
    using B = decltype(of_branch);
    if (bits % 16 != 0) return run(Case<X, B, 512, false>{});
    const int64_t threads = (channels + kPieces * kSize - 1) / (kPieces * kSize);
    if (threads <= 32) return run(Case<X, B, 32, true>{});
    threads <= 128 ? run(Case<X, B, 128, true>{}) : run(Case<X, B, 512, true>{});
  };
  with_dtype(branch.dtype, [&](auto of_branch) {  // the public function knows no other pairs
    x.dtype == Dtype::f32 ? with_types(float{}, of_branch) : with_types(of_branch, of_branch);
  });
}

}  // namespace add_norm

int64_t queue(const AddNormForward& a, void* memory, cudaStream_t stream) {
  if (!memory || a.rows == 0) return 0;
  const AddNormWeights& w = a.weights;
  add_norm::with_case(a.x, a.branch, a.channels,
                      {a.x.data, a.branch.data, a.y.data, a.normed.data, w.scale, w.norm_weight, w.norm_bias},
                      [&](auto compiled) {
                        using C = decltype(compiled);
                        launch(add_norm::forward<C>, dim3((a.rows + C::kGroups - 1) / C::kGroups), dim3(C::kBlock), 0, stream, a);
                      });
  return 0;
}

int64_t queue(const AddNormBackward& a, void* memory, cudaStream_t stream) {
  const AddNormWeights& w = a.weights;
  float* slots = static_cast<float*>(memory);
  int64_t count = 0;  // of slots
  add_norm::with_case(a.x, a.branch, a.channels,
                      {a.x.data, a.branch.data, a.dy.data, a.d_normed.data, a.dx.data, a.d_branch.data, w.scale, w.norm_weight},
                      [&](auto compiled) {
                        using C = decltype(compiled);
                        const int64_t most = multiprocessors() * resident(add_norm::backward<C>, C::kBlock, 0, 3);
                        const int64_t blocks = std::min((a.rows + C::kGroups - 1) / C::kGroups, most);
                        count = blocks * C::kGroups;
                        if (memory && count) launch(add_norm::backward<C>, dim3(blocks), dim3(C::kBlock), 0, stream, a, slots);
                      });
  const int64_t size = 3 * a.channels;
  if (memory) sum_slots(slots, count, size, add_norm::PutGradient{a.d_scale, a.d_norm_weight, a.d_norm_bias, a.channels}, stream);
  return count * size * static_cast<int64_t>(sizeof(float));
}

}  // namespace autohdr
