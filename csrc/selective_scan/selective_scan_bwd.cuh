// selective_scan backward on a GPU.
#pragma once
#include "common/cuda_async.cuh"
#include "selective_scan/selective_scan_tile.cuh"

namespace autohdr {
namespace scan {

constexpr int round_up(int v, int to) { return (v + to - 1) / to * to; }

// A thread owns kOwn neighbouring channels, and of each kStates states; the kLanes threads of a channel are neighbours in a warp.
template <int Own, int States, int Lanes, int Tokens>
struct BackwardConfig {
  static constexpr int kOwn = Own, kStates = States, kLanes = Lanes, kTokens = Tokens, kThreads = 64;
  static constexpr int kWarps = kThreads / 32, kChannelLanes = 32 / Lanes, kPadded = States * Lanes;
  static constexpr int kChannels = kThreads / Lanes * Own;
  static constexpr int kHelpers =
      kChannels * Tokens / 4 < kThreads ? kChannels * Tokens / 4 : kThreads;  // threads with tokens of a channel
  static constexpr int kSub = 8;                                              // tokens whose gates and states are in registers
  static constexpr int kOrders = kChannelLanes < 4 ? kChannelLanes : 4;       // of the states in a thread; see sum_over_channels
  static constexpr int kRow = kChannels + 2;                                  // floats of a row of channels
  static constexpr int kPairRow = 2 * kChannels + 4;                          // of a row of (Δ, Δ u)
  static constexpr int kStateRow = kOrders * kPadded + 4;
  static constexpr int kColumns = 2 * kPadded;  // of a row of dB and dC
  static constexpr int kPairTile = kTokens * kPairRow, kStateTile = kTokens * kStateRow;
  static constexpr int kSaved = static_cast<int>(kChunk) / kSub * kOwn * kStates * kThreads;  // floats of states
  static constexpr int kSums = kWarps * kTokens * kColumns;
  static_assert(kPairRow == 2 * kRow && kThreads % kChannels == 0 && kTokens % kSub == 0 && kStates % 4 == 0);
};

template <class F>
void with_backward_config(int64_t dstate, const F& f) {
  if (dstate <= 8) return f(BackwardConfig<2, 4, 2, 16>{});
  if (dstate <= 16) return f(BackwardConfig<2, 4, 4, 16>{});
  if (dstate <= 64) return f(BackwardConfig<2, 4, 16, 16>{});
  return f(BackwardConfig<1, 8, 32, 8>{});
}

// Columns of `sums` beside dA's; and what else a thread keeps of its channel in shared memory.
enum { kSumD, kSumBias, kSumWeight, kMoreSums, kD = kMoreSums, kBias, kWeight, kOwnValues };

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

template <int Count>
__device__ __forceinline__ void load_floats(const float* from, float* v) {  // aligned to Count floats, to 4 at most
  if constexpr (Count % 4 == 0) {
#pragma unroll
    for (int j = 0; j < Count; j += 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + j);
      v[j] = four.x, v[j + 1] = four.y, v[j + 2] = four.z, v[j + 3] = four.w;
    }
  } else if constexpr (Count == 2) {
    const float2 two = *reinterpret_cast<const float2*>(from);
    v[0] = two.x, v[1] = two.y;
  } else {
    static_assert(Count == 1);
    v[0] = *from;
  }
}

AUTOHDR_ANYWHERE constexpr int log2_of(int v) { return v < 2 ? 0 : 1 + log2_of(v / 2); }

// Where a sequence's tile goes in shared memory: as it is in the tensor, in rows along the axis that is contiguous there. Strides in
// bytes.
struct alignas(16) Place {
  char* origin;                                // of the block's first column and token 0
  int64_t token, row;                          // in the tensor
  int along, size;                             // whether tokens are contiguous; bytes of an element
  int bfloat, piece;                           // log2 of the bytes that may be copied at once, 0 if not even 4
  int columns, log2_length, log2_rows, pitch;  // columns that exist; elements of a row, rows, bytes from row to row
  int at;                                      // in shared memory, in floats
};

// The place of a tile of `Columns` channels or states.
template <class C, int Columns>
struct Tiling {
  static constexpr int kPad = Columns <= 64 ? 16 : 0;  // bytes behind a row of tokens, against bank conflicts
  static constexpr int kFloats = round_up(Columns * (C::kTokens * 4 + kPad), 16) / 4;

  __device__ static Place place(const ScanShape& s, const Sequence& q, int64_t offset, int columns, int at) {
    Place p;
    p.along = q.token == 1, p.size = q.dtype == Dtype::f32 ? 4 : 2, p.bfloat = q.dtype == Dtype::bf16, p.columns = columns,
    p.at = at;
    p.origin = static_cast<char*>(q.data) + offset * p.size;
    p.token = q.token * p.size, p.row = (p.along ? q.channel : q.token) * p.size;
    p.log2_length = log2_of(p.along ? C::kTokens : Columns), p.log2_rows = log2_of(p.along ? Columns : C::kTokens);
    p.pitch = (p.size << p.log2_length) + (p.along ? kPad : 0);
    // Windows lie whole windows from one end.
    const uintptr_t aligned = reinterpret_cast<uintptr_t>(p.origin + (s.reverse ? s.seqlen * p.token : 0)) |
                              static_cast<uintptr_t>(p.row) | static_cast<uintptr_t>(p.pitch) | (p.along ? 0 : columns * p.size);
    p.piece = aligned % 16 == 0 ? 4 : aligned % 8 == 0 ? 3 : aligned % 4 == 0 ? 2 : 0;
    return p;
  }
};

// One warp: f(place in shared memory, in the tensor, token of the window if `along`, ...) for the pieces of a tile that exist.
template <class C, class F>
__device__ __forceinline__ void each_piece(const Place& p, float* shared, const Window<C>& w, int log2_piece, const F& f) {
  const int shift = p.log2_length + (p.size == 4 ? 2 : 1) - log2_piece,
            across = shift < 5 ? shift : 5;  // log2 of pieces, of lanes in a row
  const int lane = threadIdx.x % 32, first = lane >> across, rows = p.along ? p.columns : C::kTokens;
  const int begin = (lane & ((1 << across) - 1)) << log2_piece, end = p.along ? C::kTokens * p.size : p.columns * p.size;
  char* inside = reinterpret_cast<char*>(shared + p.at) + first * p.pitch;
  char* outside = p.origin + w.first * p.token + first * p.row;
  const int step = 32 >> across;
#pragma unroll 2
  for (int row = first; row < rows; row += step, inside += step * p.pitch, outside += step * p.row)
#pragma unroll 1
    for (int at = begin; at < end; at += 32 << log2_piece) f(inside + at, outside + at, p.along ? at >> log2_piece : row);
}
template <class T>
__device__ __forceinline__ void copy(char* to, const char* from) {
  *reinterpret_cast<T*>(to) = *reinterpret_cast<const T*>(from);
}
// A tile on its way into shared memory, or from there to the tensor; `inside`: all of its tokens exist. What does not exist is left
// as it is, but tokens that may exist in another window are set to zero.
template <class C>
__device__ __forceinline__ void fetch(const Place p, float* shared, const Window<C>& w, bool inside) {
  const auto copies = [&](auto word, int log2_piece) {
    each_piece<C>(p, shared, w, log2_piece, [](char* to, const char* from, int) { copy_async<decltype(word)>(to, from); });
  };
  const auto elements = [&](auto zero, int log2_piece) {
    using T = decltype(zero);
    each_piece<C>(p, shared, w, log2_piece, [&](char* to, const char* from, int token) {
      *reinterpret_cast<T*>(to) = w.inside(token) ? __ldg(reinterpret_cast<const T*>(from)) : zero;
    });
  };
  if (inside && p.piece == 4)
    copies(uint4{}, 4);
  else if (inside && p.piece == 3)
    copies(uint2{}, 3);
  else if (inside && p.piece == 2)
    copies(uint32_t{}, 2);
  else if (p.size == 4)
    elements(uint32_t{0}, 2);
  else
    elements(uint16_t{0}, 1);
}
template <class C>
__device__ __forceinline__ void flush(const Place p, float* shared, const Window<C>& w, bool inside) {
  if (inside && p.piece == 4)
    return each_piece<C>(p, shared, w, 4, [](const char* from, char* to, int) { copy<uint4>(to, from); });
  if (inside && p.piece == 3)
    return each_piece<C>(p, shared, w, 3, [](const char* from, char* to, int) { copy<uint2>(to, from); });
  each_piece<C>(p, shared, w, p.size == 4 ? 2 : 1, [&](const char* from, char* to, int token) {
    if (w.inside(token)) p.size == 4 ? copy<uint32_t>(to, from) : copy<uint16_t>(to, from);
  });
}

// Elements of a column at tokens first .. first + 3 of the window, in the tensor's order.
__device__ __forceinline__ void read(const Place p, const float* shared, int column, int first, float (&v)[4]) {
  const char* from = reinterpret_cast<const char*>(shared + p.at);
  const int pitch = p.pitch;
  uint32_t low[4];  // 16 bits each
  if (p.along) {
    from += column * pitch + first * p.size;
    if (p.size == 4) return load_floats<4>(reinterpret_cast<const float*>(from), v);
    const uint2 two = *reinterpret_cast<const uint2*>(from);
    low[0] = two.x & 0xffffu, low[1] = two.x >> 16, low[2] = two.y & 0xffffu, low[3] = two.y >> 16;
  } else {
    from += first * pitch + column * p.size;
    if (p.size == 4) {
#pragma unroll
      for (int j = 0; j < 4; ++j) v[j] = *reinterpret_cast<const float*>(from + j * pitch);
      return;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) low[j] = *reinterpret_cast<const uint16_t*>(from + j * pitch);
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) v[j] = p.bfloat ? bits_to_float(low[j] << 16) : half_to_float(low[j]);
}
__device__ __forceinline__ void write(const Place p, float* shared, int column, int first, const float (&v)[4]) {
  char* to = reinterpret_cast<char*>(shared + p.at);
  const int pitch = p.pitch;
  to += p.along ? column * pitch + first * p.size : first * pitch + column * p.size;
  if (p.size == 4) {
    if (p.along) {
      *reinterpret_cast<float4*>(to) = make_float4(v[0], v[1], v[2], v[3]);
      return;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) *reinterpret_cast<float*>(to + j * pitch) = v[j];
    return;
  }
  uint32_t low[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) low[j] = narrow(p.bfloat ? Dtype::bf16 : Dtype::f16, v[j]);
  if (p.along) {
    *reinterpret_cast<uint2*>(to) = make_uint2(low[0] | low[1] << 16, low[2] | low[3] << 16);
    return;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) *reinterpret_cast<uint16_t*>(to + j * pitch) = static_cast<uint16_t>(low[j]);
}

// Which tokens of a window exist; none if the channel does not.
struct Existing {
  int first, count;
  template <class C>
  __device__ Existing(const Window<C>& w, bool channel) : first(w.first < 0 ? static_cast<int>(-w.first) : 0) {
    const int64_t end = w.seqlen - w.first;
    count = channel ? (end < C::kTokens ? static_cast<int>(end) : C::kTokens) - first : 0;
  }
  __device__ bool operator()(int token) const { return static_cast<unsigned>(token - first) < static_cast<unsigned>(count); }
};

// Δ = softplus(x) as in cuda_math.cuh, and its derivative.
__device__ __forceinline__ float softplus_and_slope(float x, float& slope) {
  const float e = exp2_approx(-fabsf(x) * kLog2e), r = reciprocal_approx(1.0f + e);
  const float q = e * reciprocal_approx(2.0f + e), q2 = q * q;
  slope = x > 20.0f ? 1.0f : x > 0.0f ? r : e * r;
  return x > 20.0f ? x : fmaxf(x, 0.0f) + 2.0f * q * AUTOHDR_ARTANH_BY_S(q2);
}

// Sums over the channel lanes of a warp of v, [2][States] of dB and dC. The states of a thread are in an order of its own, register j
// holding state j ^ order with the order of lane l being l mod kOrders: so what a lane keeps and what it sends are the same registers
// in every lane, and need not be chosen. Afterwards those v[k] with k % kOrders == 0 that are left are sums of state k % kStates ^
// order; where a sum of both kinds is left to add, the lower lanes keep dB, the upper dC.
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

// Shared memory of scan_backward, in floats.
template <class C, bool Gated>
struct BackwardShared {
  static constexpr int kRaw = Tiling<C, C::kChannels>::kFloats, kRawStates = Tiling<C, C::kPadded>::kFloats;
  static constexpr int kTile = round_up(C::kTokens * C::kRow, 4), kBoth = kTile > kRaw ? kTile : kRaw;
  static constexpr int kSaved = 0, kPairs = kSaved + C::kSaved, kSums = kPairs + C::kPairTile, kB = kSums + C::kSums,
                       kC = kB + C::kStateTile;
  static constexpr int kGy = kC + C::kStateTile, kDecay = kGy + kTile, kU = kDecay + kTile, kSlope = kU + kBoth;
  static constexpr int kY = kSlope + kBoth, kGate = kY + (Gated ? kTile : 0), kRankOne = kGate + (Gated ? kBoth : 0);
  static constexpr int kOwn = kRankOne + C::kTokens;
  static constexpr int kRawDelta = kOwn + kOwnValues * C::kHelpers, kRawU = kRawDelta + kRaw, kRawOut = kRawU + kRaw,
                       kRawZ = kRawOut + kRaw;
  static constexpr int kRawB = kRawZ + (Gated ? kRaw : 0), kRawC = kRawB + kRawStates, kPlaces = kRawC + kRawStates;
  static constexpr int kSequences = 9, kFloats = kPlaces + kSequences * static_cast<int>(sizeof(Place)) / 4 + 8;
};

template <class C, bool Gated>
__global__ void __launch_bounds__(C::kThreads)
    scan_backward(ScanBackward a, BackwardPlan p, BackwardWorkspace ws, int64_t first_batch, int64_t round) {
  using M = BackwardShared<C, Gated>;
  constexpr int R = C::kOwn, S = C::kStates, T = C::kSub, K = C::kTokens, kRow = C::kRow, kSubs = K / T;
  AUTOHDR_DYNAMIC_SHARED(float, shared);
  const ScanShape& s = a.shape;
  const ScanInputs& in = a.in;

  unsigned index = blockIdx.x;
  const int tile = index % static_cast<unsigned>(p.split.tiles);
  index /= static_cast<unsigned>(p.split.tiles);
  const int segment = index % static_cast<unsigned>(p.split.segments);
  index /= static_cast<unsigned>(p.split.segments);
  const int group = index % static_cast<unsigned>(s.groups), local = index / static_cast<unsigned>(s.groups);
  const int64_t batch = first_batch + local;
  const Round r(s, p, segment, round);
  if (r.last <= r.first) return;

  const int dstate = static_cast<int>(s.dstate), lane = threadIdx.x % C::kLanes, own = threadIdx.x / C::kLanes * R;
  const int order = threadIdx.x / C::kLanes % C::kOrders;
  const int count =
      static_cast<int>(min(s.channels - static_cast<int64_t>(tile) * C::kChannels, static_cast<int64_t>(C::kChannels)));
  const int64_t dim = s.dim(), row0 = group * s.channels + static_cast<int64_t>(tile) * C::kChannels;
  const auto state = [&](int j) { return lane * S + (j ^ order); };
  const auto has = [&](int i, int j) { return own + i < count && state(j) < dstate; };
  const auto state_at = [&](int64_t of, int64_t columns, int i, int j) {
    return (of * columns + state(j)) * dim + row0 + own + i;
  };
  const int64_t part = batch * p.split.segments + segment;

  float a2[R][S], carry[R][S], dA[R][S];
#pragma unroll
  for (int i = 0; i < R; ++i)
#pragma unroll
    for (int j = 0; j < S; ++j) {
      a2[i][j] = carry[i][j] = dA[i][j] = 0;
      if (!has(i, j)) continue;
      const int64_t parameter = (row0 + own + i) * s.dstate + state(j);
      a2[i][j] = decay_rate(in.A[parameter]);
      if (round > 0) dA[i][j] = ws.sums[state_at(part, dstate + kMoreSums, i, j)];
      if (round > 0 || p.split.segments > 1)
        carry[i][j] = ws.carry[state_at(part, dstate, i, j)];
      else if (a.d_last_state)
        carry[i][j] = a.d_last_state[batch * dim * s.dstate + parameter];
    }

  // Between tensors and scan, a thread takes one channel of the tile, and of it every kQuads-th four tokens.
  constexpr int kQuads = C::kThreads / C::kChannels, kUnits = (K / 4 + kQuads - 1) / kQuads;
  const int mine = threadIdx.x % C::kChannels, my_quad = threadIdx.x / C::kChannels;
  const auto parameter = [&](const float* of) { return of && mine < count ? of[row0 + mine] : 0.0f; };
  const bool helps = threadIdx.x < C::kHelpers;
  float* const own_values = shared + M::kOwn + threadIdx.x % C::kHelpers;  // what registers have no room for
  const auto value = [&](int i) -> float& { return own_values[i * C::kHelpers]; };
  if (helps) {
    value(kD) = parameter(in.D), value(kBias) = parameter(in.delta_bias), value(kWeight) = parameter(in.delta_weight);
    value(kSumD) = value(kSumBias) = value(kSumWeight) = 0;
  }

  // Where the block's sequences are; the first three are enough for the states.
  enum { kDelta, kU, kB, kOut, kC, kZ, kDu, kDDelta, kDz };
  struct Here {
    const float* states;
    float *parts, *weighted;
  };
  Place* const places = reinterpret_cast<Place*>(shared + M::kPlaces);
  Here* const here = reinterpret_cast<Here*>(places + M::kSequences);
  const auto channels = [&](int i, const Sequence& q, int at) {
    if (threadIdx.x == i)
      places[i] =
          Tiling<C, C::kChannels>::place(s, q, batch * q.batch + group * q.group + tile * (C::kChannels * q.channel), count, at);
  };
  const auto states = [&](int i, const Sequence& q, int at) {
    if (threadIdx.x == i) places[i] = Tiling<C, C::kPadded>::place(s, q, batch * q.batch + group * q.group, dstate, at);
  };
  if (in.delta_weight) {
    if (threadIdx.x == kDelta) places[kDelta] = Tiling<C, 1>::place(s, in.delta, batch * in.delta.batch, 1, M::kRawDelta);
  } else {
    channels(kDelta, in.delta, M::kRawDelta), channels(kDDelta, a.d_delta, M::kSlope);
  }
  channels(kU, in.u, M::kRawU), channels(kOut, a.d_out, M::kRawOut), channels(kDu, a.du, M::kU);
  if (Gated) channels(kZ, in.z, M::kRawZ), channels(kDz, a.dz, M::kGate);
  states(kB, in.B, M::kRawB), states(kC, in.C, M::kRawC);
  for (int i = M::kRawDelta + threadIdx.x; i < M::kPlaces; i += C::kThreads) shared[i] = 0;  // for columns that do not exist
  if (threadIdx.x == 0) {
    const int64_t tokens = p.round_chunks * kChunk;
    here->states = a.states + batch * s.chunks() * s.dstate * dim + row0;
    here->parts =
        ws.parts + (((local * s.groups + group) * p.split.segments + segment) * p.split.tiles + tile) * tokens * C::kColumns;
    here->weighted = ws.weighted + (((local * p.split.segments + segment) * s.groups + group) * p.split.tiles + tile) * tokens;
  }
  __syncthreads();
  const auto whole = [&](const Window<C>& w) { return w.first >= 0 && w.first + K <= s.seqlen; };
  // Rows are tokens in the scan's order.
  const int forward = s.reverse ? -1 : 1, next_row = forward * kRow;
  const auto row_of = [&](int token) { return s.reverse ? K - 1 - token : token; };
  // From there what the scan needs, as float32 in its order: Δ and Δ u, the gradient of y, B and C, and for later u and derivatives.
  const auto prepare = [&](int64_t from, bool backward) {
    const Window<C> w(s, from);
    const Existing exists(w, mine < count);
    const float bias = value(kBias), weight = value(kWeight);
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      const int token = 4 * (my_quad + k * kQuads);
      if (token >= K) break;
      const int e0 = row_of(token) * kRow + mine;
      float d[4], slope[4], u[4];
      if (in.delta_weight) {
        read(places[kDelta], shared, 0, token, d);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (mine == 0) shared[M::kRankOne + row_of(token) + j * forward] = d[j];
          d[j] *= weight;
        }
      } else {
        read(places[kDelta], shared, mine, token, d);
      }
      read(places[kU], shared, mine, token, u);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        d[j] += bias, slope[j] = 1;
        if (s.softplus) d[j] = softplus_and_slope(d[j], slope[j]);
        if (!exists(token + j)) d[j] = 0;
        *reinterpret_cast<float2*>(shared + M::kPairs + 2 * (e0 + j * next_row)) = make_float2(d[j], d[j] * u[j]);
      }
      if (!backward) continue;
      float out[4], z[4];
      read(places[kOut], shared, mine, token, out);
      if (Gated) read(places[kZ], shared, mine, token, z);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int e = e0 + j * next_row;
        shared[M::kU + e] = u[j], shared[M::kSlope + e] = slope[j];
        if (Gated) {
          const float gate = reciprocal_approx(1.0f + exp2_approx(-z[j] * kLog2e));
          shared[M::kGate + e] = out[j] * (gate * (1.0f + z[j] * (1.0f - gate)));
          out[j] *= z[j] * gate;
        }
        shared[M::kGy + e] = out[j];
      }
    }
    const auto put = [&](int place, int to) {
#pragma unroll 1
      for (int i = threadIdx.x; i < C::kPadded * (K / 4); i += C::kThreads) {
        const int n = i % C::kPadded, token = i / C::kPadded * 4;
        float v[4];
        read(places[place], shared, n, token, v);
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int k = 0; k < C::kOrders; ++k)
            shared[to + (row_of(token) + j * forward) * C::kStateRow + k * C::kPadded + (n ^ k)] = v[j];
      }
    };
    put(kB, M::kB);
    if (backward) put(kC, M::kC);
  };

  float* const saved = shared + M::kSaved + 4 * threadIdx.x;
  const auto saved_at = [&](int sub, int i, int j) { return saved + ((sub * R + i) * (S / 4) + j / 4) * 4 * C::kThreads; };
  const auto restore = [&](int sub, float (&to)[R][S]) {
#pragma unroll
    for (int i = 0; i < R; ++i)
#pragma unroll
      for (int j = 0; j < S; j += 4) load_floats<4>(saved_at(sub, i, j), to[i] + j);
  };
  const float* const my_pairs = shared + M::kPairs + 2 * own;
  const auto load_pairs = [&](int row, float (&d)[R], float (&x)[R]) {
    float both[2 * R];
    load_floats<2 * R>(my_pairs + row * C::kPairRow, both);
#pragma unroll
    for (int i = 0; i < R; ++i) d[i] = both[2 * i], x[i] = both[2 * i + 1];
  };
  const float *const my_B = shared + M::kB + order * C::kPadded + lane * S, *const my_C = my_B + (M::kC - M::kB);

  // The steps of a chunk: tiles 0 to n - 1 forward, to save the states before every T tokens, and n - 1 to 0 back.
  const auto steps_of = [&](int64_t chunk) {
    return 2 * static_cast<int>((min(kChunk, s.seqlen - chunk * kChunk) + K - 1) / K) - 1;
  };
#pragma unroll 1
  for (int chunk = r.last - 1; chunk >= r.first; --chunk) {
    const int steps = steps_of(chunk), tiles = (steps + 1) / 2;
    float h[R][S];
#pragma unroll
    for (int i = 0; i < R; ++i)
#pragma unroll
      for (int j = 0; j < S; ++j) h[i][j] = has(i, j) ? here->states[(chunk * s.dstate + state(j)) * dim + own + i] : 0.0f;
#pragma unroll 1
    for (int step = chunk + 1 == r.last ? -1 : 0; step < steps; ++step) {  // one ahead, to fetch what the first needs
      const bool backward = step + 1 >= tiles;
      const int at = backward ? steps - 1 - step : step;
      const int64_t from = chunk * kChunk + at * K;
      if (step >= 0) {
        wait_for_copies();
        __syncthreads();  // and the tile before is done with
        prepare(from, backward);
        __syncthreads();
      }
      const bool same = step + 1 < steps;
      if (same || chunk > r.first) {
        const Window<C> next(s, same ? from + (backward ? -K : K) : (chunk - 1) * kChunk);
        const int sequences = same && step + 2 >= tiles ? Gated ? 6 : 5 : 3;
#pragma unroll 1
        for (int i = threadIdx.x / 32; i < sequences; i += C::kWarps) fetch(places[i], shared, next, whole(next));
      }
      if (step < 0) continue;
      if (step < tiles)
#pragma unroll 1
        for (int sub = 0; sub < kSubs; ++sub) {
#pragma unroll
          for (int i = 0; i < R; ++i)
#pragma unroll
            for (int j = 0; j < S; j += 4)
              *reinterpret_cast<float4*>(saved_at(at * kSubs + sub, i, j)) =
                  make_float4(h[i][j], h[i][j + 1], h[i][j + 2], h[i][j + 3]);
          if (backward && sub + 1 == kSubs) break;
#pragma unroll
          for (int t = 0; t < T; ++t) {
            const int row = sub * T + t;
            float d[R], x[R], Bv[S];
            load_pairs(row, d, x);
            load_floats<S>(my_B + row * C::kStateRow, Bv);
#pragma unroll
            for (int i = 0; i < R; ++i)
#pragma unroll
              for (int j = 0; j < S; ++j) h[i][j] = exp2_approx(d[i] * a2[i][j]) * h[i][j] + x[i] * Bv[j];
          }
        }
      if (!backward) continue;
#pragma unroll 1
      for (int sub = kSubs - 1; sub >= 0; --sub) {
        float gate[T][R][S], after[T][R][S];
        restore(at * kSubs + sub, h);
#pragma unroll
        for (int t = 0; t < T; ++t) {
          const int row = sub * T + t;
          float d[R], x[R], Bv[S], Cv[S], out[R] = {};
          load_pairs(row, d, x);
          load_floats<S>(my_B + row * C::kStateRow, Bv);
          if (Gated) load_floats<S>(my_C + row * C::kStateRow, Cv);
#pragma unroll
          for (int i = 0; i < R; ++i)
#pragma unroll
            for (int j = 0; j < S; ++j) {
              gate[t][i][j] = exp2_approx(d[i] * a2[i][j]);
              h[i][j] = gate[t][i][j] * h[i][j] + x[i] * Bv[j];
              after[t][i][j] = h[i][j];
              if (Gated) out[i] += h[i][j] * Cv[j];
            }
          if (Gated) {
            const int first = sum_over_lanes<R, C::kLanes, 1>(out);
            if (owns_sum<R, C::kLanes, 1>())
#pragma unroll
              for (int i = 0; i < kLeft<R, C::kLanes>; ++i) shared[M::kY + row * kRow + own + first + i] = out[i];
          }
        }
#pragma unroll
        for (int t = T - 1; t >= 0; --t) {
          const int row = sub * T + t;
          if (t == 0) restore(at * kSubs + sub, h);
          float d[R], x[R], gy[R], Bv[S], Cv[S], across[2 * R] = {}, products[2 * S] = {};
          load_pairs(row, d, x);
          load_floats<R>(shared + M::kGy + row * kRow + own, gy);
          load_floats<S>(my_B + row * C::kStateRow, Bv);
          load_floats<S>(my_C + row * C::kStateRow, Cv);
#pragma unroll
          for (int i = 0; i < R; ++i)
#pragma unroll
            for (int j = 0; j < S; ++j) {
              const float dh = gy[i] * Cv[j] + carry[i][j];
              products[j] += dh * x[i];
              products[S + j] += gy[i] * after[t][i][j];
              across[i] += dh * Bv[j];
              carry[i][j] = dh * gate[t][i][j];
              const float q = carry[i][j] * (t > 0 ? after[t - (t > 0)][i][j] : h[i][j]);
              across[R + i] += q * a2[i][j];
              dA[i][j] += q * d[i];
            }
          __syncwarp();  // its lanes have read Δ u, in whose place the gradient of Δ u goes
          const int first = sum_over_lanes<2 * R, C::kLanes, 1>(across);
          if (owns_sum<2 * R, C::kLanes, 1>())
#pragma unroll
            for (int v = 0; v < kLeft<2 * R, C::kLanes>; ++v) {
              const int i = (first + v) % R;
              shared[first + v < R ? M::kPairs + row * C::kPairRow + 2 * (own + i) + 1 : M::kDecay + row * kRow + own + i] =
                  across[v];
            }
          sum_over_channels<C>(products);
          float* to = shared + M::kSums + ((threadIdx.x / 32) * K + row) * C::kColumns + lane * S;
          const int channel_lane = threadIdx.x % 32 / C::kLanes;
          if (C::kChannelLanes > C::kOrders) {
            if (channel_lane < 2 * C::kOrders) to[(channel_lane >= C::kOrders ? C::kPadded : 0) + order] = products[0];
          } else {
#pragma unroll
            for (int v = 0; v < 2 * S; v += C::kOrders) to[v / S * C::kPadded + (v % S ^ order)] = products[v];
          }
        }
      }
      __syncthreads();

      // From the gradients of y, Δ u and the gates to those of the tensors.
      const Window<C> w(s, from);
      const int64_t part_at = from - r.first * kChunk;
      const Existing exists(w, mine < count);
      float du[kUnits][4], dd[kUnits][4], dz[kUnits][4], sum_D = 0, sum_bias = 0, sum_weight = 0;
      const float D = value(kD), weight = value(kWeight);
#pragma unroll
      for (int k = 0; k < kUnits; ++k) {
        const int token = 4 * (my_quad + k * kQuads);
        if (token >= K) break;
        const int e0 = row_of(token) * kRow + mine;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int e = e0 + j * next_row;
          const float2 pair = *reinterpret_cast<const float2*>(shared + M::kPairs + 2 * e);
          const float gy = shared[M::kGy + e], u = shared[M::kU + e];
          float v = (pair.y * u + shared[M::kDecay + e] * kLn2) * shared[M::kSlope + e];
          if (!exists(token + j)) v = 0;
          du[k][j] = pair.y * pair.x + D * gy, dd[k][j] = v;
          if (Gated) dz[k][j] = shared[M::kGate + e] * (shared[M::kY + e] + D * u);
          sum_D += gy * u, sum_bias += v;
          if (in.delta_weight)
            shared[M::kDecay + e] = v * weight, sum_weight += v * shared[M::kRankOne + row_of(token) + j * forward];
        }
      }
      if (helps) value(kSumD) += sum_D, value(kSumBias) += sum_bias, value(kSumWeight) += sum_weight;
      float* to = here->parts + part_at * C::kColumns;
#pragma unroll
      for (int i = 0; i < (K * C::kColumns / 4 + C::kThreads - 1) / C::kThreads; ++i) {
        const int e = 4 * (threadIdx.x + i * C::kThreads);
        if (e >= K * C::kColumns) break;
        float sum[4], more[4];
        load_floats<4>(shared + M::kSums + e, sum);
#pragma unroll
        for (int v = 1; v < C::kWarps; ++v) {
          load_floats<4>(shared + M::kSums + v * K * C::kColumns + e, more);
#pragma unroll
          for (int k = 0; k < 4; ++k) sum[k] += more[k];
        }
        *reinterpret_cast<float4*>(to + e) = make_float4(sum[0], sum[1], sum[2], sum[3]);
      }
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kUnits; ++k) {
        const int token = 4 * (my_quad + k * kQuads);
        if (token >= K) break;
        write(places[kDu], shared, mine, token, du[k]);
        if (!in.delta_weight) write(places[kDDelta], shared, mine, token, dd[k]);
        if (Gated) write(places[kDz], shared, mine, token, dz[k]);
      }
      if (in.delta_weight)
        for (int row = threadIdx.x; row < K; row += C::kThreads) {
          float sum = 0;
#pragma unroll 4
          for (int c = 0; c < C::kChannels; ++c) sum += shared[M::kDecay + row * kRow + c];
          here->weighted[part_at + row] = sum;
        }
      __syncthreads();
#pragma unroll 1
      for (int i = kDu + threadIdx.x / 32; i <= (Gated ? kDz : kDDelta); i += C::kWarps)
        if (i != kDDelta || !in.delta_weight) flush(places[i], shared, w, whole(w));
    }
  }

#pragma unroll
  for (int i = 0; i < R; ++i)
#pragma unroll
    for (int j = 0; j < S; ++j) {
      if (!has(i, j)) continue;
      ws.carry[state_at(part, dstate, i, j)] = carry[i][j];
      ws.sums[state_at(part, dstate + kMoreSums, i, j)] = dA[i][j];
      if (r.first == 0 && in.initial_state) a.d_initial_state[(batch * dim + row0 + own + i) * s.dstate + state(j)] = carry[i][j];
    }
  __syncthreads();
  if (my_quad > 0 || mine >= count) return;
#pragma unroll
  for (int v = 0; v < kMoreSums; ++v) {
    float* to = ws.sums + (part * (dstate + kMoreSums) + dstate + v) * dim + row0 + mine;
    float sum = round > 0 ? *to : 0.0f;
    for (int k = mine; k < C::kHelpers; k += C::kChannels) sum += shared[M::kOwn + v * C::kHelpers + k];
    *to = sum;
  }
}

template <class C, bool Gated>
constexpr size_t backward_shared() {
  constexpr size_t bytes = BackwardShared<C, Gated>::kFloats * sizeof(float);
  static_assert(bytes <= kMaxShared);
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
    const Sequence& q = kind == 0 ? dB : dC;
    const int64_t token = s.reverse ? s.seqlen - 1 - begin - row : begin + row;
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
