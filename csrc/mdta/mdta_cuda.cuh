// mdta on a GPU, for one dtype; what its steps share with gdfn is in common/cuda_image.cuh.
//
// Forward: pass 1 (statistics), a step: norm statistics, 1×1 (hidden, of q and k), 3×3 with the squares' sums, Gram matrix. Then the
// attention and project_out · attention, one matrix an image. Pass 2 (apply), a step: norm statistics, 1×1 (hidden, of v), 3×3, 1×1
// with the residual. Backward, image by image or some small ones at once: a pass over v for the gradient of that matrix, some small
// matrices, and a pass that computes q and k again for everything else. Channels of q, k and v are padded head by head.
#pragma once
#include "common/cuda_image.cuh"
#include "mdta/mdta.h"

namespace autohdr {
namespace image {

// The head of `parts` thirds of q, k, v, from third `first` on.
inline Head head_of(const MdtaShape& s, const MdtaWeights& w, int64_t first, int64_t parts) {
  const int64_t c = s.channels, size = s.head_size();
  return {{s.batch, static_cast<int>(s.height), static_cast<int>(s.width), static_cast<int>(c)},
          w.norm_weight,
          w.norm_bias,
          w.qkv + first * c * c,
          w.dwconv + first * c * 9,
          s.eps,
          parts * s.heads,
          size,
          round_up(size, 8)};
}

// qk = 3×3 convolution of hidden, and squares[image][block][channels] (+)= the sums of its squares, as rounded.
template <class T>
__global__ void __launch_bounds__(256)
    convolve_qk(Walk walk, View<const T> hidden, const float* weight, View<T> qk, float* squares, bool add) {
  __shared__ float2 sums[8][32];
  float2 sum = make_float2(0, 0);
  convolve<1>(walk, hidden, weight, [&](int y, int x, int channel, const float2(&v)[1]) {
    store_pair(qk.at(blockIdx.z, y, x) + channel, v[0]);
    const float2 rounded = make_float2(to_float(from_float<T>(v[0].x)), to_float(from_float<T>(v[0].y)));
    add_product(sum, rounded, rounded);
  });
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  const int channel = (blockIdx.y * 32 + threadIdx.x) * 2;
  if (threadIdx.y > 0 || channel >= walk.channels) return;
  for (int w = 1; w < 8; ++w) sum.x += sums[w][threadIdx.x].x, sum.y += sums[w][threadIdx.x].y;
  float2& slot = *reinterpret_cast<float2*>(squares + (blockIdx.z * int64_t{gridDim.x} + blockIdx.x) * walk.channels + channel);
  slot = add ? make_float2(slot.x + sum.x, slot.y + sum.y) : sum;
}

// The sums of all pixels as the attention takes them.
static __global__ void round_statistics(int64_t count, int64_t rows, const double* gram, const double* q_square,
                                        const double* k_square, float* rounded, float* q_norm, float* k_norm) {
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += int64_t{gridDim.x} * blockDim.x) {
    rounded[i] = static_cast<float>(gram[i]);
    if (i < rows) q_norm[i] = static_cast<float>(sqrt(q_square[i])), k_norm[i] = static_cast<float>(sqrt(k_square[i]));
  }
}

// The heads of some images, each a matrix of size × size.
struct Heads {
  MdtaAttention from;        // of the first image
  const float* temperature;  // [heads]
  int64_t matrices;
  int heads, size, padded;
  bool one_pixel;
};

// Row i of a matrix's attention, softmax_j(temperature · cosine), by a warp; in double, as all of these small matrices: they are few,
// and the gradient takes differences of nearly equal ones.
struct AttentionRow {
  const float *gram, *k_norm;
  double q, temperature, top = -INFINITY, total = 0;

  __device__ AttentionRow(const Heads& h, int64_t matrix, int i)
      : gram(h.from.gram + (matrix * h.size + i) * h.size), k_norm(h.from.k_norm + matrix * h.size),
        q(length(h.from.q_norm[matrix * h.size + i])), temperature(h.temperature[matrix % h.heads]) {
    for (int j = threadIdx.x % 32; j < h.size; j += 32) top = fmax(top, temperature * cosine(j));
    for (int d = 16; d > 0; d /= 2) top = fmax(top, __shfl_xor_sync(~0u, top, d));
    for (int j = threadIdx.x % 32; j < h.size; j += 32) total += exp(temperature * cosine(j) - top);
    total = warp_sum(total);
  }
  // Whether a vector of this length is divided by it, and not by the constant kLeastLength.
  static __device__ bool normalised(float norm) { return !(norm < kLeastLength); }
  static __device__ double length(float norm) { return normalised(norm) ? norm : kLeastLength; }
  __device__ double lengths(int j) const { return q * length(k_norm[j]); }
  __device__ double cosine(int j) const { return gram[j] / lengths(j); }
  __device__ double attention(int j) const { return exp(temperature * cosine(j) - top) / total; }
};

constexpr int kRowWarps = 8;
inline dim3 row_blocks(int64_t rows) { return dim3(ceil_div(rows, kRowWarps)); }
__device__ __forceinline__ int64_t row_of_warp() { return int64_t{blockIdx.x} * kRowWarps + threadIdx.x / 32; }

// attention[matrix][padded j][padded i]: transposed, zeros where there is none. A warp owns an i.
static __global__ void __launch_bounds__(kRowWarps * 32) attend(Heads h, float* attention) {
  const int64_t matrix = row_of_warp() / h.padded;
  const int i = row_of_warp() % h.padded;
  if (matrix >= h.matrices) return;
  float* out = attention + matrix * h.padded * h.padded + i;
  const AttentionRow row(h, matrix, min(i, h.size - 1));
  // 32 bits are enough for an element of one matrix; with 64 this kernel spills on sm_80.
  for (int j = threadIdx.x % 32; j < h.padded; j += 32)
    out[j * h.padded] = i < h.size && j < h.size ? static_cast<float>(row.attention(j)) : 0.0f;
}

// The gradient of the Gram matrices and, row by row, of the temperature, given d_attention[matrix][padded j][padded i]. A warp owns
// an i.
static __global__ void __launch_bounds__(kRowWarps * 32)
    attend_backward(Heads h, const float* d_attention, double* d_gram /* [matrix][i][j] */,
                    double* d_temperature /* [matrix][i] */) {
  const int64_t matrix = row_of_warp() / h.size;
  const int i = row_of_warp() % h.size, lane = threadIdx.x % 32;
  if (matrix >= h.matrices) return;
  const AttentionRow row(h, matrix, i);
  const float* d = d_attention + matrix * h.padded * h.padded + i;
  double* out = d_gram + row_of_warp() * h.size;
  double along = 0, by_temperature = 0;
  for (int j = lane; j < h.size; j += 32) along += d[int64_t{j} * h.padded] * row.attention(j);
  along = warp_sum(along);
  for (int j = lane; j < h.size; j += 32) {
    const double d_score = row.attention(j) * (d[int64_t{j} * h.padded] - along);
    by_temperature += d_score * row.cosine(j);
    out[j] = d_score * row.temperature / row.lengths(j);
  }
  by_temperature = warp_sum(by_temperature);
  if (lane == 0) d_temperature[row_of_warp()] = by_temperature;
}

// dq = factor ∘ (matrix · k) + scale ∘ q, and dk alike with k and q exchanged; [head of an image][padded]. The factors keep what
// float16 cannot hold out of the matrices: over a million pixels the Gram matrix has gradients of 1e-6 of d_attention. The scales are
// of the matrices as rounded, so that dq stays orthogonal to q where the two terms nearly cancel. A q shorter than kLeastLength is
// divided by a constant, and its dq is not orthogonal to it. A longer q of one pixel is ±1 after that, whatever it was: its dq is 0,
// which the two terms would miss by their rounding over q's length, as short as that may be.
template <class T>
struct AttentionGrad {
  T *to_q, *to_k;  // [matrix][padded][padded], rows are q's and k's channels
  float *q_factor, *q_scale, *k_factor, *k_scale;

  AttentionGrad(Workspace& memory, int64_t matrices, int64_t padded)
      : to_q(memory.take<T>(matrices * padded * padded)), to_k(memory.take<T>(matrices * padded * padded)),
        q_factor(memory.take<float>(matrices * padded)), q_scale(memory.take<float>(matrices * padded)),
        k_factor(memory.take<float>(matrices * padded)), k_scale(memory.take<float>(matrices * padded)) {}
};

// A warp owns a row of to_q and the same of to_k.
template <class T>
__global__ void __launch_bounds__(kRowWarps * 32)
    make_attention_grad(Heads h, const double* d_gram, const double* d_temperature, AttentionGrad<T> grad,
                        float* temperature_sums /* [matrix] */) {
  const int64_t matrix = row_of_warp() / h.padded;
  const int row = row_of_warp() % h.padded, lane = threadIdx.x % 32;
  if (matrix >= h.matrices) return;
  // Element j of the row lies at first + j·step.
  const auto make = [&](int64_t first, int64_t step, const float* norm, T* to, float* factor, float* scale) {
    const double* d = d_gram + matrix * h.size * h.size + first;
    const float* gram = h.from.gram + matrix * h.size * h.size + first;
    const float length = row < h.size ? norm[matrix * h.size + row] : 1.0f;
    const bool normalised = AttentionRow::normalised(length), real = row < h.size && !(h.one_pixel && normalised);
    double largest = 0, through = 0;
    for (int j = lane; real && j < h.size; j += 32) largest = fmax(largest, fabs(d[j * step]));
    for (int i = 16; i > 0; i /= 2) largest = fmax(largest, __shfl_xor_sync(~0u, largest, i));
    int exponent = 0;
    frexp(largest, &exponent);
    const double unit = ldexp(1.0, exponent);
    for (int j = lane; j < h.padded; j += 32) {
      const bool inside = real && j < h.size;
      const T rounded = from_float<T>(inside ? static_cast<float>(d[j * step] / unit) : 0.0f);
      to[row_of_warp() * h.padded + j] = rounded;
      if (inside) through += to_float(rounded) * unit * gram[j * step];
    }
    through = warp_sum(through);
    if (lane > 0) return;
    factor[row_of_warp()] = static_cast<float>(unit);
    scale[row_of_warp()] = normalised ? static_cast<float>(-through / (double{length} * length)) : 0.0f;
  };
  make(int64_t{row} * h.size, 1, h.from.q_norm, grad.to_q, grad.q_factor, grad.q_scale);
  make(row, h.size, h.from.k_norm, grad.to_k, grad.k_factor, grad.k_scale);
  if (row > 0) return;
  double sum = 0;
  for (int i = lane; i < h.size; i += 32) sum += d_temperature[matrix * h.size + i];
  sum = warp_sum(sum);
  if (lane == 0) temperature_sums[matrix] = static_cast<float>(sum);
}

// project_out and the attention of a group of images, as the products want them.
struct Attention {
  MdtaShape shape;
  MdtaWeights weights;
  MdtaAttention from;
  int size, padded, width, columns;  // width: of all heads, padded; columns: channels, padded
  float* project_out;                // [columns][width]
  float* attention;                  // [image][head][padded j][padded i], transposed

  Attention(Workspace& memory, const MdtaShape& s, const MdtaWeights& w, const MdtaAttention& from, int64_t images)
      : shape(s), weights(w), from(from), size(static_cast<int>(s.head_size())), padded(static_cast<int>(round_up(size, 8))),
        width(static_cast<int>(s.heads) * padded), columns(static_cast<int>(round_up(s.channels, 8))),
        project_out(memory.take<float>(int64_t{columns} * width)), attention(memory.take<float>(images * width * padded)) {}
  void fill(cudaStream_t stream) const {
    gather<float>({{columns, shape.channels, 1, shape.channels}, {padded, size, shape.heads, 1}, int64_t{columns} * width, width},
                  weights.project_out, project_out, stream);
  }
  Heads heads(int64_t b, int64_t images) const {
    const int64_t row = b * shape.channels;
    return {{from.gram + row * size, from.q_norm + row, from.k_norm + row},
            weights.temperature,
            images * shape.heads,
            static_cast<int>(shape.heads),
            size,
            padded,
            shape.one_pixel()};
  }
  void attend(int64_t b, int64_t images, cudaStream_t stream) const {
    launch(image::attend, row_blocks(images * width), dim3(kRowWarps * 32), 0, stream, heads(b, images), attention);
  }
  Rows<const float> project_out_rows() const { return {project_out, 0, width, padded}; }
  Rows<float> rows_of(float* matrices) const { return {matrices, int64_t{width} * padded, padded, int64_t{padded} * padded}; }
};

}  // namespace image

template <class T>
int64_t queue(const MdtaStatistics<T>& a, void* memory, cudaStream_t stream) {
  using namespace image;
  Workspace workspace(memory);
  const Head h = head_of(a.shape, a.weights, 0, 2);
  const Shape& s = h.shape;
  const int heads = static_cast<int>(a.shape.heads), size = static_cast<int>(h.size), hidden = static_cast<int>(h.hidden());
  const Steps steps(s, static_cast<int>(a.first), static_cast<int>(a.end), 2 * hidden * static_cast<int64_t>(sizeof(T)), 1,
                    kForwardBudget, kMostImages / heads);
  const auto walk_of = [&](int y, int rows, int64_t images) { return Walk{y, y + rows, s.height, s.width, hidden, 0, images}; };
  const int64_t pixels = steps.images * steps.buffer_rows(1) * s.width, count = s.channels * h.size;
  const int64_t splits = splits_of(size, size, steps.images * heads, int64_t{steps.rows} * s.width),
                slots = walk_blocks(walk_of(0, steps.rows, 1));
  const HeadWeights<T> weights(workspace, h, false);
  float2* stats = workspace.take<float2>(pixels);
  T *hidden_data = workspace.take<T>(pixels * hidden), *qk_data = workspace.take<T>(steps.images * steps.rows * s.width * hidden);
  float *gram = workspace.take<float>(splits * steps.images * count),
        *squares = workspace.take<float>(steps.images * slots * hidden);
  if (workspace.counts_only()) return workspace.used();

  weights.fill(h, stream);
  steps.each_group([&](int64_t b, int64_t images) {
    steps.each_strip([&](int y, int rows) {
      const bool add = y > steps.first;
      const View<T> hidden_rows = buffer_view(hidden_data, s, y, rows, 1, hidden),
                    qk = buffer_view(qk_data, s, y, rows, 0, hidden);
      expand<T>(h, weights, view_of(a.x, s, b, 0), images, stats, hidden_rows, stream);
      launch_walk(convolve_qk<T>, walk_of(y, rows, images), stream, hidden_rows, weights.dwconv, qk, squares, add);
      const Rows<const T> q = qk.from(y, h.padded), k = q.shifted(hidden / 2);
      outer<T>({q, k, {}, gram, 1, int64_t{rows} * s.width, size, size, heads, add}, images * heads, splits, stream);
    });
    add_up(gram, splits, images * count, a.gram + b * count, stream);
    const Gather each{{images, images, 1, slots * hidden},
                      {h.size, h.padded, heads, 1},
                      images * s.channels,
                      s.channels,
                      0,
                      hidden,
                      static_cast<int>(slots)};
    gather<double>(each, squares, a.q_square + b * s.channels, stream);
    gather<double>(each, squares + hidden / 2, a.k_square + b * s.channels, stream);
  });
  return workspace.used();
}

template <class T>
int64_t queue(const MdtaApply<T>& a, void* memory, cudaStream_t stream) {
  using namespace image;
  Workspace workspace(memory);
  const Head h = head_of(a.shape, a.weights, 2, 1);
  const Shape& s = h.shape;
  const int heads = static_cast<int>(a.shape.heads), hidden = static_cast<int>(h.hidden()), padded = static_cast<int>(h.padded);
  const Steps steps(s, 2 * hidden * static_cast<int64_t>(sizeof(T)), 1, kForwardBudget, kMostImages / heads);
  const int64_t pixels = steps.images * steps.buffer_rows(1) * s.width, square = int64_t{s.channels} * hidden;
  const HeadWeights<T> weights(workspace, h, false);
  const Attention attention(workspace, a.shape, a.weights, a.attention, steps.images);
  T* combined = workspace.take<T>(steps.images * square);  // [image][C][hidden], project_out · attention
  float2* stats = workspace.take<float2>(pixels);
  T *hidden_data = workspace.take<T>(pixels * hidden), *v_data = workspace.take<T>(steps.images * steps.rows * s.width * hidden);
  if (workspace.counts_only()) return workspace.used();

  weights.fill(h, stream);
  attention.fill(stream);
  steps.each_group([&](int64_t b, int64_t images) {
    attention.attend(b, images, stream);
    product<float, T>({attention.project_out_rows(),
                       attention.rows_of(attention.attention),
                       {},
                       {combined, square, hidden, padded},
                       {},
                       nullptr,
                       s.channels,
                       padded,
                       padded,
                       heads},
                      images, stream);
    steps.each_strip([&](int y, int rows) {
      const View<const T> x = view_of(a.x, s, b, 0);
      const View<T> hidden_rows = buffer_view(hidden_data, s, y, rows, 1, hidden), v = buffer_view(v_data, s, y, rows, 0, hidden);
      expand<T>(h, weights, x, images, stats, hidden_rows, stream);
      launch_walk(depthwise<T>, Walk{y, y + rows, s.height, s.width, hidden, 0, images}, stream, hidden_rows, weights.dwconv, v);
      product<T>({v.from(y),
                  {combined, square, hidden, 0},
                  x.from(y),
                  view_of(a.y, s, b, 0).from(y),
                  {},
                  nullptr,
                  int64_t{rows} * s.width,
                  hidden,
                  s.channels,
                  1},
                 images, stream);
    });
  });
  return workspace.used();
}

template <class T>
int64_t queue(const MdtaForward<T>& a, void* memory, cudaStream_t stream) {
  using namespace image;
  Workspace workspace(memory);
  const MdtaShape& s = a.shape;
  const int64_t rows = s.batch * s.channels, count = rows * s.head_size();
  double *gram = workspace.take<double>(count), *q_square = workspace.take<double>(rows),
         *k_square = workspace.take<double>(rows);
  void* rest = workspace.take<double>(0);
  const int64_t first = queue(MdtaStatistics<T>{s, a.weights, a.x, 0, s.height, gram, q_square, k_square}, rest, stream);
  if (!workspace.counts_only() && count)
    launch(round_statistics, dim3(std::min<int64_t>(ceil_div(count, 256), 4096)), dim3(256), 0, stream, count, rows, gram,
           q_square, k_square, a.gram, a.q_norm, a.k_norm);
  return workspace.used() +
         std::max(first, queue(MdtaApply<T>{s, a.weights, a.x, {a.gram, a.q_norm, a.k_norm}, a.y}, rest, stream));
}

template <class T>
int64_t queue(const MdtaBackward<T>& a, void* memory, cudaStream_t stream) {
  using namespace image;
  Workspace workspace(memory);
  const Head h = head_of(a.shape, a.weights, 0, 3), value_head = head_of(a.shape, a.weights, 2, 1);
  const Shape& s = h.shape;
  const int heads = static_cast<int>(a.shape.heads), size = static_cast<int>(h.size), padded = static_cast<int>(h.padded),
            channels = s.channels;
  const int hidden = static_cast<int>(h.hidden()), third = hidden / 3, columns = static_cast<int>(round_up(channels, 8));
  const int64_t pixel_bytes = 8 * third * static_cast<int64_t>(sizeof(T)) + HeadBackward<T>::pixel_bytes(h);
  const Steps steps(s, pixel_bytes, 2, kBackwardBudget, kMostImages / heads);
  const int64_t pixels = steps.images * steps.buffer_rows(2) * s.width, near = steps.images * steps.buffer_rows(1) * s.width;
  const int64_t matrices = steps.images * heads, combined_size = int64_t{third} * channels;
  const int64_t splits = splits_of(third, channels, steps.images, int64_t{steps.rows} * s.width);
  const int64_t out_splits = splits_of(channels, size, heads, steps.images * size);
  const HeadWeights<T> weights(workspace, h, true), value_weights(workspace, value_head, false);
  const Attention attention(workspace, a.shape, a.weights, a.attention, steps.images);
  float* transposed = workspace.take<float>(int64_t{channels} * columns);  // project_out, [q's channel][C]
  float* combined_slots = workspace.take<float>(splits * steps.images * combined_size);
  float* d_combined = workspace.take<float>(steps.images * combined_size);  // [image][third][C], transposed
  float* d_attention = workspace.take<float>(matrices * padded * padded);   // [matrix][j][i], transposed
  double *d_gram = workspace.take<double>(matrices * size * size), *d_temperature = workspace.take<double>(matrices * size);
  float* temperature_sums = workspace.take<float>(s.batch * heads);
  float* d_project_out = workspace.take<float>(out_splits * channels * channels);  // [split][head][C][size]
  const AttentionGrad<T> grad(workspace, matrices, padded);
  T* to_v = workspace.take<T>(steps.images * third * columns);  // [image][third][C]: dv = to_v · dy
  float2* stats = workspace.take<float2>(pixels);
  T *hidden_data = workspace.take<T>(pixels * hidden), *qk_data = workspace.take<T>(near * 2 * third),
    *d_data = workspace.take<T>(near * hidden);
  const HeadBackward<T> head(workspace, h, steps.images, steps.rows);
  if (workspace.counts_only()) return workspace.used();

  weights.fill(h, stream);
  value_weights.fill(value_head, stream);
  attention.fill(stream);
  gather<float>({{channels, channels, 1, 1}, {columns, channels, 1, channels}, int64_t{channels} * columns, columns},
                a.weights.project_out, transposed, stream);
  bool first = true;
  steps.each_group([&](int64_t b, int64_t images) {
    const View<const T> x = view_of(a.x, s, b, 0), dy = view_of(a.dy, s, b, 0);

    // The gradient of combined = project_out · attention: Σ dy vᵀ.
    steps.each_strip([&](int y, int rows) {
      const View<T> hidden_rows = buffer_view(hidden_data, s, y, rows, 1, third), v = buffer_view(qk_data, s, y, rows, 0, third);
      expand<T>(value_head, value_weights, x, images, stats, hidden_rows, stream);
      launch_walk(depthwise<T>, Walk{y, y + rows, s.height, s.width, third, 0, images}, stream, hidden_rows, value_weights.dwconv,
                  v);
      outer<T>({v.from(y), dy.from(y), {}, combined_slots, 1, int64_t{rows} * s.width, third, channels, 1, y > 0}, images, splits,
               stream);
    });
    add_up(combined_slots, splits, images * combined_size, d_combined, stream);

    // The small gradients.
    const Rows<const float> d_combined_rows{d_combined, combined_size, channels, int64_t{padded} * channels};
    const Rows<const float> attention_rows = attention.rows_of(attention.attention);
    attention.attend(b, images, stream);
    product<float>({d_combined_rows,
                    {transposed, 0, columns, int64_t{size} * columns},
                    {},
                    attention.rows_of(d_attention),
                    {},
                    nullptr,
                    size,
                    channels,
                    size,
                    heads},
                   images, stream);
    outer<float>({d_combined_rows, attention_rows, {}, d_project_out, images, size, channels, size, heads, !first}, heads,
                 out_splits, stream);
    const Heads of = attention.heads(b, images);
    launch(attend_backward, row_blocks(of.matrices * size), dim3(kRowWarps * 32), 0, stream, of, d_attention, d_gram,
           d_temperature);
    launch(make_attention_grad<T>, row_blocks(of.matrices * padded), dim3(kRowWarps * 32), 0, stream, of, d_gram, d_temperature,
           grad, temperature_sums + b * heads);
    product<float, T>({attention_rows,
                       attention.project_out_rows(),
                       {},
                       {to_v, int64_t{third} * columns, columns, int64_t{padded} * columns},
                       {},
                       nullptr,
                       padded,
                       padded,
                       columns,
                       heads},
                      images, stream);

    // Everything else.
    steps.each_strip([&](int y, int rows) {
      const View<T> hidden_rows = buffer_view(hidden_data, s, y, rows, 2, hidden),
                    qk = buffer_view(qk_data, s, y, rows, 1, 2 * third), d = buffer_view(d_data, s, y, rows, 1, hidden);
      const int64_t of_image = int64_t{third} * padded, of_head = int64_t{padded} * padded, count = int64_t{d.rows} * s.width;
      expand<T>(h, weights, x, images, stats, hidden_rows, stream);
      launch_walk(depthwise<T>, Walk{d.first, d.first + d.rows, s.height, s.width, 2 * third, 0, images}, stream, hidden_rows,
                  weights.dwconv, qk);
      const Rows<const T> q = qk.from(d.first, padded), k = q.shifted(third);
      const Rows<T> dq = d.from(d.first, padded);
      product<T>(
          {k, {grad.to_q, of_image, padded, of_head}, q, dq, {}, grad.q_scale, count, padded, padded, heads, grad.q_factor},
          images, stream);
      product<T>({q,
                  {grad.to_k, of_image, padded, of_head},
                  k,
                  dq.shifted(third),
                  {},
                  grad.k_scale,
                  count,
                  padded,
                  padded,
                  heads,
                  grad.k_factor},
                 images, stream);
      product<T>({dy.from(d.first),
                  {to_v, int64_t{third} * columns, columns, 0},
                  {},
                  dq.shifted(2 * third),
                  {},
                  nullptr,
                  count,
                  channels,
                  third,
                  1},
                 images, stream);
      head.step(h, weights, images, y, rows, x, dy, view_of(a.dx, s, b, 0), stats, hidden_rows, d, first, stream);
      first = false;
    });
  });
  gather<float>({{channels, channels, 1, size},
                 {size, int64_t{channels} * size, heads, 1},
                 int64_t{channels} * channels,
                 channels,
                 0,
                 int64_t{channels} * channels,
                 first ? 0 : static_cast<int>(out_splits)},
                d_project_out, a.d_project_out, stream);
  add_up(temperature_sums, s.batch, heads, a.d_temperature, stream);
  head.finish(h, !first, a.d_norm_weight, a.d_norm_bias, a.d_qkv, a.d_dwconv, stream);
  return workspace.used();
}

}  // namespace autohdr
