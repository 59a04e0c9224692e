// Norm, 1×1 and 3×3, and the product after them as one kernel, for few channels of half precision: between x and the result nothing
// leaves the multiprocessor.
//
// A block owns 8 × 16 pixels at a time. It normalises them and those around them, and then goes through the hidden channels, those of
// 32 of the product at a time: 1×1 of the pixels and their neighbours, 3×3 (and gate) into a tile in shared memory, product.
#pragma once
#include "common/cuda_expansion.cuh"

namespace autohdr {
namespace image {

// kTiles: of 16 channels of x, at least; kParts of the 3×3's channels make one of the product's; kRow: bytes of a pixel's in the tile
// for the product. Rows in shared memory are odd numbers of pieces, against bank conflicts.
template <class T, int kTiles_, int kParts_, int kRow_>
struct FusedTile {
  static constexpr int kTiles = kTiles_, kParts = kParts_, kRow = kRow_;
  static constexpr int kRows = 8, kColumns = 16, kPixels = kRows * kColumns, kAcross = kColumns + 2,
                       kNear = (kRows + 2) * kAcross, kNearTile = 192, kThreads = 256;
  static constexpr int kChannels = kTiles * 16, kMiddle = 32, kHidden = kMiddle * kParts;
  static constexpr int kNormalRow = kChannels * 2 + 16, kHiddenRow = kHidden * 2 + 16;
  static constexpr int kNormalBytes = kNearTile * kNormalRow, kHiddenBytes = kNearTile * kHiddenRow, kBytes = kPixels * kRow,
                       kInBytes = kHidden * kNormalRow, kShared = kNormalBytes + kHiddenBytes + kBytes + kInBytes;
  static constexpr int kInTiles = kHidden / 16;                                       // of 8 hidden channels that a warp makes
  static constexpr int kAtOnce = kTiles > 3 && kParts > 1 ? 2 : 4;                    // columns of the 3×3, likewise
  static constexpr int kMade = kTiles > 3 && kInTiles > 2 ? kInTiles / 2 : kInTiles;  // of them that registers have room for

  const View<const T>& x;  // the images as a whole
  unsigned char *normal, *hidden, *in, *tile;
  int64_t image;
  int y0, x0;
  uint32_t made_inside;  // which of the six pixels that this thread makes hidden channels of are in the image

  __device__ FusedTile(const View<const T>& x_, unsigned char* shared)
      : x(x_), normal(shared), hidden(normal + kNormalBytes), in(hidden + kHiddenBytes), tile(in + kInBytes), image(blockIdx.y),
        y0(0), x0(0), made_inside(0) {}
  static int64_t count(const View<const T>& x, const Range& rows) {
    return ceil_div(x.width, kColumns) * ceil_div(rows.size(), kRows);
  }
  // Goes to a tile of the rows from `first` on.
  __device__ __forceinline__ void start(int index, int first) {
    const int across = (x.width + kColumns - 1) / kColumns;
    y0 = first + index / across * kRows, x0 = index % across * kColumns;
    made_inside = 0;
#pragma unroll
    for (int i = 0; i < 6; ++i) {
      const int r = made_row(i);
      made_inside |= uint32_t{r < kNear && in_image(y0 - 1 + r / kAcross, x0 - 1 + r % kAcross)} << i;
    }
  }
  static __device__ __forceinline__ int made_row(int i) {
    return static_cast<int>(threadIdx.x) / 32 % 4 * 48 + i * 8 + static_cast<int>(threadIdx.x) % 32 / 4;
  }
  __device__ __forceinline__ bool in_image(int y, int x_) const { return y >= 0 && y < x.rows.end && x_ >= 0 && x_ < x.width; }

  // This thread copies pieces of a row of the 1×1's weight for hidden channel copied_row() of the next ones.
  static __device__ __forceinline__ int copied_row() { return threadIdx.x / 4; }
  static __device__ __forceinline__ int copied_piece() { return threadIdx.x % 4; }
  __device__ __forceinline__ void load_in(const T* row, bool there) const {
    const int piece = copied_piece();
    unsigned char* to = in + place_of(copied_row(), kInTiles) * kNormalRow + piece * 16;
#pragma unroll
    for (int i = 0; i < kTiles * 2; i += 4)
      if (copied_row() < kHidden && piece + i < kTiles * 2)
        copy_async_or_zero(to + i * 16, row + (piece + i) * 8, there && (piece + i) * 8 < x.channels);
  }

  // The norm of the pixels and those around them. Of pixels outside of the image it is the nearest one's, which is not used.
  __device__ __forceinline__ void normalise(const Norm& norm) const {
    if (x.channels < kChannels)
      for (int i = threadIdx.x; i < kNearTile * kTiles * 2; i += kThreads)
        if (i % (kTiles * 2) * 8 >= x.channels)
          *reinterpret_cast<uint4*>(normal + i / (kTiles * 2) * kNormalRow + i % (kTiles * 2) * 16) = make_uint4(0, 0, 0, 0);
    constexpr NormLanes<T> lanes(kChannels);
    const auto run = [&](int channels) {
      Norm own = norm;
      own.channels = channels;
      for (int r = lanes.group(); r < kNearTile; r += kThreads >> lanes.log_lanes) {
        const int at_y = min(max(y0 - 1 + r / kAcross, 0), x.rows.end - 1), at_x = min(max(x0 - 1 + r % kAcross, 0), x.width - 1);
        normalize(own, lanes, x.at(image, at_y, at_x), channels, [&](int channel, const float (&v)[8]) {
          store_floats(reinterpret_cast<T*>(normal + r * kNormalRow) + channel, v);
        });
      }
    };
    x.channels == kChannels ? run(kChannels) : run(x.channels);  // as a constant, it takes no branches
  }

  // kHidden channels of the 1×1, zeros outside of the image.
  __device__ __forceinline__ void expand() const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, m0 = warp % 4 * 48, n0 = warp / 4 * kHidden / 2;
#pragma unroll
    for (int from = 0; from < kInTiles; from += kMade) {
      float sums[3][kMade][4] = {};
#pragma unroll
      for (int k = 0; k < kTiles; ++k) {
        uint32_t right[kMade / 2][4];
#pragma unroll
        for (int j = 0; j < kMade / 2; ++j)
          load_matrices(right[j],
                        in + (n0 + from * 8 + j * 16 + right_lane().row) * kNormalRow + (k * 2 + right_lane().piece) * 16);
#pragma unroll
        for (int i = 0; i < 3; ++i) {
          uint32_t left[4];
          load_matrices(left, normal + (m0 + i * 16 + left_lane().row) * kNormalRow + (k * 2 + left_lane().piece) * 16);
#pragma unroll
          for (int j = 0; j < kMade; ++j) mma(sums[i][j], left, {right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]}, T{});
        }
      }
#pragma unroll
      for (int i = 0; i < 6; ++i) {
        Pairs<T, kMade> pairs = {};
        if (made_inside >> i & 1)
#pragma unroll
          for (int j = 0; j < kMade; ++j)
            pairs.v[j] = to_pair<T>(make_float2(sums[i / 2][j][i % 2 * 2], sums[i / 2][j][i % 2 * 2 + 1]));
        unsigned char* to = hidden + made_row(i) * kHiddenRow + (n0 + lane % 4 * 2 * kInTiles + from * 2) * 2;
        *reinterpret_cast<Pairs<T, kMade>*>(to) = pairs;
      }
    }
  }

  // A thread owns a pair of channels of 2 × 4 pixels.
  static __device__ __forceinline__ int pair() { return threadIdx.x % 16; }
  static __device__ __forceinline__ int unit_row() { return static_cast<int>(threadIdx.x) / 64 * 2; }
  static __device__ __forceinline__ int unit_column() { return static_cast<int>(threadIdx.x) / 16 % 4 * 4; }
  // The tile's columns from `column` on = f(row, column of the pixel, its 3×3) for every pixel. taps: of this lane's channels, `stride`
  // apart; zeros where they are not there.
  template <class F>
  __device__ __forceinline__ void convolve(const float* taps, int stride, bool there, int column, const F& f) const {
    unsigned char* to = tile + (unit_row() * kColumns + unit_column()) * kRow + (column + pair() * 2) * 2;
    if (!there) {
#pragma unroll
      for (int i = 0; i < 8; ++i) *reinterpret_cast<uint32_t*>(to + (i / 4 * kColumns + i % 4) * kRow) = 0;
      return;
    }
    float2 w[9][kParts];
#pragma unroll
    for (int t = 0; t < 9; ++t) {
      const auto pairs = load_pairs<kParts>(taps + t * stride);
#pragma unroll
      for (int part = 0; part < kParts; ++part) w[t][part] = to_float2(pairs.v[part]);
    }
    const unsigned char* from = hidden + (unit_row() * kAcross + unit_column()) * kHiddenRow + pair() * 4 * kParts;
#pragma unroll 1
    for (int first = 0; first < 4; first += kAtOnce, from += kAtOnce * kHiddenRow, to += kAtOnce * kRow) {
      float2 sums[kAtOnce][2][kParts] = {};  // column, row
#pragma unroll
      for (int x = 0; x < kAtOnce + 2; ++x) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const auto pairs = load_pairs<kParts>(reinterpret_cast<const T*>(from + (r * kAcross + x) * kHiddenRow));
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            const float2 v = to_float2(pairs.v[part]);
#pragma unroll
            for (int o = 0; o < 2; ++o)
#pragma unroll
              for (int c = 0; c < kAtOnce; ++c) {
                const int i = r - o, j = x - c;
                if (i >= 0 && i < 3 && j >= 0 && j < 3) add_product(sums[c][o][part], w[i * 3 + j][part], v);
              }
          }
        }
        if (x < 2) continue;
#pragma unroll
        for (int o = 0; o < 2; ++o)
          *reinterpret_cast<Pair<T>*>(to + (o * kColumns + x - 2) * kRow) =
              f(unit_row() + o, unit_column() + first + x - 2, sums[x - 2][o]);
      }
    }
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// y = x + w_out · Middle(3×3 of w_in · norm of x).

// The 3×3 alone, and gelu(a) ⊙ b of its two parts.
struct Convolved {
  static constexpr int kParts = 1;
  template <class T>
  static __device__ __forceinline__ float2 of(const float2 (&v)[1]) {
    return v[0];
  }
};
struct Gated {
  static constexpr int kParts = 2;
  template <class T>
  static __device__ __forceinline__ float2 of(const float2 (&v)[2]) {
    return make_float2(gelu<T>(v[0].x) * v[1].x, gelu<T>(v[0].y) * v[1].y);
  }
};

template <class T, int kTiles, class Middle>
struct Fused {
  static constexpr int kParts = Middle::kParts, kRow = 32 * 2 + 16;
  using Tile = FusedTile<T, kTiles, kParts, kRow>;
  static constexpr int kShared = Tile::kShared + Tile::kChannels * kRow;

  View<const T> x;  // the images as a whole, as y
  View<T> y;
  Norm norm;
  const T* w_in;            // [hidden][channels]
  const float* taps;        // [9][taps_stride], parts pair by pair
  Matrices<const T> w_out;  // [channels][hidden / parts]
  int hidden, taps_stride;

  __device__ __forceinline__ void run(unsigned char* shared) const {
    Tile t(x, shared);
    t.start(blockIdx.x, 0);
    unsigned char* out = shared + Tile::kShared;
    const int row = Tile::copied_row(), piece = Tile::copied_piece();
    const auto load_in = [&](int first) { t.load_in(w_in + int64_t{first + row} * x.channels, first + row < hidden); };
    const auto load_out = [&](int first) {
      const T* from = w_out.of(t.image, 0) + row * w_out.of_row + first / kParts + piece * 8;
#pragma unroll
      for (int i = 0; i < Tile::kChannels; i += Tile::kThreads / 4)
        if (row + i < Tile::kChannels)
          copy_async_or_zero(out + place_of(row + i, kTiles) * kRow + piece * 16, from + i * w_out.of_row,
                             row + i < x.channels && first + piece * 8 * kParts < hidden);
    };
    load_in(0);
    t.normalise(norm);
    wait_for_copies();
    __syncthreads();

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, m0 = warp % 4 * 32, n0 = warp / 4 * kTiles * 8;
    float sums[2][kTiles][4] = {};
#pragma unroll 1
    for (int first = 0; first < hidden; first += Tile::kHidden) {
      t.expand();
      __syncthreads();
      load_out(first);
      if (first + Tile::kHidden < hidden) load_in(first + Tile::kHidden);
      const int channel = first + Tile::pair() * 2 * kParts;
      t.convolve(taps + channel, taps_stride, channel < hidden, 0,
                 [](int, int, const float2(&v)[kParts]) { return to_pair<T>(Middle::template of<T>(v)); });
      wait_for_copies();
      __syncthreads();
#pragma unroll
      for (int k = 0; k < Tile::kMiddle / 16; ++k) {
        uint32_t left[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i)
          load_matrices(left[i], t.tile + (m0 + i * 16 + left_lane().row) * kRow + (k * 2 + left_lane().piece) * 16);
#pragma unroll
        for (int j = 0; j < kTiles; j += 2) {
          uint32_t right[4];
          const int column = min(n0 + j * 8 + right_lane().row, Tile::kChannels - 1);
          load_matrices(right, out + column * kRow + (k * 2 + right_lane().piece) * 16);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            mma(sums[i][j], left[i], {right[0], right[1]}, T{});
            if (j + 1 < kTiles) mma(sums[i][j + 1], left[i], {right[2], right[3]}, T{});
          }
        }
      }
    }

#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int p = m0 + i * 8 + lane / 4, at_y = t.y0 + p / Tile::kColumns, at_x = t.x0 + p % Tile::kColumns;
      const int channel = n0 + lane % 4 * kTiles * 2;
      if (!t.in_image(at_y, at_x)) continue;
      const T* from = x.at(t.image, at_y, at_x) + channel;
      T* to = y.at(t.image, at_y, at_x) + channel;
      Pairs<T, 1> added[kTiles];
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
        if (channel + j * 2 < x.channels) added[j] = load_pairs<1>(from + j * 2);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const float2 old = to_float2(added[j].v[0]);
        const float2 sum[1] = {make_float2(old.x + sums[i / 2][j][i % 2 * 2], old.y + sums[i / 2][j][i % 2 * 2 + 1])};
        if (channel + j * 2 < x.channels) store_pairs(to + j * 2, sum);
      }
    }
  }
};

#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 870)
constexpr int kSharedOfMultiprocessor = 164 << 10;
#elif defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1200)
constexpr int kSharedOfMultiprocessor = 100 << 10;
#else
constexpr int kSharedOfMultiprocessor = 228 << 10;
#endif

// Registers are shared out among as many blocks as shared memory has room for.
template <class T, class Kernel>
__global__ void __launch_bounds__(256, 2 * Kernel::kShared <= kSharedOfMultiprocessor ? 2 : 1) run_fused(Kernel kernel) {
  AUTOHDR_DYNAMIC_SHARED(unsigned char, shared);
  kernel.run(shared);
}

// Whether there are such kernels for images of these channels.
template <class T>
constexpr bool kFuses = sizeof(T) == 2;
template <class T>
bool can_fuse(const Layout& layout) {
  return kFuses<T> && !layout.copies && layout.channels <= 96;
}

// Of whole images.
template <class Middle, class T>
void fused(const Expansion<T>& e, View<const T> x, const Matrices<const T>& w_out, View<T> y, int64_t images,
           cudaStream_t stream) {
  const auto run = [&](auto tiles) {
    using F = Fused<T, decltype(tiles)::value, Middle>;
    launch(run_fused<T, F>, dim3(F::Tile::count(x, x.rows), images), dim3(F::Tile::kThreads), F::kShared, stream,
           F{x, y, e.norm, e.weight, e.taps, w_out, e.hidden, e.taps_stride});
  };
  if constexpr (kFuses<T>) x.channels <= 48 ? run(std::integral_constant<int, 3>{}) : run(std::integral_constant<int, 6>{});
}

}  // namespace image
}  // namespace autohdr
