// The forward pass of mdta, in float32 or in 8 bits: the walks over the tiles.
// Compiled per instruction set: common/cpu_each_isa.h.

// The small matrices of one image, in double: they are few, and the gradient takes differences of nearly equal ones.
struct Attention {
  int64_t heads, size, channels;
  bool one_pixel;
  const float *gram, *q_norm, *k_norm;
  double* attention;  // [heads][size][size], softmax(temperature · cosine)
  double* cosine;     // [heads][size][size], gram / (|q| |k|)
  float* combined;    // [channels][channels], project_out · blockdiag(attention)

  static Attention make(Scratch& scratch, const MdtaShape& s) {
    const int64_t size = s.head_size(), square = s.channels * size;
    double* small = scratch.take<double>(2 * square);
    return {s.heads, size,    s.channels, s.one_pixel(),  nullptr,
            nullptr, nullptr, small,      small + square, scratch.take<float>(s.channels * s.channels)};
  }

  double q_length(int64_t c) const { return std::max(q_norm[c], kLeastLength); }
  double k_length(int64_t c) const { return std::max(k_norm[c], kLeastLength); }

  // Whether a q or k of this length is divided by it, and not by the constant kLeastLength. Its gradient is orthogonal to it then.
  static bool normalised(float norm) { return !(norm < kLeastLength); }
  // Whether it is ±1 after that, whatever it was. Its gradient is 0 then; P k and q_scale q, which cancel, would leave their rounding,
  // divided by its length, as short as that may be.
  bool constant(float norm) const { return one_pixel && normalised(norm); }

  // Of image b.
  template <class Weights>
  void solve(const MdtaAttention& of, int64_t b, const Weights& weights) {
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
    parallel_ranges(channels, [&](int64_t, int64_t first, int64_t end) {
      for (int64_t c = first; c < end; ++c)
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

static ImageShape image_shape(const MdtaShape& s) { return {s.batch, s.height, s.width, s.channels}; }

// q and k of all heads, those of neighbours in one panel where fewer of its lanes are empty so.
static Groups query_key_groups(const MdtaShape& s) {
  const int64_t parts = 2 * s.heads, size = s.head_size();
  Groups best(parts, size);
  for (int64_t together = 2; together <= parts && together * size <= 64; ++together) {
    const Groups groups(parts / together, together * size);
    if (parts % together == 0 && groups.channels() < best.channels()) best = groups;
  }
  return best;
}

// Gram matrix and squares, over the rows [first, end) of every image, of what `op` expands x to: query_key_groups.
template <class T, class Weights, class Op>
static void statistics(Scratch& scratch, const Groups& groups, const Op& op, const MdtaStatistics<T, Weights>& a) {
  const MdtaShape& s = a.shape;
  const ImageShape shape = image_shape(s);
  const int64_t size = s.head_size(), together = groups.size / size;
  const int64_t each = groups.panels_each, width = groups.width(), padded = groups.padded();
  // Of q and k, one after the other: the first panel, and the first lane in it.
  const auto panel_of = [&](int64_t part) { return part / together * each; };
  const auto lane_of = [&](int64_t part) { return part % together * size; };

  // Image by image: the sums of many images at once would take more memory than they are worth.
  const Steps steps(1, {a.first, a.end}, s.width, groups.channels() * sizeof(float));
  const int64_t most = steps.most_columns();
  const int64_t hidden_size = Hidden<T, Op>::floats(shape, steps.rows + 2, groups.panels(), width, most + 2);
  const int64_t panel = steps.rows * most * width;  // between panels of q, k
  const int64_t gram_size = s.channels * padded, sums_size = gram_size + groups.channels();
  const int64_t worker_size = hidden_size + groups.panels() * panel + sums_size;
  float* memory = scratch.take<float>(steps.workers * worker_size);
  double* sums = scratch.take<double>(steps.workers * sums_size);  // Gram matrices [channel of q][lane of k], squares
  for (int64_t b = 0; b < s.batch; ++b) {
    std::fill_n(sums, steps.workers * sums_size, 0.0);
    steps.for_each([&](int64_t worker, const Tile& tile) {
      float* mine = memory + worker * worker_size;
      Hidden<T, Op> hidden(op, op.weight, op.bias, View<const T>{a.x, shape}, steps.rows + 2, most + 2, mine);
      float* qk = mine + hidden_size;              // [panel][pixel of the step][width]
      float* gram = qk + groups.panels() * panel;  // the step's share of the sums
      float* squares = gram + gram_size;
      hidden.start(b, tile.rows.first - 1, tile.columns.around(1));
      for (int64_t y = tile.rows.first; y < tile.rows.end; y += steps.rows) {
        const Range rows{y, std::min(y + steps.rows, tile.rows.end)};
        const int64_t pixels = rows.size() * tile.columns.size();
        hidden.advance(rows.end + 1);
        std::fill_n(gram, sums_size, 0.0f);
        for (int64_t p = 0; p < groups.panels(); ++p)
          depthwise<true>(hidden.ring, p, rows, tile.columns, op.taps + p * 9 * width, qk + p * panel, squares + p * width);
        for (int64_t h = 0; h < s.heads; ++h)
          for (int64_t i = 0; i < each; ++i)
            for (int64_t j = 0; j < each; ++j) {
              const int64_t lane = lane_of(s.heads + h), first = lane / W * W;  // of k, and of the vector that it lies in
              const int64_t end = round_up(lane + std::min(width, size - j * width), W);
              outer(std::min(width, size - i * width), end - first, pixels, qk + (panel_of(h) + i) * panel + lane_of(h), width,
                    qk + (panel_of(s.heads + h) + j) * panel + first, width,
                    gram + (h * size + i * width) * padded + j * width + first, padded);
            }
        for (int64_t i = 0; i < sums_size; ++i) sums[worker * sums_size + i] += gram[i];
      }
    });
    add_up(sums, steps.workers, sums_size);
    const double* squares = sums + gram_size;
    for (int64_t h = 0; h < s.heads; ++h) {
      const int64_t q = h, k = s.heads + h, first = (b * s.heads + h) * size;
      std::copy_n(squares + q / together * padded + lane_of(q), size, a.q_square + first);
      std::copy_n(squares + k / together * padded + lane_of(k), size, a.k_square + first);
      for (int64_t c = 0; c < size; ++c)
        std::copy_n(sums + (h * size + c) * padded + lane_of(k), size, a.gram + (first + c) * size);
    }
  }
}

// y = x + combined · v, given the statistics; v is what `op` expands x to. pack(matrix) packs project_out · blockdiag(attention) of
// an image as `combined`. Number: of v's values, as the product takes them, float or Code.
template <class Number, class T, class Weights, class Op, class Weight, class Pack>
static void apply(Scratch& scratch, const Groups& groups, const Op& op, const Weight& combined, const MdtaApply<T, Weights>& a,
                  const Pack& pack) {
  using Word = typename Op::Word;
  constexpr int64_t kNumbers = sizeof(Word) / sizeof(Number);  // in a word
  const MdtaShape& s = a.shape;
  const ImageShape shape = image_shape(s);
  const View<const T> in{a.x, shape};
  const View<T> out{a.y, shape};
  const int64_t panels = groups.panels(), width = groups.width();
  const int64_t out_width = combined.columns();
  const float* zeros = scratch.zeros<float>(out_width);
  Attention attention = Attention::make(scratch, s);

  const Steps steps(1, shape.rows(), s.width, groups.channels() * sizeof(float));
  const int64_t most = steps.most_columns();
  const int64_t hidden_size = Hidden<T, Op>::floats(shape, steps.rows + 2, panels, width, most + 2);
  const int64_t panel = steps.rows * most * width;
  const int64_t worker_size = hidden_size + panels * panel / kNumbers + steps.rows * most * out_width;
  float* memory = scratch.take<float>(steps.workers * worker_size);
  for (int64_t b = 0; b < s.batch; ++b) {
    attention.solve(a.attention, b, a.weights);
    pack(attention.combined);
    steps.for_each([&](int64_t worker, const Tile& tile) {
      float* mine = memory + worker * worker_size;
      Hidden<T, Op> hidden(op, op.weight, op.bias, in, steps.rows + 2, most + 2, mine);
      Number* values = reinterpret_cast<Number*>(mine + hidden_size);     // [panel][pixel of the step][width]
      float* projected = mine + hidden_size + panels * panel / kNumbers;  // [pixel of the step][out_width]
      const int64_t columns = tile.columns.size();
      hidden.start(b, tile.rows.first - 1, tile.columns.around(1));
      for (int64_t first = tile.rows.first; first < tile.rows.end; first += steps.rows) {
        const Range rows{first, std::min(first + steps.rows, tile.rows.end)};
        hidden.advance(rows.end + 1);
        for (int64_t p = 0; p < panels; ++p)
          depthwise<false>(hidden.ring, p, rows, tile.columns, op.taps + p * 9 * width, values + p * panel, nullptr);
        const LeftOf<Word> left{reinterpret_cast<const Word*>(values), width / kNumbers, rows.size() * columns, panels,
                                panel / kNumbers};
        product(combined, &left, 1, zeros, 0, &projected, out_width, combined.panel_width());
        for (int64_t y = rows.first; y < rows.end; ++y)
          add_pixels(in.at(b, y, tile.columns.first), projected + (y - rows.first) * columns * out_width, out_width, columns,
                     s.channels, out.at(b, y, tile.columns.first));
      }
    });
  }
}
