// apply_edit on a CPU, compiled once per instruction set (no include guard; see common/cpu_each_isa.h).
//
// A worker takes rows of pixels, and of a pixel all at once: the four lanes of a vector are the three channels that come out and
// their luma, which is as linear. Curves and matrix are one table, since the matrix's product with a curve's value is linear between
// the same knots. The grid is interpolated between its rows once a row of pixels.
//
// The backward pass goes by pieces of kPieceRows rows, each with sums of its own, which are then added up in order: they do not
// depend on the number of threads.

typedef float v4 __attribute__((vector_size(16)));

constexpr int64_t kPieceRows = 32;
constexpr float kLuma[3] = {0.2126f, 0.7152f, 0.0722f};  // Rec. 709

AUTOHDR_INLINE v4 four(float v) { return v - v4{}; }

// White in the integers of a photo's own samples.
template <class T>
constexpr float white_of() {
  return static_cast<float>(static_cast<T>(-1));
}
AUTOHDR_INLINE float sample(const float* p) { return *p; }
AUTOHDR_INLINE float sample(const bf16* p) {
  const uint32_t u = static_cast<uint32_t>(p->bits) << 16;
  float v;
  __builtin_memcpy(&v, &u, 4);
  return v;
}
template <class T>
AUTOHDR_INLINE float sample(const T* p) {
  return *p * (1.0f / white_of<T>());
}
AUTOHDR_INLINE void put(float* p, v4 v) { p[0] = v[0], p[1] = v[1], p[2] = v[2]; }
AUTOHDR_INLINE void put(bf16* p, v4 v) {
  vf wide = {};
  for (int c = 0; c < 3; ++c) wide[c] = v[c];
  const vh h = to_bf16(wide);
  for (int c = 0; c < 3; ++c) p[c].bits = h[c];
}
template <class T>
AUTOHDR_INLINE void put(T* p, v4 v) {  // a NaN becomes 0
  v = v * white_of<T>();
  v = v > 0.0f ? v : v4{};
  v = v < white_of<T>() ? v : four(white_of<T>());
  v = (v + 12582912.0f) - 12582912.0f;  // to the nearest integer; see round_to_integer
  for (int c = 0; c < 3; ++c) p[c] = static_cast<T>(v[c]);
}

// Where a coordinate lies between the points 0 ... count - 1: v = (1 - part) · point first + part · the next.
struct Between {
  int64_t first;
  float part;
};
AUTOHDR_INLINE Between between(float place, int64_t count) {  // goes on beyond the ends; a NaN is part of the first
  const float last = static_cast<float>(count - 2);
  const int64_t first = place > 0.0f ? (place < last ? static_cast<int64_t>(place) : count - 2) : 0;
  return {first, place - static_cast<float>(first)};
}
AUTOHDR_INLINE Between between_clamped(float place, int64_t count) {  // stays at the ends
  if (count == 1) return {0, 0.0f};
  const float last = static_cast<float>(count - 1);
  return between(place > 0.0f ? (place < last ? place : last) : 0.0f, count);
}
AUTOHDR_INLINE Between cell_of(int64_t pixel, int64_t pixels, int64_t cells) {
  return between_clamped((static_cast<float>(pixel) + 0.5f) * static_cast<float>(cells) / static_cast<float>(pixels) - 0.5f,
                         cells);
}

// Of one image: [3][knots], what each channel adds to the four lanes at a knot, and what changes up to the next.
struct Table {
  v4 *at, *slope;
};

static void fill_table(const EditShape& s, const EditParameters& p, int64_t image, const Table& table) {
  const float *curves = p.curves + image * 3 * s.knots, *matrix = p.matrix + image * 12;
  for (int64_t c = 0; c < 4; ++c) {
    v4 column = {matrix[c], matrix[4 + c], matrix[8 + c], 0.0f};
    column[3] = kLuma[0] * column[0] + kLuma[1] * column[1] + kLuma[2] * column[2];
    for (int64_t k = 0; k < s.knots; ++k) {
      if (c == 3) {
        table.at[k] += column;
        continue;
      }
      const float *curve = curves + c * s.knots, next = curve[std::min(k + 1, s.knots - 1)];
      table.at[c * s.knots + k] = column * curve[k];
      table.slope[c * s.knots + k] = column * (next - curve[k]);
    }
  }
}

// A row of the grid where a row of pixels is: [columns][bins][4], of each affine matrix its columns, four lanes each.
static void fill_row(const EditShape& s, const float* grid, int64_t image, int64_t y, v4* row) {
  const Between at = cell_of(y, s.height, s.rows);
  const int64_t size = s.columns * s.bins, next = std::min(at.first + 1, s.rows - 1);
  const float *above = grid + (image * s.rows + at.first) * size * 12, *below = grid + (image * s.rows + next) * size * 12;
  for (int64_t i = 0; i < size; ++i)
    for (int64_t c = 0; c < 4; ++c) {
      v4 column = {};
      for (int64_t r = 0; r < 3; ++r) {
        const int64_t j = i * 12 + r * 4 + c;
        column[r] = above[j] + at.part * (below[j] - above[j]);
      }
      row[i * 4 + c] = column;
    }
}

// What curves and matrix make of a pixel.
struct Toned {
  Between at[3];
  v4 value;
};
template <class T>
AUTOHDR_INLINE Toned tone(const EditShape& s, const Table& table, const T* x) {
  Toned t;
  v4 sum = {};
  for (int c = 0; c < 3; ++c) {
    t.at[c] = between(sample(x + c) * static_cast<float>(s.knots - 1), s.knots);
    const int64_t i = c * s.knots + t.at[c].first;
    sum += table.at[i] + t.at[c].part * table.slope[i];
  }
  t.value = sum;
  return t;
}

// The four corners of a pixel's cell, in the grid's row: their places and weights.
struct Corners {
  int64_t at[4];
  float weight[4];
};
AUTOHDR_INLINE Corners corners_of(const EditShape& s, const Between& across, float luma) {
  const Between bin = between_clamped(luma * static_cast<float>(s.bins - 1), s.bins);
  const int64_t step = s.bins > 1 ? 4 : 0, right = std::min(across.first + 1, s.columns - 1);
  const int64_t from = (across.first * s.bins + bin.first) * 4, to = (right * s.bins + bin.first) * 4;
  const float l = 1.0f - across.part, r = across.part, low = 1.0f - bin.part, high = bin.part;
  return {{from, from + step, to, to + step}, {l * low, l * high, r * low, r * high}};
}

AUTOHDR_INLINE v4 affine_column(const Corners& corners, const v4* row, int c) {
  v4 column = {};
  for (int k = 0; k < 4; ++k) column += corners.weight[k] * row[corners.at[k] + c];
  return column;
}

AUTOHDR_INLINE v4 affine(const Corners& corners, const v4* row, v4 value) {
  v4 result = affine_column(corners, row, 3);
  for (int c = 0; c < 3; ++c) result += value[c] * affine_column(corners, row, c);
  return result;
}

AUTOHDR_INLINE Table of_image(const EditShape& s, const Table& all, int64_t image) {
  return {all.at + image * 3 * s.knots, all.slope + image * 3 * s.knots};
}

static Table make_tables(Scratch& scratch, const EditShape& s, const EditParameters& p) {
  const int64_t size = 3 * s.knots * s.batch;
  v4* memory = scratch.take<v4>(2 * size);
  const Table all{memory, memory + size};
  for (int64_t i = 0; i < s.batch; ++i) fill_table(s, p, i, of_image(s, all, i));
  return all;
}

// Of each column of pixels; of no use without a grid.
static const Between* make_across(Scratch& scratch, const EditShape& s) {
  Between* across = scratch.take<Between>(s.width);
  for (int64_t i = 0; s.columns && i < s.width; ++i) across[i] = cell_of(i, s.width, s.columns);
  return across;
}

template <class T>
static void run(const EditForward<T>& a) {
  const EditShape& s = a.shape;
  const int64_t row_size = s.columns * s.bins * 4, count = s.batch * s.height;
  Scratch scratch;
  const Table tables = make_tables(scratch, s, a.parameters);
  const Between* across = make_across(scratch, s);
  v4* rows = scratch.take<v4>(row_size * thread_count());
  parallel_ranges(count, [&](int64_t worker, int64_t first, int64_t end) {
    v4* row = rows + worker * row_size;
    for (int64_t line = first; line < end; ++line) {
      const Table table = of_image(s, tables, line / s.height);
      const T* x = a.x + line * s.width * 3;
      T* y = a.y + line * s.width * 3;
      if (!s.columns) {
        for (int64_t i = 0; i < s.width; ++i) put(y + i * 3, tone(s, table, x + i * 3).value);
        continue;
      }
      fill_row(s, a.parameters.grid, line / s.height, line % s.height, row);
      for (int64_t i = 0; i < s.width; ++i) {
        const v4 value = tone(s, table, x + i * 3).value;
        put(y + i * 3, affine(corners_of(s, across[i], value[3]), row, value));
      }
    }
  });
}

// The gradients of an image's parameters: sums over some of its pixels.
struct Sums {
  float *curves, *matrix, *grid;
};

// One pixel's gradient: returns that of x, and adds to those of the parameters and of the grid's row (as fill_row makes it).
template <class T>
AUTOHDR_INLINE v4 pixel_backward(const EditShape& s, const EditParameters& p, int64_t image, const Table& table,
                                 const Between* across, const v4* row, const T* x, const T* dy, const Sums& sums, v4* d_row) {
  const float *curves = p.curves + image * 3 * s.knots, *matrix = p.matrix + image * 12;
  const Toned t = tone(s, table, x);
  v4 d = {sample(dy), sample(dy + 1), sample(dy + 2), 0.0f};
  if (row) {
    const Corners corners = corners_of(s, *across, t.value[3]);
    const v4 ahead = d;
    v4 d_value = {};
    float d_luma = 0.0f;
    const bool inside = s.bins > 1 && t.value[3] >= 0.0f && t.value[3] <= 1.0f;
    for (int c = 0; c < 4; ++c) {
      const float value = c < 3 ? t.value[c] : 1.0f;
      const v4 column = affine_column(corners, row, c) * ahead, d_column = ahead * value;
      if (c < 3) d_value[c] = column[0] + column[1] + column[2];
      for (int k = 0; k < 4; ++k) d_row[corners.at[k] + c] += corners.weight[k] * d_column;
      if (inside) {
        const float l = 1.0f - across->part, r = across->part;
        const v4 change =
            l * (row[corners.at[1] + c] - row[corners.at[0] + c]) + r * (row[corners.at[3] + c] - row[corners.at[2] + c]);
        const v4 product = change * d_column;
        d_luma += product[0] + product[1] + product[2];
      }
    }
    d_luma *= static_cast<float>(s.bins - 1);
    d = d_value;
    for (int c = 0; c < 3; ++c) d[c] += d_luma * kLuma[c];
  }
  v4 dx = {};
  for (int c = 0; c < 3; ++c) {
    const float* curve = curves + c * s.knots + t.at[c].first;
    const float part = t.at[c].part, slope = curve[1] - curve[0], toned = curve[0] + part * slope;
    float d_toned = 0.0f;
    for (int r = 0; r < 3; ++r) {
      sums.matrix[r * 4 + c] += d[r] * toned;
      d_toned += matrix[r * 4 + c] * d[r];
    }
    sums.matrix[c * 4 + 3] += d[c];
    float* d_curve = sums.curves + c * s.knots + t.at[c].first;
    d_curve[0] += d_toned * (1.0f - part);
    d_curve[1] += d_toned * part;
    dx[c] = d_toned * slope * static_cast<float>(s.knots - 1);
  }
  return dx;
}

template <class T>
static void run(const EditBackward<T>& a) {
  const EditShape& s = a.shape;
  const int64_t row_size = s.columns * s.bins * 4, bands = ceil_div(s.height, kPieceRows), pieces = s.batch * bands;
  const int64_t of_curves = 3 * s.knots, of_grid = s.rows * s.columns * s.bins * 12, size = of_curves + 12 + of_grid;
  Scratch scratch;
  const Table tables = make_tables(scratch, s, a.parameters);
  const Between* across = make_across(scratch, s);
  v4* rows = scratch.take<v4>(2 * row_size * thread_count());
  float* slots = scratch.zeros<float>(pieces * size);  // [piece][curves, matrix, grid]
  parallel_ranges(pieces, [&](int64_t worker, int64_t first, int64_t end) {
    v4 *row = s.columns ? rows + 2 * worker * row_size : nullptr, *d_row = row + row_size;
    for (int64_t piece = first; piece < end; ++piece) {
      const int64_t image = piece / bands, top = piece % bands * kPieceRows, bottom = std::min(top + kPieceRows, s.height);
      const Table table = of_image(s, tables, image);
      float* slot = slots + piece * size;
      const Sums sums{slot, slot + of_curves, slot + of_curves + 12};
      for (int64_t y = top; y < bottom; ++y) {
        if (row) {
          fill_row(s, a.parameters.grid, image, y, row);
          for (int64_t i = 0; i < row_size; ++i) d_row[i] = v4{};
        }
        for (int64_t i = 0; i < s.width; ++i) {
          const int64_t at = ((image * s.height + y) * s.width + i) * 3;
          put(a.dx + at, pixel_backward(s, a.parameters, image, table, across + i, row, a.x + at, a.dy + at, sums, d_row));
        }
        if (!row) continue;
        const Between rows_at = cell_of(y, s.height, s.rows);
        float* above = sums.grid + rows_at.first * s.columns * s.bins * 12;
        float* below = sums.grid + std::min(rows_at.first + 1, s.rows - 1) * s.columns * s.bins * 12;
        for (int64_t i = 0; i < s.columns * s.bins; ++i)
          for (int64_t j = 0; j < 12; ++j) {
            const float d = d_row[i * 4 + j % 4][j / 4];
            above[i * 12 + j] += (1.0f - rows_at.part) * d;
            below[i * 12 + j] += rows_at.part * d;
          }
      }
    }
  });
  parallel_ranges(s.batch * size, [&](int64_t, int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i) {
      const int64_t image = i / size, j = i % size;
      double total = 0;
      for (int64_t band = 0; band < bands; ++band) total += slots[(image * bands + band) * size + j];
      float* to = j < of_curves        ? a.d_curves + image * of_curves + j
                  : j < of_curves + 12 ? a.d_matrix + image * 12 + j - of_curves
                                       : a.d_grid + image * of_grid + j - of_curves - 12;
      *to = static_cast<float>(total);
    }
  });
}
