// The depthwise 3×3 convolution of a panel of channels, that of two panels and their gate, and the gradient of the taps.
// Compiled per instruction set: common/cpu_each_isa.h.

// Columns that a depthwise convolution takes at a time, so that three rows of them stay in the first-level cache while it goes
// down the rows.
AUTOHDR_INLINE int64_t column_block(int64_t bytes_per_pixel) { return std::max<int64_t>(8, (32 << 10) / (3 * bytes_per_pixel)); }

// A depthwise 3×3 convolution of one panel along a row: rows[r] points at the pixel left of the first output.
// With Squares, squares[c] += Σ out².
template <bool Squares, class Out>
static void depthwise_row(const float* const* rows, const float* taps, int64_t width, int64_t pixels, Out* out, float* squares) {
  for (int64_t c = 0; c < width; c += W) {
    vf w[9];
  AUTOHDR_UNROLL for (int t = 0; t < 9; ++t) w[t] = load(taps + t * width + c);
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

// The same of two panels along a row, out = gate(c, a, b) of the channels from c on.
template <class Out, class Gate>
AUTOHDR_INLINE void gated_row(const float* const* a_rows, const float* const* b_rows, const float* a_taps, const float* b_taps,
                              int64_t width, int64_t pixels, Out* out, const Gate& gate) {
  for (int64_t c = 0; c < width; c += W) {
    vf wa[9], wb[9];
  AUTOHDR_UNROLL for (int t = 0; t < 9; ++t) wa[t] = load(a_taps + t * width + c), wb[t] = load(b_taps + t * width + c);
    const float *a0 = a_rows[0] + c, *a1 = a_rows[1] + c, *a2 = a_rows[2] + c;
    const float *b0 = b_rows[0] + c, *b1 = b_rows[1] + c, *b2 = b_rows[2] + c;
    for (int64_t o = 0; o < pixels * width; o += width) {
      const int64_t o1 = o + width, o2 = o1 + width;
      const vf va = (load(a0 + o) * wa[0] + load(a0 + o1) * wa[1] + load(a0 + o2) * wa[2]) +
                    (load(a1 + o) * wa[3] + load(a1 + o1) * wa[4] + load(a1 + o2) * wa[5]) +
                    (load(a2 + o) * wa[6] + load(a2 + o1) * wa[7] + load(a2 + o2) * wa[8]);
      const vf vb = (load(b0 + o) * wb[0] + load(b0 + o1) * wb[1] + load(b0 + o2) * wb[2]) +
                    (load(b1 + o) * wb[3] + load(b1 + o1) * wb[4] + load(b1 + o2) * wb[5]) +
                    (load(b2 + o) * wb[6] + load(b2 + o1) * wb[7] + load(b2 + o2) * wb[8]);
      store(out + o + c, gate(c, va, vb));
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
