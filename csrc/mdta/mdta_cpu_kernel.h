// mdta on a CPU, compiled once per instruction set (no include guard; see common/cpu_each_isa.h).
//
// Forward: pass 1 (statistics) sums the Gram matrix and the squares of q and k; pass 2 (apply) makes v and applies
// project_out · attention to it, folded into one matrix an image. Backward: one pass for the gradient of that matrix (it needs
// v), some small matrices, and one pass that recomputes q and k for everything else. A worker owns a tile at a time; sums are
// per worker and added in order, so that a result depends on the number of threads but not on their timing.

// The small matrices of one image, in double: they are few, and the gradient takes differences of nearly equal ones.
struct Attention {
  int64_t heads, size, channels;
  const float *gram, *q_norm, *k_norm;
  double* attention;  // [heads][size][size], softmax(temperature · cosine)
  double* cosine;     // [heads][size][size], gram / (|q| |k|)
  float* combined;    // [channels][channels], project_out · blockdiag(attention)

  static Attention make(Scratch& scratch, int64_t heads, int64_t channels) {
    const int64_t size = channels / heads, square = channels * size;
    double* small = scratch.take<double>(2 * square);
    return {heads, size, channels, nullptr, nullptr, nullptr, small, small + square, scratch.take<float>(channels * channels)};
  }

  double q_length(int64_t c) const { return std::max<double>(q_norm[c], 1e-12); }
  double k_length(int64_t c) const { return std::max<double>(k_norm[c], 1e-12); }

  // Of image b.
  void solve(const MdtaAttention& of, int64_t b, const MdtaWeights& weights) {
    gram = of.gram + b * channels * size, q_norm = of.q_norm + b * channels, k_norm = of.k_norm + b * channels;
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t h = c / size, row = c * size;
      double top = -INFINITY, total = 0;
      for (int64_t j = 0; j < size; ++j) {
        cosine[row + j] = gram[row + j] / (q_length(c) * k_length(h * size + j));
        attention[row + j] = cosine[row + j] * weights.temperature[h];
        top = attention[row + j] <= top ? top : attention[row + j];  // a NaN wins, so that it reaches the output
      }
      for (int64_t j = 0; j < size; ++j) total += attention[row + j] = std::exp(attention[row + j] - top);
      for (int64_t j = 0; j < size; ++j) attention[row + j] /= total;
    }
    parallel_ranges(channels, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c)
        for (int64_t h = 0; h < heads; ++h) {
          float* out = combined + c * channels + h * size;
          std::fill_n(out, size, 0.0f);
          for (int64_t i = 0; i < size; ++i) {
            const float left = weights.project_out[c * channels + h * size + i];
            const double* right = attention + (h * size + i) * size;
            for (int64_t j = 0; j < size; ++j) out[j] += left * static_cast<float>(right[j]);
          }
        }
    });
  }
};

static HeadWeights head_weights(const MdtaWeights& w, float eps) {
  return {w.norm_weight, w.norm_bias, w.qkv, w.dwconv, eps};
}

static ImageShape image_shape(const MdtaShape& s) { return {s.batch, s.height, s.width, s.channels}; }

// Gram matrix and squares, over the rows [first, end) of every image.
template <class T>
static void mdta_statistics(const MdtaStatistics<T>& a) {
  Scratch scratch;
  const MdtaShape& s = a.shape;
  const ImageShape shape = image_shape(s);
  const int64_t size = s.head_size();
  const Groups groups(2 * s.heads, size), heads(s.heads, size);
  const int64_t part = heads.panels(), each = heads.panels_each, width = groups.width(), padded = heads.padded();
  const Expansion op = make_expansion(scratch, groups, s.channels, head_weights(a.weights, s.eps));

  // Image by image: the sums of many images at once would take more memory than they are worth.
  const Tiling tiling(1, a.end - a.first, s.width, groups.channels() * sizeof(float));
  const int64_t steps = tiling.rows_per_step, most = tiling.tile_width(), block = column_block(width * sizeof(float));
  const int64_t hidden_size = HiddenRows<T>::floats(shape, steps + 2, groups.panels(), width, most + 2);
  const int64_t panel = steps * most * width;  // between panels of q, k
  const int64_t gram_size = s.heads * padded * padded, sums_size = gram_size + 2 * heads.channels();
  const int64_t worker_size = hidden_size + groups.panels() * panel + sums_size;
  float* memory = scratch.take<float>(tiling.workers * worker_size);
  double* sums = scratch.take<double>(tiling.workers * sums_size);  // Gram matrix, squares of q, squares of k
  for (int64_t b = 0; b < s.batch; ++b) {
    std::fill_n(sums, tiling.workers * sums_size, 0.0);
    tiling.for_each([&](int64_t worker, const Tile& t) {
      float* mine = memory + worker * worker_size;
      HiddenRows<T> hidden(op, op.weight, op.bias, shape, steps + 2, most + 2, mine);
      float* qk = mine + hidden_size;                   // [panel][pixel of the step][width]
      float* gram = qk + groups.panels() * panel;       // the step's share of the sums
      float* squares = gram + gram_size;
      const int64_t columns = t.x1 - t.x0, last = a.first + t.y1;
      hidden.begin(a.x + b * s.height * s.width * s.channels, a.first + t.y0 - 1, t.x0 - 1, columns + 2);
      for (int64_t row = a.first + t.y0; row < last; row += steps) {
        const int64_t end = std::min(row + steps, last), pixels = (end - row) * columns;
        hidden.advance(end);
        std::fill_n(gram, sums_size, 0.0f);
        for (int64_t p = 0; p < groups.panels(); ++p)
          for (int64_t c = 0; c < columns; c += block)
            for (int64_t r = row; r < end; ++r) {
              const float* rows[3];
              hidden.ring.window(r, p, c, rows);
              dwconv_row<true>(rows, op.dwconv + p * 9 * width, width, std::min(block, columns - c),
                               qk + p * panel + ((r - row) * columns + c) * width, squares + p * width);
            }
        for (int64_t h = 0; h < s.heads; ++h)
          for (int64_t i = 0; i < each; ++i)
            for (int64_t j = 0; j < each; ++j)
              add_transposed_product(width, width, pixels, qk + (h * each + i) * panel, width, qk + (part + h * each + j) * panel,
                                     width, gram + (h * padded + i * width) * padded + j * width, padded);
        for (int64_t i = 0; i < sums_size; ++i) sums[worker * sums_size + i] += gram[i];
      }
    });
    add_up(sums, tiling.workers, sums_size);
    for (int64_t c = 0; c < s.channels; ++c) {
      const int64_t row = c / size * padded + c % size, at = b * s.channels + c;
      a.q_square[at] = sums[gram_size + row];
      a.k_square[at] = sums[gram_size + heads.channels() + row];
      std::copy_n(sums + row * padded, size, a.gram + at * size);
    }
  }
}

// y = x + project_out · attention · v, given the statistics.
template <class T>
static void mdta_apply(const MdtaApply<T>& a) {
  Scratch scratch;
  const MdtaShape& s = a.shape;
  const ImageShape shape = image_shape(s);
  const Groups groups(s.heads, s.head_size());
  const int64_t panels = groups.panels(), width = groups.width(), v = 2 * s.channels;
  MdtaWeights w = a.weights;
  w.qkv += v * s.channels, w.dwconv += v * 9;
  const Expansion op = make_expansion(scratch, groups, s.channels, head_weights(w, s.eps));
  const int64_t out_vecs = panel_vecs(s.channels), out_panels = ceil_div(s.channels, 16 * out_vecs);
  const int64_t out_width = out_panels * 16 * out_vecs;
  const Packed combined{scratch.take<float>(groups.channels() * out_width), out_panels, out_vecs, groups.channels()};
  const float* zeros = scratch.zeros<float>(out_width);
  Attention attention = Attention::make(scratch, s.heads, s.channels);

  const Tiling tiling(1, s.height, s.width, groups.channels() * sizeof(float));
  const int64_t steps = tiling.rows_per_step, most = tiling.tile_width(), block = column_block(width * sizeof(float));
  const int64_t hidden_size = HiddenRows<T>::floats(shape, steps + 2, panels, width, most + 2);
  const int64_t panel = steps * most * width, worker_size = hidden_size + panels * panel + steps * most * out_width;
  float* memory = scratch.take<float>(tiling.workers * worker_size);
  for (int64_t b = 0; b < s.batch; ++b) {
    const int64_t image = b * s.height * s.width * s.channels;
    attention.solve(a.attention, b, a.weights);
    pack(combined, [&](int64_t k, int64_t n) {
      return op.rows[k] < 0 || n >= s.channels ? 0.0f : attention.combined[n * s.channels + op.rows[k]];
    });
    tiling.for_each([&](int64_t worker, const Tile& t) {
      float* mine = memory + worker * worker_size;
      HiddenRows<T> hidden(op, op.weight, op.bias, shape, steps + 2, most + 2, mine);
      float *values = mine + hidden_size, *out = values + panels * panel;  // [panel][pixel of the step][width], [pixel][out_width]
      const int64_t columns = t.x1 - t.x0;
      hidden.begin(a.x + image, t.y0 - 1, t.x0 - 1, columns + 2);
      for (int64_t y = t.y0; y < t.y1; y += steps) {
        const int64_t end = std::min(y + steps, t.y1);
        hidden.advance(end);
        for (int64_t p = 0; p < panels; ++p)
          for (int64_t x = 0; x < columns; x += block)
            for (int64_t r = y; r < end; ++r) {
              const float* rows[3];
              hidden.ring.window(r, p, x, rows);
              dwconv_row<false>(rows, op.dwconv + p * 9 * width, width, std::min(block, columns - x),
                                values + p * panel + ((r - y) * columns + x) * width, nullptr);
            }
        const Left left{values, width, (end - y) * columns, panels, panel};
        product(combined, &left, 1, zeros, 0, &out, out_width, combined.panel_width());
        for (int64_t r = y; r < end; ++r) {
          const int64_t at = image + (r * s.width + t.x0) * s.channels;
          add_pixels(a.x + at, out + (r - y) * columns * out_width, out_width, columns, s.channels, a.y + at);
        }
      }
    });
  }
}

// The small matrices of the backward pass, of one image, packed for the products that use them.
struct AttentionGrad {
  Packed to_q;       // [heads] of them: dq = k · to_q − q ∘ q_scale
  Packed to_k;       // dk = q · to_k − k ∘ k_scale
  Packed to_v;       // dv = dy · to_v
  double* q_scale;   // [padded q channels]
  double* k_scale;
};

template <class T>
static void mdta_backward(const MdtaBackward<T>& a) {
  Scratch scratch;
  const MdtaShape& s = a.shape;
  const ImageShape shape = image_shape(s);
  const int64_t size = s.head_size(), channels = s.channels;
  const Groups groups(3 * s.heads, size), heads(s.heads, size);
  const int64_t part = heads.panels(), each = heads.panels_each, width = groups.width(), padded = heads.padded();
  const HeadWeights weights = head_weights(a.weights, s.eps);
  const Expansion op = make_expansion(scratch, groups, channels, weights);
  HeadBackward head(scratch, groups, op, weights, shape);
  const int64_t square = s.heads * size * size, ldd = round_up(channels, 16);

  // The gradient of combined = project_out · blockdiag(attention), of one image: Σ dy vᵀ.
  const Tiling tiling(1, s.height, s.width, heads.channels() * sizeof(float));
  const int64_t steps = tiling.rows_per_step, most = tiling.tile_width();
  const Packed v_weight = op.weight.slice(2 * part, part);
  const float* v_bias = op.bias + 2 * heads.channels();
  const int64_t hidden_size = HiddenRows<T>::floats(shape, steps + 2, part, width, most + 2);
  const int64_t sums_size = channels * heads.channels(), worker_size = hidden_size + steps * most * (width + ldd);
  float* memory = scratch.take<float>(tiling.workers * worker_size);
  float* d_combined = scratch.take<float>(tiling.workers * sums_size);  // [channel][padded v channel]
  const auto sum_up = [&](const T* x, const T* d_out) {
    std::fill_n(d_combined, tiling.workers * sums_size, 0.0f);
    tiling.for_each([&](int64_t worker, const Tile& t) {
      float* mine = memory + worker * worker_size;
      HiddenRows<T> hidden(op, v_weight, v_bias, shape, steps + 2, most + 2, mine);
      float *v = mine + hidden_size, *dy = v + steps * most * width;
      const int64_t columns = t.x1 - t.x0;
      hidden.begin(x, t.y0 - 1, t.x0 - 1, columns + 2);
      for (int64_t row = t.y0; row < t.y1; row += steps) {
        const int64_t end = std::min(row + steps, t.y1);
        hidden.advance(end);
        for (int64_t r = row; r < end; ++r)
          read_pixels(d_out + (r * s.width + t.x0) * channels, columns, channels, dy + (r - row) * columns * ldd, ldd);
        for (int64_t p = 0; p < part; ++p) {
          for (int64_t r = row; r < end; ++r) {
            const float* rows[3];
            hidden.ring.window(r, p, 0, rows);
            float* out = v + (r - row) * columns * width;
            dwconv_row<false>(rows, op.dwconv + (2 * part + p) * 9 * width, width, columns, out, nullptr);
          }
          add_transposed_product(channels, width, (end - row) * columns, dy, ldd, v, width,
                                 d_combined + worker * sums_size + p * width, heads.channels());
        }
      }
    });
    add_up(d_combined, tiling.workers, sums_size);
  };

  // 1. The small gradients.
  std::fill_n(a.d_temperature, s.heads, 0.0f);
  std::fill_n(a.d_project_out, channels * channels, 0.0f);
  Attention attention = Attention::make(scratch, s.heads, channels);
  float *d_attention = scratch.take<float>(3 * square), *d_gram = d_attention + square, *rounded = d_gram + square;
  AttentionGrad* grads = scratch.take<AttentionGrad>(s.batch);
  for (int64_t b = 0; b < s.batch; ++b) {
    attention.solve(a.attention, b, a.weights);
    AttentionGrad& g = grads[b];
    g.q_scale = scratch.zeros<double>(heads.channels());
    g.k_scale = scratch.zeros<double>(heads.channels());
    sum_up(a.x + b * s.height * s.width * channels, a.dy + b * s.height * s.width * channels);
    std::fill_n(d_attention, square, 0.0f);
    std::copy_n(attention.attention, square, rounded);
    parallel_ranges(s.heads, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t h = begin; h < end; ++h)
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t i = 0; i < size; ++i) {
            const float* d_row = d_combined + c * heads.channels() + h * padded;
            const int64_t row = (h * size + i) * size, at = c * channels + h * size + i;
            vf dot = {};
            for (int64_t j = 0; j < size; j += W) {
              const vf value = load_at(d_row, j, size);
              dot += value * load_at(rounded + row, j, size);
              store_at(d_attention + row, j, size, load_at(d_attention + row, j, size) + value * a.weights.project_out[at]);
            }
            a.d_project_out[at] += sum(dot);
          }
    });
    for (int64_t h = 0; h < s.heads; ++h) {
      double d_temperature = 0;
      for (int64_t i = 0; i < size; ++i) {
        const int64_t row = (h * size + i) * size;
        const double q = attention.q_length(h * size + i);
        double along = 0;
        for (int64_t j = 0; j < size; ++j) along += d_attention[row + j] * attention.attention[row + j];
        for (int64_t j = 0; j < size; ++j) {
          const double k = attention.k_length(h * size + j);
          const double d_score = attention.attention[row + j] * (d_attention[row + j] - along);
          const double d_cosine = d_score * a.weights.temperature[h], through = d_cosine * attention.cosine[row + j];
          d_temperature += d_score * attention.cosine[row + j];
          g.q_scale[h * padded + i] += through / (q * q);
          g.k_scale[h * padded + j] += through / (k * k);
          d_gram[row + j] = static_cast<float>(d_cosine / (q * k));
        }
      }
      a.d_temperature[h] += static_cast<float>(d_temperature);
    }
    const auto block = [&](int64_t depth, int64_t panels) {
      return Packed{scratch.take<float>(depth * panels * width), panels, heads.vecs, depth};
    };
    g.to_q = block(padded, part), g.to_k = block(padded, part), g.to_v = block(channels, part);
    const auto entry = [&](int64_t h, int64_t i, int64_t j) {
      return i < size && j < size ? d_gram[(h * size + i) * size + j] : 0.0f;
    };
    pack(g.to_q, [&](int64_t k, int64_t n) { return entry(n / padded, n % padded, k); });
    pack(g.to_k, [&](int64_t k, int64_t n) { return entry(n / padded, k, n % padded); });
    pack(g.to_v, [&](int64_t k, int64_t n) {
      const int64_t c = op.rows[n];  // the rows of q, the first group of heads, are the channels themselves
      return c < 0 ? 0.0f : attention.combined[k * channels + c];
    });
  }

  // 2. Everything else in one pass.
  const int64_t reach = head.most_rows() * head.grad_columns(), middle_size = reach * (2 * heads.channels() + ldd);
  float* middles = scratch.take<float>(head.tiling.workers * middle_size);
  head.run(scratch, a.x, a.dy, a.dx,
           [&](int64_t worker, const HiddenRows<T>& hidden, int64_t y0, int64_t y1, int64_t x0, int64_t x1, const Ring& grad,
               const Tile& t) {
             float *qk = middles + worker * middle_size, *dy = qk + reach * 2 * heads.channels();
             const AttentionGrad& g = grads[t.image];
             const int64_t count = x1 - x0, rows = y1 - y0, panel = reach * width, column = x0 - (t.x0 - 1);
             Left lefts[kMaxRows];
             float* outs[kMaxRows];
             // outs = lefts · b, a row at a time, into grad from panel p on.
             const auto into_grad = [&](const Packed& b, int64_t p) {
               for (int64_t r = 0; r < rows; ++r) outs[r] = grad.at(y0 + r, p, column);
               product(b, lefts, rows, head.zeros, 0, outs, width, grad.panel_stride());
             };
             for (int64_t p = 0; p < 2 * part; ++p)
               for (int64_t r = 0; r < rows; ++r) {
                 const float* window[3];
                 hidden.ring.window(y0 + r, p, column, window);  // one to the left: the hidden rows begin a column earlier
                 dwconv_row<false>(window, op.dwconv + p * 9 * width, width, count, qk + p * panel + r * count * width, nullptr);
               }
             const auto heads_of = [&](int64_t p) {
               for (int64_t r = 0; r < rows; ++r) lefts[r] = {qk + p * panel + r * count * width, width, count, each, panel};
             };
             for (int64_t h = 0; h < s.heads; ++h) {
               heads_of(part + h * each);
               into_grad(g.to_q.slice(h * each, each), h * each);
               heads_of(h * each);
               into_grad(g.to_k.slice(h * each, each), part + h * each);
             }
             for (int64_t p = 0; p < 2 * part; ++p) {  // less q or k times its scale
               const double* scale = p < part ? g.q_scale + p * width : g.k_scale + (p - part) * width;
               for (int64_t c = 0; c < width; c += W) {
                 float factors[W];
                 std::copy_n(scale + c, W, factors);
                 const vf factor = load(factors);
                 for (int64_t r = 0; r < rows; ++r) {
                   const float* value = qk + p * panel + r * count * width;
                   float* d = grad.at(y0 + r, p, column);
                   for (int64_t i = c; i < count * width; i += width) store(d + i, load(d + i) - load(value + i) * factor);
                 }
               }
             }
             for (int64_t r = 0; r < rows; ++r) {
               lefts[r] = {dy + r * count * ldd, ldd, count};
               read_pixels(a.dy + ((t.image * s.height + y0 + r) * s.width + x0) * channels, count, channels,
                           dy + r * count * ldd, ldd);
             }
             into_grad(g.to_v, 2 * part);
           });
  head.finish(weights, a.d_norm_weight, a.d_norm_bias, a.d_qkv, a.d_dwconv);
}
