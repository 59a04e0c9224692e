// gdfn on a CPU, compiled once per instruction set (no include guard; see common/cpu_each_isa.h).
//
// Forward: one pass; a worker owns a tile at a time and takes its rows through norm, 1×1, 3×3, gate and 1×1 while they are in
// its cache. Backward: one pass that recomputes the hidden rows, unless the forward pass kept them. Sums are per worker and added in
// order.

#include "common/cpu_math.h"
#include "common/cpu_view.h"
#include "common/cpu_norm.h"
#include "common/cpu_repack.h"
#include "common/cpu_depthwise.h"
#include "common/cpu_product.h"
#include "common/cpu_expansion.h"
#include "gdfn/gdfn_cpu_forward.h"

static ExpansionWeights expansion_weights(const GdfnWeights& w, float eps) {
  return {{w.norm_weight, w.norm_bias, eps}, w.project_in, w.dwconv};
}

static ImageShape image_shape(const GdfnShape& s) { return {s.batch, s.height, s.width, s.channels}; }

template <class T>
static void run(const GdfnForward<T>& a) {
  Scratch scratch;
  const GdfnShape& s = a.shape;
  const Groups groups(2, s.hidden);
  const Expansion op = make_expansion(scratch, groups, s.channels, expansion_weights(a.weights, s.eps));
  const Packed project_out = Packed::make(scratch, s.channels, groups.padded());
  pack_columns(project_out, [&](int64_t n) {
    const float* column = a.weights.project_out + n * s.hidden;
    return [=, count = n < s.channels ? s.hidden : 0](int64_t k) { return k < count ? column[k] : 0.0f; };
  });
  forward<float>(scratch, image_shape(s), groups, op, project_out, a.x, a.y, a.kept);
}

template <class T>
static void run(const GdfnBackward<T>& a) {
  Scratch scratch;
  const GdfnShape& s = a.shape;
  const ImageShape shape = image_shape(s);
  const View<const T> d_out{a.dy, shape};
  const Groups groups(2, s.hidden);
  const int64_t half = groups.panels_each, width = groups.width(), padded = groups.padded(), channels = s.channels;
  const ExpansionWeights weights = expansion_weights(a.weights, s.eps);
  const Expansion op = make_expansion(scratch, groups, channels, weights, a.kept);
  ExpansionBackward expansion(scratch, groups, op, weights, shape);
  const Packed project_out{scratch.take<float>(channels * padded), half, groups.vecs, channels};  // from dy to the gate
  pack_rows(project_out, [&](int64_t k) {
    const float* row = a.weights.project_out + k * s.hidden;
    return [=, count = s.hidden](int64_t n) { return n < count ? row[n] : 0.0f; };
  });

  const int64_t most = expansion.most_pixels(), panel = most * width, ldd = pixel_stride(channels);
  const int64_t middle_size = 3 * half * panel + most * ldd, sums_size = channels * padded, workers = expansion.steps.workers;
  float* middles = scratch.take<float>(workers * middle_size);
  float* d_project_out = scratch.zeros<float>(workers * sums_size);  // [channel][padded hidden]
  expansion.run(
      scratch, View<const T>{a.x, shape}, d_out, View<T>{a.dx, shape},
      [&](int64_t worker, const Hidden<T>& hidden, const Range& rows, const Range& columns, const Ring& grad, const Tile& tile) {
        const int64_t count = columns.size();
        float *halves = middles + worker * middle_size, *d_gate = halves + 2 * half * panel, *dy = d_gate + half * panel;
        read_pixels(d_out, tile.image, rows, columns, dy, ldd);
        const Left left{dy, ldd, rows.size() * count};
        product(project_out, &left, 1, expansion.zeros, 0, &d_gate, width, panel);
        for (int64_t p = 0; p < half; ++p) {
          float *first = halves + p * panel, *second = halves + (half + p) * panel, *d = d_gate + p * panel;
          for (int64_t y = rows.first; y < rows.end; ++y) {
            const int64_t row = (y - rows.first) * count * width;
            depthwise<false>(hidden.ring, p, {y, y + 1}, columns, op.taps + p * 9 * width, first + row, nullptr);
            depthwise<false>(hidden.ring, half + p, {y, y + 1}, columns, op.taps + (half + p) * 9 * width, second + row, nullptr);
            float *d_first = grad.at(y, p, columns.first), *d_second = grad.at(y, half + p, columns.first);
            for (int64_t i = 0; i < count * width; i += W) {
              const vf u = load(first + row + i), v = load(second + row + i), g = load(d + row + i);
              const vf cdf = normal_cdf(u), density = exp_negative(u * u * -0.5f) * kNormalDensity;
              store(d_first + i, g * v * (cdf + u * density));
              store(d_second + i, g * u * cdf);
              store(first + row + i, u * cdf * v);  // the gate's output, for project_out's gradient
            }
            // The neighbours' pixels are theirs.
            std::fill_n(first + row, (tile.columns.first - columns.first) * width, 0.0f);
            std::fill_n(first + row + (tile.columns.end - columns.first) * width, (columns.end - tile.columns.end) * width, 0.0f);
          }
          const Range own = rows.within(tile.rows);
          const int64_t pixel = (own.first - rows.first) * count;
          outer(channels, width, own.size() * count, dy + pixel * ldd, ldd, first + pixel * width, width,
                d_project_out + worker * sums_size + p * width, padded);
        }
      },
      a.kept);
  expansion.finish(weights, {a.d_norm_weight, a.d_norm_bias, a.d_project_in}, a.d_dwconv);
  add_up(d_project_out, workers, sums_size);
  for (int64_t c = 0; c < channels; ++c) std::copy_n(d_project_out + c * padded, s.hidden, a.d_project_out + c * s.hidden);
}
