// Functions of a float on the device, with plain C++ bodies where tests/emulation runs the kernels.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "common/constants.h"

namespace autohdr {

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
template <class T>
__device__ __forceinline__ T from_float(float v) {
  if constexpr (sizeof(T) == 4)
    return v;
  else if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(v);
  else
    return __float2bfloat16_rn(v);
}

// float32 in memory, TF32 as an operand: results that become one are made like those that become half precision.
struct Tf32 {};

// To TF32, in the bits that a tensor core takes: cvt.rna.tf32 takes three instructions. A NaN may become a number.
__device__ __forceinline__ uint32_t rounded_to_tf32(uint32_t bits) { return bits + 0x1000; }
// The same, plus 0, or NaN of what is not finite.
__device__ __forceinline__ uint32_t tf32_operand(float v) {
  return __float_as_uint(__fmaf_rn(v, 0.0f, __uint_as_float(rounded_to_tf32(__float_as_uint(v)))));
}

// 2^x within 2 units in the last place; one instruction of the exponential unit, which takes subnormals for zero.
__device__ __forceinline__ float exp2_approx(float x) {
#ifdef AUTOHDR_EMULATION
  return std::exp2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// a / b within 2 units in the last place, for b up to 2^126.
__device__ __forceinline__ float divide_approx(float a, float b) {
#ifdef AUTOHDR_EMULATION
  return a / b;
#else
  return __fdividef(a, b);
#endif
}

// 1 / x within 1 unit in the last place; one instruction, 0 where the result would be subnormal.
__device__ __forceinline__ float reciprocal_approx(float x) {
#ifdef AUTOHDR_EMULATION
  return 1.0f / x;
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// tanh(x) within 2^-11 of itself; one instruction.
__device__ __forceinline__ float tanh_approx(float x) {
#ifdef AUTOHDR_EMULATION
  const float y = std::tanh(x), cut = y * 8193.0f;  // to 11 bits
  return cut - (cut - y);
#else
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// 1 / sqrt(x) within 2 units in the last place, for results that become a T: exact but for rounding where that is float.
template <class T>
__device__ __forceinline__ float inverse_root(float x) {
#ifndef AUTOHDR_EMULATION
  if constexpr (!std::is_same_v<T, float>) {
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
#endif
  return 1.0f / sqrtf(x);
}

// a / b likewise, for b up to 2^126.
template <class T>
__device__ __forceinline__ float divide(float a, float b) {
  if constexpr (!std::is_same_v<T, float>) return divide_approx(a, b);
  return a / b;
}

// e^y within a few units in the last place, for |y| up to 87. exp2 has not the digits of a product with log2(e), so that what the
// product rounds off multiplies its result.
__device__ __forceinline__ float exp_in_range(float y) {
  const float power = y * kLog2e, rest = fmaf(y, kLog2e, -power) + y * kLog2eRest, e = exp2_approx(power);
  return fmaf(e, rest * kLn2, e);
}

// 1 / (1 + exp(-x)) within a few units in the last place; below -87 it stays what it is there.
__device__ __forceinline__ float sigmoid(float x) { return reciprocal_approx(1.0f + exp_in_range(fminf(-x, 87.0f))); }

// What the standard normal distribution function and gelu are made of, for results of 11 bits: the density less its constant,
// exp(-v²/2), and how much lies beyond |v|, that times P(1 / (1 + 0.34 |v|)), P fitted by least largest error. The absolute error of
// `beyond` is below 7e-7, its relative error below 2e-4 up to |v| = 4.
struct NormalTail {
  float power, beyond;
  __device__ __forceinline__ explicit NormalTail(float v) {
    const float t = reciprocal_approx(fmaf(0.34f, fabsf(v), 1.0f));
    power = exp2_approx(v * v * (-0.5f * kLog2e));
    float p = -0.105244532f;
    p = fmaf(p, t, 0.327596784f);
    p = fmaf(p, t, -0.0365140103f);
    p = fmaf(p, t, 0.184530884f);
    p = fmaf(p, t, 0.129630834f);
    beyond = p * t * power;
  }
};

// The standard normal distribution function for results that become a bfloat16: 1 / (1 + 2^(-v·P(v²))), P fitted by least largest
// error, which takes two thirds of the instructions. Its relative error is below 1.2e-3 from -5 on, of bfloat16's own 3.9e-3, and that
// of v times it absolutely below 2e-4.
__device__ __forceinline__ float short_normal_cdf(float v) {
  const float t = v * v;
  float p = 1.3276467e-05f;
  p = fmaf(p, t, -1.4344088e-03f);
  p = fmaf(p, t, 1.0953641e-01f);
  p = fmaf(p, t, 2.2971661f);
  return reciprocal_approx(1.0f + exp2_approx(-v * p));
}

// The standard normal distribution function and its density, for results that become a T.
struct StandardNormal {
  float cdf, density;
};
template <class T>
__device__ __forceinline__ StandardNormal standard_normal(float v) {
  if constexpr (sizeof(T) == 4) return {0.5f * (1.0f + erff(v * 0.707106781186547524f)), expf(-0.5f * v * v) * kNormalDensity};
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return {short_normal_cdf(v), kNormalDensity * exp2_approx(v * v * (-0.5f * kLog2e))};
  const NormalTail tail(v);
  return {v > 0.0f ? 1.0f - tail.beyond : tail.beyond, kNormalDensity * tail.power};
}

// gelu(a)·b in units of kGateUnit, for results that become a T: gelu(a) is a times the standard normal distribution function. For
// a bfloat16 that is (1 + tanh(a·P(a²))) / 2, P fitted by least largest error of gelu, which is 2.8e-4; tanh_approx adds up to
// 2.5e-4·|a|. Rounding has 3.9e-3·a where a is positive.
template <class T>
constexpr float kGateUnit = std::is_same_v<T, __nv_bfloat16> ? 0.5f : 1.0f;
template <class T>
__device__ __forceinline__ float gelu_times(float a, float b) {
  if constexpr (sizeof(T) == 4) return a * standard_normal<T>(a).cdf * b;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const float product = a * b;
    return fmaf(product, tanh_approx(a * fmaf(a * a, 0.0347073059f, 0.800142997f)), product);
  }
  return (fmaxf(a, 0.0f) - fabsf(a) * NormalTail(a).beyond) * b;
}

}  // namespace autohdr
