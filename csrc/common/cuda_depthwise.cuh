// The depthwise 3×3 convolution, and its backward pass. Lanes own pairs of channels; a warp walks a segment of some rows from left to
// right, every column's loads under way while the one before is multiplied. Or, in half precision, tiles lie in shared memory, and the
// tensor cores multiply them.
#pragma once
#include "common/cuda_async.cuh"
#include "common/cuda_mma.cuh"
#include "common/cuda_view.cuh"

namespace autohdr {
namespace image {

__device__ __forceinline__ void add_product(float2& sum, float2 a, float2 b) { sum.x += a.x * b.x, sum.y += a.y * b.y; }

constexpr int kSegment = 16, kWalkWarps = 4;  // columns of a segment, warps of a block

// How the kernels share the rows of a step: kRows at a time. More of them load fewer rows twice, and take more registers. The warps of
// a block have segments one below the other, so that rows which two of them load are in the first-level cache.
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
  int64_t blocks() const { return ceil_div(rows.size(), kRows * kWalkWarps) * segments(); }  // of 64 channels of an image
};

// Rows from y on and columns [first, end) of an image: a warp's.
template <int kRows>
struct Segment {
  int64_t image;
  int y, rows, first, end;

  __device__ explicit Segment(const Walk<kRows>& walk) : image(blockIdx.z) {
    const uint32_t segments = walk.segments(), row = blockIdx.x / segments;
    y = walk.rows.first + static_cast<int>(row * kWalkWarps + threadIdx.y) * kRows, rows = min(kRows, walk.rows.end - y);
    first = static_cast<int>(blockIdx.x - row * segments) * kSegment;
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

// Whether there are channels for this lane.
template <int kRows>
__device__ __forceinline__ bool has_channels(const Walk<kRows>& walk) {
  return pair_of_lane() * 2 < walk.channels;
}
// The same, and rows for its warp.
template <int kRows>
__device__ __forceinline__ bool has_part(const Walk<kRows>& walk, const Segment<kRows>& s) {
  return s.rows > 0 && has_channels(walk);
}

template <int kRows, class... Parameters, class... Arguments>
void launch_walk(void (*kernel)(Walk<kRows>, Parameters...), const Walk<kRows>& walk, cudaStream_t stream,
                 const Arguments&... arguments) {
  const dim3 grid(walk.blocks(), ceil_div(walk.channels, 64), walk.images);
  launch(kernel, grid, dim3(32, kWalkWarps), 0, stream, walk, arguments...);
}

constexpr int kTileColumns = 16;  // of a tile in shared memory

// Tiles of kRows × kColumns pixels.
template <int kRows, int kColumns>
struct Tiles {
  Range rows;
  int width, channels;
  int64_t images;
  __host__ __device__ int across() const { return (width + kColumns - 1) / kColumns; }
  __host__ __device__ uint32_t of_image() const { return (rows.end - rows.first + kRows - 1) / kRows * across(); }
};

// A tile of kTileRows × 16 pixels by kChannels channels from (y, x) on, and its kHalo neighbours on each side, by kThreads threads;
// zeros where the view has no pixels or channels.
template <int kTileRows, int kChannels, int kThreads, int kHalo, class T>
__device__ __forceinline__ void copy_tile(unsigned char* to, const View<const T>& from, int64_t image, int y, int x, int rows_end,
                                          int channel, int channels) {
  constexpr int kSize = Piece<T>::kSize, kPieces = kChannels / kSize, kAtOnce = kThreads / kPieces,
                kRowsAtOnce = kAtOnce / kTileColumns, kAcross = kTileColumns + 2 * kHalo, kRows = kTileRows + 2 * kHalo;
  const int piece = threadIdx.x % kPieces, first = threadIdx.x / kPieces;
  const T* at = from.at(image, y, x) + channel + piece * kSize;
  to += piece * 16;
  const auto copy = [&](int row, int column, bool there) {
    there = there && y + row >= from.rows.first && y + row < rows_end;
    copy_async_or_zero(to + ((row + kHalo) * kAcross + column + kHalo) * row_of_columns<T>(kChannels),
                       at + (row * from.width + column) * from.channels, there);
  };
  const auto has = [&](int column) { return channel + piece * kSize < channels && x + column >= 0 && x + column < from.width; };
  const int column = first % kTileColumns, row = first / kTileColumns;
  const bool there = has(column);
#pragma unroll
  for (int r = -kHalo; r < kTileRows + kHalo; r += kRowsAtOnce) copy(row + r, column, there);
  if constexpr (kHalo > 0)
    for (int i = first; i < 2 * kRows; i += kAtOnce) copy(i / 2 - 1, i % 2 ? kTileColumns : -1, has(i % 2 ? kTileColumns : -1));
}

// 16 pixels across by 8 channels of a tile, whose pixels are kRow and its rows kOfRow bytes, as left operands of mma() for pairs of
// taps: (i, 0) and (i, 1) of one row, and of an even row the taps of column 2 on it and the next one. So no operand has to be put
// together in registers. kTurned: of taps turned by 180 degrees, so that the columns are 2 - j, and the next row's tap comes first.
// kAlong: pixels run along the products' k.
template <class T, int kRow, int kOfRow, bool kTurned, bool kAlong>
struct TapPixels {
  const unsigned char *one_row, *two_rows;
  uint32_t own[4], both[4];

  // tile: the left neighbour of the first pixel, in the row above, and its first channel of these.
  __device__ __forceinline__ explicit TapPixels(const unsigned char* tile) {
    const int matrix = threadIdx.x % 32 / 8, second = kAlong ? matrix % 2 : matrix / 2, right = kAlong ? matrix / 2 : matrix % 2;
    const unsigned char* from = tile + (right * 8 + threadIdx.x % 8) * kRow;
    one_row = from + (kTurned ? 2 - second : second) * kRow;
    two_rows = from + (kTurned ? 1 - second : second) * kOfRow + (kTurned ? 0 : 2) * kRow;
  }
  __device__ __forceinline__ void load(int row) {
    const auto get = [](uint32_t (&v)[4], const unsigned char* at) {
      kAlong ? load_matrices_transposed(v, at) : load_matrices(v, at);
    };
    get(own, one_row + row * kOfRow);
    if (row % 2 == 0) get(both, two_rows + row * kOfRow);
  }
};
// The pairs of taps: own[i] of (i, 0) and (i, 1); both[e] of (e - 1, 2) and (e, 2), where there are such.
template <class V>
struct TapPairs {
  V own[3], both[4];
};

// The taps of 8 channels, the first of which is at `taps`, as diagonal matrices; none where this set of lanes has no channels. Of an
// 8 × 8 matrix a lane holds elements (lane % 4 · 2, lane / 4) and the one below.
template <class T>
__device__ __forceinline__ TapPairs<uint32_t[2]> load_tap_pairs(const float* taps, int stride, bool has) {
  const int lane = threadIdx.x % 32;
  uint32_t tap[9];
#pragma unroll
  for (int t = 0; t < 9; ++t) {
    const float value = has && lane % 4 == lane / 8 ? taps[t * stride + lane / 4] : 0.0f;
    const Pair<T> pair = to_pair<T>(lane / 4 % 2 ? make_float2(0, value) : make_float2(value, 0));
    tap[t] = reinterpret_cast<const uint32_t&>(pair);
  }
  TapPairs<uint32_t[2]> pairs;
#pragma unroll
  for (int i = 0; i < 6; ++i) pairs.own[i / 2][i % 2] = tap[i / 2 * 3 + i % 2];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int row = i / 2 - 1 + i % 2;
    pairs.both[i / 2][i % 2] = row >= 0 && row < 3 ? tap[row * 3 + 2] : 0;
  }
  return pairs;
}

// own(output row y, i) and both(y, e) for the pairs with which row r of the tile gives to rows below `rows`.
template <bool kTurned, class Own, class Both>
__device__ __forceinline__ void for_each_pair(int r, int rows, const Own& own, const Both& both) {
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    const int y = kTurned ? r - 2 + i : r - i;
    if (y >= 0 && y < rows) own(y, i);
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int y = kTurned ? r - 2 + e : r + 1 - e;
    if (r % 2 == 0 && y >= 0 && y < rows) both(y, e);
  }
}

// f(row, 3×3 convolutions of both groups of 8 channels, as mma() gives them) for the first `count` rows, of kRows.
template <class T, int kRow, int kOfRow, bool kTurned, int kRows, class F>
__device__ __forceinline__ void convolve_on_tensor_cores(const unsigned char* tile, const TapPairs<uint32_t[2]> (&taps)[2],
                                                         int count, const F& f) {
  using Pixels = TapPixels<T, kRow, kOfRow, kTurned, false>;
  Pixels pixels[2] = {Pixels(tile), Pixels(tile + 16)};
  float sums[4][2][4];  // of rows in turns
#pragma unroll
  for (int r = 0; r < kRows + 2; ++r) {
    if (r >= count + 2) break;
#pragma unroll
    for (int y = r == 0 ? 0 : r + 1; y <= r + 1; ++y)  // whose first products these are
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[y % 4][i / 4][i % 4] = 0;
#pragma unroll
    for (int group = 0; group < 2; ++group) {
      pixels[group].load(r);
      for_each_pair<kTurned>(
          r, kRows, [&](int y, int i) { mma(sums[y % 4][group], pixels[group].own, taps[group].own[i], T{}); },
          [&](int y, int e) { mma(sums[y % 4][group], pixels[group].both, taps[group].both[e], T{}); });
    }
    if (r >= 2) f(r - 2, sums[(r - 2) % 4][0], sums[(r - 2) % 4][1]);
  }
}

// out = 3×3 convolution of in.
constexpr int kDepthwiseRows = 4;
template <class T>
__global__ void __launch_bounds__(128)
    depthwise(Walk<kDepthwiseRows> walk, View<const T> in, const float* taps, int stride, View<T> out) {
  const Segment<kDepthwiseRows> s(walk);
  if (!has_part(walk, s)) return;
  Along<1, kDepthwiseRows, T> to(out, s);
  convolve<1>(walk, s, in, taps, stride, [&](int o, int, const float2(&v)[1]) { to.store(o, v), to.next(o); });
}

// The same in half precision: a block owns a tile of 32 channels, a warp 16 of them in half of its rows. kGates: out is
// gelu(a) ⊙ b, where `in` has 8 channels of a and 8 of b in turns.
constexpr int kDepthwiseTileRows = 16, kDepthwiseChannels = 32, kDepthwiseThreads = 128;
using DepthwiseTiles = Tiles<kDepthwiseTileRows, kTileColumns>;
template <class T, bool kGates>
__global__ void __launch_bounds__(kDepthwiseThreads, 4)
    depthwise_on_tensor_cores(DepthwiseTiles tiles, View<const T> in, const float* taps, int stride, View<T> out) {
  AUTOHDR_DYNAMIC_SHARED(unsigned char, tile);
  constexpr int kRow = row_of_columns<T>(kDepthwiseChannels), kOfRow = (kTileColumns + 2) * kRow, kRows = kDepthwiseTileRows / 2;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, set = warp % 2, row = warp / 2 * kRows,
            first = blockIdx.y * kDepthwiseChannels, own = first + set * 16, down = blockIdx.x / tiles.across(),
            y0 = tiles.rows.first + down * kDepthwiseTileRows,
            x0 = static_cast<int>(blockIdx.x - down * tiles.across()) * kTileColumns;
  copy_tile<kDepthwiseTileRows, kDepthwiseChannels, kDepthwiseThreads, 1>(tile, in, blockIdx.z, y0, x0, in.rows.end, first,
                                                                          tiles.channels);
  const bool has[2] = {own < tiles.channels, own + 8 < tiles.channels};
  const TapPairs<uint32_t[2]> w[2] = {load_tap_pairs<T>(taps + own, stride, has[0]),
                                      load_tap_pairs<T>(taps + own + 8, stride, has[1])};
  T* to = out.at(blockIdx.z, y0 + row, x0 + lane / 4) + own / (kGates ? 2 : 1) + lane % 4 * 2;
  wait_for_copies();
  __syncthreads();
  const auto store = [&](int, const float (&a)[4], const float (&b)[4]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (x0 + h * 8 + lane / 4 >= out.width) continue;
      if constexpr (kGates) {
        const float2 gated[1] = {make_float2(kGateUnit<T> * gelu_times<T>(a[h * 2], b[h * 2]),
                                             kGateUnit<T> * gelu_times<T>(a[h * 2 + 1], b[h * 2 + 1]))};
        if (has[0]) store_pairs(to + h * 8 * out.channels, gated);
        continue;
      }
      const float2 of_a[1] = {make_float2(a[h * 2], a[h * 2 + 1])}, of_b[1] = {make_float2(b[h * 2], b[h * 2 + 1])};
      if (has[0]) store_pairs(to + h * 8 * out.channels, of_a);
      if (has[1]) store_pairs(to + h * 8 * out.channels + 8, of_b);
    }
    to += out.width * out.channels;
  };
  convolve_on_tensor_cores<T, kRow, kOfRow, false, kRows>(tile + row * kOfRow + set * 32, w,
                                                          min(kRows, tiles.rows.end - y0 - row), store);
}

template <class T, bool kGates = false>
void launch_depthwise(View<const T> in, const float* taps, int stride, View<T> out, int64_t images, cudaStream_t stream) {
  const DepthwiseTiles tiles{out.rows, out.width, out.channels * (kGates ? 2 : 1), images};
  launch(depthwise_on_tensor_cores<T, kGates>, dim3(tiles.of_image(), ceil_div(tiles.channels, kDepthwiseChannels), images),
         dim3(kDepthwiseThreads), (kDepthwiseTileRows + 2) * (kTileColumns + 2) * row_of_columns<T>(kDepthwiseChannels), stream,
         tiles, in, taps, stride, out);
}

// taps: `stride` from one to the next. in reaches a row further than out, where the image does.
template <class T>
void convolve_depthwise(View<const T> in, const float* taps, int stride, View<T> out, int height, int64_t images,
                        cudaStream_t stream) {
  if constexpr (sizeof(T) == 2)
    launch_depthwise<T>(in, taps, stride, out, images, stream);
  else
    launch_walk(depthwise<T>, Walk<kDepthwiseRows>(out, height, out.channels, images), stream, in, taps, stride, out);
}

// The backward pass, by blocks that own 64 channels, and 8 × 16 pixels at a time: they lie in shared memory, those of d with their
// neighbours. A thread makes d_in of two channels of 2 × 8 pixels. The taps' gradients are products over the pixels on the tensor
// cores, of which the diagonal is wanted: 8 channels of `in` with the same ones of d, at two shifts at a time.
constexpr int kTapsRows = 8, kTapsColumns = kTileColumns, kTapsChannels = 64, kTapsThreads = 256, kTapsAcross = kTapsColumns + 2,
              kTapsPixels = kTapsRows * kTapsColumns, kTapsNear = (kTapsRows + 2) * kTapsAcross;
template <class T>
constexpr int kTapsRow = row_of_columns<T>(kTapsChannels);  // bytes of a pixel in shared memory
using TapsTiles = Tiles<kTapsRows, kTapsColumns>;

// Sums over the pixels of a tile, of 8 channels a warp: of lanes on the diagonal, those of one channel.
template <class T>
__device__ __forceinline__ void add_tap_products(const unsigned char* d_tile, const unsigned char* in_tile, float (&total)[9]) {
  constexpr int kRow = kTapsRow<T>, kNextRow = kTapsAcross * kRow;
  const unsigned char *beside = d_tile + columns_lane<T, false>(kRow, kRow),   // the left neighbour, and the pixel itself
      *right_of = d_tile + 2 * kRow + columns_lane<T, false>(kRow, kNextRow),  // the right one, and that of the next row
          *own = in_tile + columns_lane<T, true>(kRow, kTapsColumns * kRow);   // of two rows
  float near[3][4] = {}, far[2][4] = {};
#pragma unroll
  for (int x = 0; x < kTapsColumns; x += kStep<T>) {
    uint32_t two[3][4], next[2][4], pixels[4];
#pragma unroll
    for (int i = 0; i < 2; ++i) load_columns<T, false>(two[i + 1], beside + x * kRow + i * kNextRow, kRow, kRow);
    load_columns<T, false>(next[1], right_of + x * kRow, kRow, kNextRow);
#pragma unroll
    for (int y = 0; y < kTapsRows; ++y) {
#pragma unroll
      for (int r = 0; r < 4; ++r) two[0][r] = two[1][r], two[1][r] = two[2][r], next[0][r] = next[1][r];
      load_columns<T, false>(two[2], beside + x * kRow + (y + 2) * kNextRow, kRow, kRow);
      load_columns<T, false>(next[1], right_of + x * kRow + (y + 1) * kNextRow, kRow, kNextRow);
      if (y % 2 == 0) load_columns<T, true>(pixels, own + (x + y * kTapsColumns) * kRow, kRow, kTapsColumns * kRow);
      const uint32_t right[2] = {pixels[y % 2 * 2], pixels[y % 2 * 2 + 1]};
#pragma unroll
      for (int i = 0; i < 3; ++i) mma(near[i], two[i], right, T{});
#pragma unroll
      for (int i = 0; i < 2; ++i) mma(far[i], next[i], right, T{});
    }
  }
  const bool odd = threadIdx.x % 32 / 4 % 2;
  const auto add = [&](int tap, float even, float other) { total[tap] += odd ? other : even; };
#pragma unroll
  for (int i = 0; i < 3; ++i) {  // row i of d is where tap row 2 - i reads the pixel
    add((2 - i) * 3 + 2, near[i][0], near[i][1]);
    add((2 - i) * 3 + 1, near[i][2], near[i][3]);
  }
  add(6, far[0][0], far[0][1]);
  add(3, far[0][2], far[0][3]);
  add(0, far[1][2], far[1][3]);
}

// d_in, given the gradient d of the convolution and its taps turned by 180 degrees; slots[slot][9][channels] (+)= the taps'
// gradients, of what d_in's pixels give to them.
template <class T>
__global__ void __launch_bounds__(kTapsThreads, 2)
    differentiate_depthwise(TapsTiles tiles, View<const T> in, View<const T> d, const float* flipped, View<T> d_in, float* slots,
                            bool add) {
  AUTOHDR_DYNAMIC_SHARED(unsigned char, shared);
  constexpr int kRow = kTapsRow<T>;
  constexpr bool kOnTensorCores = sizeof(T) == 2;  // float32 would take more instructions there
  unsigned char *d_tile = shared, *in_tile = shared + kTapsNear * kRow;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first_channel = blockIdx.y * kTapsChannels,
            channel = first_channel + lane * 2, unit_y = warp / 2 * 2, unit_x = warp % 2 * 8;
  const bool has = channel < tiles.channels;
  float2 w[9] = {};
  if (has)
#pragma unroll
    for (int t = 0; t < 9; ++t) w[t] = *reinterpret_cast<const float2*>(flipped + t * tiles.channels + channel);
  float total[9] = {};  // of this warp's 8 channels
  float2 sums[9] = {};  // of this thread's
  const uint32_t of_image = tiles.of_image(), all = of_image * tiles.images, across = tiles.across();
  for (uint32_t tile = blockIdx.x; tile < all; tile += gridDim.x) {
    const uint32_t image = tile / of_image, of_rows = (tile - image * of_image) / across;
    const int y0 = tiles.rows.first + static_cast<int>(of_rows) * kTapsRows,
              x0 = static_cast<int>(tile - image * of_image - of_rows * across) * kTapsColumns;
    __syncthreads();
    copy_tile<kTapsRows, kTapsChannels, kTapsThreads, 1>(d_tile, d, image, y0, x0, d.rows.end, first_channel, tiles.channels);
    copy_tile<kTapsRows, kTapsChannels, kTapsThreads, 0>(in_tile, in, image, y0, x0, tiles.rows.end, first_channel,
                                                         tiles.channels);
    wait_for_copies();
    __syncthreads();
    const unsigned char *near = d_tile + (unit_y * kTapsAcross + unit_x) * kRow + lane * 2 * sizeof(T),
                        *own = in_tile + (unit_y * kTapsColumns + unit_x) * kRow + lane * 2 * sizeof(T);
    T* to[2];
    int columns[2];
#pragma unroll
    for (int o = 0; o < 2; ++o) {
      to[o] = d_in.at(image, y0 + unit_y + o, x0 + unit_x) + channel;
      columns[o] = has && y0 + unit_y + o < tiles.rows.end ? d_in.width - x0 - unit_x : 0;
    }
    float2 made[3][2], pixels[3][2];  // of three columns: in turns
#pragma unroll
    for (int x = 0; x < 10; ++x) {  // of d
      float2 v[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) v[r] = to_float2(*reinterpret_cast<const Pair<T>*>(near + (r * kTapsAcross + x) * kRow));
#pragma unroll
      for (int o = 0; o < 2; ++o) {
        made[x % 3][o] = make_float2(0, 0);
        if (!kOnTensorCores && x < 8)
          pixels[x % 3][o] = to_float2(*reinterpret_cast<const Pair<T>*>(own + (o * kTapsColumns + x) * kRow));
#pragma unroll
        for (int j = 0; j < 3; ++j) {
          if (x - j < 0 || x - j > 7) continue;
#pragma unroll
          for (int i = 0; i < 3; ++i) {
            add_product(made[(x - j) % 3][o], w[i * 3 + j], v[o + i]);
            if (!kOnTensorCores) add_product(sums[(2 - i) * 3 + 2 - j], v[o + i], pixels[(x - j) % 3][o]);
          }
        }
        if (x < 2) continue;
        const float2 result[1] = {made[(x - 2) % 3][o]};
        if (x - 2 < columns[o]) store_pairs(to[o], result);
        to[o] += d_in.channels;
      }
    }
    if constexpr (kOnTensorCores) add_tap_products<T>(d_tile + warp * 16, in_tile + warp * 16, total);
  }

  const auto put = [&](int tap, int at, float sum) {
    float& slot = slots[(int64_t{blockIdx.x} * 9 + tap) * tiles.channels + at];
    slot = add ? slot + sum : sum;
  };
  if constexpr (kOnTensorCores) {
    const int own = first_channel + warp * 8 + lane / 4;
    if (lane % 4 != lane / 8 || own >= tiles.channels) return;
#pragma unroll
    for (int t = 0; t < 9; ++t) put(t, own, total[t]);
  } else {
    float2* all_sums = reinterpret_cast<float2*>(shared);  // [warp][9][32]
    __syncthreads();
#pragma unroll
    for (int t = 0; t < 9; ++t) all_sums[(warp * 9 + t) * 32 + lane] = sums[t];
    __syncthreads();
    for (int t = warp; has && t < 9; t += kTapsThreads / 32) {
      float2 sum = make_float2(0, 0);
      for (int w = 0; w < kTapsThreads / 32; ++w)
        sum.x += all_sums[(w * 9 + t) * 32 + lane].x, sum.y += all_sums[(w * 9 + t) * 32 + lane].y;
      put(t, channel, sum.x), put(t, channel + 1, sum.y);
    }
  }
}

// For the taps' gradients, of steps of up to `pixels`: fewer where many channels fill the device, and a few tiles each.
inline int64_t depthwise_slots(int64_t channels, int64_t pixels) {
  return std::min(std::clamp<int64_t>(131072 / channels, 32, 512), ceil_div(pixels, 4 * kTapsPixels));
}

template <class T>
void depthwise_backward(const TapsTiles& tiles, View<const T> in, View<const T> d, const float* flipped, View<T> d_in,
                        float* sums, int64_t slots, bool add, cudaStream_t stream) {
  launch(differentiate_depthwise<T>, dim3(slots, ceil_div(tiles.channels, kTapsChannels)), dim3(kTapsThreads),
         (kTapsNear + kTapsPixels) * kTapsRow<T>, stream, tiles, in, d, flipped, d_in, sums, add);
}

}  // namespace image
}  // namespace autohdr
