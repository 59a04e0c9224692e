// The gate's backward pass and that of the 3×3 before it as one kernel, for half precision: the gradient of what the gate takes stays
// in shared memory. All three sums over taps run on the tensor cores: pixels with diagonal matrices of taps, and pixels with pixels,
// where the diagonal is wanted.
#pragma once
#include "common/cuda_depthwise.cuh"

namespace autohdr {
namespace image {

// d: the gradients of a and b, given that of gelu(a)·b, which becomes `gated`.
template <class T>
__device__ __forceinline__ void differentiate_gate(float a, float b, float g, float& da, float& db, float& gated) {
  const StandardNormal n = standard_normal<T>(a);
  const float along = a * n.cdf;
  da = g * b * fmaf(a, n.density, n.cdf), db = g * along, gated = along * b;
}

// A block owns 14 × 14 pixels at a time, around which it makes d, of 16 × 16, from 18 × 18 of hidden; and two sets of 16 channels: 8 of
// a and the same 8 of b. A warp owns a set of half of the rows.
struct GateTile {
  static constexpr int kRows = 14, kColumns = 14, kSets = 2, kSetChannels = 16, kChannels = kSets * kSetChannels, kParts = 2,
                       kWarps = kSets * kParts, kThreads = kWarps * 32;
  static constexpr int kRow = kChannels * 2 + 16;                             // bytes of a pixel, against bank conflicts
  static constexpr int kAcross = kColumns + 2, kHiddenAcross = kColumns + 4;  // pixels of a row of d, and of hidden
  static constexpr int kPartRows = (kRows + 2) / kParts;                      // of d
  static constexpr int kDRow = kAcross * kRow, kHiddenRow = kHiddenAcross * kRow;
  static constexpr int kHiddenBytes = (kRows + 4) * kHiddenRow, kDBytes = (kRows + 2) * kDRow,
                       kShared = kHiddenBytes + kDBytes + 2 * kRow;  // what is multiplied without use lies two pixels further
};

// gated: of the tiles' rows; d_hidden, and slots[slot][9][channels] (+)= the taps' gradients, of what d_hidden's pixels give to them.
// hidden reaches two rows further and d_gated one, where the image does.
template <class T>
__global__ void __launch_bounds__(GateTile::kThreads, 4)
    differentiate_gated_depthwise(Tiles<GateTile::kRows, GateTile::kColumns> tiles, View<const T> hidden, View<const T> d_gated,
                                  const float* taps, View<T> gated, View<T> d_hidden, float* slots, bool add) {
  AUTOHDR_DYNAMIC_SHARED(unsigned char, shared);
  using G = GateTile;
  unsigned char *hidden_tile = shared, *d_tile = shared + G::kHiddenBytes;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, set = warp % G::kSets,
            row = warp / G::kSets * G::kPartRows;  // the warp's first, of d and of the own ones
  const int first = blockIdx.y * G::kChannels, channel = first + set * G::kSetChannels + lane % 4 * 2,  // of a; b's is 8 further
      gated_channel = (first + set * G::kSetChannels) / 2 + lane % 4 * 2;
  const bool has = channel < tiles.channels, diagonal = lane % 4 == lane / 8;

  const float* own_taps = taps + first + set * G::kSetChannels;
  const TapPairs<uint32_t[2]> w[2] = {load_tap_pairs<T>(own_taps, tiles.channels, has),
                                      load_tap_pairs<T>(own_taps + 8, tiles.channels, has)};
  if (threadIdx.x < 2 * G::kRow / 4) reinterpret_cast<uint32_t*>(d_tile + G::kDBytes)[threadIdx.x] = 0;
  float total[2][9] = {};  // of the lanes on the diagonal
  const uint32_t of_image = tiles.of_image(), all = of_image * tiles.images, across = tiles.across();
  for (uint32_t tile = blockIdx.x; tile < all; tile += gridDim.x) {
    const uint32_t image = tile / of_image, of_rows = (tile - image * of_image) / across;
    const int y0 = tiles.rows.first + static_cast<int>(of_rows) * G::kRows,
              x0 = static_cast<int>(tile - image * of_image - of_rows * across) * G::kColumns;
    __syncthreads();
    {  // The gradient of gated, zero outside of the image and d with it, lies where d will be that of a.
      const int own_set = threadIdx.x % G::kSets, column = threadIdx.x / G::kSets % G::kAcross,
                own_row = threadIdx.x / (G::kSets * G::kAcross), x = x0 - 1 + column, own = first / 2 + own_set * 8;
      constexpr int kRowsAtOnce = G::kThreads / (G::kSets * G::kAcross);
      const bool there = own * 2 < tiles.channels && x >= 0 && x < d_gated.width;
      const T* from = d_gated.at(image, y0 - 1 + own_row, x) + own;
#pragma unroll
      for (int r = 0; r < G::kRows + 2; r += kRowsAtOnce) {
        const int y = y0 - 1 + own_row + r;
        copy_async_or_zero(d_tile + (own_row + r) * G::kDRow + column * G::kRow + own_set * 32,
                           from + r * d_gated.width * d_gated.channels, there && y >= d_gated.rows.first && y < d_gated.rows.end);
      }
    }
    copy_tile<G::kAcross, G::kChannels, G::kThreads, 1>(hidden_tile, hidden, image, y0 - 1, x0 - 1, hidden.rows.end, first,
                                                        tiles.channels);
    wait_for_copies();
    __syncthreads();

    {
      unsigned char* d_to = d_tile + row * G::kDRow + lane / 4 * G::kRow + set * 32 + lane % 4 * 4;
      T* to = gated.at(image, y0 - 1 + row, x0 - 1 + lane / 4) + gated_channel;
      const int last = min(G::kRows, tiles.rows.end - y0);
      bool own[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int column = h * 8 + lane / 4;
        own[h] = has && column > 0 && column <= G::kColumns && x0 - 1 + column < gated.width;
      }
      convolve_on_tensor_cores<T, G::kRow, G::kHiddenRow, false, G::kPartRows>(
          hidden_tile + row * G::kHiddenRow + set * 32, w, G::kPartRows, [&](int r, const float (&a)[4], const float (&b)[4]) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              Pair<T>* at = reinterpret_cast<Pair<T>*>(d_to + r * G::kDRow + h * 8 * G::kRow);
              const float2 g = to_float2(*at);
              float2 da, db, product[1];
              differentiate_gate<T>(a[h * 2], b[h * 2], g.x, da.x, db.x, product[0].x);
              differentiate_gate<T>(a[h * 2 + 1], b[h * 2 + 1], g.y, da.y, db.y, product[0].y);
              at[0] = to_pair<T>(da), at[16 / sizeof(Pair<T>)] = to_pair<T>(db);
              if (own[h] && row + r > 0 && row + r <= last) store_pairs(to + h * 8 * gated.channels, product);
            }
            to += gated.width * gated.channels;
          });
    }
    __syncthreads();

    const unsigned char* d_part = d_tile + row * G::kDRow + set * 32;
    const int rows = min(min(G::kRows - row, G::kPartRows), tiles.rows.end - y0 - row);
    {
      T* to = d_hidden.at(image, y0 + row, x0 + lane / 4) + channel;
      bool own[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) own[h] = has && h * 8 + lane / 4 < min(G::kColumns, d_hidden.width - x0);
      convolve_on_tensor_cores<T, G::kRow, G::kDRow, true, G::kPartRows>(
          d_part, w, rows, [&](int, const float (&a)[4], const float (&b)[4]) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const float2 of_a[1] = {make_float2(a[h * 2], a[h * 2 + 1])}, of_b[1] = {make_float2(b[h * 2], b[h * 2 + 1])};
              if (!own[h]) continue;
              store_pairs(to + h * 8 * d_hidden.channels, of_a);
              store_pairs(to + h * 8 * d_hidden.channels + 8, of_b);
            }
            to += d_hidden.width * d_hidden.channels;
          });
    }

    const uint32_t keep = lane % 4 * 2 < G::kColumns - 8 ? ~0u : 0;  // of the second 8 pixels
    const bool odd = lane / 4 % 2;
#pragma unroll
    for (int group = 0; group < 2; ++group) {
      TapPixels<T, G::kRow, G::kDRow, true, true> d(d_part + group * 16);
      const unsigned char* pixels = hidden_tile + (row + 2 + lane / 16) * G::kHiddenRow +
                                    (2 + lane / 8 % 2 * 8 + lane % 8) * G::kRow + set * 32 + group * 16;
      TapPairs<float[4]> sums = {};
      uint32_t in[4][2];  // of rows in turns
#pragma unroll
      for (int r = 0; r < G::kPartRows + 2; ++r) {
        if (r >= rows + 2) break;
        d.load(r);
        if (r % 2 == 0 && r < G::kPartRows) {
          uint32_t two[4];
          load_matrices_transposed(two, pixels + r * G::kHiddenRow);
#pragma unroll
          for (int i = 0; i < 4; ++i) in[r % 4 + i / 2][i % 2] = r + i / 2 < rows ? two[i] & (i % 2 ? keep : ~0u) : 0;
        }
        for_each_pair<true>(
            r, G::kPartRows, [&](int y, int i) { mma(sums.own[i], d.own, in[y % 4], T{}); },
            [&](int y, int e) { mma(sums.both[e], d.both, in[y % 4], T{}); });
      }
      const auto add_to = [&](int tap, const float (&sum)[4], int which) {
        total[group][tap] += odd ? sum[which * 2 + 1] : sum[which * 2];
      };
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        add_to(i * 3, sums.own[i], 0), add_to(i * 3 + 1, sums.own[i], 1);
        add_to(i * 3 + 2, sums.both[i], 1), add_to(i * 3 + 2, sums.both[i + 1], 0);
      }
    }
  }

  float* all_sums = reinterpret_cast<float*>(shared);  // [part][tap][channel]
  __syncthreads();
  if (diagonal)
#pragma unroll
    for (int i = 0; i < 18; ++i)
      all_sums[(warp / G::kSets * 9 + i / 2) * G::kChannels + set * G::kSetChannels + i % 2 * 8 + lane / 4] = total[i % 2][i / 2];
  __syncthreads();
  for (int i = threadIdx.x; i < 9 * G::kChannels; i += G::kThreads) {
    const int own = first + i % G::kChannels;
    if (own >= tiles.channels) continue;
    const float sum = all_sums[i] + all_sums[9 * G::kChannels + i];
    float& slot = slots[(int64_t{blockIdx.x} * 9 + i / G::kChannels) * tiles.channels + own];
    slot = add ? slot + sum : sum;
  }
}

// For the taps' gradients, of steps of up to `pixels`: few where many channels fill the device, and some tiles each.
inline int64_t gated_depthwise_slots(int64_t channels, int64_t pixels) {
  return std::min(std::clamp<int64_t>(65536 / channels, 32, 512), ceil_div(pixels, 4 * GateTile::kRows * GateTile::kColumns));
}

}  // namespace image
}  // namespace autohdr
