// causal_conv1d on a GPU, forward and backward: bound by memory.
//
// A block owns kChannels channels of kTokens tokens at a time, which lie in shared memory as float32 [token][channel], with the tokens
// beside them that the taps reach: rows one float longer than they need be, so that neither layout meets a bank conflict when it is
// loaded. A thread owns kOwn tokens of a channel, one behind the other, whose window stays in registers where the width is Mamba's 4.
// Backward, a block walks kWalk such tiles and leaves its sums over their tokens in a slot; the slots are added up in order.
#include "causal_conv1d/causal_conv1d.h"

#include <type_traits>

#include "common/cuda_launch.cuh"
#include "common/cuda_math.cuh"
#include "common/cuda_sequence.cuh"

namespace autohdr {
namespace conv {

constexpr int kChannels = 64, kTokens = 64, kThreads = 256, kGroups = kThreads / kChannels, kOwn = kTokens / kGroups;
constexpr int kRow = kChannels + 1, kWalk = 8, kBatch = 8;  // kBatch: loads that a thread has under way

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What a block owns.
struct Place {
  int64_t batch, piece, channel;
  int channels;
  __device__ Place(const ConvShape& s, int64_t pieces) {
    const int64_t strips = ceil_div(s.dim, kChannels);
    channel = blockIdx.x % strips * kChannels, piece = blockIdx.x / strips % pieces, batch = blockIdx.x / strips / pieces;
    channels = static_cast<int>(min(s.dim - channel, int64_t{kChannels}));
  }
};

// The place of element i of so many rows: neighbours are neighbours in memory.
struct Element {
  int token, channel;
  __device__ Element(int i, int rows, bool channel_last)
      : token(channel_last ? i / kChannels : i % rows), channel(channel_last ? i % kChannels : i / rows) {}
};

__device__ __forceinline__ float widen(Dtype, uint32_t bits) { return bits_to_float(bits); }
__device__ __forceinline__ float widen(Dtype dtype, uint16_t bits) {
  return dtype == Dtype::bf16 ? bits_to_float(static_cast<uint32_t>(bits) << 16) : half_to_float(bits);
}

// Tokens [first, first + rows) of the block's channels, zero where there are none. Bits: unsigned of the elements' size.
template <class Bits>
__device__ void load_tile(const ConvShape& s, const Sequence& x, const Place& p, int64_t first, int rows, float* tile) {
  const Bits* data = static_cast<const Bits*>(x.data) + p.batch * x.batch + p.channel * x.channel;
  for (int base = threadIdx.x; base < rows * kChannels; base += kBatch * kThreads) {
    Bits bits[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const Element e(base + k * kThreads, rows, s.channel_last);
      const int64_t token = first + e.token;
      const bool real = base + k * kThreads < rows * kChannels && token >= 0 && token < s.seqlen && e.channel < p.channels;
      bits[k] = real ? data[token * x.token + e.channel * x.channel] : Bits{0};
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const Element e(base + k * kThreads, rows, s.channel_last);
      if (base + k * kThreads < rows * kChannels) tile[e.token * kRow + e.channel] = widen(x.dtype, bits[k]);
    }
  }
}

__device__ void store_tile(const ConvShape& s, const Sequence& y, const Place& p, int64_t first, const float* tile) {
  for (int i = threadIdx.x; i < kTokens * kChannels; i += kThreads) {
    const Element e(i, kTokens, s.channel_last);
    const int64_t token = first + e.token;
    if (token < s.seqlen && e.channel < p.channels)
      store_one(y, p.batch * y.batch + (p.channel + e.channel) * y.channel + token * y.token, tile[e.token * kRow + e.channel]);
  }
}

// f(i, Σ_j taps[j]·x[i + j]) for `count` rows of a column of a tile. Width 0: known at run time alone.
template <int Width, class F>
__device__ __forceinline__ void convolve(const float* x, const float* taps, int width, float bias, int count, const F& f) {
  if constexpr (Width > 0) {
    float window[Width], tap[Width];
#pragma unroll
    for (int j = 0; j < Width; ++j) tap[j] = taps[j * kChannels], window[j] = j > 0 ? x[(j - 1) * kRow] : 0.0f;
    for (int i = 0; i < count; ++i) {
      float v = bias;
#pragma unroll
      for (int j = 0; j < Width; ++j) {
        window[j] = j + 1 < Width ? window[j + 1] : x[(i + j) * kRow];
        v += tap[j] * window[j];
      }
      f(i, v);
    }
  } else {
    for (int i = 0; i < count; ++i) {
      float v = bias;
      for (int j = 0; j < width; ++j) v += taps[j * kChannels] * x[(i + j) * kRow];
      f(i, v);
    }
  }
}

// The taps of the block's channels, in the order of the tokens they meet, or from the last to the first: [width][kChannels].
__device__ void load_taps(const ConvShape& s, const float* weight, const Place& p, bool flipped, float* taps) {
  for (int i = threadIdx.x; i < s.width * kChannels; i += kThreads) {
    const int64_t j = i / kChannels, channel = i % kChannels;
    taps[i] = channel < p.channels ? weight[(p.channel + channel) * s.width + s.tap(flipped ? s.width - 1 - j : j)] : 0.0f;
  }
}

template <class Bits, int Width>
__global__ void __launch_bounds__(kThreads) forward(ConvForward a) {
  AUTOHDR_DYNAMIC_SHARED(float, shared);
  const ConvShape& s = a.shape;
  const Place p(s, ceil_div(s.seqlen, kTokens));
  const int width = static_cast<int>(s.width), rows = kTokens + width - 1;
  const int c = threadIdx.x % kChannels, own = threadIdx.x / kChannels * kOwn;
  float *x = shared, *y = x + rows * kRow, *taps = y + kTokens * kRow;
  load_taps(s, a.weight, p, false, taps);
  load_tile<Bits>(s, a.x, p, p.piece * kTokens - s.before(), rows, x);
  __syncthreads();
  convolve<Width>(x + own * kRow + c, taps + c, width, a.bias && c < p.channels ? a.bias[p.channel + c] : 0.0f, kOwn,
                  [&](int i, float v) { y[(own + i) * kRow + c] = v * sigmoid(v); });
  __syncthreads();
  store_tile(s, a.y, p, p.piece * kTokens, y);
}

template <class Bits, int Width>
__global__ void __launch_bounds__(kThreads) backward(ConvBackward a, float* slots) {
  AUTOHDR_DYNAMIC_SHARED(float, shared);
  const ConvShape& s = a.shape;
  const int64_t pieces = ceil_div(s.seqlen, kTokens * kWalk);
  const Place p(s, pieces);
  const int width = static_cast<int>(s.width), edge = width - 1, after = static_cast<int>(s.after());
  const int c = threadIdx.x % kChannels, group = threadIdx.x / kChannels, own = group * kOwn;
  float *x = shared, *dv = x + (kTokens + 2 * edge) * kRow, *taps = dv + (kTokens + edge) * kRow;
  float *flipped = taps + width * kChannels, *sums = flipped + width * kChannels;  // sums: [group][width + 1][channel]
  load_taps(s, a.weight, p, false, taps);
  load_taps(s, a.weight, p, true, flipped);
  for (int i = threadIdx.x; i < kGroups * (width + 1) * kChannels; i += kThreads) sums[i] = 0;
  float* mine = sums + group * (width + 1) * kChannels + c;
  const float bias = a.bias && c < p.channels ? a.bias[p.channel + c] : 0.0f;
  for (int step = 0; step < kWalk; ++step) {
    const int64_t first = (p.piece * kWalk + step) * kTokens;
    if (first >= s.seqlen) break;
    __syncthreads();
    load_tile<Bits>(s, a.x, p, first - edge, kTokens + 2 * edge, x);
    load_tile<Bits>(s, a.dy, p, first - after, kTokens + edge, dv);
    __syncthreads();
    // The gradient before SiLU, of every output that reads one of the tile's tokens; it is 0 where there is no output.
    const int each = (kTokens + edge + kGroups - 1) / kGroups, from = group * each, count = min(each, kTokens + edge - from);
    float* d = dv + from * kRow + c;
    convolve<Width>(x + from * kRow + c, taps + c, width, bias, count, [&](int i, float v) {
      const int64_t token = first - after + from + i;
      const float gate = sigmoid(v);
      d[i * kRow] = token >= 0 && token < s.seqlen ? d[i * kRow] * (gate + v * gate * (1.0f - gate)) : 0.0f;
    });
    __syncthreads();
    const float *seen = x + (own + after) * kRow + c, *g = dv + (own + after) * kRow + c;
    const int tokens = static_cast<int>(max(min(s.seqlen - first - own, int64_t{kOwn}), int64_t{0}));
    for (int j = 0; j <= width; ++j) {
      float sum = 0;
      for (int i = 0; i < tokens; ++i) sum += g[i * kRow] * (j < width ? seen[(i + j) * kRow] : 1.0f);
      mine[j * kChannels] += sum;
    }
    __syncthreads();  // dx takes the place of x
    convolve<Width>(dv + own * kRow + c, flipped + c, width, 0.0f, kOwn, [&](int i, float v) { x[(own + i) * kRow + c] = v; });
    __syncthreads();
    store_tile(s, a.dx, p, first, x);
  }
  __syncthreads();
  float* slot = slots + (p.batch * pieces + p.piece) * (width + 1) * s.dim + p.channel;
  for (int i = threadIdx.x; i < (width + 1) * kChannels; i += kThreads) {
    float sum = 0;
    for (int k = 0; k < kGroups; ++k) sum += sums[k * (width + 1) * kChannels + i];
    const int j = i / kChannels;
    if (i % kChannels < p.channels) slot[(j < width ? s.tap(j) : width) * s.dim + i % kChannels] = sum;
  }
}

// d_weight and d_bias: a thread sums one element over the slots.
__global__ void __launch_bounds__(kThreads) add_slots(ConvBackward a, const float* slots, int64_t count) {
  const ConvShape& s = a.shape;
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x, size = (s.width + 1) * s.dim;
  if (i >= size) return;
  double sum = 0;
  for (int64_t k = 0; k < count; ++k) sum += slots[k * size + i];
  const int64_t j = i / s.dim, channel = i % s.dim;
  if (j < s.width)
    a.d_weight[channel * s.width + j] = static_cast<float>(sum);
  else if (a.d_bias)
    a.d_bias[channel] = static_cast<float>(sum);
}

// run(an unsigned integer of the elements' size, the width as a constant, or 0).
template <class F>
void with_constants(const ConvShape& s, const Sequence& x, const F& run) {
  const auto with_width = [&](auto bits) {
    s.width == 4 ? run(bits, std::integral_constant<int, 4>{}) : run(bits, std::integral_constant<int, 0>{});
  };
  x.dtype == Dtype::f32 ? with_width(uint32_t{}) : with_width(uint16_t{});
}

}  // namespace conv

int64_t queue(const ConvForward& a, void* memory, cudaStream_t stream) {
  const ConvShape& s = a.shape;
  if (!memory || s.batch == 0) return 0;
  const int64_t blocks = s.batch * conv::ceil_div(s.seqlen, conv::kTokens) * conv::ceil_div(s.dim, conv::kChannels);
  const int64_t floats = (2 * conv::kTokens + s.width - 1) * conv::kRow + s.width * conv::kChannels;
  conv::with_constants(s, a.x, [&](auto bits, auto width) {
    launch(conv::forward<decltype(bits), decltype(width)::value>, dim3(blocks), dim3(conv::kThreads), floats * sizeof(float), stream, a);
  });
  return 0;
}

int64_t queue(const ConvBackward& a, void* memory, cudaStream_t stream) {
  const ConvShape& s = a.shape;
  const int64_t pieces = s.batch * conv::ceil_div(s.seqlen, conv::kTokens * conv::kWalk), size = (s.width + 1) * s.dim;
  const int64_t bytes = pieces * size * static_cast<int64_t>(sizeof(float));
  if (!memory) return bytes;
  float* slots = static_cast<float*>(memory);
  const int64_t floats = (2 * conv::kTokens + 3 * (s.width - 1)) * conv::kRow + 2 * s.width * conv::kChannels +
                         conv::kGroups * (s.width + 1) * conv::kChannels;
  if (pieces)
    conv::with_constants(s, a.x, [&](auto bits, auto width) {
      launch(conv::backward<decltype(bits), decltype(width)::value>, dim3(pieces * conv::ceil_div(s.dim, conv::kChannels)),
             dim3(conv::kThreads), floats * sizeof(float), stream, a, slots);
    });
  launch(conv::add_slots, dim3(conv::ceil_div(size, conv::kThreads)), dim3(conv::kThreads), 0, stream, a, slots, pieces);
  return bytes;
}

}  // namespace autohdr
