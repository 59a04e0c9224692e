// Norm, 1×1 and 3×3, and the product after them as one kernel, for few channels of half precision: between x and the result nothing
// leaves the multiprocessor. In TF32: cuda_fused_tf32.cuh.
//
// A block owns 14 × 14 pixels at a time. It normalises them and those around them, 16 × 16, in registers, and then goes through the
// hidden channels, some at a time: 1×1 of all these pixels, 3×3 (and gate) into a tile in shared memory, product. All three are
// products on tensor cores: the 3×3 is one of each channel, with a matrix of three bands. So its taps are rounded as the other weights
// are, and a pixel that is infinite or no number makes those of its block's rows around it no numbers, not its neighbours alone.
#pragma once
#include "common/cuda_expansion.cuh"
#include "common/cuda_fused_tf32.cuh"

namespace autohdr {
namespace image {

// kTiles: of 16 channels of x, at least; kHidden channels of the 3×3 at a time, of which kParts make one of its result; kResults
// channels that the tile has. kBiased: the 1×1 has a bias, which is none outside of the image.
//
// A channel's pixels lie in pieces of 8 along x. `hidden` has (x / 8, y % 2, y / 2) in turn. The tile has what a lane makes in turn:
// see pixel_of.
template <class T, int kTiles_, int kHidden_, int kParts_, int kResults, bool kBiased = false>
struct FusedTile {
  static constexpr int kTiles = kTiles_, kHidden = kHidden_, kParts = kParts_;
  static constexpr int kSide = 14, kColumns = kSide, kRows = kSide, kNear = 256, kThreads = 256, kWarps = kThreads / 32;
  static constexpr int kChannels = kTiles * 16, kMade = kHidden / kParts, kOwn = kMade / kWarps;  // of the result; a warp's
  static constexpr int kHiddenRow = kNear * 2, kRow = kNear * 2 + 16,
                       kInRow = kChannels * 2 + 16;  // bytes; odd numbers of pieces
  static constexpr int kShared = kHidden * kHiddenRow + kResults * kRow + kHidden * kInRow;

  const View<const T>& x;  // the images as a whole
  unsigned char *hidden, *tile, *in;
  int64_t image;
  int y0, x0;
  uint32_t normal[4][kTiles * 2];  // the norm of 32 pixels, as right operands of the 1×1

  // Of a tile whose first pixel is (y0, x0).
  __device__ FusedTile(const View<const T>& x_, unsigned char* shared, int64_t image_, int y0_, int x0_)
      : x(x_), hidden(shared), tile(hidden + kHidden * kHiddenRow), in(tile + kResults * kRow), image(image_), y0(y0_), x0(x0_) {}

  // This thread copies every fourth piece of a row of weights from copied_piece() on. Of eight threads that write at once, rows lie
  // four apart, which begin in other halves of the banks.
  static __device__ __forceinline__ int copied_row() {
    const int row = threadIdx.x / 4;
    return (row & ~7) | (row & 1) << 2 | (row >> 1 & 3);
  }
  static __device__ __forceinline__ int copied_piece() { return threadIdx.x % 4; }
  // The 1×1's weight for the next channels, of which there are `count`. from: this thread's first piece. biases: theirs.
  __device__ __forceinline__ void load_in(const T* from, int count, const float* biases = nullptr) const {
    // That every thread has a row is used where there are registers: without the branch addresses are kept from round to round.
    constexpr bool kEveryThread = kTiles > 4 && kHidden * 4 == kThreads;
    unsigned char* to = in + copied_row() * kInRow + copied_piece() * 16;
#pragma unroll
    for (int i = 0; i < kTiles * 2; i += 4)
      if ((kEveryThread || copied_row() < kHidden) && copied_piece() + i < kTiles * 2)
        copy_async_or_zero(to + i * 16, from + i * 8, copied_row() < count && (copied_piece() + i) * 8 < x.channels);
    if (kBiased && threadIdx.x < kHidden)
      *bias_of(threadIdx.x) = static_cast<int>(threadIdx.x) < count ? biases[threadIdx.x] : 0.0f;
  }
  // It lies behind the row of the weight.
  __device__ __forceinline__ float* bias_of(int channel) const {
    return reinterpret_cast<float*>(in + channel * kInRow + kChannels * 2);
  }

  // Places in shared memory are found again in every round, rather than spilled.
  static __device__ __forceinline__ int warp() { return thread_read_anew() / 32; }
  static __device__ __forceinline__ int lane() { return thread_read_anew() % 32; }

  // The norm of the pixels and those around them; zeros outside of the image.
  __device__ __forceinline__ void normalise(const Norm& norm) {
    using Lanes = NormLanes<T, kTiles * 2, 2>;  // a lane's channels are those of its registers of an operand
    constexpr Lanes lanes(kChannels);
    const int piece = warp() * 4 + lane() / 8, y = y0 - 1 + piece % 8 * 2 + piece / 8 % 2,
              first = x0 - 1 + piece / 16 * 8 + lane() / 4 % 2, at_y = min(max(y, 0), x.rows.end - 1);
    const T* row = x.at(image, at_y, 0);
    constexpr int kAtOnce = kBiased ? 4 / kTiles : 4;  // of a lane's four pixels: as registers allow
    const auto run = [&](int channels, int begin) {
      using P = NormPixel<T, Lanes>;
      Norm own = norm;
      own.channels = channels;
      P pixels[kAtOnce];
      float2 stats[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
        stats[j] = pixels[j].statistics(lanes, row + min(max(first + (begin + j) * 2, 0), x.width - 1) * channels, channels, own);
#pragma unroll
      for (int i = 0; i < kTiles * 2; ++i) {
        const int channel = P::channel(lanes, 0, i);
        float weight[2] = {}, bias[2] = {};
        if (channel < channels) load_floats(norm.weight + channel, weight);
        if (norm.bias && channel < channels) load_floats(norm.bias + channel, bias);
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          float v[2] = {bias[0], bias[1]};
          pixels[j].normalize(i, stats[j].y, norm.bias ? stats[j].x : 0.0f, weight, v);
          const Pair<T> rounded = to_pair<T>(make_float2(v[0], v[1]));
          normal[begin + j][i] = reinterpret_cast<const uint32_t&>(rounded);
        }
      }
    };
#pragma unroll
    for (int begin = 0; begin < 4; begin += kAtOnce)
      x.channels == kChannels ? run(kChannels, begin) : run(x.channels, begin);  // as a constant, it takes no branches
    if (is_inside()) return;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (at_y != y || first + j * 2 < 0 || first + j * 2 >= x.width)
#pragma unroll
        for (int i = 0; i < kTiles * 2; ++i) normal[j][i] = 0;
  }

  // Whether all of these pixels are in the image.
  __device__ __forceinline__ bool is_inside() const {
    return y0 > 0 && x0 > 0 && y0 + kSide < x.rows.end && x0 + kSide < x.width;
  }

  // Where `hidden` has a piece of a channel: odd ones in another order, against bank conflicts.
  static __device__ __forceinline__ int place(int piece, int channel) { return (piece ^ channel % 2 * 4) * 16; }

  // kHidden channels of the 1×1.
  __device__ __forceinline__ void expand() const {
    unsigned char* to = hidden + lane() / 4 * kHiddenRow + place(warp() * 4 + lane() % 4, lane() / 4);
    const unsigned char* from = in + left_lane().row * kInRow + left_lane().piece * 16;
#pragma unroll
    for (int m = 0; m < kHidden; m += 16) {
      float sums[4][4] = {};
      if constexpr (kBiased) begin_with_bias(sums, m + lane() / 4);
#pragma unroll
      for (int k = 0; k < kTiles; ++k) {
        uint32_t left[4];
        load_matrices(left, from + m * kInRow + k * 32);
#pragma unroll
        for (int j = 0; j < 4; ++j) mma(sums[j], left, {normal[j][k * 2], normal[j][k * 2 + 1]}, T{});
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Pairs<T, 4> piece;
#pragma unroll
        for (int j = 0; j < 4; ++j) piece.v[j] = to_pair<T>(make_float2(sums[j][half * 2], sums[j][half * 2 + 1]));
        *reinterpret_cast<Pairs<T, 4>*>(to + (m + half * 8) * kHiddenRow) = piece;
      }
    }
  }

  // The sums of channels `channel` and the eighth after it, of a piece.
  __device__ __forceinline__ void begin_with_bias(float (&sums)[4][4], int channel) const {
    const bool all = is_inside();
    const int piece = warp() * 4 + lane() % 4, y = y0 - 1 + piece % 8 * 2 + piece / 8 % 2, first = x0 - 1 + piece / 16 * 8,
              there = y >= 0 && y < x.rows.end ? x.width : 0;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int pixel = i / 4 * 2 + i % 2;
      const float bias = *bias_of(channel + i % 4 / 2 * 8);
      sums[i / 4][i % 4] = all || first + pixel >= 0 && first + pixel < there ? bias : 0.0f;
    }
  }

  // The column and row of a lane's pixels: pair j of four, the first or second of it.
  static __device__ __forceinline__ int2 pixel_of(int lane, int j, int second) {
    return make_int2(j / 2 * 8 + lane % 4 * 2 + second, lane / 4 * 2 + j % 2);
  }

  // Of a warp's channels of the 3×3, row by row the taps w0, w1, w2 and 0. What the first ones have is loaded at once.
  struct Taps {
    const T* from;
    uint4 two[kParts];
    uint2 third[kParts];
    // bands: of all warps' channels.
    __device__ __forceinline__ explicit Taps(const T* bands) : from(bands + warp() * kOwn * kParts * kBand) { load(0); }
    __device__ __forceinline__ void load(int i) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        two[part] = *reinterpret_cast<const uint4*>(from + channel(i, part) * kBand);
        third[part] = *reinterpret_cast<const uint2*>(from + channel(i, part) * kBand + 8);
      }
    }
    // The hidden channel, of the warp's, of a part of one of its results.
    static __device__ __forceinline__ int channel(int i, int part) { return i / 2 * 2 * kParts + part * 2 + i % 2; }
  };

  // Rows of the tile from `row` on = f(which of this warp's, pair of pixels, its 3×3 of each part), of kMade channels. Sums of
  // pixels that are none (beyond 14) are any.
  //
  // Of 16 pixels of a row, the right operand makes 14 that are the 3×3's sums over it: column n has w0, w1, w2 in the rows from n on.
  // A lane's two elements of its first 8 columns are two of one channel's four; its last 8 are the first ones, 8 rows further down.
  template <class F>
  __device__ __forceinline__ void convolve(Taps taps, int row, const F& f) const {
    // Selectors of the taps `offset` and the next, and of 8 further ones: two bytes a tap, those of the zero where there is none.
    const unsigned offset = lane() % 4 * 2 - lane() / 4, near = __funnelshift_rc(0x54321076, 0x76767676, (offset + 1) * 8),
                   far = __funnelshift_rc(0x76765432, 0x76767676, (offset + 7) * 8);
    const int first = warp() * kOwn;
    const auto from = [&, begin = hidden + first * kParts * kHiddenRow](int dy, int channel) {  // of an even one, or an odd one
      const int at = place(lane() + dy / 2, channel);
      return begin + (kTiles > 4 ? without_known_bits(at) : at);  // which takes registers
    };
    const unsigned char *even = from(0, 0), *odd[2] = {from(0, 1), from(2, 1)};
    unsigned char* to = tile + (row + first) * kRow + lane() * 16;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      float sums[kParts][2][4] = {};  // of the first 8 columns, and the last; of even rows and odd ones
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const int channel = Taps::channel(i, part);
        uint32_t left[3][4];  // of even and odd rows, shifted by dy: of their first 8 pixels, and their last
#pragma unroll
        for (int dy = 0; dy < 3; dy += 2)
          load_matrices(left[dy], (channel % 2 ? odd[dy / 2] : even + dy * 8) + channel * kHiddenRow);
#pragma unroll
        for (int k = 0; k < 4; k += 2) left[1][k] = left[0][k + 1], left[1][k + 1] = left[2][k];
        const uint4& two = taps.two[part];
        const uint2 rows[3] = {make_uint2(two.x, two.y), make_uint2(two.z, two.w), taps.third[part]};
#pragma unroll
        for (int dy = 0; dy < 3; ++dy) {
          const uint32_t inner = __byte_perm(rows[dy].x, rows[dy].y, near), outer = __byte_perm(rows[dy].x, rows[dy].y, far);
          mma(sums[part][0], left[dy], {inner, outer}, T{});
          mma_half(sums[part][1], {left[dy][2], left[dy][3]}, inner, T{});
        }
      }
      if (i + 1 < kOwn) taps.load(i + 1);
      Pairs<T, 4> result;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float2 v[kParts];
#pragma unroll
        for (int part = 0; part < kParts; ++part)
          v[part] = make_float2(sums[part][j / 2][j % 2 * 2], sums[part][j / 2][j % 2 * 2 + 1]);
        result.v[j] = f(i, j, v);
      }
      *reinterpret_cast<Pairs<T, 4>*>(to + i * kRow) = result;
    }
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// y = x + w_out · Middle(3×3 of w_in · norm of x).

// The 3×3 alone, and gelu(a) ⊙ b of its two parts; in kUnit.
struct Convolved {
  static constexpr int kParts = 1, kHidden = 48;
  template <class T>
  static constexpr float kUnit = 1;
  template <class T>
  static __device__ __forceinline__ float2 of(const float2 (&v)[1]) {
    return v[0];
  }
};
struct Gated {
  static constexpr int kParts = 2, kHidden = 64;
  template <class T>
  static constexpr float kUnit = kGateUnit<T>;
  template <class T>
  static __device__ __forceinline__ float2 of(const float2 (&v)[2]) {
    return make_float2(gelu_times<T>(v[0].x, v[1].x), gelu_times<T>(v[0].y, v[1].y));
  }
};

template <class T, int kTiles, class Middle>
struct Fused {
  static constexpr int kParts = Middle::kParts, kMade = Middle::kHidden / kParts, kRow = kMade * 2 + 16;
  using Tile = FusedTile<T, kTiles, Middle::kHidden, kParts, kMade>;
  static constexpr int kShared = Tile::kShared + Tile::kChannels * kRow, kBlocks = kTiles <= 3 ? 2 : 1;

  View<const T> x;  // the images as a whole, as y
  View<T> y;
  Norm norm;
  const T* w_in;            // [hidden][channels], parts pair by pair, as bands
  const T* bands;           // [hidden + 64][kBand]
  Matrices<const T> w_out;  // [channels][hidden / parts]
  int hidden;

  __device__ __forceinline__ void run(unsigned char* shared) const {
    Tile t(x, shared, blockIdx.z, blockIdx.y * Tile::kSide, blockIdx.x * Tile::kSide);
    unsigned char* out = shared + Tile::kShared;
    const T* in_from = w_in + Tile::copied_row() * x.channels + Tile::copied_piece() * 8;
    const auto load_out = [&](int first) {
      const int row = Tile::copied_row(), piece = Tile::copied_piece(), left = hidden - first;
      const int own = row / 16 * 16 + row % 8 / 2 * 4 + row / 8 % 2 * 2 + row % 2;  // so laid out, a lane has sums of neighbours
      const T* from = w_out.of(t.image, 0) + own * w_out.of_row + first / kParts + piece * 8;
#pragma unroll
      for (int i = 0; i < Tile::kChannels; i += Tile::kThreads / 4)
#pragma unroll
        for (int k = 0; k < kMade / 8; k += 4)
          if (row + i < Tile::kChannels && piece + k < kMade / 8)
            copy_async_or_zero(out + (row + i) * kRow + (piece + k) * 16, from + i * w_out.of_row + k * 8,
                               own + i < x.channels && (piece + k) * 8 * kParts < left);
    };
    t.load_in(in_from, hidden);
    t.normalise(norm);
    wait_for_copies();
    __syncthreads();

    const int m0 = Tile::warp() * 32;
    float sums[2][kTiles * 2][4] = {};
#pragma unroll 1
    for (int first = 0; first < hidden; first += Tile::kHidden) {
      t.expand();
      const typename Tile::Taps taps(bands + first * kBand);
      __syncthreads();
      load_out(first);
      in_from += Tile::kHidden * x.channels;
      if (first + Tile::kHidden < hidden) t.load_in(in_from, hidden - first - Tile::kHidden);
      t.convolve(taps, 0, [](int, int, const float2(&v)[kParts]) { return to_pair<T>(Middle::template of<T>(v)); });
      wait_for_copies();
      __syncthreads();
      const unsigned char* from = t.tile + columns_lane<T, false>(Tile::kRow) + m0 * 2;
#pragma unroll
      for (int k = 0; k < kMade; k += 16) {
        uint32_t pixels[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) load_columns<T, false>(pixels[i], from + k * Tile::kRow + i * 32, Tile::kRow);
#pragma unroll
        for (int j = 0; j < kTiles * 2; j += 2) {
          uint32_t right[4];
          load_matrices(right, out + (j * 8 + right_lane().row) * kRow + k * 2 + right_lane().piece * 16);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            mma(sums[i][j], pixels[i], {right[0], right[1]}, T{});
            mma(sums[i][j + 1], pixels[i], {right[2], right[3]}, T{});
          }
        }
      }
    }

    const int p = Tile::lane() / 4;  // of the 8 that lanes 4 · warp + i made
    const int2 at = Tile::pixel_of(Tile::warp() * 4, p / 2, p % 2);
    const int columns = min(Tile::kSide, x.width - t.x0) - at.x, channel = Tile::lane() % 4 * 4;
    if (at.y >= min(Tile::kSide, x.rows.end - t.y0)) return;
    const int64_t place = x.at(t.image, t.y0 + at.y, t.x0 + at.x) - x.data + channel;
    const auto has = [&](int i, int j) { return i * 2 < columns && channel + j * 16 < x.channels; };
    const auto at_pixel = [&](int i, int j) { return place + i * 2 * x.channels + j * 16; };
    Pairs<T, 2> added[4][kTiles];
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
        if (has(i, j)) added[i][j] = load_pairs<2>(x.data + at_pixel(i, j));
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        float2 sum[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float2 old = to_float2(added[i][j].v[e]);
          const float (&own)[4] = sums[i / 2][j * 2 + e];
          constexpr float kUnit = Middle::template kUnit<T>;
          sum[e] = make_float2(fmaf(own[i % 2 * 2], kUnit, old.x), fmaf(own[i % 2 * 2 + 1], kUnit, old.y));
        }
        if (has(i, j)) store_pairs(y.data + at_pixel(i, j), sum);
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

// Registers are shared out among the blocks that can do with so few of them, where shared memory has room for these.
template <class T, class Kernel>
__global__ void __launch_bounds__(256, Kernel::kBlocks* Kernel::kShared <= kSharedOfMultiprocessor ? Kernel::kBlocks : 1)
    run_fused(Kernel kernel) {
  AUTOHDR_DYNAMIC_SHARED(unsigned char, shared);
  kernel.run(shared);
}

// Whether there are such kernels for half precision, and for images of these channels; of float32 in TF32.
template <class T>
constexpr bool kFuses = sizeof(T) == 2;
template <class T>
bool can_fuse(const Layout& layout) {
  return (kFuses<T> || tf32_allowed()) && !layout.copies && layout.channels <= 96;
}

// Of whole images.
template <class Middle, class T>
void fused(const Expansion<T>& e, View<const T> x, const Matrices<const T>& w_out, View<T> y, int64_t images,
           cudaStream_t stream) {
  const auto run = [&](auto tiles) {
    constexpr int kTiles = decltype(tiles)::value;
    const auto start = [&](auto kernel) {
      using F = decltype(kernel);
      launch(run_fused<T, F>, dim3(ceil_div(x.width, F::Tile::kColumns), ceil_div(x.rows.size(), F::Tile::kRows), images),
             dim3(F::Tile::kThreads), F::kShared, stream, kernel);
    };
    if constexpr (kFuses<T>) {
      start(Fused<T, kTiles, Middle>{x, y, e.norm, e.weight, e.bands, w_out, e.hidden});
    } else {
      using Most = FusedTf32<kTiles, 32, Middle>;
      if constexpr (Most::kShared > kMaxShared)
        if (Most::kShared > most_shared())
          return start(FusedTf32<kTiles, 16, Middle>{x, y, e.norm, e.weight, e.bands, w_out, e.hidden});
      start(Most{x, y, e.norm, e.weight, e.bands, w_out, e.hidden});
    }
  };
  x.channels <= 48 ? run(std::integral_constant<int, 3>{}) : run(std::integral_constant<int, 6>{});
}

}  // namespace image
}  // namespace autohdr
