// mdta on a CPU, compiled once per instruction set (no include guard; see common/cpu_each_isa.h).
//
// Forward: pass 1 (statistics) sums the Gram matrix and the squares of q and k; pass 2 (apply) makes v and applies
// project_out · attention to it, folded into one matrix an image. Backward: one pass for the gradient of that matrix (it needs
// v), some small matrices, and one pass that recomputes q and k for everything else. A worker owns a tile at a time; sums are
// per worker and added in order, so that a result depends on the number of threads but not on their timing.

#include "common/cpu_view.h"
#include "common/cpu_norm.h"
#include "common/cpu_repack.h"
#include "common/cpu_depthwise.h"
#include "common/cpu_product.h"
#include "common/cpu_expansion.h"
#include "mdta/mdta_cpu_forward.h"

static ExpansionWeights expansion_weights(const MdtaWeights& w, float eps) {
  return {{w.norm_weight, w.norm_bias, eps}, w.qkv, w.dwconv};
}

template <class T>
static void run(const MdtaStatistics<T>& a) {
  Scratch scratch;
  const MdtaShape& s = a.shape;
  const Groups groups = query_key_groups(s);
  statistics(scratch, groups, make_expansion(scratch, groups, s.channels, expansion_weights(a.weights, s.eps)), a);
}

template <class T>
static void run(const MdtaApply<T>& a) {
  Scratch scratch;
  const MdtaShape& s = a.shape;
  const Groups groups(1, s.channels);
  const int64_t v = 2 * s.channels;
  MdtaWeights w = a.weights;
  w.qkv += v * s.channels, w.dwconv += v * 9;
  const Expansion op = make_expansion(scratch, groups, s.channels, expansion_weights(w, s.eps));
  // The product goes as far as v does in the only panel, of several to the end of each.
  const Packed combined = Packed::make(scratch, s.channels, groups.panels() == 1 ? s.channels : groups.channels());
  apply<float>(scratch, groups, op, combined, a, [&](const float* matrix) {
    pack_columns(combined, [&](int64_t n) {
      return [=, rows = op.rows, column = matrix + n * s.channels, padding = n >= s.channels](int64_t k) {
        return padding || rows[k] < 0 ? 0.0f : column[rows[k]];
      };
    });
  });
}

// The small matrices of the backward pass, of one image, packed for the products that use them.
struct AttentionGrad {
  Packed to_q;      // [heads] of them: dq = k · to_q − q ∘ q_scale
  Packed to_k;      // dk = q · to_k − k ∘ k_scale
  Packed to_v;      // dv = dy · to_v
  double* q_scale;  // [padded q channels]
  double* k_scale;
};

template <class T>
static void run(const MdtaBackward<T>& a) {
  Scratch scratch;
  const MdtaShape& s = a.shape;
  const ImageShape shape = image_shape(s);
  const View<const T> in{a.x, shape}, d_out{a.dy, shape};
  const int64_t size = s.head_size(), channels = s.channels;
  const Groups groups(3 * s.heads, size), heads(s.heads, size);
  const int64_t part = heads.panels(), each = heads.panels_each, width = groups.width(), padded = heads.padded();
  const ExpansionWeights weights = expansion_weights(a.weights, s.eps);
  const Expansion op = make_expansion(scratch, groups, channels, weights);
  ExpansionBackward expansion(scratch, groups, op, weights, shape);
  const int64_t square = s.heads * size * size, ldd = pixel_stride(channels);

  // The gradient of combined = project_out · blockdiag(attention), of one image: Σ dy vᵀ.
  const Steps steps(1, shape.rows(), s.width, heads.channels() * sizeof(float));
  const int64_t most = steps.most_columns();
  const Packed v_weight = op.weight.slice(2 * part, 3 * part);
  const float* v_bias = op.bias + 2 * heads.channels();
  const int64_t hidden_size = Hidden<T>::floats(shape, steps.rows + 2, part, width, most + 2);
  const int64_t sums_size = channels * heads.channels(), worker_size = hidden_size + steps.rows * most * (width + ldd);
  float* memory = scratch.take<float>(steps.workers * worker_size);
  float* d_combined = scratch.take<float>(steps.workers * sums_size);  // [channel][padded v channel]
  const auto sum_up = [&](int64_t image) {
    std::fill_n(d_combined, steps.workers * sums_size, 0.0f);
    steps.for_each([&](int64_t worker, const Tile& tile) {
      float* mine = memory + worker * worker_size;
      Hidden<T> hidden(op, v_weight, v_bias, in, steps.rows + 2, most + 2, mine);
      float *v = mine + hidden_size, *dy = v + steps.rows * most * width;
      const int64_t columns = tile.columns.size();
      hidden.start(image, tile.rows.first - 1, tile.columns.around(1));
      for (int64_t first = tile.rows.first; first < tile.rows.end; first += steps.rows) {
        const Range rows{first, std::min(first + steps.rows, tile.rows.end)};
        hidden.advance(rows.end + 1);
        read_pixels(d_out, image, rows, tile.columns, dy, ldd);
        for (int64_t p = 0; p < part; ++p) {
          depthwise<false>(hidden.ring, p, rows, tile.columns, op.taps + (2 * part + p) * 9 * width, v, nullptr);
          outer(channels, width, rows.size() * columns, dy, ldd, v, width, d_combined + worker * sums_size + p * width,
                heads.channels());
        }
      }
    });
    add_up(d_combined, steps.workers, sums_size);
  };

  // 1. The small gradients.
  std::fill_n(a.d_temperature, s.heads, 0.0f);
  std::fill_n(a.d_project_out, channels * channels, 0.0f);
  Attention attention = Attention::make(scratch, s);
  double* d_attention = scratch.take<double>(square);
  float *d_gram = scratch.take<float>(2 * square), *rounded = d_gram + square;
  AttentionGrad* grads = scratch.take<AttentionGrad>(s.batch);
  for (int64_t b = 0; b < s.batch; ++b) {
    attention.solve(a.attention, b, a.weights);
    AttentionGrad& g = grads[b];
    g.q_scale = scratch.zeros<double>(heads.channels());
    g.k_scale = scratch.zeros<double>(heads.channels());
    sum_up(b);
    std::fill_n(d_attention, square, 0.0);
    std::copy_n(attention.attention, square, rounded);
    parallel_ranges(s.heads, [&](int64_t, int64_t first, int64_t end) {
      for (int64_t h = first; h < end; ++h)
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t i = 0; i < size; ++i) {
            const float* d_row = d_combined + c * heads.channels() + h * padded;
            const int64_t row = (h * size + i) * size, at = c * channels + h * size + i;
            const double weight = a.weights.project_out[at];
            for (int64_t j = 0; j < size; ++j) d_attention[row + j] += d_row[j] * weight;
            vf dot = {};
            for (int64_t j = 0; j < size; j += W) dot += load_at(d_row, j, size) * load_at(rounded + row, j, size);
            a.d_project_out[at] += sum(dot);
          }
    });
    const auto orthogonal = [&](float norm) { return attention.normalised(norm) && !s.one_pixel(); };
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
          if (orthogonal(attention.q_norm[h * size + i])) g.q_scale[h * padded + i] += through / (q * q);
          if (orthogonal(attention.k_norm[h * size + j])) g.k_scale[h * padded + j] += through / (k * k);
          d_gram[row + j] = static_cast<float>(d_cosine / (q * k));
        }
      }
      a.d_temperature[h] += static_cast<float>(d_temperature);
    }
    const auto block = [&](int64_t depth, int64_t panels) {
      return Packed{scratch.take<float>(depth * panels * width), panels, heads.vecs, depth};
    };
    g.to_q = block(padded, part), g.to_k = block(padded, part), g.to_v = block(channels, part);
    const auto entry = [&](int64_t h, int64_t i, int64_t j, const float* norm, int64_t of) {
      return i < size && j < size && !attention.constant(norm[h * size + of]) ? d_gram[(h * size + i) * size + j] : 0.0f;
    };
    pack_rows(g.to_q, [&](int64_t k) {
      return [=, &entry](int64_t n) { return entry(n / padded, n % padded, k, attention.q_norm, n % padded); };
    });
    pack_columns(g.to_k, [&](int64_t n) {
      return [=, &entry](int64_t k) { return entry(n / padded, k, n % padded, attention.k_norm, n % padded); };
    });
    pack_rows(g.to_v, [&](int64_t k) {  // the rows of q, the first group of heads, are the channels themselves
      return [rows = op.rows, row = attention.combined + k * channels](int64_t n) { return rows[n] < 0 ? 0.0f : row[rows[n]]; };
    });
  }

  // 2. Everything else in one pass.
  const int64_t reach = expansion.most_pixels(), middle_size = reach * (2 * heads.channels() + ldd);
  float* middles = scratch.take<float>(expansion.steps.workers * middle_size);
  expansion.run(scratch, in, d_out, View<T>{a.dx, shape},
                [&](int64_t worker, const Hidden<T>& hidden, const Range& rows, const Range& columns, const Ring& grad,
                    const Tile& tile) {
                  float *qk = middles + worker * middle_size, *dy = qk + reach * 2 * heads.channels();
                  const AttentionGrad& g = grads[tile.image];
                  const int64_t count = columns.size(), height = rows.size(), panel = reach * width;
                  Left lefts[Hidden<T>::kMostRows];
                  float* outs[Hidden<T>::kMostRows];
                  // outs = lefts · b, a row at a time, into grad from panel p on.
                  const auto into_grad = [&](const Packed& b, int64_t p) {
                    for (int64_t r = 0; r < height; ++r) outs[r] = grad.at(rows.first + r, p, columns.first);
                    product(b, lefts, height, expansion.zeros, 0, outs, width, grad.panel_stride());
                  };
                  for (int64_t p = 0; p < 2 * part; ++p)
                    depthwise<false>(hidden.ring, p, rows, columns, op.taps + p * 9 * width, qk + p * panel, nullptr);
                  const auto heads_of = [&](int64_t p) {
                    for (int64_t r = 0; r < height; ++r)
                      lefts[r] = {qk + p * panel + r * count * width, width, count, each, panel};
                  };
                  for (int64_t h = 0; h < s.heads; ++h) {
                    heads_of(part + h * each);
                    into_grad(g.to_q.slice(h * each, (h + 1) * each), h * each);
                    heads_of(h * each);
                    into_grad(g.to_k.slice(h * each, (h + 1) * each), part + h * each);
                  }
                  for (int64_t p = 0; p < 2 * part; ++p) {  // less q or k times its scale
                    const double* scale = p < part ? g.q_scale + p * width : g.k_scale + (p - part) * width;
                    for (int64_t c = 0; c < width; c += W) {
                      float factors[W];
                      std::copy_n(scale + c, W, factors);
                      const vf factor = load(factors);
                      for (int64_t r = 0; r < height; ++r) {
                        const float* value = qk + p * panel + r * count * width;
                        float* d = grad.at(rows.first + r, p, columns.first);
                        for (int64_t i = c; i < count * width; i += width) store(d + i, load(d + i) - load(value + i) * factor);
                      }
                    }
                  }
                  read_pixels(d_out, tile.image, rows, columns, dy, ldd);
                  for (int64_t r = 0; r < height; ++r) lefts[r] = {dy + r * count * ldd, ldd, count};
                  into_grad(g.to_v, 2 * part);
                });
  expansion.finish(weights, {a.d_norm_weight, a.d_norm_bias, a.d_qkv}, a.d_dwconv);
}
