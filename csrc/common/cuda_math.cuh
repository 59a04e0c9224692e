// Functions of a float on the device, with plain C++ bodies where tests/emulation runs the kernels.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "common/constants.h"

namespace autohdr {

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
  const float s = divide_approx(e, 2.0f + e), s2 = s * s;
  return x > 20.0f ? x : fmaxf(x, 0.0f) + 2.0f * s * AUTOHDR_ARTANH_BY_S(s2);
}

}  // namespace autohdr
