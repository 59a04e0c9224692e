// selective_scan backward on a GPU. selective_scan_tile.cuh says what tiles and windows are.
//
// A thread owns kOwn neighbouring channels, and of each kStates states; the kLanes threads of a channel are neighbours in a warp. A
// block owns kChannels channels of one group and batch entry and a segment of the sequence, and walks its chunks from the last to
// the first: forward from the states that the forward pass left, keeping those before every kSub tokens in shared memory; then back,
// tile by tile, kSub tokens at a time, whose gates and gradients stay in registers until their states are made once more. Between
// tensors and scan, a thread takes kRun neighbouring tokens of one channel. The tensors' next tile is on its way into shared memory
// meanwhile.
//
// dB and dC are summed over a warp's channels by shuffles, over a block's warps in shared memory, over the blocks by another kernel.
// Every sum has a fixed order.
#pragma once
#include "common/cuda_async.cuh"
#include "selective_scan/selective_scan_tile.cuh"

namespace autohdr {
namespace scan {

template <int Own, int States, int Lanes, int Tokens>
struct BackwardConfig {
  static constexpr int kOwn = Own, kStates = States, kLanes = Lanes, kTokens = Tokens, kThreads = 64;
  static constexpr int kWarps = kThreads / 32, kChannelLanes = 32 / Lanes, kPadded = States * Lanes;
  static constexpr int kChannels = kThreads / Lanes * Own;
  static constexpr int kRun = kChannels * Tokens / kThreads < 4 ? 4 : kChannels * Tokens / kThreads;
  static constexpr int kHelpers = kChannels * Tokens / kRun;             // threads with tokens of a channel
  static constexpr int kSub = 8;                                         // tokens whose gates and gradients are in registers
  static constexpr int kOrders = kChannelLanes < 4 ? kChannelLanes : 4;  // of the states in a thread; see sum_over_channels
  static constexpr int kRow = kChannels + (kChannels < 32 ? 2 : 0);      // of a row of channels, against bank conflicts
  static constexpr int kPairRow = 2 * kRow;                              // of a row of (Δ, Δ u)
  static constexpr int kStateRow = kOrders * kPadded + 4;
  static constexpr int kColumns = 2 * kPadded;  // of a row of dB and dC
  static constexpr int kPairTile = kTokens * kPairRow, kStateTile = kTokens * kStateRow;
  AUTOHDR_ANYWHERE static constexpr int pad(int row) { return 0; }  // bank conflicts are few, shared memory is scarce
  static constexpr int kSlot = kOwn * kStates * kThreads;           // floats of states
  static constexpr int kSums = kWarps * kTokens * kColumns;
  // The states before a chunk's last kSub tokens lie where the sums of a tile's first ones go afterwards, each warp's in its own place:
  // so sums lie as [kTokens / kSumRows][kWarps][kSumRows][kColumns].
  static constexpr bool kLastInSums = kSub < kTokens && kColumns == 32 && kSlot == kWarps * kSub * kColumns;
  static constexpr int kSumRows = kLastInSums ? 4 : kTokens, kSumPart = kSumRows * kColumns;
  static constexpr int kSaved = (static_cast<int>(kChunk) / kSub - kLastInSums) * kSlot;
  static_assert(kThreads % kChannels == 0 && kTokens % kSub == 0 && kStates % 4 == 0);
};

template <class F>
void with_backward_config(int64_t dstate, const F& f) {
  if (dstate <= 8) return f(BackwardConfig<2, 4, 2, 16>{});
  if (dstate <= 16) return f(BackwardConfig<2, 4, 4, 16>{});
  if (dstate <= 32) return f(BackwardConfig<2, 4, 8, 16>{});
  if (dstate <= 64) return f(BackwardConfig<2, 4, 16, 16>{});
  if (dstate <= 128) return f(BackwardConfig<2, 4, 32, 8>{});
  return f(BackwardConfig<1, 8, 32, 8>{});
}

// Columns of `sums` beside dA's, of which a thread that prepares tokens has its own; and a channel's parameters.
enum { kSumD, kSumBias, kSumWeight, kMoreSums };
enum { kD, kBias, kWeight, kParameters };

// How the work is split: over blocks as Split says, one tile of channels a block, and over launches, so that what blocks leave for
// others to add stays small: `batches` entries of the batch at a time, `round_chunks` chunks of every segment, the last ones first.
struct BackwardPlan {
  Split split;
  int64_t batches, round_chunks;
  int64_t rounds() const { return (split.segment_chunks + round_chunks - 1) / round_chunks; }
};

struct BackwardWorkspace {
  float* carry;     // [batch, segments, dstate, dim], the gradient of the state after a segment's tokens of this round
  float* sums;      // [batch, segments, dstate + kMoreSums, dim], over tokens
  float* parts;     // [batches, groups, segments, tiles, round_chunks · kChunk, kColumns] of dB and dC
  float* weighted;  // [batches, segments, groups, tiles, round_chunks · kChunk] of a rank-one d_delta, or null
};

// What a launch covers of a segment: chunks [first, last) of the scan.
struct Round {
  int first, last;
  __device__ Round(const ScanShape& s, const BackwardPlan& p, int64_t segment, int64_t round) {
    const int64_t begin = segment * p.split.segment_chunks, end = min(begin + p.split.segment_chunks, s.chunks());
    last = static_cast<int>(end - round * p.round_chunks);
    first = static_cast<int>(max(begin, last - p.round_chunks));
  }
};

// Sums over the channel lanes of a warp of v, [2][States] of two tokens. The states of a thread are in an order of its own, register j
// holding state j ^ order with the order of lane l being l mod kOrders: so what a lane keeps and what it sends are the same registers
// in every lane, and need not be chosen. Afterwards those v[k] with k % kOrders == 0 that are left are sums of state k % kStates ^
// order; where sums of both tokens are left to add, the lower lanes keep the first, the upper the second.
template <class C>
__device__ __forceinline__ void sum_over_channels(float (&v)[2 * C::kStates]) {
  constexpr int S = C::kStates;
#pragma unroll
  for (int bit = 1; bit < C::kOrders; bit *= 2)
#pragma unroll
    for (int k = 0; k < 2 * S; k += 2 * bit) v[k] += __shfl_xor_sync(~0u, v[k + bit], bit * C::kLanes);
  if constexpr (C::kChannelLanes > C::kOrders) {
    static_assert(S == C::kOrders);
    const bool upper = threadIdx.x / C::kLanes & C::kOrders;
    const float send = upper ? v[0] : v[S];
    v[0] = (upper ? v[S] : v[0]) + __shfl_xor_sync(~0u, send, C::kOrders * C::kLanes);
  }
#pragma unroll
  for (int bit = 2 * C::kOrders; bit < C::kChannelLanes; bit *= 2) v[0] += __shfl_xor_sync(~0u, v[0], bit * C::kLanes);
}

// ---------------------------------------------------------------------------------------------------------------------

// The sequences of a block. The tiles of the first six lie in shared memory as in the tensors; three are enough for the states.
enum { kDelta, kU, kB, kC, kOut, kZ, kDu, kDDelta, kDz, kSequences };

// Shared memory of scan_backward, in floats: what the scan reads and leaves, rows being tokens in its order; then raw tiles. kPairs has
// (Δ, Δ u), and what the gates add to the gradient of Δ in place of Δ u afterwards; kInputs u and the gradient of Δ u; kSlopes the
// derivatives of Δ by softplus's input and, but for y, of the output by z; kDy the gradient of y, and y. As pairs they have rows of one
// length, and one access takes both.
template <class C, class L, bool Gated>
struct BackwardShared {
  static constexpr int kSaved = 0, kSums = kSaved + C::kSaved, kPairs = kSums + C::kSums, kStatesB = kPairs + C::kPairTile,
                       kStatesC = kStatesB + C::kStateTile;
  static constexpr int kInputs = kStatesC + C::kStateTile, kSlopes = kInputs + C::kPairTile, kDy = kSlopes + C::kPairTile;
  static constexpr int kRankOne = kDy + C::kPairTile;
  static constexpr int kMore = kRankOne + C::kTokens, kOfChannels = kMore + kMoreSums * C::kHelpers,
                       kRaw = round_up(kOfChannels + kParameters * C::kChannels, 4);
  static constexpr int kRawTile = RawTile<C, L, C::kChannels>::kFloats, kRawStates = RawTile<C, L, C::kPadded>::kFloats;
  AUTOHDR_ANYWHERE static constexpr int raw(int sequence) {
    int at = kRaw;
    for (int i = 0; i < sequence; ++i) at += i == kB || i == kC ? kRawStates : i == kZ && !Gated ? 0 : kRawTile;
    return at;
  }
  static constexpr int kPlaces = raw(kZ + 1), kBases = kPlaces + kSequences * static_cast<int>(sizeof(Place)) / 4,
                       kFloats = kBases + 6;
};

template <class C, class L, bool Gated>
struct BackwardBlock : Tiles<C, L, BackwardShared<C, L, Gated>::kPlaces> {
  using M = BackwardShared<C, L, Gated>;
  using Base = Tiles<C, L, M::kPlaces>;
  using Base::s, Base::in, Base::shared, Base::b, Base::dim, Base::dstate, Base::kTokens, Base::place, Base::raw;
  using typename Base::Channels, typename Base::States, typename Base::RankOne;
  static constexpr int kRow = C::kRow, kRun = C::kRun;
  static constexpr int kOwn = C::kOwn, kStates = C::kStates, kSub = C::kSub, kAcross = kLeft<2 * kOwn, C::kLanes>;
  static constexpr int kTiles = static_cast<int>(kChunk) / kTokens, kSubs = kTokens / kSub;

  const ScanBackward& a;
  const BackwardPlan& plan;
  const BackwardWorkspace& workspace;
  const int local;   // of the entries of this launch
  const bool later;  // whether this is not the first round
  Round chunks;
  const int column, run;  // the channel and first token that the thread prepares
  int lane, own, order;   // of the thread: its lane and channels, the order of its states (see sum_over_channels)
  bool aligned;           // whether every sequence lies at multiples of 16 bytes
  // Of each of its channels and states: A log2(e), the gradient of the state after the tokens to come, dA so far, the state.
  float rates[kOwn][kStates], carry[kOwn][kStates], dA[kOwn][kStates], h[kOwn][kStates];

  __device__ BackwardBlock(const ScanBackward& a, const BackwardPlan& plan, const BackwardWorkspace& workspace, float* shared,
                           int64_t first_batch, int64_t round)
      : Base(a.shape, a.in, plan.split, shared, first_batch), a(a), plan(plan), workspace(workspace),
        local(static_cast<int>(b.batch - first_batch)), later(round > 0), chunks(a.shape, plan, b.segment, round),
        column(threadIdx.x % C::kChannels), run(threadIdx.x / C::kChannels * kRun), lane(threadIdx.x % C::kLanes),
        own(threadIdx.x / C::kLanes * kOwn), order(threadIdx.x / C::kLanes % C::kOrders) {}

  __device__ void walk() {
    if (chunks.last <= chunks.first) return;
    load_parameters();
    aligned = __syncthreads_and(place_sequences());
    const int whole = static_cast<int>(s.seqlen / kTokens);
    const auto window = [&](int tile) { return Window<C>(s, tile, tile < whole); };
    Window<C> next = window((chunks.last - 1) * kTiles);  // of the step that fetches, the one after
#pragma unroll 1
    for (int chunk = chunks.last - 1; chunk >= chunks.first; --chunk) {
      // Tiles 0 to tiles - 1 forward, then back; the step before the first one only fetches.
      const int tiles = static_cast<int>((min(kChunk, s.seqlen - chunk * kChunk) + kTokens - 1) / kTokens), steps = 2 * tiles - 1;
      const float* const states = bases().states + chunk * (dstate * dim);
      each_state([&](int i, int j) { h[i][j] = has(i, j) ? states[state(j) * dim + own + i] : 0.0f; });
#pragma unroll 1
      for (int step = chunk + 1 == chunks.last ? -1 : 0; step < steps; ++step) {
        const bool backward = step + 1 >= tiles, more = step + 1 < steps;
        const int at = backward ? steps - 1 - step : step;
        const Window<C> w = next;
        if (step >= 0) {
          wait_for_copies();
          __syncthreads();  // and the tile before is done with
          prepare(w, backward);
          __syncthreads();
        }
        if (more || chunk > chunks.first) {
          next = window(more ? chunk * kTiles + (backward ? at - 1 : at + 1) : (chunk - 1) * kTiles);
          fetch(next, more && step + 2 >= tiles);
        }
        if (step < 0) continue;
        if (step < tiles) go_forward(at * kSubs, backward);
        if (!backward) continue;
#pragma unroll 1
        for (int sub = kSubs - 1; sub >= 0; --sub) go_back(at * kSubs + sub, sub * kSub);
        __syncthreads();
        finish(w, chunk * kChunk + at * kTokens);
      }
    }
    leave();
  }

 private:
  __device__ float2* pair(int tile, int at) const { return reinterpret_cast<float2*>(shared + tile) + at; }
  __device__ bool helps() const { return C::kHelpers == C::kThreads || threadIdx.x < C::kHelpers; }
  __device__ int row_of(int token) const { return s.reverse ? kTokens - 1 - token : token; }
  __device__ int next_row() const { return s.reverse ? -1 : 1; }  // from a token's to the next one's

  // Pointers that registers have no room for.
  struct Bases {
    const float* states;
    float *parts, *weighted;
  };
  __device__ Bases& bases() const { return *reinterpret_cast<Bases*>(shared + M::kBases); }
  template <int Sequence>
  static constexpr int kRawOf = M::raw(Sequence);
  // A helper's own sum, and a parameter of its channel, which registers have no room for either.
  __device__ float& more(int sum) const { return shared[M::kMore + sum * C::kHelpers + threadIdx.x]; }
  __device__ float& of_channel(int parameter) const { return shared[M::kOfChannels + parameter * C::kChannels + column]; }

  __device__ int state(int j) const { return lane * kStates + (j ^ order); }
  __device__ bool has(int i, int j) const { return own + i < b.channels && state(j) < dstate; }
  // In the workspace, of `columns` a channel.
  __device__ int64_t state_at(int64_t columns, int i, int j) const {
    return ((b.batch * plan.split.segments + b.segment) * columns + state(j)) * dim + b.row0 + own + i;
  }
  template <class F>
  __device__ static __forceinline__ void each_state(const F& f) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
#pragma unroll
      for (int j = 0; j < kStates; ++j) f(i, j);
  }

  __device__ __forceinline__ void load_parameters() {
    each_state([&](int i, int j) {
      rates[i][j] = carry[i][j] = dA[i][j] = 0;
      if (!has(i, j)) return;
      const int64_t parameter = (b.row0 + own + i) * s.dstate + state(j);
      rates[i][j] = decay_rate(in.A[parameter]);
      if (later) dA[i][j] = workspace.sums[state_at(dstate + kMoreSums, i, j)];
      if (later || plan.split.segments > 1)
        carry[i][j] = workspace.carry[state_at(dstate, i, j)];
      else if (a.d_last_state)
        carry[i][j] = a.d_last_state[b.batch * dim * s.dstate + parameter];
    });
    if (!helps()) return;
    more(kSumD) = more(kSumBias) = more(kSumWeight) = 0;
    if (run > 0) return;
    const auto loaded = [&](const float* parameter) {
      return parameter && column < b.channels ? parameter[b.row0 + column] : 0.0f;
    };
    of_channel(kD) = loaded(in.D), of_channel(kBias) = loaded(in.delta_bias), of_channel(kWeight) = loaded(in.delta_weight);
  }

  // Whether the sequence that this thread has placed lies at multiples of 16 bytes.
  __device__ __forceinline__ bool place_sequences() {
    if (threadIdx.x < kSequences) place(threadIdx.x).piece = 4;  // of those that do not exist
    this->put_delta(kDelta), this->put_channels(kU, in.u), this->put_channels(kOut, a.d_out), this->put_channels(kZ, in.z);
    this->put_channels(kDu, a.du), this->put_channels(kDz, a.dz), this->put_states(kB, in.B), this->put_states(kC, in.C);
    if (!in.delta_weight) this->put_channels(kDDelta, a.d_delta);
    for (int i = M::kRaw + threadIdx.x; i < M::kPlaces; i += C::kThreads) shared[i] = 0;  // for columns that do not exist
    if (threadIdx.x == 0) {
      const int64_t tokens = plan.round_chunks * kChunk, before = chunks.first * kChunk;
      const int64_t part = ((local * s.groups + b.group) * plan.split.segments + b.segment) * plan.split.tiles + b.tile;
      const int64_t weighted = ((local * plan.split.segments + b.segment) * s.groups + b.group) * plan.split.tiles + b.tile;
      bases() = {a.states + b.batch * s.chunks() * s.dstate * dim + b.row0,
                 workspace.parts + (part * tokens - before) * C::kColumns, workspace.weighted + (weighted * tokens - before)};
    }
    return threadIdx.x >= kSequences || place(threadIdx.x).piece == 4;
  }

  // Sends for the tiles of a window, all of them or those that are enough for the states. Places are read before the first copy: the
  // compiler moves no access to shared memory over one.
  __device__ __forceinline__ void fetch(const Window<C>& w, bool all) {
    if constexpr (Channels::kKnown)
      if (aligned && w.whole && !in.delta_weight) {
        const auto delta = Channels::cursor(place(kDelta)), u = Channels::cursor(place(kU)),
                   d_out = Channels::cursor(place(kOut)), z = Channels::cursor(place(kZ));
        const auto B = States::cursor(place(kB)), C_ = States::cursor(place(kC));
        Channels::fetch(delta, raw(kRawOf<kDelta>), w, b.channels);
        Channels::fetch(u, raw(kRawOf<kU>), w, b.channels);
        States::fetch(B, raw(kRawOf<kB>), w, dstate);
        if (!all) return;
        States::fetch(C_, raw(kRawOf<kC>), w, dstate);
        Channels::fetch(d_out, raw(kRawOf<kOut>), w, b.channels);
        if (Gated) Channels::fetch(z, raw(kRawOf<kZ>), w, b.channels);
        return;
      }
    if (aligned && w.whole)
      fetch_each<true>(w, all);
    else
      fetch_each<false>(w, all);
  }
  template <bool ByVectors>
  __device__ __forceinline__ void fetch_each(const Window<C>& w, bool all) {
    this->fetch_delta(kDelta, kRawOf<kDelta>, w, ByVectors);
    this->fetch_channels(kU, kRawOf<kU>, w, ByVectors);
    this->fetch_states(kB, kRawOf<kB>, w, ByVectors);
    if (!all) return;
    this->fetch_channels(kOut, kRawOf<kOut>, w, ByVectors);
    this->fetch_states(kC, kRawOf<kC>, w, ByVectors);
    if (Gated) this->fetch_channels(kZ, kRawOf<kZ>, w, ByVectors);
  }

  // From raw tiles what the scan needs, as float32 in its order: Δ and Δ u, B, and where it goes back C and the gradient of y; and for
  // `finish` u and derivatives.
  __device__ __forceinline__ void prepare(const Window<C>& w, bool backward) {
    if (helps() && backward) prepare_channel<true>(w);
    if (helps() && !backward) prepare_channel<false>(w);
    if (backward)
      this->template prepare_states<true>(kB, raw(kRawOf<kB>), M::kStatesB, s.reverse);
    else
      this->template prepare_states<false>(kB, raw(kRawOf<kB>), M::kStatesB, s.reverse);
  }
  template <bool Backward>
  __device__ __forceinline__ void prepare_channel(const Window<C>& w) {
    const int first = row_of(run) * kRow + column, step = next_row() * kRow;
    float delta[kRun], slope[kRun], u[kRun], d_out[kRun], z[kRun], gate[kRun];
    Channels::read(place(kU), raw(kRawOf<kU>), column, run, u);
    if constexpr (Backward) Channels::read(place(kOut), raw(kRawOf<kOut>), column, run, d_out);
    if constexpr (Backward && Gated) Channels::read(place(kZ), raw(kRawOf<kZ>), column, run, z);
    const float bias = of_channel(kBias);
    if (in.delta_weight) {
      const float weight = of_channel(kWeight);
      RankOne::read(place(kDelta), raw(kRawOf<kDelta>), 0, run, delta);
#pragma unroll
      for (int k = 0; k < kRun; ++k) {
        if (column == 0) shared[M::kRankOne + row_of(run) + k * next_row()] = delta[k];
        delta[k] *= weight;
      }
    } else {
      Channels::read(place(kDelta), raw(kRawOf<kDelta>), column, run, delta);
    }
#pragma unroll
    for (int k = 0; k < kRun; ++k) delta[k] += bias, slope[k] = 1;
    if (s.softplus) softplus<Backward, is_narrow<L>>(delta, slope);
    if (const bool channel = column < b.channels; !channel || !w.whole) {
      const Existing exists(w);
#pragma unroll
      for (int k = 0; k < kRun; ++k)
        if (!channel || !exists(run + k)) delta[k] = slope[k] = 0;
    }
#pragma unroll
    for (int k = 0; k < kRun; ++k) *pair(M::kPairs, first + k * step) = make_float2(delta[k], delta[k] * u[k]);
    if constexpr (!Backward) return;
#pragma unroll
    for (int k = 0; k < (Gated ? kRun : 0); ++k) gate[k] = exp2_approx(-z[k] * kLog2e);
#pragma unroll
    for (int k = 0; k < (Gated ? kRun : 0); ++k) gate[k] = reciprocal_approx(1.0f + gate[k]);
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
      const int at = first + k * step;
      pair(M::kInputs, at)->x = u[k];
      *pair(M::kSlopes, at) = make_float2(slope[k], Gated ? d_out[k] * (gate[k] * (1.0f + z[k] * (1.0f - gate[k]))) : 0.0f);
      pair(M::kDy, at)->x = Gated ? d_out[k] * (z[k] * gate[k]) : d_out[k];
    }
  }
  // What the scan reads of a token.
  struct Token {
    float delta[kOwn], input[kOwn], d_y[kOwn], Bs[kStates], Cs[kStates];
  };
  __device__ __forceinline__ void load_input(int row, Token& t) const {
    float pairs[2 * kOwn];
    load_floats<2 * kOwn>(shared + M::kPairs + 2 * own + row * C::kPairRow, pairs);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) t.delta[i] = pairs[2 * i], t.input[i] = pairs[2 * i + 1];
    load_floats<kStates>(states_of(M::kStatesB, row), t.Bs);
  }
  __device__ __forceinline__ const float* states_of(int tile, int row) const {
    return shared + tile + order * C::kPadded + lane * kStates + row * C::kStateRow;
  }
  __device__ __forceinline__ float gate_of(const Token& t, int i, int j) const { return exp2_approx(t.delta[i] * rates[i][j]); }
  // h after a token.
  __device__ __forceinline__ void advance(const Token& t, float gate, int i, int j) {
    h[i][j] = gate * h[i][j] + t.input[i] * t.Bs[j];
  }
  __device__ float* saved(int slot, int i, int j) const {
    return shared + M::kSaved + 4 * threadIdx.x + ((slot * kOwn + i) * (kStates / 4) + j / 4) * 4 * C::kThreads;
  }
  __device__ __forceinline__ void restore(int slot) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
#pragma unroll
      for (int j = 0; j < kStates; j += 4) load_floats<4>(saved(slot, i, j), h[i] + j);
  }

  // Keeps the states before every kSub tokens of a tile; those after the chunk's last tile are not needed.
  __device__ __forceinline__ void go_forward(int slot, bool last) {
    Token tokens[kTokens];  // loaded before states are stored: the compiler would not move them there
#pragma unroll
    for (int k = 0; k < kTokens; ++k) load_input(k, tokens[k]);
#pragma unroll
    for (int sub = 0; sub < kSubs; ++sub) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i)
#pragma unroll
        for (int j = 0; j < kStates; j += 4)
          *reinterpret_cast<float4*>(saved(slot + sub, i, j)) = make_float4(h[i][j], h[i][j + 1], h[i][j + 2], h[i][j + 3]);
      if (last && sub + 1 == kSubs) return;
#pragma unroll
      for (int k = sub * kSub; k < (sub + 1) * kSub; ++k)
        each_state([&](int i, int j) { advance(tokens[k], gate_of(tokens[k], i, j), i, j); });
    }
  }

  // kSub tokens, in pairs: back, for which their gates are enough, then on from the states before them, which meet what the gates let
  // through. So exponentials stand among products; all of a warp's gates first would keep it waiting.
  __device__ __forceinline__ void go_back(int slot, int row0) {
    float gate[kSub][kOwn][kStates], through[kSub][kOwn][kStates];  // through: gradients of the states before the tokens
    float sums_input[kSub / 2][kAcross], sums_decay[kSub / 2][kAcross], sums_y[kSub / 2][kAcross];
    // With 16 states registers have room for the next pass's first loads before this one's last sums, and for those until the end.
    constexpr bool kRoom = C::kPadded == 16;
    int first = 0;          // of a lane's sums
    Token now[2], next[2];  // a pair is loaded before the one before it is stored: the compiler would not move it there
    const auto turn = [&] { restore(slot), load_pair(row0, next); };
    const auto store_inputs = [&] {
      store_across(sums_input, first, [&](int at) { return &pair(M::kInputs, row0 * kRow + own + at)->y; });
    };
    load_pair(row0 + kSub - 2, next);
#pragma unroll
    for (int k = kSub - 2; k >= 0; k -= 2) {
      now[0] = next[0], now[1] = next[1];
      if (k > 0) load_pair(row0 + k - 2, next);
      if (kRoom && k == 0) turn();
      float d_input[2 * kOwn] = {}, dB[2 * kStates] = {};
#pragma unroll
      for (int one = 1; one >= 0; --one) {
        const Token& t = now[one];
        each_state([&](int i, int j) {
          const float dh = t.d_y[i] * t.Cs[j] + carry[i][j];
          d_input[one * kOwn + i] += dh * t.Bs[j];
          dB[one * kStates + j] += dh * t.input[i];
          gate[k + one][i][j] = gate_of(t, i, j);
          through[k + one][i][j] = carry[i][j] = dh * gate[k + one][i][j];
        });
      }
      first = sum_across(d_input, sums_input[k / 2]);
      store_products(dB, row0, k, 0);
    }
    if (!kRoom) store_inputs(), turn();
#pragma unroll
    for (int k = 0; k < kSub; k += 2) {
      now[0] = next[0], now[1] = next[1];
      if (k + 2 < kSub) load_pair(row0 + k + 2, next);
      float decays[2 * kOwn] = {}, y[2 * kOwn] = {}, dC[2 * kStates] = {};
#pragma unroll
      for (int one = 0; one < 2; ++one) {
        const Token& t = now[one];
        each_state([&](int i, int j) {
          const float decay = through[k + one][i][j] * h[i][j];
          decays[one * kOwn + i] += decay * rates[i][j];
          dA[i][j] += decay * t.delta[i];
          advance(t, gate[k + one][i][j], i, j);
          dC[one * kStates + j] += t.d_y[i] * h[i][j];
          if (Gated) y[one * kOwn + i] += h[i][j] * t.Cs[j];
        });
      }
      if (Gated) sum_across(y, sums_y[k / 2]);
      sum_across(decays, sums_decay[k / 2]);
      store_products(dC, row0, k, C::kPadded);
    }
    if (kRoom) store_inputs();
    if (Gated) store_across(sums_y, first, [&](int at) { return &pair(M::kDy, row0 * kRow + own + at)->y; });
    __syncwarp();  // all of it have read Δ u, in whose place this goes
    store_across(sums_decay, first, [&](int at) { return &pair(M::kPairs, row0 * kRow + own + at)->y; });
  }
  __device__ __forceinline__ void load_pair(int row, Token (&tokens)[2]) const {
    load_token(row, tokens[0]), load_token(row + 1, tokens[1]);
  }
  // The sums over a channel's lanes of a pair's values, [2][kOwn]; returns which is the first that this lane has.
  __device__ __forceinline__ int sum_across(float (&values)[2 * kOwn], float (&sums)[kAcross]) const {
    const int first = sum_over_lanes<2 * kOwn, C::kLanes, 1>(values);
#pragma unroll
    for (int v = 0; v < kAcross; ++v) sums[v] = values[v];
    return first;
  }
  // Those of all pairs, to where `place` says of a row of channels.
  template <class Place>
  __device__ __forceinline__ void store_across(const float (&sums)[kSub / 2][kAcross], int first, const Place& place) const {
    if (!owns_sum<2 * kOwn, C::kLanes, 1>()) return;
#pragma unroll
    for (int k = 0; k < kSub / 2; ++k)
#pragma unroll
      for (int v = 0; v < kAcross; ++v) *place((2 * k + (first + v) / kOwn) * kRow + (first + v) % kOwn) = sums[k][v];
  }
  // Of two tokens, [2][kStates], the sums over a warp's channels, to columns first_column and on; the first is the k-th of kSub.
  __device__ __forceinline__ void store_products(float (&products)[2 * kStates], int row0, int k, int first_column) {
    sum_over_channels<C>(products);
    const int row = C::kLastInSums ? row0 * C::kWarps + k / C::kSumRows * (C::kWarps * C::kSumRows) + k % C::kSumRows : row0 + k;
    float* to = shared + M::kSums + threadIdx.x / 32 * C::kSumPart + row * C::kColumns + first_column + lane * kStates;
    const int channel_lane = threadIdx.x % 32 / C::kLanes;
    if (C::kChannelLanes > C::kOrders) {
      if (channel_lane < 2 * C::kOrders) to[(channel_lane >= C::kOrders ? C::kColumns : 0) + order] = products[0];
    } else {
#pragma unroll
      for (int v = 0; v < 2 * kStates; v += C::kOrders) to[v / kStates * C::kColumns + (v % kStates ^ order)] = products[v];
    }
  }
  __device__ __forceinline__ void load_token(int row, Token& t) const {
    load_input(row, t);
    float pairs[2 * kOwn];
    load_floats<2 * kOwn>(shared + M::kDy + 2 * own + row * C::kPairRow, pairs);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) t.d_y[i] = pairs[2 * i];
    load_floats<kStates>(states_of(M::kStatesC, row), t.Cs);
  }

  // From the gradients of y, Δ u and the gates to those of the tensors; and the tile's part of dB and dC.
  __device__ __forceinline__ void finish(const Window<C>& w, int64_t token0) {
    if (helps()) finish_channel(w);
    float* parts = bases().parts + token0 * C::kColumns;
#pragma unroll
    for (int i = 0; i < (kTokens * C::kColumns / 4 + C::kThreads - 1) / C::kThreads; ++i) {
      const int e = 4 * (threadIdx.x + i * C::kThreads);
      if (e >= kTokens * C::kColumns) break;
      float sum[4], more[4];
      const float* from =
          shared + M::kSums + (C::kLastInSums ? e / C::kSumPart * (C::kWarps * C::kSumPart) + e % C::kSumPart : e);
      load_floats<4>(from, sum);
#pragma unroll
      for (int warp = 1; warp < C::kWarps; ++warp) {
        load_floats<4>(from + warp * C::kSumPart, more);
#pragma unroll
        for (int k = 0; k < 4; ++k) sum[k] += more[k];
      }
      store_word(parts + e, make_float4(sum[0], sum[1], sum[2], sum[3]));
    }
    if (!in.delta_weight) return;
    __syncthreads();
    for (int row = threadIdx.x; row < kTokens; row += C::kThreads) {
      float sum = 0;
#pragma unroll 4
      for (int c = 0; c < C::kChannels; ++c) sum += shared[M::kInputs + row * C::kPairRow + 2 * c + 1];
      bases().weighted[token0 + row] = sum;
    }
  }
  __device__ __forceinline__ void finish_channel(const Window<C>& w) {
    const int first = row_of(run) * kRow + column, step = next_row() * kRow;
    const float D = of_channel(kD);
    const Place of_du = place(kDu), of_dz = place(kDz), of_d_delta = place(kDDelta);  // before anything is stored through them
    float du[kRun], d_delta[kRun], dz[kRun], sum_D = 0, sum_bias = 0;
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
      const int at = first + k * step;
      const auto [delta, decay] = *pair(M::kPairs, at);
      const auto [u, d_input] = *pair(M::kInputs, at);
      const auto [slope, gate] = *pair(M::kSlopes, at);
      const auto [dy, y] = *pair(M::kDy, at);
      du[k] = d_input * delta + D * dy;
      d_delta[k] = (d_input * u + decay * kLn2) * slope;
      if (Gated) dz[k] = gate * (y + D * u);
      sum_D += dy * u, sum_bias += d_delta[k];
    }
    more(kSumD) += sum_D, more(kSumBias) += sum_bias;
    const bool by_vectors = aligned && w.whole;
    if (column < b.channels) {
      Channels::store(of_du, w, column, run, by_vectors, du);
      if (Gated) Channels::store(of_dz, w, column, run, by_vectors, dz);
      if (!in.delta_weight) Channels::store(of_d_delta, w, column, run, by_vectors, d_delta);
    }
    if (!in.delta_weight) return;
    const float weight = of_channel(kWeight);
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
      more(kSumWeight) += d_delta[k] * shared[M::kRankOne + row_of(run) + k * next_row()];
      pair(M::kInputs, first + k * step)->y = d_delta[k] * weight;
    }
  }

  // What the next round goes on with, and other kernels add up.
  __device__ __forceinline__ void leave() {
    each_state([&](int i, int j) {
      if (!has(i, j)) return;
      workspace.carry[state_at(dstate, i, j)] = carry[i][j];
      workspace.sums[state_at(dstate + kMoreSums, i, j)] = dA[i][j];
      if (chunks.first == 0 && in.initial_state)
        a.d_initial_state[(b.batch * dim + b.row0 + own + i) * s.dstate + state(j)] = carry[i][j];
    });
    __syncthreads();
    if (run > 0 || column >= b.channels) return;
#pragma unroll
    for (int v = 0; v < kMoreSums; ++v) {
      float* to = workspace.sums + ((b.batch * plan.split.segments + b.segment) * (dstate + kMoreSums) + dstate + v) * dim +
                  b.row0 + column;
      float sum = later ? *to : 0.0f;
      for (int k = column; k < C::kHelpers; k += C::kChannels) sum += shared[M::kMore + v * C::kHelpers + k];
      *to = sum;
    }
  }
};

template <class C, class L, bool Gated>
__global__ void __launch_bounds__(C::kThreads)
    scan_backward(ScanBackward a, BackwardPlan plan, BackwardWorkspace workspace, int64_t first_batch, int64_t round) {
  AUTOHDR_DYNAMIC_SHARED(float, shared);
  BackwardBlock<C, L, Gated>(a, plan, workspace, shared, first_batch, round).walk();
}

template <class C, class L, bool Gated>
constexpr size_t backward_shared() {
  constexpr size_t bytes = BackwardShared<C, L, Gated>::kFloats * sizeof(float);
  static_assert(bytes <= kMaxShared);
  // Of what most models have, a multiprocessor with 100 KB holds two blocks, one with 164 three, one with 228 four; each takes 1 more.
  static_assert(!(C::kPadded == 16 && is_narrow<L>) || bytes <= (100 << 10) / 2 - (1 << 10));
  return bytes;
}

// dB and dC of a round: the sums over the tiles of a group, in order. A block takes 32 tokens and 32 of the columns.
template <class C>
static __global__ void __launch_bounds__(256) sum_projections(ScanShape s, BackwardPlan p, Sequence dB, Sequence dC,
                                                              const float* parts, int64_t first_batch, int64_t round) {
  __shared__ float tile[32][33];
  constexpr int kColumnBlocks = (C::kColumns + 31) / 32;
  const int64_t tokens = p.round_chunks * kChunk;
  int64_t index = blockIdx.x;
  const int column0 = static_cast<int>(index % kColumnBlocks) * 32;
  index /= kColumnBlocks;
  const int64_t token0 = index % (tokens / 32) * 32;
  index /= tokens / 32;
  const int64_t segment = index % p.split.segments, group = index / p.split.segments % s.groups,
                local = index / p.split.segments / s.groups;
  const Round r(s, p, segment, round);
  const int64_t begin = r.first * kChunk + token0, end = min(r.last * kChunk, s.seqlen);
  if (begin >= end) return;
  const int x = threadIdx.x % 32, y = threadIdx.x / 32;
  const float* from = parts + (index * p.split.tiles * tokens + token0 + y) * C::kColumns + column0 + x;
  float sum[4] = {};
  if (column0 + x < C::kColumns)
#pragma unroll 4
    for (int64_t k = 0; k < p.split.tiles; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (begin + y + 8 * i < end) sum[i] += from[(k * tokens + 8 * i) * C::kColumns];
#pragma unroll
  for (int i = 0; i < 4; ++i) tile[y + 8 * i][x] = sum[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool by_token = dB.token == 1;
    const int row = by_token ? x : y + 8 * i, column = by_token ? y + 8 * i : x;
    const int kind = (column0 + column) / C::kPadded, n = (column0 + column) % C::kPadded;
    if (begin + row >= end || kind > 1 || n >= s.dstate) continue;
    const int64_t token = s.reverse ? s.seqlen - 1 - begin - row : begin + row;
    const auto of = [&](auto field) { return kind == 0 ? dB.*field : dC.*field; };  // an index would put both on the stack
    const Sequence q{of(&Sequence::data),  of(&Sequence::dtype),   of(&Sequence::batch),
                     of(&Sequence::group), of(&Sequence::channel), of(&Sequence::token)};
    store_one(q, (first_batch + local) * q.batch + group * q.group + n * q.channel + token * q.token, tile[row][column]);
  }
}

// A rank-one d_delta of a round: the sums over all channels, in order. One thread a token.
static __global__ void __launch_bounds__(256)
    sum_weighted(ScanShape s, BackwardPlan p, Sequence d_delta, const float* weighted, int64_t first_batch, int64_t round) {
  const int64_t tokens = p.round_chunks * kChunk, i = blockIdx.x * int64_t{256} + threadIdx.x, index = i / tokens;
  const int64_t segment = index % p.split.segments, local = index / p.split.segments;
  if (local >= p.batches || first_batch + local >= s.batch) return;
  const Round r(s, p, segment, round);
  const int64_t t = r.first * kChunk + i % tokens;
  if (t >= min(r.last * kChunk, s.seqlen)) return;
  float sum = 0;
#pragma unroll 4
  for (int64_t k = 0; k < s.groups * p.split.tiles; ++k)
    sum += weighted[(index * s.groups * p.split.tiles + k) * tokens + i % tokens];
  store_one(d_delta, (first_batch + local) * d_delta.batch + (s.reverse ? s.seqlen - 1 - t : t) * d_delta.token, sum);
}

// The parameters' gradients: the sums over the batch and the segments, in order. One thread a channel and column.
static __global__ void __launch_bounds__(256) sum_parameters(ScanBackward a, int64_t segments, const float* sums) {
  const int64_t i = blockIdx.x * int64_t{256} + threadIdx.x, dim = a.shape.dim(), N = a.shape.dstate, columns = N + kMoreSums;
  if (i >= columns * dim) return;
  float sum = 0;
#pragma unroll 8
  for (int64_t k = 0; k < a.shape.batch * segments; ++k) sum += sums[k * columns * dim + i];
  const int64_t d = i % dim, n = i / dim;
  if (n < N) a.dA[d * N + n] = sum;
  if (n == N + kSumD && a.in.D) a.dD[d] = sum;
  if (n == N + kSumBias && a.in.delta_bias) a.d_delta_bias[d] = sum;
  if (n == N + kSumWeight && a.in.delta_weight) a.d_delta_weight[d] = sum;
}

}  // namespace scan
}  // namespace autohdr
