// Elements of a sequence, whose dtype is told apart when it is loaded or stored.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/cuda_math.cuh"
#include "common/sequence.h"

namespace autohdr {

// f(a zero of the type), on the host.
template <class F>
void with_dtype(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::f32: return f(float{});
    case Dtype::bf16: return f(__nv_bfloat16{});
    case Dtype::f16: return f(__half{});
  }
}

__device__ __forceinline__ float bits_to_float(uint32_t bits) {
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}
__device__ __forceinline__ uint32_t float_to_bits(float f) {
  uint32_t bits;
  memcpy(&bits, &f, sizeof bits);
  return bits;
}
__device__ __forceinline__ float half_to_float(uint32_t bits) {
  __half_raw h;
  h.x = static_cast<unsigned short>(bits);
  return __half2float(__half(h));
}
__device__ __forceinline__ uint32_t narrow(Dtype dtype, float v) {
  return dtype == Dtype::bf16 ? static_cast<__nv_bfloat16_raw>(__float2bfloat16_rn(v)).x
                              : static_cast<__half_raw>(__float2half_rn(v)).x;
}
__device__ __forceinline__ float load_one(const Sequence& s, int64_t at) {
  if (s.dtype == Dtype::f32) return static_cast<const float*>(s.data)[at];
  const uint32_t bits = static_cast<const uint16_t*>(s.data)[at];
  return s.dtype == Dtype::bf16 ? bits_to_float(bits << 16) : half_to_float(bits);
}
__device__ __forceinline__ void store_one(const Sequence& s, int64_t at, float v) {
  if (s.dtype == Dtype::f32)
    static_cast<float*>(s.data)[at] = v;
  else
    static_cast<uint16_t*>(s.data)[at] = static_cast<uint16_t>(narrow(s.dtype, v));
}

// A uint2, uint4 or float4 at once.
template <class Word>
__device__ __forceinline__ void store_word(void* to, Word word) {
#ifdef AUTOHDR_EMULATION
  *static_cast<Word*>(to) = word;
#else
  __stcg(static_cast<Word*>(to), word);  // of a plain assignment the compiler makes several stores
#endif
}

// N neighbours in memory, 8 or 16 bytes, of which their address is a multiple: loaded and stored at once.
template <class T, int N>
struct alignas(N * sizeof(T)) Piece {
  T v[N];
};
template <int N, class T>
__device__ __forceinline__ Piece<T, N> load_piece(const T* at) {
  return *reinterpret_cast<const Piece<T, N>*>(at);
}
template <class T, int N>
__device__ __forceinline__ void store_piece(T* at, const Piece<T, N>& piece) {
  std::conditional_t<sizeof piece == 16, uint4, uint2> word;
  memcpy(&word, &piece, sizeof word);
  store_word(at, word);
}

// v = elements [first, first + N) of a line of `extent`, zero where there are none.
template <bool Aligned, int N, class T>
__device__ __forceinline__ void load_line(const T* line, int64_t first, int64_t extent, float (&v)[N]) {
  if constexpr (Aligned) {
    Piece<T, N> piece = {};
    if (first >= 0 && first < extent) piece = load_piece<N>(line + first);
#pragma unroll
    for (int k = 0; k < N; ++k) v[k] = to_float(piece.v[k]);
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) v[k] = first + k >= 0 && first + k < extent ? to_float(line[first + k]) : 0.0f;
  }
}

template <bool Aligned, int N, class T>
__device__ __forceinline__ void store_line(T* line, int64_t first, int64_t extent, const float (&v)[N]) {
  if constexpr (Aligned) {
    Piece<T, N> piece;
#pragma unroll
    for (int k = 0; k < N; ++k) piece.v[k] = from_float<T>(v[k]);
    store_piece(line + first, piece);
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k)
      if (first + k >= 0 && first + k < extent) line[first + k] = from_float<T>(v[k]);
  }
}

}  // namespace autohdr
