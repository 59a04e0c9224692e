// mdta on a GPU, for one dtype; what its steps share with gdfn is in common/cuda_expansion.cuh.
//
// Forward: pass 1 (statistics), a step: norm, 1×1 (hidden, of q and k), 3×3 with the squares' sums, Gram matrix; the last two are
// often one kernel (mdta_fused.cuh). Then the attention and project_out · attention, one matrix an image. Pass 2 (apply), a step:
// norm, where pass 1 has not kept it, 1×1 (hidden, of v), 3×3, 1×1 with the residual. For few channels of half precision or TF32
// each pass is one kernel (mdta_fused.cuh, common/cuda_fused.cuh). Backward, image by image or some small ones at once: a pass over
// v for the gradient of that matrix, some small matrices, and a pass that computes q and k again for everything else. Channels of
// q, k and v are padded head by head.
#pragma once
#include "mdta/mdta.h"
#include "mdta/mdta_fused.cuh"

namespace autohdr {
namespace image {

// Of `parts` thirds of q, k, v, from third `first` on.
inline ExpansionWeights expansion_of(const MdtaShape& s, const MdtaWeights& w, int64_t first, int64_t parts) {
  const int64_t c = s.channels;
  return {w.norm_weight,
          w.norm_bias,
          w.qkv + first * c * c,
          w.dwconv + first * c * 9,
          s.eps,
          Groups::one_by_one(parts * s.heads, s.head_size())};
}

// qk = 3×3 convolution of hidden, and squares[image][block][channels] (+)= the sums of its squares, as rounded.
template <class T>
__global__ void __launch_bounds__(128) convolve_qk(Walk<kDepthwiseRows> walk, View<const T> hidden, const float* taps, int stride,
                                                   View<T> qk, float* squares, bool add) {
  __shared__ float2 sums[kWalkWarps][32];
  float2 sum = make_float2(0, 0);
  const Segment<kDepthwiseRows> s(walk);
  if (has_part(walk, s)) {
    Along<1, kDepthwiseRows, T> to(qk, s);
    convolve<1>(walk, s, hidden, taps, stride, [&](int o, int, const float2(&v)[1]) {
      to.store(o, v), to.next(o);
      const float2 rounded = to_float2(to_pair<T>(v[0]));
      add_product(sum, rounded, rounded);
    });
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || !has_channels(walk)) return;
  for (int w = 1; w < kWalkWarps; ++w) sum.x += sums[w][threadIdx.x].x, sum.y += sums[w][threadIdx.x].y;
  float2& slot =
      *reinterpret_cast<float2*>(squares + (blockIdx.z * int64_t{gridDim.x} + blockIdx.x) * walk.channels + pair_of_lane() * 2);
  slot = add ? make_float2(slot.x + sum.x, slot.y + sum.y) : sum;
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
  static constexpr int kKept = 2;  // columns of a lane that are computed once, of heads of up to 64 channels all
  const float *gram, *k_norm;
  int size;
  double q, temperature, top = -INFINITY, part, kept[kKept];

  __device__ AttentionRow(const Heads& h, int64_t matrix, int i)
      : gram(h.from.gram + (matrix * h.size + i) * h.size), k_norm(h.from.k_norm + matrix * h.size), size(h.size),
        q(length(h.from.q_norm[matrix * h.size + i])), temperature(h.temperature[matrix % h.heads]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < kKept; ++n) {
      kept[n] = n * 32 + lane < size ? temperature * cosine(n * 32 + lane) : -INFINITY;
      top = fmax(top, kept[n]);
    }
    for (int j = kKept * 32 + lane; j < size; j += 32) top = fmax(top, temperature * cosine(j));
    for (int d = 16; d > 0; d /= 2) top = fmax(top, __shfl_xor_sync(~0u, top, d));
    double total = 0;
#pragma unroll
    for (int n = 0; n < kKept; ++n) total += kept[n] = exp(kept[n] - top);
    for (int j = kKept * 32 + lane; j < size; j += 32) total += exp(temperature * cosine(j) - top);
    part = 1 / sum_over(32, total);
  }
  // Whether a vector of this length is divided by it, and not by the constant kLeastLength.
  static __device__ bool normalised(float norm) { return !(norm < kLeastLength); }
  static __device__ double length(float norm) { return normalised(norm) ? norm : kLeastLength; }
  __device__ double lengths(int j) const { return q * length(k_norm[j]); }
  __device__ double cosine(int j) const { return gram[j] / lengths(j); }
  // f(j, attention) for this lane's columns j.
  template <class F>
  __device__ __forceinline__ void each(const F& f) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < kKept; ++n)
      if (n * 32 + lane < size) f(n * 32 + lane, kept[n] * part);
    for (int j = kKept * 32 + lane; j < size; j += 32) f(j, exp(temperature * cosine(j) - top) * part);
  }
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
  row.each([&](int j, double v) { out[j * h.padded] = i < h.size ? static_cast<float>(v) : 0.0f; });
  for (int j = h.size + threadIdx.x % 32; j < h.padded; j += 32) out[j * h.padded] = 0;
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
  row.each([&](int j, double v) { along += d[j * h.padded] * v; });
  along = sum_over(32, along);
  row.each([&](int j, double v) {
    const double d_score = v * (d[j * h.padded] - along);
    by_temperature += d_score * row.cosine(j);
    out[j] = d_score * row.temperature / row.lengths(j);
  });
  by_temperature = sum_over(32, by_temperature);
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
    through = sum_over(32, through);
    if (lane > 0) return;
    factor[row_of_warp()] = static_cast<float>(unit);
    scale[row_of_warp()] = normalised ? static_cast<float>(-through / (double{length} * length)) : 0.0f;
  };
  make(int64_t{row} * h.size, 1, h.from.q_norm, grad.to_q, grad.q_factor, grad.q_scale);
  make(row, h.size, h.from.k_norm, grad.to_k, grad.k_factor, grad.k_scale);
  if (row > 0) return;
  double sum = 0;
  for (int i = lane; i < h.size; i += 32) sum += d_temperature[matrix * h.size + i];
  sum = sum_over(32, sum);
  if (lane == 0) temperature_sums[matrix] = static_cast<float>(sum);
}

// project_out and the attention of a group of images, as the products want them.
template <class T>
struct Attention {
  MdtaShape shape;
  MdtaWeights weights;
  MdtaAttention from;
  Groups groups;            // the heads
  int size, padded, width;  // width: of all heads, padded
  float* project_out;       // [columns][width]
  float* attention;         // [image][head][padded j][padded i], transposed

  // columns: channels of x's view.
  Attention(Workspace& memory, const MdtaShape& s, const MdtaWeights& w, const MdtaAttention& from_, int columns, int64_t images,
            Repack<T>& repack)
      : shape(s), weights(w), from(from_), groups(Groups::one_by_one(s.heads, s.head_size())),
        size(static_cast<int>(s.head_size())), padded(groups.padded()), width(groups.channels()),
        project_out(repack.template make<float>(
            memory, {Axis::plain(s.channels, s.channels), Axis::pad(groups, 1), int64_t{columns} * width, width}, w.project_out)),
        attention(memory.take<float>(images * width * padded)) {}
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
  Matrices<const float> project_out_rows() const { return {project_out, 0, width, padded}; }
  Matrices<float> rows_of(float* matrices) const { return {matrices, int64_t{width} * padded, padded, int64_t{padded} * padded}; }
};

// What statistics() adds up: q kᵀ and the squares, or (float) q kᵀ and the lengths, as the attention takes them.
template <class Sum>
struct Sums {
  Sum *gram, *q, *k;
};

// Whether hidden is all there is of q and k, for convolve_heads().
template <class T>
bool has_small_heads(int padded) {
  return sizeof(T) == 2 && padded <= kHeadChannels;
}
template <class T>
Steps statistics_steps(const MdtaShape& shape, const Layout& layout, const Expansion<T>& expansion, const Range& rows) {
  const int64_t buffers = has_small_heads<T>(expansion.groups.padded()) ? 1 : 2;
  return Steps(image_of(shape), rows, (layout.channels + buffers * expansion.hidden) * static_cast<int64_t>(sizeof(T)), 1,
               kForwardBudget, kMostImages / shape.heads);
}

// Pass 1; the expansion is of q and k. Its memory begins where `workspace` ends. kept: null, or where the norm of x stays for pass 2,
// of a step that is the only one.
template <class T, class Sum>
int64_t statistics(Workspace workspace, const MdtaShape& shape, const Layout& layout, const Steps& steps,
                   const Expansion<T>& expansion, const T* x, const Sums<Sum>& sums, const Buffer<T>* kept, Repack<T>& repack,
                   cudaStream_t stream) {
  const ImageShape s = image_of(shape);
  const int heads = static_cast<int>(shape.heads), size = static_cast<int>(shape.head_size()), hidden = expansion.hidden,
            padded = expansion.groups.padded(), columns = layout.channels;
  const bool small_heads = has_small_heads<T>(padded);
  const int64_t count = s.channels * int64_t{size},
                slots = small_heads ? head_slots({{0, steps.rows}, s.width, hidden, steps.images}, heads)
                                    : Walk<kDepthwiseRows>({0, steps.rows}, s.width).blocks(),
                splits = small_heads ? slots : splits_of<T>(size, size, steps.images * heads, int64_t{steps.rows} * s.width);
  // What was summed in slots, of images from b on.
  const auto add_up = [&](int64_t b, int64_t images, const float* gram, int64_t gram_slots, const float* squares,
                          int64_t square_slots) {
    repack.add_up(gram, gram_slots, images * count, sums.gram + b * count);
    const Gather each{Axis::plain(images, square_slots * hidden),
                      Axis::unpad(Groups::one_by_one(heads, size), 1),
                      images * s.channels,
                      s.channels,
                      hidden,
                      static_cast<int>(square_slots),
                      std::is_same_v<Sum, float>};
    repack.add(each, squares, sums.q + b * s.channels);
    repack.add(each, squares + hidden / 2, sums.k + b * s.channels);
    repack.run();
  };
  if (can_fuse<T>(layout) && can_fuse_statistics<T>(columns, heads, padded)) {
    const int64_t blocks = fused_statistics_blocks(view_of(x, s, 0), steps.all_rows), fused_slots = blocks * kSlotsOfBlock<T>,
                  most = std::clamp<int64_t>(kForwardBudget / (fused_slots * count * 4), 1,
                                             std::clamp<int64_t>(s.batch, 1, kMostImages));
    float *gram = workspace.take<float>(fused_slots * most * count), *squares = workspace.take<float>(most * blocks * hidden);
    if (workspace.counts_only()) return workspace.used();
    repack.run();
    for (int64_t b = 0; b < s.batch; b += most) {
      const int64_t images = std::min(most, s.batch - b);
      fused_statistics(expansion, view_of(x, s, b), steps.all_rows, heads, blocks, gram, squares, images, stream);
      add_up(b, images, gram, fused_slots, squares, blocks);
    }
    return workspace.used();
  }
  const Image<const T> x_image(workspace, x, layout, steps, s, 1);
  const Buffer<T> normal = kept ? *kept : Buffer<T>(workspace, steps, s, columns, 1), hidden_rows(workspace, steps, s, hidden, 1),
                  qk_rows(workspace, steps, s, small_heads ? 0 : hidden, 0);
  float *gram = workspace.take<float>(splits * steps.images * count),
        *squares = workspace.take<float>(steps.images * slots * hidden);
  if (workspace.counts_only()) return workspace.used();

  repack.run();
  steps.each_group([&](int64_t b, int64_t images) {
    steps.each_strip([&](const Range& rows) {
      const Range near = steps.around(rows, 1);
      const bool add = rows.first > steps.all_rows.first;
      const View<T> h = hidden_rows.view(near);
      expansion.expand(x_image.read(b, images, near, stream), normal.view(near), h, images, stream);
      if constexpr (sizeof(T) == 2)
        if (small_heads)
          return launch(convolve_heads<T>, dim3(slots, heads, images), dim3(kHeadThreads), HeadTile<T>::kShared, stream,
                        HeadTiles{rows, s.width, hidden, images}, View<const T>(h), expansion.taps, expansion.taps_stride, size,
                        padded, gram, squares, add);
      const View<T> qk = qk_rows.view(rows);
      launch_walk(convolve_qk<T>, Walk<kDepthwiseRows>(qk, s.height, hidden, images), stream, h, expansion.taps,
                  expansion.taps_stride, qk, squares, add);
      const Matrices<const T> q = qk.matrices(padded), k = q.shifted(hidden / 2);
      outer<T>({q, k, gram, 1, qk.pixels(), size, size, heads, add}, images * heads, splits, stream);
    });
    add_up(b, images, gram, splits, squares, slots);
  });
  return workspace.used();
}

inline Steps apply_steps(const MdtaShape& shape, const Layout& layout, int hidden, int64_t element) {
  const ImageShape s = image_of(shape);
  return Steps(s, s.rows(), (layout.channels + 2 * hidden) * element, 1, kForwardBudget, kMostImages / shape.heads);
}

// Pass 2; the expansion is of v. Memory as in pass 1. kept: null, or what pass 1 kept.
template <class T>
int64_t apply(Workspace workspace, const MdtaApply<T>& a, const Layout& layout, const Steps& steps, const Expansion<T>& expansion,
              const Attention<T>& attention, const Buffer<T>* kept, Repack<T>& repack, cudaStream_t stream) {
  const ImageShape s = image_of(a.shape);
  const int heads = static_cast<int>(a.shape.heads), hidden = expansion.hidden, padded = expansion.groups.padded(),
            columns = layout.channels;
  const int64_t square = int64_t{columns} * hidden;
  T* combined = workspace.take<T>(steps.images * square);  // [image][columns][hidden], project_out · attention
  const auto combine = [&](int64_t b, int64_t images, const auto& epilogue) {
    attention.attend(b, images, stream);
    product_of<float, T>({attention.project_out_rows(), attention.rows_of(attention.attention), columns, padded, padded, heads},
                         {combined, square, hidden, padded}, images, stream, epilogue);
  };
  const Matrices<const T> w_out{combined, square, hidden, 0};
  if (can_fuse<T>(layout)) {
    if (workspace.counts_only()) return workspace.used();
    repack.run();
    steps.each_group([&](int64_t b, int64_t images) {
      combine(b, images, std::conditional_t<kFuses<T>, Plain, InTf32>{});
      fused<Convolved, T>(expansion, view_of(a.x, s, b), w_out, view_of(a.y, s, b), images, stream);
    });
    return workspace.used();
  }
  const Image<const T> x_image(workspace, a.x, layout, steps, s, 1);
  const Image<T> y_image(workspace, a.y, layout, steps, s, 0);
  const Buffer<T> normal_rows = kept ? *kept : Buffer<T>(workspace, steps, s, columns, 1),
                  hidden_rows(workspace, steps, s, hidden, 1), v_rows(workspace, steps, s, hidden, 0);
  if (workspace.counts_only()) return workspace.used();

  repack.run();
  steps.each_group([&](int64_t b, int64_t images) {
    combine(b, images, Plain{});
    steps.each_strip([&](const Range& rows) {
      const Range near = steps.around(rows, 1);
      const View<const T> x = x_image.read(b, images, near, stream);
      const View<T> normal = normal_rows.view(near), h = hidden_rows.view(near), v = v_rows.view(rows),
                    y = y_image.write(b, rows);
      if (!kept) norm<T>(expansion.norm, x, normal, images, stream);
      expansion.expand_normal(normal, h, h.channels, 0, Plain{}, images, stream);
      convolve_depthwise<T>(h, expansion.taps, expansion.taps_stride, v, s.height, images, stream);
      product<T, T>({v.matrices(), w_out, y.pixels(), hidden, columns, 1}, y.matrices(), images, stream,
                    Plus<T>{x.of(rows).matrices()});
      y_image.written(b, images, rows, stream);
    });
  });
  return workspace.used();
}

}  // namespace image

template <class T>
int64_t queue(const MdtaStatistics<T>& a, void* memory, cudaStream_t stream) {
  using namespace image;
  Workspace workspace(memory);
  const Layout layout = Layout::of<T>(image_of(a.shape), {a.x});
  Repack<T> repack(stream);
  const Expansion<T> expansion(workspace, expansion_of(a.shape, a.weights, 0, 2), static_cast<int>(a.shape.channels),
                               layout.channels, false, repack);
  const Steps steps = statistics_steps(a.shape, layout, expansion, {static_cast<int>(a.first), static_cast<int>(a.end)});
  return statistics<T, double>(workspace, a.shape, layout, steps, expansion, a.x, {a.gram, a.q_square, a.k_square}, nullptr,
                               repack, stream);
}

template <class T>
int64_t queue(const MdtaApply<T>& a, void* memory, cudaStream_t stream) {
  using namespace image;
  Workspace workspace(memory);
  const Layout layout = Layout::of<T>(image_of(a.shape), {a.x, a.y});
  Repack<T> repack(stream);
  const Expansion<T> expansion(workspace, expansion_of(a.shape, a.weights, 2, 1), static_cast<int>(a.shape.channels),
                               layout.channels, false, repack);
  const Steps steps = apply_steps(a.shape, layout, expansion.hidden, sizeof(T));
  const Attention<T> attention(workspace, a.shape, a.weights, a.attention, layout.channels, steps.images, repack);
  return apply<T>(workspace, a, layout, steps, expansion, attention, nullptr, repack, stream);
}

template <class T>
int64_t queue(const MdtaForward<T>& a, void* memory, cudaStream_t stream) {
  using namespace image;
  Workspace workspace(memory);
  const Layout layout = Layout::of<T>(image_of(a.shape), {a.x, a.y});
  Repack<T> repack(stream);  // once for both passes
  const Expansion<T> expansion(workspace, expansion_of(a.shape, a.weights, 0, 3), static_cast<int>(a.shape.channels),
                               layout.channels, false, repack);
  const int third = expansion.hidden / 3;
  const Expansion<T> of_qk = expansion.part(0, 2 * third), of_v = expansion.part(2 * third, third);
  const Steps first_steps = statistics_steps(a.shape, layout, of_qk, image_of(a.shape).rows()),
              steps = apply_steps(a.shape, layout, third, sizeof(T));
  const bool keeps = !can_fuse<T>(layout) && first_steps.only_one() && steps.only_one();
  const MdtaApply<T> then{a.shape, a.weights, a.x, {a.gram, a.q_norm, a.k_norm}, a.y};
  const Attention<T> attention(workspace, a.shape, a.weights, then.attention, layout.channels, steps.images, repack);
  const Buffer<T> normal(workspace, steps, image_of(a.shape), keeps ? layout.channels : 0, 1), *kept = keeps ? &normal : nullptr;
  const int64_t first = statistics<T, float>(workspace, a.shape, layout, first_steps, of_qk, a.x, {a.gram, a.q_norm, a.k_norm},
                                             kept, repack, stream);
  return std::max(first, apply<T>(workspace, then, layout, steps, of_v, attention, kept, repack, stream));
}

template <class T>
int64_t queue(const MdtaBackward<T>& a, void* memory, cudaStream_t stream) {
  using namespace image;
  Workspace workspace(memory);
  const ImageShape s = image_of(a.shape);
  const Layout layout = Layout::of<T>(s, {a.x, a.dy, a.dx});
  const ExpansionWeights w = expansion_of(a.shape, a.weights, 0, 3);
  const int heads = static_cast<int>(a.shape.heads), size = static_cast<int>(a.shape.head_size()), padded = w.groups.padded(),
            channels = s.channels, hidden = w.groups.channels(), third = hidden / 3, columns = layout.channels;
  const int64_t pixel_bytes =
      (columns + 8 * third) * static_cast<int64_t>(sizeof(T)) + ExpansionBackward<T>::pixel_bytes(hidden, columns);
  const Steps steps(s, s.rows(), pixel_bytes, 2, kBackwardBudget, kMostImages / heads);
  const int64_t matrices = steps.images * heads, combined_size = int64_t{third} * columns;
  const int64_t splits = splits_of<T>(third, columns, steps.images, int64_t{steps.rows} * s.width);
  const int64_t out_splits = splits_of<float>(columns, padded, heads, steps.images * size);
  Repack<T> repack(stream);
  const Expansion<T> expansion(workspace, w, channels, columns, true, repack);
  const Attention<T> attention(workspace, a.shape, a.weights, a.attention, columns, steps.images, repack);
  const float* transposed = repack.template make<float>(  // project_out, [q's channel][C]
      workspace, {Axis::pad(attention.groups, 1), Axis::plain(channels, channels), int64_t{third} * columns, columns},
      a.weights.project_out);
  float* combined_slots = workspace.take<float>(splits * steps.images * combined_size);
  float* d_combined = workspace.take<float>(steps.images * combined_size);  // [image][third][columns], transposed
  float* d_attention = workspace.take<float>(matrices * padded * padded);   // [matrix][j][i], transposed
  double *d_gram = workspace.take<double>(matrices * size * size), *d_temperature = workspace.take<double>(matrices * size);
  float* temperature_sums = workspace.take<float>(s.batch * heads);
  float* d_project_out = workspace.take<float>(out_splits * heads * columns * padded);  // [split][head][columns][padded]
  const AttentionGrad<T> grad(workspace, matrices, padded);
  T* to_v = workspace.take<T>(steps.images * combined_size);  // [image][third][columns]: dv = to_v · dy
  const Image<const T> x_image(workspace, a.x, layout, steps, s, 2), dy_image(workspace, a.dy, layout, steps, s, 1);
  const Image<T> dx_image(workspace, a.dx, layout, steps, s, 0);
  const Buffer<T> normal_rows(workspace, steps, s, columns, 2), hidden_rows(workspace, steps, s, hidden, 2),
      qk_rows(workspace, steps, s, 2 * third, 1), d_rows(workspace, steps, s, hidden, 1);
  const ExpansionBackward<T> backward(workspace, expansion, steps, s);
  if (workspace.counts_only()) return workspace.used();

  repack.run();
  bool first = true;
  steps.each_group([&](int64_t b, int64_t images) {
    // The gradient of combined = project_out · attention: Σ dy vᵀ.
    steps.each_strip([&](const Range& rows) {
      const Range near = steps.around(rows, 1);
      const View<T> h = hidden_rows.view(near, third), v = qk_rows.view(rows, third);
      expansion.expand(x_image.read(b, images, near, stream), normal_rows.view(near), h, images, stream, 2 * third);
      convolve_depthwise<T>(h, expansion.taps + 2 * third, hidden, v, s.height, images, stream);
      const View<const T> dy = dy_image.read(b, images, rows, stream);
      outer<T>({v.matrices(), dy.matrices(), combined_slots, 1, v.pixels(), third, columns, 1, rows.first > 0}, images, splits,
               stream);
    });
    repack.add_up(combined_slots, splits, images * combined_size, d_combined);
    repack.run();

    // The small gradients.
    const Matrices<const float> d_combined_rows{d_combined, combined_size, columns, int64_t{padded} * columns};
    const Matrices<const float> attention_rows = attention.rows_of(attention.attention);
    attention.attend(b, images, stream);
    product_of<float, float>(
        {d_combined_rows, {transposed, 0, columns, int64_t{padded} * columns}, padded, columns, padded, heads},
        attention.rows_of(d_attention), images, stream);
    outer_of<float>({d_combined_rows, attention_rows, d_project_out, images, size, columns, padded, heads, !first}, heads,
                    out_splits, stream);
    const Heads of = attention.heads(b, images);
    launch(attend_backward, row_blocks(of.matrices * size), dim3(kRowWarps * 32), 0, stream, of, d_attention, d_gram,
           d_temperature);
    launch(make_attention_grad<T>, row_blocks(of.matrices * padded), dim3(kRowWarps * 32), 0, stream, of, d_gram, d_temperature,
           grad, temperature_sums + b * heads);
    product_of<float, T>({attention_rows, attention.project_out_rows(), padded, padded, columns, heads},
                         {to_v, combined_size, columns, int64_t{padded} * columns}, images, stream);

    // Everything else.
    steps.each_strip([&](const Range& rows) {
      const Range near = steps.around(rows, 1), far = steps.around(rows, 2);
      const View<const T> x = x_image.read(b, images, far, stream), dy = dy_image.read(b, images, near, stream);
      const View<T> normal = normal_rows.view(far), h = hidden_rows.view(far), qk = qk_rows.view(near), d = d_rows.view(near),
                    dx = dx_image.write(b, rows);
      const int64_t of_image = int64_t{third} * padded, of_head = int64_t{padded} * padded;
      expansion.expand(x, normal, h, images, stream);
      convolve_depthwise<T>(h, expansion.taps, hidden, qk, s.height, images, stream);
      const Matrices<const T> q = qk.matrices(padded), k = q.shifted(third);
      const Matrices<T> dq = d.matrices(padded);
      const auto through = [&](const Matrices<const T>& from, const T* matrix, const Matrices<const T>& own,
                               const Matrices<T>& to, const float* factor, const float* scale) {
        product<T, T>({from, {matrix, of_image, padded, of_head}, d.pixels(), padded, padded, heads}, to, images, stream,
                      ScaledPlus<T>{{own}, factor, scale});
      };
      through(k, grad.to_q, q, dq, grad.q_factor, grad.q_scale);
      through(q, grad.to_k, k, dq.shifted(third), grad.k_factor, grad.k_scale);
      product<T, T>({dy.matrices(), {to_v, combined_size, columns, 0}, d.pixels(), columns, third, 1},
                    d.matrices().shifted(2 * third), images, stream);
      backward.through_taps(rows, h, d, images, first, stream);
      backward.through_product(x, dy, dx, normal, images, first, stream);
      dx_image.written(b, images, rows, stream);
      first = false;
    });
  });
  repack.add({Axis::plain(columns, padded), Axis::unpad({heads, size, int64_t{columns} * padded}, 1),
              int64_t{channels} * channels, channels, int64_t{heads} * columns * padded,
              first ? 0 : static_cast<int>(out_splits)},
             d_project_out, a.d_project_out);
  repack.add_up(temperature_sums, s.batch, heads, a.d_temperature);
  backward.finish(!first, a.d_norm_weight, a.d_norm_bias, a.d_qkv, a.d_dwconv, repack);
  repack.run();
  return workspace.used();
}

}  // namespace autohdr
