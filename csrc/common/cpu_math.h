// Functions of a vector; cuda_math.cuh has those of a GPU.
// Compiled per instruction set: common/cpu_each_isa.h.

AUTOHDR_INLINE vf round_to_integer(vf v) {  // |v| < 2^22: there floats from 1.5·2^23 on are the integers
  const vf magic = splat(12582912.0f);
  return (v + magic) - magic;
}
// p·2^n for n in [-152, 129]: in two halves, so that subnormal results come out right.
AUTOHDR_INLINE vf scale_by_power(vf p, vf n) {
  const vi k = __builtin_convertvector(n, vi);
  const vi half = k >> 1;
  return p * (vf)((half + 127) << 23) * (vf)((k - half + 127) << 23);
}

// exp for v <= 0, relative error below 2e-7; exactly zero far out.
AUTOHDR_INLINE vf exp_negative(vf v) {
  const vf x = clamp(v, -104.0f, 0.0f) * kLog2e;
  const vf n = round_to_integer(x);
  const vf f = (x - n) * kLn2;
  vf p = splat(1.0f / 5040);  // Taylor's series: on |f| <= ln 2 / 2 its relative error is 8e-9
  p = p * f + 1.0f / 720;
  p = p * f + 1.0f / 120;
  p = p * f + 1.0f / 24;
  p = p * f + 1.0f / 6;
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  return scale_by_power(p, n);
}

// The standard normal distribution function, absolute error below 1.5e-7: 1/2 + v·P(v²) on [-5.3, 5.3], beyond which it is within
// 6e-8 of 0 or 1. P is fitted by least largest error (5e-8 before rounding), in s = 2 v²/5.3² − 1, which keeps its coefficients
// small.
AUTOHDR_INLINE vf normal_cdf(vf v) {
  constexpr float kEven[] = {0.00028598976f, 0.00072502555f, 0.0031430798f, 0.0088235922f,
                             0.018927123f,   0.032079354f,   0.04926417f,   0.13339256f};
  constexpr float kOdd[] = {-0.00076641823f, -0.0010906473f, -0.0058553219f, -0.013182495f,
                            -0.025299037f,   -0.039588854f,  -0.066518508f};
  const vf x = clamp(v, -5.3f, 5.3f), s = x * x * (2.0f / 28.09f) - 1.0f, s2 = s * s;
  vf even = splat(kEven[0]), odd = splat(kOdd[0]);  // two chains, each half as long
  AUTOHDR_UNROLL for (int i = 1; i < 7; ++i) {
    even = even * s2 + kEven[i];
    odd = odd * s2 + kOdd[i];
  }
  even = even * s2 + kEven[7];
  return x * (even + odd * s) + 0.5f;
}

AUTOHDR_INLINE vf exp2_polynomial(vf f) {  // on [-1/2, 1/2], by least largest relative error (1.6e-8); exactly 1 at 0
  vf p = splat(0.00015353362f);
  p = p * f + 0.0013398875f;
  p = p * f + 0.00961843692f;
  p = p * f + 0.0555033237f;
  p = p * f + 0.240226477f;
  p = p * f + 0.693147182f;
  return p * f + 1.0f;
}
// v[j] = 2^v[j], at most one unit in the last place from the true value. Several at a time: one alone is a long chain.
template <int Count>
AUTOHDR_INLINE void exp2(vf* v) {
#if AUTOHDR_WIDTH == 16
  // On [0, 1], by least largest relative error (7e-9), exactly 1 and 2 at its ends: scalef takes v's floor itself, where the nearest
  // integer would cost an instruction.
  constexpr float kCoefficients[] = {0.0012440879f, 0.009678064f, 0.055484142f, 0.24022956f, 0.693147f, 1.0f};
  vf f[Count], p[Count];
  AUTOHDR_UNROLL for (int j = 0; j < Count; ++j) f[j] = (vf)_mm512_reduce_ps((__m512)v[j], 9);  // minus its floor, 0 for infinities
  AUTOHDR_UNROLL for (int j = 0; j < Count; ++j) p[j] = splat(0.00021715024f);
  AUTOHDR_UNROLL for (int i = 0; i < 6; ++i)
    AUTOHDR_UNROLL for (int j = 0; j < Count; ++j) p[j] = p[j] * f[j] + kCoefficients[i];
  AUTOHDR_UNROLL for (int j = 0; j < Count; ++j) v[j] = (vf)_mm512_scalef_ps((__m512)p[j], (__m512)v[j]);
#else
  AUTOHDR_UNROLL for (int j = 0; j < Count; ++j) {
    const vf x = clamp(v[j], -152.0f, 129.0f), n = round_to_integer(x);
    v[j] = scale_by_power(exp2_polynomial(x - n), n);
  }
#endif
}

// exp(v) for v <= 88, above that as at 88; accurate for large |v| too, where exp2(v·log2(e)) is not. A NaN stays one.
AUTOHDR_INLINE vf exp(vf v) {
#if AUTOHDR_WIDTH == 16
  // Of two operands the second, if one is NaN.
  v = (vf)_mm512_max_ps((__m512)splat(-105.0f), _mm512_min_ps((__m512)splat(88.0f), (__m512)v));
#else
  v = clamp(v, -105.0f, 88.0f);
#endif
  const vf n = round_to_integer(v * kLog2e);
  const vf f = (v - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;  // ln 2 in two parts, the first exact in 15 bits
#if AUTOHDR_WIDTH == 16
  return (vf)_mm512_scalef_ps((__m512)exp2_polynomial(f * kLog2e), (__m512)n);
#else
  return scale_by_power(exp2_polynomial(f * kLog2e), n);
#endif
}
// 1 / v for normal v whose reciprocal is normal; a division costs as much as five of a scan's steps.
AUTOHDR_INLINE vf reciprocal(vf v) {
#if AUTOHDR_WIDTH == 16
  const vf r = (vf)_mm512_rcp14_ps((__m512)v);
  return r + r * (1.0f - v * r);
#else
  return 1.0f / v;
#endif
}
AUTOHDR_INLINE vf sigmoid(vf v) { return reciprocal(1.0f + exp(-v)); }  // below -88, where it is 6e-39, it stays so
struct Softplus {
  vf value, slope;
};
AUTOHDR_INLINE Softplus softplus(vf v) {  // log(1 + exp(v)), the identity above 20, as in PyTorch; and its derivative, sigmoid(v)
  const vf positive = v > 0.0f ? v : vf{};
  const vf e = exp(v > 0.0f ? -v : v);
  const vf s = e * reciprocal(2.0f + e), s2 = s * s;
  return {v > 20.0f ? v : positive + 2.0f * s * AUTOHDR_ARTANH_BY_S(s2), (v > 0.0f ? splat(1.0f) : e) * reciprocal(1.0f + e)};
}
