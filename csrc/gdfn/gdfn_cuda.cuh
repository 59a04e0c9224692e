// gdfn on a GPU, for one dtype; what its steps share with mdta is in common/cuda_expansion.cuh.
//
// Forward: one kernel for few channels of half precision or TF32 (common/cuda_fused.cuh); else, a step: norm, 1×1 (hidden), 3×3 and
// gate (gated), 1×1 with the residual. Backward, a step: hidden again, the gradient of gated, 3×3 and the gate's derivative (d, and
// gated for project_out's gradient), then the expansion's backward pass, of which one kernel takes d in half precision
// (gdfn_backward.cuh).
#pragma once
#include "common/cuda_fused.cuh"
#include "gdfn/gdfn.h"
#include "gdfn/gdfn_backward.cuh"

namespace autohdr {
namespace image {

// a and b in turns of so many channels.
inline ExpansionWeights expansion_of(const GdfnShape& s, const GdfnWeights& w, int64_t turn) {
  return {w.norm_weight, w.norm_bias, w.project_in, w.dwconv, s.eps, {2, s.hidden, turn}};
}

// gated = gelu(a) ⊙ b, in float32.
template <class T>
__global__ void __launch_bounds__(128) gate(Walk<2> walk, View<const T> hidden, const float* taps, View<T> gated) {
  const Segment<2> s(walk);
  if (!has_part(walk, s)) return;
  Along<1, 2, T> to(gated, s);
  convolve<2>(walk, s, hidden, taps, hidden.channels, [&](int o, int, const float2(&v)[2]) {
    const float2 product[1] = {Gated::of<T>(v)};
    to.store(o, product), to.next(o);
  });
}

// d: the gradients of a and b; gated again, in place of its gradient.
template <class T>
__global__ void __launch_bounds__(128)
    gate_backward(Walk<2> walk, View<const T> hidden, const float* taps, View<T> gated, View<T> d) {
  const Segment<2> s(walk);
  if (!has_part(walk, s)) return;
  Along<1, 2, T> at(gated, s);
  Along<2, 2, T> to(d, s);
  Pairs<T, 1> ahead[2] = {at.load(0), at.load(1)};
  convolve<2>(walk, s, hidden, taps, hidden.channels, [&](int o, int x, const float2(&v)[2]) {
    const float2 g = to_float2(ahead[o].v[0]);
    if (x + 1 < s.columns()) ahead[o] = load_pairs<1>(at.at[o] + at.step);
    float2 both[2], product[1];
    differentiate_gate<T>(v[0].x, v[1].x, g.x, both[0].x, both[1].x, product[0].x);
    differentiate_gate<T>(v[0].y, v[1].y, g.y, both[0].y, both[1].y, product[0].y);
    at.store(o, product), at.next(o);
    to.store(o, both), to.next(o);
  });
}

}  // namespace image

template <class T>
int64_t queue(const GdfnForward<T>& a, void* memory, cudaStream_t stream) {
  using namespace image;
  Workspace workspace(memory);
  const ImageShape s = image_of(a.shape);
  const Layout layout = Layout::of<T>(s, {a.x, a.y});
  const bool fuses = can_fuse<T>(layout);
  const ExpansionWeights w = expansion_of(a.shape, a.weights, kFuses<T> && !fuses ? 8 : 2);
  const int hidden = w.groups.channels(), padded = w.groups.padded(), columns = layout.channels;
  const Steps steps(s, s.rows(), (columns + hidden + padded) * static_cast<int64_t>(sizeof(T)), 1, kForwardBudget, kMostImages);
  Repack<T> repack(stream);
  const Expansion<T> expansion(workspace, w, s.channels, columns, false, repack);
  const int64_t real = a.shape.hidden;
  Gather gather{Axis::plain(s.channels, real), Axis::plain(real, 1), int64_t{columns} * padded, padded};
  gather.rounds = fuses && !kFuses<T>;
  const Matrices<const T> w_out{repack.template make<T>(workspace, gather, a.weights.project_out), 0, padded, 0};
  if (fuses) {
    if (workspace.counts_only()) return workspace.used();
    repack.run();
    for (int64_t b = 0; b < s.batch; b += kMostImages)
      fused<Gated, T>(expansion, view_of(a.x, s, b), w_out, view_of(a.y, s, b), std::min(kMostImages, s.batch - b), stream);
    return workspace.used();
  }
  const Image<const T> x_image(workspace, a.x, layout, steps, s, 1);
  const Image<T> y_image(workspace, a.y, layout, steps, s, 0);
  const Buffer<T> normal(workspace, steps, s, columns, 1), hidden_rows(workspace, steps, s, hidden, 1),
      gated_rows(workspace, steps, s, padded, 0);
  if (workspace.counts_only()) return workspace.used();

  repack.run();
  steps.each([&](int64_t b, int64_t images, const Range& rows) {
    const Range near = steps.around(rows, 1);
    const View<const T> x = x_image.read(b, images, near, stream);
    const View<T> h = hidden_rows.view(near), gated = gated_rows.view(rows), y = y_image.write(b, rows);
    expansion.expand(x, normal.view(near), h, images, stream);
    if constexpr (kFuses<T>)
      launch_depthwise<T, true>(h, expansion.taps, expansion.taps_stride, gated, images, stream);
    else
      launch_walk(gate<T>, Walk<2>(gated, s.height, padded, images), stream, h, expansion.taps, gated);
    product<T, T>({gated.matrices(), w_out, y.pixels(), padded, columns, 1}, y.matrices(), images, stream,
                  Plus<T>{x.of(rows).matrices()});
    y_image.written(b, images, rows, stream);
  });
  return workspace.used();
}

template <class T>
int64_t queue(const GdfnBackward<T>& a, void* memory, cudaStream_t stream) {
  using namespace image;
  Workspace workspace(memory);
  const ImageShape s = image_of(a.shape);
  const Layout layout = Layout::of<T>(s, {a.x, a.dy, a.dx});
  constexpr bool kFused = sizeof(T) == 2;  // the backward passes of gate and 3×3
  const ExpansionWeights w = expansion_of(a.shape, a.weights, kFused ? 8 : 2);
  const int hidden = w.groups.channels(), padded = w.groups.padded(), columns = layout.channels;
  const int64_t real = a.shape.hidden;
  const int64_t pixel_bytes = (2 * hidden + (kFused ? 0 : padded) + columns) * static_cast<int64_t>(sizeof(T)) +
                              ExpansionBackward<T>::pixel_bytes(hidden, columns);
  const Steps steps(s, s.rows(), pixel_bytes, 2, kBackwardBudget, kMostImages);
  const int64_t splits = splits_of<T>(padded, columns, 1, steps.images * steps.rows * s.width);
  Repack<T> repack(stream);
  const Expansion<T> expansion(workspace, w, s.channels, columns, true, repack);
  const T* project_out = repack.template make<T>(  // transposed
      workspace, {Axis::plain(real, 1), Axis::plain(s.channels, real), int64_t{padded} * columns, columns},
      a.weights.project_out);
  const Image<const T> x_image(workspace, a.x, layout, steps, s, 2), dy_image(workspace, a.dy, layout, steps, s, 1);
  const Image<T> dx_image(workspace, a.dx, layout, steps, s, 0);
  const Buffer<T> normal_rows(workspace, steps, s, columns, 2), hidden_rows(workspace, steps, s, hidden, 2),
      d_gated_rows(workspace, steps, s, padded, 1), d_rows(workspace, steps, s, kFused ? 0 : hidden, 1),
      gated_rows(workspace, steps, s, kFused ? padded : 0, 0);
  float* d_project_out = workspace.take<float>(splits * columns * padded);  // transposed
  const ExpansionBackward<T> backward(workspace, expansion, steps, s, kFused ? gated_depthwise_slots : depthwise_slots);
  if (workspace.counts_only()) return workspace.used();

  repack.run();
  bool first = true;
  steps.each([&](int64_t b, int64_t images, const Range& rows) {
    const Range near = steps.around(rows, 1), far = steps.around(rows, 2);
    const View<const T> x = x_image.read(b, images, far, stream), dy = dy_image.read(b, images, near, stream);
    const View<T> normal = normal_rows.view(far), h = hidden_rows.view(far), d_gated = d_gated_rows.view(near),
                  gated = kFused ? gated_rows.view(rows) : d_gated, dx = dx_image.write(b, rows);
    expansion.expand(x, normal, h, images, stream);
    product<T, T>({dy.matrices(), {project_out, 0, columns, 0}, d_gated.pixels(), columns, padded, 1}, d_gated.matrices(), images,
                  stream);
    if constexpr (kFused) {
      launch(differentiate_gated_depthwise<T>, dim3(backward.tap_slots, ceil_div(hidden, GateTile::kChannels)),
             dim3(GateTile::kThreads), GateTile::kShared, stream,
             Tiles<GateTile::kRows, GateTile::kColumns>{rows, s.width, hidden, images}, h, d_gated, expansion.taps, gated,
             backward.d_hidden.view(rows), backward.d_taps, !first);
    } else {
      const View<T> d = d_rows.view(near);
      launch_walk(gate_backward<T>, Walk<2>(gated, s.height, padded, images), stream, h, expansion.taps, gated, d);
      backward.through_taps(rows, h, d, images, first, stream);
    }
    outer<T>({gated.of(rows).matrices(), dy.of(rows).matrices(), d_project_out, images, dx.pixels(), padded, columns, 1, !first},
             1, splits, stream);
    backward.through_product(x, dy, dx, normal, images, first, stream);
    dx_image.written(b, images, rows, stream);
    first = false;
  });
  // All zero for no image.
  repack.add({Axis::plain(columns, 1), Axis::plain(padded, columns), s.channels * real, real, int64_t{columns} * padded,
              first ? 0 : static_cast<int>(splits)},
             d_project_out, a.d_project_out);
  backward.finish(!first, a.d_norm_weight, a.d_norm_bias, a.d_project_in, a.d_dwconv, repack);
  repack.run();
  return workspace.used();
}

}  // namespace autohdr
