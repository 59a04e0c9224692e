// causal_conv1d on a GPU, forward and backward: bound by memory, so that each element is read by 16-byte loads and stays in registers.
//
// Tokens are counted in the order of the convolution: under `reverse` token 0 is the last one in memory. A piece is what a thread
// loads at once, kSize elements beside each other. Where tokens are neighbours in memory, a warp owns kRuns · 32 pieces of a channel,
// and a thread loads the pieces beside its own too, which its neighbours have just brought into the cache. Where channels are
// neighbours, a thread owns a piece of channels and walks some tokens, with those that the taps reach in a window.
// Backward, whoever walks leaves its sums over its tokens in a slot; slots are added up in order.
#include "causal_conv1d/causal_conv1d.h"

#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "common/cuda_launch.cuh"
#include "common/cuda_math.cuh"
#include "common/cuda_sequence.cuh"
#include "common/cuda_slots.cuh"

namespace autohdr {
namespace conv {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kRuns = 4;   // pieces of a thread, where tokens are neighbours
constexpr int kChunk = 4;  // tokens loaded together, where channels are

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What a kernel is compiled for. Width_: the most taps; a narrower op skips those in front of its first. Aligned: pieces are loaded
// and stored whole, else element by element. Reverse: of pieces of tokens, whose order is that of the registers.
template <class T_, int Width_, bool Aligned_, bool ChannelLast_, bool Reverse_>
struct Case {
  using T = T_;
  static constexpr int Width = Width_, Before = Width_ - 1;
  static constexpr bool Aligned = Aligned_, ChannelLast = ChannelLast_, Reverse = Reverse_;
  // Backward, where each channel has a window of x and one of the gradient, a thread has registers for fewer channels.
  static constexpr int kForward = !Aligned && ChannelLast ? 2 : 16 / sizeof(T);
  static constexpr int kBackward = !Aligned && ChannelLast ? 1 : ChannelLast || !Aligned ? 4 : 16 / sizeof(T);
};

// A channel's taps, in the order of the tokens that they meet; zero in front of the first.
template <int Width>
__device__ __forceinline__ void load_taps(const ConvShape& s, const float* weight, int64_t channel, float (&tap)[Width]) {
  const int width = static_cast<int>(s.width);
#pragma unroll
  for (int j = 0; j < Width; ++j) tap[j] = j >= Width - width ? weight[channel * width + j - (Width - width)] : 0.0f;
}

// v_i += Σ_j product(i, j), j from skip on: a channel's taps, of N tokens or channels.
template <int Width, int N, class Product>
__device__ __forceinline__ void add_taps(int skip, float (&v)[N], const Product& product) {
#pragma unroll
  for (int j = 0; j < Width; ++j)
    if (j >= skip)
#pragma unroll
      for (int i = 0; i < N; ++i) v[i] += product(i, j);
}

__device__ __forceinline__ float silu_slope(float v) {
  const float gate = sigmoid(v);
  return gate + v * gate * (1.0f - gate);
}

// ---------------------------------------------------------------------------------------------------------------------
// Tokens are neighbours.

// What a warp owns: pieces [first_run, first_run + kRuns) · 32 + lane of a channel.
struct Line {
  int64_t batch, part, channel;
  bool exists;
  __device__ Line(const ConvShape& s, int64_t parts) {
    const int64_t warp = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
    channel = warp % s.dim, part = warp / s.dim % parts, batch = warp / s.dim / parts;
    exists = batch < s.batch;
  }
};

__host__ __device__ constexpr int64_t parts_of(const ConvShape& s, int size) {
  return ceil_div(s.seqlen, int64_t{32} * kRuns * size);
}

template <class T>
__device__ __forceinline__ T* line_of(const Sequence& s, const Line& l) {
  return static_cast<T*>(s.data) + l.batch * s.batch + l.channel * s.channel;
}

// v[k] = token begin - Lead + k, where begin is a piece's first; zero where there is none, and in the first `skip`.
template <class C, int N, int Lead, int Count>
__device__ __forceinline__ void load_tokens(const typename C::T* line, int64_t begin, int64_t seqlen, int skip,
                                            float (&v)[Count]) {
  if constexpr (C::Aligned) {
    static_assert(Lead <= N, "the tokens in front are of one piece");
#pragma unroll
    for (int from = Lead ? -N : 0; from < Count - Lead; from += N) {
      float piece[N];
      load_line<true>(line, C::Reverse ? seqlen - N - begin - from : begin + from, seqlen, piece);
#pragma unroll
      for (int k = 0; k < N; ++k)
        if (const int at = Lead + from + k; at >= 0 && at < Count) v[at] = piece[C::Reverse ? N - 1 - k : k];
    }
  } else {
#pragma unroll
    for (int k = 0; k < Count; ++k) {
      const int64_t token = begin - Lead + k;
      v[k] = k >= skip && token >= 0 && token < seqlen ? to_float(line[C::Reverse ? seqlen - 1 - token : token]) : 0.0f;
    }
  }
}

template <class C, int N>
__device__ __forceinline__ void store_tokens(typename C::T* line, int64_t begin, int64_t seqlen, const float (&v)[N]) {
  float ordered[N];
#pragma unroll
  for (int k = 0; k < N; ++k) ordered[k] = v[C::Reverse ? N - 1 - k : k];
  store_line<C::Aligned>(line, C::Reverse ? seqlen - N - begin : begin, seqlen, ordered);
}

template <class C>
__global__ void __launch_bounds__(kThreads) forward_tokens(ConvForward a) {
  constexpr int N = C::kForward;
  const ConvShape& s = a.shape;
  const Line line(s, parts_of(s, N));
  if (!line.exists) return;
  const int skip = C::Width - static_cast<int>(s.width);
  const auto* x = line_of<const typename C::T>(a.x, line);
  auto* y = line_of<typename C::T>(a.y, line);
  float tap[C::Width];
  load_taps(s, a.weight, line.channel, tap);
  const float bias = a.bias ? a.bias[line.channel] : 0.0f;
  for (int run = 0; run < kRuns; ++run) {
    const int64_t begin = ((line.part * kRuns + run) * 32 + threadIdx.x % 32) * N;
    if (begin >= s.seqlen) return;
    float window[C::Before + N], v[N];
    load_tokens<C, N, C::Before>(x, begin, s.seqlen, skip, window);
#pragma unroll
    for (int k = 0; k < N; ++k) v[k] = bias;
    add_taps<C::Width>(skip, v, [&](int k, int j) { return tap[j] * window[k + j]; });
#pragma unroll
    for (int k = 0; k < N; ++k) v[k] *= sigmoid(v[k]);
    store_tokens<C>(y, begin, s.seqlen, v);
  }
}

template <class C>
__global__ void __launch_bounds__(kThreads) backward_tokens(ConvBackward a, float* slots) {
  constexpr int N = C::kBackward, Reach = N + C::Before;  // outputs that read one of a thread's tokens
  const ConvShape& s = a.shape;
  const int64_t parts = parts_of(s, N);
  const Line line(s, parts);
  if (!line.exists) return;
  const int width = static_cast<int>(s.width), skip = C::Width - width;
  const auto *x = line_of<const typename C::T>(a.x, line), *dy = line_of<const typename C::T>(a.dy, line);
  auto* dx = line_of<typename C::T>(a.dx, line);
  float tap[C::Width], sums[C::Width + 1] = {};
  load_taps(s, a.weight, line.channel, tap);
  const float bias = a.bias ? a.bias[line.channel] : 0.0f;
  for (int run = 0; run < kRuns; ++run) {
    const int64_t begin = ((line.part * kRuns + run) * 32 + threadIdx.x % 32) * N;
    if (begin >= s.seqlen) break;
    float window[Reach + C::Before], d[Reach], v[Reach];  // d: before SiLU
    load_tokens<C, N, C::Before>(x, begin, s.seqlen, skip, window);
    load_tokens<C, N, 0>(dy, begin, s.seqlen, 0, d);
#pragma unroll
    for (int k = 0; k < Reach; ++k) v[k] = bias;
    add_taps<C::Width>(skip, v, [&](int k, int j) { return tap[j] * window[k + j]; });
#pragma unroll
    for (int k = 0; k < Reach; ++k) d[k] = (C::Aligned && k < N) || begin + k < s.seqlen ? d[k] * silu_slope(v[k]) : 0.0f;
    float out[N] = {};
#pragma unroll
    for (int j = 0; j < C::Width; ++j)
      if (j >= skip)
#pragma unroll
        for (int k = 0; k < N; ++k) out[k] += tap[j] * d[k + C::Before - j], sums[j] += d[k] * window[k + j];
#pragma unroll
    for (int k = 0; k < N; ++k) sums[C::Width] += d[k];
    store_tokens<C>(dx, begin, s.seqlen, out);
  }
  float* slot = slots + (line.batch * parts + line.part) * (width + 1) * s.dim + line.channel;
#pragma unroll
  for (int j = 0; j <= C::Width; ++j) {
    if (j < skip) continue;
    for (int distance = 16; distance > 0; distance /= 2) sums[j] += __shfl_xor_sync(~0u, sums[j], distance);
    if (threadIdx.x % 32 == 0) slot[(j - skip) * s.dim] = sums[j];
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Channels are neighbours.

// What a thread owns: N channels of the tokens [begin, end).
template <int N>
struct Column {
  int64_t channel, run, batch, begin, end;
  bool exists;
  __device__ Column(const ConvShape& s, int64_t runs, int64_t walk) {
    const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x, pieces = ceil_div(s.dim, N);
    channel = thread % pieces * N, run = thread / pieces % runs, batch = thread / pieces / runs;
    begin = run * walk, end = min(begin + walk, s.seqlen);
    exists = batch < s.batch;
  }
};

// A thread's channels of a sequence, token by token.
template <class C, int N>
struct Walk {
  typename C::T* data;  // token 0
  int64_t step, channel, dim;
  __device__ Walk(const ConvShape& s, const Sequence& x, const Column<N>& c)
      : data(static_cast<typename C::T*>(x.data) + c.batch * x.batch + (s.reverse ? (s.seqlen - 1) * x.token : 0)),
        step(s.reverse ? -x.token : x.token), channel(c.channel), dim(s.dim) {}
  __device__ void load_token(int64_t token, bool real, float (&v)[N]) const {
    load_line<C::Aligned>(data + token * step, channel, real ? dim : 0, v);
  }
  __device__ void store_token(int64_t token, const float (&v)[N]) const {
    store_line<C::Aligned>(data + token * step, channel, dim, v);
  }
};

// The parameters of a thread's channels; those beyond the last channel repeat its.
template <int Width, int N>
struct Parameters {
  float tap[N][Width], bias[N];
  __device__ Parameters(const ConvShape& s, const float* weight, const float* shift, int64_t first) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int64_t channel = min(first + n, s.dim - 1);
      load_taps(s, weight, channel, tap[n]);
      bias[n] = shift ? shift[channel] : 0.0f;
    }
  }
  // v = bias + Σ_j tap_j row[j], j from skip on
  __device__ void convolve(const float (*row)[N], int skip, float (&v)[N]) const {
#pragma unroll
    for (int n = 0; n < N; ++n) v[n] = bias[n];
    add_taps<Width>(skip, v, [&](int n, int j) { return tap[n][j] * row[j][n]; });
  }
};

// The last Before of so many rows become the first.
template <int Before, int Rows, int N>
__device__ __forceinline__ void move_up(float (&rows)[Rows][N]) {
#pragma unroll
  for (int b = 0; b < Before; ++b)
#pragma unroll
    for (int n = 0; n < N; ++n) rows[b][n] = rows[b + Rows - Before][n];
}

template <class C>
__global__ void __launch_bounds__(kThreads) forward_channels(ConvForward a, int64_t runs, int64_t walk) {
  constexpr int N = C::kForward;
  const ConvShape& s = a.shape;
  const Column<N> c(s, runs, walk);
  if (!c.exists) return;
  const int skip = C::Width - static_cast<int>(s.width);
  const Parameters<C::Width, N> parameters(s, a.weight, a.bias, c.channel);
  const Walk<C, N> x(s, a.x, c), y(s, a.y, c);
  float window[C::Before + kChunk][N];
#pragma unroll
  for (int b = 0; b < C::Before; ++b) x.load_token(c.begin - C::Before + b, b >= skip && c.begin - C::Before + b >= 0, window[b]);
#pragma unroll 1
  for (int64_t token = c.begin; token < c.end; token += kChunk) {
#pragma unroll
    for (int k = 0; k < kChunk; ++k) x.load_token(token + k, token + k < s.seqlen, window[C::Before + k]);
#pragma unroll
    for (int k = 0; k < kChunk; ++k) {
      float v[N];
      parameters.convolve(window + k, skip, v);
#pragma unroll
      for (int n = 0; n < N; ++n) v[n] *= sigmoid(v[n]);
      if (token + k < c.end) y.store_token(token + k, v);
    }
    move_up<C::Before>(window);
  }
}

template <class C>
__global__ void __launch_bounds__(kThreads) backward_channels(ConvBackward a, float* slots, int64_t runs, int64_t walk) {
  constexpr int N = C::kBackward;
  const ConvShape& s = a.shape;
  const Column<N> c(s, runs, walk);
  if (!c.exists) return;
  const int width = static_cast<int>(s.width), skip = C::Width - width;
  const Parameters<C::Width, N> parameters(s, a.weight, a.bias, c.channel);
  const Walk<C, N> x(s, a.x, c), dy(s, a.dy, c), dx(s, a.dx, c);
  float window[C::Before + kChunk][N], d[C::Before + kChunk][N], sums[C::Width + 1][N] = {};
#pragma unroll
  for (int b = 0; b < C::Before; ++b) {
    x.load_token(c.begin - C::Before + b, b >= skip && c.begin - C::Before + b >= 0, window[b]);
#pragma unroll
    for (int n = 0; n < N; ++n) d[b][n] = 0;
  }
  // inner: all tokens are the thread's own. Else the gradient is 0 where there is no token, and others sum what they own.
  const auto walk_chunk = [&](int64_t token, auto all_own) {
    constexpr bool inner = decltype(all_own)::value;
#pragma unroll
    for (int k = 0; k < kChunk; ++k) {
      x.load_token(token + k, inner || token + k < s.seqlen, window[C::Before + k]);
      dy.load_token(token + k, inner || token + k < s.seqlen, d[C::Before + k]);
    }
#pragma unroll
    for (int k = 0; k < kChunk; ++k) {
      float v[N], out[N] = {};
      parameters.convolve(window + k, skip, v);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        float& slope = d[C::Before + k][n];
        slope = inner || token + k < s.seqlen ? slope * silu_slope(v[n]) : 0.0f;
        const float own = inner || token + k < c.end ? slope : 0.0f;
        sums[C::Width][n] += own;
#pragma unroll
        for (int j = 0; j < C::Width; ++j)
          if (j >= skip) {
            sums[j][n] += own * window[k + j][n];
            out[n] += parameters.tap[n][j] * d[k + C::Before - j][n];
          }
      }
      // All outputs that read this token are known now.
      const int64_t ready = token + k - C::Before;
      if (ready >= c.begin && (inner || ready < c.end)) dx.store_token(ready, out);
    }
    move_up<C::Before>(window);
    move_up<C::Before>(d);
  };
  int64_t token = c.begin;
#pragma unroll 1
  for (; token + kChunk <= c.end; token += kChunk) walk_chunk(token, std::true_type{});
#pragma unroll 1
  for (; token < c.end + C::Before; token += kChunk) walk_chunk(token, std::false_type{});
  float* slot = slots + (c.batch * runs + c.run) * (width + 1) * s.dim + c.channel;
#pragma unroll
  for (int j = 0; j <= C::Width; ++j)
    if (j >= skip)
#pragma unroll
      for (int n = 0; n < N; ++n)
        if (c.channel + n < s.dim) slot[(j - skip) * s.dim + n] = sums[j][n];
}

// ---------------------------------------------------------------------------------------------------------------------

// Where a sum over the slots [tap, bias][channel] goes.
struct PutGradient {
  float *d_weight, *d_bias;
  int64_t dim, width;
  __device__ void operator()(int64_t i, float sum) const {
    const int64_t j = i / dim, channel = i % dim;
    if (j < width)
      d_weight[channel * width + j] = sum;
    else if (d_bias)
      d_bias[channel] = sum;
  }
};

// Tokens that a thread walks where channels are neighbours: few enough for 2^17 threads, some hundred for every multiprocessor,
// and many beside those that two neighbours both read.
int64_t walk_of(const ConvShape& s, int64_t size) {
  const int64_t wanted = s.batch * s.seqlen * ceil_div(s.dim, size) >> 17;
  return std::min<int64_t>(std::max<int64_t>(wanted / kChunk * kChunk, 16), 128);
}

// All pieces of `size` elements lie at multiples of their bytes.
bool aligned(const ConvShape& s, const Sequence& x, int64_t size, int64_t element) {
  const int64_t extent = s.channel_last ? s.dim : s.seqlen, lines = s.channel_last ? s.seqlen : s.dim;
  const int64_t line = s.channel_last ? x.token : x.channel;
  return extent % size == 0 && (lines == 1 || line % size == 0) && (s.batch == 1 || x.batch % size == 0) &&
         reinterpret_cast<uintptr_t>(x.data) % (size * element) == 0;
}

// run(Case) for a shape and what it is loaded from.
template <class F>
void with_case(const ConvShape& s, std::initializer_list<Sequence> images, const F& run) {
  const auto with_type = [&](auto zero) {
    using T = decltype(zero);
    const auto is_aligned = [&](const Sequence& x) { return aligned(s, x, 16 / sizeof(T), sizeof(T)); };
    const auto with_width = [&](auto width, auto whole) {
      constexpr int Width = decltype(width)::value;
      constexpr bool Aligned = decltype(whole)::value;
      if (s.channel_last)
        run(Case<T, Width, Aligned, true, false>{});
      else
        s.reverse ? run(Case<T, Width, Aligned, false, true>{}) : run(Case<T, Width, Aligned, false, false>{});
    };
    if (s.width <= 4 && std::all_of(images.begin(), images.end(), is_aligned))
      with_width(std::integral_constant<int, 4>{}, std::true_type{});
    else
      with_width(std::integral_constant<int, 16>{}, std::false_type{});
  };
  with_dtype(images.begin()->dtype, with_type);
}

}  // namespace conv

int64_t queue(const ConvForward& a, void* memory, cudaStream_t stream) {
  const ConvShape& s = a.shape;
  if (!memory || s.batch == 0) return 0;
  conv::with_case(s, {a.x, a.y}, [&](auto compiled) {
    using C = decltype(compiled);
    if constexpr (C::ChannelLast) {
      const int64_t walk = conv::walk_of(s, C::kForward), runs = conv::ceil_div(s.seqlen, walk);
      const int64_t threads = s.batch * runs * conv::ceil_div(s.dim, C::kForward);
      launch(conv::forward_channels<C>, dim3(conv::ceil_div(threads, conv::kThreads)), dim3(conv::kThreads), 0, stream, a, runs,
             walk);
    } else {
      const int64_t warps = s.batch * conv::parts_of(s, C::kForward) * s.dim;
      launch(conv::forward_tokens<C>, dim3(conv::ceil_div(warps, conv::kWarps)), dim3(conv::kThreads), 0, stream, a);
    }
  });
  return 0;
}

int64_t queue(const ConvBackward& a, void* memory, cudaStream_t stream) {
  const ConvShape& s = a.shape;
  const int64_t size = (s.width + 1) * s.dim;
  float* slots = static_cast<float*>(memory);
  int64_t count = 0;  // of slots
  conv::with_case(s, {a.x, a.dy, a.dx}, [&](auto compiled) {
    using C = decltype(compiled);
    if constexpr (C::ChannelLast) {
      const int64_t walk = conv::walk_of(s, C::kBackward), runs = conv::ceil_div(s.seqlen, walk);
      const int64_t threads = s.batch * runs * conv::ceil_div(s.dim, C::kBackward);
      count = s.batch * runs;
      if (memory && count)
        launch(conv::backward_channels<C>, dim3(conv::ceil_div(threads, conv::kThreads)), dim3(conv::kThreads), 0, stream, a,
               slots, runs, walk);
    } else {
      count = s.batch * conv::parts_of(s, C::kBackward);
      if (memory && count)
        launch(conv::backward_tokens<C>, dim3(conv::ceil_div(count * s.dim, conv::kWarps)), dim3(conv::kThreads), 0, stream, a,
               slots);
    }
  });
  if (memory) sum_slots(slots, count, size, conv::PutGradient{a.d_weight, a.d_bias, s.dim, s.width}, stream);
  return count * size * static_cast<int64_t>(sizeof(float));
}

}  // namespace autohdr
