// selective_scan on a GPU: what its kernels share. How a block is laid out, tiles of sequences in shared memory, sums over lanes.
//
// A thread owns kStates states of a channel, in registers, for as many tokens as its block walks; the kLanes threads of a channel
// are neighbours in a warp. A block owns kChannels channels of one group and batch entry, which share the tile of B and C, and a
// segment of the sequence. So the recurrence needs no shuffle; sums over states (the output) and over channels (dB, dC) are taken
// by exchanging halves, where each step halves what is left to add.
//
// A tile of kTokens tokens is copied into shared memory as it lies in the tensor (RawTile), while the one before is scanned. From
// there a thread takes kRun neighbouring tokens of one channel, and leaves what the scan reads as float32. Where the sequences are
// of one dtype and in one order, a kernel is compiled for these (Known); else (Mixed) they are told apart when they are read. Tokens
// and channels beyond the end are zero, Δ included: their gate is 1 and their input 0, so that the scan runs over them without a
// condition.
#pragma once
#include <initializer_list>

#include "common/cuda_async.cuh"
#include "common/cuda_launch.cuh"
#include "common/cuda_math.cuh"
#include "common/cuda_sequence.cuh"
#include "selective_scan/selective_scan.h"

namespace autohdr {
namespace scan {

constexpr int round_up(int v, int to) { return (v + to - 1) / to * to; }
AUTOHDR_ANYWHERE constexpr int log2_of(int v) { return v < 2 ? 0 : 1 + log2_of(v / 2); }

template <int States, int Lanes, int Threads, int Tokens>
struct Config {
  static constexpr int kStates = States, kLanes = Lanes, kThreads = Threads, kTokens = Tokens;
  static constexpr int kChannels = Threads / Lanes, kPadded = States * Lanes;
  static constexpr int kStride = Lanes < 32 ? 2 : 1;                // between the lanes of a channel; see Walk
  static constexpr int kRun = Tokens < Lanes ? 1 : Tokens / Lanes;  // neighbouring tokens of its channel that a lane prepares
  static constexpr int kSub = Tokens < 16 ? 8 : 16;                 // tokens whose sums are taken together
  static constexpr int kPairRow = 2 * Tokens + 4;                   // of a channel's (Δ, input)
  static constexpr int kOrders = 1;                                 // of the states in a thread
  static constexpr int kStateRow = kPadded + 4;                     // floats of a row of states
  static constexpr int kPairTile = kChannels * kPairRow, kStateTile = Tokens * kStateRow;
  static constexpr int kBlocks = Lanes <= 4 ? 4 : 2;  // on a multiprocessor, by registers
  // Bytes behind a row of tokens of the tensor, against bank conflicts.
  AUTOHDR_ANYWHERE static constexpr int pad(int row) { return row % 128 == 0 ? 16 : 0; }
  static_assert(kThreads % kChannels == 0 && kTokens % kSub == 0 && kStates % 4 == 0);
};

// f(the configuration for so many states).
template <class F>
void with_config(int64_t dstate, const F& f) {
  if (dstate <= 4) return f(Config<4, 1, 64, 16>{});
  if (dstate <= 8) return f(Config<4, 2, 128, 16>{});
  if (dstate <= 16) return f(Config<4, 4, 128, 32>{});
  if (dstate <= 32) return f(Config<4, 8, 128, 16>{});
  if (dstate <= 64) return f(Config<4, 16, 128, 16>{});
  if (dstate <= 128) return f(Config<4, 32, 128, 8>{});
  return f(Config<8, 32, 64, 8>{});
}

// How the work is split over blocks: for each group and batch entry one a tile of channels and segment, of `segment_chunks` chunks.
struct Split {
  int64_t tiles, segments, segment_chunks;
  int64_t blocks(const ScanShape& s) const { return s.batch * s.groups * tiles * segments; }
};

// One segment, a serial walk, costs one exponential for a state and token; more of them cost two, but fill the device with held()
// blocks on every multiprocessor. One there does more than half of what all of them do, so more segments pay only below that.
template <class C, class F>
Split split_of(const ScanShape& s, int64_t multiprocessors, const F& held) {
  Split p;
  p.tiles = (s.channels + C::kChannels - 1) / C::kChannels;
  const int64_t blocks = s.batch * s.groups * p.tiles, chunks = s.chunks();
  const int64_t segments = blocks >= multiprocessors ? 1 : held() * multiprocessors / (blocks < 1 ? 1 : blocks);
  p.segment_chunks = (chunks + segments - 1) / segments;
  p.segments = (chunks + p.segment_chunks - 1) / p.segment_chunks;
  return p;
}

// What a block owns, from its index; the tiles of one segment of one group are neighbours and read the same B and C.
template <class C>
struct Block {
  int tile, segment, group;
  int64_t batch, row0;  // row0: the block's first channel, of all
  int channels;         // that exist
  int first_chunk, last_chunk;
  __device__ Block(const ScanShape& s, const Split& p, int64_t first_batch)
      : tile(blockIdx.x % static_cast<unsigned>(p.tiles)),
        segment(blockIdx.x / static_cast<unsigned>(p.tiles) % static_cast<unsigned>(p.segments)),
        group(blockIdx.x / static_cast<unsigned>(p.tiles * p.segments) % static_cast<unsigned>(s.groups)),
        batch(first_batch + blockIdx.x / static_cast<unsigned>(p.tiles * p.segments * s.groups)),
        row0(group * s.channels + static_cast<int64_t>(tile) * C::kChannels),
        channels(
            static_cast<int>(min(s.channels - static_cast<int64_t>(tile) * C::kChannels, static_cast<int64_t>(C::kChannels)))),
        first_chunk(static_cast<int>(segment * p.segment_chunks)),
        last_chunk(static_cast<int>(min(segment * p.segment_chunks + p.segment_chunks, s.chunks()))) {}
};

// The tokens of a tile, counted in the scan's order: `first` to `first + kTokens - 1` of the tensor, some of which may not exist.
template <class C>
struct Window {
  int64_t first, seqlen;
  bool whole;  // all of them exist
  __device__ Window(const ScanShape& s, int64_t tile, bool whole)
      : first(s.reverse ? s.seqlen - (tile + 1) * C::kTokens : tile * C::kTokens), seqlen(s.seqlen), whole(whole) {}
  __device__ bool inside(int i) const { return first + i >= 0 && first + i < seqlen; }
};

// What a kernel knows of its sequences when it is compiled: nothing, or that all are of type T and have their tokens (Along) or their
// channels beside each other.
struct Mixed {};
template <class T_, bool Along_>
struct Known {
  using T = T_;
  static constexpr bool Along = Along_;
};
template <class L>
constexpr bool is_narrow = false;  // all of them known to be of half precision
template <class T, bool Along>
constexpr bool is_narrow<Known<T, Along>> = sizeof(T) == 2;

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

// Which tokens of a window exist.
struct Existing {
  int first, count;
  template <class C>
  __device__ explicit Existing(const Window<C>& w) : first(w.first < 0 ? static_cast<int>(-w.first) : 0) {
    const int64_t end = w.seqlen - w.first;
    count = (end < C::kTokens ? static_cast<int>(end) : C::kTokens) - first;
  }
  __device__ bool operator()(int token) const { return static_cast<unsigned>(token - first) < static_cast<unsigned>(count); }
};

// ---------------------------------------------------------------------------------------------------------------------
// Between tensors and shared memory.

// Where a block finds a sequence. A row is what is contiguous: a column's tokens, or a token's columns (which are channels or states).
struct alignas(16) Place {
  char* origin;  // of the block's first column and token 0
  int64_t row;   // bytes from row to row
  int piece;     // log2 of the bytes that may be copied at once, 0 if not even 4
  Dtype dtype;   // asked for by Mixed alone, as
  bool along;    // whether tokens are contiguous
};

__device__ __forceinline__ uint32_t narrow_two(Dtype dtype, float low, float high) {
  uint32_t both;
  if (dtype == Dtype::bf16) {
    const __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
    memcpy(&both, &two, sizeof both);
  } else {
    const __half2 two = __floats2half2_rn(low, high);
    memcpy(&both, &two, sizeof both);
  }
  return both;
}

// A tile of `Columns` columns as it lies in the tensor, row by row in shared memory.
template <class C, class L, int Columns>
struct RawTile {
  static constexpr bool kKnown = !std::is_same_v<L, Mixed>;
  AUTOHDR_ANYWHERE static constexpr int padded(int row) { return row + (Columns <= 64 ? C::pad(row) : 0); }  // bytes
  static constexpr int bytes() {
    if constexpr (kKnown)
      return Columns * padded(C::kTokens * static_cast<int>(sizeof(typename L::T)));
    else
      return Columns * padded(C::kTokens * 4);
  }
  static constexpr int kFloats = round_up(bytes(), 16) / 4;

  __device__ static Dtype dtype(const Place& p) {
    if constexpr (!kKnown)
      return p.dtype;
    else
      return sizeof(typename L::T) == 4 ? Dtype::f32 : std::is_same_v<typename L::T, __nv_bfloat16> ? Dtype::bf16 : Dtype::f16;
  }
  __device__ static bool along(const Place& p) {
    if constexpr (kKnown)
      return L::Along;
    else
      return p.along;
  }
  __device__ static int log2_size(const Place& p) { return dtype(p) == Dtype::f32 ? 2 : 1; }
  __device__ static int log2_length(const Place& p) { return along(p) ? log2_of(C::kTokens) : log2_of(Columns); }  // of a row
  __device__ static int pitch(const Place& p) {
    const int row = 1 << (log2_length(p) + log2_size(p));
    return along(p) ? padded(row) : row;
  }

  __device__ static Place place(const ScanShape& s, const Sequence& q, int64_t offset, int columns) {
    Place p;
    p.dtype = q.dtype, p.along = q.token == 1;
    const int size = 1 << log2_size(p);
    p.origin = static_cast<char*>(q.data) + offset * size;
    p.row = (along(p) ? q.channel : q.token) * size;
    // Windows lie whole windows from one end.
    const uintptr_t aligned = reinterpret_cast<uintptr_t>(p.origin + (s.reverse ? s.seqlen * q.token * size : 0)) |
                              static_cast<uintptr_t>(p.row) | static_cast<uintptr_t>(pitch(p)) | (along(p) ? 0 : columns * size);
    p.piece = aligned % 16 == 0 ? 4 : aligned % 8 == 0 ? 3 : aligned % 4 == 0 ? 2 : 0;
    return p;
  }

  // Where in the tensor a thread begins to copy: its first 16 bytes of a tile of token 0 on. For windows that are whole, with p.piece 4.
  struct Cursor {
    const char* from;
    int64_t row;
  };
  AUTOHDR_ANYWHERE static constexpr int pieces() {
    return (L::Along ? C::kTokens : Columns) * static_cast<int>(sizeof(typename L::T)) / 16;
  }
  __device__ static Cursor cursor(const Place& p) {
    const int row = threadIdx.x / pieces(), piece = threadIdx.x % pieces();
    return {p.origin + row * p.row + 16 * piece, p.row};
  }
  // `fetch`, from there.
  __device__ static __forceinline__ void fetch(const Cursor& from, char* raw, const Window<C>& w, int columns) {
    constexpr int kPieces = pieces(), kRows = L::Along ? Columns : C::kTokens, kStep = C::kThreads / kPieces;
    constexpr int kSize = sizeof(typename L::T), kPitch = L::Along ? padded(kPieces * 16) : kPieces * 16;
    static_assert(C::kThreads % kPieces == 0);
    const int row = threadIdx.x / kPieces, piece = threadIdx.x % kPieces;
    const char* at = from.from + (L::Along ? w.first * kSize : w.first * from.row);
#pragma unroll
    for (int k = 0; k * kStep < kRows; ++k)
      if (row + k * kStep < (L::Along ? columns : kRows) && (L::Along || piece * 16 < columns * kSize))
        copy_async<uint4>(raw + (row + k * kStep) * kPitch + 16 * piece, at + k * kStep * from.row);
  }

  // The block's threads send for a window's columns that exist; by_vectors: it is whole, and p.piece is 4. Tokens that do not exist are
  // zero.
  __device__ static __forceinline__ void fetch(const Place& p, char* raw, const Window<C>& w, int columns, bool by_vectors) {
    if (by_vectors) return copy<uint4>(p, raw, w, columns);
    if (w.whole && p.piece == 4)
      copy<uint4>(p, raw, w, columns);
    else if (w.whole && p.piece == 3)
      copy<uint2>(p, raw, w, columns);
    else if (w.whole && p.piece == 2)
      copy<uint32_t>(p, raw, w, columns);
    else if (dtype(p) == Dtype::f32)
      load<uint32_t>(p, raw, w, columns);
    else
      load<uint16_t>(p, raw, w, columns);
  }
  // A column's tokens first ... first + Count - 1 of the window, in the tensor's order.
  template <int Count>
  __device__ static __forceinline__ void read(const Place& p, const char* raw, int column, int first, float (&v)[Count]) {
    const int size = 1 << log2_size(p);
    if (!along(p)) return read_apart(p, raw + first * pitch(p) + column * size, pitch(p), v);
    read_together(p, raw + column * pitch(p) + first * size, v);
  }
  // The same of a token's columns.
  template <int Count>
  __device__ static __forceinline__ void read_columns(const Place& p, const char* raw, int first, int token, float (&v)[Count]) {
    const int size = 1 << log2_size(p);
    if (along(p)) return read_apart(p, raw + first * pitch(p) + token * size, pitch(p), v);
    read_together(p, raw + token * pitch(p) + first * size, v);
  }
  // Where a column's token 0 lies in the tensor, and a token `count` further on.
  __device__ static __forceinline__ char* start(const Place& p, int column) { return element(p, 0, column); }
  __device__ static __forceinline__ int64_t along_tokens(const Place& p, int64_t count) {
    return along(p) ? count << log2_size(p) : count * p.row;
  }
  // Stores those tokens of a column which exist; to: where the first of them lies, which is `first` in the window.
  template <int Count>
  __device__ static __forceinline__ void store(const Place& p, const Window<C>& w, char* to, int first, bool by_vectors,
                                               const float (&v)[Count]) {
    const bool wide = dtype(p) == Dtype::f32;
    if constexpr (Count % 4 == 0)
      if (along(p) && by_vectors) {
        if (wide) {
#pragma unroll
          for (int j = 0; j < Count; j += 4)
            store_word(to + 4 * j, make_uint4(float_to_bits(v[j]), float_to_bits(v[j + 1]), float_to_bits(v[j + 2]),
                                              float_to_bits(v[j + 3])));
          return;
        }
        const auto two = [&](int j) { return narrow_two(dtype(p), v[j], v[j + 1]); };
        if constexpr (Count % 8 == 0) {
#pragma unroll
          for (int j = 0; j < Count; j += 8) store_word(to + 2 * j, make_uint4(two(j), two(j + 2), two(j + 4), two(j + 6)));
        } else {
#pragma unroll
          for (int j = 0; j < Count; j += 4) store_word(to + 2 * j, make_uint2(two(j), two(j + 2)));
        }
        return;
      }
    const Existing exists(w);
#pragma unroll
    for (int j = 0; j < Count; ++j) {
      if (!exists(first + j)) continue;
      char* at = to + along_tokens(p, j);
      if (wide)
        *reinterpret_cast<float*>(at) = v[j];
      else
        *reinterpret_cast<uint16_t*>(at) = static_cast<uint16_t>(narrow(dtype(p), v[j]));
    }
  }
  template <int Count>
  __device__ static __forceinline__ void store(const Place& p, const Window<C>& w, int column, int first, bool by_vectors,
                                               const float (&v)[Count]) {
    store(p, w, element(p, w.first + first, column), first, by_vectors, v);
  }

 private:
  __device__ static __forceinline__ char* element(const Place& p, int64_t token, int column) {
    const int64_t row = along(p) ? column : token, at = along(p) ? token : column;
    return p.origin + row * p.row + (at << log2_size(p));
  }
  template <class Word>
  __device__ static __forceinline__ void copy(const Place& p, char* raw, const Window<C>& w, int columns) {
    constexpr int kLog2Word = log2_of(sizeof(Word));
    const int log2_across = log2_length(p) + log2_size(p) - kLog2Word, words = Columns * C::kTokens >> (kLog2Word - log2_size(p));
#pragma unroll 2
    for (int k = 0; k * C::kThreads < words; ++k) {
      const int i = threadIdx.x + k * C::kThreads, row = i >> log2_across, at = (i & ((1 << log2_across) - 1)) << kLog2Word;
      if (words % C::kThreads != 0 && i >= words) break;
      if (along(p) ? row < columns : at < columns << log2_size(p))
        copy_async<Word>(raw + row * pitch(p) + at, along(p) ? element(p, w.first, row) + at : element(p, w.first + row, 0) + at);
    }
  }
  template <class T>
  __device__ static __forceinline__ void load(const Place& p, char* raw, const Window<C>& w, int columns) {
#pragma unroll 1
    for (int e = threadIdx.x; e < Columns * C::kTokens; e += C::kThreads) {
      const int row = e >> log2_length(p), at = e & ((1 << log2_length(p)) - 1);
      const int token = along(p) ? at : row, column = along(p) ? row : at;
      if (column >= columns) continue;
      const T* from = reinterpret_cast<const T*>(element(p, w.first + token, column));
      reinterpret_cast<T*>(raw + row * pitch(p))[at] = w.inside(token) ? __ldg(from) : T{0};
    }
  }
  __device__ static __forceinline__ float widen(const Place& p, uint32_t low) {
    return dtype(p) == Dtype::bf16 ? bits_to_float(low << 16) : half_to_float(low);
  }
  template <int Count>
  __device__ static __forceinline__ void read_together(const Place& p, const char* from, float (&v)[Count]) {
    if (dtype(p) == Dtype::f32) return load_floats<Count>(reinterpret_cast<const float*>(from), v);
    if constexpr (Count == 1) return read_apart(p, from, 0, v);
    float words[Count / 2 + 1];
    load_floats<Count / 2>(reinterpret_cast<const float*>(from), words);
#pragma unroll
    for (int j = 0; j < Count; j += 2) {
      const uint32_t two = float_to_bits(words[j / 2]);
      v[j] = widen(p, two & 0xffffu), v[j + 1] = widen(p, two >> 16);
    }
  }
  template <int Count>
  __device__ static __forceinline__ void read_apart(const Place& p, const char* from, int stride, float (&v)[Count]) {
#pragma unroll
    for (int j = 0; j < Count; ++j) {
      const char* at = from + j * stride;
      v[j] = dtype(p) == Dtype::f32 ? *reinterpret_cast<const float*>(at) : widen(p, *reinterpret_cast<const uint16_t*>(at));
    }
  }
};

// What a block does with its sequences whatever it scans them for: C is its configuration, L what is known of them, and their places
// lie at Places in shared memory.
template <class C, class L, int Places>
struct Tiles {
  using Channels = RawTile<C, L, C::kChannels>;
  using States = RawTile<C, L, C::kPadded>;
  using RankOne = RawTile<C, Mixed, 1>;
  static constexpr int kTokens = C::kTokens;

  const ScanShape& s;
  const ScanInputs& in;
  float* const shared;
  const Block<C> b;
  const int64_t dim;
  const int dstate;

  __device__ Tiles(const ScanShape& s, const ScanInputs& in, const Split& p, float* shared, int64_t first_batch)
      : s(s), in(in), shared(shared), b(s, p, first_batch), dim(s.dim()), dstate(static_cast<int>(s.dstate)) {}

  __device__ Place& place(int sequence) const { return reinterpret_cast<Place*>(shared + Places)[sequence]; }
  __device__ char* raw(int at) const { return reinterpret_cast<char*>(shared + at); }

  // Thread i places sequence i, if there is one.
  template <class Tile>
  __device__ __forceinline__ void put(int i, const Sequence& q, int64_t first, int columns) const {
    if (threadIdx.x == i && q.data) place(i) = Tile::place(s, q, b.batch * q.batch + first, columns);
  }
  template <class Tile = Channels>
  __device__ __forceinline__ void put_channels(int i, const Sequence& q) const {
    put<Tile>(i, q, b.group * q.group + b.tile * (C::kChannels * q.channel), b.channels);
  }
  __device__ __forceinline__ void put_states(int i, const Sequence& q) const { put<States>(i, q, b.group * q.group, dstate); }
  __device__ __forceinline__ void put_delta(int i) const {
    if (in.delta_weight)
      put<RankOne>(i, in.delta, 0, 1);
    else
      put_channels(i, in.delta);
  }

  __device__ __forceinline__ void fetch_channels(int i, int to, const Window<C>& w, bool by_vectors) const {
    Channels::fetch(place(i), raw(to), w, b.channels, by_vectors);
  }
  __device__ __forceinline__ void fetch_states(int i, int to, const Window<C>& w, bool by_vectors) const {
    States::fetch(place(i), raw(to), w, dstate, by_vectors);
  }
  __device__ __forceinline__ void fetch_delta(int i, int to, const Window<C>& w, bool by_vectors) const {
    if (in.delta_weight)
      RankOne::fetch(place(i), raw(to), w, 1, by_vectors);
    else
      fetch_channels(i, to, w, by_vectors);
  }

  // From a raw tile of B or C to rows of float32 states, once in each order that a thread may have: four states of two tokens a thread.
  // kBoth: and from that of the next sequence, so many floats behind it, to rows so many behind these. flip: rows are the tokens from
  // the last to the first.
  template <bool kBoth>
  __device__ __forceinline__ void prepare_states(int sequence, const char* from, int to, bool flip) const {
    constexpr int kTwos = kTokens / 2, kItems = kTwos * C::kPadded / 4, kAll = kBoth ? 2 * kItems : kItems;
#pragma unroll 1
    for (int k = 0; k * C::kThreads < kAll; ++k) {
      const int i = threadIdx.x + k * C::kThreads, token = i % kTwos * 2, n = i / kTwos % (C::kPadded / 4) * 4;
      if (kAll % C::kThreads != 0 && i >= kAll) break;
      const bool second = kBoth && i >= kItems;
      const Place& p = place(sequence + second);
      const char* tile = second ? from + 4 * States::kFloats : from;
      float v[2][4];
      if (States::along(p)) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float two[2];
          States::read(p, tile, n + j, token, two);
          v[0][j] = two[0], v[1][j] = two[1];
        }
      } else {
        States::read_columns(p, tile, n, token, v[0]), States::read_columns(p, tile, n, token + 1, v[1]);
      }
      float* row = shared + (second ? to + C::kStateTile : to) + (flip ? kTokens - 1 - token : token) * C::kStateRow + n;
#pragma unroll
      for (int two = 0; two < 2; ++two, row += flip ? -C::kStateRow : C::kStateRow)
#pragma unroll
        for (int order = 0; order < C::kOrders; ++order)
          *reinterpret_cast<float4*>(row + order * C::kPadded) =
              make_float4(v[two][order], v[two][1 ^ order], v[two][2 ^ order], v[two][3 ^ order]);
    }
  }
};

// log(1 + e) / e of e in [0, 1], by least largest relative error (3e-8), exactly 1 at 0.
__device__ __forceinline__ float log1p_by(float e) {
  const float p = 0.191536561f + e * (-0.137538031f + e * (0.0792045519f + e * (-0.030065801f + e * 0.00536482641f)));
  return 1.0f + e * (-0.499996483f + e * (0.33321324f + e * (-0.248571634f + e * p)));
}

// x becomes softplus(x) within a few units in the last place, slope its derivative where Slope; below -87 they stay what they are
// there. Narrow, for what becomes half precision: within 2e-6, relatively, down to -20. Above 20, where PyTorch's is the identity, what
// is added to x rounds off. Step by step for all of them, or the compiler waits for one after the other.
template <bool Slope, bool Narrow, int Count>
__device__ __forceinline__ void softplus(float (&x)[Count], float* slope) {
  float e[Count];
#pragma unroll
  for (int k = 0; k < Count; ++k) e[k] = Narrow ? exp2_approx(-fabsf(x[k]) * kLog2e) : exp_in_range(fmaxf(-fabsf(x[k]), -87.0f));
#pragma unroll
  for (int k = 0; k < (Slope ? Count : 0); ++k) slope[k] = (x[k] > 0.0f ? 1.0f : e[k]) * reciprocal_approx(1.0f + e[k]);
#pragma unroll
  for (int k = 0; k < Count; ++k) {
    const float positive = Narrow ? fmaxf(x[k], 0.0f) : x[k] < 0.0f ? 0.0f : x[k];  // a NaN is in e, or here
    x[k] = fmaf(e[k], log1p_by(e[k]), positive);
  }
}

// A log2(e), kept finite: Δ = 0 beyond the end must leave the state alone even where A is infinite. A NaN stays one.
__device__ __forceinline__ float decay_rate(float a) {
  a *= kLog2e;
  return a < -FLT_MAX ? -FLT_MAX : a > FLT_MAX ? FLT_MAX : a;
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

}  // namespace scan
}  // namespace autohdr
