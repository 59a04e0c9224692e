// mdta's statistics in half precision or TF32, of heads of up to 48 channels: q and k of a head are made for some pixels at a time,
// and what they add to its Gram matrix and to their squares' sums, in half precision diagonals of q qᵀ and k kᵀ. For few channels
// this is one kernel (common/cuda_fused.cuh), of 14 × 14 pixels at a time, in TF32 of fewer.
#pragma once
#include "common/cuda_fused.cuh"

namespace autohdr {
namespace image {

// kHeads heads of up to 48 channels each; x has up to 48 · kHeads.
template <class T, int kHeads>
struct FusedStatistics {
  static constexpr int kSize = 48;
  using Tile = FusedTile<T, kHeads * 3, kSize, 1, 2 * kSize>;
  static constexpr int kShared = Tile::kShared, kRow = Tile::kRow, kBlocks = kHeads == 1 ? 2 : 1;

  View<const T> x;  // the images as a whole
  Range rows;       // that are summed
  Norm norm;
  const T* w_in;   // [hidden][channels]: q of all heads, k of all heads
  const T* bands;  // [hidden + 64][kBand]
  int hidden, heads, size, padded;
  float *gram, *squares;  // [slot][image][head][size][size], [image][slot][hidden]

  // What a warp multiplies of a head's q and k, in groups of 8 channels: q's six, then k's. Two of them by four others: of all warps
  // together q kᵀ, and of q qᵀ and k kᵀ the diagonals.
  struct Groups8 {
    int left, right[4];
    __device__ __forceinline__ explicit Groups8(int warp) {
      const int u = warp - 3, of_q = u % 2 * 3;
      if (warp < 3)
        left = warp * 2, right[0] = 6, right[1] = 7, right[2] = left, right[3] = left + 1;
      else if (warp < 7)
        left = 8 + u / 2 * 2, right[0] = of_q, right[1] = of_q + 1, right[2] = of_q + 2, right[3] = left + u % 2;
      else
        left = 6, right[0] = right[2] = 6, right[1] = right[3] = 7;
    }
  };

  // The first hidden channel of a head's q or k.
  __device__ __forceinline__ int first_of(int head, int which) const { return which * (hidden / 2) + head * padded; }

  __device__ __forceinline__ void run(unsigned char* shared) const {
    Tile t(x, shared, blockIdx.y, 0, 0);
    const int warp = Tile::warp(), lane = Tile::lane();
    const unsigned across = (x.width + Tile::kSide - 1) / Tile::kSide,
                   tiles = across * ((rows.end - rows.first + Tile::kSide - 1) / Tile::kSide);
    const T* in_from = w_in + Tile::copied_row() * x.channels + Tile::copied_piece() * 8;
    const auto load_in = [&](int head, int which) { t.load_in(in_from + first_of(head, which) * x.channels, padded); };
    float total[kHeads][4][4] = {};
#pragma unroll 1
    for (unsigned index = blockIdx.x; index < tiles; index += gridDim.x) {
      t.y0 = rows.first + index / across * Tile::kSide, t.x0 = index % across * Tile::kSide;
      load_in(0, 0);
      t.normalise(norm);
      uint32_t inside[4];  // of pairs of pixels, as masks
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        inside[j] = 0;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int2 at = Tile::pixel_of(lane, j, e);
          if (at.x < min(Tile::kSide, x.width - t.x0) && at.y < min(Tile::kSide, rows.end - t.y0)) inside[j] |= 0xffffu << e * 16;
        }
      }
      wait_for_copies();
      __syncthreads();
#pragma unroll
      for (int head = 0; head < kHeads; ++head) {
        if (head >= heads) break;
#pragma unroll
        for (int which = 0; which < 2; ++which) {
          t.expand();
          const typename Tile::Taps taps(bands + first_of(head, which) * kBand);
          __syncthreads();
          if (which == 0)
            load_in(head, 1);
          else if (head + 1 < heads)
            load_in(head + 1, 0);
          t.convolve(taps, which * kSize, [&](int, int j, const float2(&v)[1]) {
            Pair<T> rounded = to_pair<T>(v[0]);
            reinterpret_cast<uint32_t&>(rounded) &= inside[j];
            return rounded;
          });
          wait_for_copies();
          __syncthreads();
        }
        float sums[4][4] = {};
        const Groups8 own(Tile::warp());
        const auto row = [&](int group, int within) { return t.tile + (group * 8 + within) * kRow; };
        const unsigned char* left_row = row(own.left, left_lane().row) + left_lane().piece * 16;
        const unsigned char* right_rows[2];
#pragma unroll
        for (int i = 0; i < 2; ++i)
          right_rows[i] =
              row(right_lane().row < 8 ? own.right[i * 2] : own.right[i * 2 + 1], right_lane().row % 8) + right_lane().piece * 16;
#pragma unroll
        for (int p = 0; p < Tile::kSide * 16; p += 16) {  // the last pixels are none
          uint32_t left[4], right[2][4];
          load_matrices(left, left_row + p * 2);
#pragma unroll
          for (int i = 0; i < 2; ++i) load_matrices(right[i], right_rows[i] + p * 2);
#pragma unroll
          for (int j = 0; j < 4; ++j) mma(sums[j], left, {right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]}, T{});
        }
#pragma unroll
        for (int i = 0; i < 16; ++i) total[head][i / 4][i % 4] += sums[i / 4][i % 4];
      }
    }
    const Groups8 own(Tile::warp());
#pragma unroll
    for (int head = 0; head < kHeads; ++head) {
      if (head >= heads) break;
      const int64_t slot = blockIdx.x;
      float *gram_to = gram + ((slot * gridDim.y + t.image) * heads + head) * size * size,
            *squares_to = squares + (t.image * gridDim.x + slot) * hidden;
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = own.left * 8 + e / 2 * 8 + lane / 4, column = own.right[j] * 8 + lane % 4 * 2 + e % 2,
                    m = min(row, column), n = max(row, column) - kSize;
          if (row == column && row % kSize < padded) squares_to[first_of(head, row / kSize) + row % kSize] = total[head][j][e];
          if (m < size && n >= 0 && n < size) gram_to[m * size + n] = total[head][j][e];
        }
    }
  }
};

// The same of float32 in TF32: see common/cuda_fused_tf32.cuh. A warp multiplies half of k's channels by q's, over a quarter of a
// tile's pixels, and has a slot of its own, to which it adds its sums every 8 tiles: the tensor cores cut instead of rounding, and a
// long sum would drift. Squares are of what is not rounded yet.
template <int kHeads>
struct FusedStatisticsTf32 {
  static constexpr int kSize = 48, kMade = 32, kQuarters = 4;
  using Tile = Tf32Tile<kHeads * 3, 1, kMade, 2 * kSize, true>;
  static constexpr int kShared = (Tile::kFloats + kHeads * 2 * kSize) * 4, kBlocks = kHeads == 1 ? 2 : 1;

  View<const float> x;  // the images as a whole
  Range rows;           // that are summed
  Norm norm;
  const float* w_in;   // [hidden][channels]: q of all heads, k of all heads
  const float* bands;  // [hidden + 64][kBand]
  int hidden, heads, size, padded;
  float *gram, *squares;  // [slot][image][head][size][size], [image][block][hidden]

  // The hidden channel that row `row` of a head's q and k is, or a negative number.
  __device__ __forceinline__ int channel_of(int head, int row) const {
    const int which = row / kSize, within = row - which * kSize;
    return within < padded ? which * (hidden / 2) + head * padded + within : -1;
  }

  __device__ __forceinline__ void run(unsigned char* shared) const {
    float *memory = reinterpret_cast<float*>(shared), *square = memory + Tile::kFloats;  // [head][q and k]
    Tile t(x, memory, blockIdx.y, 0, 0);
    const unsigned across = (x.width + Tile::kColumns - 1) / Tile::kColumns,
                   tiles = across * ((rows.end - rows.first + Tile::kRows - 1) / Tile::kRows);
    const auto load_in = [&](int head, int first) { t.load_in(w_in, [&](int row) { return channel_of(head, first + row); }); };
    const auto half = [] { return Tile::warp() % 2; };
    const auto quarter = [] { return Tile::warp() / 2; };
    for (int i = threadIdx.x; i < kHeads * 2 * kSize; i += Tile::kThreads) square[i] = 0;
    float sums[kHeads][3][3][4] = {};
    const auto tile_of = [](unsigned turn) { return blockIdx.x + turn * gridDim.x; };
#pragma unroll 1
    for (unsigned turn = 0; tile_of(turn) < tiles; ++turn) {
      const unsigned index = tile_of(turn);
      t.y0 = rows.first + index / across * Tile::kRows, t.x0 = index % across * Tile::kColumns;
      load_in(0, 0);
      t.normalise(norm);
      wait_for_copies();
      __syncthreads();
#pragma unroll
      for (int head = 0; head < kHeads; ++head) {
        if (head >= heads) break;
#pragma unroll 1
        for (int first = 0; first < 2 * kSize; first += kMade) {
          t.expand();
          __syncthreads();
          const typename Tile::Taps taps(bands + max(channel_of(head, first + Tile::hidden_channel()), 0) * kBand);
          if (first + kMade < 2 * kSize)
            load_in(head, first + kMade);
          else if (head + 1 < heads)
            load_in(head + 1, 0);
          const int columns = x.width - t.x0 - Tile::own_column(), there = rows.end - t.y0;
          float sum = 0;
          t.convolve(taps, first, [&](int row, const float2(&v)[1]) {
            const bool inside = row < there;
            const float2 own = make_float2(inside && columns > 0 ? v[0].x : 0.0f, inside && columns > 1 ? v[0].y : 0.0f);
            sum += own.x * own.x + own.y * own.y;
            return own;
          });
          sum = sum_over(8, sum);  // of the thread's channel, over the columns
          if (Tile::lane() % 8 == 0) square[head * 2 * kSize + first + Tile::own_channel()] += sum;
          wait_for_copies();
          __syncthreads();
        }
        constexpr int kOwn = Tile::kPixels / kQuarters;
        const float *left_from = t.tile + left_lane().row * Tile::kRow + quarter() * kOwn + left_lane().piece * 4,
                    *right_from =
                        t.tile + (kSize + half() * 24 + Tile::lane() % 8) * Tile::kRow + quarter() * kOwn + Tile::lane() / 8 * 4;
#pragma unroll
        for (int p = 0; p < kOwn; p += 16) {
          uint32_t right[3][4];
#pragma unroll
          for (int j = 0; j < 3; ++j) load_matrices(right[j], right_from + j * 8 * Tile::kRow + p);
#pragma unroll
          for (int step = 0; step < 2; ++step)
#pragma unroll
            for (int i = 0; i < 3; ++i) {
              uint32_t left[4];
              load_matrices(left, left_from + i * 16 * Tile::kRow + p + step * 8);
#pragma unroll
              for (int j = 0; j < 3; ++j) mma_tf32(sums[head][i][j], left, {right[j][step * 2], right[j][step * 2 + 1]});
            }
        }
      }
      if (turn % 8 < 7 && tile_of(turn + 1) < tiles) continue;
#pragma unroll
      for (int head = 0; head < kHeads; ++head) {
        if (head >= heads) break;
        const int lane = Tile::lane();
        const int64_t slot = blockIdx.x * kQuarters + quarter();
        float* to = gram + ((slot * gridDim.y + t.image) * heads + head) * size * size;
#pragma unroll
        for (int i = 0; i < 36; ++i) {
          const int m = i / 12 * 16 + i % 4 / 2 * 8 + lane / 4, n = half() * 24 + i / 4 % 3 * 8 + lane % 4 * 2 + i % 2;
          float& sum = sums[head][i / 12][i / 4 % 3][i % 4];
          if (m < size && n < size) to[m * size + n] = turn < 8 ? sum : to[m * size + n] + sum;
          sum = 0;
        }
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < heads * 2 * kSize; i += Tile::kThreads) {
      const int channel = channel_of(i / (2 * kSize), i % (2 * kSize));
      if (channel >= 0) squares[(t.image * gridDim.x + blockIdx.x) * hidden + channel] = square[i];
    }
  }
};

template <class T, int kHeads>
using Statistics = std::conditional_t<kFuses<T>, FusedStatistics<T, kHeads>, FusedStatisticsTf32<kHeads>>;

// Where images of these channels have fused kernels.
template <class T>
bool can_fuse_statistics(int channels, int heads, int padded) {
  if (padded > 48 || heads > (channels <= 48 ? 1 : 2)) return false;
  return kFuses<T> || (channels <= 48 ? FusedStatisticsTf32<1>::kShared : FusedStatisticsTf32<2>::kShared) <= most_shared();
}

// Blocks that share the tiles of an image: enough to fill a device, and as many on every one, so that results are the same. And how
// many slots of the Gram matrix each has.
template <class T>
constexpr int kSlotsOfBlock = kFuses<T> ? 1 : FusedStatisticsTf32<1>::kQuarters;
template <class T>
int64_t fused_statistics_blocks(const View<const T>& x, const Range& rows) {
  using One = typename Statistics<T, 1>::Tile;
  using Two = typename Statistics<T, 2>::Tile;
  return std::min<int64_t>(size_for(512, 2),
                           ceil_div(x.width, One::kColumns) * ceil_div(rows.size(), x.channels <= 48 ? One::kRows : Two::kRows));
}

template <class T>
void fused_statistics(const Expansion<T>& e, View<const T> x, const Range& rows, int heads, int64_t blocks, float* gram,
                      float* squares, int64_t images, cudaStream_t stream) {
  const auto run = [&](auto count) {
    using F = Statistics<T, decltype(count)::value>;
    launch(run_fused<T, F>, dim3(blocks, images), dim3(F::Tile::kThreads), F::kShared, stream,
           F{x, rows, e.norm, e.weight, e.bands, e.hidden, heads, static_cast<int>(e.groups.size), e.groups.padded(), gram,
             squares});
  };
  x.channels <= 48 ? run(std::integral_constant<int, 1>{}) : run(std::integral_constant<int, 2>{});
}

// ---------------------------------------------------------------------------------------------------------------------
// The same from `hidden`, of any number of heads of up to 48 channels each.

constexpr int kHeadChannels = 48, kHeadRows = 8, kHeadThreads = 192;
using HeadTiles = Tiles<kHeadRows, kTileColumns>;
template <class T>
struct HeadTile {  // in shared memory: q and k before the 3×3, with neighbours, and after it
  static constexpr int kRow = row_of_columns<T>(kHeadChannels), kOfRow = (kTileColumns + 2) * kRow,
                       kNear = (kHeadRows + 2) * kOfRow, kPixels = kHeadRows * kTileColumns, kMade = kPixels * kRow,
                       kShared = 2 * (kNear + kMade);
};

// A block owns some tiles of a head of an image; a warp 16 channels of q or k, and then 16 of q by 24 of k and some of the squares.
// gram and squares (+)= as those of FusedStatistics.
template <class T>
__global__ void __launch_bounds__(kHeadThreads, 2)
    convolve_heads(HeadTiles tiles, View<const T> hidden, const float* taps, int stride, int size, int padded, float* gram,
                   float* squares, bool add) {
  AUTOHDR_DYNAMIC_SHARED(unsigned char, shared);
  using Tile = HeadTile<T>;
  constexpr int kRow = Tile::kRow;
  unsigned char* made = shared + 2 * Tile::kNear;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, which = warp / 3, set = warp % 3, image = blockIdx.z,
            first[2] = {static_cast<int>(blockIdx.y) * padded, tiles.channels / 2 + static_cast<int>(blockIdx.y) * padded},
            own = which * (tiles.channels / 2) + first[0] + set * 16;
  const bool has[2] = {set * 16 < padded, set * 16 + 8 < padded};
  const TapPairs<uint32_t[2]> w[2] = {load_tap_pairs<T>(taps + own, stride, has[0]),
                                      load_tap_pairs<T>(taps + own + 8, stride, has[1])};
  // Of q, 16 channels of `set`; of k, groups of 8: one whose squares this warp adds up, and two others. And such a group of q.
  const int k_groups[3] = {which * 3 + set, which * 3 + (set + 1) % 3, which * 3 + (set + 2) % 3}, q_group = set * 2 + which;
  const unsigned char *left_from = made + columns_lane<T, false>(kRow) + set * 32,
                      *right_from[2] = {made + Tile::kMade + k_groups[0] * 16 +
                                            columns_lane<T, true>(kRow, (k_groups[1] - k_groups[0]) * 16),
                                        made + Tile::kMade + k_groups[2] * 16 +
                                            columns_lane<T, true>(kRow, (q_group - k_groups[2]) * 16 - Tile::kMade)};
  float total[5][4] = {};
  for (uint32_t tile = blockIdx.x; tile < tiles.of_image(); tile += gridDim.x) {
    const int down = tile / tiles.across(), y0 = tiles.rows.first + down * kHeadRows,
              x0 = static_cast<int>(tile - down * tiles.across()) * kTileColumns;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      copy_tile<kHeadRows, kHeadChannels, kHeadThreads, 1>(shared + i * Tile::kNear, hidden, image, y0, x0, hidden.rows.end,
                                                           first[i], first[i] + padded);
    wait_for_copies();
    __syncthreads();
    unsigned char* to = made + which * Tile::kMade + lane / 4 * kRow + set * 32 + lane % 4 * 4;
    convolve_on_tensor_cores<T, kRow, Tile::kOfRow, false, kHeadRows>(
        shared + which * Tile::kNear + set * 32, w, kHeadRows, [&](int row, const float (&a)[4], const float (&b)[4]) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float* from = (i % 2 ? b : a) + i / 2 * 2;
            const bool inside = y0 + row < tiles.rows.end && x0 + i / 2 * 8 + lane / 4 < tiles.width;
            *reinterpret_cast<Pair<T>*>(to + (row * kTileColumns + i / 2 * 8) * kRow + i % 2 * 16) =
                to_pair<T>(inside ? make_float2(from[0], from[1]) : make_float2(0, 0));
          }
        });
    __syncthreads();
    float sums[5][4] = {};
#pragma unroll
    for (int p = 0; p < Tile::kPixels * kRow; p += 16 * kRow) {
      uint32_t left[4], right[2][4];
      load_columns<T, false>(left, left_from + p, kRow);
#pragma unroll
      for (int i = 0; i < 2; ++i) load_columns<T, true>(right[i], right_from[i] + p, kRow);
#pragma unroll
      for (int j = 0; j < 4; ++j) mma(sums[j], left, {right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]}, T{});
      mma(sums[4], {right[0][0], right[0][2], right[0][1], right[0][3]}, {right[0][0], right[0][1]}, T{});
    }
#pragma unroll
    for (int i = 0; i < 20; ++i) total[i / 4][i % 4] += sums[i / 4][i % 4];
  }

  const int64_t slot = blockIdx.x;
  float *gram_to = gram + ((slot * gridDim.z + image) * gridDim.y + blockIdx.y) * size * size,
        *squares_to = squares + (image * int64_t{gridDim.x} + slot) * tiles.channels;
  const auto put = [&](float& to, float sum) { to = add ? to + sum : sum; };
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int row = e / 2 * 8 + lane / 4, column = lane % 4 * 2 + e % 2, m = set * 16 + row;
#pragma unroll
    for (int j = 0; j < 3; ++j) {
      const int n = k_groups[j] * 8 + column;
      if (m < size && n < size) put(gram_to[m * size + n], total[j][e]);
    }
    if (m == q_group * 8 + column && m < padded) put(squares_to[first[0] + m], total[3][e]);
    const int k = k_groups[0] * 8 + column;
    if (row == column && k < padded) put(squares_to[first[1] + k], total[4][e]);
  }
}

// Blocks that share the tiles of a head: they fill a device, and have equally many.
inline int64_t head_slots(const HeadTiles& tiles, int heads) {
  const int64_t all = tiles.of_image();
  return ceil_div(all, ceil_div(all, std::max<int64_t>(1, 512 / heads)));
}

}  // namespace image
}  // namespace autohdr
