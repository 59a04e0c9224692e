// What the image ops share on a GPU: matrix products between pixels and channels, the depthwise convolution, layer norm, and the
// backward pass of "norm, 1×1, 3×3".
//
// An op walks its images in steps of some rows (or of some whole images), small enough that what one kernel of a step writes is
// still in the second-level cache when the next one reads it: device memory sees little but x and y, whatever the op's width. Images are NHWC; a step's buffers hold
// its rows and those of the halo that exist. Every sum has a fixed order: a block adds to its own slot, and slots are added up in
// order.
#pragma once
#include <algorithm>
#include <type_traits>

#include "common/cuda_async.cuh"
#include "common/cuda_math.cuh"
#include "common/cuda_mma.cuh"

namespace autohdr {
namespace image {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// The sum over a warp, the same in every lane.
template <class V>
__device__ __forceinline__ V warp_sum(V v) {
  for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(~0u, v, d);
  return v;
}

// Memory for the buffers of one call; without memory it only counts.
class Workspace {
 public:
  explicit Workspace(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <class T>
  T* take(int64_t count) {
    used_ = round_up(used_, 256);
    T* at = memory_ ? reinterpret_cast<T*>(memory_ + used_) : nullptr;
    used_ += count * static_cast<int64_t>(sizeof(T));
    return at;
  }
  bool counts_only() const { return !memory_; }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

// Matrices of T: element (row, column) of (image, head) lies at data + image·of_image + head·of_head + row·of_row + column.
template <class T>
struct Rows {
  T* data;
  int64_t of_image, of_row, of_head;
  __host__ __device__ T* of(int64_t image, int64_t head) const { return data + image * of_image + head * of_head; }
  Rows shifted(int64_t elements) const { return {data + elements, of_image, of_row, of_head}; }
  template <class U, class = std::enable_if_t<std::is_same_v<U, const T>>>
  operator Rows<U>() const {
    return {data, of_image, of_row, of_head};
  }
  bool aligned() const {  // 16 bytes at a time can be taken from the start of every row
    const int64_t size = sizeof(T);
    return (reinterpret_cast<uintptr_t>(data) | of_image * size | of_row * size | of_head * size) % 16 == 0;
  }
};

// The layer norm of the rows of a matrix: (x − shift)·factor·weight + bias.
struct Normal {
  const float2* stats = nullptr;  // [image][row] of (shift, factor); null: no norm
  int64_t of_image = 0;
  const float* weight = nullptr;  // [channels]
  const float* bias = nullptr;    // [channels], or null
};

// 16 bytes of a row.
template <class T>
struct alignas(16) Piece {
  static constexpr int kSize = 16 / static_cast<int>(sizeof(T));
  T v[kSize];

  // The first `count` elements, and zeros.
  __device__ __forceinline__ void load(const T* from, int64_t count, bool vectors) {
    if (vectors && count >= kSize) {
      *this = *reinterpret_cast<const Piece*>(from);
      return;
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) v[i] = i < count ? from[i] : from_float<T>(0.0f);
  }
  __device__ __forceinline__ void store(T* to, int64_t count, bool vectors) const {
    if (vectors && count >= kSize) {
      *reinterpret_cast<Piece*>(to) = *this;
      return;
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i)
      if (i < count) to[i] = v[i];
  }
  // The norm, of channels from `channel` on.
  __device__ __forceinline__ void normalise(const Normal& normal, float2 stats, int channel, int64_t count) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (i >= count) continue;
      const float bias = normal.bias ? normal.bias[channel + i] : 0.0f;
      v[i] = from_float<T>((to_float(v[i]) - stats.x) * stats.y * normal.weight[channel + i] + bias);
    }
  }
};

// out[p][n] = factor[n]·Σ_k a[p][k]·w[n][k] + scale[n]·residual[p][n], for every image and head. w's rows are aligned and zero
// beyond k.
template <class T, class Out = T>
struct Product {
  Rows<const T> a, w, residual;  // residual.data may be null
  Rows<Out> out;
  Normal normal;       // of a
  const float* scale;  // [image][head][n], or null: 1
  int64_t pixels;
  int k, n, heads;
  const float* factor = nullptr;  // [image][head][n], or null: 1
  bool a_vectors = false, out_vectors = false;
};

constexpr int kProductRows = 128, kTileRow = 80;  // bytes of a tile's row: 64, and 16 against bank conflicts

// A block owns 128 pixels × kN columns, a warp 64 or 32 × 32 of them; tiles of 64 bytes along k in shared memory, twice: while
// one is multiplied the next is on its way, that of a through registers, where the norm is applied. Rows of w are stored in an
// order that leaves 8 neighbouring columns in a thread.
template <class T, class Out, int kN>
__global__ void __launch_bounds__(256, sizeof(T) == 2 ? 2 : 1) multiply(Product<T, Out> p) {
  AUTOHDR_DYNAMIC_SHARED(unsigned char, shared);
  using P = Piece<T>;
  constexpr int kBuffer = (kProductRows + kN) * kTileRow, kWarpsN = kN / 32, kWarpM = kProductRows * kWarpsN / 8,
                kM = kWarpM / 16;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = threadIdx.x / 4, piece = threadIdx.x % 4;
  const int m0 = warp / kWarpsN * kWarpM, n0 = warp % kWarpsN * 32, first_n = blockIdx.y * kN;
  const int64_t image = blockIdx.z / p.heads, head = blockIdx.z % p.heads, first_pixel = int64_t{blockIdx.x} * kProductRows;
  const T *a = p.a.of(image, head), *w = p.w.of(image, head);

  P next_a[2];
  const auto load = [&](int k, unsigned char* tile) {
    const int at = k + piece * P::kSize, left = p.k - at;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t pixel = first_pixel + row + 64 * i;
      next_a[i].load(a + pixel * p.a.of_row + at, pixel < p.pixels ? left : 0, p.a_vectors);
    }
#pragma unroll
    for (int i = 0; i < kN / 64; ++i) {
      const int n = row + 64 * i, m = n % 32, place = n - m + m % 8 / 2 * 8 + m / 8 * 2 + m % 2;
      unsigned char* to = tile + (kProductRows + place) * kTileRow + piece * 16;
      if (left > 0 && first_n + n < p.n)
        copy_async<uint4>(to, w + (first_n + n) * p.w.of_row + at);
      else
        *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
    }
  };
  const auto put = [&](int k, unsigned char* tile) {
    const int at = k + piece * P::kSize, left = p.k - at;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t pixel = first_pixel + row + 64 * i;
      if (p.normal.stats && pixel < p.pixels)
        next_a[i].normalise(p.normal, p.normal.stats[image * p.normal.of_image + pixel], at, left);
      *reinterpret_cast<P*>(tile + (row + 64 * i) * kTileRow + piece * 16) = next_a[i];
    }
  };

  float sums[kM][4][4] = {};
  constexpr int kChunk = 64 / static_cast<int>(sizeof(T));
  load(0, shared);
  put(0, shared);
  wait_for_copies();
  __syncthreads();
  for (int k = 0, buffer = 0; k < p.k; k += kChunk, buffer ^= 1) {
    if (k + kChunk < p.k) load(k + kChunk, shared + (buffer ^ 1) * kBuffer);
    const unsigned char* tile = shared + buffer * kBuffer;
#pragma unroll
    for (int step = 0; step < 64; step += 32) {
      uint32_t right[2][4];
#pragma unroll
      for (int j = 0; j < 2; ++j) load_rows(right[j], tile + (kProductRows + n0 + j * 16) * kTileRow + step, kTileRow);
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        uint32_t left[4];
        load_rows(left, tile + (m0 + i * 16) * kTileRow + step, kTileRow);
#pragma unroll
        for (int j = 0; j < 4; ++j) mma(sums[i][j], left, {right[j / 2][j % 2], right[j / 2][j % 2 + 2]}, T{});
      }
    }
    if (k + kChunk < p.k) put(k + kChunk, shared + (buffer ^ 1) * kBuffer);
    wait_for_copies();
    __syncthreads();
  }

  const int n = first_n + n0 + lane % 4 * 8;
  Out* out = p.out.of(image, head);
  const T* residual = p.residual.data ? p.residual.of(image, head) : nullptr;
  const float* scale = p.scale ? p.scale + int64_t{blockIdx.z} * p.n : nullptr;
  const float* factor = p.factor ? p.factor + int64_t{blockIdx.z} * p.n : nullptr;
#pragma unroll
  for (int i = 0; i < kM; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t pixel = first_pixel + m0 + i * 16 + half * 8 + lane / 4;
      if (pixel >= p.pixels) continue;
      float v[8];
#pragma unroll
      for (int c = 0; c < 8; ++c) v[c] = sums[i][c / 2][half * 2 + c % 2] * (factor && n + c < p.n ? factor[n + c] : 1.0f);
      if (residual)
#pragma unroll
        for (int from = 0; from < 8; from += P::kSize) {
          P added;
          added.load(residual + pixel * p.residual.of_row + n + from, p.n - n - from, p.out_vectors);
#pragma unroll
          for (int e = 0; e < P::kSize; ++e)
            v[from + e] += to_float(added.v[e]) * (scale && n + from + e < p.n ? scale[n + from + e] : 1.0f);
        }
#pragma unroll
      for (int from = 0; from < 8; from += Piece<Out>::kSize) {
        Piece<Out> result;
#pragma unroll
        for (int e = 0; e < Piece<Out>::kSize; ++e) result.v[e] = from_float<Out>(v[from + e]);
        result.store(out + pixel * p.out.of_row + n + from, p.n - n - from, p.out_vectors);
      }
    }
}

template <class T, class Out = T>
void product(Product<T, Out> p, int64_t images, cudaStream_t stream) {
  p.a_vectors = p.a.aligned();
  p.out_vectors = p.out.aligned() && (!p.residual.data || p.residual.aligned());
  const auto run = [&](auto kernel, int width) {
    const dim3 grid(ceil_div(p.pixels, kProductRows), ceil_div(p.n, width), images * p.heads);
    launch(kernel, grid, dim3(256), 2 * (kProductRows + width) * kTileRow, stream, p);
  };
  const int over = p.n % 128;  // columns of a last tile: wide ones only where they are mostly full
  over == 0 || over > 64 ? run(multiply<T, Out, 128>, 128) : run(multiply<T, Out, 64>, 64);
}

// sums[split][matrix][m][n] (+)= Σ_p a[p][m]·b[p][n]. A matrix is a head of an image, or of all images together.
template <class T>
struct Outer {
  Rows<const T> a, b;
  Normal normal;  // of b
  float* sums;
  int64_t images;  // that one matrix sums over
  int64_t pixels;  // of an image
  int m, n, heads;
  bool add, a_vectors, b_vectors;
};

constexpr int kOuterTile = 64, kOuterPixels = 32;
template <class T>
constexpr int kOuterRow = kOuterTile * static_cast<int>(sizeof(T)) + (sizeof(T) == 2 ? 16 : 32);  // bytes, against bank conflicts

// A block owns 64 × 64 sums over its split of the pixels, a warp 32 × 32. The tensor cores' sums are moved to others every 256
// pixels: they cut instead of rounding, and a long sum would drift.
template <class T>
__global__ void __launch_bounds__(128) multiply_outer(Outer<T> p) {
  AUTOHDR_DYNAMIC_SHARED(unsigned char, shared);
  using P = Piece<T>;
  constexpr int kRow = kOuterRow<T>, kTile = kOuterPixels * kRow, kAcross = kOuterTile / P::kSize,
                kPieces = kOuterPixels * kAcross / 128;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int tiles = (p.n + kOuterTile - 1) / kOuterTile, first_m = blockIdx.x / tiles * kOuterTile,
            first_n = blockIdx.x % tiles * kOuterTile;
  const int64_t head = blockIdx.y % p.heads, first_image = blockIdx.y / p.heads;
  const int64_t chunks_each = (p.pixels + kOuterPixels - 1) / kOuterPixels, chunks = chunks_each * p.images;
  const int64_t begin = blockIdx.z * chunks / gridDim.z, end = (blockIdx.z + 1) * chunks / gridDim.z;

  P next_a[kPieces], next_b[kPieces];
  const auto load = [&](int64_t chunk) {
    const int64_t image = first_image + chunk / chunks_each, first = chunk % chunks_each * kOuterPixels;
    const T *a = p.a.of(image, head), *b = p.b.of(image, head);
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int at = threadIdx.x + i * 128, column = at % kAcross * P::kSize;
      const int64_t pixel = first + at / kAcross;
      const bool inside = pixel < p.pixels;
      next_a[i].load(a + pixel * p.a.of_row + first_m + column, inside ? p.m - first_m - column : 0, p.a_vectors);
      next_b[i].load(b + pixel * p.b.of_row + first_n + column, inside ? p.n - first_n - column : 0, p.b_vectors);
      if (p.normal.stats && inside)
        next_b[i].normalise(p.normal, p.normal.stats[image * p.normal.of_image + pixel], first_n + column,
                            p.n - first_n - column);
    }
  };
  const auto put = [&](unsigned char* tile) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int at = threadIdx.x + i * 128, place = at / kAcross * kRow + at % kAcross * 16;
      *reinterpret_cast<P*>(tile + place) = next_a[i];
      *reinterpret_cast<P*>(tile + kTile + place) = next_b[i];
    }
  };

  float total[2][4][4] = {}, sums[2][4][4] = {};
  const auto move_sums = [&] {
#pragma unroll
    for (int i = 0; i < 32; ++i) (&total[0][0][0])[i] += (&sums[0][0][0])[i], (&sums[0][0][0])[i] = 0;
  };
  const int m0 = warp / 2 * 32, n0 = warp % 2 * 32;
  if (begin < end) load(begin), put(shared);
  __syncthreads();
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int buffer = (chunk - begin) % 2;
    if (chunk + 1 < end) load(chunk + 1);
    const unsigned char* tile = shared + buffer * 2 * kTile;
#pragma unroll
    for (int k = 0; k < kOuterPixels; k += kStep<T>) {
      uint32_t left[2][4], right[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        load_columns<T>(left[i], tile + k * kRow + (m0 + i * 16) * sizeof(T), kRow);
        load_columns<T>(right[i], tile + kTile + k * kRow + (n0 + i * 16) * sizeof(T), kRow);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) mma(sums[i][j], left[i], {right[j / 2][j % 2], right[j / 2][j % 2 + 2]}, T{});
    }
    if ((chunk - begin) % 8 == 7) move_sums();
    if (chunk + 1 < end) put(shared + (buffer ^ 1) * 2 * kTile);
    __syncthreads();
  }
  move_sums();
  float* out = p.sums + (int64_t{blockIdx.z} * gridDim.y + blockIdx.y) * p.m * p.n;
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int m = first_m + m0 + i * 16 + e / 2 * 8 + lane / 4, n = first_n + n0 + j * 8 + lane % 4 * 2 + e % 2;
        if (m >= p.m || n >= p.n) continue;
        float& sum = out[int64_t{m} * p.n + n];
        sum = p.add ? sum + total[i][j][e] : total[i][j][e];
      }
}

// In how many parts a sum of m × n products over the pixels is taken, to fill the device; independent of it, so that results are
// the same on all.
inline int64_t splits_of(int64_t m, int64_t n, int64_t matrices, int64_t pixels) {
  const int64_t blocks = ceil_div(m, kOuterTile) * ceil_div(n, kOuterTile) * matrices;
  return std::clamp<int64_t>(ceil_div(512, blocks), 1, std::max<int64_t>(1, std::min<int64_t>(256, pixels / 256)));
}

template <class T>
void outer(Outer<T> p, int64_t matrices, int64_t splits, cudaStream_t stream) {
  p.a_vectors = p.a.aligned(), p.b_vectors = p.b.aligned();
  const dim3 grid(ceil_div(p.m, kOuterTile) * ceil_div(p.n, kOuterTile), matrices, splits);
  launch(multiply_outer<T>, grid, dim3(128), 4 * kOuterPixels * kOuterRow<T>, stream, p);
}

// Where element i of a padded or transposed copy lies in the original, axis by axis: groups of `from` places become groups of
// `to`. Beyond them there is none, and the copy holds 0.
struct Axis {
  int64_t to, from, groups, stride;
  __device__ bool has(int64_t i) const { return i / to < groups && i % to < from; }
  __device__ int64_t place(int64_t i) const { return (i / to * from + i % to) * stride; }
};
struct Gather {
  Axis rows, columns;
  int64_t count, width;  // elements and columns of the copy
  int64_t offset = 0, slot = 0;
  int slots = 1;  // copies that are added up
};

// A block owns blockDim.x elements at a time, a thread every blockDim.y-th slot of one.
constexpr int kSlotThreads = 8;
template <class T>
__global__ void __launch_bounds__(256) gather_elements(Gather g, const float* from, T* to) {
  __shared__ double sums[kSlotThreads][32];
  for (int64_t first = int64_t{blockIdx.x} * blockDim.x; first < g.count; first += int64_t{gridDim.x} * blockDim.x) {
    const int64_t i = first + threadIdx.x, row = i / g.width, column = i % g.width;
    double sum = 0;
    if (i < g.count && g.rows.has(row) && g.columns.has(column)) {
      const float* at = from + g.offset + g.rows.place(row) + g.columns.place(column);
#pragma unroll 4
      for (int s = threadIdx.y; s < g.slots; s += blockDim.y) sum += at[s * g.slot];
    }
    if (blockDim.y > 1) {
      sums[threadIdx.y][threadIdx.x] = sum;
      __syncthreads();
      if (threadIdx.y == 0)
        for (int s = 1; s < kSlotThreads; ++s) sum += sums[s][threadIdx.x];
      __syncthreads();
    }
    if (threadIdx.y > 0 || i >= g.count) continue;
    if constexpr (std::is_same_v<T, double>)
      to[i] = sum;
    else
      to[i] = from_float<T>(static_cast<float>(sum));
  }
}

template <class T>
void gather(const Gather& g, const float* from, T* to, cudaStream_t stream) {
  const dim3 block = g.slots > kSlotThreads ? dim3(32, kSlotThreads) : dim3(256);
  if (g.count)
    launch(gather_elements<T>, dim3(std::min<int64_t>(ceil_div(g.count, block.x), 8192)), block, 0, stream, g, from, to);
}

// to[i] = Σ_slot from[slot][i].
template <class T>
void add_up(const float* from, int64_t slots, int64_t count, T* to, cudaStream_t stream) {
  gather<T>({{1, 1, 1, 0}, {count, count, 1, 1}, count, count, 0, count, static_cast<int>(slots)}, from, to, stream);
}

// Rows first .. first + rows of each image of a step, in a buffer or in the image itself.
template <class T>
struct View {
  T* data;  // row `first` of the step's first image
  int64_t of_image;
  int first, rows, width, channels;  // channels: from a pixel to the next
  __host__ __device__ T* at(int64_t image, int y, int x) const {
    return data + image * of_image + ((y - first) * int64_t{width} + x) * channels;
  }
  template <class U, class = std::enable_if_t<std::is_same_v<U, const T>>>
  operator View<U>() const {
    return {data, of_image, first, rows, width, channels};
  }
  // Rows y0 .. of the view as matrices of pixels × channels.
  Rows<T> from(int y0, int64_t of_head = 0) const { return {at(0, y0, 0), of_image, channels, of_head}; }
};

// The mean of a pixel's channels, by a warp. Summed as differences from the first channel: the mean of equal channels is exact, whose
// rounding 1 / √eps would multiply.
template <class T>
__device__ __forceinline__ float mean_of(const T* at, int channels) {
  const float origin = to_float(at[0]);
  float sum = 0;
  for (int c = threadIdx.x % 32; c < channels; c += 32) sum += to_float(at[c]) - origin;
  return origin + warp_sum(sum) / channels;
}

// Shift and factor of every pixel's norm: mean (0 without a bias) and 1 / sqrt(variance + eps). A warp owns a pixel.
template <class T>
__global__ void norm_stats(View<const T> x, int64_t pixels, int channels, bool with_mean, float eps, float2* stats) {
  const int lane = threadIdx.x % 32;
  const int64_t pixel = int64_t{blockIdx.x} * (blockDim.x / 32) + threadIdx.x / 32;
  if (pixel >= pixels) return;
  const T* at = x.data + blockIdx.y * x.of_image + pixel * x.channels;
  const float mean = mean_of(at, channels);
  float squares = 0;
  for (int c = lane; c < channels; c += 32) {
    const float v = to_float(at[c]) - mean;
    squares += v * v;
  }
  const float factor = 1.0f / sqrtf(warp_sum(squares) / channels + eps);
  if (lane == 0) stats[blockIdx.y * pixels + pixel] = make_float2(with_mean ? mean : 0.0f, factor);
}

// Two neighbouring channels.
__device__ __forceinline__ float2 load_pair(const float* p) { return *reinterpret_cast<const float2*>(p); }
__device__ __forceinline__ float2 load_pair(const __nv_bfloat16* p) {
  const uint32_t bits = *reinterpret_cast<const uint32_t*>(p);
  return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
}
__device__ __forceinline__ float2 load_pair(const __half* p) { return __half22float2(*reinterpret_cast<const __half2*>(p)); }
__device__ __forceinline__ void store_pair(float* p, float2 v) { *reinterpret_cast<float2*>(p) = v; }
__device__ __forceinline__ void store_pair(__nv_bfloat16* p, float2 v) {
  *reinterpret_cast<__nv_bfloat162*>(p) = __floats2bfloat162_rn(v.x, v.y);
}
__device__ __forceinline__ void store_pair(__half* p, float2 v) { *reinterpret_cast<__half2*>(p) = __floats2half2_rn(v.x, v.y); }
__device__ __forceinline__ void add_product(float2& sum, float2 a, float2 b) { sum.x += a.x * b.x, sum.y += a.y * b.y; }

// How the depthwise kernels share a step: lanes own pairs of channels, a warp walks a segment of two rows from left to right.
constexpr int kSegment = 32;
struct Walk {
  int first, last;  // rows
  int height, width;
  int channels;  // of one part, even
  int part;      // channels from a part to the next
  int64_t images;
  __host__ __device__ int64_t segments() const { return (width + kSegment - 1) / kSegment; }
  __host__ __device__ int64_t units() const { return (last - first + 1) / 2 * segments(); }
};

// f(y, x, channel, 3×3 convolution of each part there). in: its rows must reach from first - 1 to last + 1, where the image does.
template <int kParts, class T, class F>
__device__ __forceinline__ void convolve(const Walk& walk, const View<const T>& in, const float* weight /* [9][in.channels] */,
                                         const F& f) {
  const int64_t unit = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  const int channel = (blockIdx.y * 32 + threadIdx.x) * 2;
  if (unit >= walk.units() || channel >= walk.channels) return;
  const int y0 = walk.first + static_cast<int>(unit / walk.segments()) * 2,
            x0 = static_cast<int>(unit % walk.segments()) * kSegment;
  const int x1 = min(x0 + kSegment, walk.width);
  float2 w[kParts][9], before[kParts][2] = {}, here[kParts][2] = {};
#pragma unroll
  for (int part = 0; part < kParts; ++part)
#pragma unroll
    for (int t = 0; t < 9; ++t) w[part][t] = load_pair(weight + t * in.channels + part * walk.part + channel);
  for (int x = x0 - 1; x <= x1; ++x) {
    float2 next[kParts][2] = {};
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int y = y0 - 1 + r;
      if (x < 0 || x >= walk.width || y < 0 || y >= walk.height || y > walk.last) continue;
      const T* at = in.at(blockIdx.z, y, x) + channel;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const float2 v = load_pair(at + part * walk.part);
#pragma unroll
        for (int o = 0; o < 2; ++o) {
          if (r - o < 0 || r - o > 2) continue;
          add_product(before[part][o], w[part][(r - o) * 3 + 2], v);
          add_product(here[part][o], w[part][(r - o) * 3 + 1], v);
          add_product(next[part][o], w[part][(r - o) * 3], v);
        }
      }
    }
#pragma unroll
    for (int o = 0; o < 2; ++o) {
      if (x > x0 && y0 + o < walk.last) {
        float2 result[kParts];
#pragma unroll
        for (int part = 0; part < kParts; ++part) result[part] = before[part][o];
        f(y0 + o, x - 1, channel, result);
      }
#pragma unroll
      for (int part = 0; part < kParts; ++part) before[part][o] = here[part][o], here[part][o] = next[part][o];
    }
  }
}

inline int64_t walk_blocks(const Walk& walk) { return ceil_div(walk.units(), 8); }  // of 64 channels of an image

template <class... Parameters, class... Arguments>
void launch_walk(void (*kernel)(Walk, Parameters...), const Walk& walk, cudaStream_t stream, const Arguments&... arguments) {
  const dim3 grid(walk_blocks(walk), ceil_div(walk.channels, 64), walk.images);
  launch(kernel, grid, dim3(32, 8), 0, stream, walk, arguments...);
}

// out = 3×3 convolution of in.
template <class T>
__global__ void __launch_bounds__(256) depthwise(Walk walk, View<const T> in, const float* weight, View<T> out) {
  convolve<1>(walk, in, weight,
              [&](int y, int x, int channel, const float2(&v)[1]) { store_pair(out.at(blockIdx.z, y, x) + channel, v[0]); });
}

// slots[slot][9][channels] (+)= Σ d(y, x)·in(y + i - 1, x + j - 1): the convolution's weight gradient.
constexpr int kWeightSlots = 64;
template <class T>
__global__ void __launch_bounds__(256)
    depthwise_weight_grad(Walk walk, View<const T> in, View<const T> d, float* slots, bool add) {
  AUTOHDR_DYNAMIC_SHARED(float2, shared);  // [warp][9][32]
  const int channel = (blockIdx.x * 32 + threadIdx.x) * 2;
  float2 sums[9] = {};
  const int64_t rows = walk.last - walk.first, units = walk.images * rows * walk.segments();
  if (channel < walk.channels)
    for (int64_t unit = int64_t{blockIdx.y} * 8 + threadIdx.y; unit < units; unit += int64_t{gridDim.y} * 8) {
      const int64_t image = unit / (rows * walk.segments());
      const int y = walk.first + static_cast<int>(unit / walk.segments() % rows),
                x0 = static_cast<int>(unit % walk.segments()) * kSegment;
      const int x1 = min(x0 + kSegment, walk.width);
      float2 left[3] = {}, here[3] = {};
      for (int x = x0 - 1; x <= x1; ++x) {
        float2 right[3] = {};
#pragma unroll
        for (int i = 0; i < 3; ++i)
          if (x >= 0 && x < walk.width && y + i >= 1 && y + i <= walk.height)
            right[i] = load_pair(in.at(image, y + i - 1, x) + channel);
        if (x > x0) {
          const float2 g = load_pair(d.at(image, y, x - 1) + channel);
#pragma unroll
          for (int i = 0; i < 3; ++i) {
            add_product(sums[i * 3], g, left[i]);
            add_product(sums[i * 3 + 1], g, here[i]);
            add_product(sums[i * 3 + 2], g, right[i]);
          }
        }
#pragma unroll
        for (int i = 0; i < 3; ++i) left[i] = here[i], here[i] = right[i];
      }
    }
#pragma unroll
  for (int t = 0; t < 9; ++t) shared[(threadIdx.y * 9 + t) * 32 + threadIdx.x] = sums[t];
  __syncthreads();
  for (int t = threadIdx.y; t < 9; t += 8) {
    if (channel >= walk.channels) continue;
    float2 sum = make_float2(0, 0);
    for (int w = 0; w < 8; ++w)
      sum.x += shared[(w * 9 + t) * 32 + threadIdx.x].x, sum.y += shared[(w * 9 + t) * 32 + threadIdx.x].y;
    float2& slot = *reinterpret_cast<float2*>(slots + (int64_t{blockIdx.y} * 9 + t) * in.channels + channel);
    slot = add ? make_float2(slot.x + sum.x, slot.y + sum.y) : sum;
  }
}

// dx = dy + gradient of the norm, and slots[slot][2][channels] (+)= gradients of its weight and bias. A warp owns kNormChannels of a
// pixel, of which it reads all: their sums take 48 KB of shared memory, which every GPU gives.
constexpr int kNormSlots = 256, kNormWarps = 8, kNormChannels = 768;
template <class T>
__global__ void __launch_bounds__(kNormWarps * 32)
    norm_backward(View<const T> x, View<const float> d_normal, View<const T> dy, View<T> dx, int64_t images, int64_t pixels,
                  int channels, bool biased, const float* weight, float eps, float* slots, bool add) {
  AUTOHDR_DYNAMIC_SHARED(float, shared);  // [warp][2][own channels]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = blockIdx.y * kNormChannels,
            own = min(channels - first, kNormChannels);
  float *d_weight = shared + warp * 2 * own, *d_bias = d_weight + own;
  for (int c = lane; c < 2 * own; c += 32) d_weight[c] = 0;
  __syncwarp();
  for (int64_t i = int64_t{blockIdx.x} * kNormWarps + warp; i < images * pixels; i += int64_t{gridDim.x} * kNormWarps) {
    const int64_t image = i / pixels, pixel = i % pixels;
    const T* px = x.data + image * x.of_image + pixel * x.channels;
    const float* pd = d_normal.data + image * d_normal.of_image + pixel * d_normal.channels;
    const T* py = dy.data + image * dy.of_image + pixel * dy.channels;
    T* out = dx.data + image * dx.of_image + pixel * dx.channels;
    const float mean = mean_of(px, channels);
    float squares = 0, g_sum = 0, gx_sum = 0;
    for (int c = lane; c < channels; c += 32) {
      const float centred = to_float(px[c]) - mean, g = pd[c] * weight[c];
      squares += centred * centred, g_sum += g, gx_sum += g * (biased ? centred : to_float(px[c]));
    }
    const float factor = 1.0f / sqrtf(warp_sum(squares) / channels + eps);
    g_sum = biased ? warp_sum(g_sum) / channels : 0.0f;
    gx_sum = warp_sum(gx_sum) / channels * factor * factor;
    for (int i = lane; i < own; i += 32) {
      const int c = first + i;
      const float value = to_float(px[c]), centred = value - mean, d = pd[c];
      out[c] = from_float<T>(to_float(py[c]) + factor * (d * weight[c] - g_sum - centred * gx_sum));
      d_weight[i] += d * (biased ? centred : value) * factor;
      d_bias[i] += d;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 2 * own; i += kNormWarps * 32) {
    float sum = 0;
    for (int w = 0; w < kNormWarps; ++w) sum += shared[w * 2 * own + i];
    float& slot = slots[(int64_t{blockIdx.x} * 2 + i / own) * channels + first + i % own];
    slot = add ? slot + sum : sum;
  }
}

// Bytes of a step's buffers: within the second-level cache of the larger GPUs forward, and in few steps backward. The emulation
// takes several steps of its small images.
#ifdef AUTOHDR_EMULATION
constexpr int64_t kForwardBudget = 48 << 10, kBackwardBudget = 320 << 10;
#else
constexpr int64_t kForwardBudget = 32 << 20, kBackwardBudget = 96 << 20;
#endif
constexpr int64_t kMostImages = 65535;  // of a step: a grid's z

// The images of a call.
struct Shape {
  int64_t batch;
  int height, width, channels;
};

// A walk over rows first .. last of the images, in steps.
struct Steps {
  int64_t batch, images;
  int height, first, last, rows;

  // So that rows, of pixel_bytes a pixel, and `halo` on each side stay within `budget`; at most max_images at once.
  Steps(const Shape& s, int64_t pixel_bytes, int halo, int64_t budget, int64_t max_images)
      : Steps(s, 0, s.height, pixel_bytes, halo, budget, max_images) {}
  Steps(const Shape& s, int first, int last, int64_t pixel_bytes, int halo, int64_t budget, int64_t max_images)
      : batch(s.batch), images(1), height(s.height), first(first), last(last) {
    const int64_t row_bytes = pixel_bytes * s.width;
    rows = static_cast<int>(std::clamp<int64_t>(budget / row_bytes - 2 * halo, 1, last - first));
    if (rows == last - first)
      images =
          std::clamp<int64_t>(budget / (row_bytes * buffer_rows(halo)), 1, std::max<int64_t>(1, std::min(s.batch, max_images)));
  }
  int buffer_rows(int halo) const { return std::min(rows + 2 * halo, height); }
  // f(first image, images), all rows of them: one step or, image by image, several.
  template <class F>
  void each_group(const F& f) const {
    for (int64_t b = 0; b < batch; b += images) f(b, std::min(images, batch - b));
  }
  // f(first row, rows).
  template <class F>
  void each_strip(const F& f) const {
    for (int y = first; y < last; y += rows) f(y, std::min(rows, last - y));
  }
  // f(first image, images, first row, rows).
  template <class F>
  void each(const F& f) const {
    each_group([&](int64_t b, int64_t count) { each_strip([&](int y, int strip) { f(b, count, y, strip); }); });
  }
};

// Images b.. of a tensor [B, H, W, C], from row y on.
template <class T>
View<T> view_of(T* data, const Shape& s, int64_t b, int y) {
  const int64_t row = int64_t{s.width} * s.channels;
  return {data + (b * s.height + y) * row, s.height * row, y, s.height - y, s.width, s.channels};
}

// A buffer with rows y0 - halo .. y1 + halo of a step, as far as the image has them.
template <class T>
View<T> buffer_view(T* data, const Shape& s, int y, int rows, int halo, int64_t channels) {
  const int first = std::max(0, y - halo), last = std::min(s.height, y + rows + halo);
  return {data, int64_t{last - first} * s.width * channels, first, last - first, s.width, static_cast<int>(channels)};
}

// The head of both ops: hidden = 1×1 of the layer norm of x, padded to groups of `padded` channels.
struct Head {
  Shape shape;
  const float *norm_weight, *norm_bias, *weight /* [groups·size, C] */, *dwconv /* [groups·size, 9] */;
  float eps;
  int64_t groups, size, padded;
  int64_t hidden() const { return groups * padded; }  // channels of the padded hidden image
};

// The head's weights as its kernels want them.
template <class T>
struct HeadWeights {
  T* weight;       // [hidden][C padded]
  T* transposed;   // [C][hidden]; backward only
  float* dwconv;   // [9][hidden]
  float* flipped;  // [9][hidden]; backward only

  HeadWeights(Workspace& memory, const Head& h, bool backward) {
    const int64_t columns = round_up(h.shape.channels, 8);
    weight = memory.take<T>(h.hidden() * columns);
    dwconv = memory.take<float>(9 * h.hidden());
    transposed = backward ? memory.take<T>(h.shape.channels * h.hidden()) : nullptr;
    flipped = backward ? memory.take<float>(9 * h.hidden()) : nullptr;
  }
  void fill(const Head& h, cudaStream_t stream) const {
    const int64_t c = h.shape.channels, columns = round_up(c, 8), hidden = h.hidden();
    const Axis rows{h.padded, h.size, h.groups, c}, taps{9, 9, 1, 1}, each{h.padded, h.size, h.groups, 9};
    gather<T>({rows, {columns, c, 1, 1}, hidden * columns, columns}, h.weight, weight, stream);
    gather<float>({taps, each, 9 * hidden, hidden}, h.dwconv, dwconv, stream);
    if (!transposed) return;
    gather<T>({{c, c, 1, 1}, rows, c * hidden, hidden}, h.weight, transposed, stream);
    gather<float>({{9, 9, 1, -1}, each, 9 * hidden, hidden, 8}, h.dwconv, flipped, stream);
  }
};

// hidden, rows of its view; stats of the same rows.
template <class T>
void expand(const Head& h, const HeadWeights<T>& w, View<const T> x, int64_t images, float2* stats, View<T> hidden,
            cudaStream_t stream) {
  const int64_t pixels = int64_t{hidden.rows} * hidden.width, columns = round_up(h.shape.channels, 8);
  const View<const T> rows{x.at(0, hidden.first, 0), x.of_image, hidden.first, hidden.rows, x.width, x.channels};
  launch(norm_stats<T>, dim3(ceil_div(pixels, 8), images), dim3(256), 0, stream, rows, pixels, h.shape.channels,
         h.norm_bias != nullptr, h.eps, stats);
  product<T>({rows.from(hidden.first),
              {w.weight, 0, columns, 0},
              {},
              hidden.from(hidden.first),
              {stats, pixels, h.norm_weight, h.norm_bias},
              nullptr,
              pixels,
              h.shape.channels,
              hidden.channels,
              1},
             images, stream);
}

// The backward pass of a head, given d: the gradient of its 3×3 convolution's result.
template <class T>
struct HeadBackward {
  T* d_hidden;
  float *d_normal, *d_weight, *d_dwconv, *d_norm;  // slots
  int64_t splits;

  HeadBackward(Workspace& memory, const Head& h, int64_t images, int64_t rows) {
    const int64_t pixels = images * rows * h.shape.width;
    splits = splits_of(h.hidden(), h.shape.channels, 1, pixels);
    d_hidden = memory.take<T>(pixels * h.hidden());
    d_normal = memory.take<float>(pixels * round_up(h.shape.channels, 8));
    d_weight = memory.take<float>(splits * h.hidden() * h.shape.channels);
    d_dwconv = memory.take<float>(kWeightSlots * 9 * h.hidden());
    d_norm = memory.take<float>(kNormSlots * 2 * h.shape.channels);
  }
  static int64_t pixel_bytes(const Head& h) {
    return h.hidden() * static_cast<int64_t>(sizeof(T)) + round_up(h.shape.channels, 8) * 4;
  }

  // Rows y .. y + rows of `images` images: dx, and the sums. hidden reaches two rows further, d one.
  void step(const Head& h, const HeadWeights<T>& w, int64_t images, int y, int rows, View<const T> x, View<const T> dy,
            View<T> dx, const float2* stats, View<const T> hidden, View<const T> d, bool first, cudaStream_t stream) const {
    const int channels = h.shape.channels, width = h.shape.width;
    const int64_t pixels = int64_t{rows} * width;
    const View<T> dh = buffer_view(d_hidden, h.shape, y, rows, 0, h.hidden());
    const View<float> dn = buffer_view(d_normal, h.shape, y, rows, 0, round_up(channels, 8));
    const Walk walk{y, y + rows, h.shape.height, width, static_cast<int>(h.hidden()), 0, images};
    launch_walk(depthwise<T>, walk, stream, d, w.flipped, dh);
    launch(depthwise_weight_grad<T>, dim3(ceil_div(h.hidden(), 64), kWeightSlots), dim3(32, 8), 8 * 9 * 32 * sizeof(float2),
           stream, walk, hidden, d, d_dwconv, !first);
    const int64_t stats_image = int64_t{hidden.rows} * width;
    const Rows<const T> normal_of{x.at(0, y, 0), x.of_image, x.channels, 0};
    const Normal normal{stats + int64_t{y - hidden.first} * width, stats_image, h.norm_weight, h.norm_bias};
    outer<T>({dh.from(y), normal_of, normal, d_weight, images, pixels, static_cast<int>(h.hidden()), channels, 1, !first}, 1,
             splits, stream);
    product<T, float>({dh.from(y),
                       {w.transposed, 0, h.hidden(), 0},
                       {},
                       dn.from(y),
                       {},
                       nullptr,
                       pixels,
                       static_cast<int>(h.hidden()),
                       channels,
                       1},
                      images, stream);
    const View<const T> x_rows{x.at(0, y, 0), x.of_image, y, rows, width, channels},
        dy_rows{dy.at(0, y, 0), dy.of_image, y, rows, width, channels};
    launch(norm_backward<T>, dim3(kNormSlots, ceil_div(channels, kNormChannels)), dim3(kNormWarps * 32),
           kNormWarps * 2 * std::min(channels, kNormChannels) * sizeof(float), stream, x_rows, dn, dy_rows,
           View<T>{dx.at(0, y, 0), dx.of_image, y, rows, width, channels}, images, pixels, channels, h.norm_bias != nullptr,
           h.norm_weight, h.eps, d_norm, !first);
  }

  // any: whether there was a step; without one the gradients are 0.
  void finish(const Head& h, bool any, float* norm_weight, float* norm_bias, float* weight, float* dwconv,
              cudaStream_t stream) const {
    const int64_t c = h.shape.channels, real = h.groups * h.size;
    gather<float>(
        {{h.size, h.padded, h.groups, c}, {c, c, 1, 1}, real * c, c, 0, h.hidden() * c, any ? static_cast<int>(splits) : 0},
        d_weight, weight, stream);
    gather<float>(
        {{h.size, h.padded, h.groups, 1}, {9, 9, 1, h.hidden()}, real * 9, 9, 0, 9 * h.hidden(), any ? kWeightSlots : 0},
        d_dwconv, dwconv, stream);
    const Gather norm{{1, 1, 1, 0}, {c, c, 1, 1}, c, c, 0, 2 * c, any ? kNormSlots : 0};
    gather<float>(norm, d_norm, norm_weight, stream);
    if (h.norm_bias) gather<float>(norm, d_norm + c, norm_bias, stream);
  }
};

}  // namespace image
}  // namespace autohdr
