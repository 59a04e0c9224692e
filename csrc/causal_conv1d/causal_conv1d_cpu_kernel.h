// causal_conv1d on a CPU, compiled once per instruction set (no include guard; see common/cpu_each_isa.h).
//
// A worker takes pieces of some tokens × kStrip channels. A piece lies in scratch as float32 lines, with the tokens beside it that
// its taps reach, zero beyond the sequence: channel-last as one line [token][channel], where the lanes of a vector are channels,
// else as a line [token] for each channel, where they are tokens. In either, output i is Σ_j tap_j · x[i + j·row], and only where
// the lanes' taps come from differs.
//
// The backward pass computes the output before SiLU again. The gradients of the parameters are sums over a piece, then over the pieces
// in order: they do not depend on the number of threads.

#include "common/cpu_math.h"
#include "common/cpu_sequence.h"
#include "common/cpu_slots.h"

// Of a piece: 32 KB channel-last, where it holds all its channels, else 8 KB a channel.
constexpr int64_t tokens_of(bool channel_last) { return channel_last ? 128 : 2048; }
constexpr int64_t kStrip = 64;  // channels

// A piece, or one channel of it; of `channels` channels, in a line with `row` floats a token.
struct Line {
  int64_t batch, first, tokens, channel, channels, row;
};

// f(line, memory of line_floats floats) for the lines of all pieces.
template <bool ChannelLast, class F>
static void each_line(const ConvShape& s, int64_t line_floats, const F& f) {
  constexpr int64_t kTokens = tokens_of(ChannelLast);
  const int64_t chunks = ceil_div(s.seqlen, kTokens), strips = ceil_div(s.dim, kStrip), count = s.batch * chunks * strips;
  const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(count, thread_count()));
  Scratch scratch;
  float* memory = scratch.take<float>(workers * line_floats);
  parallel_ranges(count, [&](int64_t worker, int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i) {
      const int64_t token = i / strips % chunks * kTokens, channel = i % strips * kStrip;
      Line line{i / strips / chunks, token, std::min(kTokens, s.seqlen - token), channel, std::min(kStrip, s.dim - channel), 1};
      float* own = memory + worker * line_floats;
      if (ChannelLast) {
        line.row = round_up(line.channels, W);
        f(line, own);
        continue;
      }
      const int64_t beyond = channel + line.channels;
      for (line.channels = 1; line.channel < beyond; ++line.channel) f(line, own);
    }
  });
}

// f(i, t, c): for every vector of `tokens` tokens of a line its place, and its token and first channel; channel-last, the last
// vector of a token goes beyond the channels, else that of the line beyond the tokens.
template <bool ChannelLast, class F>
AUTOHDR_INLINE void each_vector(const Line& line, int64_t tokens, const F& f) {
  if (ChannelLast) {
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t c = 0; c < line.row; c += W) f(t * line.row + c, t, c);
  } else {
    for (int64_t i = 0; i < tokens; i += W) f(i, i, 0);
  }
}

// Tokens [from, from + tokens) of a line, zero where the sequence has none. Where lanes are tokens, W more are zero.
template <bool ChannelLast>
static void load_line(const ConvShape& s, const Sequence& x, const Line& line, int64_t from, int64_t tokens, float* to) {
  const int64_t first = std::max<int64_t>(from, 0), end = std::min(from + tokens, s.seqlen);
  const int64_t head = (first - from) * line.row, tail = (end - from) * line.row;
  __builtin_memset(to, 0, head * sizeof(float));
  __builtin_memset(to + tail, 0, (tokens * line.row + (ChannelLast ? 0 : W) - tail) * sizeof(float));
  with_pointer(x, line.batch * x.batch + line.channel * x.channel + first * x.token, [&](const auto* data) {
    if (ChannelLast) {
      for (int64_t t = 0; t < end - first; ++t)
        for (int64_t c = 0; c < line.row; c += W)
          store(to + head + t * line.row + c, load_at(data + t * x.token, c, line.channels));
    } else {
      for (int64_t i = 0; i < end - first; i += W) store_at(to + head, i, end - first, load_at(data, i, end - first));
    }
  });
}

template <bool ChannelLast, class T>
AUTOHDR_INLINE void store_output(const Sequence& y, const Line& line, T* data, int64_t t, int64_t c, vf v) {
  if (ChannelLast)
    store_at(data + t * y.token, c, line.channels, v);
  else
    store_at(data, t, line.tokens, v);
}

// The taps of a line in the order of the tokens they meet, then the bias: [width + 1][row].
static void load_taps(const ConvShape& s, const float* weight, const float* bias, const Line& line, float* to) {
  for (int64_t j = 0; j <= s.width; ++j)
    for (int64_t c = 0; c < line.row; ++c) {
      const int64_t channel = line.channel + c;
      const bool real = c < line.channels && (j < s.width || bias);
      to[j * line.row + c] = !real ? 0.0f : j < s.width ? weight[channel * s.width + s.tap(j)] : bias[channel];
    }
}

template <bool ChannelLast>
AUTOHDR_INLINE vf tap(const float* taps, const Line& line, int64_t j, int64_t c) {
  return ChannelLast ? load(taps + j * line.row + c) : splat(taps[j]);
}

// The convolution's output at vector i, whose first tap meets x[i].
template <bool ChannelLast>
AUTOHDR_INLINE vf convolve(const ConvShape& s, const Line& line, const float* taps, const float* x, int64_t i, int64_t c) {
  vf v = tap<ChannelLast>(taps, line, s.width, c);
  for (int64_t j = 0; j < s.width; ++j) v += tap<ChannelLast>(taps, line, j, c) * load(x + i + j * line.row);
  return v;
}

template <bool ChannelLast>
static void forward_lines(const ConvForward& a) {
  const ConvShape& s = a.shape;
  constexpr int64_t kTokens = tokens_of(ChannelLast);
  const int64_t row = ChannelLast ? kStrip : 1, x_floats = (kTokens + s.width - 1) * row + W;
  each_line<ChannelLast>(s, x_floats + (s.width + 1) * row, [&](const Line& line, float* x) {
    float* taps = x + x_floats;
    load_taps(s, a.weight, a.bias, line, taps);
    load_line<ChannelLast>(s, a.x, line, line.first - s.before(), line.tokens + s.width - 1, x);
    with_pointer(a.y, line.batch * a.y.batch + line.channel * a.y.channel + line.first * a.y.token, [&](auto* y) {
      each_vector<ChannelLast>(line, line.tokens, [&](int64_t i, int64_t t, int64_t c) {
        const vf v = convolve<ChannelLast>(s, line, taps, x, i, c);
        store_output<ChannelLast>(a.y, line, y, t, c, v * sigmoid(v));
      });
    });
  });
}

static void run(const ConvForward& a) { a.shape.channel_last ? forward_lines<true>(a) : forward_lines<false>(a); }

// Sums over a line's tokens of its dv (and for taps, times the x they meet): up to Count taps from the j-th on, or the bias.
template <bool ChannelLast, int Count>
AUTOHDR_INLINE void add_tap_sums(const ConvShape& s, const Line& line, const float* dv, const float* x, int64_t j, float* sums) {
  for (int64_t c = 0; c < line.row; c += ChannelLast ? W : 1) {
    vf total[Count] = {};
    const auto add = [&](int64_t i, vf g) {
  AUTOHDR_UNROLL for (int n = 0; n < Count; ++n) total[n] += g * (x ? load(x + i + (j + n) * line.row) : splat(1.0f));
    };
    if (ChannelLast)
      for (int64_t t = 0; t < line.tokens; ++t) add(t * line.row + c, load(dv + t * line.row + c));
    else
      for (int64_t i = 0; i < line.tokens; i += W) add(i, load_at(dv, i, line.tokens));
    for (int n = 0; n < Count; ++n) {
      float* to = sums + (x ? s.tap(j + n) : s.width) * s.dim + line.channel + c;
      ChannelLast ? store_at(to, 0, line.channels - c, total[n]) : void(*to = sum(total[n]));
    }
  }
}

template <bool ChannelLast>
static void backward_lines(const ConvBackward& a, float* slots) {
  const ConvShape& s = a.shape;
  constexpr int64_t kTokens = tokens_of(ChannelLast);
  const int64_t row = ChannelLast ? kStrip : 1, edge = s.width - 1;
  const int64_t x_floats = (kTokens + 2 * edge) * row + W, dv_floats = (kTokens + edge) * row + W;
  each_line<ChannelLast>(s, x_floats + dv_floats + (s.width + 1) * row, [&](const Line& line, float* x) {
    float *dv = x + x_floats, *taps = dv + dv_floats;
    load_taps(s, a.weight, a.bias, line, taps);
    load_line<ChannelLast>(s, a.x, line, line.first - edge, line.tokens + 2 * edge, x);
    // The gradient before SiLU, of every output that reads one of the line's tokens.
    const int64_t from = line.first - s.after();
    load_line<ChannelLast>(s, a.dy, line, from, line.tokens + edge, dv);
    const int64_t skip = std::max<int64_t>(-from, 0), end = std::min(line.tokens + edge, s.seqlen - from);
    each_vector<ChannelLast>(line, end - skip, [&](int64_t i, int64_t, int64_t c) {
      i += skip * line.row;
      const vf v = convolve<ChannelLast>(s, line, taps, x, i, c), gate = sigmoid(v);
      const vf g = load(dv + i) * (gate + v * gate * (1.0f - gate));
      if (ChannelLast)
        store(dv + i, g);
      else
        store_at(dv, i, end, g);
    });
    with_pointer(a.dx, line.batch * a.dx.batch + line.channel * a.dx.channel + line.first * a.dx.token, [&](auto* dx) {
      each_vector<ChannelLast>(line, line.tokens, [&](int64_t i, int64_t t, int64_t c) {
        vf v = {};
        for (int64_t j = 0; j < s.width; ++j) v += tap<ChannelLast>(taps, line, j, c) * load(dv + i + (edge - j) * line.row);
        store_output<ChannelLast>(a.dx, line, dx, t, c, v);
      });
    });
    float* sums = slots + (line.batch * ceil_div(s.seqlen, kTokens) + line.first / kTokens) * (s.width + 1) * s.dim;
    const float *own = dv + s.after() * line.row, *seen = x + s.after() * line.row;
    int64_t j = 0;
    for (; j + 4 <= s.width; j += 4) add_tap_sums<ChannelLast, 4>(s, line, own, seen, j, sums);
    for (; j < s.width; ++j) add_tap_sums<ChannelLast, 1>(s, line, own, seen, j, sums);
    add_tap_sums<ChannelLast, 1>(s, line, own, nullptr, 0, sums);
  });
}

static void run(const ConvBackward& a) {
  const ConvShape& s = a.shape;
  const int64_t pieces = s.batch * ceil_div(s.seqlen, tokens_of(s.channel_last)), size = (s.width + 1) * s.dim;
  Scratch scratch;
  float* slots = scratch.take<float>(pieces * size);  // [piece][tap, bias][channel]
  s.channel_last ? backward_lines<true>(a, slots) : backward_lines<false>(a, slots);
  sum_slots(slots, pieces, size, [&](int64_t i, float sum) {
    const int64_t tap = i / s.dim, channel = i % s.dim;
    if (tap < s.width)
      a.d_weight[channel * s.width + tap] = sum;
    else if (a.d_bias)
      a.d_bias[channel] = sum;
  });
}
