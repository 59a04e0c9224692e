// Functions of a float on the device, with plain C++ bodies where tests/emulation runs the kernels.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>
#include <cmath>
#include <cstdint>

namespace autohdr {

constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

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

__device__ __forceinline__ float sigmoid(float x) { return divide_approx(1.0f, 1.0f + expf(fminf(-x, 87.0f))); }

// log(1 + exp(x)), the identity above 20, as in PyTorch; relative error of a few units in the last place for every x.
__device__ __forceinline__ float softplus(float x) {
  const float e = expf(-fabsf(x));
  // log(1 + e) = 2 artanh(s), s = e / (2 + e) <= 1/3; artanh(s) / s by least largest error.
  const float s = divide_approx(e, 2.0f + e), s2 = s * s;
  float p = 0.140059963f;
  p = p * s2 + 0.140009016f;
  p = p * s2 + 0.200107634f;
  p = p * s2 + 0.333332092f;
  p = p * s2 + 1.0f;
  return x > 20.0f ? x : fmaxf(x, 0.0f) + 2.0f * s * p;
}

}  // namespace autohdr
