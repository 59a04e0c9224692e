// gdfn on a CPU, compiled once per instruction set (no include guard; see common/cpu_each_isa.h).
//
// Forward: one pass; a worker owns a tile at a time and takes its rows through norm, 1×1, 3×3, gate and 1×1 while they are in
// its cache. Backward: one pass that recomputes the hidden rows. Sums are per worker and added in order.

static HeadWeights head_weights(const GdfnWeights& w, float eps) {
  return {w.norm_weight, w.norm_bias, w.project_in, w.dwconv, eps};
}

static ImageShape image_shape(const GdfnShape& s) { return {s.batch, s.height, s.width, s.channels}; }

// Both halves' 3×3 convolution of one panel and their gate: out = gelu(a) ⊙ b.
static void gate_row(const float* const* a_rows, const float* const* b_rows, const float* a_weight, const float* b_weight,
                     int64_t width, int64_t pixels, float* out) {
  for (int64_t c = 0; c < width; c += W) {
    vf wa[9], wb[9];
    AUTOHDR_UNROLL for (int t = 0; t < 9; ++t) wa[t] = load(a_weight + t * width + c), wb[t] = load(b_weight + t * width + c);
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
      store(out + o + c, va * normal_cdf(va) * vb);
    }
  }
}

template <class T>
static void gdfn_forward(const GdfnForward<T>& a) {
  Scratch scratch;
  const GdfnShape& s = a.shape;
  const ImageShape shape = image_shape(s);
  const Groups groups(2, s.hidden);
  const int64_t half = groups.panels_each, width = groups.width();
  const Expansion op = make_expansion(scratch, groups, s.channels, head_weights(a.weights, s.eps));
  const int64_t out_vecs = panel_vecs(s.channels), out_panels = ceil_div(s.channels, 16 * out_vecs);
  const int64_t out_width = out_panels * 16 * out_vecs;
  const Packed project_out{scratch.take<float>(groups.padded() * out_width), out_panels, out_vecs, groups.padded()};
  pack(project_out, [&](int64_t k, int64_t n) {
    return k < s.hidden && n < s.channels ? a.weights.project_out[n * s.hidden + k] : 0.0f;
  });
  const float* zeros = scratch.zeros<float>(out_width);

  const Tiling tiling(s.batch, s.height, s.width, groups.channels() * sizeof(float));
  const int64_t steps = tiling.rows_per_step, most = tiling.tile_width(), block = column_block(2 * width * sizeof(float));
  const int64_t hidden_size = HiddenRows<T>::floats(shape, steps + 2, groups.panels(), width, most + 2);
  const int64_t panel = steps * most * width;
  const int64_t worker_size = hidden_size + half * panel + steps * most * out_width;
  float* memory = scratch.take<float>(tiling.workers * worker_size);
  tiling.for_each([&](int64_t worker, const Tile& t) {
    float* mine = memory + worker * worker_size;
    HiddenRows<T> hidden(op, op.weight, op.bias, shape, steps + 2, most + 2, mine);
    float* gated = mine + hidden_size;   // [panel][pixel of the step][width]
    float* out = gated + half * panel;   // [pixel of the step][out_width]
    const int64_t image = t.image * s.height * s.width * s.channels, columns = t.x1 - t.x0;
    hidden.begin(a.x + image, t.y0 - 1, t.x0 - 1, columns + 2);
    for (int64_t y = t.y0; y < t.y1; y += steps) {
      const int64_t end = std::min(y + steps, t.y1);
      hidden.advance(end);
      for (int64_t p = 0; p < half; ++p)
        for (int64_t x = 0; x < columns; x += block)
          for (int64_t r = y; r < end; ++r) {
            const float *a_rows[3], *b_rows[3];
            hidden.ring.window(r, p, x, a_rows);
            hidden.ring.window(r, half + p, x, b_rows);
            gate_row(a_rows, b_rows, op.dwconv + p * 9 * width, op.dwconv + (half + p) * 9 * width, width,
                     std::min(block, columns - x), gated + p * panel + ((r - y) * columns + x) * width);
          }
      const Left left{gated, width, (end - y) * columns, half, panel};
      product(project_out, &left, 1, zeros, 0, &out, out_width, project_out.panel_width());
      for (int64_t r = y; r < end; ++r) {
        const int64_t at = image + (r * s.width + t.x0) * s.channels;
        add_pixels(a.x + at, out + (r - y) * columns * out_width, out_width, columns, s.channels, a.y + at);
      }
    }
  });
}

template <class T>
static void gdfn_backward(const GdfnBackward<T>& a) {
  Scratch scratch;
  const GdfnShape& s = a.shape;
  const ImageShape shape = image_shape(s);
  const Groups groups(2, s.hidden);
  const int64_t half = groups.panels_each, width = groups.width(), padded = groups.padded(), channels = s.channels;
  const HeadWeights weights = head_weights(a.weights, s.eps);
  const Expansion op = make_expansion(scratch, groups, channels, weights);
  HeadBackward head(scratch, groups, op, weights, shape);
  const Packed project_out{scratch.take<float>(channels * padded), half, groups.vecs, channels};  // from dy to the gate
  pack(project_out, [&](int64_t k, int64_t n) { return n < s.hidden ? a.weights.project_out[k * s.hidden + n] : 0.0f; });

  const int64_t most = head.most_rows() * head.grad_columns(), panel = most * width, ldd = round_up(channels, 16);
  const int64_t middle_size = 3 * half * panel + most * ldd, sums_size = channels * padded;
  float* middles = scratch.take<float>(head.tiling.workers * middle_size);
  float* d_project_out = scratch.zeros<float>(head.tiling.workers * sums_size);  // [channel][padded hidden]
  head.run(scratch, a.x, a.dy, a.dx,
           [&](int64_t worker, const HiddenRows<T>& hidden, int64_t y0, int64_t y1, int64_t x0, int64_t x1, const Ring& grad,
               const Tile& t) {
             const int64_t count = x1 - x0, column = x0 - (t.x0 - 1);
             float *halves = middles + worker * middle_size, *d_gate = halves + 2 * half * panel, *dy = d_gate + half * panel;
             for (int64_t y = y0; y < y1; ++y)
               read_pixels(a.dy + ((t.image * s.height + y) * s.width + x0) * channels, count, channels,
                           dy + (y - y0) * count * ldd, ldd);
             const Left left{dy, ldd, (y1 - y0) * count};
             product(project_out, &left, 1, head.zeros, 0, &d_gate, width, panel);
             for (int64_t p = 0; p < half; ++p) {
               float *first = halves + p * panel, *second = halves + (half + p) * panel, *d = d_gate + p * panel;
               for (int64_t y = y0; y < y1; ++y) {
                 const float* rows[3];
                 const int64_t row = (y - y0) * count * width;
                 hidden.ring.window(y, p, column, rows);  // one to the left: the hidden rows begin a column earlier
                 dwconv_row<false>(rows, op.dwconv + p * 9 * width, width, count, first + row, nullptr);
                 hidden.ring.window(y, half + p, column, rows);
                 dwconv_row<false>(rows, op.dwconv + (half + p) * 9 * width, width, count, second + row, nullptr);
                 float *d_first = grad.at(y, p, column), *d_second = grad.at(y, half + p, column);
                 for (int64_t i = 0; i < count * width; i += W) {
                   const vf u = load(first + row + i), v = load(second + row + i), g = load(d + row + i);
                   const vf cdf = normal_cdf(u), density = exp_negative(u * u * -0.5f) * 0.398942280401432678f;
                   store(d_first + i, g * v * (cdf + u * density));
                   store(d_second + i, g * u * cdf);
                   store(first + row + i, u * cdf * v);  // the gate's output, for project_out's gradient
                 }
                 // The neighbours' pixels are theirs.
                 std::fill_n(first + row, (t.x0 - x0) * width, 0.0f);
                 std::fill_n(first + row + (t.x1 - x0) * width, (x1 - t.x1) * width, 0.0f);
               }
               const int64_t own = std::max(y0, t.y0), pixel = (own - y0) * count;
               add_transposed_product(channels, width, (std::min(y1, t.y1) - own) * count, dy + pixel * ldd, ldd,
                                      first + pixel * width, width, d_project_out + worker * sums_size + p * width, padded);
             }
           });
  head.finish(weights, a.d_norm_weight, a.d_norm_bias, a.d_project_in, a.d_dwconv);
  add_up(d_project_out, head.tiling.workers, sums_size);
  for (int64_t c = 0; c < channels; ++c) std::copy_n(d_project_out + c * padded, s.hidden, a.d_project_out + c * s.hidden);
}
