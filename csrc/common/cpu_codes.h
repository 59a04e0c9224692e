// Products in 8 bits. A code is an integer from -127 to 127 that stands for a number, by a scale that is kept elsewhere; sums of
// products of codes are exact, and the same on every instruction set.
// Compiled per instruction set: common/cpu_each_isa.h.

#if AUTOHDR_VNNI
struct Code {
  uint8_t bits;  // the code and kOffset: vpdpbusd multiplies unsigned by signed numbers
};
constexpr int32_t kOffset = 128;
#else
struct Code {
  int16_t bits;
};
constexpr int32_t kOffset = 0;
#endif
constexpr int32_t kMostCode = 127;
constexpr int64_t kCodes = 4 / sizeof(Code);  // in a word, the 32 bits that a step of a product takes

typedef decltype(Code::bits) vcode __attribute__((vector_size(W * sizeof(Code))));
typedef decltype(Code::bits) vcode_mem __attribute__((vector_size(W * sizeof(Code)), aligned(sizeof(Code)), may_alias));
typedef int32_t vi_mem __attribute__((vector_size(W * 4), aligned(4), may_alias));

// The nearest codes, of two the even one. A NaN becomes any of them.
AUTOHDR_INLINE void store(Code* p, vf v) {
  const vf magic = splat(12582912.0f);  // see round_to_integer
  const vi codes = (vi)(clamp(v, -kMostCode, kMostCode) + magic) - (vi)magic + kOffset;
  using Between = std::conditional_t<W == 8, vh, vi>;  // GCC would take 8 numbers of 32 bits to bytes one by one
  *reinterpret_cast<vcode_mem*>(p) = __builtin_convertvector(__builtin_convertvector(codes, Between), vcode);
}

// Words of codes times words of weights. Sums become floats by the columns' scale.
struct Codes {
  using Word = int32_t;
  using Sum = vi;
  static constexpr bool kInPieces = false;  // c holds what the scale has made of a sum
  const int32_t* first;                     // what sums begin with, by column
  const float* scale;                       // by column
  const float* init;
  int64_t ldi;

  Codes at(int64_t i, int64_t j) const { return {first + j, scale + j, init + i * ldi + j, ldi}; }
  AUTOHDR_INLINE Sum splat_word(int32_t word) { return word - vi{}; }
  AUTOHDR_INLINE Sum load_words(const int32_t* words) { return *reinterpret_cast<const vi_mem*>(words); }
  AUTOHDR_INLINE Sum add(Sum sum, Sum left, Sum right) {
#if AUTOHDR_VNNI && AUTOHDR_WIDTH == 16
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)left, (__m512i)right);
#elif AUTOHDR_VNNI
    return (vi)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)left, (__m256i)right);
#elif AUTOHDR_WIDTH == 16
    return sum + (vi)_mm512_madd_epi16((__m512i)left, (__m512i)right);
#elif AUTOHDR_WIDTH == 8
    return sum + (vi)_mm256_madd_epi16((__m256i)left, (__m256i)right);
#else
    return sum + (left << 16 >> 16) * (right << 16 >> 16) + (left >> 16) * (right >> 16);
#endif
  }
  Sum begin(int64_t, int64_t j) const { return load_words(first + j); }
  vf end(Sum sum, int64_t i, int64_t j) const {
    return __builtin_convertvector(sum, vf) * load(scale + j) + load(init + i * ldi + j);
  }
};

// Weights in 8 bits.
struct PackedCodes : PackedOf<int32_t> {
  int32_t* first;  // [columns], less what the offset of the codes that they are multiplied with adds
  float* scale;    // [columns]

  // Memory for panels of columns with `depth` codes each.
  static PackedCodes make(Scratch& scratch, int64_t panels, int64_t vecs, int64_t depth) {
    const int64_t words = ceil_div(depth, kCodes), columns = panels * vecs * 16;
    return {{scratch.take<int32_t>(words * columns), panels, vecs, words},
            scratch.take<int32_t>(columns),
            scratch.take<float>(columns)};
  }
  // As PackedOf's.
  static PackedCodes make(Scratch& scratch, int64_t columns, int64_t depth) {
    const int64_t vecs = panel_vecs(columns);
    return make(scratch, ceil_div(columns, 16 * vecs), vecs, depth);
  }
};

// As `pack_columns`, of `depth` codes: value(k, n) is the weight of row k and column n, scale(n) a column's.
template <class F, class S>
void pack_codes(const PackedCodes& packed, int64_t depth, const F& value, const S& scale) {
  pack_columns(packed, [&](int64_t n) {
    return [&, n](int64_t word) {
      uint32_t bits = 0;
      for (int64_t i = 0, k = word * kCodes; i < kCodes && k + i < depth; ++i) {
        const uint32_t mask = 0xffffffffu >> (32 - 32 / kCodes);
        bits |= (static_cast<uint32_t>(value(k + i, n)) & mask) << (32 / kCodes * i);
      }
      return static_cast<int32_t>(bits);
    };
  });
  for (int64_t n = 0; n < packed.columns(); ++n) {
    packed.scale[n] = scale(n);
    packed.first[n] = 0;
    for (int64_t k = 0; k < depth; ++k) packed.first[n] -= kOffset * value(k, n);
  }
}

AUTOHDR_INLINE void product(const PackedCodes& b, const LeftOf<int32_t>* left, int64_t count, const float* init, int64_t ldi,
                            float* const* c, int64_t ldc, int64_t c_panel) {
  product<Codes>(b, left, count, Codes{b.first, b.scale, init, ldi}, c, ldc, c_panel);
}

// As it lies in the tensors: ExpansionWeights in 8 bits. What the norm gives with its weight and bias are the codes.
struct ExpansionCodeWeights {
  Norm norm;
  const int8_t* weight;  // [rows][channels]
  const float* scale;    // [rows]
  const float* dwconv;   // [rows][3][3]
};

// The expansion in 8 bits.
struct ExpansionCodes {
  using Word = int32_t;
  const int32_t* rows;  // Groups::rows
  PackedCodes weight;
  const float* bias;  // zero: the norm's is in the codes
  const float* taps;
  Norm norm;  // padded with zeros to a multiple of 16
  float eps;
  bool centre;

  // The codes of normalised pixels, in their place.
  const int32_t* left(float* normal, int64_t ld, int64_t pixels, int64_t channels) const {
    for (int64_t p = 0; p < pixels; ++p, normal += ld)
      for (int64_t c = 0; c < channels; c += W) {
        vf v = load(normal + c) * load(norm.weight + c);
        if (norm.bias) v += load(norm.bias + c);
        store(reinterpret_cast<Code*>(normal) + c, v);
      }
    return reinterpret_cast<const int32_t*>(normal - pixels * ld);
  }
};

static ExpansionCodes make_expansion(Scratch& scratch, const Groups& groups, int64_t channels, const ExpansionCodeWeights& w) {
  const int32_t* rows = groups.rows(scratch);
  const PackedCodes packed = PackedCodes::make(scratch, groups.panels(), groups.vecs, channels);
  pack_codes(
      packed, channels, [=](int64_t k, int64_t n) { return rows[n] < 0 ? 0 : w.weight[rows[n] * channels + k]; },
      [=](int64_t n) { return rows[n] < 0 ? 0.0f : w.scale[rows[n]]; });
  const auto padded = [&](const float* values) {
    return values ? std::copy_n(values, channels, scratch.zeros<float>(round_up(channels, 16))) - channels : nullptr;
  };
  return {rows,
          packed,
          scratch.zeros<float>(groups.channels()),
          make_taps(scratch, groups, rows, w.dwconv),
          {padded(w.norm.weight), padded(w.norm.bias), w.norm.eps},
          w.norm.eps,
          w.norm.bias != nullptr};
}
