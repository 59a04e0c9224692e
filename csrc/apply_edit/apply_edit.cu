// apply_edit on a GPU, forward and backward.
//
// A block owns a piece of an image, some rows, and keeps its curves in shared memory. A warp takes a row at a time: it interpolates
// the grid between its rows once, into shared memory too, and a thread takes groups of kGroup pixels, which are 48 bytes: three loads
// and three stores, where they lie on 16 bytes.
//
// Backward, a pixel adds to two knots of each curve: every thread has sums of its own in shared memory. What the grid's points get is
// summed by others: a block owns a point and kBins of its bins, and goes over the pixels around it. Either leaves its sums in a slot;
// slots are added up in order.
#include "apply_edit/apply_edit.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/cuda_launch.cuh"
#include "common/cuda_math.cuh"
#include "common/cuda_repack.cuh"
#include "common/cuda_sequence.cuh"
#include "common/cuda_steps.cuh"

namespace autohdr {
namespace edit {

using image::ceil_div;
using image::Range;
using image::round_up;

constexpr int kThreads = 64, kWarps = kThreads / 32;
constexpr int kKnots = 36;  // of each curve, whose sums a block keeps
constexpr int kSums = 3 * kKnots + 12;
constexpr int kBins = 4;              // of a point of the grid
constexpr int64_t kMostPieces = 512;  // of an image: slots to add up
// Pixels of a thread at least, before its sums are added to others', where there are so many. The emulation cuts small images.
inline const int64_t kPixels = size_for(64, 2);

__device__ constexpr float luma(int channel) { return channel == 0 ? 0.2126f : channel == 1 ? 0.7152f : 0.0722f; }  // Rec. 709

template <class T>
constexpr int kGroup = 16 / static_cast<int>(sizeof(T));  // pixels

// White in the integers of a photo's own samples.
template <class T>
constexpr float kWhite = static_cast<float>(static_cast<T>(-1));

template <class T>
__device__ __forceinline__ float sample(T v) {
  if constexpr (std::is_integral_v<T>)
    return v * (1.0f / kWhite<T>);
  else
    return to_float(v);
}
template <class T>
__device__ __forceinline__ T to_sample(float v) {
  if constexpr (std::is_integral_v<T>)  // a NaN becomes 0
    return static_cast<T>(rintf(fminf(fmaxf(v * kWhite<T>, 0.0f), kWhite<T>)));
  else
    return from_float<T>(v);
}

// The edit's sizes, and how they lie to the image's.
struct Sizes {
  int height, width, knots, rows, columns, bins;
  float down, across;  // cells of the grid a pixel
  explicit Sizes(const EditShape& s)
      : height(static_cast<int>(s.height)), width(static_cast<int>(s.width)), knots(static_cast<int>(s.knots)),
        rows(static_cast<int>(s.rows)), columns(static_cast<int>(s.columns)), bins(static_cast<int>(s.bins)),
        down(static_cast<float>(s.rows) / static_cast<float>(s.height)),
        across(static_cast<float>(s.columns) / static_cast<float>(s.width)) {}
  // Floats of a block's curves, on 16 bytes, and of a row of the grid.
  __host__ __device__ int of_curves() const { return (3 * knots + 3) / 4 * 4; }
  __host__ __device__ int of_row() const { return columns * bins * 12; }
  // Bytes of shared memory, with as many sums of a thread.
  size_t shared(int sums) const {
    const int64_t floats = 3 * int64_t{knots} + kWarps * int64_t{12} * columns * bins + sums * kThreads + 3;
    if (floats > static_cast<int64_t>(kMaxShared / sizeof(float)))
      throw std::runtime_error("apply_edit: curves and grid are too large for the CUDA kernels, which keep 3 knots + " +
                               std::to_string(kWarps * 12) + " columns bins floats in shared memory, at most " +
                               std::to_string(kMaxShared / sizeof(float) - sums * kThreads - 3) + ", got " +
                               std::to_string(knots) + " knots, " + std::to_string(columns) + " columns, " +
                               std::to_string(bins) + " bins; backend='triton' takes any");
    return (of_curves() + kWarps * of_row() + sums * kThreads) * sizeof(float);
  }
};

// Where a coordinate lies between the points 0 ... count - 1: v = (1 - part) · point first + part · the next.
struct Between {
  int first;
  float part;
  __device__ float weight(int point) const { return point == first ? 1.0f - part : point == first + 1 ? part : 0.0f; }
};
__device__ __forceinline__ Between between(float place, int count) {  // goes on beyond the ends; a NaN is part of the first
  const int first = place > 0.0f ? (place < static_cast<float>(count - 2) ? static_cast<int>(place) : count - 2) : 0;
  return {first, place - static_cast<float>(first)};
}
__device__ __forceinline__ Between between_clamped(float place, int count) {  // stays at the ends
  if (count == 1) return {0, 0.0f};
  return between(fminf(fmaxf(place, 0.0f), static_cast<float>(count - 1)), count);
}
__device__ __forceinline__ Between cell_of(int pixel, float cells_a_pixel, int cells) {
  return between_clamped((static_cast<float>(pixel) + 0.5f) * cells_a_pixel - 0.5f, cells);
}

// A thread's pixels of a row, `width` of them: from `first` on, which may be in front of the row's.
template <class T>
struct Group {
  static constexpr int kPieces = 3, kOf = kGroup<T>;  // elements of 16 bytes
  T v[kPieces * kOf];

  static __device__ bool whole(const T* row, int first, int width) {
    return first >= 0 && first + kGroup<T> <= width && reinterpret_cast<uintptr_t>(row + first * int64_t{3}) % 16 == 0;
  }
  __device__ __forceinline__ void load(const T* row, int first, int width) {
    const int64_t at = first * int64_t{3};
    if (whole(row, first, width)) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        const Piece<T, kOf> piece = load_piece<kOf>(row + at + i * kOf);
#pragma unroll
        for (int e = 0; e < kOf; ++e) v[i * kOf + e] = piece.v[e];
      }
    } else {
#pragma unroll
      for (int i = 0; i < kPieces * kOf; ++i) v[i] = at + i >= 0 && at + i < int64_t{3} * width ? row[at + i] : T(0.0f);
    }
  }
  __device__ __forceinline__ void store(T* row, int first, int width) const {
    const int64_t at = first * int64_t{3};
    if (whole(row, first, width)) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        Piece<T, kOf> piece;
#pragma unroll
        for (int e = 0; e < kOf; ++e) piece.v[e] = v[i * kOf + e];
        store_piece(row + at + i * kOf, piece);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kPieces * kOf; ++i)
        if (at + i >= 0 && at + i < int64_t{3} * width) row[at + i] = v[i];
    }
  }
};

// f(first) for a thread's groups of a row, which lie on 16 bytes in it but for its ends: where it begins a elements behind such a
// place, a group begins 5a pixels later, at 16a elements.
template <class T, class F>
__device__ __forceinline__ void each_group(const T* row, int width, const F& f) {
  const int front = static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(T) * 5 % kGroup<T>);
  const int first = front ? front - kGroup<T> : 0, lane = threadIdx.x % 32;
  for (int at = first + lane * kGroup<T>; at < width; at += 32 * kGroup<T>) f(at);
}

// What curves and matrix make of a pixel.
struct Toned {
  Between at[3];
  float slope[3], curved[3], value[3], luma;
};
__device__ __forceinline__ Toned tone(const Sizes& s, const float* curves, const float (&matrix)[12], const float (&x)[3]) {
  Toned t;
#pragma unroll
  for (int c = 0; c < 3; ++c) {
    t.at[c] = between(x[c] * static_cast<float>(s.knots - 1), s.knots);
    const float* knot = curves + c * s.knots + t.at[c].first;
    t.slope[c] = knot[1] - knot[0];
    t.curved[c] = knot[0] + t.at[c].part * t.slope[c];
  }
  t.luma = 0.0f;
#pragma unroll
  for (int r = 0; r < 3; ++r) {
    const float* row = matrix + r * 4;
    t.value[r] = row[3] + row[0] * t.curved[0] + row[1] * t.curved[1] + row[2] * t.curved[2];
    t.luma += luma(r) * t.value[r];
  }
  return t;
}

__device__ __forceinline__ void load_matrix(const float* from, float (&matrix)[12]) {
#pragma unroll
  for (int i = 0; i < 12; ++i) matrix[i] = from[i];
}

// What a block keeps of its image's edit: curves, and for each warp a row of the grid, [columns][bins][3][4].
struct Edit {
  const float* curves;
  float* row;
  float matrix[12];

  __device__ Edit(const Sizes& s, const EditParameters& p, int64_t image, float* memory)
      : curves(memory), row(memory + s.of_curves() + threadIdx.x / 32 * s.of_row()) {
    const float* from = p.curves + image * 3 * s.knots;
    for (int i = threadIdx.x; i < 3 * s.knots; i += kThreads) memory[i] = from[i];
    load_matrix(p.matrix + image * 12, matrix);
    __syncthreads();
  }
  // The warp's row, for the pixels of row y. grid: the image's.
  __device__ void fill_row(const Sizes& s, const float* grid, int y) const {
    const Between at = cell_of(y, s.down, s.rows);
    const float *above = grid + int64_t{at.first} * s.of_row(),
                *below = grid + int64_t{min(at.first + 1, s.rows - 1)} * s.of_row();
    __syncwarp();  // all have read the row that is there
    for (int i = threadIdx.x % 32; i < s.of_row(); i += 32) row[i] = above[i] + at.part * (below[i] - above[i]);
    __syncwarp();
  }
};

// The affine matrices where a pixel is, [3][4]: of the bin below its luma and of the next.
struct Slice {
  float low[12], high[12], part;  // part: of the way up
  __device__ __forceinline__ Slice(const Sizes& s, const float* row, int x, float luma) {
    const Between column = cell_of(x, s.across, s.columns);
    const Between bin = between_clamped(luma * static_cast<float>(s.bins - 1), s.bins);
    const int right = min(column.first + 1, s.columns - 1), step = s.bins > 1 ? 12 : 0;
    const float *from = row + (column.first * s.bins + bin.first) * 12, *to = row + (right * s.bins + bin.first) * 12;
    mix(from, to, column.part, low);
    mix(from + step, to + step, column.part, high);
    part = bin.part;
  }
  static __device__ __forceinline__ void mix(const float* from, const float* to, float part, float (&mixed)[12]) {
#pragma unroll
    for (int r = 0; r < 3; ++r) {
      const float4 a = reinterpret_cast<const float4*>(from)[r], b = reinterpret_cast<const float4*>(to)[r];
      mixed[r * 4] = a.x + part * (b.x - a.x), mixed[r * 4 + 1] = a.y + part * (b.y - a.y);
      mixed[r * 4 + 2] = a.z + part * (b.z - a.z), mixed[r * 4 + 3] = a.w + part * (b.w - a.w);
    }
  }
  __device__ float change(int i) const { return high[i] - low[i]; }
  __device__ float at(int i) const { return low[i] + part * change(i); }
};

template <class T>
__global__ void __launch_bounds__(kThreads) forward(EditForward<T> a, Sizes s, int pieces, int rows) {
  AUTOHDR_DYNAMIC_SHARED(float, shared);
  const int64_t image = blockIdx.x / pieces;
  const int first = static_cast<int>(blockIdx.x % pieces) * rows, end = min(first + rows, s.height);
  const Edit edit(s, a.parameters, image, shared);
  const float* grid = a.parameters.grid + image * s.rows * s.of_row();
  for (int y = first + threadIdx.x / 32; y < end; y += kWarps) {
    const int64_t at = (image * s.height + y) * s.width * 3;
    const T* x = a.x + at;
    T* out = a.y + at;
    if (s.columns) edit.fill_row(s, grid, y);
    each_group(out, s.width, [&](int from) {
      Group<T> group;
      group.load(x, from, s.width);
#pragma unroll
      for (int i = 0; i < kGroup<T>; ++i) {
        const float pixel[3] = {sample(group.v[i * 3]), sample(group.v[i * 3 + 1]), sample(group.v[i * 3 + 2])};
        const Toned t = tone(s, edit.curves, edit.matrix, pixel);
        float v[3] = {t.value[0], t.value[1], t.value[2]};
        if (s.columns) {
          const Slice slice(s, edit.row, from + i, t.luma);
#pragma unroll
          for (int r = 0; r < 3; ++r)
            v[r] = slice.at(r * 4 + 3) + slice.at(r * 4) * t.value[0] + slice.at(r * 4 + 1) * t.value[1] +
                   slice.at(r * 4 + 2) * t.value[2];
        }
#pragma unroll
        for (int r = 0; r < 3; ++r) group.v[i * 3 + r] = to_sample<T>(v[r]);
      }
      group.store(out, from, s.width);
    });
  }
}

// total(i, Σ_thread sums[i][thread]) for i < count, once.
template <class F>
__device__ __forceinline__ void add_threads(const float (*sums)[kThreads], int count, const F& total) {
  __syncthreads();
  const int lane = threadIdx.x % 32;
  for (int i = threadIdx.x / 32; i < count; i += kWarps) {
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < kWarps; ++k) sum += sums[i][k * 32 + lane];
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    if (lane == 0) total(i, sum);
  }
}

// dx, and the gradients of curves and matrix. Of the grid's y blocks, each has kKnots knots; the first has all else.
template <class T>
__global__ void __launch_bounds__(kThreads)
    backward_pixels(EditBackward<T> a, Sizes s, int pieces, int rows, float* curve_slots, float* matrix_slots) {
  AUTOHDR_DYNAMIC_SHARED(float, shared);
  auto* sums = reinterpret_cast<float (*)[kThreads]>(shared);  // of the curves [3][kKnots], and the matrix
  const int64_t image = blockIdx.x / pieces, piece = blockIdx.x % pieces;
  const int first = static_cast<int>(piece) * rows, end = min(first + rows, s.height);
  const int knot = blockIdx.y * kKnots, knots = min(kKnots, s.knots - knot), thread = threadIdx.x;
  const Edit edit(s, a.parameters, image, shared + kSums * kThreads);
  const float* grid = a.parameters.grid + image * s.rows * s.of_row();
  for (int i = 0; i < kSums; ++i) sums[i][thread] = 0.0f;
  float d_matrix[12] = {};
  for (int y = first + threadIdx.x / 32; y < end; y += kWarps) {
    const int64_t at = (image * s.height + y) * s.width * 3;
    const T *x = a.x + at, *dy = a.dy + at;
    T* dx = a.dx + at;
    if (s.columns) edit.fill_row(s, grid, y);
    each_group(dx, s.width, [&](int from) {
      Group<T> group, d_group;
      group.load(x, from, s.width);
      d_group.load(dy, from, s.width);  // zero where there is no pixel
#pragma unroll
      for (int i = 0; i < kGroup<T>; ++i) {
        const float pixel[3] = {sample(group.v[i * 3]), sample(group.v[i * 3 + 1]), sample(group.v[i * 3 + 2])};
        const Toned t = tone(s, edit.curves, edit.matrix, pixel);
        float d[3] = {sample(d_group.v[i * 3]), sample(d_group.v[i * 3 + 1]), sample(d_group.v[i * 3 + 2])};
        if (s.columns) {
          const Slice slice(s, edit.row, from + i, t.luma);
          float d_value[3] = {}, d_luma = 0.0f;
#pragma unroll
          for (int r = 0; r < 3; ++r) {
            float change = slice.change(r * 4 + 3);
#pragma unroll
            for (int c = 0; c < 3; ++c) d_value[c] += d[r] * slice.at(r * 4 + c), change += slice.change(r * 4 + c) * t.value[c];
            d_luma += d[r] * change;
          }
          d_luma = t.luma >= 0.0f && t.luma <= 1.0f ? d_luma * static_cast<float>(s.bins - 1) : 0.0f;
#pragma unroll
          for (int c = 0; c < 3; ++c) d[c] = d_value[c] + d_luma * luma(c);
        }
#pragma unroll
        for (int c = 0; c < 3; ++c) {
          float d_curved = 0.0f;
#pragma unroll
          for (int r = 0; r < 3; ++r) d_curved += edit.matrix[r * 4 + c] * d[r], d_matrix[r * 4 + c] += d[r] * t.curved[c];
          d_matrix[c * 4 + 3] += d[c];
          const int k = t.at[c].first - knot;
          if (k >= 0 && k < knots) sums[c * kKnots + k][thread] += d_curved * (1.0f - t.at[c].part);
          if (k + 1 >= 0 && k + 1 < knots) sums[c * kKnots + k + 1][thread] += d_curved * t.at[c].part;
          d_group.v[i * 3 + c] = to_sample<T>(d_curved * t.slope[c] * static_cast<float>(s.knots - 1));
        }
      }
      if (blockIdx.y == 0) d_group.store(dx, from, s.width);
    });
  }
#pragma unroll
  for (int i = 0; i < 12; ++i) sums[3 * kKnots + i][thread] = d_matrix[i];
  const int64_t slot = piece * (gridDim.x / pieces) + image;
  add_threads(sums, kSums, [&](int i, float sum) {
    if (i < 3 * kKnots) {
      if (i % kKnots < knots) curve_slots[(slot * 3 + i / kKnots) * s.knots + knot + i % kKnots] = sum;
    } else if (blockIdx.y == 0) {
      matrix_slots[slot * 12 + i - 3 * kKnots] = sum;
    }
  });
}

// The pixels that a point of the grid may have a part in, between the points beside it: `cells` to `pixels`.
__device__ __forceinline__ Range around(int point, int cells, int pixels) {
  const float cell = static_cast<float>(pixels) / static_cast<float>(cells), middle = static_cast<float>(point) * cell;
  const int first = static_cast<int>(middle - 0.5f * cell - 0.5f) - 1, end = static_cast<int>(middle + 1.5f * cell - 0.5f) + 2;
  return {point == 0 || first < 0 ? 0 : first, point == cells - 1 || end > pixels ? pixels : end};
}

// The gradient of the grid at one point: a block has kBins bins of it, and its piece of the rows around.
template <class T>
__global__ void __launch_bounds__(kThreads) backward_grid(EditBackward<T> a, Sizes s, int pieces, float* slots) {
  __shared__ float sums[kBins * 12][kThreads];
  const int64_t point = blockIdx.x / pieces, piece = blockIdx.x % pieces, image = point / s.columns / s.rows;
  const int column = static_cast<int>(point % s.columns), row = static_cast<int>(point / s.columns % s.rows);
  const int bin = blockIdx.y * kBins, bins = min(kBins, s.bins - bin);
  const Range across = around(column, s.columns, s.width), down = around(row, s.rows, s.height);
  const int64_t height = down.end - down.first;
  const int first = down.first + static_cast<int>(piece * height / pieces);
  const int end = down.first + static_cast<int>((piece + 1) * height / pieces);
  const float* curves = a.parameters.curves + image * 3 * s.knots;
  float matrix[12], d[kBins][12] = {};
  load_matrix(a.parameters.matrix + image * 12, matrix);
  for (int y = first + threadIdx.x / 32; y < end; y += kWarps) {
    const float of_row = cell_of(y, s.down, s.rows).weight(row);
    const int64_t at = (image * s.height + y) * s.width * 3;
    for (int x = across.first + threadIdx.x % 32; x < across.end; x += 32) {
      const float weight = of_row * cell_of(x, s.across, s.columns).weight(column);
      if (weight == 0.0f) continue;
      float pixel[3], dy[3];
#pragma unroll
      for (int c = 0; c < 3; ++c) pixel[c] = sample(a.x[at + x * 3 + c]), dy[c] = weight * sample(a.dy[at + x * 3 + c]);
      const Toned t = tone(s, curves, matrix, pixel);
      const Between level = between_clamped(t.luma * static_cast<float>(s.bins - 1), s.bins);
#pragma unroll
      for (int k = 0; k < kBins; ++k) {
        const float of_bin = level.weight(bin + k);
#pragma unroll
        for (int r = 0; r < 3; ++r) {
          const float change = of_bin * dy[r];
#pragma unroll
          for (int c = 0; c < 3; ++c) d[k][r * 4 + c] += change * t.value[c];
          d[k][r * 4 + 3] += change;
        }
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kBins; ++k)
#pragma unroll
    for (int i = 0; i < 12; ++i) sums[k * 12 + i][threadIdx.x] = d[k][i];
  float* slot = slots + ((piece * (gridDim.x / pieces) + point) * s.bins + bin) * 12;
  add_threads(sums, bins * 12, [&](int i, float sum) { slot[i] = sum; });
}

// How each image is cut into pieces of some rows, `most` at most: so that a thread has `pixels` of them, where there are as many.
struct Pieces {
  int rows;
  int64_t count;
  Pieces(const Sizes& s, int64_t pixels, int64_t most)
      : rows(std::min<int64_t>(s.height,
                               std::max(round_up(ceil_div(pixels * kThreads, s.width), kWarps), ceil_div(s.height, most)))),
        count(ceil_div(s.height, rows)) {}
};

}  // namespace edit

template <class T>
int64_t queue(const EditForward<T>& a, void* memory, cudaStream_t stream) {
  using namespace edit;
  const Sizes s(a.shape);
  const Pieces pieces(s, kGroup<T>, s.height);
  if (memory && a.shape.batch)
    launch(forward<T>, dim3(a.shape.batch * pieces.count), dim3(kThreads), s.shared(0), stream, a, s, pieces.count, pieces.rows);
  return 0;
}

template <class T>
int64_t queue(const EditBackward<T>& a, void* memory, cudaStream_t stream) {
  using namespace edit;
  const Sizes s(a.shape);
  const Pieces pieces(s, kPixels, kMostPieces);
  const int64_t batch = a.shape.batch, of_curves = batch * 3 * s.knots, points = batch * s.rows * s.columns;
  const int64_t around = points ? 4 * batch * s.height * s.width / points : 0;  // pixels of a point, about
  const int64_t grid_pieces = std::clamp<int64_t>(around / (kPixels * kThreads), 1, 64);
  image::Workspace workspace(memory);
  float* curve_slots = workspace.take<float>(pieces.count * of_curves);
  float* matrix_slots = workspace.take<float>(pieces.count * batch * 12);
  float* grid_slots = workspace.take<float>(grid_pieces * points * s.bins * 12);
  if (workspace.counts_only() || !batch) return workspace.used();

  launch(backward_pixels<T>, dim3(batch * pieces.count, ceil_div(s.knots, kKnots)), dim3(kThreads), s.shared(kSums), stream, a, s,
         pieces.count, pieces.rows, curve_slots, matrix_slots);
  if (points)
    launch(backward_grid<T>, dim3(points * grid_pieces, ceil_div(s.bins, kBins)), dim3(kThreads), 0, stream, a, s, grid_pieces,
           grid_slots);
  image::Repack<float> repack(stream);
  repack.add_up(curve_slots, pieces.count, of_curves, a.d_curves);
  repack.add_up(matrix_slots, pieces.count, batch * 12, a.d_matrix);
  repack.add_up(grid_slots, grid_pieces, points * s.bins * 12, a.d_grid);
  repack.run();
  return workspace.used();
}

template int64_t queue(const EditForward<float>&, void*, cudaStream_t);
template int64_t queue(const EditForward<__nv_bfloat16>&, void*, cudaStream_t);
template int64_t queue(const EditForward<__half>&, void*, cudaStream_t);
template int64_t queue(const EditForward<uint8_t>&, void*, cudaStream_t);
template int64_t queue(const EditForward<uint16_t>&, void*, cudaStream_t);
template int64_t queue(const EditBackward<float>&, void*, cudaStream_t);
template int64_t queue(const EditBackward<__nv_bfloat16>&, void*, cudaStream_t);
template int64_t queue(const EditBackward<__half>&, void*, cudaStream_t);

}  // namespace autohdr
