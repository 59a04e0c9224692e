// Matrix products between pixels and channels: product over the channels, outer over the pixels. One microkernel: a block of MR
// rows by SV vectors stays in registers while the depth runs.
// Compiled per instruction set: common/cpu_each_isa.h.

// c[i][j] = init[i][j] + Σ_p Σ_k a[p·ap + i·lda + k] b[p·depth + k][j]. Transposed: a[k·lda + i] instead, and the product is
// added to what c holds, as a sum of its own first: a running sum over millions of pixels would lose the later ones.
template <int MR, int SV, bool Transposed>
AUTOHDR_INLINE void micro(const float* a, int64_t lda, int64_t ap, int64_t panels, int64_t depth, const float* b, int64_t ldb,
                          const float* init, int64_t ldi, float* c, int64_t ldc) {
  vf acc[MR][SV];
  AUTOHDR_UNROLL for (int i = 0; i < MR; ++i)
    AUTOHDR_UNROLL for (int j = 0; j < SV; ++j) acc[i][j] = Transposed ? vf{} : load(init + i * ldi + j * W);
  for (int64_t p = 0; p < panels; ++p) {
    const float* row = a + p * ap;
    for (int64_t k = 0; k < depth; ++k) {
      vf right[SV];
      AUTOHDR_UNROLL for (int j = 0; j < SV; ++j) right[j] = load(b + j * W);
      AUTOHDR_UNROLL for (int i = 0; i < MR; ++i) {
        const vf left = splat(Transposed ? row[i] : row[i * lda]);
        AUTOHDR_UNROLL for (int j = 0; j < SV; ++j) acc[i][j] += left * right[j];
      }
      row += Transposed ? lda : 1;
      b += ldb;
    }
  }
  AUTOHDR_UNROLL for (int i = 0; i < MR; ++i)
    AUTOHDR_UNROLL for (int j = 0; j < SV; ++j)
      store(c + i * ldc + j * W, Transposed ? load(c + i * ldc + j * W) + acc[i][j] : acc[i][j]);
}

// All rows, in blocks of MR and the rest in halves of it.
template <int MR, int SV, bool Transposed>
AUTOHDR_INLINE void micro_rows(int64_t& i, int64_t m, const float* a, int64_t lda, int64_t ap, int64_t panels, int64_t depth,
                               const float* b, int64_t ldb, const float* init, int64_t ldi, float* c, int64_t ldc) {
  const int64_t step = Transposed ? 1 : lda;
  for (; i + MR <= m; i += MR)
    micro<MR, SV, Transposed>(a + i * step, lda, ap, panels, depth, b, ldb, init + i * ldi, ldi, c + i * ldc, ldc);
  if constexpr (MR > 1)
    micro_rows<(MR > 4 ? 4 : MR / 2), SV, Transposed>(i, m, a, lda, ap, panels, depth, b, ldb, init, ldi, c, ldc);
}

// The left-hand side of `product`: m rows; where its depth lies in several panels, they are `panel` apart.
struct Left {
  const float* data;
  int64_t stride, m;
  int64_t panels = 1, panel = 0;
};

template <int NV>
static void product_vecs(const Packed& b, const Left* left, int64_t count, const float* init, int64_t ldi, float* const* c,
                         int64_t ldc, int64_t c_panel) {
  constexpr int VP = NV * 16 / W, SV = block_vecs(NV);  // vectors in a panel, and of them in one register block
  constexpr int MR = W == 16 ? (NV == 4 ? 6 : 8) : SV == 2 ? 6 : 4;
  for (int64_t p = 0; p < b.panels; ++p)
    for (int64_t r = 0; r < count; ++r)
      for (int s = 0; s < VP; s += SV) {
        const Left& l = left[r];
        int64_t i = 0;
        micro_rows<MR, SV, false>(i, l.m, l.data, l.stride, l.panel, l.panels, b.depth / l.panels,
                                  b.data + (p * VP + s) * b.depth * W, SV * W, init + p * NV * 16 + s * W, ldi,
                                  c[r] + p * c_panel + s * W, ldc);
      }
}

// c_r = init + left_r · b for `count` left-hand sides, panel by panel, so that a panel of b is fetched once for all of them.
// init has a row stride ldi: 0 for one bias row.
AUTOHDR_INLINE void product(const Packed& b, const Left* left, int64_t count, const float* init, int64_t ldi, float* const* c,
                            int64_t ldc, int64_t c_panel) {
  switch (b.vecs) {
    case 1: return product_vecs<1>(b, left, count, init, ldi, c, ldc, c_panel);
    case 2: return product_vecs<2>(b, left, count, init, ldi, c, ldc, c_panel);
    case 3: return product_vecs<3>(b, left, count, init, ldi, c, ldc, c_panel);
    default: return product_vecs<4>(b, left, count, init, ldi, c, ldc, c_panel);
  }
}

// c[m][n] += aᵀ b over `depth` rows of a [depth][m] and b [depth][n], few enough that their parts stay in the first-level cache; n a
// multiple of 16.
static void outer_few(int64_t m, int64_t n, int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                      int64_t ldc) {
  constexpr int MR = W == 16 ? 8 : 4;
  for (int64_t j = 0; j < n;) {
    const int64_t rest = (n - j) / W;
    int64_t i = 0;
    if (rest >= 3 && rest != 4) {
      micro_rows<MR, 3, true>(i, m, a, lda, 0, 1, depth, b + j, ldb, nullptr, 0, c + j, ldc);
      j += 3 * W;
    } else if (rest >= 2) {
      micro_rows<MR, 2, true>(i, m, a, lda, 0, 1, depth, b + j, ldb, nullptr, 0, c + j, ldc);
      j += 2 * W;
    } else {
      micro_rows<MR, 1, true>(i, m, a, lda, 0, 1, depth, b + j, ldb, nullptr, 0, c + j, ldc);
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
