// nafblock on a CPU, compiled once per instruction set (no include guard; see common/cpu_each_isa.h).
//
// Forward: pass 1 takes rows through norm, 1×1, 3×3 and gate, sums the gate's output and leaves it in y; pass 2 takes each pixel
// of it through the rest, in place. Backward: pass 1 again, into dx; a pass over pixels that computes the rest again, for its
// parameters' gradients and the image's between both halves of the block; some small vectors; and a pass back through pass 1.
// Where the forward pass kept its activations, no product is computed again. A worker owns a tile at a time; sums are per worker
// and added in order, so that a result depends on the number of threads but not on their timing.

#include "common/cpu_view.h"
#include "common/cpu_norm.h"
#include "common/cpu_repack.h"
#include "common/cpu_depthwise.h"
#include "common/cpu_product.h"
#include "common/cpu_expansion.h"

static ImageShape image_shape(const NafblockShape& s) { return {s.batch, s.height, s.width, s.channels}; }

static ExpansionWeights first_weights(const NafblockShape& s, const NafblockWeights& w) {
  return {{w.norm1_weight, w.norm1_bias, s.eps}, w.conv1_weight, w.conv2_weight, w.conv1_bias};
}

static ExpansionWeights second_weights(const NafblockShape& s, const NafblockWeights& w) {
  return {{w.norm2_weight, w.norm2_bias, s.eps}, w.conv4_weight, nullptr, w.conv4_bias};
}

// Of NafblockForward's and NafblockBackward's, or null.
template <class T>
struct Kept {
  T* hidden = nullptr;    // [pixel][2][C], before the 3×3 convolution
  T* local = nullptr;     // [pixel][C], behind it and the gate
  T* middle = nullptr;    // [pixel][C], between both halves of the block
  T* expanded = nullptr;  // [pixel][2][C], before the second gate
  Kept(T* data, const NafblockShape& s) {
    const int64_t image = s.batch * s.height * s.width * s.channels;
    if (data) hidden = data, local = data + 2 * image, middle = data + 3 * image, expanded = data + 4 * image;
  }
};

// The 3×3 convolution's bias by hidden channels.
static const float* local_bias(Scratch& scratch, const Groups& groups, const Expansion& op, const NafblockWeights& w) {
  float* bias = scratch.zeros<float>(groups.channels());
  for (int64_t n = 0; n < groups.channels(); ++n)
    if (op.rows[n] >= 0) bias[n] = w.conv2_bias[op.rows[n]];
  return bias;
}

// The gated 3×3 convolution of rows of every image, into out and summed over these rows, and its hidden channels into keep. Each of
// the three may be null.
template <class T>
static void make_local(Scratch& scratch, const NafblockShape& s, const NafblockWeights& w, const T* x, const Range& all_rows,
                       T* out, double* sums, T* keep = nullptr) {
  const ImageShape shape = image_shape(s);
  const int64_t channels = s.channels;
  const View<T> local{out, shape};
  const Groups groups(2, channels);
  const int64_t half = groups.panels_each, width = groups.width(), padded = groups.padded();
  const Expansion op = make_expansion(scratch, groups, channels, first_weights(s, w));
  const float* bias = local_bias(scratch, groups, op, w);

  const Steps steps(s.batch, all_rows, s.width, groups.channels() * sizeof(float));
  const int64_t most = steps.most_columns(), block = column_block(2 * width * sizeof(float));
  const int64_t hidden_size = Hidden<T>::floats(shape, steps.rows + 2, groups.panels(), width, most + 2);
  const int64_t worker_size = hidden_size + block * width;
  float* memory = scratch.take<float>(steps.workers * worker_size);
  double* totals = scratch.zeros<double>(steps.workers * s.batch * padded);
  steps.for_each([&](int64_t worker, const Tile& tile) {
    float *mine = memory + worker * worker_size, *gated = mine + hidden_size;  // [pixel][width]
    Hidden<T> hidden(op, op.weight, op.bias, View<const T>{x, shape}, steps.rows + 2, most + 2, mine);
    hidden.start(tile.image, tile.rows.first - 1, tile.columns.around(1));
    for (int64_t first = tile.rows.first; first < tile.rows.end; first += steps.rows) {
      const int64_t end = std::min(first + steps.rows, tile.rows.end);
      hidden.advance(end + 1);
      if (keep) hidden.keep(groups, {first, end}, tile.columns, {keep, groups.images(shape)});
      for (int64_t p = 0; p < half; ++p) {
        double* total = totals + (worker * s.batch + tile.image) * padded + p * width;
        const float *a_bias = bias + p * width, *b_bias = bias + (half + p) * width;
        for (int64_t left = tile.columns.first; left < tile.columns.end; left += block)
          for (int64_t y = first; y < end; ++y) {
            const int64_t pixels = std::min(block, tile.columns.end - left);
            const float *a_rows[3], *b_rows[3];
            hidden.ring.window(y, p, left, a_rows);
            hidden.ring.window(y, half + p, left, b_rows);
            gated_row(a_rows, b_rows, op.taps + p * 9 * width, op.taps + (half + p) * 9 * width, width, pixels, gated,
                      [&](int64_t c, vf a, vf b) { return (a + load(a_bias + c)) * (b + load(b_bias + c)); });
            for (int64_t c = 0; c < std::min(width, channels - p * width); c += W) {
              vf sum_c = {};
              for (int64_t i = 0; i < pixels; ++i) {
                const vf v = load(gated + i * width + c);
                sum_c += v;
                if (out) store_at(local.at(tile.image, y, left + i), p * width + c, channels, v);
              }
              for (int i = 0; i < W; ++i) total[c + i] += sum_c[i];
            }
          }
      }
    }
  });
  if (!sums) return;
  add_up(totals, steps.workers, s.batch * padded);
  for (int64_t b = 0; b < s.batch; ++b) std::copy_n(totals + b * padded, channels, sums + b * channels);
}

// The weights of channels, [batch][ld], from their means.
static float* channel_attention(Scratch& scratch, const NafblockShape& s, const NafblockWeights& w, const float* means,
                                int64_t ld) {
  const int64_t channels = s.channels;
  float* attention = scratch.zeros<float>(s.batch * ld);
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t c = 0; c < channels; ++c) {
      vf dot = {};
      for (int64_t k = 0; k < channels; k += W)
        dot += load_at(w.sca_weight + c * channels, k, channels) * load_at(means + b * channels, k, channels);
      attention[b * ld + c] = sum(dot) + w.sca_bias[c];
    }
  return attention;
}

// A 1×1 convolution [C, C] with a residual's scale folded in.
struct Scaled {
  Packed weight;
  const float* bias;  // [weight.columns()]
};

static Scaled make_scaled(Scratch& scratch, int64_t channels, int64_t depth, const float* weight, const float* bias,
                          const float* scale) {
  const Packed packed = Packed::make(scratch, channels, depth);
  pack_columns(packed, [=](int64_t n) {
    const bool padding = n >= channels;
    return [=, column = weight + n * channels, count = padding ? 0 : channels, factor = padding ? 0 : scale[n]](int64_t k) {
      return k < count ? factor * column[k] : 0.0f;
    };
  });
  float* scaled = scratch.zeros<float>(packed.columns());
  for (int64_t c = 0; c < channels; ++c) scaled[c] = scale[c] * bias[c];
  return {packed, scaled};
}

// What follows the gated 3×3 convolution up to the second gate, pixel by pixel.
struct Pointwise {
  const NafblockShape& s;
  Groups groups;
  Expansion op;            // norm and 1×1 to both halves of the gate
  int64_t ld;              // of a pixel's channels
  const float* attention;  // [batch][groups.padded()]
  Scaled conv3;            // none where the activations were kept
  Steps steps;             // over the pixels of an image

  Pointwise(Scratch& scratch, const NafblockShape& s_, const NafblockWeights& w, const float* means, int64_t batch,
            bool kept = false)
      : s(s_), groups(2, s.channels), op(make_expansion(scratch, groups, s.channels, second_weights(s, w), kept)),
        ld(pixel_stride(s.channels)), attention(channel_attention(scratch, s, w, means, groups.padded())),
        conv3(kept ? Scaled{} : make_scaled(scratch, s.channels, s.channels, w.conv3_weight, w.conv3_bias, w.beta)),
        steps(batch, {0, 1}, s.height * s.width, 1) {}

  int64_t out_width() const { return conv3.weight.columns(); }
  int64_t panel() const { return steps.most_columns() * groups.width(); }  // between panels of the halves

  // A step's.
  struct Memory {
    float* local;   // [pixel][ld]
    float* out;     // [pixel][out_width()]
    float* middle;  // [pixel][channels], the image between both halves of the block
    float* normal;  // [pixel][ld]
    float* halves;  // [panel][pixel][width]
    Stats* stats;   // [pixel]
  };
  int64_t floats() const { return steps.most_columns() * (2 * ld + out_width() + s.channels + groups.channels() + 2); }
  Memory memory(float* at) const {
    const int64_t most = steps.most_columns();
    float *out = at + most * ld, *middle = out + most * out_width(), *normal = middle + most * s.channels;
    float *halves = normal + most * ld, *stats = halves + most * groups.channels();
    return {at, out, middle, normal, halves, reinterpret_cast<Stats*>(stats)};
  }

  // Up to both halves of the gate, of pixels of an image.
  template <class T>
  void expand(int64_t image, const T* x, const T* local, int64_t pixels, const Memory& m) const {
    read_pixels(local, pixels, s.channels, m.local, ld);
    const float* weights = attention + image * groups.padded();
    for (int64_t i = 0; i < pixels; ++i)
      for (int64_t c = 0; c < s.channels; c += W) store(m.local + i * ld + c, load(m.local + i * ld + c) * load(weights + c));
    const Left weighed{m.local, ld, pixels}, normal{m.normal, ld, pixels};
    product(conv3.weight, &weighed, 1, conv3.bias, 0, &m.out, out_width(), conv3.weight.panel_width());
    add_pixels(x, m.out, out_width(), pixels, s.channels, m.middle);
    normalize(m.middle, pixels, s.channels, op.eps, op.centre, m.normal, ld, m.stats);
    product(op.weight, &normal, 1, op.bias, 0, &m.halves, groups.width(), panel());
  }
};

// y from x and the gated 3×3 convolution, which may be in y.
template <class T>
static void apply(Scratch& scratch, const NafblockShape& s, const NafblockWeights& w, const T* x, const float* means,
                  const T* local, T* y, const Kept<T>& keep) {
  const Pointwise rest(scratch, s, w, means, s.batch);
  const int64_t half = rest.groups.panels_each, width = rest.groups.width(), panel = rest.panel();
  const Scaled conv5 = make_scaled(scratch, s.channels, rest.groups.padded(), w.conv5_weight, w.conv5_bias, w.gamma);
  float* memory = scratch.take<float>(rest.steps.workers * rest.floats());
  rest.steps.for_each([&](int64_t worker, const Tile& tile) {
    const Pointwise::Memory m = rest.memory(memory + worker * rest.floats());
    const int64_t pixels = tile.columns.size(), first = (tile.image * s.height * s.width + tile.columns.first) * s.channels;
    rest.expand(tile.image, x + first, local + first, pixels, m);
    if (keep.middle) {
      add_pixels(x + first, m.out, rest.out_width(), pixels, s.channels, keep.middle + first);
      write_panels(rest.groups, m.halves, panel, pixels, keep.expanded + 2 * first);
    }
    for (int64_t p = 0; p < half; ++p)
      for (int64_t i = p * panel; i < p * panel + pixels * width; i += W)
        store(m.halves + i, load(m.halves + i) * load(m.halves + half * panel + i));
    const Left gated{m.halves, width, pixels, half, panel};
    product(conv5.weight, &gated, 1, conv5.bias, 0, &m.out, rest.out_width(), conv5.weight.panel_width());
    add_pixels(m.middle, m.out, rest.out_width(), pixels, s.channels, y + first);
  });
}

template <class T>
static void run(const NafblockForward<T>& a) {
  Scratch scratch;
  const NafblockShape& s = a.shape;
  const Kept<T> keep(a.kept, s);
  T* local = keep.local ? keep.local : a.y;
  double* sums = scratch.take<double>(s.batch * s.channels);
  make_local(scratch, s, a.weights, a.x, {0, s.height}, local, sums, keep.hidden);
  for (int64_t i = 0; i < s.batch * s.channels; ++i)
    a.means[i] = static_cast<float>(sums[i] / static_cast<double>(s.height * s.width));
  apply(scratch, s, a.weights, a.x, a.means, local, a.y, keep);
}

template <class T>
static void run(const NafblockStatistics<T>& a) {
  Scratch scratch;
  make_local<T>(scratch, a.shape, a.weights, a.x, {a.first, a.end}, nullptr, a.sums);
}

template <class T>
static void run(const NafblockApply<T>& a) {
  Scratch scratch;
  make_local(scratch, a.shape, a.weights, a.x, {0, a.shape.height}, a.y, nullptr);
  apply(scratch, a.shape, a.weights, a.x, a.means, a.y, a.y, Kept<T>(nullptr, a.shape));
}

// Σ of the rows of d [pixels][ld], added to total [channels].
static void add_rows(const float* d, int64_t ld, int64_t pixels, int64_t channels, float* total) {
  for (int64_t c = 0; c < channels; c += W) {
    vf sum_c = {};
    for (int64_t i = 0; i < pixels; ++i) sum_c += load(d + i * ld + c);
    add_at(total, c, channels, sum_c);
  }
}

// The gradients of a 1×1 convolution and of the scale behind it from those of their product, weight [channels][ld] and bias.
static void unscale(int64_t channels, const float* weight, int64_t ld, const float* bias, const float* of_weight,
                    const float* of_bias, const float* of_scale, float* d_weight, float* d_bias, float* d_scale) {
  for (int64_t c = 0; c < channels; ++c) {
    vf along = {};
    for (int64_t k = 0; k < channels; k += W) {
      const vf v = load_at(weight + c * ld, k, channels);
      store_at(d_weight + c * channels, k, channels, of_scale[c] * v);
      along += v * load_at(of_weight + c * channels, k, channels);
    }
    d_bias[c] = of_scale[c] * bias[c];
    d_scale[c] = sum(along) + bias[c] * of_bias[c];
  }
}

template <class T>
static void run(const NafblockBackward<T>& a) {
  Scratch scratch;
  const NafblockShape& s = a.shape;
  const NafblockWeights& w = a.weights;
  const NafblockTensors<float>& d = a.grads;
  const ImageShape shape = image_shape(s);
  const int64_t channels = s.channels, image_pixels = s.height * s.width;
  const Kept<const T> kept(a.kept, s);
  if (!a.kept) make_local<T>(scratch, s, w, a.x, {0, s.height}, a.dx, nullptr);
  const T* local = a.kept ? kept.local : a.dx;  // which is free until the last pass

  // 1. The pixels of the second half, image by image: its parameters' gradients and conv3's, and the image's behind the first half.
  const Pointwise rest(scratch, s, w, a.means, 1, a.kept);
  const Groups& groups = rest.groups;
  const int64_t half = groups.panels_each, width = groups.width(), padded = groups.padded(), panel = rest.panel(), ld = rest.ld;
  const int64_t most = rest.steps.most_columns(), workers = rest.steps.workers, columns_in = round_up(channels, 16);
  const ExpansionWeights second = second_weights(s, w);
  const Packed conv4_back = transpose(scratch, groups, rest.op, second, channels);
  const auto back = [&](const float* weight, const float* scale) {  // from the gradient behind a 1×1 and its scale
    const Packed packed{scratch.take<float>(channels * padded), half, groups.vecs, channels};
    pack_rows(packed, [=](int64_t k) {
      return [=, row = weight + k * channels, factor = scale[k]](int64_t n) { return n < channels ? factor * row[n] : 0.0f; };
    });
    return packed;
  };
  const Packed conv3_back = back(w.conv3_weight, w.beta), conv5_back = back(w.conv5_weight, w.gamma);
  const float* zeros = scratch.zeros<float>(std::max(padded, conv4_back.columns()));

  const int64_t worker_size = rest.floats() + most * (ld + padded + conv4_back.columns());
  float* memory = scratch.take<float>(workers * worker_size);
  // Of the gradients: conv5's weight [channel][padded], conv4's [hidden][columns_in], and the biases of conv5, conv4 and conv3.
  const int64_t sums_size = channels * padded + groups.channels() * (columns_in + 1) + 2 * columns_in;
  float* sums = scratch.zeros<float>(workers * sums_size);
  float* by_local = scratch.take<float>(workers * channels * columns_in);  // conv3's weight, before an image's attention
  float* shift = scratch.zeros<float>(s.batch * padded);                   // the gradient at each pixel through the means
  float* d_conv3 = scratch.zeros<float>(channels * channels);              // its weight's
  std::fill_n(d.sca_weight, channels * channels, 0.0f);
  std::fill_n(d.sca_bias, channels, 0.0f);
  for (int64_t b = 0; b < s.batch; ++b) {
    std::fill_n(by_local, workers * channels * columns_in, 0.0f);
    rest.steps.for_each([&](int64_t worker, const Tile& tile) {
      float* mine = memory + worker * worker_size;
      const Pointwise::Memory m = rest.memory(mine);
      float *dy = mine + rest.floats(), *d_gate = dy + most * ld, *d_normal = d_gate + most * padded;
      float *conv5 = sums + worker * sums_size, *conv4 = conv5 + channels * padded,
            *bias5 = conv4 + groups.channels() * columns_in;
      float *bias4 = bias5 + columns_in, *bias3 = bias4 + groups.channels();
      const int64_t pixels = tile.columns.size(), first = (b * image_pixels + tile.columns.first) * channels;
      if (a.kept) {
        normalize(kept.middle + first, pixels, channels, rest.op.eps, rest.op.centre, m.normal, ld, m.stats);
        read_panels(groups, kept.expanded + 2 * first, pixels, m.halves, panel);
      } else {
        rest.expand(b, a.x + first, local + first, pixels, m);
      }
      read_pixels(a.dy + first, pixels, channels, dy, ld);
      add_rows(dy, ld, pixels, channels, bias5);
      const Left left{dy, ld, pixels};
      product(conv5_back, &left, 1, zeros, 0, &d_gate, width, panel);
      for (int64_t p = 0; p < half; ++p) {
        float *u = m.halves + p * panel, *v = m.halves + (half + p) * panel, *g = d_gate + p * panel;
        for (int64_t i = 0; i < pixels * width; i += W) {
          const vf a_half = load(u + i), b_half = load(v + i), grad = load(g + i);
          store(u + i, grad * b_half);
          store(v + i, grad * a_half);
          store(g + i, a_half * b_half);  // the gate's output, for conv5's gradient
        }
        outer(channels, width, pixels, dy, ld, g, width, conv5 + p * width, padded);
      }
      for (int64_t p = 0; p < groups.panels(); ++p) {
        const float* d_half = m.halves + p * panel;
        outer(width, columns_in, pixels, d_half, width, m.normal, ld, conv4 + p * width * columns_in, columns_in);
        add_rows(d_half, width, pixels, width, bias4 + p * width);
      }
      const Left halves{m.halves, width, pixels, groups.panels(), panel};
      product(conv4_back, &halves, 1, zeros, 0, &d_normal, conv4_back.columns(), conv4_back.panel_width());
      norm_backward(a.dy + first, d_normal, conv4_back.columns(), m.normal, ld, m.stats, pixels, channels, rest.op.centre,
                    a.middle + first);
      read_pixels(a.middle + first, pixels, channels, dy, ld);
      add_rows(dy, ld, pixels, channels, bias3);
      read_pixels(local + first, pixels, channels, m.local, ld);
      outer(channels, columns_in, pixels, dy, ld, m.local, ld, by_local + worker * channels * columns_in, columns_in);
    });
    add_up(by_local, workers, channels * columns_in);
    const float *attention = rest.attention + b * padded, *means = a.means + b * channels;
    std::vector<float> d_attention(channels);
    for (int64_t o = 0; o < channels; ++o)
      for (int64_t c = 0; c < channels; c += W) {
        const vf by = load(by_local + o * columns_in + c);
        add_at(d_conv3 + o * channels, c, channels, by * load(attention + c));
        add_at(d_attention.data(), c, channels, by * w.beta[o] * load_at(w.conv3_weight + o * channels, c, channels));
      }
    for (int64_t o = 0; o < channels; ++o) {
      const float a_pixel = d_attention[o] / static_cast<float>(image_pixels);
      d.sca_bias[o] += d_attention[o];
      for (int64_t c = 0; c < channels; c += W) {
        add_at(d.sca_weight + o * channels, c, channels, d_attention[o] * load_at(means, c, channels));
        add_at(shift + b * padded, c, channels, a_pixel * load_at(w.sca_weight + o * channels, c, channels));
      }
    }
  }
  add_up(sums, workers, sums_size);
  const float *d_conv4 = sums + channels * padded, *d_bias5 = d_conv4 + groups.channels() * columns_in;
  const float *d_bias4 = d_bias5 + columns_in, *d_bias3 = d_bias4 + groups.channels();
  unscale(channels, sums, padded, d_bias5, w.conv5_weight, w.conv5_bias, w.gamma, d.conv5_weight, d.conv5_bias, d.gamma);
  unscale(channels, d_conv3, channels, d_bias3, w.conv3_weight, w.conv3_bias, w.beta, d.conv3_weight, d.conv3_bias, d.beta);
  unfold(groups, rest.op, second, channels, d_conv4, d_bias4, {d.norm2_weight, d.norm2_bias, d.conv4_weight, d.conv4_bias});

  // 2. The first half.
  const ExpansionWeights weights = first_weights(s, w);
  const Expansion op = make_expansion(scratch, groups, channels, weights, a.kept);
  const float* bias = local_bias(scratch, groups, op, w);
  ExpansionBackward expansion(scratch, groups, op, weights, shape);
  const int64_t reach = expansion.most_pixels() * width, middle_size = 3 * half * reach + expansion.most_pixels() * ld;
  float* middles = scratch.take<float>(expansion.steps.workers * middle_size);
  float* d_bias = scratch.zeros<float>(expansion.steps.workers * groups.channels());  // of the 3×3 convolution
  const View<const T> d_middle{a.middle, shape};
  expansion.run(
      scratch, View<const T>{a.x, shape}, d_middle, View<T>{a.dx, shape},
      [&](int64_t worker, const Hidden<T>& hidden, const Range& rows, const Range& columns, const Ring& grad, const Tile& tile) {
        const int64_t count = columns.size();
        float *halves = middles + worker * middle_size, *d_local = halves + 2 * half * reach, *read = d_local + half * reach;
        read_pixels(d_middle, tile.image, rows, columns, read, ld);
        const Left left{read, ld, rows.size() * count};
        product(conv3_back, &left, 1, zeros, 0, &d_local, width, reach);
        for (int64_t p = 0; p < half; ++p)
          for (int64_t y = rows.first; y < rows.end; ++y) {
            const int64_t row = (y - rows.first) * count * width, before = tile.columns.first - columns.first;
            float *first = halves + p * reach + row, *second_half = halves + (half + p) * reach + row;
            depthwise<false>(hidden.ring, p, {y, y + 1}, columns, op.taps + p * 9 * width, first, nullptr);
            depthwise<false>(hidden.ring, half + p, {y, y + 1}, columns, op.taps + (half + p) * 9 * width, second_half, nullptr);
            float *d_first = grad.at(y, p, columns.first), *d_second = grad.at(y, half + p, columns.first);
            for (int64_t c = 0; c < width; c += W) {
              const int64_t at = tile.image * padded + p * width + c;
              const vf weight = load(rest.attention + at), more = load(shift + at);
              const vf first_bias = load(bias + p * width + c), second_bias = load(bias + padded + p * width + c);
              for (int64_t i = c; i < count * width; i += width) {
                const vf g = load(d_local + p * reach + row + i) * weight + more;
                store(d_first + i, g * (load(second_half + i) + second_bias));
                store(d_second + i, g * (load(first + i) + first_bias));
              }
            }
            if (y < tile.rows.first || y >= tile.rows.end) continue;  // the neighbours' pixels are theirs
            float* mine = d_bias + worker * groups.channels() + p * width;
            add_rows(d_first + before * width, width, tile.columns.size(), width, mine);
            add_rows(d_second + before * width, width, tile.columns.size(), width, mine + padded);
          }
      },
      kept.hidden);
  expansion.finish(weights, {d.norm1_weight, d.norm1_bias, d.conv1_weight, d.conv1_bias}, d.conv2_weight);
  add_up(d_bias, expansion.steps.workers, groups.channels());
  for (int64_t n = 0; n < groups.channels(); ++n)
    if (op.rows[n] >= 0) d.conv2_bias[op.rows[n]] = d_bias[n];
}
