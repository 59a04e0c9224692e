// What the ops on sequences share on a CPU, compiled once per instruction set behind cpu_tile.h (no include guard; see
// common/cpu_each_isa.h): exponentials and what is made of them, half precision, and the element type of a sequence.

AUTOHDR_INLINE vf exp2_polynomial(vf f) {  // on [-1/2, 1/2], by least largest relative error; exactly 1 at 0
  vf p = splat(0.00015353362f);
  p = p * f + 0.0013398875f;
  p = p * f + 0.00961843692f;
  p = p * f + 0.0555033237f;
  p = p * f + 0.240226477f;
  p = p * f + 0.693147182f;
  return p * f + 1.0f;
}
AUTOHDR_INLINE vf scale_by_power(vf p, vf n) {  // p·2^n for n in [-152, 129]: in two halves, so that subnormal results come out right
  const vi k = __builtin_convertvector(n, vi);
  const vi half = k >> 1;
  return p * (vf)((half + 127) << 23) * (vf)((k - half + 127) << 23);
}
AUTOHDR_INLINE vf round_to_integer(vf v) {  // |v| < 2^22
  const vf magic = splat(12582912.0f);      // 1.5·2^23
  return (v + magic) - magic;
}
// v[j] = 2^v[j], at most one unit in the last place from the true value. Several at a time: one alone is a long chain.
template <int Count>
AUTOHDR_INLINE void exp2(vf* v) {
#if AUTOHDR_WIDTH == 16
  // On [0, 1], exactly 1 and 2 at its ends: scalef takes v's floor itself, which the nearest integer would cost an instruction.
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

constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

// exp(v) for v <= 88, above that as at 88; accurate for large |v| too, where exp2(v·log2(e)) is not. A NaN stays one.
AUTOHDR_INLINE vf exp(vf v) {
#if AUTOHDR_WIDTH == 16
  v = (vf)_mm512_max_ps((__m512)splat(-105.0f), _mm512_min_ps((__m512)splat(88.0f), (__m512)v));  // the second operand if one is NaN
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
  // log(1 + e) = 2 artanh(s), s = e / (2 + e) <= 1/3; artanh(s) / s by least largest error.
  const vf s = e * reciprocal(2.0f + e), s2 = s * s;
  vf p = splat(0.140059963f);
  p = p * s2 + 0.140009016f;
  p = p * s2 + 0.200107634f;
  p = p * s2 + 0.333332092f;
  p = p * s2 + 1.0f;
  return {v > 20.0f ? v : positive + 2.0f * s * p, (v > 0.0f ? splat(1.0f) : e) * reciprocal(1.0f + e)};
}

// Storage of a half-precision number. In this namespace, so that the templates of cpu_tile.h find its load and store.
struct f16 {
  uint16_t bits;
};
AUTOHDR_INLINE vf load(const f16* p) {
#if AUTOHDR_WIDTH == 16
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif AUTOHDR_WIDTH == 8
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  const vu u = __builtin_convertvector(*reinterpret_cast<const vh_mem*>(p), vu);
  const vu magnitude = (u & 0x7fffu) << 13;
  const vu special = (vu)((u & 0x7c00u) == 0x7c00u) & 0x7f800000u;  // infinities and NaNs
  return (vf)((vu)((vf)magnitude * 0x1p112f) | special | (u & 0x8000u) << 16);
#endif
}
AUTOHDR_INLINE void store(f16* p, vf v) {  // round to nearest even
#if AUTOHDR_WIDTH == 16
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, 8));
#elif AUTOHDR_WIDTH == 8
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, 8));
#else
  const vu u = (vu)v, magnitude = u & 0x7fffffffu;
  const vu normal = (magnitude + 0xc8000fffu + (magnitude >> 13 & 1u)) >> 13;
  const vu subnormal = (vu)((vf)magnitude + 0.5f) - 0x3f000000u;  // adding 1/2 rounds to multiples of 2^-24
  const vu large = (vu)(magnitude >= 0x47800000u), small = (vu)(magnitude < 0x38800000u), nan = (vu)(v != v);
  vu h = (normal & ~small) | (subnormal & small);
  h = (h & ~large) | (large & 0x7c00u) | (nan & 0x7e00u);
  *reinterpret_cast<vh_mem*>(p) = __builtin_convertvector(h | (u >> 16 & 0x8000u), vh);
#endif
}

template <class F>
AUTOHDR_INLINE void with_pointer(const Sequence& s, int64_t offset, const F& f) {
  switch (s.dtype) {
    case Dtype::f32: return f(static_cast<float*>(s.data) + offset);
    case Dtype::bf16: return f(static_cast<bf16*>(s.data) + offset);
    case Dtype::f16: return f(static_cast<f16*>(s.data) + offset);
  }
}
