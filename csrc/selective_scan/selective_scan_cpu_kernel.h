// selective_scan on a CPU, compiled once per instruction set (no include guard; see common/cpu_each_isa.h).
//
// The lanes of a vector are channels of one group, so that B and C are broadcasts. A worker owns blocks of W channels of a batch
// entry and walks their sequence in chunks of kChunk tokens; a chunk's B and C are read once for all of its blocks. Tiles in
// scratch are float32 [token][lane] in the tensor's order, whatever its dtype and strides; a reversed scan walks them from the
// end. Within a chunk four states at a time stay in registers.
//
// The backward pass takes the chunks from the last one scanned to the first, computes a chunk's states and gates again from the
// saved state before it, and walks back. dB and dC are sums over channels: the lanes are summed as they arise, the blocks in a
// tile, and the workers that share a group in order at the end. So a result depends on the number of threads, not on their timing.

#include "common/cpu_math.h"
#include "common/cpu_sequence.h"

// ---------------------------------------------------------------------------------------------------------------------
// Shuffles.

// The lane-wise choice of two vectors' elements by constant indices, f(i) below W from a, from W on from b.
#if defined(__clang__)
#define AUTOHDR_SHUFFLE(a, b, f) __builtin_shufflevector(a, b, f(I)...)
#else
#define AUTOHDR_SHUFFLE(a, b, f) __builtin_shuffle(a, b, vi{f(I)...})
#endif
typedef std::make_integer_sequence<int, W> Lanes;

// W / 4 times four floats, `stride` apart, one group behind the other.
AUTOHDR_INLINE vf load_fours(const float* p, int64_t stride) {
#if AUTOHDR_WIDTH == 16
  __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(p));
  v = _mm512_insertf32x4(v, _mm_loadu_ps(p + stride), 1);
  v = _mm512_insertf32x4(v, _mm_loadu_ps(p + 2 * stride), 2);
  return (vf)_mm512_insertf32x4(v, _mm_loadu_ps(p + 3 * stride), 3);
#elif AUTOHDR_WIDTH == 8
  return (vf)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + stride), 1);
#else
  return load(p);
#endif
}
// Columns of the W × W block whose rows begin at p, `stride` apart. Its 4 × 4 blocks are put in place by the loads, so that half of
// a transposition's shuffles are not needed.
template <int... I>
AUTOHDR_INLINE void load_transposed(const float* p, int64_t stride, vf* columns, std::integer_sequence<int, I...>) {
#define LOW(i) ((i) / 4 * 4 + (i) % 4 / 2 + (i) % 2 * W)  // a0 b0 a1 b1 of each four
#define HIGH(i) (LOW(i) + 2)                              // a2 b2 a3 b3
#define FIRST(i) ((i) + ((i) & 2 ? W - 2 : 0))            // a0 a1 b0 b1
#define SECOND(i) (FIRST(i) + 2)                          // a2 a3 b2 b3
  AUTOHDR_UNROLL for (int i = 0; i < W; i += 4) {
    vf rows[4];
    AUTOHDR_UNROLL for (int j = 0; j < 4; ++j) rows[j] = load_fours(p + j * stride + i, 4 * stride);
    const vf a = AUTOHDR_SHUFFLE(rows[0], rows[1], LOW), b = AUTOHDR_SHUFFLE(rows[2], rows[3], LOW);
    const vf c = AUTOHDR_SHUFFLE(rows[0], rows[1], HIGH), d = AUTOHDR_SHUFFLE(rows[2], rows[3], HIGH);
    columns[i] = AUTOHDR_SHUFFLE(a, b, FIRST), columns[i + 1] = AUTOHDR_SHUFFLE(a, b, SECOND);
    columns[i + 2] = AUTOHDR_SHUFFLE(c, d, FIRST), columns[i + 3] = AUTOHDR_SHUFFLE(c, d, SECOND);
  }
#undef LOW
#undef HIGH
#undef FIRST
#undef SECOND
}

// Vectors whose segments of 2S lanes are to be summed, made into one with twice as many segments of S lanes, a's first.
template <int S, int... I>
AUTOHDR_INLINE vf fold(vf a, vf b, std::integer_sequence<int, I...>) {
#define LOWER(i) (((i) / S) * 2 * S + (i) % S)  // counts on into b
#define UPPER(i) (LOWER(i) + S)
  return AUTOHDR_SHUFFLE(a, b, LOWER) + AUTOHDR_SHUFFLE(a, b, UPPER);
#undef LOWER
#undef UPPER
}
// to[i] += the sum of v[i]'s lanes, for 8 vectors.
AUTOHDR_INLINE void add_sums(const vf* v, float* to) {
  vf a[4], b[2];
  AUTOHDR_UNROLL for (int i = 0; i < 4; ++i) a[i] = fold<W / 2>(v[2 * i], v[2 * i + 1], Lanes{});
  AUTOHDR_UNROLL for (int i = 0; i < 2; ++i) b[i] = fold<W / 4>(a[2 * i], a[2 * i + 1], Lanes{});
#if AUTOHDR_WIDTH == 4
  store(to, load(to) + b[0]);
  store(to + 4, load(to + 4) + b[1]);
#else
  vf c = fold<W / 8>(b[0], b[1], Lanes{});
#if AUTOHDR_WIDTH == 16
  c = fold<1>(c, c, Lanes{});
#endif
  typedef float v8 __attribute__((vector_size(32)));
  typedef float v8_mem __attribute__((vector_size(32), aligned(4), may_alias));
  v8 eight;
  __builtin_memcpy(&eight, &c, sizeof eight);
  *reinterpret_cast<v8_mem*>(to) += eight;
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Tiles: from tensors of any dtype and either order into scratch and back.

constexpr int64_t kTile = kChunk * W;  // floats in a tile [token][lane]

// The rows [t][lane] of `lanes` <= W channels from element `offset` on; lanes beyond are zero. Writes whole W × W blocks.
static void load_tile(const Sequence& s, int64_t offset, int64_t lanes, int64_t tokens, float* tile) {
  with_pointer(s, offset, [&](const auto* from) {
    if (s.channel == 1 && lanes == W) {
      for (int64_t t = 0; t < tokens; ++t) store(tile + t * W, load(from + t * s.token));
    } else if (s.channel == 1) {
      for (int64_t t = 0; t < tokens; ++t) store(tile + t * W, load_part(from + t * s.token, lanes));
    } else {
      for (int64_t t = 0; t < tokens; t += W) {
        vf columns[W];
        if (std::is_same_v<decltype(from), const float*> && lanes == W && t + W <= tokens) {
          load_transposed(reinterpret_cast<const float*>(from) + t, s.channel, columns, Lanes{});
        } else {
          float block[W * W];
          for (int c = 0; c < W; ++c) store(block + c * W, c < lanes ? load_at(from + c * s.channel, t, tokens) : vf{});
          load_transposed(block, W, columns, Lanes{});
        }
        AUTOHDR_UNROLL for (int c = 0; c < W; ++c) store(tile + (t + c) * W, columns[c]);
      }
    }
  });
}

static void store_tile(const Sequence& s, int64_t offset, int64_t lanes, int64_t tokens, const float* tile) {
  with_pointer(s, offset, [&](auto* to) {
    if (s.channel == 1 && lanes == W) {
      for (int64_t t = 0; t < tokens; ++t) store(to + t * s.token, load(tile + t * W));
    } else if (s.channel == 1) {
      for (int64_t t = 0; t < tokens; ++t) store_part(to + t * s.token, load(tile + t * W), lanes);
    } else {
      for (int64_t t = 0; t < tokens; t += W) {
        vf rows[W];
        load_transposed(tile + t * W, W, rows, Lanes{});
        if (lanes == W && t + W <= tokens) {
          AUTOHDR_UNROLL for (int c = 0; c < W; ++c) store(to + c * s.channel + t, rows[c]);
        } else {
          for (int c = 0; c < lanes; ++c) store_at(to + c * s.channel, t, tokens, rows[c]);
        }
      }
    }
  });
}

// `count` rows of `length` elements, `stride` apart, into rows `ld` apart, and back.
template <class T>
AUTOHDR_INLINE void load_rows(const T* from, int64_t stride, int64_t count, int64_t length, float* to, int64_t ld) {
  for (int64_t r = 0; r < count; ++r)
    for (int64_t i = 0; i < length; i += W) store_at(to + r * ld, i, length, load_at(from + r * stride, i, length));
}

// A chunk of B or C: element (t, n) at data[t·token + n·state].
struct Projection {
  const float* data;
  int64_t token, state;
};

static Projection load_projection(const Sequence& s, int64_t offset, int64_t dstate, int64_t tokens, float* memory) {
  Projection p{memory, 1, kChunk};
  if (s.token != 1) p.token = dstate, p.state = 1;
  with_pointer(s, offset, [&](const auto* from) {
    if (s.token == 1)
      load_rows(from, s.channel, dstate, tokens, memory, kChunk);
    else
      load_rows(from, s.token, tokens, dstate, memory, dstate);
  });
  return p;
}

// The sums over channels of dB and dC: [states / 4][token][dB of four states, dC of four states].
constexpr int64_t kFours = 8;
static int64_t sums_size(int64_t dstate, int64_t tokens) { return ceil_div(dstate, 4) * tokens * kFours; }

static void store_projection(const Sequence& s, int64_t offset, int64_t dstate, int64_t tokens, const float* sums, int64_t ld,
                             int64_t part) {
  with_pointer(s, offset, [&](auto* to) {
    for (int64_t n = 0; n < dstate; ++n) {
      const float* from = sums + n / 4 * ld * kFours + part * 4 + n % 4;
      if (s.token == 1) {
        for (int64_t t = 0; t < tokens; t += W) {
          float lanes[W] = {};
          const int64_t count = std::min<int64_t>(W, tokens - t);
          for (int64_t i = 0; i < count; ++i) lanes[i] = from[(t + i) * kFours];
          store_at(to + n * s.channel, t, tokens, load(lanes));
        }
      } else if (n % 4 == 0) {
        const int64_t count = std::min<int64_t>(4, dstate - n);
        for (int64_t t = 0; t < tokens; ++t) {
          float lanes[W] = {};
          __builtin_memcpy(lanes, from + t * kFours, 4 * sizeof(float));
          store_part(to + n * s.channel + t * s.token, load(lanes), count);
        }
      }
    }
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// What both passes share: which worker owns what, one block's constants and its Δ.

// The blocks [first, end) of W channels of one batch entry and group, all one worker's.
struct Segment {
  int64_t batch, group, first, end;
  bool whole;  // no other worker has blocks of this group
};

// How the blocks are split over the workers.
struct Split {
  int64_t workers;
  std::vector<Segment> segments;
  std::vector<int64_t> first;  // of a worker's segments, and their number

  explicit Split(const ScanShape& s) {
    const int64_t blocks = ceil_div(s.channels, W), units = s.batch * s.groups * blocks;
    workers = std::max<int64_t>(1, std::min<int64_t>(units, thread_count()));
    for (int64_t w = 0; w < workers; ++w) {
      first.push_back(segments.size());
      for (int64_t unit = units * w / workers, stop = units * (w + 1) / workers; unit < stop;) {
        const int64_t block = unit % blocks, end = std::min(blocks, block + stop - unit), index = unit / blocks;
        segments.push_back({index / s.groups, index % s.groups, block, end, block == 0 && end == blocks});
        unit += end - block;
      }
    }
    first.push_back(segments.size());
  }
  template <class F>
  void for_each(const F& f) const {  // f(worker, segment's index)
    parallel(workers, [&](int64_t w) {
      for (int64_t i = first[w]; i < first[w + 1]; ++i) f(w, i);
    });
  }
  int64_t most_blocks() const {
    int64_t most = 0;
    for (const Segment& s : segments) most = std::max(most, s.end - s.first);
    return most;
  }
};

// The tokens of the chunk scanned i-th; in them a scan goes from `start` on by `step`.
struct Chunk {
  int64_t index, first, tokens, start, step;
  Chunk(const ScanShape& s, int64_t i) : index(i) {
    const int64_t scanned = i * kChunk, end = std::min(scanned + kChunk, s.seqlen);
    tokens = end - scanned;
    first = s.reverse ? s.seqlen - end : scanned;
    start = s.reverse ? tokens - 1 : 0;
    step = s.reverse ? -1 : 1;
  }
};

// W channels of a group, some beyond its end in the last block.
struct Block {
  int64_t batch, group, channel, lanes, row;  // channel: in the group; row: in all channels
  Block(const ScanShape& s, const Segment& segment, int64_t i)
      : batch(segment.batch), group(segment.group), channel(i * W), lanes(std::min<int64_t>(W, s.channels - channel)),
        row(group * s.channels + channel) {}
  int64_t offset(const Sequence& s, const Chunk& c) const {
    return batch * s.batch + group * s.group + channel * s.channel + c.first * s.token;
  }
};

// Fetches what the next block will read and write while this one computes: rows that lie pages apart come too late otherwise.
class Ahead {
 public:
  // The next block is the one after the i-th, behind a segment's last the first; the caller says of which chunk.
  Ahead(const ScanShape& s, const Segment& g, int64_t i, int64_t its_chunk)
      : block(s, g, i + 1 < g.end ? i + 1 : g.first), chunk(s, its_chunk) {}

  void add(const Sequence& s) {
    if (!s.data) return;
    const int64_t size = s.dtype == Dtype::f32 ? 4 : 2;
    const char* first = static_cast<const char*>(s.data) + block.offset(s, chunk) * size;
    if (s.channel == 1)
      for (int64_t t = 0; t < chunk.tokens; ++t) lines[count++] = first + t * s.token * size;
    else
      for (int64_t byte = 0; byte < chunk.tokens * size; byte += kLine)
        for (int64_t c = 0; c < block.lanes; ++c) lines[count++] = first + c * s.channel * size + byte;
  }
  void spread(int64_t steps) { rate = ceil_div(count, steps); }
  void step() {  // called `steps` times
    for (const int64_t end = std::min(done + rate, count); done < end; ++done) __builtin_prefetch(lines[done], 0);
  }

 private:
  static constexpr int64_t kLine = 64, kMost = 7;  // bytes; tensors
  Block block;
  Chunk chunk;
  int64_t count = 0, done = 0, rate = 0;
  const char* lines[kMost * kChunk];
};

AUTOHDR_INLINE vf load_parameter(const float* p, const Block& b) { return p ? load_part(p + b.row, b.lanes) : vf{}; }

// [state][lane] from [channel][dstate], times a factor, and back.
static void load_states(const float* from, int64_t lanes, int64_t dstate, float factor, float* to) {
  for (int64_t n = 0; n < dstate; ++n)
    for (int64_t c = 0; c < W; ++c) to[n * W + c] = c < lanes && from ? from[c * dstate + n] * factor : 0.0f;
}
static void store_states(const float* from, int64_t lanes, int64_t dstate, float* to) {
  for (int64_t n = 0; n < dstate; ++n)
    for (int64_t c = 0; c < lanes; ++c) to[c * dstate + n] = from[n * W + c];
}

// Δ, and unless `slope` is null its derivative by what softplus is applied to, where it is applied.
static void load_delta(const ScanShape& s, const ScanInputs& in, const Block& b, const Chunk& c, float* delta, float* slope) {
  const vf bias = load_parameter(in.delta_bias, b);
  if (in.delta_weight) {
    const vf weight = load_parameter(in.delta_weight, b);
    with_pointer(in.delta, b.batch * in.delta.batch + c.first * in.delta.token, [&](const auto* from) {
      float row[kChunk];
      if (in.delta.token == 1)
        load_rows(from, 0, 1, c.tokens, row, 0);
      else
        for (int64_t t = 0; t < c.tokens; ++t) row[t] = load_part(from + t * in.delta.token, 1)[0];
      for (int64_t t = 0; t < c.tokens; ++t) store(delta + t * W, weight * row[t] + bias);
    });
  } else {
    load_tile(in.delta, b.offset(in.delta, c), b.lanes, c.tokens, delta);
    if (in.delta_bias && !s.softplus)
      for (int64_t t = 0; t < c.tokens; ++t) store(delta + t * W, load(delta + t * W) + bias);
  }
  if (!s.softplus) return;
  const vf rest = in.delta_weight ? vf{} : bias;
  for (int64_t t = 0; t < c.tokens; ++t) {
    const Softplus d = softplus(load(delta + t * W) + rest);
    store(delta + t * W, d.value);
    if (slope) store(slope + t * W, d.slope);
  }
}

// Up to four states of a block through a chunk: y += C h. With Keep, each token's gate goes to gates[i][NS][lane] and its state to
// kept[i + 1][NS][lane], i in the scan's order; kept[0] is the state before.
template <int NS, bool Keep, bool Output>
static void scan_states(const Chunk& c, const float* delta, const float* du, const float* A2, const Projection& B,
                        const Projection& C, float* state, float* y, float* gates, float* kept, Ahead& ahead) {
  vf h[NS], a2[NS];
  AUTOHDR_UNROLL for (int j = 0; j < NS; ++j) {
    h[j] = load(state + j * W), a2[j] = load(A2 + j * W);
    if (Keep) store(kept + j * W, h[j]);
  }
  int64_t t = c.start;
  for (int64_t i = 0; i < c.tokens; ++i, t += c.step) {
    const vf d = load(delta + t * W), x = load(du + t * W);
    vf sum = Output ? load(y + t * W) : vf{};
    ahead.step();
    vf gate[NS];
    AUTOHDR_UNROLL for (int j = 0; j < NS; ++j) gate[j] = d * a2[j];
    exp2<NS>(gate);
    AUTOHDR_UNROLL for (int j = 0; j < NS; ++j) {
      h[j] = gate[j] * h[j] + x * B.data[t * B.token + j * B.state];
      if (Output) sum += h[j] * C.data[t * C.token + j * C.state];
      if (Keep) {  // to memory that the last pass has driven from the L1 cache
        store(gates + (i * NS + j) * W, gate[j]);
        store(kept + ((i + 1) * NS + j) * W, h[j]);
        __builtin_prefetch(gates + ((i + 4) * NS + j) * W, 1);
        __builtin_prefetch(kept + ((i + 5) * NS + j) * W, 1);
      }
    }
    if (Output) store(y + t * W, sum);
  }
  AUTOHDR_UNROLL for (int j = 0; j < NS; ++j) store(state + j * W, h[j]);
}

// f(first state, constant number of them) for all states, four at a time.
template <class F>
AUTOHDR_INLINE void by_fours(int64_t dstate, const F& f) {
  int64_t n = 0;
  for (; n + 4 <= dstate; n += 4) f(n, std::integral_constant<int, 4>{});
  switch (dstate - n) {
    case 1: return f(n, std::integral_constant<int, 1>{});
    case 2: return f(n, std::integral_constant<int, 2>{});
    case 3: return f(n, std::integral_constant<int, 3>{});
  }
}

AUTOHDR_INLINE Projection from_state(const Projection& p, int64_t n) { return {p.data + n * p.state, p.token, p.state}; }

static int64_t projection_offset(const Sequence& s, const Segment& g, const Chunk& c) {
  return g.batch * s.batch + g.group * s.group + c.first * s.token;
}

// ---------------------------------------------------------------------------------------------------------------------

static void run(const ScanForward& a) {
  const ScanShape& s = a.shape;
  const ScanInputs& in = a.in;
  if (s.batch == 0) return;
  Scratch scratch;
  const Split split(s);
  const int64_t N = s.dstate, blocks = split.most_blocks();
  const int64_t worker_size = 4 * kTile + 2 * kChunk * N + 2 * blocks * N * W;
  float* memory = scratch.take<float>(split.workers * worker_size);
  split.for_each([&](int64_t worker, int64_t index) {
    const Segment& g = split.segments[index];
    float *delta = memory + worker * worker_size, *u = delta + kTile, *du = u + kTile, *y = du + kTile;
    float *b_memory = y + kTile, *c_memory = b_memory + kChunk * N;
    float *A2 = c_memory + kChunk * N, *state = A2 + blocks * N * W;  // [block][state][lane]
    for (int64_t i = g.first; i < g.end; ++i) {
      const Block b(s, g, i);
      load_states(in.A + b.row * N, b.lanes, N, kLog2e, A2 + (i - g.first) * N * W);
      load_states(in.initial_state ? in.initial_state + (b.batch * s.dim() + b.row) * N : nullptr, b.lanes, N, 1,
                  state + (i - g.first) * N * W);
    }
    for (int64_t k = 0; k < s.chunks(); ++k) {
      const Chunk c(s, k);
      const Projection B = load_projection(in.B, projection_offset(in.B, g, c), N, c.tokens, b_memory);
      const Projection C = load_projection(in.C, projection_offset(in.C, g, c), N, c.tokens, c_memory);
      for (int64_t i = g.first; i < g.end; ++i) {
        const Block b(s, g, i);
        float *h = state + (i - g.first) * N * W, *a2 = A2 + (i - g.first) * N * W;
        for (int64_t n = 0; a.states && n < N; ++n)
          store_at(a.states + ((b.batch * s.chunks() + k) * N + n) * s.dim() + b.row, 0, b.lanes, load(h + n * W));
        load_delta(s, in, b, c, delta, nullptr);
        load_tile(in.u, b.offset(in.u, c), b.lanes, c.tokens, u);
        const vf D = load_parameter(in.D, b);
        for (int64_t t = 0; t < c.tokens; ++t) {
          store(du + t * W, load(delta + t * W) * load(u + t * W));
          store(y + t * W, D * load(u + t * W));
        }
        Ahead ahead(s, g, i, std::min(i + 1 < g.end ? k : k + 1, s.chunks() - 1));
        for (const Sequence* q : {&in.u, &in.z, &a.out}) ahead.add(*q);
        if (!in.delta_weight) ahead.add(in.delta);
        ahead.spread(ceil_div(N, 4) * c.tokens);
        by_fours(N, [&](int64_t n, auto count) {
          scan_states<count(), false, true>(c, delta, du, a2 + n * W, from_state(B, n), from_state(C, n), h + n * W, y, nullptr,
                                            nullptr, ahead);
        });
        if (in.z.data) {
          float* z = du;
          load_tile(in.z, b.offset(in.z, c), b.lanes, c.tokens, z);
          for (int64_t t = 0; t < c.tokens; ++t) {
            const vf v = load(z + t * W);
            store(y + t * W, load(y + t * W) * (v * sigmoid(v)));
          }
        }
        store_tile(a.out, b.offset(a.out, c), b.lanes, c.tokens, y);
      }
    }
    for (int64_t i = g.first; i < g.end; ++i) {
      const Block b(s, g, i);
      store_states(state + (i - g.first) * N * W, b.lanes, N, a.last_state + (b.batch * s.dim() + b.row) * N);
    }
  });
}

// Up to four states of a block back through a chunk. Given gates and kept as scan_states leaves them, adds to d_input (the gradient
// of Δ u), to d_decay (of Δ log2(e), through the gates), to dA and to the sums of dB and dC, and takes d_state, the gradient of the
// state after the chunk, to that of the state before it.
template <int NS>
static void scan_states_back(const Chunk& c, const float* delta, const float* du, const float* dy, const float* A2,
                             const Projection& B, const Projection& C, const float* gates, const float* kept, float* d_state,
                             float* dA, float* d_input, float* d_decay, float* sums, Ahead& ahead) {
  vf carry[NS], a2[NS], da[NS];
  AUTOHDR_UNROLL for (int j = 0; j < NS; ++j) carry[j] = load(d_state + j * W), a2[j] = load(A2 + j * W), da[j] = vf{};
  int64_t t = c.start + (c.tokens - 1) * c.step;
  for (int64_t i = c.tokens - 1; i >= 0; --i, t -= c.step) {
    const vf d = load(delta + t * W), x = load(du + t * W), g = load(dy + t * W);
    ahead.step();
    vf input = load(d_input + t * W), decay = load(d_decay + t * W), products[kFours];
    AUTOHDR_UNROLL for (int j = 0; j < 4; ++j) {
      if (j >= NS) {
        products[j] = products[4 + j] = vf{};
        continue;
      }
      const vf dh = g * C.data[t * C.token + j * C.state] + carry[j];
      products[j] = dh * x;
      products[4 + j] = g * load(kept + ((i + 1) * NS + j) * W);
      input += dh * B.data[t * B.token + j * B.state];
      carry[j] = dh * load(gates + (i * NS + j) * W);
      const vf q = carry[j] * load(kept + (i * NS + j) * W);
      decay += q * a2[j];
      da[j] += q * d;
    }
    store(d_input + t * W, input);
    store(d_decay + t * W, decay);
    add_sums(products, sums + t * kFours);
  }
  AUTOHDR_UNROLL for (int j = 0; j < NS; ++j) {
    store(d_state + j * W, carry[j]);
    store(dA + j * W, load(dA + j * W) + da[j]);
  }
}

// Sums over a block's tokens, one vector each beside dA's.
enum { kSumD, kSumBias, kSumWeight, kBlockSums };

static void run(const ScanBackward& a) {
  const ScanShape& s = a.shape;
  const ScanInputs& in = a.in;
  const int64_t N = s.dstate, dim = s.dim();
  Scratch scratch;
  const Split split(s);
  const int64_t blocks = split.most_blocks(), sums_floats = sums_size(N, kChunk);

  // Sums over the batch come from one row an entry, over the blocks of a group from one part a segment that shares it.
  const int64_t per_channel = N + kBlockSums;
  float* rows = scratch.take<float>(s.batch * dim * per_channel);  // [batch][dim][dA, dD, d_delta_bias, d_delta_weight]
  const int64_t segments = split.segments.size();
  float* rank_one = in.delta_weight ? scratch.take<float>(segments * s.seqlen) : nullptr;  // [segment][token]
  int64_t shared = 0;
  for (const Segment& g : split.segments) shared += !g.whole;
  const int64_t shared_size = sums_size(N, s.seqlen);
  float* parts = scratch.take<float>(shared * shared_size);
  float** part_of = scratch.take<float*>(segments);
  for (int64_t i = 0, next = 0; i < segments; ++i) part_of[i] = split.segments[i].whole ? nullptr : parts + shared_size * next++;

  enum { kSlope, kDelta, kU, kDu, kZ, kY, kDy, kInput, kDecay, kRank, kTiles };
  const int64_t worker_size =
      kTiles * kTile + 2 * kChunk * N + sums_floats + (8 * kChunk + 4) * W + blocks * (3 * N + kBlockSums) * W + N * W;
  float* memory = scratch.take<float>(split.workers * worker_size);

  split.for_each([&](int64_t worker, int64_t index) {
    const Segment& g = split.segments[index];
    float* tiles = memory + worker * worker_size;
    const auto tile = [&](int i) { return tiles + i * kTile; };
    float *slope = tile(kSlope), *delta = tile(kDelta), *u = tile(kU), *du = tile(kDu), *z = tile(kZ), *y = tile(kY);
    float *dy = tile(kDy), *d_input = tile(kInput), *d_decay = tile(kDecay), *rank = tile(kRank);
    float *b_memory = tiles + kTiles * kTile, *c_memory = b_memory + kChunk * N;
    float *sums = c_memory + kChunk * N, *gates = sums + sums_floats, *kept = gates + 4 * kTile;
    float* h = kept + (4 * kChunk + 4) * W;                     // [state][lane]
    float* A2 = h + N * W;                                      // [block][state][lane]
    float* d_state = A2 + blocks * N * W;                       // [block][state][lane]
    float* block_sums = d_state + blocks * N * W;               // [block][dA's states, D, bias, weight][lane]

    __builtin_memset(block_sums, 0, (g.end - g.first) * per_channel * W * sizeof(float));
    for (int64_t i = g.first; i < g.end; ++i) {
      const Block b(s, g, i);
      load_states(in.A + b.row * N, b.lanes, N, kLog2e, A2 + (i - g.first) * N * W);
      load_states(a.d_last_state ? a.d_last_state + (b.batch * dim + b.row) * N : nullptr, b.lanes, N, 1,
                  d_state + (i - g.first) * N * W);
    }
    for (int64_t k = s.chunks() - 1; k >= 0; --k) {
      const Chunk c(s, k);
      const Projection B = load_projection(in.B, projection_offset(in.B, g, c), N, c.tokens, b_memory);
      const Projection C = load_projection(in.C, projection_offset(in.C, g, c), N, c.tokens, c_memory);
      __builtin_memset(sums, 0, sums_floats * sizeof(float));
      if (rank_one) __builtin_memset(rank, 0, kTile * sizeof(float));
      for (int64_t i = g.first; i < g.end; ++i) {
        const Block b(s, g, i);
        const float* a2 = A2 + (i - g.first) * N * W;
        float* totals = block_sums + (i - g.first) * per_channel * W;
        const vf D = load_parameter(in.D, b);
        for (int64_t n = 0; n < N; ++n)
          store(h + n * W, load_at(a.states + ((b.batch * s.chunks() + k) * N + n) * dim + b.row, 0, b.lanes));
        load_delta(s, in, b, c, delta, slope);
        load_tile(in.u, b.offset(in.u, c), b.lanes, c.tokens, u);
        load_tile(a.d_out, b.offset(a.d_out, c), b.lanes, c.tokens, dy);
        if (in.z.data) load_tile(in.z, b.offset(in.z, c), b.lanes, c.tokens, z);
        for (int64_t t = 0; t < c.tokens * W; t += W) {
          store(du + t, load(delta + t) * load(u + t));
          store(d_input + t, vf{});
          store(d_decay + t, vf{});
          if (!in.z.data) continue;
          store(y + t, D * load(u + t));
          // From d_out to the gradients behind the gate silu(z): of y, and of z but for its factor y.
          const vf value = load(z + t), gate = sigmoid(value), silu = value * gate, d_out = load(dy + t);
          store(dy + t, d_out * silu);
          store(z + t, d_out * (gate + silu * (1.0f - gate)));
        }
        Ahead ahead(s, g, i, std::max<int64_t>(i + 1 < g.end ? k : k - 1, 0));
        for (const Sequence* q : {&in.u, &in.z, &a.d_out, &a.du, &a.dz}) ahead.add(*q);
        if (!in.delta_weight) ahead.add(in.delta), ahead.add(a.d_delta);
        ahead.spread(2 * ceil_div(N, 4) * c.tokens);
        by_fours(N, [&](int64_t n, auto count) {
          const Projection Bn = from_state(B, n), Cn = from_state(C, n);
          if (in.z.data)
            scan_states<count(), true, true>(c, delta, du, a2 + n * W, Bn, Cn, h + n * W, y, gates, kept, ahead);
          else
            scan_states<count(), true, false>(c, delta, du, a2 + n * W, Bn, Cn, h + n * W, nullptr, gates, kept, ahead);
          scan_states_back<count()>(c, delta, du, dy, a2 + n * W, Bn, Cn, gates, kept, d_state + ((i - g.first) * N + n) * W,
                                    totals + n * W, d_input, d_decay, sums + n / 4 * kChunk * kFours, ahead);
        });
        // From the gradients of y, Δ u and the gates to those of the tensors.
        const vf weight = load_parameter(in.delta_weight, b);
        vf sum_D = {}, sum_bias = {}, sum_weight = {};
        for (int64_t t = 0; t < c.tokens * W; t += W) {
          const vf value = load(u + t), input = load(d_input + t), d_y = load(dy + t);
          vf d_delta = input * value + load(d_decay + t) * kLn2;
          if (s.softplus) d_delta *= load(slope + t);
          store(d_input + t, input * load(delta + t) + D * d_y);
          store(d_decay + t, d_delta);
          sum_D += d_y * value;
          sum_bias += d_delta;
          if (in.z.data) store(z + t, load(z + t) * load(y + t));
        }
        if (in.delta_weight) {
          for (int64_t t = 0; t < c.tokens * W; t += W) store(rank + t, load(rank + t) + load(d_decay + t) * weight);
          with_pointer(in.delta, b.batch * in.delta.batch + c.first * in.delta.token, [&](const auto* from) {
            for (int64_t t = 0; t < c.tokens; ++t)
              sum_weight += load(d_decay + t * W) * load_part(from + t * in.delta.token, 1)[0];
          });
        } else {
          store_tile(a.d_delta, b.offset(a.d_delta, c), b.lanes, c.tokens, d_decay);
        }
        store_tile(a.du, b.offset(a.du, c), b.lanes, c.tokens, d_input);
        if (in.z.data) store_tile(a.dz, b.offset(a.dz, c), b.lanes, c.tokens, z);
        float* more = totals + N * W;
        store(more + kSumD * W, load(more + kSumD * W) + sum_D);
        store(more + kSumBias * W, load(more + kSumBias * W) + sum_bias);
        store(more + kSumWeight * W, load(more + kSumWeight * W) + sum_weight);
      }
      if (g.whole) {
        store_projection(a.dB, projection_offset(a.dB, g, c), N, c.tokens, sums, kChunk, 0);
        store_projection(a.dC, projection_offset(a.dC, g, c), N, c.tokens, sums, kChunk, 1);
      } else {
        for (int64_t n = 0; n < N; n += 4)
          __builtin_memcpy(part_of[index] + (n / 4 * s.seqlen + c.first) * kFours, sums + n / 4 * kChunk * kFours,
                           c.tokens * kFours * sizeof(float));
      }
      if (rank_one)
        for (int64_t t = 0; t < c.tokens; ++t) rank_one[index * s.seqlen + c.first + t] = sum(load(rank + t * W));
    }
    for (int64_t i = g.first; i < g.end; ++i) {
      const Block b(s, g, i);
      store_states(block_sums + (i - g.first) * per_channel * W, b.lanes, per_channel, rows + (b.batch * dim + b.row) * per_channel);
      if (a.d_initial_state)
        store_states(d_state + (i - g.first) * N * W, b.lanes, N, a.d_initial_state + (b.batch * dim + b.row) * N);
    }
  });

  // Sums over workers and batch entries, in order.
  for (int64_t d = 0; d < dim; ++d) {
    const auto total = [&](int64_t column) {
      float v = 0;
      for (int64_t b = 0; b < s.batch; ++b) v += rows[(b * dim + d) * per_channel + column];
      return v;
    };
    for (int64_t n = 0; n < N; ++n) a.dA[d * N + n] = total(n);
    if (in.D) a.dD[d] = total(N + kSumD);
    if (in.delta_bias) a.d_delta_bias[d] = total(N + kSumBias);
    if (in.delta_weight) a.d_delta_weight[d] = total(N + kSumWeight);
  }
  for (int64_t i = 0; i < segments;) {
    const Segment& g = split.segments[i];
    int64_t end = i + 1;
    while (end < segments && split.segments[end].batch == g.batch && split.segments[end].group == g.group) ++end;
    if (!g.whole) {
      parallel_ranges(ceil_div(s.seqlen, kChunk), [&](int64_t, int64_t first, int64_t end_chunk) {
        const int64_t from = first * kChunk, tokens = std::min(end_chunk * kChunk, s.seqlen) - from;
        for (int64_t n = 0; n < N; n += 4) {
          float* to = part_of[i] + (n / 4 * s.seqlen + from) * kFours;
          for (int64_t j = i + 1; j < end; ++j) {
            const float* other = part_of[j] + (n / 4 * s.seqlen + from) * kFours;
            for (int64_t e = 0; e < tokens * kFours; ++e) to[e] += other[e];
          }
        }
        const auto offset = [&](const Sequence& q) { return g.batch * q.batch + g.group * q.group + from * q.token; };
        store_projection(a.dB, offset(a.dB), N, tokens, part_of[i] + from * kFours, s.seqlen, 0);
        store_projection(a.dC, offset(a.dC), N, tokens, part_of[i] + from * kFours, s.seqlen, 1);
      });
    }
    i = end;
  }
  if (rank_one)
    for (int64_t i = 0; i < segments;) {
      const int64_t batch = split.segments[i].batch;
      float* to = rank_one + i * s.seqlen;
      for (++i; i < segments && split.segments[i].batch == batch; ++i)
        for (int64_t t = 0; t < s.seqlen; ++t) to[t] += rank_one[i * s.seqlen + t];
      with_pointer(a.d_delta, batch * a.d_delta.batch, [&](auto* d_delta) {
        for (int64_t t = 0; t < s.seqlen; t += W) store_at(d_delta, t, s.seqlen, load_at(to, t, s.seqlen));
      });
    }
}
#undef AUTOHDR_SHUFFLE
