// selective_scan forward on a GPU, and what segments leave behind. selective_scan_tile.cuh says what a block and a thread own.
//
// A block walks its segment tile by tile with the states in registers: one exponential for a state and token. The tensors' next tile
// is on its way into shared memory meanwhile. The lanes of a channel prepare its tokens (Δ, the input), each a run of them; y is
// summed over them for 16 tokens at once, and each applies the gate of z to those whose sums it has and stores them. So but for B and
// C, which a block shares, a warp waits for no other. Lanes n and n ^ 1 have two channels and the same states, n and n ^ 2 the same
// channel: so both read what they share at twice the rate. 32 channels and 32 tokens a tile: 64-byte rows of bfloat16 in either
// layout, four warps, and 384 blocks for 8 × 1536 channels. Every sum has a fixed order.
#pragma once
#include "selective_scan/selective_scan_tile.cuh"

namespace autohdr {
namespace scan {

// What a walk is for: the outputs; or the end state of a segment from zero; or, back through the outputs in it, the gradient of the
// state before it.
enum class Purpose { kOutputs, kEnds, kAdjointEnds };

// Shared memory in floats: what the scan reads, tokens in the tensor's order; then two buffers of raw tiles, one of which arrives.
template <class C, class L, Purpose For>
struct WalkShared {
  static constexpr bool kOutputs = For == Purpose::kOutputs;
  static constexpr int kPairs = 0, kStatesB = C::kPairTile, kStatesC = kStatesB + C::kStateTile,
                       kRaw = kStatesC + (kOutputs ? C::kStateTile : 0);
  static constexpr int kRawTile = RawTile<C, L, C::kChannels>::kFloats, kRawStates = RawTile<C, L, C::kPadded>::kFloats;
  // In a buffer.
  static constexpr int kDelta = 0, kInput = kDelta + kRawTile, kZ = kInput + kRawTile;
  static constexpr int kB = kZ + (For == Purpose::kEnds ? 0 : kRawTile), kC = kB + kRawStates,
                       kBuffer = kC + (kOutputs ? kRawStates : 0);
  static constexpr int kPlaces = kRaw + 2 * kBuffer;
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
  using Base::s, Base::in, Base::shared, Base::b, Base::dim, Base::dstate, Base::kTokens, Base::place;
  using typename Base::Channels, typename Base::States, typename Base::RankOne;
  static constexpr bool kOutputs = For == Purpose::kOutputs, kAdjoint = For == Purpose::kAdjointEnds;
  static constexpr bool kNarrow = is_narrow<L>;  // the last digits of an exponential do not matter
  static constexpr int kStates = C::kStates, kRun = C::kRun, kSub = C::kSub, kStride = C::kStride;
  static constexpr int kOwned = kLeft<kSub, C::kLanes>;  // of kSub tokens' sums, those that a lane has afterwards

  const int lane, own;  // own: the thread's channel
  float D = 0, bias = 0, weight = 0;
  bool aligned = true;  // whether every sequence lies at multiples of 16 bytes
  typename Channels::Cursor of_delta, of_input, of_z;
  typename States::Cursor of_B, of_C;
  bool wide;                                         // whether the output is float32 where the inputs are not
  char* output;                                      // of token 0
  float rates[kStates], h[kStates] = {}, total = 0;  // total: of Δ, of the tokens that this lane prepares

  __device__ Walk(const ScanShape& s, const ScanInputs& in, const Split& p, float* shared)
      : Base(s, in, p, shared, 0), lane(threadIdx.x / kStride % C::kLanes),
        own(threadIdx.x / (kStride * C::kLanes) * kStride + threadIdx.x % kStride) {
    each_state([&](int j) { rates[j] = has(j) ? decay_rate(in.A[(b.row0 + own) * s.dstate + state(j)]) : 0.0f; });
    if (own >= b.channels) return;
    D = kOutputs && in.D ? in.D[b.row0 + own] : 0.0f;
    bias = in.delta_bias ? in.delta_bias[b.row0 + own] : 0.0f;
    weight = in.delta_weight ? in.delta_weight[b.row0 + own] : 0.0f;
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
    wide = kNarrow && out.dtype == Dtype::f32;
    place_sequences(input, out);
    __syncthreads();
    for (int i = 0; i < M::kSequences; ++i) aligned &= place(i).piece == 4;
    const int first = b.first_chunk * static_cast<int>(kChunk / kTokens);
    const int tiles = static_cast<int>((min(b.last_chunk * kChunk, s.seqlen) + kTokens - 1) / kTokens) - first;
    const int whole = static_cast<int>(s.seqlen / kTokens);
    const auto window = [&](int i) {
      const int tile = first + (kAdjoint ? tiles - 1 - i : i);
      return Window<C>(s, tile, tile < whole);
    };
    if constexpr (Channels::kKnown) {
      of_input = Channels::cursor(place(M::kOfInput)), of_B = States::cursor(place(M::kOfB));
      if (!in.delta_weight) of_delta = Channels::cursor(place(M::kOfDelta));
      if (gated()) of_z = Channels::cursor(place(M::kOfZ));
      if (kOutputs) of_C = States::cursor(place(M::kOfC));
    }
    if (kOutputs) output = wide ? Wide::start(place(M::kOfOut), own) : Channels::start(place(M::kOfOut), own);
    fetch(window(0), buffer(0));
#pragma unroll 1
    for (int i = 0; i < tiles; ++i) {
      wait_for_copies();
      __syncthreads();  // and the tile before is done with
      if (i + 1 < tiles) fetch(window(i + 1), buffer(i + 1));
      const Window<C> w = window(i);
      prepare(w, buffer(i));
      __syncthreads();
      if (i % (kChunk / kTokens) == 0) before(b.first_chunk + i / static_cast<int>(kChunk / kTokens));
      if (s.reverse != kAdjoint)
        scan<true>(w, buffer(i));
      else
        scan<false>(w, buffer(i));
    }
    sum_over_lanes<1, C::kLanes, kStride>(&total);
  }

 private:
  __device__ bool gated() const { return For != Purpose::kEnds && in.z.data; }
  __device__ float* buffer(int tile) const { return shared + M::kRaw + tile % 2 * M::kBuffer; }
  __device__ static char* raw(float* buffer, int at) { return reinterpret_cast<char*>(buffer + at); }

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
      if (wide)
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

  __device__ __forceinline__ void fetch(const Window<C>& w, float* to) {
    const int at = static_cast<int>(to - shared);
    if (!aligned || !w.whole) return fetch_each<false>(w, at);
    if constexpr (Channels::kKnown) {
      if (!in.delta_weight)
        Channels::fetch(of_delta, raw(to, M::kDelta), w, b.channels);
      else
        RankOne::fetch(place(M::kOfDelta), raw(to, M::kDelta), w, 1, true);
      Channels::fetch(of_input, raw(to, M::kInput), w, b.channels);
      if (gated()) Channels::fetch(of_z, raw(to, M::kZ), w, b.channels);
      States::fetch(of_B, raw(to, M::kB), w, dstate);
      if (kOutputs) States::fetch(of_C, raw(to, M::kC), w, dstate);
    } else {
      fetch_each<true>(w, at);
    }
  }
  template <bool ByVectors>
  __device__ __forceinline__ void fetch_each(const Window<C>& w, int at) {
    this->fetch_delta(M::kOfDelta, at + M::kDelta, w, ByVectors);
    this->fetch_channels(M::kOfInput, at + M::kInput, w, ByVectors);
    if (gated()) this->fetch_channels(M::kOfZ, at + M::kZ, w, ByVectors);
    this->fetch_states(M::kOfB, at + M::kB, w, ByVectors);
    if (kOutputs) this->fetch_states(M::kOfC, at + M::kC, w, ByVectors);
  }

  // From raw tiles what the scan needs, as float32: Δ and the input, and B, C.
  __device__ __forceinline__ void prepare(const Window<C>& w, float* from) {
    if (kRun * C::kLanes == kTokens || lane * kRun < kTokens) prepare_channel(w, from);
    this->template prepare_states<kOutputs>(M::kOfB, raw(from, M::kB), M::kStatesB, false);
  }
  __device__ __forceinline__ void prepare_channel(const Window<C>& w, float* from) {
    const int run = lane * kRun;
    float delta[kRun], input[kRun];
    if (in.delta_weight) {
      RankOne::read(place(M::kOfDelta), raw(from, M::kDelta), 0, run, delta);
#pragma unroll
      for (int k = 0; k < kRun; ++k) delta[k] *= weight;
    } else {
      Channels::read(place(M::kOfDelta), raw(from, M::kDelta), own, run, delta);
    }
    Channels::read(place(M::kOfInput), raw(from, M::kInput), own, run, input);
#pragma unroll
    for (int k = 0; k < kRun; ++k) delta[k] += bias;
    if (s.softplus) softplus<false, kNarrow>(delta, nullptr);
    if (const bool channel = own < b.channels; !channel || !w.whole) {
      const Existing exists(w);
#pragma unroll
      for (int k = 0; k < kRun; ++k)
        if (!channel || !exists(run + k)) delta[k] = 0;
    }
    if (kAdjoint && gated()) {
      float z[kRun];
      Channels::read(place(M::kOfZ), raw(from, M::kZ), own, run, z);
#pragma unroll
      for (int k = 0; k < kRun; ++k) input[k] *= gate(z[k]);
    }
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
      if (!kAdjoint) input[k] *= delta[k];
      if (!kOutputs) total += delta[k];
    }
    float* to = shared + M::kPairs + own * C::kPairRow + 2 * run;
    if constexpr (kRun == 1) {
      *reinterpret_cast<float2*>(to) = make_float2(delta[0], input[0]);
    } else {
#pragma unroll
      for (int k = 0; k < kRun; k += 2)
        *reinterpret_cast<float4*>(to + 2 * k) = make_float4(delta[k], input[k], delta[k + 1], input[k + 1]);
    }
  }

  // A tile; Back: from its last token to its first.
  template <bool Back>
  __device__ __forceinline__ void scan(const Window<C>& w, float* from) {
#pragma unroll
    for (int sub = 0; sub < kTokens; sub += kSub) {
      const int first = Back ? kTokens - kSub - sub : sub;
      const float* pairs = shared + M::kPairs + own * C::kPairRow + 2 * first;
      const float* states = shared + first * C::kStateRow + state(0);
      float y[kSub] = {};
#pragma unroll
      for (int k = 0; k < kSub; k += 2) {
        const int two = Back ? kSub - 2 - k : k;
        float pair[4];  // (Δ, input) of two tokens
        load_floats<4>(pairs + 2 * two, pair);
#pragma unroll
        for (int one = 0; one < 2; ++one) {
          const int at = Back ? 1 - one : one, token = two + at;
          float Bs[kStates], Cs[kStates];
          load_floats<kStates>(states + M::kStatesB + token * C::kStateRow, Bs);
          if (kOutputs) load_floats<kStates>(states + M::kStatesC + token * C::kStateRow, Cs);
          each_state([&](int j) {
            const float gate = exp2_approx(pair[2 * at] * rates[j]), added = pair[2 * at + 1] * Bs[j];
            h[j] = kAdjoint ? gate * (h[j] + added) : gate * h[j] + added;
            if (kOutputs) y[token] += h[j] * Cs[j];
          });
        }
      }
      if constexpr (kOutputs) {
        const int left = sum_over_lanes<kSub, C::kLanes, kStride>(y);
        if (owns_sum<kSub, C::kLanes, kStride>()) finish(w, from, first + left, y);
      }
    }
  }

  // The outputs of kOwned tokens of the thread's channel, the first of them `first`; y: sums over the states.
  __device__ __forceinline__ void finish(const Window<C>& w, float* from, int first, const float* y) {
    float u[kOwned], z[kOwned], out[kOwned];
    Channels::read(place(M::kOfInput), raw(from, M::kInput), own, first, u);
#pragma unroll
    for (int k = 0; k < kOwned; ++k) out[k] = y[k] + D * u[k];
    if (gated()) {
      Channels::read(place(M::kOfZ), raw(from, M::kZ), own, first, z);
#pragma unroll
      for (int k = 0; k < kOwned; ++k) out[k] *= gate(z[k]);
    }
    if (own >= b.channels) return;
    const Place& to = place(M::kOfOut);
    const bool by_vectors = aligned && w.whole;
    const int64_t token = w.first + first;
    if (wide)
      Wide::store(to, w, output + Wide::along_tokens(to, token), first, by_vectors, out);
    else
      Channels::store(to, w, output + Channels::along_tokens(to, token), first, by_vectors, out);
  }
};

// Blocks on a multiprocessor. Rows of float32 channels take more registers, as the adjoint of what is told apart when it is read
// does (segment_ends): with one block less none is spilled.
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
__global__ void __launch_bounds__(C::kThreads, C::kBlocks - (Adjoint && std::is_same_v<L, Mixed>))
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
