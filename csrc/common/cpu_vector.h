// A vector of floats, as wide as the instruction set's: loads and stores in three dtypes, lane-wise limits, the sum.
// Compiled per instruction set: common/cpu_each_isa.h.

#define AUTOHDR_INLINE static inline __attribute__((always_inline))
#define AUTOHDR_UNROLL _Pragma("GCC unroll 16")

constexpr int W = AUTOHDR_WIDTH;  // floats in a vector
typedef float vf __attribute__((vector_size(W * 4)));
typedef float vf_mem __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef uint16_t vh_mem __attribute__((vector_size(W * 2), aligned(2), may_alias));

AUTOHDR_INLINE vf splat(float v) { return v - vf{}; }
AUTOHDR_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_mem*>(p); }
AUTOHDR_INLINE void store(float* p, vf v) { *reinterpret_cast<vf_mem*>(p) = v; }

AUTOHDR_INLINE vf load(const bf16* p) {
  const vh h = *reinterpret_cast<const vh_mem*>(p);
  return (vf)(__builtin_convertvector(h, vu) << 16);
}
AUTOHDR_INLINE vh to_bf16(vf v) {  // round to nearest even; a NaN stays one
  const vu u = (vu)v;
  const vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const vu nan = (vu)(v != v);
  return __builtin_convertvector((rounded & ~nan) | (0x7fc0u & nan), vh);
}
AUTOHDR_INLINE void store(bf16* p, vf v) { *reinterpret_cast<vh_mem*>(p) = to_bf16(v); }

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

// The first n lanes, n < W; the rest are zero.
template <class T>
AUTOHDR_INLINE vf load_part(const T* p, int64_t n) {
#if AUTOHDR_WIDTH == 16
  const __mmask16 first = _bzhi_u32(0xffff, n);
  if constexpr (sizeof(T) == sizeof(float)) return (vf)_mm512_maskz_loadu_ps(first, p);
  const __m256i lanes = _mm256_maskz_loadu_epi16(first, p);
  return load(reinterpret_cast<const T*>(&lanes));
#else
  T lanes[W] = {};
  __builtin_memcpy(lanes, p, n * sizeof(T));
  return load(lanes);
#endif
}
template <class T>
AUTOHDR_INLINE void store_part(T* p, vf v, int64_t n) {
#if AUTOHDR_WIDTH == 16
  const __mmask16 first = _bzhi_u32(0xffff, n);
  if constexpr (sizeof(T) == sizeof(float)) return _mm512_mask_storeu_ps(p, first, (__m512)v);
  __m256i lanes;
  store(reinterpret_cast<T*>(&lanes), v);
  _mm256_mask_storeu_epi16(p, first, lanes);
#else
  T lanes[W];
  store(lanes, v);
  __builtin_memcpy(p, lanes, n * sizeof(T));
#endif
}
template <class T>
AUTOHDR_INLINE vf load_at(const T* p, int64_t i, int64_t n) {
  return i + W <= n ? load(p + i) : load_part(p + i, n - i);
}
template <class T>
AUTOHDR_INLINE void store_at(T* p, int64_t i, int64_t n, vf v) {
  i + W <= n ? store(p + i, v) : store_part(p + i, v, n - i);
}

template <class T>
AUTOHDR_INLINE void add_at(T* p, int64_t i, int64_t n, vf v) {
  store_at(p, i, n, load_at(p, i, n) + v);
}

// Has what will be read soon brought into the second-level cache.
template <class T>
AUTOHDR_INLINE void fetch(const T* p, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(p + i, 0, 2);
}

AUTOHDR_INLINE float sum(vf v) {
#if AUTOHDR_WIDTH == 16
  v += __builtin_shuffle(v, vi{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7});
  v += __builtin_shuffle(v, vi{4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3});
  v += __builtin_shuffle(v, vi{2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1});
  v += __builtin_shuffle(v, vi{1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0});
  return v[0];
#else
  float lanes[W];
  store(lanes, v);
  for (int step = W / 2; step; step /= 2)
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  return lanes[0];
#endif
}
AUTOHDR_INLINE vf clamp(vf v, float low, float high) {  // a NaN stays one: of two operands min and max take the second then
#if AUTOHDR_WIDTH == 16
  return (vf)_mm512_min_ps((__m512)splat(high), _mm512_max_ps((__m512)splat(low), (__m512)v));
#elif AUTOHDR_WIDTH == 8
  return (vf)_mm256_min_ps((__m256)splat(high), _mm256_max_ps((__m256)splat(low), (__m256)v));
#else
  v = v < splat(low) ? splat(low) : v;
  return v > splat(high) ? splat(high) : v;
#endif
}
