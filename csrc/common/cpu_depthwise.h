// The depthwise 3×3 convolution of a panel of channels, that of two panels and their gate, and the gradient of the taps.
// Compiled per instruction set: common/cpu_each_isa.h.

// Columns that a depthwise convolution takes at a time, so that three rows of them stay in the first-level cache, beside what is
// written, while it goes down the rows.
AUTOHDR_INLINE int64_t column_block(int64_t bytes_per_pixel) { return std::max<int64_t>(8, (20 << 10) / (3 * bytes_per_pixel)); }

// The convolution of the channels from c on, along a row: put(p, v) for each pixel, of which rows[r] point at the one left of the
// first.
template <class Put>
AUTOHDR_INLINE void convolve(const float* const* rows, const float* taps, int64_t c, int64_t width, int64_t pixels,
                             const Put& put) {
  vf w[9];
  AUTOHDR_UNROLL for (int t = 0; t < 9; ++t) w[t] = load(taps + t * width + c);
  const float *r0 = rows[0] + c, *r1 = rows[1] + c, *r2 = rows[2] + c;
  for (int64_t p = 0; p < pixels; ++p) {
    const int64_t o = p * width;
    vf a = load(r0 + o) * w[0], b = load(r1 + o) * w[3], d = load(r2 + o) * w[6];
    a += load(r0 + o + width) * w[1];
    b += load(r1 + o + width) * w[4];
    d += load(r2 + o + width) * w[7];
    a += load(r0 + o + 2 * width) * w[2];
    b += load(r1 + o + 2 * width) * w[5];
    d += load(r2 + o + 2 * width) * w[8];
    put(p, a + b + d);
  }
}

// A depthwise 3×3 convolution of one panel along a row. With Squares, squares[c] += Σ out².
template <bool Squares, class Out>
static void depthwise_row(const float* const* rows, const float* taps, int64_t width, int64_t pixels, Out* out, float* squares) {
  for (int64_t c = 0; c < width; c += W) {
    vf total = {};
    convolve(rows, taps, c, width, pixels, [&](int64_t p, vf v) {
      store(out + p * width + c, v);
      if constexpr (Squares) total += v * v;
    });
    if constexpr (Squares) store(squares + c, load(squares + c) + total);
  }
}

// The same of the rows and columns of a step, out [pixel of the step][width].
template <bool Squares, class Out>
static void depthwise(const Ring& in, int64_t panel, const Range& rows, const Range& columns, const float* taps, Out* out,
                      float* squares) {
  const int64_t width = in.width, block = column_block(width * sizeof(float));
  for (int64_t x = columns.first; x < columns.end; x += block)
    for (int64_t y = rows.first; y < rows.end; ++y) {
      const float* window[3];
      in.window(y, panel, x, window);
      depthwise_row<Squares>(window, taps, width, std::min(block, columns.end - x),
                             out + ((y - rows.first) * columns.size() + x - columns.first) * width, squares);
    }
}

// The same of two panels along a row, out = gate(c, a, b) of the channels from c on. One after the other: AVX2 has registers for the
// taps of one.
template <class Out, class Gate>
AUTOHDR_INLINE void gated_row(const float* const* a_rows, const float* const* b_rows, const float* a_taps, const float* b_taps,
                              int64_t width, int64_t pixels, Out* out, const Gate& gate) {
  constexpr int64_t kRun = 32;  // pixels whose a waits for their b
  vf a[kRun];
  for (int64_t first = 0; first < pixels; first += kRun) {
    const int64_t count = std::min(kRun, pixels - first), at = first * width;
    const float* a_run[3] = {a_rows[0] + at, a_rows[1] + at, a_rows[2] + at};
    const float* b_run[3] = {b_rows[0] + at, b_rows[1] + at, b_rows[2] + at};
    for (int64_t c = 0; c < width; c += W) {
      convolve(a_run, a_taps, c, width, count, [&](int64_t p, vf v) { a[p] = v; });
      convolve(b_run, b_taps, c, width, count, [&](int64_t p, vf v) { store(out + at + p * width + c, gate(c, a[p], v)); });
    }
  }
}

// The gradient of the taps: d_taps[t][c] += Σ input(p + tap t) d(p).
static void depthwise_weight_grad(const float* const* rows, const float* d, int64_t width, int64_t pixels, float* d_taps) {
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
    AUTOHDR_UNROLL for (int t = 0; t < 9; ++t) store(d_taps + t * width + c, load(d_taps + t * width + c) + acc[t]);
  }
}
