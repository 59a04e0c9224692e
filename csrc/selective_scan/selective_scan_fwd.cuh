// selective_scan forward on a GPU, and what segments leave behind. selective_scan_tile.cuh says what a block and a thread own.
//
// A block walks its segment tile by tile with the states in registers: one exponential for a state and token. The tensors' next tile
// is on its way into shared memory meanwhile. y is summed over the lanes of a channel for 16 tokens at once and ends in shared memory,
// where the gate of z is applied. 32 channels and 32 tokens a tile: 64-byte rows of bfloat16 in either layout, four warps, which
// share B and C, and 384 blocks for 8 × 1536 channels. Every sum has a fixed order.
#pragma once
#include "selective_scan/selective_scan_tile.cuh"

namespace autohdr {
namespace scan {

// What a walk is for: the outputs; or the end state of a segment from zero; or, back through the outputs in it, the gradient of the
// state before it.
enum class Purpose { kOutputs, kEnds, kAdjointEnds };

// Shared memory in floats: what the scan reads and leaves, rows being tokens in its order; then raw tiles.
template <class C, class L, Purpose For>
struct WalkShared {
  static constexpr bool kOutputs = For == Purpose::kOutputs;
  static constexpr int kPairs = 0, kStatesB = C::kPairTile, kStatesC = kStatesB + C::kStateTile,
                       kY = kStatesC + (kOutputs ? C::kStateTile : 0), kRaw = kY + (kOutputs ? C::kTile : 0);
  static constexpr int kRawTile = RawTile<C, L, C::kChannels>::kFloats, kRawStates = RawTile<C, L, C::kPadded>::kFloats;
  static constexpr int kDelta = kRaw, kInput = kDelta + kRawTile, kZ = kInput + kRawTile;
  static constexpr int kB = kZ + (For == Purpose::kEnds ? 0 : kRawTile), kC = kB + kRawStates,
                       kPlaces = kC + (kOutputs ? kRawStates : 0);
  enum { kOfDelta, kOfInput, kOfB, kOfC, kOfZ, kOfOut, kSequences };
  static constexpr int kFloats = kPlaces + kSequences * static_cast<int>(sizeof(Place)) / 4;
};

template <class C, class L, Purpose For>
constexpr size_t walk_shared() {
  constexpr size_t bytes = WalkShared<C, L, For>::kFloats * sizeof(float);
  static_assert(bytes <= kMaxShared);
  return bytes;
}

template <class C, class L, Purpose For>
struct Walk : Tiles<C, L, WalkShared<C, L, For>::kPlaces> {
  using M = WalkShared<C, L, For>;
  using Base = Tiles<C, L, M::kPlaces>;
  using Base::s, Base::in, Base::shared, Base::b, Base::dim, Base::dstate, Base::column, Base::run, Base::kTokens, Base::kRow,
      Base::kRun, Base::place, Base::raw, Base::pair, Base::helps, Base::row_of, Base::next_row;
  using typename Base::Channels, typename Base::States, typename Base::RankOne;
  static constexpr bool kOutputs = For == Purpose::kOutputs, kAdjoint = For == Purpose::kAdjointEnds;
  static constexpr bool kNarrow = is_narrow<L>;                              // the last digits of an exponential do not matter
  static constexpr int kStates = C::kStates, kSub = kOutputs ? C::kSub : 4;  // of ends there are no sums

  const int lane, own;                // own: the thread's channel
  float D = 0, bias = 0, weight = 0;  // of the channel that it prepares
  bool aligned = true;                // whether every sequence lies at multiples of 16 bytes
  typename Channels::Cursor of_delta, of_input, of_z;
  typename States::Cursor of_B, of_C;
  float rates[kStates], h[kStates] = {}, total = 0;
  float input[kRun], z[kRun];  // of the tile, as the thread prepares them

  __device__ Walk(const ScanShape& s, const ScanInputs& in, const Split& p, float* shared)
      : Base(s, in, p, shared, 0), lane(threadIdx.x % C::kLanes), own(threadIdx.x / C::kLanes) {
    each_state([&](int j) { rates[j] = has(j) ? decay_rate(in.A[(b.row0 + own) * s.dstate + state(j)]) : 0.0f; });
    if (column >= b.channels) return;
    D = kOutputs && in.D ? in.D[b.row0 + column] : 0.0f;
    bias = in.delta_bias ? in.delta_bias[b.row0 + column] : 0.0f;
    weight = in.delta_weight ? in.delta_weight[b.row0 + column] : 0.0f;
  }

  template <class F>
  __device__ static __forceinline__ void each_state(const F& f) {
#pragma unroll
    for (int j = 0; j < kStates; ++j) f(j);
  }
  __device__ int state(int j) const { return lane * kStates + j; }
  __device__ bool has(int j) const { return own < b.channels && state(j) < dstate; }
  // In a tensor [..., dstate, dim], of the index `row` before these.
  __device__ int64_t state_at(int64_t row, int j) const { return (row * dstate + state(j)) * dim + b.row0 + own; }

  // input: u, or of the adjoint the gradient of the output. before(chunk) is called before each chunk.
  template <class F>
  __device__ void walk(const Sequence& input, const Sequence& out, const F& before) {
    place_sequences(input, out);
    __syncthreads();
    for (int i = 0; i < M::kSequences; ++i) aligned &= place(i).piece == 4;
    const int first = b.first_chunk * static_cast<int>(kChunk / kTokens);
    const int tiles = static_cast<int>((min(b.last_chunk * kChunk, s.seqlen) + kTokens - 1) / kTokens) - first;
    const auto window = [&](int i) { return Window<C>(s, first + (kAdjoint ? tiles - 1 - i : i)); };
    if constexpr (Channels::kKnown) {
      of_input = Channels::cursor(place(M::kOfInput)), of_B = States::cursor(place(M::kOfB));
      if (!in.delta_weight) of_delta = Channels::cursor(place(M::kOfDelta));
      if (gated()) of_z = Channels::cursor(place(M::kOfZ));
      if (kOutputs) of_C = States::cursor(place(M::kOfC));
    }
    fetch(window(0));
#pragma unroll 1
    for (int i = 0; i < tiles; ++i) {
      const Window<C> w = window(i);
      wait_for_copies();
      __syncthreads();  // and the tile before is done with
      prepare(w);
      __syncthreads();
      if (i + 1 < tiles) fetch(window(i + 1));
      if (i % (kChunk / kTokens) == 0) before(b.first_chunk + i / static_cast<int>(kChunk / kTokens));
#pragma unroll 1
      for (int sub = 0; sub < kTokens; sub += kSub) scan(sub);
      if (!kOutputs) continue;
      __syncthreads();
      finish(w, place(M::kOfOut));
    }
  }

 private:
  __device__ bool gated() const { return For != Purpose::kEnds && in.z.data; }

  // z sigmoid(z).
  __device__ static __forceinline__ float gate(float z) {
    return z * (kNarrow ? reciprocal_approx(1.0f + exp2_approx(-z * kLog2e)) : sigmoid(z));
  }

  __device__ __forceinline__ void place_sequences(const Sequence& input, const Sequence& out) {
    if (threadIdx.x < M::kSequences) place(threadIdx.x).piece = 4;  // of those that do not exist
    this->put_delta(M::kOfDelta), this->put_channels(M::kOfInput, input), this->put_states(M::kOfB, kAdjoint ? in.C : in.B);
    if (gated()) this->put_channels(M::kOfZ, in.z);
    if (kOutputs) {
      this->put_states(M::kOfC, in.C);
      if (kNarrow && out.dtype == Dtype::f32)
        this->template put_channels<Wide>(M::kOfOut, out);
      else
        this->put_channels(M::kOfOut, out);
    }
    for (int i = M::kRaw + threadIdx.x; i < M::kPlaces; i += C::kThreads) shared[i] = 0;  // for columns that do not exist
  }
  template <class>
  struct Float {
    using Layout = Mixed;
  };
  template <class T, bool Along>
  struct Float<Known<T, Along>> {
    using Layout = Known<float, Along>;
  };
  using Wide = RawTile<C, typename Float<L>::Layout, C::kChannels>;  // of an output that is float32 where the inputs are not

  __device__ __forceinline__ void fetch(const Window<C>& w) {
    const bool by_vectors = aligned && w.whole;
    if constexpr (Channels::kKnown)
      if (by_vectors && !in.delta_weight) {
        Channels::fetch(of_delta, raw(M::kDelta), w, b.channels);
        Channels::fetch(of_input, raw(M::kInput), w, b.channels);
        if (gated()) Channels::fetch(of_z, raw(M::kZ), w, b.channels);
        States::fetch(of_B, raw(M::kB), w, dstate);
        if (kOutputs) States::fetch(of_C, raw(M::kC), w, dstate);
        return;
      }
    this->fetch_delta(M::kOfDelta, M::kDelta, w, by_vectors);
    this->fetch_channels(M::kOfInput, M::kInput, w, by_vectors);
    if (gated()) this->fetch_channels(M::kOfZ, M::kZ, w, by_vectors);
    this->fetch_states(M::kOfB, M::kB, w, by_vectors);
    if (kOutputs) this->fetch_states(M::kOfC, M::kC, w, by_vectors);
  }

  // From raw tiles what the scan needs, as float32 in its order: Δ and the input, and B, C.
  __device__ __forceinline__ void prepare(const Window<C>& w) {
    if (helps()) prepare_channel(w);
    this->prepare_states(M::kOfB, M::kB, M::kStatesB);
    if (kOutputs) this->prepare_states(M::kOfC, M::kC, M::kStatesC);
  }
  __device__ __forceinline__ void prepare_channel(const Window<C>& w) {
    float delta[kRun];
    if (in.delta_weight) {
      RankOne::read(place(M::kOfDelta), raw(M::kDelta), 0, run, delta);
#pragma unroll
      for (int k = 0; k < kRun; ++k) delta[k] *= weight;
    } else {
      Channels::read(place(M::kOfDelta), raw(M::kDelta), column, run, delta);
    }
    Channels::read(place(M::kOfInput), raw(M::kInput), column, run, input);
#pragma unroll
    for (int k = 0; k < kRun; ++k) delta[k] += bias;
    if (s.softplus) softplus<false, kNarrow>(delta, nullptr);
    if (const bool channel = column < b.channels; !channel || !w.whole) {
      const Existing exists(w);
#pragma unroll
      for (int k = 0; k < kRun; ++k)
        if (!channel || !exists(run + k)) delta[k] = 0;
    }
    if (gated()) Channels::read(place(M::kOfZ), raw(M::kZ), column, run, z);
    if (kAdjoint && gated())
#pragma unroll
      for (int k = 0; k < kRun; ++k) input[k] *= gate(z[k]);
    float2* to = pair(M::kPairs, row_of(run) * kRow + column);
#pragma unroll
    for (int k = 0; k < kRun; ++k) to[k * next_row() * kRow] = make_float2(delta[k], kAdjoint ? input[k] : delta[k] * input[k]);
  }
  // kSub tokens of a tile, from row `sub` on; of the adjoint, from its end.
  __device__ __forceinline__ void scan(int sub) {
    float y[kSub] = {};
#pragma unroll
    for (int k = 0; k < kSub; ++k) {
      const int row = kAdjoint ? kTokens - 1 - sub - k : sub + k;
      float pair[2], Bs[kStates], Cs[kStates];
      load_floats<2>(shared + M::kPairs + row * C::kPairRow + 2 * own, pair);
      load_floats<kStates>(shared + M::kStatesB + row * C::kStateRow + state(0), Bs);
      if (kOutputs) load_floats<kStates>(shared + M::kStatesC + row * C::kStateRow + state(0), Cs);
      each_state([&](int j) {
        const float gate = exp2_approx(pair[0] * rates[j]), added = pair[1] * Bs[j];
        h[j] = kAdjoint ? gate * (h[j] + added) : gate * h[j] + added;
        if (kOutputs) y[k] += h[j] * Cs[j];
      });
      if (!kOutputs) total += pair[0];
    }
    if (!kOutputs) return;
    const int first = sum_over_lanes<kSub, C::kLanes, 1>(y);
    if (!owns_sum<kSub, C::kLanes, 1>()) return;
#pragma unroll
    for (int v = 0; v < kLeft<kSub, C::kLanes>; ++v) shared[M::kY + (sub + first + v) * kRow + own] = y[v];
  }

  // The outputs of a window.
  __device__ __forceinline__ void finish(const Window<C>& w, const Place& to) {
    if (!helps()) return;
    float y[kRun];
    const float* from = shared + M::kY + row_of(run) * kRow + column;
#pragma unroll
    for (int k = 0; k < kRun; ++k) y[k] = from[k * next_row() * kRow] + D * input[k];
    if (gated())
#pragma unroll
      for (int k = 0; k < kRun; ++k) y[k] *= gate(z[k]);
    if (column >= b.channels) return;
    const bool by_vectors = aligned && w.whole;
    if (kNarrow && to.dtype == Dtype::f32)
      Wide::store(to, w, column, run, by_vectors, y);
    else
      Channels::store(to, w, column, run, by_vectors, y);
  }
};

// Blocks on a multiprocessor. Rows of float32 channels take more registers: with one block less none is spilled.
template <class C, class L>
constexpr int kForwardBlocks = C::kBlocks - std::is_same_v<L, Known<float, false>>;

template <class C, class L>
__global__ void __launch_bounds__(C::kThreads, kForwardBlocks<C, L>) scan_forward(ScanForward a, Split p, const float* carries) {
  AUTOHDR_DYNAMIC_SHARED(float, shared);
  Walk<C, L, Purpose::kOutputs> walk(a.shape, a.in, p, shared);
  const auto& b = walk.b;
  const int64_t channel = (b.batch * walk.dim + b.row0 + walk.own) * a.shape.dstate;
  walk.each_state([&](int j) {
    if (!walk.has(j)) return;
    if (p.segments > 1)
      walk.h[j] = carries[walk.state_at(b.batch * p.segments + b.segment, j)];
    else if (a.in.initial_state)
      walk.h[j] = a.in.initial_state[channel + walk.state(j)];
  });
  walk.walk(a.in.u, a.out, [&](int chunk) {
    if (!a.states) return;
    walk.each_state([&](int j) {
      if (walk.has(j)) a.states[walk.state_at(b.batch * a.shape.chunks() + chunk, j)] = walk.h[j];
    });
  });
  if (b.segment + 1 < p.segments) return;
  walk.each_state([&](int j) {
    if (walk.has(j)) a.last_state[channel + walk.state(j)] = walk.h[j];
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Splitting the sequence. `ends` [batch, segments, dstate, dim] is first what a segment alone, from a zero state, leaves behind,
// then what comes into it; `steps` [batch, segments, dim] its sum of Δ. The product of a segment's gates is exp(A ΣΔ).

template <class C, class L, bool Adjoint>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks)
    segment_ends(ScanShape s, ScanInputs in, Sequence d_out, Split p, float* ends, float* steps) {
  AUTOHDR_DYNAMIC_SHARED(float, shared);
  Walk<C, L, Adjoint ? Purpose::kAdjointEnds : Purpose::kEnds> walk(s, in, p, shared);
  const auto& b = walk.b;
  if (b.segment == (Adjoint ? 0 : p.segments - 1)) return;  // the last in the direction of the walk: nobody needs it
  walk.walk(Adjoint ? d_out : in.u, Sequence{}, [](int) {});
  const int64_t at = b.batch * p.segments + b.segment;
  walk.each_state([&](int j) {
    if (walk.has(j)) ends[walk.state_at(at, j)] = walk.h[j];
  });
  if (walk.lane == 0 && walk.own < b.channels) steps[at * walk.dim + b.row0 + walk.own] = walk.total;
}

// What comes into each segment, from what comes into the first (with `adjoint` the last). One thread a state and channel.
static __global__ void __launch_bounds__(256)
    carry_over(ScanShape s, int64_t segments, bool adjoint, const float* A, const float* first, const float* steps, float* ends) {
  const int64_t i = blockIdx.x * int64_t{256} + threadIdx.x, dim = s.dim();
  if (i >= s.batch * s.dstate * dim) return;
  const int64_t d = i % dim, n = i / dim % s.dstate, batch = i / (dim * s.dstate);
  const float a2 = decay_rate(A[d * s.dstate + n]);
  float h = first ? first[(batch * dim + d) * s.dstate + n] : 0.0f;
  const int64_t at = batch * segments + (adjoint ? segments - 1 : 0), next_step = adjoint ? -dim : dim;
  float* end = ends + (at * s.dstate + n) * dim + d;
  const float* step = steps + at * dim + d;
  const int64_t next_end = next_step * s.dstate;
  constexpr int kAhead = 8;  // segments that are loaded before what comes into them is stored: the compiler would not dare
#pragma unroll 1
  for (int64_t left = segments; left > 0; left -= kAhead, end += kAhead * next_end, step += kAhead * next_step) {
    float alone[kAhead] = {}, gate[kAhead] = {};
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
      if (k + 1 < left) alone[k] = end[k * next_end], gate[k] = exp2_approx(a2 * step[k * next_step]);
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (k < left) end[k * next_end] = h;
      h = alone[k] + (h != 0.0f ? gate[k] * h : 0.0f);  // no state, no carry: a product of growing gates may be infinite
    }
  }
}

template <class C, bool Adjoint>
void find_carries(const ScanShape& s, const ScanInputs& in, const Sequence& d_out, const Split& p, const float* first,
                  float* ends, cudaStream_t stream) {
  float* steps = ends + s.batch * p.segments * s.dstate * s.dim();
  with_layout<C>({Adjoint ? d_out : in.u, in.delta_weight ? Sequence{} : in.delta, Adjoint ? in.C : in.B,
                  Adjoint ? in.z : Sequence{}},
                 [&](auto layout) {
                   launch(segment_ends<C, decltype(layout), Adjoint>, dim3(p.blocks(s)), dim3(C::kThreads),
                          walk_shared<C, decltype(layout), Adjoint ? Purpose::kAdjointEnds : Purpose::kEnds>(), stream, s, in,
                          d_out, p, ends, steps);
                 });
  launch(carry_over, dim3((s.batch * s.dstate * s.dim() + 255) / 256), dim3(256), 0, stream, s, p.segments, Adjoint, in.A, first,
         static_cast<const float*>(steps), ends);
}
inline int64_t carry_floats(const ScanShape& s, const Split& p) {
  return p.segments > 1 ? s.batch * p.segments * (s.dstate + 1) * s.dim() : 0;
}

}  // namespace scan
}  // namespace autohdr
