// Images in memory, as kernels take them: NHWC, and every pixel on 16 bytes. A step's buffers hold its rows and those of the halo
// that exist.
#pragma once
#include <initializer_list>
#include <type_traits>

#include "common/cuda_math.cuh"
#include "common/cuda_steps.cuh"

namespace autohdr {
namespace image {

// 16 bytes of a row.
template <class T>
struct alignas(16) Piece {
  static constexpr int kSize = 16 / static_cast<int>(sizeof(T));
  T v[kSize];
};

// Two neighbouring channels, and some pairs of them.
template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T v[2];
};
template <class T>
__device__ __forceinline__ float2 to_float2(const Pair<T>& p) {
  return make_float2(to_float(p.v[0]), to_float(p.v[1]));
}
__device__ __forceinline__ float2 to_float2(const Pair<__nv_bfloat16>& p) {
  const uint32_t bits = reinterpret_cast<const uint32_t&>(p);
  return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
}
template <class T, int kCount>
struct alignas(2 * kCount * sizeof(T)) Pairs {
  Pair<T> v[kCount];
};
template <int kCount, class T>
__device__ __forceinline__ Pairs<T, kCount> load_pairs(const T* p) {
  return *reinterpret_cast<const Pairs<T, kCount>*>(p);
}
template <class T>
__device__ __forceinline__ Pair<T> to_pair(float2 v) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(v.x, v.y);
    return reinterpret_cast<const Pair<T>&>(both);
  } else if constexpr (std::is_same_v<T, __half>) {
    const __half2 both = __floats2half2_rn(v.x, v.y);
    return reinterpret_cast<const Pair<T>&>(both);
  } else {
    return {v.x, v.y};
  }
}
template <int kCount, class T>
__device__ __forceinline__ void store_pairs(T* p, const float2 (&v)[kCount]) {
  Pairs<T, kCount> pairs;
#pragma unroll
  for (int i = 0; i < kCount; ++i) pairs.v[i] = to_pair<T>(v[i]);
  *reinterpret_cast<Pairs<T, kCount>*>(p) = pairs;
}

// N floats from elements, and back; N a whole number of pieces, or a pair.
template <int N, class T>
__device__ __forceinline__ void load_floats(const T* from, float (&v)[N]) {
  constexpr int kCount = N < Piece<T>::kSize ? N / 2 : Piece<T>::kSize / 2;
#pragma unroll
  for (int i = 0; i < N; i += 2 * kCount) {
    const auto pairs = load_pairs<kCount>(from + i);
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      const float2 both = to_float2(pairs.v[e]);
      v[i + 2 * e] = both.x, v[i + 2 * e + 1] = both.y;
    }
  }
}
template <class T>
__device__ __forceinline__ void load_floats(const T* from, float (&v)[1]) {
  v[0] = to_float(*from);
}
template <int N, class T>
__device__ __forceinline__ void store_floats(T* to, const float (&v)[N]) {
  constexpr int kCount = N < Piece<T>::kSize ? N / 2 : Piece<T>::kSize / 2;
#pragma unroll
  for (int i = 0; i < N; i += 2 * kCount) {
    Pairs<T, kCount> pairs;
#pragma unroll
    for (int e = 0; e < kCount; ++e) pairs.v[e] = to_pair<T>(make_float2(v[i + 2 * e], v[i + 2 * e + 1]));
    *reinterpret_cast<Pairs<T, kCount>*>(to + i) = pairs;
  }
}

// Matrices of T: element (row, column) of (image, head) lies at data + image·of_image + head·of_head + row·of_row + column. Rows lie
// on 16 bytes.
template <class T>
struct Matrices {
  T* data;
  int64_t of_image, of_row, of_head;
  __host__ __device__ T* of(int64_t image, int64_t head) const { return data + image * of_image + head * of_head; }
  Matrices shifted(int64_t elements) const { return {data + elements, of_image, of_row, of_head}; }
  template <class U, class = std::enable_if_t<std::is_same_v<U, const T>>>
  operator Matrices<U>() const {
    return {data, of_image, of_row, of_head};
  }
};

// Some rows of each image of a step, in a buffer or in the image itself.
template <class T>
struct View {
  T* data;  // row rows.first of the step's first image
  int64_t of_image;
  Range rows;
  int width, channels;  // channels: from a pixel to the next
  __host__ __device__ T* at(int64_t image, int y, int x) const {
    return data + image * of_image + ((y - rows.first) * int64_t{width} + x) * channels;
  }
  template <class U, class = std::enable_if_t<std::is_same_v<U, const T>>>
  operator View<U>() const {
    return {data, of_image, rows, width, channels};
  }
  View of(const Range& part) const { return {at(0, part.first, 0), of_image, part, width, channels}; }
  int64_t pixels() const { return int64_t{rows.size()} * width; }  // of an image
  // Pixels × channels, or of every head its channels.
  Matrices<T> matrices(int64_t of_head = 0) const { return {data, of_image, channels, of_head}; }
};

// Memory for some rows of a step's images.
template <class T>
struct Buffer {
  T* data;
  int width, channels;
  Buffer(Workspace& memory, const Steps& steps, const ImageShape& s, int64_t channels_, int halo)
      : data(memory.take<T>(steps.images * steps.most_rows(halo) * s.width * channels_)), width(s.width),
        channels(static_cast<int>(channels_)) {}
  View<T> view(const Range& rows) const { return view(rows, channels); }
  // The same memory for images of fewer channels.
  View<T> view(const Range& rows, int fewer) const { return {data, int64_t{rows.size()} * width * fewer, rows, width, fewer}; }
};

// The first channels of pixels; zeros where there are more of them in `to` than in `from`.
template <class T>
__global__ void copy_pixels(View<const T> from, View<T> to, int64_t pixels) {
  const int64_t count = pixels * to.channels;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t pixel = i / to.channels, channel = i % to.channels;
    to.data[blockIdx.y * to.of_image + i] =
        channel < from.channels ? from.data[blockIdx.y * from.of_image + pixel * from.channels + channel] : from_float<T>(0.0f);
  }
}
template <class T>
void copy(View<const T> from, View<T> to, int64_t images, cudaStream_t stream) {
  const int64_t pixels = to.pixels();
  launch(copy_pixels<T>, dim3(std::min<int64_t>(ceil_div(pixels * to.channels, 256), 8192), images), dim3(256), 0, stream, from,
         to, pixels);
}

// Images from b on of a tensor [B, H, W, C].
template <class T>
View<T> view_of(T* tensor, const ImageShape& s, int64_t b) {
  const int64_t of_image = int64_t{s.height} * s.width * s.channels;
  return {tensor + b * of_image, of_image, s.rows(), s.width, s.channels};
}

// How a call's image tensors [B, H, W, C] lie in the kernels' view: as they are, or, where their pixels do not lie on 16 bytes, as
// copies of a step's rows with some more channels, which are zero.
struct Layout {
  bool copies;
  int channels;  // of a view

  template <class T>
  static Layout of(const ImageShape& s, std::initializer_list<const T*> tensors) {
    uintptr_t bits = s.channels * sizeof(T);
    for (const T* tensor : tensors) bits |= reinterpret_cast<uintptr_t>(tensor);
    const bool copies = bits % 16 != 0;
    return {copies, copies ? static_cast<int>(round_up(s.channels, 8)) : s.channels};
  }
};
template <class T>
struct Image {
  using Element = std::remove_const_t<T>;
  T* tensor;
  ImageShape shape;
  Layout layout;
  Buffer<Element> buffer;

  Image(Workspace& memory, T* tensor_, const Layout& layout_, const Steps& steps, const ImageShape& s, int halo)
      : tensor(tensor_), shape(s), layout(layout_), buffer(memory, steps, s, layout_.copies ? layout_.channels : 0, halo) {}

  View<T> original(int64_t b, const Range& rows) const { return view_of(tensor, shape, b).of(rows); }
  // Rows of the images from b on, to read.
  View<T> read(int64_t b, int64_t images, const Range& rows, cudaStream_t stream) const {
    if (!layout.copies) return original(b, rows);
    copy<Element>(original(b, rows), buffer.view(rows), images, stream);
    return buffer.view(rows);
  }
  // The same to write, and what then brings them to the tensor.
  View<T> write(int64_t b, const Range& rows) const { return layout.copies ? buffer.view(rows) : original(b, rows); }
  void written(int64_t b, int64_t images, const Range& rows, cudaStream_t stream) const {
    if (layout.copies) copy<Element>(buffer.view(rows), original(b, rows), images, stream);
  }
};

}  // namespace image
}  // namespace autohdr
