// Matrix products between pixels and channels on the tensor cores: product over the channels, outer over the pixels. Both operands
// come by asynchronous copies, two tiles ahead. Operands' rows lie on 16 bytes and hold zeros up to a whole piece.
#pragma once
#include <algorithm>

#include "common/cuda_async.cuh"
#include "common/cuda_mma.cuh"
#include "common/cuda_tf32.h"
#include "common/cuda_view.cuh"

namespace autohdr {
namespace image {

// Where column n of those that a warp multiplies, 8·tiles, has its row in the right operand's tile, so that a thread's sums are of
// 2·tiles neighbours.
__device__ __forceinline__ int place_of(int n, int tiles) {
  return n / (8 * tiles) * 8 * tiles + n % (2 * tiles) / 2 * 8 + n % (8 * tiles) / (2 * tiles) * 2 + n % 2;
}

constexpr int kStages = 3;  // tiles of a product in shared memory: one is multiplied, the others are on their way

// ---------------------------------------------------------------------------------------------------------------------
// product: Σ_k a[p][k]·w[n][k] for every image and head, of which an epilogue makes the output.

template <class T>
struct Product {
  Matrices<const T> a, w;
  int64_t pixels;
  int k, n, heads;
};

// Epilogues: what becomes of the sums of 8 neighbouring columns of a pixel. Held is what they need from memory, which is loaded for
// kAtOnce of a thread's 8 pixels together; columns beyond n are not touched. kGoesOn: whether it leaves enough registers for a block to
// go on to other pixels. kResults: how many of the 8 it leaves in front, as so many columns of the output.
struct Plain {
  static constexpr int kResults = 8;
  static constexpr bool kGoesOn = true;
  static constexpr int kAtOnce = 8;
  struct Held {};
  struct Columns {};
  __device__ Columns columns(int64_t, int64_t, int64_t, int, int) const { return {}; }
  __device__ Held load(const Columns&, int64_t, int) const { return {}; }
  static __device__ void apply(const Columns&, const Held&, float (&)[8]) {}
};

// Rounded to TF32, an operand of another product.
struct InTf32 : Plain {
  static __device__ void apply(const Columns&, const Held&, float (&v)[8]) {
#pragma unroll
    for (int e = 0; e < 8; ++e) v[e] = __uint_as_float(tf32_operand(v[e]));
  }
};

// + residual.
template <class T>
struct Plus {
  static constexpr int kResults = 8;
  static constexpr bool kGoesOn = false;
  static constexpr int kAtOnce = 4, kSize = Piece<T>::kSize;
  Matrices<const T> residual;
  struct Held {
    Piece<T> pieces[8 / kSize];
    __device__ __forceinline__ float at(int e) const { return to_float(pieces[e / kSize].v[e % kSize]); }
  };
  struct Columns {
    const T* at;
    int64_t of_row;
  };
  __device__ __forceinline__ Columns columns(int64_t image, int64_t head, int64_t row, int column, int) const {
    return {residual.of(image, head) + row * residual.of_row + column, residual.of_row};
  }
  __device__ __forceinline__ Held load(const Columns& c, int64_t row, int count) const {
    Held held;
#pragma unroll
    for (int i = 0; i < 8; i += kSize)
      if (i < count) held.pieces[i / kSize] = *reinterpret_cast<const Piece<T>*>(c.at + row * c.of_row + i);
    return held;
  }
  static __device__ __forceinline__ void apply(const Columns&, const Held& held, float (&v)[8]) {
#pragma unroll
    for (int e = 0; e < 8; ++e) v[e] += held.at(e);
  }
};

// · factor, + scale · residual; factor and scale are [image][head][n].
template <class T>
struct ScaledPlus {
  static constexpr int kResults = 8;
  static constexpr bool kGoesOn = false;
  static constexpr int kAtOnce = 2;
  Plus<T> plus;
  const float *factor, *scale;
  using Held = typename Plus<T>::Held;
  struct Columns {
    typename Plus<T>::Columns plus;
    float factor[8], scale[8];
  };
  __device__ __forceinline__ Columns columns(int64_t image, int64_t head, int64_t row, int column, int n) const {
    Columns c{plus.columns(image, head, row, column, n), {}, {}};
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int64_t at = static_cast<int64_t>(blockIdx.z) * n + column + e;
      if (column + e < n) c.factor[e] = factor[at], c.scale[e] = scale[at];
    }
    return c;
  }
  __device__ __forceinline__ Held load(const Columns& c, int64_t row, int count) const { return plus.load(c.plus, row, count); }
  static __device__ __forceinline__ void apply(const Columns& c, const Held& held, float (&v)[8]) {
#pragma unroll
    for (int e = 0; e < 8; ++e) v[e] = v[e] * c.factor[e] + held.at(e) * c.scale[e];
  }
};

// A block owns kN columns of 128 pixels, and may go on to others; a warp multiplies 64 × kWarpColumns at a time: the more, the fewer
// operands it loads. A tile's rows are 64 bytes along k, of float32 128, whose pieces change places by row so that no two that are
// read together share banks. Rows of w are stored in an order that leaves 8 neighbouring columns in a thread. w_tiles: of w that
// shared memory holds: all, which are then loaded once, or kStages. The tensor cores cut where an addition rounds, which the rounded
// operands of the other elements outweigh: sums of float32 are of one tile, and added to others.
constexpr int kProductRows = 128;
template <class Element>
constexpr bool kSplits = std::is_same_v<Element, float>;  // its operands
template <class Element>
constexpr int kTileBytes = kSplits<Element> ? 128 : 64;  // of a row
template <class Element>
constexpr int kProductChunk = kTileBytes<Element> / sizeof(Stored<Element>);
template <class Element, int kN>
constexpr int kWarpColumns = !kSplits<Element> && kN > 64 ? 64 : 32;
template <class Element, int kN>
constexpr int kProductThreads = kProductRows / 64 * kN / kWarpColumns<Element, kN> * 32;
// That a multiprocessor holds, for their registers; rounding to TF32 takes some too.
template <class Element, int kN>
constexpr int kProductBlocks = kSplits<Element> || kN > 64     ? 256 / kProductThreads<Element, kN>
                               : std::is_same_v<Element, Tf32> ? 3
                                                               : 4;
template <class Element, class Out, int kN, class Epilogue>
__global__ void __launch_bounds__(kProductThreads<Element, kN>, kProductBlocks<Element, kN>)
    multiply(Product<Stored<Element>> p, Matrices<Out> out, Epilogue epilogue, int w_tiles) {
  AUTOHDR_DYNAMIC_SHARED(unsigned char, shared);
  using T = Stored<Element>;
  constexpr int kRow = kTileBytes<Element>, kTile = kProductRows * kRow, kRight = kN * kRow, kChunk = kProductChunk<Element>,
                kLoadRows = kProductThreads<Element, kN> / 4;  // that are loaded at once
  constexpr int kColumns = kWarpColumns<Element, kN>, kSize = Piece<T>::kSize, kSteps = kRow / 32,
                kTogether = kSplits<Element> ? kSteps : 1;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, m0 = warp % 2 * 64, n0 = warp / 2 * kColumns;
  const int tiles = (p.n + kN - 1) / kN, first_n = blockIdx.x % tiles * kN, first_pixel = blockIdx.x / tiles * kProductRows,
            stride = gridDim.x / tiles * kProductRows, chunks = (p.k + kChunk - 1) / kChunk;
  const int64_t image = blockIdx.z / p.heads, head = blockIdx.z % p.heads;

  // What this thread copies: every fourth piece of some rows of a and of w.
  const int row = threadIdx.x / 4, piece = threadIdx.x % 4;
  const auto place = [](int row, int piece) { return row * kRow + (piece ^ row / (128 / kRow) % (kRow / 16)) * 16; };
  const T* a = p.a.of(image, head) + (int64_t{first_pixel} + row) * p.a.of_row + piece * kSize;
  const int columns_left = p.n - first_n;
  const T* w = p.w.of(image, head) + int64_t{first_n + row} * p.w.of_row + piece * kSize;
  const int a_step = static_cast<int>(p.a.of_row) * kLoadRows, w_step = static_cast<int>(p.w.of_row) * kLoadRows;
  const int a_place = place(row, piece), w_place = kStages * kTile + place(place_of(row, 4), piece);
  const int w_end = w_tiles * kRight;
  int loaded = 0, to_load = static_cast<int>(p.pixels) - first_pixel - row, a_next = 0, w_next = 0;  // loaded: along k
  bool w_there = false;
  const auto load = [&] {
    if (to_load + row > 0) {
#pragma unroll
      for (int turn = 0; turn < kRow / 64; ++turn) {
        const int more = turn * 4 * kSize;
        const bool inside = loaded + piece * kSize + more < p.k;
#pragma unroll
        for (int i = 0; i < kProductRows / kLoadRows; ++i)
          copy_async_or_zero(shared + (a_place + a_next ^ turn * 64) + i * kLoadRows * kRow, a + more + i * a_step,
                             inside && i * kLoadRows < to_load);
        if (!w_there)
#pragma unroll
          for (int i = 0; i < kN / kLoadRows; ++i)
            copy_async_or_zero(shared + (w_place + w_next ^ turn * 64) + i * kLoadRows * kRow, w + loaded + more + i * w_step,
                               inside && row + i * kLoadRows < columns_left);
      }
      a += kChunk, loaded += kChunk;
      if (!Epilogue::kGoesOn && loaded >= p.k) to_load = -row;
      if (Epilogue::kGoesOn && loaded >= p.k) {
        w_there = w_tiles == chunks, to_load -= stride;
        a += stride * p.a.of_row - loaded, loaded = 0;
      }
    }
    commit_copies();
    a_next = a_next == 2 * kTile ? 0 : a_next + kTile;
    w_next = w_next + kRight == w_end ? 0 : w_next + kRight;
  };

  // Of a step's pieces the places differ from the first one's in bits of their own.
  const int left_place = place(m0 + left_lane().row, left_lane().piece),
            right_place = kStages * kTile + place(n0 + right_lane().row, right_lane().piece);
  // The thread's rows are 8 apart.
  const int first_row = m0 + lane / 4, first_column = first_n + n0 + lane % 4 * 8;
  load();
  load();
  int a_now = 0, w_now = 0;
  for (int pixel = first_pixel; pixel < p.pixels; pixel += stride) {
    float sums[4][kColumns / 8][4] = {};
    for (int chunk = 0; chunk < chunks; ++chunk) {
      wait_for_groups<kStages - 2>();
      __syncthreads();
      load();
      if (n0 < columns_left) {
#pragma unroll
        for (int step = 0; step < kSteps; step += kTogether) {
          uint32_t right[kColumns / 16][kTogether][4];
#pragma unroll
          for (int j = 0; j < kColumns / 16; ++j)
#pragma unroll
            for (int s = 0; s < kTogether; ++s)
              load_matrices(right[j][s], shared + (right_place + w_now ^ (step + s) * 32) + j * 16 * kRow);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            uint32_t left[kTogether][4];
#pragma unroll
            for (int s = 0; s < kTogether; ++s)
              load_matrices(left[s], shared + (left_place + a_now ^ (step + s) * 32) + i * 16 * kRow);
#pragma unroll
            for (int j = 0; j < kColumns / 8; ++j) {
              float part[4] = {};
              float (&to)[4] = kTogether > 1 ? part : sums[i][j];
#pragma unroll
              for (int s = 0; s < kTogether; ++s)
                mma(to, left[s], {right[j / 2][s][j % 2 * 2], right[j / 2][s][j % 2 * 2 + 1]}, Element{});
              if (kTogether > 1)
#pragma unroll
                for (int e = 0; e < 4; ++e) sums[i][j][e] += part[e];
            }
          }
        }
      }
      a_now = a_now == 2 * kTile ? 0 : a_now + kTile;
      w_now = w_now + kRight == w_end ? 0 : w_now + kRight;
    }

    const int pixels = static_cast<int>(p.pixels) - pixel;
#pragma unroll
    for (int n = 0; n < kColumns; n += 32) {
      const int column = first_column + n, count = p.n - column;
      if (count <= 0) break;
      const auto columns = epilogue.columns(image, head, pixel + first_row, column, p.n);
      constexpr int kAtOnce = Epilogue::kAtOnce, kResults = Epilogue::kResults,
                    kOut = Piece<Out>::kSize < kResults ? Piece<Out>::kSize : kResults;
      Out* to = out.of(image, head) + (int64_t{pixel} + first_row) * out.of_row + column / (8 / kResults);
#pragma unroll
      for (int first = 0; first < 8; first += kAtOnce) {
        typename Epilogue::Held held[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
          if (first_row + (first + i) * 8 < pixels) held[i] = epilogue.load(columns, (first + i) * 8, count);
#pragma unroll
        for (int i = first; i < first + kAtOnce; ++i) {
          if (first_row + i * 8 >= pixels) continue;
          float v[8];
#pragma unroll
          for (int c = 0; c < 8; ++c) v[c] = sums[i / 2][n / 8 + c / 2][i % 2 * 2 + c % 2];
          Epilogue::apply(columns, held[i - first], v);
#pragma unroll
          for (int c = 0; c < kResults; c += kOut)
            if (c < count) store_floats<kOut>(to + i * 8 * out.of_row + c, reinterpret_cast<float (&)[kOut]>(v[c]));
        }
      }
    }
    if (!Epilogue::kGoesOn) return;
  }
}

template <class Element, class Out, class Epilogue = Plain>
void product_of(const Product<Stored<Element>>& p, const Matrices<Out>& out, int64_t images, cudaStream_t stream,
                const Epilogue& epilogue = {}) {
  const int64_t chunks = ceil_div(p.k, kProductChunk<Element>), pixel_tiles = ceil_div(p.pixels, kProductRows);
  const auto shared = [](int width, int64_t w_tiles) { return (kStages * kProductRows + w_tiles * width) * kTileBytes<Element>; };
  const int64_t room = Epilogue::kGoesOn ? most_shared() : 0;
  // All of w, where as many blocks as otherwise share a multiprocessor's memory.
  const auto keeps = [&](int width) {
    return chunks <= kStages ||
           Epilogue::kGoesOn && shared(width, chunks) <= std::min<int64_t>(room, width * 9 * kTileBytes<Element>);
  };
  const auto run = [&](auto kernel, int width, int threads, int blocks) {
    const int64_t across = ceil_div(p.n, width), w_tiles = keeps(width) ? chunks : kStages,
                  resident = size_for(multiprocessors() * blocks, 1),
                  few = std::clamp<int64_t>(resident / (across * images * p.heads), 1, pixel_tiles),
                  down = Epilogue::kGoesOn ? few : pixel_tiles;
    launch(kernel, dim3(across * down, 1, images * p.heads), dim3(threads), shared(width, w_tiles), stream, p, out, epilogue,
           static_cast<int>(w_tiles));
  };
  const auto loads = [&](int width) {  // of rows of both operands
    return ceil_div(p.n, width) * (kProductRows * 4 + (Epilogue::kGoesOn && keeps(width) ? width / 2 : width * 4));
  };
  if constexpr (!kSplits<Element>)
    if (loads(256) < std::min(loads(64), loads(128)) && ceil_div(p.n, 128) % 2 == 0)  // or it would multiply more
      return run(multiply<Element, Out, 256, Epilogue>, 256, kProductThreads<Element, 256>, kProductBlocks<Element, 256>);
  loads(128) <= loads(64)
      ? run(multiply<Element, Out, 128, Epilogue>, 128, kProductThreads<Element, 128>, kProductBlocks<Element, 128>)
      : run(multiply<Element, Out, 64, Epilogue>, 64, kProductThreads<Element, 64>, kProductBlocks<Element, 64>);
}

// Of images: float32 as Tf32 where that is allowed.
template <class T, class Out, class Epilogue = Plain>
void product(const Product<T>& p, const Matrices<Out>& out, int64_t images, cudaStream_t stream, const Epilogue& epilogue = {}) {
  if constexpr (std::is_same_v<T, float>)
    if (tf32_allowed()) return product_of<Tf32>(p, out, images, stream, epilogue);
  product_of<T>(p, out, images, stream, epilogue);
}

// ---------------------------------------------------------------------------------------------------------------------
// outer: sums[split][matrix][m][n] (+)= Σ_p a[p][m]·b[p][n]. A matrix is a head of an image, or of all images together.

template <class T>
struct Outer {
  Matrices<const T> a, b;
  float* sums;
  int64_t images;  // that one matrix sums over
  int64_t pixels;  // of an image
  int m, n, heads;
  bool add;
};

constexpr int kOuterPixels = 32;

// A block owns kM × kN sums over its split of the pixels, a warp 32 columns of them. The tensor cores' sums are moved to others every
// 256 pixels, of float32 that is split every 32: they cut instead of rounding, and a long sum would drift.
template <class T>
__host__ __device__ constexpr int outer_rows(int m) {  // of a warp: more of float32, so that it splits fewer elements
  return sizeof(T) == 4 && m == 128 ? 64 : 32;
}
template <class Element, int kM, int kN>
__global__ void __launch_bounds__(kM* kN / outer_rows<Stored<Element>>(kM)) multiply_outer(Outer<Stored<Element>> p) {
  AUTOHDR_DYNAMIC_SHARED(unsigned char, shared);
  using T = Stored<Element>;
  constexpr int kLeftRow = row_of_columns<T>(kM), kRightRow = row_of_columns<T>(kN), kLeftTile = kOuterPixels * kLeftRow,
                kStage = kLeftTile + kOuterPixels * kRightRow, kSize = Piece<T>::kSize;
  // Across: pieces of a row. LoadRows: that the block's threads load at once.
  constexpr int kRows = outer_rows<T>(kM), kThreads = kM * kN / kRows, kLeftAcross = kM / kSize, kRightAcross = kN / kSize,
                kLeftLoadRows = kThreads / kLeftAcross, kRightLoadRows = kThreads / kRightAcross;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int tiles = (p.n + kN - 1) / kN, first_m = blockIdx.x / tiles * kM, first_n = blockIdx.x % tiles * kN;
  const int64_t head = blockIdx.y % p.heads, first_image = blockIdx.y / p.heads;
  const int64_t chunks_each = (p.pixels + kOuterPixels - 1) / kOuterPixels, chunks = chunks_each * p.images;
  const int64_t begin = blockIdx.z * chunks / gridDim.z, end = (blockIdx.z + 1) * chunks / gridDim.z;

  // What this thread copies: a piece of some rows of a and of b.
  const int left_row = threadIdx.x / kLeftAcross, left_column = threadIdx.x % kLeftAcross * kSize;
  const int right_row = threadIdx.x / kRightAcross, right_column = threadIdx.x % kRightAcross * kSize;
  const bool has_m = first_m + left_column < p.m, has_n = first_n + right_column < p.n;
  unsigned char *left_place = shared + left_row * kLeftRow + left_column * static_cast<int>(sizeof(T)),
                *right_place = shared + kLeftTile + right_row * kRightRow + right_column * static_cast<int>(sizeof(T));
  int64_t image = first_image + begin / chunks_each, pixel = begin % chunks_each * kOuterPixels;
  const T *a, *b;
  const auto start = [&] {
    a = p.a.of(image, head) + (pixel + left_row) * p.a.of_row + first_m + left_column;
    b = p.b.of(image, head) + (pixel + right_row) * p.b.of_row + first_n + right_column;
  };
  start();
  const int all = static_cast<int>(end - begin);
  int to_load = all;
  const auto load = [&](int stage) {
    if (to_load > 0) {
      const int pixels = static_cast<int>(p.pixels - pixel < kOuterPixels ? p.pixels - pixel : kOuterPixels);
#pragma unroll
      for (int i = 0; i < kOuterPixels; i += kLeftLoadRows)
        copy_async_or_zero(left_place + stage + i * kLeftRow, a + i * p.a.of_row, has_m && left_row + i < pixels);
#pragma unroll
      for (int i = 0; i < kOuterPixels; i += kRightLoadRows)
        if (kRightLoadRows <= kOuterPixels || right_row < kOuterPixels)
          copy_async_or_zero(right_place + stage + i * kRightRow, b + i * p.b.of_row, has_n && right_row + i < pixels);
      --to_load;
      pixel += kOuterPixels;
      a += kOuterPixels * p.a.of_row, b += kOuterPixels * p.b.of_row;
      if (pixel >= p.pixels) pixel = 0, ++image, start();
    }
    commit_copies();
  };

  float sums[kRows / 16][4][4] = {}, total[kRows / 16][4][4] = {};
  const auto move_sums = [&] {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float& sum = sums[i / 16][i / 4 % 4][i % 4];
      total[i / 16][i / 4 % 4][i % 4] += sum;
      sum = 0;
    }
  };
  const int m0 = warp / (kN / 32) * kRows, n0 = warp % (kN / 32) * 32;
  const unsigned char *left_columns = shared + columns_lane<T, false>(kLeftRow) + m0 * sizeof(T),
                      *right_columns = shared + kLeftTile + columns_lane<T, true>(kRightRow) + n0 * sizeof(T);
  load(0);
  load(kStage);
  int now = 0, next = 2 * kStage, summed = 0;
  for (int chunk = 0; chunk < all; ++chunk) {
    wait_for_groups<kStages - 2>();
    __syncthreads();
    load(next);
    const unsigned char *left_tile = left_columns + now, *right_tile = right_columns + now;
#pragma unroll
    for (int k = 0; k < kOuterPixels; k += kStep<T>) {
      uint32_t left[kRows / 16][4], right[2][4];
#pragma unroll
      for (int i = 0; i < kRows / 16; ++i)
        load_columns<T, false>(left[i], left_tile + k * kLeftRow + i * 16 * sizeof(T), kLeftRow);
#pragma unroll
      for (int j = 0; j < 2; ++j) load_columns<T, true>(right[j], right_tile + k * kRightRow + j * 16 * sizeof(T), kRightRow);
#pragma unroll
      for (int i = 0; i < kRows / 16; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) mma(sums[i][j], left[i], {right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]}, Element{});
    }
    if (kSplits<Element> || ++summed == 8) move_sums(), summed = 0;
    now = now == 2 * kStage ? 0 : now + kStage;
    next = next == 2 * kStage ? 0 : next + kStage;
  }
  move_sums();
  float* out = p.sums + (static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y) * p.m * p.n;
#pragma unroll
  for (int i = 0; i < kRows / 16; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int m = first_m + m0 + i * 16 + e / 2 * 8 + lane / 4, n = first_n + n0 + j * 8 + lane % 4 * 2 + e % 2;
        if (m >= p.m || n >= p.n) continue;
        float& sum = out[int64_t{m} * p.n + n];
        sum = p.add ? sum + total[i][j][e] : total[i][j][e];
      }
}

// A block's sums: many where there are as many, so that a and b are loaded less often; fewer of float32, which takes more registers.
template <class T>
struct OuterTile {
  int m = 64, n = 64;
  OuterTile(int64_t all_m, int64_t all_n) {
    if (all_m <= 64) return;
    if (sizeof(T) == 2 && all_n > 64)
      m = n = 128;
    else
      m = sizeof(T) == 2 && all_m > 128 ? 256 : 128;
  }
  int warps() const { return m * n / (32 * outer_rows<T>(m)); }
  int64_t blocks(int64_t all_m, int64_t all_n) const { return ceil_div(all_m, m) * ceil_div(all_n, n); }
};

// In how many parts a sum of m × n products over the pixels is taken, to fill the device; independent of it, so that results are
// the same on all.
template <class T>
int64_t splits_of(int64_t m, int64_t n, int64_t matrices, int64_t pixels) {
  const OuterTile<T> tile(m, n);
  const int64_t warps = tile.blocks(m, n) * tile.warps() * matrices;
  return std::clamp<int64_t>(ceil_div(2048, warps), 1, std::max<int64_t>(1, std::min<int64_t>(256, pixels / 256)));
}

template <class Element>
void outer_of(const Outer<Stored<Element>>& p, int64_t matrices, int64_t splits, cudaStream_t stream) {
  using T = Stored<Element>;
  const OuterTile<T> tile(p.m, p.n);
  const auto run = [&](auto kernel) {
    launch(kernel, dim3(tile.blocks(p.m, p.n), matrices, splits), dim3(tile.warps() * 32),
           kStages * kOuterPixels * (row_of_columns<T>(tile.m) + row_of_columns<T>(tile.n)), stream, p);
  };
  if constexpr (sizeof(T) == 2) {
    if (tile.n == 128) return run(multiply_outer<Element, 128, 128>);
    if (tile.m == 256) return run(multiply_outer<Element, 256, 64>);
  }
  if (tile.m == 128) return run(multiply_outer<Element, 128, 64>);
  run(multiply_outer<Element, 64, 64>);
}

// Of images: float32 as Tf32 where that is allowed.
template <class T>
void outer(const Outer<T>& p, int64_t matrices, int64_t splits, cudaStream_t stream) {
  if constexpr (std::is_same_v<T, float>)
    if (tf32_allowed()) return outer_of<Tf32>(p, matrices, splits, stream);
  outer_of<T>(p, matrices, splits, stream);
}

}  // namespace image
}  // namespace autohdr
