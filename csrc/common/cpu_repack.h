// Weights, hidden channels and sums in the order that the kernels want: in panels, with groups of channels padded to whole ones, and
// added up over the workers.
// Compiled per instruction set: common/cpu_each_isa.h.

// How many 16-lane vectors a panel of `lanes` channels should have: the register block is 8×3 or 6×4, whichever pads less.
inline int64_t panel_vecs(int64_t lanes) {
  const int64_t n = ceil_div(lanes, 16);
  if (n <= 2) return n;
  return round_up(n, 4) < round_up(n, 3) ? 4 : 3;
}

// Vectors that a register block of `product` takes of a panel.
constexpr int64_t block_vecs(int64_t vecs) { return W == 16 ? vecs : vecs * 16 / W % 3 == 0 ? 3 : 2; }

// The right-hand side of a product, packed by panels and in them by register blocks: [panel][block][depth][block_vecs · W]. A block
// lies in one piece: rows a power of two apart would share some of the first-level cache's sets alone.
template <class Word>
struct PackedOf {
  Word* data;
  int64_t panels, vecs, depth;
  // Memory for `columns` columns, padded to whole panels.
  static PackedOf make(Scratch& scratch, int64_t columns, int64_t depth) {
    const int64_t vecs = panel_vecs(columns), panels = ceil_div(columns, 16 * vecs);
    return {scratch.take<Word>(depth * panels * 16 * vecs), panels, vecs, depth};
  }
  int64_t panel_width() const { return 16 * vecs; }
  int64_t columns() const { return panels * panel_width(); }
  // Panels [first, end).
  PackedOf slice(int64_t first, int64_t end) const { return {data + first * depth * panel_width(), end - first, vecs, depth}; }
};
using Packed = PackedOf<float>;

// From weights whose columns lie one after the other in memory: column(n)(k) is row k of column n, zero where padded.
template <class Word, class F>
void pack_columns(const PackedOf<Word>& out, const F& column) {
  constexpr int64_t kRun = 64;  // rows that stay in the first-level cache for all columns of a block
  const int64_t lanes = block_vecs(out.vecs) * W;
  parallel_ranges(out.columns() / lanes, [&](int64_t, int64_t first, int64_t end) {
    for (int64_t block = first; block < end; ++block) {
      Word* data = out.data + block * out.depth * lanes;
      for (int64_t run = 0; run < out.depth; run += kRun)
        for (int64_t n = 0; n < lanes; ++n) {
          const auto value = column(block * lanes + n);
          for (int64_t k = run; k < std::min(run + kRun, out.depth); ++k) data[k * lanes + n] = value(k);
        }
    }
  });
}

// From weights whose rows do: row(k)(n).
template <class Word, class F>
void pack_rows(const PackedOf<Word>& out, const F& row) {
  const int64_t lanes = block_vecs(out.vecs) * W;
  parallel_ranges(out.columns() / lanes, [&](int64_t, int64_t first, int64_t end) {
    for (int64_t block = first; block < end; ++block)
      for (int64_t k = 0; k < out.depth; ++k) {
        const auto value = row(k);
        for (int64_t n = 0; n < lanes; ++n) out.data[(block * out.depth + k) * lanes + n] = value(block * lanes + n);
      }
  });
}

// Hidden channels come in groups (q, k, v of each head; the two halves of the gate), each padded to whole panels.
struct Groups {
  int64_t count, size, vecs, panels_each;
  Groups(int64_t count_, int64_t size_)
      : count(count_), size(size_), vecs(panel_vecs(size_)), panels_each(ceil_div(size_, 16 * vecs)) {}
  int64_t width() const { return 16 * vecs; }               // of a panel
  int64_t padded() const { return panels_each * width(); }  // of a group
  int64_t panels() const { return count * panels_each; }
  int64_t channels() const { return count * padded(); }
  // As they lie in memory, not padded.
  ImageShape images(const ImageShape& s) const { return {s.batch, s.height, s.width, count * size}; }
  // table[n]: the weight row of padded channel n, or -1.
  const int32_t* rows(Scratch& scratch) const {
    int32_t* table = scratch.take<int32_t>(channels());
    for (int64_t n = 0; n < channels(); ++n)
      table[n] = static_cast<int32_t>(n % padded() < size ? n / padded() * size + n % padded() : -1);
    return table;
  }
};

// out [pixel][group][size] = panels [panel][pixel][width] that are `stride` apart.
template <class T>
static void write_panels(const Groups& groups, const float* panels, int64_t stride, int64_t pixels, T* out) {
  const int64_t width = groups.width();
  for (int64_t i = 0; i < pixels; ++i)
    for (int64_t g = 0; g < groups.count; ++g, out += groups.size) {
      const float* panel = panels + g * groups.panels_each * stride + i * width;
      for (int64_t first = 0; first < groups.size; first += width, panel += stride)
        for (int64_t c = first; c < std::min(first + width, groups.size); c += W)
          store_at(out, c, groups.size, load(panel + c - first));
    }
}

// The other way, padded with zeros.
template <class T>
static void read_panels(const Groups& groups, const T* x, int64_t pixels, float* panels, int64_t stride) {
  const int64_t width = groups.width();
  for (int64_t i = 0; i < pixels; ++i)
    for (int64_t g = 0; g < groups.count; ++g, x += groups.size) {
      float* panel = panels + g * groups.panels_each * stride + i * width;
      for (int64_t first = 0; first < groups.size; first += width, panel += stride)
        for (int64_t c = first; c < first + width; c += W)
          store(panel + c - first, c < groups.size ? load_at(x, c, groups.size) : vf{});
    }
}

// partials[0] += the other workers' partials, in order.
template <class S>
static void add_up(S* partials, int64_t workers, int64_t count) {
  constexpr int64_t kBlock = 1024;  // fewer are not worth a thread
  parallel_ranges(ceil_div(count, kBlock), [&](int64_t, int64_t first, int64_t end) {
    for (int64_t w = 1; w < workers; ++w)
      for (int64_t i = first * kBlock; i < std::min(end * kBlock, count); ++i) partials[i] += partials[w * count + i];
  });
}
