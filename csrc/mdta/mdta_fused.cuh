// mdta's statistics as one kernel, for few channels of half precision (common/cuda_fused.cuh): q and k of a head are made for 14 × 14
// pixels at a time, and what they add to its Gram matrix and to their squares' sums.
#pragma once
#include "common/cuda_fused.cuh"

namespace autohdr {
namespace image {

// kHeads heads of up to 48 channels each; x has up to 48 · kHeads.
template <class T, int kHeads>
struct FusedStatistics {
  static constexpr int kSize = 48;
  using Tile = FusedTile<T, kHeads * 3, kSize, 1, 2 * kSize>;
  static constexpr int kShared = Tile::kShared, kRow = Tile::kRow, kBlocks = 1;

  View<const T> x;  // the images as a whole
  Range rows;       // that are summed
  Norm norm;
  const T* w_in;   // [hidden][channels]: q of all heads, k of all heads
  const T* bands;  // [hidden + 64][kBand]
  int hidden, heads, size, padded;
  float *gram, *squares;  // [slot][image][head][size][size], [image][slot][hidden]

  // The first hidden channel of a head's q or k.
  __device__ __forceinline__ int first_of(int head, int which) const { return which * (hidden / 2) + head * padded; }

  __device__ __forceinline__ void run(unsigned char* shared) const {
    Tile t(x, shared, blockIdx.y, 0, 0);
    const int warp = Tile::warp(), lane = Tile::lane();
    const unsigned across = (x.width + Tile::kSide - 1) / Tile::kSide,
                   tiles = across * ((rows.end - rows.first + Tile::kSide - 1) / Tile::kSide);
    const T* in_from = w_in + Tile::copied_row() * x.channels + Tile::copied_piece() * 8;
    const auto load_in = [&](int head, int which) { t.load_in(in_from + first_of(head, which) * x.channels, padded); };
    const int m0 = warp % 3 * 16, n0 = warp / 3 * 24;  // of the Gram matrix, by six warps
    float total[kHeads][3][4] = {}, own_squares[kHeads][2][Tile::kOwn] = {};
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
          t.convolve(taps, which * kSize, [&](int i, int j, const float2(&v)[1]) {
            Pair<T> rounded = to_pair<T>(v[0]);
            reinterpret_cast<uint32_t&>(rounded) &= inside[j];
            const float2 both = to_float2(rounded);
            own_squares[head][which][i] += both.x * both.x + both.y * both.y;
            return rounded;
          });
          wait_for_copies();
          __syncthreads();
        }
        if (warp >= 6) continue;
        float sums[3][4] = {};
        const unsigned char *q = t.tile + (m0 + left_lane().row) * kRow + left_lane().piece * 16,
                            *k = t.tile + (kSize + n0 + right_lane().row) * kRow + right_lane().piece * 16;
#pragma unroll
        for (int p = 0; p < Tile::kNear; p += 16) {
          uint32_t left[4], right[2][4];
          load_matrices(left, q + p * 2);
          load_matrices(right[0], k + p * 2);
          load_matrices(right[1], k + 16 * kRow + p * 2);
#pragma unroll
          for (int j = 0; j < 3; ++j) mma(sums[j], left, {right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]}, T{});
        }
#pragma unroll
        for (int i = 0; i < 12; ++i) total[head][i / 4][i % 4] += sums[i / 4][i % 4];
      }
    }
#pragma unroll
    for (int i = 0; i < kHeads * 2 * Tile::kOwn; ++i) {
      const int head = i / (2 * Tile::kOwn), which = i / Tile::kOwn % 2, own = i % Tile::kOwn, c = warp * Tile::kOwn + own;
      const float sum = sum_over(32, own_squares[head][which][own]);
      if (lane == 0 && head < heads && c < padded)
        squares[(t.image * gridDim.x + blockIdx.x) * hidden + first_of(head, which) + c] = sum;
    }
    if (warp >= 6) return;
#pragma unroll
    for (int head = 0; head < kHeads; ++head) {
      if (head >= heads) break;
      float* to = gram + ((static_cast<int64_t>(blockIdx.x) * gridDim.y + t.image) * heads + head) * size * size;
#pragma unroll
      for (int j = 0; j < 3; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int m = m0 + e / 2 * 8 + lane / 4, n = n0 + j * 8 + lane % 4 * 2 + e % 2;
          if (m < size && n < size) to[m * size + n] = total[head][j][e];
        }
    }
  }
};

inline bool can_fuse_statistics(int channels, int heads, int padded) { return padded <= 48 && heads <= (channels <= 48 ? 1 : 2); }

// Blocks that share the tiles of an image: enough to fill a device, and as many on every one, so that results are the same.
template <class T>
int64_t fused_statistics_slots(const View<const T>& x, const Range& rows) {
  constexpr int kSide = FusedStatistics<T, 1>::Tile::kSide;
  return std::min<int64_t>(512, ceil_div(x.width, kSide) * ceil_div(rows.size(), kSide));
}

template <class T>
void fused_statistics(const Expansion<T>& e, View<const T> x, const Range& rows, int heads, int64_t slots, float* gram,
                      float* squares, int64_t images, cudaStream_t stream) {
  const auto run = [&](auto count) {
    using F = FusedStatistics<T, decltype(count)::value>;
    launch(run_fused<T, F>, dim3(slots, images), dim3(F::Tile::kThreads), F::kShared, stream,
           F{x, rows, e.norm, e.weight, e.bands, e.hidden, heads, static_cast<int>(e.groups.size), e.groups.padded(), gram,
             squares});
  };
  if constexpr (kFuses<T>) x.channels <= 48 ? run(std::integral_constant<int, 1>{}) : run(std::integral_constant<int, 2>{});
}

}  // namespace image
}  // namespace autohdr
