// The building blocks of the fused image blocks on a CPU, compiled once per instruction set (no include guard; see
// common/cpu_each_isa.h). Everything works on a tile's scratch memory in float32; tensors are NHWC.
//
// Hidden channels lie in panels of 16·vecs channels: [panel][pixel][16·vecs]. A panel is what one pass of the matrix
// product makes, what the depthwise convolution walks over with its nine weights in registers, and what the Gram product
// consumes, so no step ever transposes.

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

// The first n lanes, n < W; the rest are zero.
template <class T>
AUTOHDR_INLINE vf load_part(const T* p, int64_t n) {
  T lanes[W] = {};
  __builtin_memcpy(lanes, p, n * sizeof(T));
  return load(lanes);
}
template <class T>
AUTOHDR_INLINE void store_part(T* p, vf v, int64_t n) {
  T lanes[W];
  store(lanes, v);
  __builtin_memcpy(p, lanes, n * sizeof(T));
}
template <class T>
AUTOHDR_INLINE vf load_at(const T* p, int64_t i, int64_t n) {
  return i + W <= n ? load(p + i) : load_part(p + i, n - i);
}
template <class T>
AUTOHDR_INLINE void store_at(T* p, int64_t i, int64_t n, vf v) {
  i + W <= n ? store(p + i, v) : store_part(p + i, v, n - i);
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
AUTOHDR_INLINE vf clamp(vf v, float low, float high) {  // a NaN stays one
  v = v < splat(low) ? splat(low) : v;
  return v > splat(high) ? splat(high) : v;
}

// exp for v <= 0, relative error below 2e-7; exactly zero far out.
AUTOHDR_INLINE vf exp_negative(vf v) {
  const vf x = clamp(v, -104.0f, 0.0f) * 1.44269504088896341f;
  const vf magic = splat(12582912.0f);  // 1.5·2^23: adding it rounds to an integer
  const vf n = (x + magic) - magic;
  const vf f = (x - n) * 0.693147180559945309f;
  vf p = splat(1.0f / 5040);
  p = p * f + 1.0f / 720;
  p = p * f + 1.0f / 120;
  p = p * f + 1.0f / 24;
  p = p * f + 1.0f / 6;
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  // 2^n in two halves, so that subnormal results come out right.
  const vi k = __builtin_convertvector(n, vi);
  const vi half = k >> 1;
  return p * (vf)((half + 127) << 23) * (vf)((k - half + 127) << 23);
}

// The standard normal distribution function, absolute error below 1.5e-7: 1/2 + v·P(v²) on [-5.3, 5.3] with P fitted by least
// largest error, in s = 2 v²/5.3² − 1, which keeps its coefficients small.
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

// ---------------------------------------------------------------------------------------------------------------------
// Matrix products. One microkernel: a block of MR rows by SV vectors stays in registers while the depth runs.

// The right-hand side of a product, packed by panels: [panel][depth][16·vecs].
struct Packed {
  float* data;
  int64_t panels, vecs, depth;
  int64_t panel_width() const { return 16 * vecs; }
  int64_t columns() const { return panels * panel_width(); }
  Packed slice(int64_t first, int64_t count) const { return {data + first * depth * panel_width(), count, vecs, depth}; }
};

// How many 16-lane vectors a panel of `lanes` channels should have: the register block is 8×3 or 6×4, whichever pads less.
inline int64_t panel_vecs(int64_t lanes) {
  const int64_t n = ceil_div(lanes, 16);
  if (n <= 2) return n;
  return round_up(n, 4) < round_up(n, 3) ? 4 : 3;
}

// value(k, n): row k, column n, zero where padded.
template <class F>
void pack(const Packed& out, const F& value) {
  const int64_t width = out.panel_width();
  constexpr int64_t kBlock = 16;  // both sides of the transposition stay in the first-level cache
  parallel_ranges(out.panels, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      for (int64_t block = 0; block < out.depth; block += kBlock)
        for (int64_t n = 0; n < width; ++n)
          for (int64_t k = block; k < std::min(block + kBlock, out.depth); ++k)
            out.data[(p * out.depth + k) * width + n] = value(k, p * width + n);
  });
}

// c[i][j] = init[i][j] + Σ_p Σ_k a[p·ap + i·lda + k] b[p·depth + k][j]. Transposed: a[k·lda + i] instead, and the product is added
// to what c holds, as a sum of its own first: a running sum over millions of pixels would lose the later ones.
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
  constexpr int VP = NV * 16 / W;                                 // vectors in a panel
  constexpr int SV = W == 16 ? NV : (VP % 3 == 0 ? 3 : 2);        // of them in one register block
  constexpr int MR = W == 16 ? (NV == 4 ? 6 : 8) : 4;
  for (int64_t p = 0; p < b.panels; ++p)
    for (int64_t r = 0; r < count; ++r)
      for (int s = 0; s < VP; s += SV) {
        const Left& l = left[r];
        int64_t i = 0;
        micro_rows<MR, SV, false>(i, l.m, l.data, l.stride, l.panel, l.panels, b.depth / l.panels,
                                  b.data + p * b.depth * NV * 16 + s * W, NV * 16, init + p * NV * 16 + s * W, ldi,
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

// c[m][n] += aᵀ b over `depth` rows of a [depth][m] and b [depth][n]; n a multiple of 16.
static void add_transposed_product(int64_t m, int64_t n, int64_t depth, const float* a, int64_t lda, const float* b,
                                   int64_t ldb, float* c, int64_t ldc) {
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

// ---------------------------------------------------------------------------------------------------------------------
// Rows of pixels.

// out [pixels][ld] = x [pixels][channels] as float, padded with zeros to a multiple of 16.
template <class T>
static void read_pixels(const T* x, int64_t pixels, int64_t channels, float* out, int64_t ld) {
  const int64_t padded = round_up(channels, 16);
  for (int64_t p = 0; p < pixels; ++p)
    for (int64_t c = 0; c < padded; c += W)
      store(out + p * ld + c, c < channels ? load_at(x + p * channels, c, channels) : vf{});
}

// out = base + add, T [pixels][channels] from add [pixels][ld].
template <class T>
static void add_pixels(const T* base, const float* add, int64_t ld, int64_t pixels, int64_t channels, T* out) {
  for (int64_t p = 0; p < pixels; ++p)
    for (int64_t c = 0; c < channels; c += W)
      store_at(out + p * channels, c, channels, load_at(base + p * channels, c, channels) + load(add + p * ld + c));
}

struct Stats {
  float mean, rstd;
};

// Layer norm over the channels, without weight and bias (they are folded into the 1×1 convolution). Without a bias the
// official "bias-free" kind: the variance is centred, the value is not.
template <class T>
static void normalize(const T* x, int64_t pixels, int64_t channels, float eps, bool centre, float* out, int64_t ld, Stats* stats) {
  const float inverse = 1.0f / static_cast<float>(channels);
  const int64_t whole = channels / W * W, padded = round_up(channels, 16);
  for (int64_t p = 0; p < pixels; ++p) {
    const T* in = x + p * channels;
    float* row = out + p * ld;
    vf total = {};
    for (int64_t c = 0; c < whole; c += W) {
      const vf v = load(in + c);
      store(row + c, v);
      total += v;
    }
    for (int64_t c = whole; c < padded; c += W) {
      const vf v = c < channels ? load_part(in + c, channels - c) : vf{};
      store(row + c, v);
      total += v;
    }
    const float mean = sum(total) * inverse;
    vf squares = {};
    for (int64_t c = 0; c < whole; c += W) {
      const vf d = load(row + c) - mean;
      squares += d * d;
    }
    float variance = sum(squares);
    for (int64_t c = whole; c < channels; ++c) variance += (row[c] - mean) * (row[c] - mean);
    const float rstd = 1.0f / __builtin_sqrtf(variance * inverse + eps);
    const float shift = centre ? mean : 0.0f;
    for (int64_t c = 0; c < channels; c += W) store(row + c, (load(row + c) - shift) * rstd);
    for (int64_t c = channels; c < padded; ++c) row[c] = 0.0f;
    stats[p] = {mean, rstd};
  }
}

// dx = dy + the gradient through `normalize`, given the gradient d [pixels][ldd] at its output `xhat` [pixels][ld].
template <class T>
static void normalize_backward(const T* dy, const float* d, int64_t ldd, const float* xhat, int64_t ld, const Stats* stats,
                               int64_t pixels, int64_t channels, bool centre, T* dx) {
  const float inverse = 1.0f / static_cast<float>(channels);
  for (int64_t p = 0; p < pixels; ++p) {
    const float *g = d + p * ldd, *h = xhat + p * ld;
    vf total = {}, product = {};
    for (int64_t c = 0; c < channels; c += W) {  // both are zero in the padding
      total += load(g + c);
      product += load(g + c) * load(h + c);
    }
    const float rstd = stats[p].rstd;
    const float along = sum(product) * inverse;
    const float shift = centre ? sum(total) * inverse : 0.0f;
    const float offset = centre ? 0.0f : stats[p].mean * rstd;  // without centring, xhat less its mean
    for (int64_t c = 0; c < channels; c += W) {
      const vf grad = (load(g + c) - shift - (load(h + c) - offset) * along) * rstd;
      store_at(dx + p * channels, c, channels, load_at(dy + p * channels, c, channels) + grad);
    }
  }
}

// Columns that a depthwise convolution takes at a time, so that three rows of them stay in the first-level cache while it goes
// down the rows.
AUTOHDR_INLINE int64_t column_block(int64_t bytes_per_pixel) { return std::max<int64_t>(8, (32 << 10) / (3 * bytes_per_pixel)); }

// A depthwise 3×3 convolution of one panel along a row: rows[r] points at the pixel left of the first output.
// With Squares, squares[c] += Σ out².
template <bool Squares>
static void dwconv_row(const float* const* rows, const float* weight, int64_t width, int64_t pixels, float* out, float* squares) {
  for (int64_t c = 0; c < width; c += W) {
    vf w[9];
    AUTOHDR_UNROLL for (int t = 0; t < 9; ++t) w[t] = load(weight + t * width + c);
    const float *r0 = rows[0] + c, *r1 = rows[1] + c, *r2 = rows[2] + c;
    vf total = {};
    for (int64_t p = 0; p < pixels; ++p) {
      const int64_t o = p * width;
      vf a = load(r0 + o) * w[0], b = load(r1 + o) * w[3], d = load(r2 + o) * w[6];
      a += load(r0 + o + width) * w[1];
      b += load(r1 + o + width) * w[4];
      d += load(r2 + o + width) * w[7];
      a += load(r0 + o + 2 * width) * w[2];
      b += load(r1 + o + 2 * width) * w[5];
      d += load(r2 + o + 2 * width) * w[8];
      const vf v = a + b + d;
      store(out + o + c, v);
      if constexpr (Squares) total += v * v;
    }
    if constexpr (Squares) store(squares + c, load(squares + c) + total);
  }
}

// The gradient of the depthwise weights: d_weight[t][c] += Σ input(p + tap t) d(p).
static void dwconv_weight_grad(const float* const* rows, const float* d, int64_t width, int64_t pixels, float* d_weight) {
  for (int64_t c = 0; c < width; c += W) {
    vf acc[9] = {};
    const float *r0 = rows[0] + c, *r1 = rows[1] + c, *r2 = rows[2] + c;
    for (int64_t p = 0; p < pixels; ++p) {
      const int64_t o = p * width;
      const vf g = load(d + o + c);
      AUTOHDR_UNROLL for (int t = 0; t < 3; ++t) {
        acc[t] += load(r0 + o + t * width) * g;
        acc[3 + t] += load(r1 + o + t * width) * g;
        acc[6 + t] += load(r2 + o + t * width) * g;
      }
    }
    AUTOHDR_UNROLL for (int t = 0; t < 9; ++t) store(d_weight + t * width + c, load(d_weight + t * width + c) + acc[t]);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The head of both blocks: layer norm, 1×1 convolution, and the rows of hidden channels a 3×3 convolution needs.

// Hidden channels come in groups (q, k, v of each head; the two halves of the gate), each padded to whole panels.
struct Groups {
  int64_t count, size, vecs, panels_each;
  Groups(int64_t count_, int64_t size_)
      : count(count_), size(size_), vecs(panel_vecs(size_)), panels_each(ceil_div(size_, 16 * vecs)) {}
  int64_t width() const { return 16 * vecs; }          // of a panel
  int64_t padded() const { return panels_each * width(); }  // of a group
  int64_t panels() const { return count * panels_each; }
  int64_t channels() const { return count * padded(); }
  // table[n]: the weight row of padded channel n, or -1.
  const int32_t* rows(Scratch& scratch) const {
    int32_t* table = scratch.take<int32_t>(channels());
    for (int64_t n = 0; n < channels(); ++n)
      table[n] = static_cast<int32_t>(n % padded() < size ? n / padded() * size + n % padded() : -1);
    return table;
  }
};

struct ImageShape {
  int64_t batch, height, width, channels;
};

// Norm, 1×1 and depthwise weights as the tensors hold them.
struct HeadWeights {
  const float* norm_weight;  // [channels]
  const float* norm_bias;    // [channels], or null for the bias-free norm
  const float* weight;       // [rows][channels]
  const float* dwconv;       // [rows][3][3]
  float eps;
};

// The same, packed once a call.
struct Expansion {
  const int32_t* rows;  // Groups::rows
  Packed weight;        // the 1×1 convolution with the norm's weight folded in
  const float* bias;    // its share of the norm's bias
  const float* dwconv;  // [panel][9][width]
  float eps;
  bool centre;
};

static Expansion make_expansion(Scratch& scratch, const Groups& groups, int64_t channels, const HeadWeights& w) {
  const int32_t* rows = groups.rows(scratch);
  const int64_t width = groups.width();
  Packed packed{scratch.take<float>(groups.channels() * channels), groups.panels(), groups.vecs, channels};
  pack(packed, [=](int64_t k, int64_t n) { return rows[n] < 0 ? 0.0f : w.weight[rows[n] * channels + k] * w.norm_weight[k]; });
  float* bias = scratch.zeros<float>(groups.channels());
  float* taps = scratch.zeros<float>(groups.channels() * 9);
  for (int64_t n = 0; n < groups.channels(); ++n) {
    if (rows[n] < 0) continue;
    for (int64_t t = 0; t < 9; ++t) taps[(n / width * 9 + t) * width + n % width] = w.dwconv[rows[n] * 9 + t];
    if (w.norm_bias)
      for (int64_t k = 0; k < channels; ++k) bias[n] += w.weight[rows[n] * channels + k] * w.norm_bias[k];
  }
  return {rows, packed, bias, taps, w.eps, w.norm_bias != nullptr};
}

// A ring of rows of hidden channels, [slot][panel][column][width], for the columns [left, left + columns) of a tile.
// Outside the image the hidden channels are zero: the 3×3 convolution pads after the 1×1.
struct Ring {
  float* data;
  int64_t slots, panels, columns, width;
  static int64_t floats(int64_t slots, int64_t panels, int64_t columns, int64_t width) { return slots * panels * columns * width; }
  int64_t slot(int64_t y) const { return (y % slots + slots) % slots; }
  float* row(int64_t y) const { return data + slot(y) * panels * columns * width; }
  int64_t panel_stride() const { return columns * width; }
  float* at(int64_t y, int64_t panel, int64_t column) const { return row(y) + (panel * columns + column) * width; }
  // The three rows around y of one panel, from a column on: the input of dwconv_row.
  void window(int64_t y, int64_t panel, int64_t column, const float** rows) const {
    for (int64_t r = 0; r < 3; ++r) rows[r] = at(y + r - 1, panel, column);
  }
  void clear_row(int64_t y) const { __builtin_memset(row(y), 0, panels * columns * width * sizeof(float)); }
  void clear_columns(int64_t y, int64_t begin, int64_t end) const {
    if (begin < end)
      for (int64_t p = 0; p < panels; ++p) __builtin_memset(at(y, p, begin), 0, (end - begin) * width * sizeof(float));
  }
};

constexpr int64_t kMaxRows = 10;  // rows that one product takes, at most: a step's and its halo (Tiling)

// A worker's ring of hidden rows with the normalised input and its statistics beside it.
template <class T>
struct HiddenRows {
  const Expansion& op;
  Packed weight;  // all of op.weight or some of its panels
  const float* bias;
  ImageShape shape;
  Ring ring;
  float* xhat;  // [slot][column][ld]
  Stats* stats;
  int64_t ld;
  const T* image = nullptr;
  int64_t left = 0, columns = 0, done = 0;  // the tile's first column, columns held, first row not yet made

  // Columns: the most that a tile holds, its halo included.
  static int64_t floats(const ImageShape& s, int64_t slots, int64_t panels, int64_t width, int64_t columns) {
    return Ring::floats(slots, panels, columns, width) + slots * columns * (xhat_stride(s) + 2);
  }
  // Not a power of two apart, so that the rows of a register block do not share a cache set.
  static int64_t xhat_stride(const ImageShape& s) { return round_up(s.channels, 16) + (s.channels % 256 == 0 ? 16 : 0); }

  HiddenRows(const Expansion& op_, const Packed& weight_, const float* bias_, const ImageShape& shape_, int64_t slots,
             int64_t max_columns, float* memory)
      : op(op_), weight(weight_), bias(bias_), shape(shape_), ring{memory, slots, weight_.panels, max_columns, weight_.panel_width()},
        xhat(memory + Ring::floats(slots, weight_.panels, max_columns, weight_.panel_width())),
        stats(reinterpret_cast<Stats*>(xhat + slots * max_columns * xhat_stride(shape_))), ld(xhat_stride(shape_)) {}

  void begin(const T* image_, int64_t first_row, int64_t left_, int64_t columns_) {
    image = image_, left = left_, columns = columns_, done = first_row;
  }
  float* xhat_at(int64_t y, int64_t column) const { return xhat + (ring.slot(y) * ring.columns + column) * ld; }
  Stats* stats_at(int64_t y, int64_t column) const { return stats + ring.slot(y) * ring.columns + column; }

  // Makes the rows up to and including `last`, at most kMaxRows at a time.
  void advance(int64_t last) {
    const int64_t begin = std::max<int64_t>(left, 0), end = std::min(left + columns, shape.width);
    while (done <= last) {
      Left inputs[kMaxRows];
      float* outputs[kMaxRows];
      int64_t count = 0;
      for (; done <= last && count < kMaxRows; ++done) {
        if (done < 0 || done >= shape.height) {
          ring.clear_row(done);
          continue;
        }
        ring.clear_columns(done, 0, begin - left);
        ring.clear_columns(done, end - left, columns);
        float* normal = xhat_at(done, begin - left);
        normalize(image + (done * shape.width + begin) * shape.channels, end - begin, shape.channels, op.eps, op.centre, normal,
                  ld, stats_at(done, begin - left));
        inputs[count] = {normal, ld, end - begin};
        outputs[count++] = ring.at(done, 0, begin - left);
      }
      product(weight, inputs, count, bias, 0, outputs, ring.width, ring.panel_stride());
    }
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// The backward pass of that head: from the gradient behind the 3×3 convolution to dx and the parameters' gradients.

// Sums over pixels, one set a worker, added up at the end.
struct HeadSums {
  float* weight;  // [hidden][padded channels], the gradient of the folded 1×1 weight
  float* bias;    // [hidden]
  float* dwconv;  // [panel][9][width]
};

// partials[0] += the other workers' partials, in order.
template <class S>
static void add_up(S* partials, int64_t workers, int64_t count) {
  parallel_ranges(ceil_div(count, 1024), [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t w = 1; w < workers; ++w)
      for (int64_t i = begin * 1024; i < std::min(end * 1024, count); ++i) partials[i] += partials[w * count + i];
  });
}

struct HeadBackward {
  const Groups& groups;
  const Expansion& op;
  ImageShape shape;
  Tiling tiling;
  int64_t padded;        // channels, to a multiple of 16
  Packed weight_t;       // folded 1×1 weight, from hidden channels to channels
  const float* flipped;  // depthwise taps turned by 180 degrees, [panel][9][width]
  const float* zeros;    // as many as the widest product has columns
  int64_t sums_size;
  float* sums;

  HeadBackward(Scratch& scratch, const Groups& groups_, const Expansion& op_, const HeadWeights& w, const ImageShape& shape_)
      : groups(groups_),
        op(op_),
        shape(shape_),
        // Hidden rows and their gradients are held: twice the bytes of the forward pass.
        tiling(shape_.batch, shape_.height, shape_.width, 2 * groups_.channels() * static_cast<int64_t>(sizeof(float))) {
    const int64_t hidden = groups.channels(), width = groups.width(), channels = shape.channels;
    const int64_t vecs = panel_vecs(channels), panels = ceil_div(channels, 16 * vecs);
    padded = panels * 16 * vecs;
    weight_t = {scratch.take<float>(hidden * padded), panels, vecs, hidden};
    pack(weight_t, [&](int64_t k, int64_t n) {
      return op.rows[k] < 0 || n >= channels ? 0.0f : w.weight[op.rows[k] * channels + n] * w.norm_weight[n];
    });
    float* taps = scratch.take<float>(hidden * 9);
    for (int64_t p = 0; p < groups.panels(); ++p)
      for (int64_t t = 0; t < 9; ++t)
        __builtin_memcpy(taps + (p * 9 + t) * width, op.dwconv + (p * 9 + 8 - t) * width, width * sizeof(float));
    flipped = taps;
    zeros = scratch.zeros<float>(std::max(hidden, padded));
    sums_size = hidden * (round_up(channels, 16) + 1 + 9);
    sums = scratch.zeros<float>(tiling.workers * sums_size);
  }

  HeadSums sums_of(int64_t worker) const {
    float* s = sums + worker * sums_size;
    return {s, s + groups.channels() * round_up(shape.channels, 16), s + groups.channels() * (round_up(shape.channels, 16) + 1)};
  }
  int64_t grad_columns() const { return tiling.tile_width() + 2; }

  // Rows that `middle` is given at a time, at most.
  int64_t most_rows() const { return tiling.rows_per_step + 2; }

  // middle(worker, hidden, y0, y1, x0, x1, grad, tile): given the hidden rows y0 - 1 .. y1, writes the gradient behind the 3×3
  // convolution for the rows [y0, y1) and columns [x0, x1) into grad. Rows and columns are the image's.
  template <class T, class Middle>
  void run(Scratch& scratch, const T* x, const T* dy, T* dx, const Middle& middle) {
    const int64_t width = groups.width(), panels = groups.panels(), steps = tiling.rows_per_step, most = tiling.tile_width();
    const int64_t hidden_size = HiddenRows<T>::floats(shape, steps + 4, panels, width, most + 4);
    const int64_t grad_size = Ring::floats(steps + 2, panels, most + 2, width);
    const int64_t panel = steps * most * width, ld = round_up(shape.channels, 16);
    const int64_t worker_size = hidden_size + grad_size + panels * panel + steps * most * (padded + ld);
    float* memory = scratch.take<float>(tiling.workers * worker_size);
    tiling.for_each([&](int64_t worker, const Tile& t) {
      float* mine = memory + worker * worker_size;
      HiddenRows<T> hidden(op, op.weight, op.bias, shape, steps + 4, most + 4, mine);
      const Ring grad{mine + hidden_size, steps + 2, panels, most + 2, width};
      float* d_hidden = mine + hidden_size + grad_size;  // [panel][pixel of the step][width]
      float* d_norm = d_hidden + panels * panel;         // [pixel of the step][padded]
      float* normal = d_norm + steps * most * padded;    // [pixel of the step][ld]
      const HeadSums total = sums_of(worker);
      const int64_t image = t.image * shape.height * shape.width * shape.channels, columns = t.x1 - t.x0;
      const int64_t x0 = std::max<int64_t>(t.x0 - 1, 0), x1 = std::min(t.x1 + 1, shape.width);
      hidden.begin(x + image, t.y0 - 2, t.x0 - 2, columns + 4);
      int64_t next = t.y0 - 1;  // gradient row to make
      for (int64_t y = t.y0; y < t.y1; y += steps) {
        const int64_t end = std::min(y + steps, t.y1), pixels = (end - y) * columns;
        hidden.advance(end + 1);
        for (int64_t r = next; r <= end; ++r) {
          grad.clear_columns(r, 0, x0 - (t.x0 - 1));
          grad.clear_columns(r, x1 - (t.x0 - 1), columns + 2);
          if (r < 0 || r >= shape.height) grad.clear_row(r);
        }
        const int64_t first = std::max<int64_t>(next, 0), last = std::min(end + 1, shape.height);
        middle(worker, hidden, first, last, x0, x1, grad, t);
        for (int64_t p = 0; p < panels; ++p)  // the neighbours' rows are theirs
          for (int64_t r = std::max(first, t.y0); r < std::min(last, t.y1); ++r) {
            const float* rows[3];
            hidden.ring.window(r, p, 1, rows);
            dwconv_weight_grad(rows, grad.at(r, p, 1), width, columns, total.dwconv + p * 9 * width);
          }
        next = end + 1;
        for (int64_t r = y; r < end; ++r)
          for (int64_t i = 0; i < columns; ++i)
            std::copy_n(hidden.xhat_at(r, 2 + i), ld, normal + ((r - y) * columns + i) * ld);
        for (int64_t p = 0; p < panels; ++p) {
          float* d = d_hidden + p * panel;
          for (int64_t r = y; r < end; ++r) {
            const float* rows[3];
            grad.window(r, p, 0, rows);
            dwconv_row<false>(rows, flipped + p * 9 * width, width, columns, d + (r - y) * columns * width, nullptr);
          }
          add_transposed_product(width, ld, pixels, d, width, normal, ld, total.weight + p * width * ld, ld);
          if (op.centre)
            for (int64_t c = 0; c < width; c += W) {
              vf sum_c = {};
              for (int64_t i = 0; i < pixels; ++i) sum_c += load(d + i * width + c);
              store(total.bias + p * width + c, load(total.bias + p * width + c) + sum_c);
            }
        }
        const Left left{d_hidden, width, pixels, panels, panel};
        product(weight_t, &left, 1, zeros, 0, &d_norm, padded, weight_t.panel_width());
        for (int64_t r = y; r < end; ++r) {
          const int64_t at = image + (r * shape.width + t.x0) * shape.channels, pixel = (r - y) * columns;
          normalize_backward(dy + at, d_norm + pixel * padded, padded, normal + pixel * ld, ld, hidden.stats_at(r, 2), columns,
                             shape.channels, op.centre, dx + at);
        }
      }
    });
  }

  // The parameters' gradients from the sums. With W' = W·diag(w) and b' = W·b: dW = dW'·diag(w) + db'·bᵀ, dw = diag(Wᵀ dW'), db = Wᵀ db'.
  void finish(const HeadWeights& w, float* d_norm_weight, float* d_norm_bias, float* d_weight, float* d_dwconv) const {
    add_up(sums, tiling.workers, sums_size);
    const HeadSums total = sums_of(0);
    const int64_t channels = shape.channels, ld = round_up(channels, 16), width = groups.width();
    std::fill_n(d_norm_weight, channels, 0.0f);
    if (w.norm_bias) std::fill_n(d_norm_bias, channels, 0.0f);
    for (int64_t n = 0; n < groups.channels(); ++n) {
      const int64_t row = op.rows[n];
      if (row < 0) continue;
      for (int64_t t = 0; t < 9; ++t) d_dwconv[row * 9 + t] = total.dwconv[(n / width * 9 + t) * width + n % width];
      for (int64_t k = 0; k < channels; ++k) {
        const float folded = total.weight[n * ld + k], original = w.weight[row * channels + k];
        d_weight[row * channels + k] = folded * w.norm_weight[k];
        d_norm_weight[k] += folded * original;
        if (!w.norm_bias) continue;
        d_weight[row * channels + k] += total.bias[n] * w.norm_bias[k];
        d_norm_bias[k] += total.bias[n] * original;
      }
    }
  }
};
