// selective_scan on a GPU: what its kernels share. How a block is laid out, tiles of sequences in shared memory, sums over lanes.
//
// A thread owns kStates states of one channel, in registers, for as many tokens as its block walks; the kLanes threads of a channel
// are neighbours in a warp. A block owns kChannels channels of one group and batch entry, which share the tile of B and C, and a
// segment of the sequence. So the recurrence needs no shuffle; sums over states (the output) and over channels (dB, dC) are taken
// for 8 tokens at a time by exchanging halves, where each step halves what is left to add.
//
// Tiles of kTokens tokens lie in shared memory as float32 [token in the scan's order][channel], rows one float longer than they
// need be: then neither channel-first nor channel-last input meets a bank conflict. Where the sequences are of one dtype and in one
// order, a kernel is compiled for these (Known); else (Mixed) they are told apart 4 elements at a time, which takes a hundred
// instructions where 20 would do. Tokens and channels beyond the end are zero, Δ included: their gate is 1 and their input 0, so
// that the scan runs over them without a condition.
#pragma once
#include <initializer_list>

#include "common/cuda_launch.cuh"
#include "common/cuda_math.cuh"
#include "common/cuda_sequence.cuh"
#include "selective_scan/selective_scan.h"

namespace autohdr {
namespace scan {

template <int States, int Lanes, int Threads, int Tokens>
struct Config {
  static constexpr int kStates = States, kLanes = Lanes, kThreads = Threads, kTokens = Tokens;
  static constexpr int kChannels = Threads / Lanes, kWarps = Threads / 32, kPadded = States * Lanes;
  static constexpr int kRow = kChannels + 1;                          // floats of a row of channels
  static constexpr int kStateRow = kPadded + 4;                       // floats of a row of states, aligned to 16 bytes
  static constexpr int kBlocks = Lanes == 4 ? 4 : Lanes < 4 ? 3 : 2;  // on a multiprocessor, by registers
  static constexpr int kEndsBlocks = Lanes <= 4 ? 3 : 2;              // the same of segment_ends
  static constexpr int kSub = 8;                                      // tokens whose sums are taken together
  static constexpr int kTile = kTokens * kRow, kStateTile = kTokens * kStateRow;
};

// f(the configuration for so many states).
template <class F>
void with_config(int64_t dstate, const F& f) {
  if (dstate <= 4) return f(Config<4, 1, 64, 16>{});
  if (dstate <= 8) return f(Config<4, 2, 128, 16>{});
  if (dstate <= 16) return f(Config<4, 4, 128, 32>{});
  if (dstate <= 64) return f(Config<4, 16, 128, 16>{});
  return f(Config<8, 32, 64, 8>{});
}

// How the work is split over blocks: `workers` for each group and batch entry, which take its tiles of channels in turn, times
// `segments` of `segment_chunks` chunks.
struct Split {
  int64_t tiles, workers, segments, segment_chunks;
  int64_t blocks(const ScanShape& s) const { return s.batch * s.groups * workers * segments; }
};

constexpr int kBlocksPerMultiprocessor = 4;

// One segment, a serial walk, costs one exponential for a state and token; more of them cost two, but fill the device. A block
// on every multiprocessor does more than half of what four do, so more segments pay only below that.
template <class C>
Split split_of(const ScanShape& s, int64_t most_workers, int64_t multiprocessors) {
  Split p;
  p.tiles = (s.channels + C::kChannels - 1) / C::kChannels;
  p.workers = p.tiles < most_workers ? p.tiles : most_workers;
  const int64_t blocks = s.batch * s.groups * p.workers, chunks = s.chunks();
  int64_t segments = blocks >= multiprocessors ? 1 : kBlocksPerMultiprocessor * multiprocessors / (blocks < 1 ? 1 : blocks);
  p.segment_chunks = (chunks + segments - 1) / segments;
  p.segments = (chunks + p.segment_chunks - 1) / p.segment_chunks;
  return p;
}

// What a block owns, from its index; the workers of one segment of one group are neighbours and read the same B and C.
struct Block {
  int64_t worker, group, batch, segment, first_chunk, last_chunk;
  __device__ Block(const ScanShape& s, const Split& p) {
    int64_t i = blockIdx.x;
    worker = i % p.workers, i /= p.workers;
    segment = i % p.segments, i /= p.segments;
    group = i % s.groups, batch = i / s.groups;
    first_chunk = segment * p.segment_chunks;
    last_chunk = min(first_chunk + p.segment_chunks, s.chunks());
  }
};

// kTokens tokens from the scan's index `from` on. Token `first + i` of the tensor is row i, or counted from the last one where
// the scan is reversed; some of them may lie outside of the tensor.
template <class C>
struct Window {
  int64_t first, seqlen;
  bool reverse;
  __device__ Window(const ScanShape& s, int64_t from)
      : first(s.reverse ? s.seqlen - from - C::kTokens : from), seqlen(s.seqlen), reverse(s.reverse) {}
  __device__ int row(int i) const { return reverse ? C::kTokens - 1 - i : i; }
  __device__ bool inside(int i) const { return first + i >= 0 && first + i < seqlen; }
  __device__ bool whole() const { return first >= 0 && first + C::kTokens <= seqlen; }
};

// What a kernel knows of its sequences when it is compiled: nothing, or that all are of type T and have their tokens (Along) or their
// channels beside each other.
struct Mixed {};
template <class T_, bool Along_>
struct Known {
  using T = T_;
  static constexpr bool Along = Along_;
};

// An element of a tile, and whether the tensor has it.
struct Element {
  int row, column;
  bool real;
};
// f(row, column, value, real) for each of some elements of a tile.
template <class F>
struct OneByOne {
  F f;
  template <int Count, class At>
  __device__ __forceinline__ void operator()(float (&v)[Count], const At& at) const {
#pragma unroll
    for (int k = 0; k < Count; ++k) f(at(k).row, at(k).column, v[k], at(k).real);
  }
};
template <class F>
OneByOne(F) -> OneByOne<F>;

// A tile of a sequence: the tokens of a window, `Columns` channels (or states) of which `columns` exist. A unit is 4 neighbours in
// memory, along the tokens or along the columns; a thread has kUnits of them. A tile that is whole and aligned is loaded by vectors:
// one condition for the whole block. Nothing is loaded ahead: the other blocks of the multiprocessor scan meanwhile.
template <class C, int Columns, class L>
struct Tile;

template <class C, int Columns>
struct Tile<C, Columns, Mixed> {
  static constexpr int kAcross = Columns < 4 ? Columns : 4;  // elements of a unit along the columns
  static constexpr int kUnits = (C::kTokens * Columns / kAcross + C::kThreads - 1) / C::kThreads;
  struct Unit {
    int token, column;
    bool real;
  };
  __device__ static __forceinline__ Unit unit(bool along_tokens, int k) {
    const int i = threadIdx.x + k * C::kThreads;
    if (along_tokens) return {i % (C::kTokens / 4) * 4, i / (C::kTokens / 4), i < C::kTokens / 4 * Columns};
    return {i / (Columns / kAcross), i % (Columns / kAcross) * kAcross, i < C::kTokens * (Columns / kAcross)};
  }
  __device__ static __forceinline__ bool by_vectors(const Sequence& s, int64_t offset, const Window<C>& w, int columns) {
    const int64_t size = s.dtype == Dtype::f32 ? 4 : 2, row = s.token == 1 ? s.channel : s.token;
    return kAcross == 4 && columns == Columns && w.first >= 0 && w.first + C::kTokens <= w.seqlen && row % 4 == 0 &&
           (reinterpret_cast<uintptr_t>(s.data) + (offset + w.first * s.token) * size) % (4 * size) == 0;
  }
  // f(element j, its place in memory) for those elements of a unit that exist.
  template <class F>
  __device__ static __forceinline__ void each_real(const Sequence& s, const Unit& u, const Window<C>& w, int columns,
                                                   const F& f) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int token = s.token == 1 ? u.token + j : u.token, column = s.token == 1 ? u.column : u.column + j;
      if (u.real && (s.token == 1 || j < kAcross) && w.inside(token) && column < columns)
        f(j, (w.first + token) * s.token + column * s.channel);
    }
  }
  // f(values, k -> the k-th's element), for some at a time.
  template <class F>
  __device__ static __forceinline__ void each(const Sequence& s, int64_t offset, const Window<C>& w, int columns, bool,
                                              const F& f) {
    const bool wide = s.dtype == Dtype::f32, vectors = by_vectors(s, offset, w, columns);
#pragma unroll 1
    for (int k = 0; k < kUnits; ++k) {
      const Unit u = unit(s.token == 1, k);
      if (!u.real) continue;
      const int64_t at = offset + (w.first + u.token) * s.token + u.column * s.channel;
      uint32_t raw[4] = {};  // as it lies in memory: 16 or 8 bytes
      if (vectors && wide) {
        const uint4 v = __ldg(reinterpret_cast<const uint4*>(static_cast<const float*>(s.data) + at));
        raw[0] = v.x, raw[1] = v.y, raw[2] = v.z, raw[3] = v.w;
      } else if (vectors) {
        const uint2 v = __ldg(reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(s.data) + at));
        raw[0] = v.x, raw[1] = v.y;
      } else {
        each_real(s, u, w, columns, [&](int j, int64_t e) {
          if (wide)
            raw[j] = float_to_bits(__ldg(static_cast<const float*>(s.data) + offset + e));
          else
            raw[j / 2] |= static_cast<uint32_t>(__ldg(static_cast<const uint16_t*>(s.data) + offset + e)) << 16 * (j % 2);
        });
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int token = s.token == 1 ? u.token + j : u.token, column = s.token == 1 ? u.column : u.column + j;
        const uint32_t high = j % 2 ? raw[j / 2] & 0xffff0000u : raw[j / 2] << 16;
        float v[1] = {wide ? bits_to_float(raw[j]) : s.dtype == Dtype::bf16 ? bits_to_float(high) : half_to_float(high >> 16)};
        if (s.token == 1 || j < kAcross)
          f(v, [&](int) { return Element{w.row(token), column, column < columns && w.inside(token)}; });
      }
    }
  }
  // Stores value(row, column).
  template <class F>
  __device__ static __forceinline__ void store(const Sequence& s, int64_t offset, const Window<C>& w, int columns, bool,
                                               const F& value) {
    const bool wide = s.dtype == Dtype::f32, vectors = by_vectors(s, offset, w, columns);
#pragma unroll 1
    for (int k = 0; k < kUnits; ++k) {
      const Unit u = unit(s.token == 1, k);
      if (!u.real) continue;
      const int64_t at = offset + (w.first + u.token) * s.token + u.column * s.channel;
      float v[4] = {};
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (s.token == 1 || j < kAcross)
          v[j] = s.token == 1 ? value(w.row(u.token + j), u.column) : value(w.row(u.token), u.column + j);
      if (vectors && wide)
        *reinterpret_cast<float4*>(static_cast<float*>(s.data) + at) = make_float4(v[0], v[1], v[2], v[3]);
      else if (vectors)
        *reinterpret_cast<uint2*>(static_cast<uint16_t*>(s.data) + at) =
            make_uint2(narrow(s.dtype, v[0]) | narrow(s.dtype, v[1]) << 16, narrow(s.dtype, v[2]) | narrow(s.dtype, v[3]) << 16);
      else
        each_real(s, u, w, columns, [&](int j, int64_t e) { store_one(s, offset + e, v[j]); });
    }
  }
};

template <class C, int Columns, class T, bool Along>
struct Tile<C, Columns, Known<T, Along>> {
  static constexpr int kElements = C::kTokens * Columns, kUnits = kElements / 4 / C::kThreads;
  static_assert(Columns % 4 == 0 && C::kTokens % 4 == 0 && kElements % (4 * C::kThreads) == 0);
  // f(k, the first element of its k-th unit), for a thread's units.
  template <class F>
  __device__ static __forceinline__ void each_unit(const F& f) {
#pragma unroll
    for (int k = 0; k < kUnits; ++k) f(k, 4 * (threadIdx.x + k * C::kThreads));
  }
  // Element e, counted along the axis that is contiguous in memory.
  __device__ static __forceinline__ int token(int e) { return Along ? e % C::kTokens : e / Columns; }
  __device__ static __forceinline__ int column(int e) { return Along ? e / C::kTokens : e % Columns; }
  __device__ static __forceinline__ int64_t place(const Sequence& s, const Window<C>& w, int e) {
    return (w.first + token(e)) * (Along ? 1 : s.token) + column(e) * (Along ? s.channel : 1);
  }
  // aligned: units of 4 elements lie at multiples of their size, in every window, and no column is missing.
  template <class F>
  __device__ static __forceinline__ void each(const Sequence& s, int64_t offset, const Window<C>& w, int columns, bool aligned,
                                              const F& f) {
    const T* data = static_cast<const T*>(s.data) + offset;
    if (aligned && w.whole()) {
      Piece<T, 4> pieces[kUnits];
      float v[4 * kUnits];
      each_unit([&](int k, int e) { pieces[k] = load_piece<4>(data + place(s, w, e)); });
#pragma unroll
      for (int k = 0; k < 4 * kUnits; ++k) v[k] = to_float(pieces[k / 4].v[k % 4]);
      f(v, [&](int k) {
        const int e = 4 * (threadIdx.x + k / 4 * C::kThreads) + k % 4;
        return Element{w.row(token(e)), column(e), true};
      });
    } else {
#pragma unroll 1
      for (int e = threadIdx.x; e < kElements; e += C::kThreads) {
        const bool real = column(e) < columns && w.inside(token(e));
        float v[1] = {real ? to_float(data[place(s, w, e)]) : 0.0f};
        f(v, [&](int) { return Element{w.row(token(e)), column(e), real}; });
      }
    }
  }
  template <class F>
  __device__ static __forceinline__ void store(const Sequence& s, int64_t offset, const Window<C>& w, int columns, bool aligned,
                                               const F& value) {
    s.dtype == Dtype::f32 ? store_as<float>(s, offset, w, columns, aligned, value)
                          : store_as<T>(s, offset, w, columns, aligned, value);
  }

 private:
  template <class Out, class F>
  __device__ static __forceinline__ void store_as(const Sequence& s, int64_t offset, const Window<C>& w, int columns,
                                                  bool aligned, const F& value) {
    Out* data = static_cast<Out*>(s.data) + offset;
    if (aligned && w.whole()) {
      each_unit([&](int, int e) {
        Piece<Out, 4> piece;
#pragma unroll
        for (int j = 0; j < 4; ++j) piece.v[j] = from_float<Out>(value(w.row(token(e + j)), column(e + j)));
        store_piece(data + place(s, w, e), piece);
      });
    } else {
#pragma unroll 1
      for (int e = threadIdx.x; e < kElements; e += C::kThreads)
        if (column(e) < columns && w.inside(token(e))) data[place(s, w, e)] = from_float<Out>(value(w.row(token(e)), column(e)));
    }
  }
};

// For `each`: some elements times those of a tile in shared memory; as elements of such a tile.
template <class C, int Count, class At>
__device__ __forceinline__ void multiply(float (&v)[Count], const At& at, const float* by) {
#pragma unroll
  for (int k = 0; k < Count; ++k) v[k] *= by[at(k).row * C::kRow + at(k).column];
}
template <class C, int Count, class At>
__device__ __forceinline__ void put(const float (&v)[Count], const At& at, float* to) {
#pragma unroll
  for (int k = 0; k < Count; ++k) to[at(k).row * C::kRow + at(k).column] = v[k];
}
template <int Count>
__device__ __forceinline__ void silu(float (&v)[Count]) {
#pragma unroll
  for (int k = 0; k < Count; ++k) v[k] *= sigmoid(v[k]);
}

// Whether a tile of `columns` of `Columns` is loaded by units of 4, where its window is whole; the same for all windows from w on.
template <class C, int Columns, class L>
__device__ __forceinline__ bool is_aligned(const Sequence& s, int64_t offset, const Window<C>& w, int columns) {
  const int64_t size = s.dtype == Dtype::f32 ? 4 : 2, row = s.token == 1 ? s.channel : s.token;
  return !std::is_same_v<L, Mixed> && columns == Columns && row % 4 == 0 &&
         (reinterpret_cast<uintptr_t>(s.data) + (offset + w.first * s.token) * size) % (4 * size) == 0;
}

// x becomes softplus(x) within a few units in the last place, slope its derivative; below -87 they stay what they are there. Above 20,
// where PyTorch's is the identity, what is added to x rounds off. Step by step for all of them, or the compiler waits for one after
// the other.
template <int Count>
__device__ __forceinline__ void softplus_and_slope(float (&x)[Count], float (&slope)[Count]) {
  float e[Count], r[Count];
#pragma unroll
  for (int k = 0; k < Count; ++k) e[k] = exp_in_range(fmaxf(-fabsf(x[k]), -87.0f));
#pragma unroll
  for (int k = 0; k < Count; ++k) r[k] = reciprocal_approx((1.0f + e[k]) * (2.0f + e[k]));
#pragma unroll
  for (int k = 0; k < Count; ++k) {
    const float q = e[k] * (r[k] * (1.0f + e[k])), q2 = q * q;
    slope[k] = (x[k] > 0.0f ? 1.0f : e[k]) * (r[k] * (2.0f + e[k]));
    x[k] = (x[k] < 0.0f ? 0.0f : x[k]) + 2.0f * q * AUTOHDR_ARTANH_BY_S(q2);
  }
}

// The tile of Δ; with rank one its row goes into `rank_one`, and there is a barrier inside.
template <class C, class L>
__device__ __forceinline__ void put_delta(const ScanShape& s, const ScanInputs& in, int64_t offset, const Window<C>& w,
                                          int channels, bool aligned, const float* weight, const float* bias, float* rank_one,
                                          float* delta) {
  const auto put = [&](auto& v, const auto& at) {
    constexpr int kCount = sizeof v / sizeof v[0];
#pragma unroll
    for (int k = 0; k < kCount; ++k) v[k] += bias[at(k).column];
    float slope[kCount];
    if (s.softplus) softplus_and_slope(v, slope);
#pragma unroll
    for (int k = 0; k < kCount; ++k) delta[at(k).row * C::kRow + at(k).column] = at(k).real ? v[k] : 0.0f;
  };
  if (!in.delta_weight) return Tile<C, C::kChannels, L>::each(in.delta, offset, w, channels, aligned, put);
  const int i = threadIdx.x;
  if (i < C::kTokens) rank_one[w.row(i)] = w.inside(i) ? load_one(in.delta, offset + (w.first + i) * in.delta.token) : 0.0f;
  __syncthreads();
#pragma unroll 1
  for (int e = threadIdx.x; e < C::kTokens * C::kChannels; e += C::kThreads) {
    const int row = e / C::kChannels, c = e % C::kChannels;
    float v[1] = {rank_one[row] * weight[c]};
    put(v, [&](int) { return Element{row, c, w.inside(w.row(row)) && c < channels}; });
  }
}

// A log2(e), kept finite: Δ = 0 beyond the end must leave the state alone even where A is infinite. A NaN stays one.
__device__ __forceinline__ float decay_rate(float a) {
  a *= kLog2e;
  return a < -FLT_MAX ? -FLT_MAX : a > FLT_MAX ? FLT_MAX : a;
}

// A thread's parameters, and the per-channel ones of its block in shared memory.
template <class C>
struct Channel {
  int64_t row;  // of the block's first channel, in all channels
  int count, lane, channel;
  bool real;  // whether this thread's channel exists

  __device__ Channel(const ScanShape& s, const Block& b, int64_t tile)
      : row(b.group * s.channels + tile * C::kChannels),
        count(static_cast<int>(min(s.channels - tile * C::kChannels, static_cast<int64_t>(C::kChannels)))),
        lane(threadIdx.x % C::kLanes), channel(threadIdx.x / C::kLanes), real(channel < count) {}
  __device__ int state(int j) const { return lane * C::kStates + j; }
  __device__ bool has(const ScanShape& s, int j) const { return real && state(j) < s.dstate; }
  __device__ void rates(const ScanShape& s, const ScanInputs& in, float* a2) const {
#pragma unroll
    for (int j = 0; j < C::kStates; ++j) a2[j] = has(s, j) ? decay_rate(in.A[(row + channel) * s.dstate + state(j)]) : 0.0f;
  }
  __device__ void parameters(const ScanInputs& in, float* weight, float* bias, float* D) const {
    for (int c = threadIdx.x; c < C::kChannels; c += C::kThreads) {
      weight[c] = in.delta_weight && c < count ? in.delta_weight[row + c] : 0.0f;
      bias[c] = in.delta_bias && c < count ? in.delta_bias[row + c] : 0.0f;
      D[c] = in.D && c < count ? in.D[row + c] : 0.0f;
    }
  }
  // Of a sequence's element at channel 0 of the tile and token 0.
  __device__ int64_t offset(const Block& b, const Sequence& s, int64_t tile) const {
    return b.batch * s.batch + b.group * s.group + tile * C::kChannels * s.channel;
  }
  __device__ int64_t delta_offset(const Block& b, const ScanInputs& in, int64_t tile) const {
    return in.delta_weight ? b.batch * in.delta.batch : offset(b, in.delta, tile);
  }
};
__device__ __forceinline__ int64_t state_offset(const Block& b, const Sequence& s) {
  return b.batch * s.batch + b.group * s.group;
}

template <class C>
__device__ __forceinline__ void load_states(const float* from, float (&v)[C::kStates]) {  // from shared memory, aligned
#pragma unroll
  for (int j = 0; j < C::kStates; j += 4) {
    const float4 four = *reinterpret_cast<const float4*>(from + j);
    v[j] = four.x, v[j + 1] = four.y, v[j + 2] = four.z, v[j + 3] = four.w;
  }
}

// Sums of v[0..Count) over the lanes that differ in the bits [Stride, Stride·Lanes): afterwards v[i], i < left, is the sum of
// value `first + i`; where Count < Lanes several lanes hold the same one. Returns first.
template <int Count, int Lanes, int Stride>
__device__ __forceinline__ int sum_over_lanes(float* v) {
  if constexpr (Lanes == 1) {
    return 0;
  } else {
    constexpr int kBit = Stride * Lanes / 2;
    if constexpr (Count == 1) {
      v[0] += __shfl_xor_sync(~0u, v[0], kBit);
      return sum_over_lanes<1, Lanes / 2, Stride>(v);
    } else {
      constexpr int kHalf = Count / 2;
      const bool upper = threadIdx.x & kBit;
#pragma unroll
      for (int i = 0; i < kHalf; ++i) {
        const float send = upper ? v[i] : v[kHalf + i], keep = upper ? v[kHalf + i] : v[i];
        v[i] = keep + __shfl_xor_sync(~0u, send, kBit);
      }
      return (upper ? kHalf : 0) + sum_over_lanes<kHalf, Lanes / 2, Stride>(v);
    }
  }
}
template <int Count, int Lanes>
constexpr int kLeft = Count > Lanes ? Count / Lanes : 1;

// Whether this lane is the first of those that hold the same sum.
template <int Count, int Lanes, int Stride>
__device__ __forceinline__ bool owns_sum() {
  return Count >= Lanes || (threadIdx.x / Stride) % (Lanes / Count < 1 ? 1 : Lanes / Count) == 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// Splitting the sequence. `ends` [batch, segments, dstate, dim] is first what a segment alone, from a zero state, leaves behind,
// then what comes into it; `steps` [batch, segments, dim] its sum of Δ. The product of a segment's gates is exp(A ΣΔ).

// A segment from zero: the scan's end state, or with Adjoint the gradient of the state before it, by the outputs in it. Blocks
// and threads as above; shared memory three tiles of channels and one of states.
template <class C, class L, bool Adjoint>
__global__ void __launch_bounds__(C::kThreads, C::kEndsBlocks)
    segment_ends(ScanShape s, ScanInputs in, Sequence d_out, Split p, float* ends, float* steps) {
  AUTOHDR_DYNAMIC_SHARED(float, shared);
  float *projection = shared, *delta = projection + C::kStateTile, *input = delta + C::kTile;
  float *rank_one = input + C::kTile, *weight = rank_one + C::kTokens, *bias = weight + C::kChannels, *D = bias + C::kChannels;
  const Block b(s, p);
  // The segment whose result nobody needs: the last in the direction of the walk.
  if (b.segment == (Adjoint ? 0 : p.segments - 1)) return;
  const int tiles =
      static_cast<int>((min(b.last_chunk * kChunk, s.seqlen) - b.first_chunk * kChunk + C::kTokens - 1) / C::kTokens);
  for (int64_t t = b.worker; t < p.tiles; t += p.workers) {
    const Channel<C> ch(s, b, t);
    float a2[C::kStates], h[C::kStates] = {}, total = 0;
    ch.rates(s, in, a2);
    __syncthreads();
    ch.parameters(in, weight, bias, D);
    const Sequence& of = Adjoint ? d_out : in.u;
    const Sequence& by = Adjoint ? in.C : in.B;
    using Channels = Tile<C, C::kChannels, L>;
    const Window<C> start(s, b.first_chunk * kChunk);
    const int dstate = static_cast<int>(s.dstate);
    const auto are_aligned = [&](const Sequence& q) {
      return is_aligned<C, C::kChannels, L>(q, ch.offset(b, q, t), start, ch.count);
    };
    const bool of_aligned = are_aligned(of), delta_aligned = are_aligned(in.delta),
               z_aligned = Adjoint && in.z.data && are_aligned(in.z);
    const bool by_aligned = is_aligned<C, C::kPadded, L>(by, state_offset(b, by), start, dstate);
    for (int i = 0; i < tiles; ++i) {
      const Window<C> w(s, b.first_chunk * kChunk + static_cast<int64_t>(Adjoint ? tiles - 1 - i : i) * C::kTokens);
      __syncthreads();
      put_delta<C, L>(s, in, ch.delta_offset(b, in, t), w, ch.count, delta_aligned, weight, bias, rank_one, delta);
      Tile<C, C::kPadded, L>::each(by, state_offset(b, by), w, dstate, by_aligned,
                                   OneByOne{[&](int row, int n, float v, bool) { projection[row * C::kStateRow + n] = v; }});
      __syncthreads();
      Channels::each(of, ch.offset(b, of, t), w, ch.count, of_aligned, [&](auto& v, const auto& at) {
        if (!Adjoint) multiply<C>(v, at, delta);
        put<C>(v, at, input);
      });
      __syncthreads();
      if (Adjoint && in.z.data) {
        Channels::each(in.z, ch.offset(b, in.z, t), w, ch.count, z_aligned, [&](auto& v, const auto& at) {
          silu(v);
          multiply<C>(v, at, input);
          put<C>(v, at, input);
        });
        __syncthreads();
      }
#pragma unroll 4
      for (int k = 0; k < C::kTokens; ++k) {
        const int row = Adjoint ? C::kTokens - 1 - k : k;
        const float d = delta[row * C::kRow + ch.channel], x = input[row * C::kRow + ch.channel];
        float v[C::kStates];
        load_states<C>(projection + row * C::kStateRow + ch.state(0), v);
        total += d;
#pragma unroll
        for (int j = 0; j < C::kStates; ++j) {
          const float gate = exp2_approx(d * a2[j]);
          h[j] = Adjoint ? gate * (h[j] + x * v[j]) : gate * h[j] + x * v[j];
        }
      }
    }
    const int64_t at = b.batch * p.segments + b.segment;
#pragma unroll
    for (int j = 0; j < C::kStates; ++j)
      if (ch.has(s, j)) ends[(at * s.dstate + ch.state(j)) * s.dim() + ch.row + ch.channel] = h[j];
    if (ch.real && ch.lane == 0) steps[at * s.dim() + ch.row + ch.channel] = total;
  }
}

template <class C>
constexpr size_t segment_ends_shared() {
  return (C::kStateTile + 2 * C::kTile + C::kTokens + 3 * C::kChannels) * sizeof(float);
}

// What comes into each segment, from what comes into the first (with `adjoint` the last). One thread a state and channel.
static __global__ void __launch_bounds__(256)
    carry_over(ScanShape s, int64_t segments, bool adjoint, const float* A, const float* first, const float* steps, float* ends) {
  const int64_t i = blockIdx.x * int64_t{256} + threadIdx.x, dim = s.dim();
  if (i >= s.batch * s.dstate * dim) return;
  const int64_t d = i % dim, n = i / dim % s.dstate, batch = i / (dim * s.dstate);
  const float a2 = decay_rate(A[d * s.dstate + n]);
  float h = first ? first[(batch * dim + d) * s.dstate + n] : 0.0f;
#pragma unroll 4
  for (int64_t k = 0; k < segments; ++k) {
    const int64_t at = batch * segments + (adjoint ? segments - 1 - k : k);
    float* end = ends + (at * s.dstate + n) * dim + d;
    // No state, no carry: the product of growing gates may be infinite where the states are not.
    const float next = k + 1 == segments ? 0.0f : *end + (h != 0.0f ? exp2_approx(a2 * steps[at * dim + d]) * h : 0.0f);
    *end = h;
    h = next;
  }
}

// f(Known, what all these sequences are), or f(Mixed). Most models have 16 states: for other numbers the kernels are not compiled twice.
template <class C, class F>
void with_layout(std::initializer_list<Sequence> sequences, const F& f) {
  const Sequence& first = *sequences.begin();
  bool same = C::kPadded == 16;
  for (const Sequence& q : sequences) same &= !q.data || (q.dtype == first.dtype && (q.token == 1) == (first.token == 1));
  if constexpr (C::kPadded == 16) {
    const auto with_type = [&](auto zero) {
      using T = decltype(zero);
      first.token == 1 ? f(Known<T, true>{}) : f(Known<T, false>{});
    };
    if (same && first.dtype == Dtype::f32) return with_type(float{});
    if (same && first.dtype == Dtype::bf16) return with_type(__nv_bfloat16{});
    if (same) return with_type(__half{});
  }
  f(Mixed{});
}

template <class C, bool Adjoint>
void find_carries(const ScanShape& s, const ScanInputs& in, const Sequence& d_out, const Split& p, const float* first,
                  float* ends, cudaStream_t stream) {
  float* steps = ends + s.batch * p.segments * s.dstate * s.dim();
  with_layout<C>({Adjoint ? d_out : in.u, in.delta_weight ? Sequence{} : in.delta, Adjoint ? in.C : in.B,
                  Adjoint ? in.z : Sequence{}},
                 [&](auto layout) {
                   launch(segment_ends<C, decltype(layout), Adjoint>, dim3(p.blocks(s)), dim3(C::kThreads),
                          segment_ends_shared<C>(), stream, s, in, d_out, p, ends, steps);
                 });
  launch(carry_over, dim3((s.batch * s.dstate * s.dim() + 255) / 256), dim3(256), 0, stream, s, p.segments, Adjoint, in.A, first,
         static_cast<const float*>(steps), ends);
}
inline int64_t carry_floats(const ScanShape& s, const Split& p) {
  return p.segments > 1 ? s.batch * p.segments * (s.dstate + 1) * s.dim() : 0;
}

}  // namespace scan
}  // namespace autohdr
