// The kernels of cuda_fused.cuh for float32, where PyTorch allows its products to be of TF32: between x and the result nothing leaves
// the multiprocessor.
//
// A block owns 16 × 12 or 16 × 8 pixels. It normalises them and those around them in registers, and then goes through the hidden
// channels, some at a time: 1×1 of all these pixels, 3×3 (and gate) into a tile in shared memory, product. Both products are of
// TF32, whose operands are rounded once: weights where they are repacked, the norm and the tile where they are made. The 3×3 is of
// float32, and a pixel that is no number makes its neighbours none, no others.
#pragma once
#include "common/cuda_expansion.cuh"

namespace autohdr {
namespace image {

// kTiles: of 16 channels of x, at least; kMade channels of the 3×3's result at a time, of kParts hidden ones each; kResults channels
// that the tile has. kOverPixels: products of it sum over its pixels, not over its channels.
//
// `hidden` and the tile have a channel's pixels row by row.
template <int kTiles_, int kParts_, int kMade_, int kResults, bool kOverPixels = false>
struct Tf32Tile {
  static constexpr int kTiles = kTiles_, kParts = kParts_, kMade = kMade_, kHidden = kMade * kParts, kChannels = kTiles * 16;
  // Few channels leave registers for a second block, if it has fewer pixels.
  static constexpr int kColumns = 16, kRows = kTiles <= 3 ? 8 : 12, kPixels = kColumns * kRows, kThreads = 256;
  static constexpr int kNearColumns = kColumns + 2, kPieces = kRows / 4 + 1;  // a warp's, of 8 of the pixels with neighbours
  // Of rows in floats. What lanes read or write at once lies in other banks; half of a warp makes two channels of the 3×3, so far
  // apart.
  static constexpr int kApart = kParts == 1 && !kOverPixels ? 2 : 4;
  static constexpr int kHiddenRow = kPieces * 64 + 16 / kApart, kRow = kPixels + (kOverPixels ? 4 : 8), kInRow = kChannels + 4;
  static constexpr int kFloats = kHidden * (kHiddenRow + kInRow) + kResults * kRow;

  const View<const float>& x;  // the images as a whole
  float *hidden, *tile, *in;
  int64_t image;
  int y0, x0;
  uint32_t normal[kPieces][kTiles * 4];  // the norm of the warp's pixels, as right operands of the 1×1

  // Of a tile whose first pixel is (y0, x0).
  __device__ Tf32Tile(const View<const float>& x_, float* shared, int64_t image_, int y0_, int x0_)
      : x(x_), hidden(shared), tile(hidden + kHidden * kHiddenRow), in(tile + kResults * kRow), image(image_), y0(y0_), x0(x0_) {}

  // Places in shared memory are found again in every round, rather than spilled.
  static __device__ __forceinline__ int warp() { return thread_read_anew() / 32; }
  static __device__ __forceinline__ int lane() { return thread_read_anew() % 32; }

  // This thread copies every eighth piece of every 32nd row of weights from these on.
  static __device__ __forceinline__ int copied_row() { return thread_read_anew() / 8; }
  static __device__ __forceinline__ int copied_piece() { return thread_read_anew() % 8; }
  // The 1×1's weight for the next channels: channel_of(row) of it, or none if negative.
  template <class ChannelOf>
  __device__ __forceinline__ void load_in(const float* from, const ChannelOf& channel_of) const {
#pragma unroll
    for (int i = 0; i < kHidden; i += kThreads / 8) {
      const int row = i + copied_row(), channel = channel_of(row);
      if (i + kThreads / 8 > kHidden && row >= kHidden) break;
#pragma unroll
      for (int k = 0; k < kChannels / 4; k += 8) {
        const int piece = k + copied_piece();
        if (k + 8 <= kChannels / 4 || piece < kChannels / 4)
          copy_async_or_zero(in + row * kInRow + piece * 4, from + channel * x.channels + piece * 4,
                             channel >= 0 && piece * 4 < x.channels);
      }
    }
  }

  // The norm of the pixels and those around them; zeros outside of the image.
  __device__ __forceinline__ void normalise(const Norm& norm) {
    using Lanes = NormLanes<float, kTiles * 4, 1>;  // a lane's channels are those of its registers of an operand
    constexpr Lanes lanes(kChannels);
    constexpr int kAtOnce = kTiles > 3 && kOverPixels ? 2 : kPieces;  // of a lane's pixels: as registers allow
    const auto run = [&](int channels, int begin) {
      using P = NormPixel<float, Lanes, Tf32>;
      Norm own = norm;
      own.channels = channels;
      P pixels[kAtOnce];
      float2 stats[kAtOnce];
      bool there[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int pixel = (warp() * kPieces + begin + j) * 8 + lane() / 4, y = y0 - 1 + pixel / kNearColumns,
                  at_y = min(max(y, 0), x.rows.end - 1), column = x0 - 1 + pixel % kNearColumns,
                  at_x = min(max(column, 0), x.width - 1);
        there[j] = at_y == y && at_x == column;
        stats[j] = pixels[j].statistics(lanes, x.at(image, at_y, at_x), channels, own);
      }
#pragma unroll
      for (int i = 0; i < kTiles * 4; ++i) {
        const int channel = P::channel(lanes, 0, i);
        const bool has = channel < channels;
        const float weight[1] = {has ? norm.weight[channel] : 0.0f}, bias = has && norm.bias ? norm.bias[channel] : 0.0f;
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          float v[1] = {bias};
          pixels[j].normalize(i, stats[j].y, norm.bias ? stats[j].x : 0.0f, weight, v);
          normal[begin + j][i] = there[j] ? tf32_operand(v[0]) : 0;
        }
      }
    };
#pragma unroll
    for (int begin = 0; begin < kPieces; begin += kAtOnce)
      x.channels == kChannels ? run(kChannels, begin) : run(x.channels, begin);  // as a constant, it takes no branches
  }

  // Of 8 hidden channels the one that is row `row` of the 1×1's weight as an operand.
  static __device__ __forceinline__ int expanded(int row) { return kApart == 2 ? row : row % 4 * 2 + row / 4; }
  // kHidden channels of the 1×1.
  __device__ __forceinline__ void expand() const {
    const float* from = in + (left_lane().row / 8 * 8 + expanded(left_lane().row % 8)) * kInRow + left_lane().piece * 4;
    float* to = hidden + expanded(lane() / 4) * kHiddenRow + warp() * kPieces * 8 + lane() % 4 * 2;
#pragma unroll
    for (int m = 0; m < kHidden; m += 16) {
      float sums[kPieces][4] = {};
#pragma unroll
      for (int k = 0; k < kChannels / 8; ++k) {
        uint32_t left[4];
        load_matrices(left, from + m * kInRow + k * 8);
#pragma unroll
        for (int j = 0; j < kPieces; ++j) mma_tf32(sums[j], left, {normal[j][k * 2], normal[j][k * 2 + 1]});
      }
#pragma unroll
      for (int j = 0; j < kPieces; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          *reinterpret_cast<float2*>(to + (m + half * 8) * kHiddenRow + j * 8) =
              make_float2(sums[j][half * 2], sums[j][half * 2 + 1]);
    }
  }

  // A thread makes a channel of the result, of two neighbouring columns. So many rows of them:
  static constexpr int kOwnRows = kRows * kMade / 32;
  static __device__ __forceinline__ int own_channel() {
    const int four = warp() % (kMade / 4), within = lane() / 16, other = lane() / 8 % 2;
    return kParts == 1 && kApart == 4 ? four / 2 * 8 + other * 4 + four % 2 * 2 + within : four * 4 + other * 2 + within;
  }
  static __device__ __forceinline__ int own_row() { return warp() / (kMade / 4) * kOwnRows; }
  static __device__ __forceinline__ int own_column() { return lane() % 8 * 2; }
  // The hidden channel that its first part is; the second lies two further.
  static __device__ __forceinline__ int hidden_channel() {
    const int channel = own_channel();
    return kParts == 1 ? channel : channel / 2 * 4 + channel % 2;
  }

  struct Taps {
    float4 rows[kParts][3];
    // bands: from the thread's first hidden channel on.
    __device__ __forceinline__ explicit Taps(const float* bands) {
#pragma unroll
      for (int part = 0; part < kParts; ++part)
#pragma unroll
        for (int dy = 0; dy < 3; ++dy) rows[part][dy] = *reinterpret_cast<const float4*>(bands + part * 2 * kBand + dy * 4);
    }
  };

  // kMade channels of the tile, from `first` on, = f(which of the thread's rows, the 3×3 of each part, of two pixels), rounded to
  // TF32.
  template <class F>
  __device__ __forceinline__ void convolve(const Taps& taps, int first, const F& f) const {
    const float* from = hidden + hidden_channel() * kHiddenRow + own_row() * kNearColumns + own_column();
    float* to = tile + (first + own_channel()) * kRow + own_row() * kColumns + own_column();
    float2 sums[3][kParts];  // of this row and the two before it
#pragma unroll
    for (int y = 0; y < kOwnRows + 2; ++y) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const float2 left = *reinterpret_cast<const float2*>(from + part * 2 * kHiddenRow + y * kNearColumns),
                     right = *reinterpret_cast<const float2*>(from + part * 2 * kHiddenRow + y * kNearColumns + 2);
#pragma unroll
        for (int dy = 0; dy < 3; ++dy) {
          if (y < dy || y - dy >= kOwnRows) continue;
          const float4& w = taps.rows[part][dy];
          float2& sum = sums[(y - dy) % 3][part];
          sum =
              dy == 0 ? make_float2(w.x * left.x, w.x * left.y) : make_float2(fmaf(w.x, left.x, sum.x), fmaf(w.x, left.y, sum.y));
          sum = make_float2(fmaf(w.y, left.y, sum.x), fmaf(w.y, right.x, sum.y));
          sum = make_float2(fmaf(w.z, right.x, sum.x), fmaf(w.z, right.y, sum.y));
        }
      }
      if (y < 2) continue;
      const float2 result = f(y - 2, sums[(y - 2) % 3]);
      *reinterpret_cast<uint2*>(to + (y - 2) * kColumns) = make_uint2(tf32_operand(result.x), tf32_operand(result.y));
    }
  }
};

// y = x + w_out · Middle(3×3 of w_in · norm of x).
template <int kTiles, int kMade, class Middle>
struct FusedTf32 {
  static constexpr int kParts = Middle::kParts, kRow = kMade + 4;
  using Tile = Tf32Tile<kTiles, kParts, kMade, kMade>;
  static constexpr int kShared = (Tile::kFloats + Tile::kChannels * kRow) * 4, kBlocks = kTiles <= 3 ? 2 : 1;
  // A warp's part of the product: some rows of the tile, half of the channels.
  static constexpr int kOwnRows = Tile::kRows / 4, kOwn = kTiles * 8;

  View<const float> x;  // the images as a whole, as y
  View<float> y;
  Norm norm;
  const float* w_in;            // [hidden][channels], parts pair by pair, as bands
  const float* bands;           // [hidden + 64][kBand]
  Matrices<const float> w_out;  // [channels][hidden / parts]
  int hidden;

  static __device__ __forceinline__ int first_channel() { return Tile::warp() % 2 * kOwn; }
  static __device__ __forceinline__ int first_row() { return Tile::warp() / 2 * kOwnRows; }
  // Of the warp's channels the one that is column `column`: a lane has 4 neighbours of two times 8 columns, or 2 of the last 8.
  static __device__ __forceinline__ int channel_of(int column) {
    const int n = column % 8;
    return kOwn % 16 && column >= kOwn - 8 ? column : column / 16 * 16 + n / 2 * 4 + column / 8 % 2 * 2 + n % 2;
  }

  __device__ __forceinline__ void run(unsigned char* shared) const {
    float* memory = reinterpret_cast<float*>(shared);
    Tile t(x, memory, blockIdx.z, blockIdx.y * Tile::kRows, blockIdx.x * Tile::kColumns);
    float* out = memory + Tile::kFloats;
    const auto load_out = [&](int first) {
      const int row = Tile::copied_row(), piece = Tile::copied_piece();
#pragma unroll
      for (int i = 0; i < Tile::kChannels; i += Tile::kThreads / 8) {
        const int column = i + row, channel = column / kOwn * kOwn + channel_of(column % kOwn);
        if (column < Tile::kChannels && piece < kMade / 4)
          copy_async_or_zero(out + column * kRow + piece * 4,
                             w_out.of(t.image, 0) + channel * w_out.of_row + first / kParts + piece * 4,
                             channel < x.channels && piece * 4 * kParts < hidden - first);
      }
    };
    const auto load_in = [&](int first) {
      t.load_in(w_in + first * x.channels, [&](int row) { return row < hidden - first ? row : -1; });
    };
    load_in(0);
    t.normalise(norm);
    wait_for_copies();
    __syncthreads();

    float sums[kOwnRows][kTiles][4] = {};
#pragma unroll 1
    for (int first = 0; first < hidden; first += Tile::kHidden) {
      t.expand();
      __syncthreads();
      const typename Tile::Taps taps(bands + (first + Tile::hidden_channel()) * kBand);
      load_out(first);
      if (first + Tile::kHidden < hidden) load_in(first + Tile::kHidden);
      t.convolve(taps, 0, [](int, const float2(&v)[kParts]) { return Middle::template of<Tf32>(v); });
      wait_for_copies();
      __syncthreads();
      // A lane's rows of the left operand are two neighbouring pixels; a row of it is one of the tile.
      const int lane = Tile::lane();
      const float *left_from = t.tile + lane % 4 * Tile::kRow + first_row() * Tile::kColumns + lane / 4 * 2,
                  *right_from = out + (first_channel() + lane % 8) * kRow + lane / 8 * 4;
#pragma unroll
      for (int k = 0; k < kMade; k += 16) {
        uint32_t right[kTiles][4];
#pragma unroll
        for (int j = 0; j < kTiles; ++j) load_matrices(right[j], right_from + j * 8 * kRow + k);
#pragma unroll
        for (int step = 0; step < 2; ++step)
#pragma unroll
          for (int i = 0; i < kOwnRows; ++i) {
            uint2 left[2];
#pragma unroll
            for (int half = 0; half < 2; ++half)
              left[half] =
                  *reinterpret_cast<const uint2*>(left_from + (k + step * 8 + half * 4) * Tile::kRow + i * Tile::kColumns);
#pragma unroll
            for (int j = 0; j < kTiles; ++j)
              mma_tf32(sums[i][j], {left[0].x, left[0].y, left[1].x, left[1].y}, {right[j][step * 2], right[j][step * 2 + 1]});
          }
      }
    }

    const int column = Tile::lane() / 4 * 2, own = Tile::lane() % 4, columns = min(Tile::kColumns, x.width - t.x0) - column,
              rows = min(Tile::kRows, x.rows.end - t.y0) - first_row();
    const int64_t place = x.at(t.image, t.y0 + first_row(), t.x0 + column) - x.data + first_channel();
    // f(row, pixel, piece of columns, place of the lane's 4 or 2 channels) where there are such.
    const auto each = [&](const auto& f) {
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i)
#pragma unroll
        for (int e = 0; e < 2; ++e)
#pragma unroll
          for (int j = 0; j < kTiles; j += 2) {
            const int channel = j * 8 + own * (j + 1 < kTiles ? 4 : 2);
            if (i < rows && e < columns && first_channel() + channel < x.channels)
              f(i, e, j, place + (i * int64_t{x.width} + e) * x.channels + channel);
          }
    };
    float added[kOwnRows][2][(kTiles + 1) / 2][4];
    each([&](int i, int e, int j, int64_t at) {
      if (j + 1 < kTiles)
        load_floats(x.data + at, added[i][e][j / 2]);
      else
        load_floats(x.data + at, reinterpret_cast<float (&)[2]>(added[i][e][j / 2]));
    });
    each([&](int i, int e, int j, int64_t at) {
      float (&v)[4] = added[i][e][j / 2];
      v[0] += sums[i][j][e * 2], v[1] += sums[i][j][e * 2 + 1];
      if (j + 1 < kTiles) {
        v[2] += sums[i][j + 1][e * 2], v[3] += sums[i][j + 1][e * 2 + 1];
        store_floats(y.data + at, v);
      } else {
        store_floats(y.data + at, reinterpret_cast<float (&)[2]>(v));
      }
    });
  }
};

}  // namespace image
}  // namespace autohdr
