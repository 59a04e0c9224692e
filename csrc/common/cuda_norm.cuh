// Layer norm over the channels of a pixel, and its backward pass. Some lanes of a warp own a pixel, kPieces pieces of it each: with
// 48, 96, 192 or 384 channels no lane is idle. More channels than 32 lanes take are gone through in rounds, read again every time.
#pragma once
#include "common/cuda_view.cuh"

namespace autohdr {
namespace image {

// What a layer norm over the channels takes.
struct Norm {
  const float* weight;  // [channels of x's view], zeros beyond x's
  const float* bias;    // the same, or null: the bias-free norm
  float eps;
  int channels;
};

// The sum over `lanes` neighbouring lanes, a power of two; the same in all of them.
template <class V>
__device__ __forceinline__ V sum_over(int lanes, V v) {
  for (int d = lanes / 2; d > 0; d /= 2) v += __shfl_xor_sync(~0u, v, d);
  return v;
}

// kSize: channels of a piece.
template <class T, int kPieces_ = 3, int kSize_ = Piece<T>::kSize>
struct NormLanes {
  static constexpr int kPieces = kPieces_, kSize = kSize_;
  int lanes, log_lanes, rounds;
  __host__ __device__ constexpr explicit NormLanes(int channels) : lanes(1), log_lanes(0), rounds(1) {
    while (lanes < 32 && lanes * kPieces * kSize < channels) lanes *= 2, ++log_lanes;
    rounds = static_cast<int>(ceil_div(channels, lanes * kPieces * kSize));
  }
  __device__ int lane() const { return threadIdx.x & (lanes - 1); }
  __device__ int group() const { return threadIdx.x >> log_lanes; }
};

// What a lane holds of a pixel of `view` channels, of which the norm's are real. Result: what the norm becomes.
template <class T, class Lanes = NormLanes<T>, class Result = T>
struct NormPixel {
  static constexpr int kPieces = Lanes::kPieces, kSize = Lanes::kSize;
  static constexpr bool kAtOnce = !std::is_same_v<Result, float>;  // both sums
  float v[kPieces][kSize];

  static __device__ __forceinline__ int channel(const Lanes& l, int round, int i) {
    return ((round * kPieces + i) * l.lanes + l.lane()) * kSize;
  }
  __device__ __forceinline__ void load(const Lanes& l, int round, const T* x, int view) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      if (channel(l, round, i) < view) {
        load_floats(x + channel(l, round, i), v[i]);
        continue;
      }
#pragma unroll
      for (int e = 0; e < kSize; ++e) v[i][e] = 0;
    }
  }
  // Gives those of a piece's channels that there are not the value of `rest`.
  __device__ __forceinline__ void set_rest(const Lanes& l, int round, int channels, float rest) {
    if (channels % kSize == 0) return;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int left = channels - channel(l, round, i);
      if (left >= kSize || left <= 0) continue;
#pragma unroll
      for (int e = 0; e < kSize; ++e)
        if (e >= left) v[i][e] = rest;
    }
  }
  // The pixel's mean and 1 / sqrt(variance + eps); afterwards v holds the last round, and finite numbers where no channels are.
  // Summed as differences from the first channel: the mean of equal channels is exact, whose rounding 1 / √eps would multiply. And
  // the variance is at least the channels' part of the squares of these, so that for few digits it can be made of both sums.
  __device__ __forceinline__ float2 statistics(const Lanes& l, const T* x, int view, const Norm& norm) {
    const float origin = to_float(x[0]);
    float sum = 0, squares = 0;
    for (int round = 0; round < l.rounds; ++round) {
      load(l, round, x, view);
      set_rest(l, round, norm.channels, origin);
#pragma unroll
      for (int i = 0; i < kPieces; ++i)
        if (channel(l, round, i) < norm.channels)
#pragma unroll
          for (int e = 0; e < kSize; ++e) {
            const float difference = v[i][e] - origin;
            sum += difference;
            if (kAtOnce) squares += difference * difference;
          }
    }
    if (kAtOnce) {
      sum = sum_over(l.lanes, sum), squares = sum_over(l.lanes, squares);
      const float part = divide<Result>(1, norm.channels), mean = sum * part;
      return make_float2(origin + mean, inverse_root<Result>((squares - sum * mean) * part + norm.eps));
    }
    const float mean = origin + divide<Result>(sum_over(l.lanes, sum), norm.channels);
    for (int round = 0; round < l.rounds; ++round) {
      if (l.rounds > 1) load(l, round, x, view);
      set_rest(l, round, norm.channels, mean);
#pragma unroll
      for (int i = 0; i < kPieces; ++i)
        if (channel(l, round, i) < norm.channels)
#pragma unroll
          for (int e = 0; e < kSize; ++e) squares += (v[i][e] - mean) * (v[i][e] - mean);
    }
    return make_float2(mean, inverse_root<Result>(divide<Result>(sum_over(l.lanes, squares), norm.channels) + norm.eps));
  }
  // out (the norm's bias, or zeros) += piece i, normalised; zeros in channels that x has not. shift: the mean, without a bias 0.
  __device__ __forceinline__ void normalize(int i, float factor, float shift, const float (&weight)[kSize],
                                            float (&out)[kSize]) const {
#pragma unroll
    for (int e = 0; e < kSize; ++e)
      out[e] += (kAtOnce ? v[i][e] * factor - shift * factor : (v[i][e] - shift) * factor) * weight[e];
  }
};

// put(channel, the normalised piece of x from there on) for this lane's pieces of a pixel.
template <class T, class Put>
__device__ __forceinline__ void normalize(const Norm& norm, const NormLanes<T>& l, const T* x, int view, const Put& put) {
  using P = NormPixel<T>;
  P p;
  const float2 stats = p.statistics(l, x, view, norm);
  const float shift = norm.bias ? stats.x : 0.0f;
  for (int round = 0; round < l.rounds; ++round) {
    if (l.rounds > 1) p.load(l, round, x, view);
#pragma unroll
    for (int i = 0; i < P::kPieces; ++i) {
      const int channel = P::channel(l, round, i);
      if (channel >= view) continue;
      float weight[P::kSize], result[P::kSize] = {};
      load_floats(norm.weight + channel, weight);
      if (norm.bias) load_floats(norm.bias + channel, result);
      p.normalize(i, stats.y, shift, weight, result);
      put(channel, result);
    }
  }
}

// out = the norm of x.
template <class T>
__global__ void __launch_bounds__(256)
    normalize_pixels(Matrices<const T> x, Norm norm, NormLanes<T> l, int64_t pixels, Matrices<T> out) {
  const int64_t pixel = (int64_t{blockIdx.x} * 256 + threadIdx.x) >> l.log_lanes, there = pixel < pixels ? pixel : pixels - 1;
  T* to = out.of(blockIdx.y, 0) + there * out.of_row;
  normalize(norm, l, x.of(blockIdx.y, 0) + there * x.of_row, static_cast<int>(x.of_row),
            [&](int channel, const float (&v)[Piece<T>::kSize]) {
              if (pixel < pixels) store_floats(to + channel, v);
            });
}

template <class T>
void norm(const Norm& norm, View<const T> x, View<T> out, int64_t images, cudaStream_t stream) {
  const NormLanes<T> l(x.channels);
  launch(normalize_pixels<T>, dim3(ceil_div(x.pixels() * l.lanes, 256), images), dim3(256), 0, stream, x.matrices(), norm, l,
         x.pixels(), out.matrices());
}

// dx = dy + the norm's gradient, and slots[slot][2][channels] (+)= the gradients of its weight and bias. A block writes a round's
// channels; where there is only one, a pixel is read once, all of it at once.
constexpr int kNormThreads = 128;
template <class T, bool kOneRound>
__global__ void __launch_bounds__(kNormThreads, 3)
    differentiate_norm(Matrices<const T> x, Matrices<const T> d_normal, Matrices<const T> dy, Norm norm, NormLanes<T> l,
                       int64_t images, int64_t pixels, Matrices<T> dx, float* slots, bool add) {
  AUTOHDR_DYNAMIC_SHARED(float, shared);  // [2][pieces][piece][thread]
  using P = NormPixel<T>;
  constexpr int kOwn = P::kPieces * P::kSize;
  if (kOneRound) l.rounds = 1;
  const int view = static_cast<int>(x.of_row), own_round = kOneRound ? 0 : blockIdx.y, groups = kNormThreads >> l.log_lanes;
  const uint32_t count = images * pixels, each = pixels, stride = gridDim.x * groups;  // a step's pixels fit 32 bits
  const float per_channel = 1.0f / norm.channels;
  float d_weight[P::kPieces][P::kSize] = {}, d_bias[P::kPieces][P::kSize] = {};
  for (uint32_t first = blockIdx.x * groups; first < count; first += stride) {
    const bool inside = first + l.group() < count;
    const uint32_t index = inside ? first + l.group() : 0, image = index / each, pixel = index - image * each;
    const T *at = x.of(image, 0) + pixel * x.of_row, *d_at = d_normal.of(image, 0) + pixel * d_normal.of_row,
            *dy_at = dy.of(image, 0) + pixel * dy.of_row;
    Piece<T> d[P::kPieces], added[P::kPieces];
    const auto load = [&](int round, const T* from, Piece<T>(&to)[P::kPieces]) {  // any others where there are no channels
#pragma unroll
      for (int i = 0; i < P::kPieces; ++i) {
        const int channel = P::channel(l, round, i);
        to[i] = *reinterpret_cast<const Piece<T>*>(from + (channel < view ? channel : 0));
      }
    };
    load(own_round, dy_at, added);
    if (kOneRound) load(0, d_at, d);
    P p;
    const float2 stats = p.statistics(l, at, view, norm);
    const float mean = stats.x, factor = stats.y, shift = norm.bias ? mean : 0.0f;
    const auto weight_of = [&](int round, int i, float (&weight)[P::kSize]) {
      if (P::channel(l, round, i) < view) load_floats(norm.weight + P::channel(l, round, i), weight);
    };
    float sum = 0, along = 0;
    for (int round = 0; round < l.rounds; ++round) {
      if (!kOneRound) p.load(l, round, at, view), p.set_rest(l, round, norm.channels, mean), load(round, d_at, d);
#pragma unroll
      for (int i = 0; i < P::kPieces; ++i) {
        float weight[P::kSize] = {}, own[P::kSize];
        weight_of(round, i, weight);
        load_floats(d[i].v, own);
#pragma unroll
        for (int e = 0; e < P::kSize; ++e) {
          const float g = own[e] * weight[e];
          sum += g, along += g * (p.v[i][e] - shift);
        }
      }
    }
    sum = norm.bias ? sum_over(l.lanes, sum) * per_channel : 0.0f;
    along = sum_over(l.lanes, along) * per_channel * factor * factor;
    if (!inside) continue;
    if (!kOneRound) p.load(l, own_round, at, view), p.set_rest(l, own_round, norm.channels, mean), load(own_round, d_at, d);
#pragma unroll
    for (int i = 0; i < P::kPieces; ++i) {
      const int channel = P::channel(l, own_round, i);
      float weight[P::kSize] = {}, own[P::kSize], result[P::kSize];
      weight_of(own_round, i, weight);
      load_floats(d[i].v, own);
      load_floats(added[i].v, result);
#pragma unroll
      for (int e = 0; e < P::kSize; ++e) {
        const float value = p.v[i][e];
        result[e] += factor * (own[e] * weight[e] - sum - (value - mean) * along);
        d_weight[i][e] += own[e] * (value - shift) * factor;
        d_bias[i][e] += own[e];
      }
      if (channel < view) store_floats(dx.of(image, 0) + pixel * dx.of_row + channel, result);
    }
  }
#pragma unroll
  for (int i = 0; i < P::kPieces; ++i)
#pragma unroll
    for (int e = 0; e < P::kSize; ++e) {
      shared[(0 * kOwn + i * P::kSize + e) * kNormThreads + threadIdx.x] = d_weight[i][e];
      shared[(1 * kOwn + i * P::kSize + e) * kNormThreads + threadIdx.x] = d_bias[i][e];
    }
  __syncthreads();
  const int own = l.lanes * kOwn;
  for (int at = threadIdx.x; at < 2 * own; at += kNormThreads) {
    const int which = at >= own, place = at - which * own, e = place % P::kSize, piece = place / P::kSize,
              lane = piece & (l.lanes - 1), i = piece >> l.log_lanes;
    const int channel = ((own_round * P::kPieces + i) * l.lanes + lane) * P::kSize + e;
    if (channel >= norm.channels) continue;
    const float* from = shared + (which * kOwn + i * P::kSize + e) * kNormThreads + lane;
    float sum = 0;
#pragma unroll 8
    for (int g = 0; g < groups; ++g) sum += from[(g + at & groups - 1) << l.log_lanes];  // neighbours begin in other banks
    float& slot = slots[(int64_t{blockIdx.x} * 2 + which) * norm.channels + channel];
    slot = add ? slot + sum : sum;
  }
}

// For those gradients, of steps of up to `pixels`.
template <class T>
int64_t norm_slots(int channels, int64_t pixels) {
  return std::min<int64_t>(1024, ceil_div(pixels * NormLanes<T>(channels).lanes, 4 * kNormThreads));
}

template <class T>
void norm_backward(const Norm& norm, View<const T> x, View<const T> d_normal, View<const T> dy, View<T> dx, int64_t images,
                   float* sums, int64_t slots, bool add, cudaStream_t stream) {
  const NormLanes<T> l(x.channels);
  launch(l.rounds == 1 ? differentiate_norm<T, true> : differentiate_norm<T, false>, dim3(slots, l.rounds), dim3(kNormThreads),
         kNormThreads * 2 * NormPixel<T>::kPieces * Piece<T>::kSize * sizeof(float), stream, x.matrices(), d_normal.matrices(),
         dy.matrices(), norm, l, images, x.pixels(), dx.matrices(), sums, add);
}

}  // namespace image
}  // namespace autohdr
