// Matrix products between pixels and channels: product over the channels, outer over the pixels. One microkernel: a block of MR
// rows by SV vectors stays in registers while the depth runs.
// Compiled per instruction set: common/cpu_each_isa.h.

// What is multiplied and how sums begin and end. Floats: sums begin with init[i][j], rows of which are ldi apart.
struct Floats {
  using Word = float;  // of an operand, what a step of the depth takes
  using Sum = vf;
  static constexpr bool kInPieces = true;  // the depth may be: a sum goes on from what c holds
  const float* init;
  int64_t ldi;

  Floats at(int64_t i, int64_t j) const { return {init + i * ldi + j, ldi}; }
  AUTOHDR_INLINE Sum splat_word(float word) { return splat(word); }
  AUTOHDR_INLINE Sum load_words(const float* words) { return load(words); }
  AUTOHDR_INLINE Sum add(Sum sum, Sum left, Sum right) { return sum + left * right; }
  Sum begin(int64_t i, int64_t j) const { return load(init + i * ldi + j); }
  vf end(Sum sum, int64_t, int64_t) const { return sum; }
};

// c[i][j] = terms' begin and end of Σ_p Σ_k a[p·ap + i·lda + k] b[p·depth + k][j]. Transposed: a[k·lda + i] instead, and the product
// is added to what c holds, as a sum of its own first: a running sum over millions of pixels would lose the later ones.
template <int MR, int SV, bool Transposed, class Terms>
AUTOHDR_INLINE void micro(const typename Terms::Word* a, int64_t lda, int64_t ap, int64_t panels, int64_t depth,
                          const typename Terms::Word* b, int64_t ldb, const Terms& terms, float* c, int64_t ldc) {
  using Sum = typename Terms::Sum;
  Sum acc[MR][SV];
  AUTOHDR_UNROLL for (int i = 0; i < MR; ++i)  // sums over pixels are more than a second-level cache holds
    AUTOHDR_UNROLL for (int j = 0; Transposed && j < SV * W; j += 16) __builtin_prefetch(c + i * ldc + j);
  AUTOHDR_UNROLL for (int i = 0; i < MR; ++i)
    AUTOHDR_UNROLL for (int j = 0; j < SV; ++j) acc[i][j] = Transposed ? Sum{} : terms.begin(i, j * W);
  for (int64_t p = 0; p < panels; ++p) {
    const typename Terms::Word* row = a + p * ap;
    _Pragma("GCC unroll 4") for (int64_t k = 0; k < depth; ++k) {
      Sum right[SV];
      AUTOHDR_UNROLL for (int j = 0; j < SV; ++j) right[j] = Terms::load_words(b + j * W);
      AUTOHDR_UNROLL for (int i = 0; i < MR; ++i) {
        const Sum left = Terms::splat_word(Transposed ? row[i] : row[i * lda]);
        AUTOHDR_UNROLL for (int j = 0; j < SV; ++j) acc[i][j] = Terms::add(acc[i][j], left, right[j]);
      }
      row += Transposed ? lda : 1;
      b += ldb;
    }
  }
  AUTOHDR_UNROLL for (int i = 0; i < MR; ++i)
    AUTOHDR_UNROLL for (int j = 0; j < SV; ++j)
      if constexpr (Transposed)
        store(c + i * ldc + j * W, load(c + i * ldc + j * W) + acc[i][j]);
      else
        store(c + i * ldc + j * W, terms.end(acc[i][j], i, j * W));
}

// All rows, in blocks of MR and the rest in halves of it.
template <int MR, int SV, bool Transposed, class Terms>
AUTOHDR_INLINE void micro_rows(int64_t& i, int64_t m, const typename Terms::Word* a, int64_t lda, int64_t ap, int64_t panels,
                               int64_t depth, const typename Terms::Word* b, int64_t ldb, const Terms& terms, float* c,
                               int64_t ldc) {
  const int64_t step = Transposed ? 1 : lda;
  for (; i + MR <= m; i += MR)
    micro<MR, SV, Transposed>(a + i * step, lda, ap, panels, depth, b, ldb, terms.at(i, 0), c + i * ldc, ldc);
  if constexpr (MR > 1)
    micro_rows<(MR > 4 ? 4 : MR / 2), SV, Transposed>(i, m, a, lda, ap, panels, depth, b, ldb, terms, c, ldc);
}

// The left-hand side of `product`: m rows; where its depth lies in several panels, they are `panel` apart. Those of one product have
// as many panels each.
template <class Word>
struct LeftOf {
  const Word* data;
  int64_t stride, m;
  int64_t panels = 1, panel = 0;
};
using Left = LeftOf<float>;

template <int NV, class Terms>
static void product_vecs(const PackedOf<typename Terms::Word>& b, const LeftOf<typename Terms::Word>* left, int64_t count,
                         const Terms& terms, float* const* c, int64_t ldc, int64_t c_panel) {
  constexpr int VP = NV * 16 / W, SV = block_vecs(NV);  // vectors in a panel, and of them in one register block
  constexpr int MR = W == 16 ? (NV == 4 ? 6 : 8) : SV == 2 ? 6 : 4;
  constexpr int64_t kBlock = 6144;  // words of a register block's columns that stay in the first-level cache for all rows
  const int64_t panels = left->panels, each = b.depth / panels;
  const int64_t step = Terms::kInPieces ? std::max<int64_t>(1, kBlock / (SV * W * each)) : panels;
  for (int64_t first = 0; first < panels; first += step)
    for (int64_t p = 0; p < b.panels; ++p)
      for (int64_t r = 0; r < count; ++r)
        for (int s = 0; s < VP; s += SV) {
          const LeftOf<typename Terms::Word>& l = left[r];
          float* out = c[r] + p * c_panel + s * W;
          Terms piece = terms.at(0, p * NV * 16 + s * W);
          if constexpr (Terms::kInPieces)
            if (first) piece = {out, ldc};
          int64_t i = 0;
          micro_rows<MR, SV, false>(i, l.m, l.data + first * l.panel, l.stride, l.panel, std::min(step, panels - first), each,
                                    b.data + ((p * VP + s) * b.depth + first * each * SV) * W, SV * W, piece, out, ldc);
        }
}

// c_r = left_r · b for `count` left-hand sides, panel by panel, so that a panel of b is fetched once for all of them.
template <class Terms>
AUTOHDR_INLINE void product(const PackedOf<typename Terms::Word>& b, const LeftOf<typename Terms::Word>* left, int64_t count,
                            const Terms& terms, float* const* c, int64_t ldc, int64_t c_panel) {
  switch (b.vecs) {
    case 1: return product_vecs<1>(b, left, count, terms, c, ldc, c_panel);
    case 2: return product_vecs<2>(b, left, count, terms, c, ldc, c_panel);
    case 3: return product_vecs<3>(b, left, count, terms, c, ldc, c_panel);
    default: return product_vecs<4>(b, left, count, terms, c, ldc, c_panel);
  }
}

// c_r = init + left_r · b. init has a row stride ldi: 0 for one bias row.
AUTOHDR_INLINE void product(const Packed& b, const Left* left, int64_t count, const float* init, int64_t ldi, float* const* c,
                            int64_t ldc, int64_t c_panel) {
  product(b, left, count, Floats{init, ldi}, c, ldc, c_panel);
}

// c[m][n] += aᵀ b over `depth` rows of a [depth][m] and b [depth][n], few enough that their parts stay in the first-level cache; n a
// multiple of W.
static void outer_few(int64_t m, int64_t n, int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                      int64_t ldc) {
  constexpr int MR = W == 16 ? 8 : 4;
  for (int64_t j = 0; j < n;) {
    const int64_t rest = (n - j) / W;
    int64_t i = 0;
    if (rest >= 3 && rest != 4) {
      micro_rows<MR, 3, true>(i, m, a, lda, 0, 1, depth, b + j, ldb, Floats{}, c + j, ldc);
      j += 3 * W;
    } else if (rest >= 2) {
      micro_rows<MR, 2, true>(i, m, a, lda, 0, 1, depth, b + j, ldb, Floats{}, c + j, ldc);
      j += 2 * W;
    } else {
      micro_rows<MR, 1, true>(i, m, a, lda, 0, 1, depth, b + j, ldb, Floats{}, c + j, ldc);
      j += W;
    }
  }
}

// The same of any number of rows.
static void outer(int64_t m, int64_t n, int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                  int64_t ldc) {
  constexpr int64_t kFew = 96;
  for (int64_t first = 0; first < depth; first += kFew)
    outer_few(m, n, std::min(kFew, depth - first), a + first * lda, lda, b + first * ldb, ldb, c, ldc);
}
