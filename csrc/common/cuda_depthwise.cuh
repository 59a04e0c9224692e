// The depthwise 3×3 convolution, and its backward pass. Lanes own pairs of channels; a warp walks a segment of some rows from left to
// right, every column's loads under way while the one before is multiplied.
#pragma once
#include "common/cuda_view.cuh"

namespace autohdr {
namespace image {

__device__ __forceinline__ void add_product(float2& sum, float2 a, float2 b) { sum.x += a.x * b.x, sum.y += a.y * b.y; }

constexpr int kSegment = 16, kWalkWarps = 4;  // columns of a segment, warps of a block

// How the kernels share the rows of a step: kRows at a time. More of them load fewer rows twice, and take more registers.
template <int kRows>
struct Walk {
  Range rows;
  int height, width;
  int channels;  // of one part, even
  int64_t images;

  // Over out's pixels.
  template <class T>
  Walk(const View<T>& out, int height_, int channels_, int64_t images_)
      : rows(out.rows), height(height_), width(out.width), channels(channels_), images(images_) {}
  // Only for its blocks.
  Walk(const Range& rows_, int width_) : rows(rows_), height(0), width(width_), channels(0), images(1) {}
  __host__ __device__ int segments() const { return (width + kSegment - 1) / kSegment; }
  __host__ __device__ int64_t units() const { return int64_t{(rows.end - rows.first + kRows - 1) / kRows} * segments(); }
  int64_t blocks() const { return ceil_div(units(), kWalkWarps); }  // of 64 channels of an image
};

// Rows from y on and columns [first, end) of an image.
template <int kRows>
struct Segment {
  int64_t image;
  int y, rows, first, end;

  __device__ Segment(const Walk<kRows>& walk, int64_t image_, uint32_t unit) : image(image_) {
    const uint32_t segments = walk.segments(), row = unit / segments;
    y = walk.rows.first + static_cast<int>(row) * kRows, rows = min(kRows, walk.rows.end - y);
    first = static_cast<int>(unit - row * segments) * kSegment;
    end = first + kSegment < walk.width ? first + kSegment : walk.width;
  }
  __device__ bool has(int row) const { return row == 0 || row < rows; }
  __device__ int columns() const { return end - first; }
};

// The pair of channels of every part that is this lane's; the parts of a pair lie side by side.
__device__ __forceinline__ int pair_of_lane() { return blockIdx.y * 32 + threadIdx.x; }

// Where this lane's channels lie along a segment's rows.
template <int kParts, int kRows, class T>
struct Along {
  T* at[kRows];
  int step;
  __device__ Along(const View<T>& view, const Segment<kRows>& s) : step(view.channels) {
#pragma unroll
    for (int o = 0; o < kRows; ++o) at[o] = view.at(s.image, s.y + (s.has(o) ? o : 0), s.first) + pair_of_lane() * 2 * kParts;
  }
  __device__ __forceinline__ Pairs<T, kParts> load(int o) const { return load_pairs<kParts>(at[o]); }
  __device__ __forceinline__ void store(int o, const float2 (&v)[kParts]) const { store_pairs<kParts>(at[o], v); }
  __device__ __forceinline__ void next(int o) { at[o] += step; }
};

// f(row, column from the segment's first, 3×3 convolution of each part there), for the segment's rows o, column by column. in:
// its rows must reach one further on each side, where the image does. see(column, rows): the inputs of part 0, from the first
// column's left neighbour to the last one's right.
template <int kParts, int kRows, class T, class F, class See>
__device__ __forceinline__ void convolve(const Walk<kRows>& walk, const Segment<kRows>& s, const View<const T>& in,
                                         const float2 (&w)[9][kParts], const F& f, const See& see) {
  const T* row[kRows + 2];
  int inside[kRows + 2];  // columns below are in the image, and needed; -2: none
#pragma unroll
  for (int r = 0; r < kRows + 2; ++r) {
    const int y = s.y - 1 + r;
    const bool there = y >= 0 && y < walk.height && r < s.rows + 2;
    inside[r] = there ? s.columns() + (s.end < walk.width) : -2;
    row[r] = in.at(s.image, there ? y : s.y, s.first) + pair_of_lane() * 2 * kParts;
  }
  Pairs<T, kParts> ahead[kRows + 2];
  const auto load = [&](int x, int back = 0) {  // and goes on to the next column
#pragma unroll
    for (int r = 0; r < kRows + 2; ++r) {
      ahead[r] = {};
      if (x < inside[r]) ahead[r] = load_pairs<kParts>(row[r] - back);
      row[r] += in.channels - back;
    }
  };
  float2 v[kParts][kRows + 2];
  const auto take = [&] {
#pragma unroll
    for (int part = 0; part < kParts; ++part)
#pragma unroll
      for (int r = 0; r < kRows + 2; ++r) v[part][r] = to_float2(ahead[r].v[part]);
  };
  float2 before[kParts][kRows], here[kParts][kRows];
  // sums += column v times the taps of a column of the kernel.
  const auto add = [&](float2(&sums)[kParts][kRows], int tap) {
#pragma unroll
    for (int part = 0; part < kParts; ++part)
#pragma unroll
      for (int o = 0; o < kRows; ++o)
#pragma unroll
        for (int i = 0; i < 3; ++i) add_product(sums[part][o], w[i * 3 + tap][part], v[part][o + i]);
  };
  const auto clear = [](float2(&sums)[kParts][kRows]) {
#pragma unroll
    for (int part = 0; part < kParts; ++part)
#pragma unroll
      for (int o = 0; o < kRows; ++o) sums[part][o] = make_float2(0, 0);
  };
  if (s.first > 0) {
    load(-2, in.channels);
  } else {
#pragma unroll
    for (int r = 0; r < kRows + 2; ++r) ahead[r] = {};
  }
  take();
  load(0);
  see(-1, v[0]);
  clear(before), add(before, 0);
  take();
  load(1);
  see(0, v[0]);
  add(before, 1), clear(here), add(here, 0);
#pragma unroll 2
  for (int x = 0; x < s.columns(); ++x) {
    take();
    load(x + 2);
    see(x + 1, v[0]);
    add(before, 2);
#pragma unroll
    for (int o = 0; o < kRows; ++o) {
      if (!s.has(o)) continue;
      float2 result[kParts];
#pragma unroll
      for (int part = 0; part < kParts; ++part) result[part] = before[part][o];
      f(o, x, result);
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part)
#pragma unroll
      for (int o = 0; o < kRows; ++o) before[part][o] = here[part][o];
    add(before, 1), clear(here), add(here, 0);
  }
}

template <int kParts>
__device__ __forceinline__ void load_taps(const float* taps /* [9][stride] */, int stride, float2 (&w)[9][kParts]) {
#pragma unroll
  for (int t = 0; t < 9; ++t) {
    const auto pairs = load_pairs<kParts>(taps + t * stride + pair_of_lane() * 2 * kParts);
#pragma unroll
    for (int part = 0; part < kParts; ++part) w[t][part] = to_float2(pairs.v[part]);
  }
}

// The same, with taps from memory and nothing seen.
template <int kParts, int kRows, class T, class F>
__device__ __forceinline__ void convolve(const Walk<kRows>& walk, const Segment<kRows>& s, const View<const T>& in,
                                         const float* taps, int stride, const F& f) {
  float2 w[9][kParts];
  load_taps(taps, stride, w);
  convolve<kParts>(walk, s, in, w, f, [](int, const float2(&)[kRows + 2]) {});
}

__device__ __forceinline__ uint32_t unit_of_warp() { return blockIdx.x * kWalkWarps + threadIdx.y; }  // a step's fit 32 bits
// Whether there are channels for this lane.
template <int kRows>
__device__ __forceinline__ bool has_channels(const Walk<kRows>& walk) {
  return pair_of_lane() * 2 < walk.channels;
}
// The same, and a segment for its warp.
template <int kRows>
__device__ __forceinline__ bool has_unit(const Walk<kRows>& walk) {
  return unit_of_warp() < walk.units() && has_channels(walk);
}

template <int kRows, class... Parameters, class... Arguments>
void launch_walk(void (*kernel)(Walk<kRows>, Parameters...), const Walk<kRows>& walk, cudaStream_t stream,
                 const Arguments&... arguments) {
  const dim3 grid(walk.blocks(), ceil_div(walk.channels, 64), walk.images);
  launch(kernel, grid, dim3(32, kWalkWarps), 0, stream, walk, arguments...);
}

// out = 3×3 convolution of in.
constexpr int kDepthwiseRows = 4;
template <class T>
__global__ void __launch_bounds__(128)
    depthwise(Walk<kDepthwiseRows> walk, View<const T> in, const float* taps, int stride, View<T> out) {
  if (!has_unit(walk)) return;
  const Segment<kDepthwiseRows> s(walk, blockIdx.z, unit_of_warp());
  Along<1, kDepthwiseRows, T> to(out, s);
  convolve<1>(walk, s, in, taps, stride, [&](int o, int, const float2(&v)[1]) { to.store(o, v), to.next(o); });
}

// d_in, given the gradient d of the convolution and its taps turned by 180 degrees; slots[slot][9][channels] (+)= the taps'
// gradients, of what d_in's pixels give to them.
constexpr int kBackwardRows = 2;
template <class T>
__global__ void __launch_bounds__(128) differentiate_depthwise(Walk<kBackwardRows> walk, View<const T> in, View<const T> d,
                                                               const float* flipped, View<T> d_in, float* slots, bool add) {
  AUTOHDR_DYNAMIC_SHARED(float2, shared);  // [warp][9][32]
  float2 sums[9] = {};
  const uint32_t units = walk.units(), all = units * walk.images;
  if (has_channels(walk)) {
    float2 w[9][1];
    load_taps(flipped, walk.channels, w);
    for (uint32_t unit = unit_of_warp(); unit < all; unit += gridDim.x * kWalkWarps) {
      const Segment<kBackwardRows> s(walk, unit / units, unit % units);
      Along<1, kBackwardRows, const T> from(in, s);
      Along<1, kBackwardRows, T> to(d_in, s);
      Pairs<T, 1> ahead[kBackwardRows];
      const auto load = [&](int x) {
#pragma unroll
        for (int o = 0; o < kBackwardRows; ++o) {
          ahead[o] = {};
          if (x < s.columns() && s.has(o)) ahead[o] = load_pairs<1>(from.at[o]);
          from.next(o);
        }
      };
      float2 left[kBackwardRows] = {}, here[kBackwardRows] = {},
             right[kBackwardRows] = {};  // of in: those of the segment, beside the column that is seen
      load(0);
      convolve<1>(
          walk, s, d, w, [&](int o, int, const float2(&v)[1]) { to.store(o, v), to.next(o); },
          [&](int x, const float2(&v)[kBackwardRows + 2]) {
#pragma unroll
            for (int o = 0; o < kBackwardRows; ++o) left[o] = here[o], here[o] = right[o], right[o] = to_float2(ahead[o].v[0]);
            load(x + 2);
#pragma unroll
            for (int o = 0; o < kBackwardRows; ++o)
#pragma unroll
              for (int i = 0; i < 3; ++i) {
                add_product(sums[i * 3], v[o + 2 - i], left[o]);
                add_product(sums[i * 3 + 1], v[o + 2 - i], here[o]);
                add_product(sums[i * 3 + 2], v[o + 2 - i], right[o]);
              }
          });
    }
  }
#pragma unroll
  for (int t = 0; t < 9; ++t) shared[(threadIdx.y * 9 + t) * 32 + threadIdx.x] = sums[t];
  __syncthreads();
  for (int t = threadIdx.y; t < 9; t += kWalkWarps) {
    if (!has_channels(walk)) continue;
    float2 sum = make_float2(0, 0);
    for (int w = 0; w < kWalkWarps; ++w)
      sum.x += shared[(w * 9 + t) * 32 + threadIdx.x].x, sum.y += shared[(w * 9 + t) * 32 + threadIdx.x].y;
    float2& slot = *reinterpret_cast<float2*>(slots + (int64_t{blockIdx.x} * 9 + t) * walk.channels + pair_of_lane() * 2);
    slot = add ? make_float2(slot.x + sum.x, slot.y + sum.y) : sum;
  }
}

// For the taps' gradients, of steps of up to `pixels`: fewer where many channels fill the device, and a few segments each.
inline int64_t depthwise_slots(int64_t channels, int64_t pixels) {
  return std::min(std::clamp<int64_t>(131072 / channels, 32, 512), ceil_div(pixels, 8 * kWalkWarps * kSegment));
}

template <class T>
void depthwise_backward(const Walk<kBackwardRows>& walk, View<const T> in, View<const T> d, const float* flipped, View<T> d_in,
                        float* sums, int64_t slots, bool add, cudaStream_t stream) {
  launch(differentiate_depthwise<T>, dim3(slots, ceil_div(walk.channels, 64)), dim3(32, kWalkWarps),
         kWalkWarps * 9 * 32 * sizeof(float2), stream, walk, in, d, flipped, d_in, sums, add);
}

}  // namespace image
}  // namespace autohdr
