// The forward pass of gdfn, in float32 or in 8 bits: the walk over the tiles.
// Compiled per instruction set: common/cpu_each_isa.h.

// y = x + project_out · (gelu(a) ⊙ b) of the halves a and b that `op` expands x to. Number: of the gate's values, as project_out
// takes them, float or Code. keep: where hidden channels are kept for the backward pass, or null.
template <class Number, class T, class Op, class Weight>
static void forward(Scratch& scratch, const ImageShape& shape, const Groups& groups, const Op& op, const Weight& project_out,
                    const T* x, T* y, T* keep = nullptr) {
  using Word = typename Op::Word;
  constexpr int64_t kNumbers = sizeof(Word) / sizeof(Number);  // in a word
  const View<const T> in{x, shape};
  const View<T> out{y, shape};
  const int64_t half = groups.panels_each, width = groups.width(), out_width = project_out.columns();
  const float* zeros = scratch.zeros<float>(out_width);

  const Steps steps(shape.batch, shape.rows(), shape.width, groups.channels() * sizeof(float));
  const int64_t most = steps.most_columns(), block = column_block(2 * width * sizeof(float));
  const int64_t hidden_size = Hidden<T, Op>::floats(shape, steps.rows + 2, groups.panels(), width, most + 2);
  const int64_t panel = steps.rows * most * width;
  const int64_t worker_size = hidden_size + half * panel / kNumbers + steps.rows * most * out_width;
  float* memory = scratch.take<float>(steps.workers * worker_size);
  steps.for_each([&](int64_t worker, const Tile& tile) {
    float* mine = memory + worker * worker_size;
    Hidden<T, Op> hidden(op, op.weight, op.bias, in, steps.rows + 2, most + 2, mine);
    Number* gated = reinterpret_cast<Number*>(mine + hidden_size);    // [panel][pixel of the step][width]
    float* projected = mine + hidden_size + half * panel / kNumbers;  // [pixel of the step][out_width]
    const Range& columns = tile.columns;
    hidden.start(tile.image, tile.rows.first - 1, columns.around(1));
    for (int64_t first = tile.rows.first; first < tile.rows.end; first += steps.rows) {
      const int64_t end = std::min(first + steps.rows, tile.rows.end);
      hidden.advance(end + 1);
      if (keep) hidden.keep(groups, {first, end}, columns, {keep, groups.images(shape)});
      for (int64_t p = 0; p < half; ++p)
        for (int64_t x = columns.first; x < columns.end; x += block)
          for (int64_t y = first; y < end; ++y) {
            const float *a_rows[3], *b_rows[3];
            hidden.ring.window(y, p, x, a_rows);
            hidden.ring.window(y, half + p, x, b_rows);
            gated_row(a_rows, b_rows, op.taps + p * 9 * width, op.taps + (half + p) * 9 * width, width,
                      std::min(block, columns.end - x),
                      gated + p * panel + ((y - first) * columns.size() + x - columns.first) * width,
                      [](int64_t, vf u, vf v) { return u * normal_cdf(u) * v; });
          }
      const LeftOf<Word> left{reinterpret_cast<const Word*>(gated), width / kNumbers, (end - first) * columns.size(), half,
                              panel / kNumbers};
      product(project_out, &left, 1, zeros, 0, &projected, out_width, project_out.panel_width());
      for (int64_t y = first; y < end; ++y)
        add_pixels(in.at(tile.image, y, columns.first), projected + (y - first) * columns.size() * out_width, out_width,
                   columns.size(), shape.channels, out.at(tile.image, y, columns.first));
    }
  });
}
