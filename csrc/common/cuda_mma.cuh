// Tensor-core products of tiles in shared memory, warp by warp, with CPU bodies where tests/emulation runs the kernels.
//
// A step of a product takes 32 bytes along k: 16 elements of bfloat16 or float16, or 8 of float32. Matrices of 8 rows of 16 bytes
// lie in the registers of a warp alike for all three types, so the types differ only in mma(). float32 is split into two numbers
// of the tensor cores' 11 bits each: three products reach float32's precision but for two bits, at more than twice the speed of
// the other units. As Tf32 it is rounded to 11 bits, and multiplied once.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/cuda_launch.cuh"
#include "common/cuda_math.cuh"

namespace autohdr {

// What lies in memory of such elements.
template <class Element>
struct StoredAs {
  using Type = Element;
};
template <>
struct StoredAs<Tf32> {
  using Type = float;
};
template <class Element>
using Stored = typename StoredAs<Element>::Type;

template <class T>
constexpr int kStep = 32 / static_cast<int>(sizeof(T));  // elements along k of one step

// Four 8 × 16-byte matrices; lane 8·i + r gives the address of row r of matrix i, and gets bytes 4·(lane % 4) of row lane / 4 of
// each.
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const void* row) {
#ifdef AUTOHDR_EMULATION
  for (int i = 0; i < 4; ++i) {
    const char* from = static_cast<const char*>(__shfl_sync(~0u, row, i * 8 + threadIdx.x % 32 / 4));
    out[i] = *reinterpret_cast<const uint32_t*>(from + threadIdx.x % 4 * 4);
  }
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row))));
#endif
}

// The same for matrices of 2-byte elements, transposed: the lane gets rows 2·(lane % 4) and the next of column lane / 4.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
#ifdef AUTOHDR_EMULATION
  for (int i = 0; i < 4; ++i) {
    const int first = i * 8 + threadIdx.x % 4 * 2;
    const uint16_t* low = static_cast<const uint16_t*>(__shfl_sync(~0u, row, first));
    const uint16_t* high = static_cast<const uint16_t*>(__shfl_sync(~0u, row, first + 1));
    out[i] = low[threadIdx.x % 32 / 4] | static_cast<uint32_t>(high[threadIdx.x % 32 / 4]) << 16;
  }
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row))));
#endif
}

#ifdef AUTOHDR_EMULATION
// 2^(exponent of v - bits); 0 for 0.
AUTOHDR_UNCHECKED inline double unit_below(double v, int bits) {
  uint64_t word;
  memcpy(&word, &v, sizeof v);
  const uint64_t exponent = word >> 52 & 2047, unit = exponent > uint64_t(bits) ? exponent - bits << 52 : 0;
  memcpy(&v, &unit, sizeof v);
  return v;
}

// v without what lies below the unit, a power of two.
AUTOHDR_UNCHECKED inline double cut(double v, double unit) {
  return static_cast<double>(static_cast<int64_t>(v * (1 / unit))) * unit;
}

// The number whose bits in float16 are the low ones; cuda_fp16.h takes ten times as long on a CPU.
AUTOHDR_UNCHECKED inline float from_half(uint32_t bits) {
  const uint32_t sign = (bits & 0x8000) << 16, rest = (bits & 0x7fff) << 13;
  const float size = rest < 0x0f800000 ? __uint_as_float(rest) * 0x1p112f : __uint_as_float(rest | 0x7f800000);
  return __uint_as_float(__float_as_uint(size) | sign);
}

// The elements that a register holds: two, or one of TF32 and a zero.
template <class T>
AUTOHDR_UNCHECKED void elements(uint32_t bits, double (&out)[2]) {
  if constexpr (std::is_same_v<T, float>)
    out[0] = __uint_as_float(bits & ~0x1fffu), out[1] = 0;
  else if constexpr (std::is_same_v<T, __half>)
    out[0] = from_half(bits), out[1] = from_half(bits >> 16);
  else
    out[0] = __uint_as_float(bits << 16), out[1] = __uint_as_float(bits & ~0xffffu);
}

// d += A·B. As A100's tensor cores are found to do it (Fasi, Higham, Mikaitis, Pranesh: Numerical behavior of NVIDIA tensor cores,
// 2021): half of the products at a time, they and d cut to one bit below the largest one's last as a float, added exactly, the sum
// cut to a float.
template <class T>
AUTOHDR_UNCHECKED void emulate_mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Operands {
    uint32_t a[4], b[2];
  };
  unsigned mask = ~0u;
  const Operands* lanes = emulation::exchange(mask, Operands{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
  const int lane = threadIdx.x % 32;
  for (int part = 0; part < 2; ++part) {
    double rows[2][4][2], columns[2][4][2];  // of this lane's d
    for (int i = 0; i < 2; ++i)
      for (int k = 0; k < 4; ++k) {
        elements<T>(lanes[(lane & ~3) + k].a[part * 2 + i], rows[i][k]);
        elements<T>(lanes[(lane % 4 * 2 + i) * 4 + k].b[part], columns[i][k]);
      }
    for (int e = 0; e < 4; ++e) {
      double terms[9] = {d[e]}, largest = std::fabs(d[e]), all = largest, sum = 0;
      for (int k = 0; k < 8; ++k) {
        const double term = terms[1 + k] = rows[e / 2][k / 2][k % 2] * columns[e % 2][k / 2][k % 2], size = std::fabs(term);
        largest = size > largest ? size : largest, all += size;
      }
      if (!std::isfinite(all)) {
        for (const double term : terms) sum += term;
        d[e] = static_cast<float>(sum);
      } else if (const double unit = unit_below(largest, 24); unit > 0) {
        for (const double term : terms) sum += cut(term, unit);
        const double last = unit_below(sum, 23);
        d[e] = static_cast<float>(last > 0 ? cut(sum, last) : sum);
      }
    }
  }
}
#define AUTOHDR_MMA(instruction, T) emulate_mma<T>(d, a, b)
#else
#define AUTOHDR_MMA(instruction, T)                                                           \
  asm volatile(instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                               \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
#endif

__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16) {
  AUTOHDR_MMA("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", __nv_bfloat16);
}
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
  AUTOHDR_MMA("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", __half);
}
// Of each float its first 11 bits: the others are cut off.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  AUTOHDR_MMA("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", float);
}
#undef AUTOHDR_MMA

// The same of half a step: of the first two registers of a, and the first of b.
#ifdef AUTOHDR_EMULATION
#define AUTOHDR_MMA_HALF(instruction, T) mma(d, {a[0], a[1], 0, 0}, {b, 0}, T{})
#else
#define AUTOHDR_MMA_HALF(instruction, T)                                          \
  asm volatile(instruction " {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                   \
               : "r"(a[0]), "r"(a[1]), "r"(b))
#endif
__device__ __forceinline__ void mma_half(float (&d)[4], const uint32_t (&a)[2], uint32_t b, __nv_bfloat16) {
  AUTOHDR_MMA_HALF("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32", __nv_bfloat16);
}
__device__ __forceinline__ void mma_half(float (&d)[4], const uint32_t (&a)[2], uint32_t b, __half) {
  AUTOHDR_MMA_HALF("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32", __half);
}
#undef AUTOHDR_MMA_HALF

__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Tf32) {
  const auto rounded = [](uint32_t bits) { return tf32_operand(__uint_as_float(bits)); };
  mma_tf32(d, {rounded(a[0]), rounded(a[1]), rounded(a[2]), rounded(a[3])}, {rounded(b[0]), rounded(b[1])});
}
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float) {
  uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
  const auto split = [](uint32_t bits, uint32_t& high, uint32_t& low) {
    high = rounded_to_tf32(bits) & ~0x1fffu;
    low = __float_as_uint(__uint_as_float(bits) - __uint_as_float(high));
  };
#pragma unroll
  for (int i = 0; i < 4; ++i) split(a[i], a_high[i], a_low[i]);
#pragma unroll
  for (int i = 0; i < 2; ++i) split(b[i], b_high[i], b_low[i]);
  mma_tf32(d, a_low, b_high);
  mma_tf32(d, a_high, b_low);
  mma_tf32(d, a_high, b_high);
}

// An operand of mma() in a tile whose rows run along k: where this lane begins to read its 16 rows × one step, for load_matrices. A
// right operand is two of 8 rows, in registers 0 and 1, and 2 and 3.
struct LaneOfRows {
  int row, piece;  // of 16 bytes
};
__device__ __forceinline__ LaneOfRows left_lane() {
  const int lane = threadIdx.x % 32;
  return {lane % 16, lane / 16};
}
__device__ __forceinline__ LaneOfRows right_lane() {
  const int lane = threadIdx.x % 32;
  return {lane / 16 * 8 + lane % 8, lane / 8 % 2};
}

// Bytes of a row of such a tile below, of so many columns: against bank conflicts.
template <class T>
__host__ __device__ constexpr int row_of_columns(int columns) {
  return columns * static_cast<int>(sizeof(T)) + (sizeof(T) == 2 ? 16 : 32);
}

// The same of a tile whose rows are k, `stride` bytes apart, and run along the 16 rows wanted: load_columns from columns_lane bytes on.
// The second 8 of them lie `apart` bytes after the first.
template <class T, bool kRight>
__device__ __forceinline__ int columns_lane(int stride, int apart = 8 * sizeof(T)) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 4) return lane % 4 * stride + lane / 4 * 4;
  const int k = kRight ? lane / 8 % 2 : lane / 16, half = kRight ? lane / 16 : lane / 8 % 2;
  return (k * 8 + lane % 8) * stride + half * apart;
}
template <class T, bool kRight>
__device__ __forceinline__ void load_columns(uint32_t (&out)[4], const unsigned char* tile, int stride,
                                             int apart = 8 * sizeof(T)) {
  if constexpr (sizeof(T) == 2) {
    load_matrices_transposed(out, tile);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int k = kRight ? i % 2 : i / 2, half = kRight ? i / 2 : i % 2;
      out[i] = *reinterpret_cast<const uint32_t*>(tile + k * 4 * stride + half * apart);
    }
  }
}

}  // namespace autohdr
