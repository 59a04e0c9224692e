// What a matrix product's inner loop reaches on one core with its operands in the first-level cache, float32 against 8 bits. Prints
// multiply-accumulates a second of each as JSON. int8.py compiles and runs it.
//
// MR rows by SV vectors of sums stay in registers while the depth runs, as in csrc/common/cpu_product.h. A step takes 32 bits of each
// row, which it broadcasts, and of each column: one number of 32 bits, two of 16 or four of 8. Operands are small enough that every
// form is exact, and the program ends with status 1 where one differs from the plain sum.
//
//   float32      vfmadd231ps
//   int16        vpmaddwd, vpaddd: 8-bit numbers widened to 16 beforehand
//   uint8        vpmaddubsw, vpmaddwd, vpaddd: 8-bit activations; weights of 7 bits, as vpmaddubsw adds two products in 16 bits
//   uint7        two vpmaddubsw added in 16 bits before vpmaddwd, which takes activations of 7 bits as well
//   vnni         vpdpbusd, where the processor has AVX-VNNI or AVX512-VNNI

#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

constexpr int kDepth = 192, kMostRows = 8, kMostVecs = 3, kMostLanes = 16;

#define INLINE(isa) __attribute__((always_inline, target(isa))) static inline
#define AVX2 "avx2,fma"
#define AVX512 "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,prefer-vector-width=512"

// Registers of 32 and of 64 bytes.
struct Ymm {
  using Vec = __m256i;
  static constexpr int kLanes = 8;
  INLINE(AVX2) Vec load(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  INLINE(AVX2) Vec splat(int32_t value) { return _mm256_set1_epi32(value); }
};
struct Zmm {
  using Vec = __m512i;
  static constexpr int kLanes = 16;
  INLINE(AVX512) Vec load(const int32_t* p) { return _mm512_loadu_si512(p); }
  INLINE(AVX512) Vec splat(int32_t value) { return _mm512_set1_epi32(value); }
};

struct Float32 : Ymm {
  using Element = float;
  using Sum = __m256;
  static constexpr int kStep = 1, kMost = 255, kMostWeight = 127;
  INLINE(AVX2) Sum add(Sum sum, const __m256i* a, const __m256i* b) {
    return _mm256_fmadd_ps(_mm256_castsi256_ps(*a), _mm256_castsi256_ps(*b), sum);
  }
};
// GCC 12 moves each sum to another register and back.
INLINE(AVX2) __m256i sum_in_place(__m256i sum, __m256i term) {
  asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(term));
  return sum;
}
struct Int16 : Ymm {
  using Element = int16_t;
  using Sum = __m256i;
  static constexpr int kStep = 1, kMost = 255, kMostWeight = 127;
  INLINE(AVX2) Sum add(Sum sum, const __m256i* a, const __m256i* b) { return sum_in_place(sum, _mm256_madd_epi16(*a, *b)); }
};
struct Uint8 : Ymm {
  using Element = int8_t;
  using Sum = __m256i;
  static constexpr int kStep = 1, kMost = 255, kMostWeight = 63;
  INLINE(AVX2) Sum add(Sum sum, const __m256i* a, const __m256i* b) {
    return sum_in_place(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(*a, *b), _mm256_set1_epi16(1)));
  }
};
struct Uint7 : Ymm {
  using Element = int8_t;
  using Sum = __m256i;
  static constexpr int kStep = 2, kMost = 127, kMostWeight = 63;
  INLINE(AVX2) Sum add(Sum sum, const __m256i* a, const __m256i* b) {
    const __m256i both = _mm256_add_epi16(_mm256_maddubs_epi16(a[0], b[0]), _mm256_maddubs_epi16(a[1], b[1]));
    return sum_in_place(sum, _mm256_madd_epi16(both, _mm256_set1_epi16(1)));
  }
};
struct AvxVnni : Uint8 {
  static constexpr int kMostWeight = 127;
  INLINE("avx2,fma,avxvnni") Sum add(Sum sum, const __m256i* a, const __m256i* b) { return _mm256_dpbusd_avx_epi32(sum, *a, *b); }
};
struct WideFloat32 : Zmm {
  using Element = float;
  using Sum = __m512;
  static constexpr int kStep = 1, kMost = 255, kMostWeight = 127;
  INLINE(AVX512) Sum add(Sum sum, const __m512i* a, const __m512i* b) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(*a), _mm512_castsi512_ps(*b), sum);
  }
};
struct WideVnni : Zmm {
  using Element = int8_t;
  using Sum = __m512i;
  static constexpr int kStep = 1, kMost = 255, kMostWeight = 127;
  INLINE(AVX512) Sum add(Sum sum, const __m512i* a, const __m512i* b) { return _mm512_dpbusd_epi32(sum, *a, *b); }
};

// a: [step][row], b: [step][vector][lane], each of 32 bits; c: [row][vector][lane].
#define PRODUCT(name, isa)                                                                                                   \
  template <class Op, int MR, int SV>                                                                                        \
  __attribute__((noinline, target(isa))) void name(const int32_t* a, const int32_t* b, int steps, void* out) {               \
    typename Op::Sum acc[MR][SV];                                                                                            \
    std::memset(acc, 0, sizeof acc);                                                                                         \
    constexpr int S = Op::kStep, kLanes = Op::kLanes;                                                                        \
    for (int k = 0; k < steps; k += S, a += S * MR, b += S * SV * kLanes) {                                                  \
      typename Op::Vec right[SV][S];                                                                                         \
      _Pragma("GCC unroll 8") for (int j = 0; j < SV; ++j) _Pragma("GCC unroll 8") for (int s = 0; s < S; ++s) right[j][s] = \
          Op::load(b + (s * SV + j) * kLanes);                                                                               \
      _Pragma("GCC unroll 8") for (int i = 0; i < MR; ++i) {                                                                 \
        typename Op::Vec left[S];                                                                                            \
        _Pragma("GCC unroll 8") for (int s = 0; s < S; ++s) left[s] = Op::splat(a[s * MR + i]);                              \
        _Pragma("GCC unroll 8") for (int j = 0; j < SV; ++j) acc[i][j] = Op::add(acc[i][j], left, right[j]);                 \
      }                                                                                                                      \
    }                                                                                                                        \
    std::memcpy(out, acc, sizeof acc);                                                                                       \
  }
PRODUCT(product_avx2, AVX2)
PRODUCT(product_avxvnni, "avx2,fma,avxvnni")
PRODUCT(product_avx512, AVX512)

struct Case {
  const char* name;
  void (*run)(const int32_t*, const int32_t*, int, void*);
  std::vector<int32_t> a, b;
  int steps;
  double macs, best = 1e9;
  int32_t out[kMostRows * kMostVecs * kMostLanes];

  void time() {
    constexpr int kCalls = 500;
    const auto begin = std::chrono::steady_clock::now();
    for (int call = 0; call < kCalls; ++call) {
      run(a.data(), b.data(), steps, out);
      asm volatile("" ::: "memory");
    }
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() / kCalls);
  }
};

template <class Op, int MR, int SV>
Case make(const char* name, void (*run)(const int32_t*, const int32_t*, int, void*)) {
  using T = typename Op::Element;
  constexpr int N = 4 / sizeof(T), columns = SV * Op::kLanes;
  Case made{name, run, {}, {}, kDepth / N, double(MR) * columns * kDepth};
  std::vector<T> a(kDepth * MR), b(kDepth * columns);
  for (T& value : a) value = static_cast<T>(std::rand() % (Op::kMost + 1));
  for (T& value : b) value = static_cast<T>(std::rand() % (2 * Op::kMostWeight + 1) - Op::kMostWeight);
  made.a.resize(a.size() / N), made.b.resize(b.size() / N);
  std::memcpy(made.a.data(), a.data(), a.size() * sizeof(T)), std::memcpy(made.b.data(), b.data(), b.size() * sizeof(T));
  run(made.a.data(), made.b.data(), made.steps, made.out);
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < columns; ++j) {
      int64_t sum = 0;
      for (int k = 0; k < kDepth; ++k) {
        const T left = a[(k / N * MR + i) * N + k % N];
        sum += int64_t(sizeof(T) == 1 ? int(uint8_t(left)) : int(left)) * int(b[(k / N * columns + j) * N + k % N]);
      }
      float real;
      std::memcpy(&real, &made.out[i * columns + j], sizeof real);
      const int64_t found = sizeof(T) == 4 ? int64_t(real) : made.out[i * columns + j];
      if (found != sum)
        std::fprintf(stderr, "%s %dx%d: expected %ld, got %ld\n", name, MR, SV, long(sum), long(found)), std::exit(1);
    }
  return made;
}

#define SHAPES(Op, name, run) \
  make<Op, 6, 2>(name, run<Op, 6, 2>), make<Op, 4, 3>(name, run<Op, 4, 3>), make<Op, 8, 3>(name, run<Op, 8, 3>)

int main() {
  std::vector<Case> cases{SHAPES(Float32, "float32", product_avx2), SHAPES(Int16, "int16", product_avx2),
                          SHAPES(Uint8, "uint8", product_avx2), SHAPES(Uint7, "uint7", product_avx2)};
  const auto add = [&](std::vector<Case> more) { cases.insert(cases.end(), more.begin(), more.end()); };
  if (__builtin_cpu_supports("avxvnni")) add({SHAPES(AvxVnni, "vnni", product_avxvnni)});
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw"))
    add({SHAPES(WideFloat32, "avx512 float32", product_avx512), SHAPES(WideVnni, "avx512 vnni", product_avx512)});
  for (int round = 0; round < 300; ++round)
    for (Case& each : cases) each.time();
  std::printf("{");
  for (size_t i = 0; i < cases.size(); i += 3) {  // the best of the shapes
    double rate = 0;
    for (size_t j = i; j < i + 3; ++j) rate = std::max(rate, cases[j].macs / cases[j].best);
    std::printf("%s\"%s\": %.4g", i ? ", " : "", cases[i].name, rate);
  }
  std::printf("}\n");
}
