// mdta's statistics as one kernel, for few channels of half precision (common/cuda_fused.cuh): q and k of a head are made for 8 × 16
// pixels at a time, and what they add to its Gram matrix and to their squares' sums.
#pragma once
#include "common/cuda_fused.cuh"

namespace autohdr {
namespace image {

// kHeads heads of up to 48 channels each; x has up to 48 · kHeads.
template <class T, int kHeads>
struct FusedStatistics {
  static constexpr int kSize = 48, kRow = 2 * kSize * 2 + 16;
  using Tile = FusedTile<T, kHeads * 3, 1, kRow>;
  static constexpr int kWarps = Tile::kThreads / 32, kSquares = kHeads * 2 * kSize;  // floats of a warp
  static constexpr int kShared = Tile::kShared + kWarps * kSquares * 4;

  View<const T> x;  // the images as a whole
  Range rows;       // that are summed
  Norm norm;
  const T* w_in;      // [hidden][channels]: q of all heads, k of all heads
  const float* taps;  // [9][taps_stride]
  int hidden, taps_stride, heads, size, padded;
  float *gram, *squares;  // [slot][image][head][size][size], [image][slot][hidden]

  // The hidden channel of q's and k's channel c of a head.
  __device__ __forceinline__ int channel_of(int head, int c) const {
    return head * padded + (c < padded ? c : hidden / 2 - padded + c);
  }

  __device__ __forceinline__ void run(unsigned char* shared) const {
    Tile t(x, shared);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, both = 2 * padded;
    float* own_squares = reinterpret_cast<float*>(shared + Tile::kShared) + warp * kSquares;
    const int across = (x.width + Tile::kColumns - 1) / Tile::kColumns,
              tiles = across * ((rows.end - rows.first + Tile::kRows - 1) / Tile::kRows);
    const auto load_in = [&](int head, int c) {
      c += Tile::copied_row();
      t.load_in(w_in + int64_t{channel_of(head, c)} * x.channels, c < both);
    };
    const int m0 = warp % 3 * 16, n0 = warp / 3 * 24;  // of the Gram matrix, by six warps
    float total[kHeads][3][4] = {};
#pragma unroll 1
    for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
      t.start(index, rows.first);
      load_in(0, 0);
      t.normalise(norm);
      wait_for_copies();
      __syncthreads();
#pragma unroll
      for (int head = 0; head < kHeads; ++head) {
        if (head >= heads) break;
#pragma unroll 1
        for (int c = 0; c < both; c += Tile::kHidden) {
          t.expand();
          __syncthreads();
          if (c + Tile::kHidden < both)
            load_in(head, c + Tile::kHidden);
          else if (head + 1 < heads)
            load_in(head + 1, 0);
          float2 sum = make_float2(0, 0);
          const int own = c + Tile::pair() * 2;
          if (own < both)
            t.convolve(taps + channel_of(head, own), taps_stride, true, c, [&](int y, int x_, const float2(&v)[1]) {
              const bool inside = t.y0 + y < rows.end && t.x0 + x_ < x.width;
              const Pair<T> rounded = to_pair<T>(inside ? v[0] : make_float2(0, 0));
              add_product(sum, to_float2(rounded), to_float2(rounded));
              return rounded;
            });
          sum.x += __shfl_xor_sync(~0u, sum.x, 16), sum.y += __shfl_xor_sync(~0u, sum.y, 16);
          if (lane < 16 && own < both) {
            float2& to = *reinterpret_cast<float2*>(own_squares + head * both + own);
            to = index == static_cast<int>(blockIdx.x) ? sum : make_float2(to.x + sum.x, to.y + sum.y);
          }
          wait_for_copies();
          __syncthreads();
        }
        if (warp >= 6) continue;
        float sums[3][4] = {};
        const unsigned char *q = t.tile + columns_lane<T, false>(kRow) + m0 * 2,
                            *k = t.tile + columns_lane<T, true>(kRow) + (padded + n0) * 2;
#pragma unroll
        for (int p = 0; p < Tile::kPixels; p += 16) {
          uint32_t left[4], right[2][4];
          load_columns<T, false>(left, q + p * kRow, kRow);
          load_columns<T, true>(right[0], k + p * kRow, kRow);
          load_columns<T, true>(right[1], k + p * kRow + 32, kRow);
#pragma unroll
          for (int j = 0; j < 3; ++j) mma(sums[j], left, {right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]}, T{});
        }
#pragma unroll
        for (int i = 0; i < 12; ++i) total[head][i / 4][i % 4] += sums[i / 4][i % 4];
      }
    }
    __syncthreads();
    const float* all = reinterpret_cast<const float*>(shared + Tile::kShared);
    for (int i = threadIdx.x; i < heads * both; i += Tile::kThreads) {
      float sum = 0;
      for (int w = 0; w < kWarps; ++w) sum += all[w * kSquares + i];
      squares[(t.image * gridDim.x + blockIdx.x) * hidden + channel_of(i / both, i % both)] = sum;
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
  return std::min<int64_t>(512, FusedTile<T, 3, 1, 16>::count(x, rows));
}

template <class T>
void fused_statistics(const Expansion<T>& e, View<const T> x, const Range& rows, int heads, int64_t slots, float* gram,
                      float* squares, int64_t images, cudaStream_t stream) {
  const auto run = [&](auto count) {
    using F = FusedStatistics<T, decltype(count)::value>;
    launch(run_fused<T, F>, dim3(slots, images), dim3(F::Tile::kThreads), F::kShared, stream,
           F{x, rows, e.norm, e.weight, e.taps, e.hidden, e.taps_stride, heads, static_cast<int>(e.groups.size),
             e.groups.padded(), gram, squares});
  };
  if constexpr (kFuses<T>) x.channels <= 48 ? run(std::integral_constant<int, 1>{}) : run(std::integral_constant<int, 2>{});
}

}  // namespace image
}  // namespace autohdr
