// The expansion that networks' blocks begin with: layer norm, and a 1×1 convolution to the hidden channels that a 3×3 one reads.
// Compiled per instruction set: common/cpu_each_isa.h.

// As the tensors hold it.
struct ExpansionWeights {
  Norm norm;
  const float* weight;          // [rows][channels]
  const float* dwconv;          // [rows][3][3], or null: the 1×1 convolution alone
  const float* bias = nullptr;  // [rows], the 1×1 convolution's, or null
};

// The same, packed once a call.
struct Expansion {
  using Word = float;   // as `product` takes the normalised pixels
  const int32_t* rows;  // Groups::rows
  Packed weight;        // the 1×1 convolution with the norm's weight folded in; without data where hidden channels were kept
  const float* bias;    // its own, and its share of the norm's; null there
  const float* taps;    // [panel][9][width], zero without a 3×3 convolution
  float eps;
  bool centre;

  const float* left(float* normal, int64_t, int64_t, int64_t) const { return normal; }
};

// dwconv [rows][3][3] as Expansion::taps.
static float* make_taps(Scratch& scratch, const Groups& groups, const int32_t* rows, const float* dwconv) {
  const int64_t width = groups.width();
  float* taps = scratch.zeros<float>(groups.channels() * 9);
  for (int64_t n = 0; n < groups.channels(); ++n)
    for (int64_t t = 0; t < 9 && dwconv && rows[n] >= 0; ++t)
      taps[(n / width * 9 + t) * width + n % width] = dwconv[rows[n] * 9 + t];
  return taps;
}

// kept: whether an earlier pass kept the hidden channels.
[[maybe_unused]] static Expansion make_expansion(Scratch& scratch, const Groups& groups, int64_t channels,
                                                 const ExpansionWeights& w, bool kept = false) {
  const int32_t* rows = groups.rows(scratch);
  const float* taps = make_taps(scratch, groups, rows, w.dwconv);
  const bool centre = w.norm.bias != nullptr;
  if (kept) return {rows, {nullptr, groups.panels(), groups.vecs, channels}, nullptr, taps, w.norm.eps, centre};
  Packed packed{scratch.take<float>(groups.channels() * channels), groups.panels(), groups.vecs, channels};
  pack_columns(packed, [&](int64_t n) {
    const float *column = w.weight + rows[n] * channels, *scale = w.norm.weight;
    return [=, padding = rows[n] < 0](int64_t k) { return padding ? 0.0f : column[k] * scale[k]; };
  });
  float* bias = scratch.zeros<float>(groups.channels());
  for (int64_t n = 0; n < groups.channels(); ++n) {
    if (rows[n] < 0) continue;
    if (w.bias) bias[n] = w.bias[rows[n]];
    if (!w.norm.bias) continue;
    vf share = {};
    for (int64_t k = 0; k < channels; k += W)
      share += load_at(w.weight + rows[n] * channels, k, channels) * load_at(w.norm.bias, k, channels);
    bias[n] += sum(share);
  }
  return {rows, packed, bias, taps, w.norm.eps, centre};
}

// A worker's ring of hidden rows, with the normalised input and its statistics beside it.
template <class T, class Op = Expansion>
struct Hidden {
  static constexpr int64_t kMostRows = Steps::kMostRows + 2;  // that one product takes: a step's and its halo

  const Op& op;
  decltype(Op::weight) weight;  // all of op.weight or some of its panels
  const float* bias;
  View<const T> x;
  Ring ring;
  float* normal;  // [slot][column][ld]
  Stats* stats;
  int64_t ld;
  int64_t image = 0, next = 0;  // next: the first row not yet made
  Range columns{0, 0};
  View<const T> kept{};            // hidden channels that an earlier pass kept, [group][size] a pixel, or null: they are computed
  const Groups* groups = nullptr;  // theirs

  // Columns: the most that a tile holds, its halo included.
  static int64_t floats(const ImageShape& s, int64_t slots, int64_t panels, int64_t width, int64_t most_columns) {
    return Ring::floats(slots, panels, most_columns, width) + slots * most_columns * (pixel_stride(s.channels) + 2);
  }

  Hidden(const Op& op_, const decltype(Op::weight)& weight_, const float* bias_, const View<const T>& x_, int64_t slots,
         int64_t most_columns, float* memory)
      : op(op_), weight(weight_), bias(bias_), x(x_), ring{memory, slots, weight_.panels, most_columns, weight_.panel_width()},
        normal(memory + Ring::floats(slots, weight_.panels, most_columns, weight_.panel_width())),
        stats(reinterpret_cast<Stats*>(normal + slots * most_columns * pixel_stride(x_.shape.channels))),
        ld(pixel_stride(x_.shape.channels)) {}

  void start(int64_t image_, int64_t first_row, const Range& columns_) {
    image = image_, next = first_row, columns = columns_, ring.left = columns_.first;
  }
  float* normal_at(int64_t y, int64_t x) const { return normal + (ring.slot(y) * ring.columns + x - ring.left) * ld; }
  Stats* stats_at(int64_t y, int64_t x) const { return stats + ring.slot(y) * ring.columns + x - ring.left; }

  // Writes what the ring holds of the image into `out`, [group][size] a pixel.
  void keep(const Groups& channels, const Range& rows, const Range& of_columns, const View<T>& out) const {
    for (int64_t y = rows.first; y < rows.end; ++y)
      write_panels(channels, ring.at(y, 0, of_columns.first), ring.panel_stride(), of_columns.size(),
                   out.at(image, y, of_columns.first));
  }

  // Makes the rows before `end`.
  void advance(int64_t end) {
    const Range seen = columns.within(x.shape.columns());
    while (next < end) {
      LeftOf<typename Op::Word> inputs[kMostRows];
      float* outputs[kMostRows];
      int64_t count = 0;
      for (; next < end && count < kMostRows; ++next) {
        if (next < 0 || next >= x.shape.height) {
          ring.clear_row(next);
          continue;
        }
        ring.clear_columns(next, {columns.first, seen.first});
        ring.clear_columns(next, {seen.end, columns.end});
        float* row = normal_at(next, seen.first);
        normalize(x.at(image, next, seen.first), seen.size(), x.shape.channels, op.eps, op.centre, row, ld,
                  stats_at(next, seen.first), next + 1 < x.shape.height ? x.shape.width * x.shape.channels : 0);
        if (kept.data) {
          read_panels(*groups, kept.at(image, next, seen.first), seen.size(), ring.at(next, 0, seen.first), ring.panel_stride());
          continue;
        }
        inputs[count] = {op.left(row, ld, seen.size(), x.shape.channels), ld, seen.size()};
        outputs[count++] = ring.at(next, 0, seen.first);
      }
      if (count) product(weight, inputs, count, bias, 0, outputs, ring.width, ring.panel_stride());
    }
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// The backward pass, from the gradient behind the 3×3 convolution to dx and the parameters' gradients.

// The folded 1×1 weight from hidden channels to channels.
static Packed transpose(Scratch& scratch, const Groups& groups, const Expansion& op, const ExpansionWeights& w,
                        int64_t channels) {
  const Packed transposed = Packed::make(scratch, channels, groups.channels());
  pack_rows(transposed, [&](int64_t k) {
    const float *row = w.weight + op.rows[k] * channels, *scale = w.norm.weight;
    return [=, count = op.rows[k] < 0 ? 0 : channels](int64_t n) { return n < count ? row[n] * scale[n] : 0.0f; };
  });
  return transposed;
}

// As the tensors hold them.
struct ExpansionGrads {
  float *norm_weight, *norm_bias, *weight;
  float* bias = nullptr;  // or null
};

// The gradients of the 1×1 convolution and of the norm from those of the folded weight [hidden][padded channels] and bias [hidden].
// With W' = W·diag(w) and b' = W·b + a: dW = dW'·diag(w) + db'·bᵀ, dw = diag(Wᵀ dW'), db = Wᵀ db', da = db'.
static void unfold(const Groups& groups, const Expansion& op, const ExpansionWeights& w, int64_t channels, const float* weight,
                   const float* bias, const ExpansionGrads& d) {
  std::fill_n(d.norm_weight, channels, 0.0f);
  if (w.norm.bias) std::fill_n(d.norm_bias, channels, 0.0f);
  for (int64_t n = 0; n < groups.channels(); ++n) {
    const int64_t row = op.rows[n];
    if (row < 0) continue;
    if (d.bias) d.bias[row] = bias[n];
    for (int64_t k = 0; k < channels; k += W) {
      const vf folded = load(weight + n * round_up(channels, 16) + k), original = load_at(w.weight + row * channels, k, channels);
      vf d_weight = folded * load_at(w.norm.weight, k, channels);
      add_at(d.norm_weight, k, channels, folded * original);
      if (w.norm.bias) {
        d_weight += bias[n] * load_at(w.norm.bias, k, channels);
        add_at(d.norm_bias, k, channels, bias[n] * original);
      }
      store_at(d.weight + row * channels, k, channels, d_weight);
    }
  }
}

// Sums over pixels, one set a worker, added up at the end.
struct ExpansionSums {
  float* weight;  // [hidden][padded channels], the gradient of the folded 1×1 weight
  float* bias;    // [hidden]
  float* taps;    // [panel][9][width]
};

struct ExpansionBackward {
  const Groups& groups;
  const Expansion& op;
  ImageShape shape;
  Steps steps;
  Packed transposed;     // the folded 1×1 weight's
  const float* flipped;  // taps turned by 180 degrees, [panel][9][width]
  const float* zeros;    // as many as the widest product has columns
  int64_t sums_size;
  float* sums;

  ExpansionBackward(Scratch& scratch, const Groups& groups_, const Expansion& op_, const ExpansionWeights& w,
                    const ImageShape& shape_)
      : groups(groups_), op(op_), shape(shape_),
        // Hidden rows and their gradients are held: twice the bytes of the forward pass.
        steps(shape_.batch, shape_.rows(), shape_.width, 2 * groups_.channels() * static_cast<int64_t>(sizeof(float))),
        transposed(transpose(scratch, groups_, op_, w, shape_.channels)) {
    const int64_t hidden = groups.channels(), width = groups.width(), channels = shape.channels;
    float* taps = scratch.take<float>(hidden * 9);
    for (int64_t p = 0; p < groups.panels(); ++p)
      for (int64_t t = 0; t < 9; ++t)
        __builtin_memcpy(taps + (p * 9 + t) * width, op.taps + (p * 9 + 8 - t) * width, width * sizeof(float));
    flipped = taps;
    zeros = scratch.zeros<float>(std::max(hidden, transposed.columns()));
    sums_size = hidden * (round_up(channels, 16) + 1 + 9);
    sums = scratch.zeros<float>(steps.workers * sums_size);
  }

  ExpansionSums sums_of(int64_t worker) const {
    float* s = sums + worker * sums_size;
    return {s, s + groups.channels() * round_up(shape.channels, 16), s + groups.channels() * (round_up(shape.channels, 16) + 1)};
  }
  // Pixels that `middle` is given at a time, at most.
  int64_t most_pixels() const { return (steps.rows + 2) * (steps.most_columns() + 2); }

  // middle(worker, hidden, rows, columns, grad, tile): writes the gradient behind the 3×3 convolution for these rows and columns of
  // the image, some beyond the tile, into grad; hidden holds them and one more around them. kept: Hidden::kept's, or null.
  template <class T, class Middle>
  void run(Scratch& scratch, const View<const T>& x, const View<const T>& dy, const View<T>& dx, const Middle& middle,
           const T* kept = nullptr) {
    const int64_t width = groups.width(), panels = groups.panels(), most = steps.most_columns(), channels = shape.channels;
    const int64_t hidden_size = Hidden<T>::floats(shape, steps.rows + 4, panels, width, most + 4);
    const int64_t grad_size = Ring::floats(steps.rows + 2, panels, most + 2, width);
    const int64_t panel = steps.rows * most * width, padded = transposed.columns();
    const int64_t columns_in = round_up(channels, 16), ld = pixel_stride(channels);
    const int64_t worker_size = hidden_size + grad_size + panels * panel + steps.rows * most * (padded + ld);
    float* memory = scratch.take<float>(steps.workers * worker_size);
    steps.for_each([&](int64_t worker, const Tile& tile) {
      float* mine = memory + worker * worker_size;
      Hidden<T> hidden(op, op.weight, op.bias, x, steps.rows + 4, most + 4, mine);
      hidden.kept = {kept, groups.images(shape)}, hidden.groups = &groups;
      const Range around = tile.columns.around(1), near = around.within(shape.columns());
      const Ring grad{mine + hidden_size, steps.rows + 2, panels, most + 2, width, around.first};
      float* d_hidden = mine + hidden_size + grad_size;       // [panel][pixel of the step][width]
      float* d_normal = d_hidden + panels * panel;            // [pixel of the step][padded]
      float* normal = d_normal + steps.rows * most * padded;  // [pixel of the step][ld]
      const ExpansionSums total = sums_of(worker);
      const int64_t columns = tile.columns.size(), left_column = tile.columns.first;
      hidden.start(tile.image, tile.rows.first - 2, tile.columns.around(2));
      int64_t next = tile.rows.first - 1;  // gradient row to make
      for (int64_t y = tile.rows.first; y < tile.rows.end; y += steps.rows) {
        const Range rows{y, std::min(y + steps.rows, tile.rows.end)};
        const int64_t pixels = rows.size() * columns;
        hidden.advance(rows.end + 2);
        for (int64_t r = next; r < rows.end + 1; ++r) {
          grad.clear_columns(r, {around.first, near.first});
          grad.clear_columns(r, {near.end, around.end});
          if (r < 0 || r >= shape.height) grad.clear_row(r);
        }
        const Range made = Range{next, rows.end + 1}.within(shape.rows()), own = made.within(tile.rows);
        middle(worker, hidden, made, near, grad, tile);
        for (int64_t p = 0; p < panels; ++p)  // the neighbours' rows are theirs
          for (int64_t r = own.first; r < own.end; ++r) {
            const float* window[3];
            hidden.ring.window(r, p, left_column, window);
            depthwise_weight_grad(window, grad.at(r, p, left_column), width, columns, total.taps + p * 9 * width);
          }
        next = rows.end + 1;
        for (int64_t r = rows.first; r < rows.end; ++r)
          for (int64_t i = 0; i < columns; ++i)
            std::copy_n(hidden.normal_at(r, left_column + i), columns_in, normal + ((r - rows.first) * columns + i) * ld);
        for (int64_t p = 0; p < panels; ++p) {
          float* d = d_hidden + p * panel;
          depthwise<false>(grad, p, rows, tile.columns, flipped + p * 9 * width, d, nullptr);
          outer(width, columns_in, pixels, d, width, normal, ld, total.weight + p * width * columns_in, columns_in);
          if (op.centre)
            for (int64_t c = 0; c < width; c += W) {
              vf sum_c = {};
              for (int64_t i = 0; i < pixels; ++i) sum_c += load(d + i * width + c);
              store(total.bias + p * width + c, load(total.bias + p * width + c) + sum_c);
            }
        }
        const Left left{d_hidden, width, pixels, panels, panel};
        product(transposed, &left, 1, zeros, 0, &d_normal, padded, transposed.panel_width());
        for (int64_t r = rows.first; r < rows.end; ++r) {
          const int64_t pixel = (r - rows.first) * columns;
          norm_backward(dy.at(tile.image, r, left_column), d_normal + pixel * padded, padded, normal + pixel * ld, ld,
                        hidden.stats_at(r, left_column), columns, channels, op.centre, dx.at(tile.image, r, left_column));
        }
      }
    });
  }

  // The parameters' gradients from the sums.
  void finish(const ExpansionWeights& w, const ExpansionGrads& d, float* d_dwconv) const {
    add_up(sums, steps.workers, sums_size);
    const ExpansionSums total = sums_of(0);
    const int64_t width = groups.width();
    unfold(groups, op, w, shape.channels, total.weight, total.bias, d);
    for (int64_t n = 0; n < groups.channels(); ++n)
      for (int64_t t = 0; t < 9; ++t)
        if (op.rows[n] >= 0) d_dwconv[op.rows[n] * 9 + t] = total.taps[(n / width * 9 + t) * width + n % width];
  }
};
