// nafblock's passes as one kernel each, for few channels of half precision: up to the gate of the first half, on common/cuda_fused.cuh,
// with its sums; and all that follows, pixel by pixel, in registers.
#pragma once
#include "common/cuda_fused.cuh"

namespace autohdr {
namespace image {

// Position in a set of 32 channels: element e of a lane's pair in tile j of 8 is channel 8 · (lane % 4) + 2 · j + e.
__host__ __device__ constexpr int set_channel(int position) {
  return position / 32 * 32 + position % 8 / 2 * 8 + position % 32 / 8 * 2 + position % 2;
}

// Blocks share the tiles of an image.
template <class T, int kTiles>
struct FusedHalves {
  static constexpr int kHidden = 64, kMade = kHidden / 2;
  using Tile = FusedTile<T, kTiles, kHidden, 2, kMade, true>;
  static constexpr int kShared = Tile::kShared + Tile::kChannels * static_cast<int>(sizeof(float)), kBlocks = 2;

  View<const T> x;         // the images as a whole
  Range rows;              // of the result
  unsigned across, tiles;  // in a row of tiles, and in an image
  View<T> local;           // a ⊙ b, the images as a whole; without data where none is wanted
  Norm norm;
  const T* w_in;            // [hidden][channels], both halves pair by pair, as what follows
  const float* bias;        // [hidden]
  const T* bands;           // [hidden + 64][kBand]
  const float* local_bias;  // [hidden + 64]
  int hidden;
  float factor, *sums;  // factor · the sums of a ⊙ b, [image][slot][channels], or null

  __device__ __forceinline__ void run(unsigned char* shared) const {
    Tile t(x, shared, blockIdx.y, 0, 0);
    float* totals = reinterpret_cast<float*>(shared + Tile::kShared);  // of the block, by channel; each is its warp's
    if (threadIdx.x < Tile::kChannels) totals[threadIdx.x] = 0;
    const auto load_in = [&](int first) {
      t.load_in(w_in + (first + Tile::copied_row()) * x.channels + Tile::copied_piece() * 8, hidden - first, bias + first);
    };
    const auto next = [&] {  // of the tile, whose index would take a register
      return static_cast<unsigned>(t.y0 - rows.first) / Tile::kSide * across + static_cast<unsigned>(t.x0) / Tile::kSide +
             gridDim.x;
    };
#pragma unroll 1
    for (unsigned index = blockIdx.x; index < tiles; index = next()) {
      t.y0 = rows.first + index / across * Tile::kSide, t.x0 = index % across * Tile::kSide;
      load_in(0);
      t.normalise(norm);
      wait_for_copies();
      __syncthreads();
#pragma unroll 1
      for (int first = 0; first < hidden; first += kHidden) {
        t.expand();
        __syncthreads();
        if (first + kHidden < hidden) load_in(first + kHidden);
        const int own = first / 2 + Tile::warp() * Tile::kOwn;
        t.convolve(typename Tile::Taps(bands + first * kBand), 0, [&](int i, int, const float2(&v)[2]) {
          const float* more = local_bias + own * 2 + i / 2 * 4 + i % 2;  // of the channel's first half
          const float of_a = more[0], of_b = more[2];
          return to_pair<T>(make_float2((v[0].x + of_a) * (v[1].x + of_b), (v[0].y + of_a) * (v[1].y + of_b)));
        });
        if (sums) add_to(totals + own, t, x.channels - own);
        wait_for_copies();
        __syncthreads();
        if (local.data) store(t, first / 2);
      }
    }
    if (!sums) return;
    __syncthreads();
    if (threadIdx.x < x.channels)
      sums[(t.image * gridDim.x + blockIdx.x) * x.channels + threadIdx.x] = factor * totals[threadIdx.x];
  }

  // totals += the sums of this warp's channels in the tile, of which there are `count`; its lanes read what they have written.
  __device__ __forceinline__ void add_to(float* totals, const Tile& t, int count) const {
    const int warp = Tile::warp(), lane = Tile::lane();
    bool inside[4][2];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int2 at = Tile::pixel_of(lane, i / 2, i % 2);
      inside[i / 2][i % 2] = at.x < min(Tile::kSide, x.width - t.x0) && at.y < min(Tile::kSide, rows.end - t.y0);
    }
#pragma unroll
    for (int i = 0; i < Tile::kOwn; ++i) {
      const auto pairs = load_pairs<4>(reinterpret_cast<const T*>(t.tile + (warp * Tile::kOwn + i) * Tile::kRow + lane * 16));
      float sum = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 both = to_float2(pairs.v[j]);
        sum += (inside[j][0] ? both.x : 0.0f) + (inside[j][1] ? both.y : 0.0f);
      }
      sum = sum_over(32, sum);
      if (lane == 0 && i < count) totals[i] += sum;
    }
  }

  // The tile's 32 channels from `first` on: a lane brings 8 neighbouring ones of a pixel, in turns that begin with another pair in each
  // quarter, so that no two rows that are read together share banks.
  __device__ __forceinline__ void store(const Tile& t, int first) const {
    const int warp = Tile::warp(), lane = Tile::lane(), quarter = lane % 4;
    const int pair = lane % 8 / 2, matrix = lane / 8, channel = pair * 8 + (matrix + pair) % 4 * 2 + lane % 2,
              own = first + quarter * 8;
    const unsigned char* from = t.tile + channel * Tile::kRow + warp * 4 * 16;
    const int p = lane / 4;
    const int2 at = Tile::pixel_of(warp * 4, p / 2, p % 2);
    const bool there = own < x.channels && at.y < min(Tile::kSide, rows.end - t.y0);
    T* to = local.at(t.image, t.y0 + at.y, t.x0 + at.x) + own;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t turned[4];
      load_matrices_transposed(turned, from + i * 16);
      const bool one = quarter % 2, two = quarter / 2;
      const uint32_t once[4] = {one ? turned[3] : turned[0], one ? turned[0] : turned[1], one ? turned[1] : turned[2],
                                one ? turned[2] : turned[3]};
      const uint4 all =
          make_uint4(two ? once[2] : once[0], two ? once[3] : once[1], two ? once[0] : once[2], two ? once[1] : once[3]);
      if (there && at.x + i * 2 < min(Tile::kSide, x.width - t.x0)) *reinterpret_cast<uint4*>(to + i * 2 * x.channels) = all;
    }
  }
};

// The rest of the block, given the gate of its first half: a warp takes 16 pixels at a time. Of a set of 32 channels, a lane holds the
// same 8 neighbouring ones of two pixels in all operands and sums; the weights' rows and columns lie in that order, see set_channel.
template <class T, int kChannels>
struct FusedRest {
  static constexpr int kSets = kChannels / 32, kTiles = kChannels / 8, kSteps = kChannels / 16, kThreads = 128,
                       kRow = kChannels * 2 + 16, kVectors = 6 * kChannels * 4, kShared = 4 * kChannels * kRow + kVectors,
                       kBlocks = kSets > 1 ? 3 : 4;

  uint32_t pixels;  // of an image
  int channels;
  const T *x, *local;  // of the first image
  T* y;
  const T *conv3, *conv4, *conv5;  // [image][channel][channel], [half, channel][channel], [channel][channel], in sets
  const float* vectors[6];    // of the channels: the norm's weight and bias, the biases of conv3, of conv4's halves, of conv5
  const float *beta, *gamma;  // of conv3's and conv5's bias
  float eps;

  __device__ __forceinline__ void run(unsigned char* shared) const {
    unsigned char *w3 = shared, *w4 = w3 + kChannels * kRow, *w5 = w4 + 2 * kChannels * kRow;
    float* floats = reinterpret_cast<float*>(w5 + kChannels * kRow);
    const auto copy = [&](unsigned char* to, const T* from, int rows) {
      constexpr int kPieces = kChannels / 8;
      for (int i = threadIdx.x; i < rows * kPieces; i += kThreads)
        copy_async_or_zero(to + i / kPieces * kRow + i % kPieces * 16, from + i * 8, true);
    };
    copy(w3, conv3 + int64_t{blockIdx.y} * kChannels * kChannels, kChannels);
    copy(w4, conv4, 2 * kChannels);
    copy(w5, conv5, kChannels);
    for (int i = threadIdx.x; i < 6 * kChannels; i += kThreads) {
      const int which = i / kChannels, channel = i % kChannels;
      float v = 0;
#pragma unroll
      for (int k = 0; k < 6; ++k)
        if (which == k && channel < channels) v = vectors[k][channel] * (k == 2 ? beta[channel] : k == 5 ? gamma[channel] : 1.0f);
      floats[i] = v;
    }
    wait_for_copies();
    __syncthreads();

    const int warp = threadIdx.x / 32, own = threadIdx.x % 4 * 8;
    // Of a vector, set by set; found anew in every round, or all of them would be kept in registers.
    const auto of_lane = [&](int vector) { return floats + vector * kChannels + thread_read_anew() % 4 * 8; };
    const int right = right_lane().row * kRow + right_lane().piece * 16;
    const float part = 1.0f / channels;
#pragma unroll 1
    for (uint32_t first = (blockIdx.x * (kThreads / 32) + warp) * 16; first < pixels; first += gridDim.x * (kThreads / 32) * 16) {
      // f(whether there is a pixel, where its channels lie) for both of the lane's; found anew, rather than spilled.
      const auto for_both = [&](const auto& f) {
        const unsigned thread = thread_read_anew(), pixel = first + thread % 32 / 4;
        const int64_t place = (int64_t{blockIdx.y} * pixels + pixel) * channels + thread % 4 * 8;
#pragma unroll
        for (int h = 0; h < 2; ++h) f(h, pixel + h * 8 < pixels, place + h * 8 * channels);
      };
      uint32_t operand[kSteps][4];  // left operands of mma()
      uint4 added[kSets][2];
      for_both([&](int h, bool there, int64_t place) {
#pragma unroll
        for (int set = 0; set < kSets; ++set) {
          uint4 v = make_uint4(0, 0, 0, 0);
          added[set][h] = v;
          if (there && set * 32 + own < channels) {
            v = *reinterpret_cast<const uint4*>(local + place + set * 32);
            added[set][h] = *reinterpret_cast<const uint4*>(x + place + set * 32);
          }
          operand[set * 2][h] = v.x, operand[set * 2][2 + h] = v.y, operand[set * 2 + 1][h] = v.z,
                        operand[set * 2 + 1][2 + h] = v.w;
        }
      });

      // sums[tile] += two tiles of a product, whose rows of weights begin at w.
      const auto multiply = [&](float (&sums)[2][4], const unsigned char* w) {
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
          uint32_t b[4];
          load_matrices(b, w + right + k * 32);
          mma(sums[0], operand[k], {b[0], b[1]}, T{});
          mma(sums[1], operand[k], {b[2], b[3]}, T{});
        }
      };
      // Begins the sums of two tiles, from `tile` on, with one of the vectors.
      const auto begin = [&](float (&sums)[2][4], int vector, int tile) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float2 v = *reinterpret_cast<const float2*>(of_lane(vector) + (tile + i) / 4 * 32 + (tile + i) % 4 * 2);
          sums[i][0] = sums[i][2] = v.x, sums[i][1] = sums[i][3] = v.y;
        }
      };
      float middle[kTiles / 2][2][4];
      float mean[2] = {}, factor[2] = {};
#pragma unroll
      for (int tile = 0; tile < kTiles; tile += 2) {
        float (&sums)[2][4] = middle[tile / 2];
        begin(sums, 2, tile);
        multiply(sums, w3 + tile * 8 * kRow);
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const uint4& four = added[tile / 4][h];
            const uint32_t pair = (tile + i) % 4 == 0   ? four.x
                                  : (tile + i) % 4 == 1 ? four.y
                                  : (tile + i) % 4 == 2 ? four.z
                                                        : four.w;
            const float2 old = to_float2(reinterpret_cast<const Pair<T>&>(pair));
            sums[i][h * 2] += old.x, sums[i][h * 2 + 1] += old.y;
            mean[h] += sums[i][h * 2] + sums[i][h * 2 + 1];
          }
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        mean[h] = sum_over(4, mean[h]) * part;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          if (tile / 4 * 32 + own >= channels) continue;
          const float (&v)[4] = middle[tile / 2][tile % 2];
          const float a = v[h * 2] - mean[h], b = v[h * 2 + 1] - mean[h];
          factor[h] += a * a + b * b;
        }
        factor[h] = inverse_root<T>(sum_over(4, factor[h]) * part + eps);
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const float* at = of_lane(0) + tile / 4 * 32 + tile % 4 * 2;
        const float2 weight = *reinterpret_cast<const float2*>(at), bias = *reinterpret_cast<const float2*>(at + kChannels);
        const float (&v)[4] = middle[tile / 2][tile % 2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const Pair<T> normal = to_pair<T>(make_float2((v[h * 2] - mean[h]) * factor[h] * weight.x + bias.x,
                                                        (v[h * 2 + 1] - mean[h]) * factor[h] * weight.y + bias.y));
          operand[tile / 2][tile % 2 * 2 + h] = reinterpret_cast<const uint32_t&>(normal);
        }
      }
      uint32_t gated[kSteps][4];
#pragma unroll
      for (int tile = 0; tile < kTiles; tile += 2) {
        float a[2][4], b[2][4];
        begin(a, 3, tile), begin(b, 4, tile);
        multiply(a, w4 + tile * 8 * kRow);
        multiply(b, w4 + (kChannels + tile * 8) * kRow);
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const Pair<T> product = to_pair<T>(make_float2(a[i][h * 2] * b[i][h * 2], a[i][h * 2 + 1] * b[i][h * 2 + 1]));
            gated[tile / 2][i * 2 + h] = reinterpret_cast<const uint32_t&>(product);
          }
      }
#pragma unroll
      for (int i = 0; i < kSteps * 4; ++i) operand[i / 4][i % 4] = gated[i / 4][i % 4];
      uint32_t result[kSets][2][4];
#pragma unroll
      for (int set = 0; set < kSets; ++set) {
#pragma unroll
        for (int tile = 0; tile < 4; tile += 2) {
          float sums[2][4];
          begin(sums, 5, set * 4 + tile);
          multiply(sums, w5 + (set * 4 + tile) * 8 * kRow);
#pragma unroll
          for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const float (&old)[4] = middle[set * 2 + tile / 2][i];
              const Pair<T> sum = to_pair<T>(make_float2(sums[i][h * 2] + old[h * 2], sums[i][h * 2 + 1] + old[h * 2 + 1]));
              result[set][h][tile + i] = reinterpret_cast<const uint32_t&>(sum);
            }
        }
      }
      for_both([&](int h, bool there, int64_t place) {
#pragma unroll
        for (int set = 0; set < kSets; ++set) {
          const uint32_t (&v)[4] = result[set][h];
          if (there && set * 32 + own < channels)
            *reinterpret_cast<uint4*>(y + place + set * 32) = make_uint4(v[0], v[1], v[2], v[3]);
        }
      });
    }
  }
};
template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads,
                                  Kernel::kBlocks* Kernel::kShared <= kSharedOfMultiprocessor ? Kernel::kBlocks : 1)
    run_rest(Kernel kernel) {
  AUTOHDR_DYNAMIC_SHARED(unsigned char, shared);
  kernel.run(shared);
}

}  // namespace image
}  // namespace autohdr
