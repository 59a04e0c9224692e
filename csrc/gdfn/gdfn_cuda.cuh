// gdfn on a GPU, for one dtype; what its steps share with mdta is in common/cuda_image.cuh.
//
// Forward, a step: norm statistics, 1×1 (hidden), 3×3 and gate (gated), 1×1 with the residual. Backward, a step: hidden again, the
// gradient of gated, 3×3 and the gate's derivative (d, and gated for project_out's gradient), then the head's backward pass.
#pragma once
#include "common/cuda_image.cuh"
#include "gdfn/gdfn.h"

namespace autohdr {
namespace image {

inline Head head_of(const GdfnShape& s, const GdfnWeights& w) {
  return {{s.batch, static_cast<int>(s.height), static_cast<int>(s.width), static_cast<int>(s.channels)},
          w.norm_weight,
          w.norm_bias,
          w.project_in,
          w.dwconv,
          s.eps,
          2,
          s.hidden,
          round_up(s.hidden, 8)};
}

__device__ __forceinline__ float normal_cdf(float v) { return 0.5f * (1.0f + erff(v * 0.707106781186547524f)); }

// gated = gelu(a) ⊙ b.
template <class T>
__global__ void __launch_bounds__(256) gate(Walk walk, View<const T> hidden, const float* weight, View<T> gated) {
  convolve<2>(walk, hidden, weight, [&](int y, int x, int channel, const float2(&v)[2]) {
    store_pair(gated.at(blockIdx.z, y, x) + channel,
               make_float2(v[0].x * normal_cdf(v[0].x) * v[1].x, v[0].y * normal_cdf(v[0].y) * v[1].y));
  });
}

// d: the gradients of a and b; gated again. d_gated and gated may be the same buffer.
template <class T>
__global__ void __launch_bounds__(256)
    gate_backward(Walk walk, View<const T> hidden, const float* weight, View<T> d_gated, View<T> d) {
  convolve<2>(walk, hidden, weight, [&](int y, int x, int channel, const float2(&v)[2]) {
    T* at = d_gated.at(blockIdx.z, y, x) + channel;
    const float2 g = load_pair(at);
    const auto backward = [](float a, float b, float g, float& da, float& db, float& gated) {
      const float cdf = normal_cdf(a), density = expf(-0.5f * a * a) * 0.398942280401432678f;
      da = g * b * (cdf + a * density), db = g * a * cdf, gated = a * cdf * b;
    };
    float2 da, db, gated;
    backward(v[0].x, v[1].x, g.x, da.x, db.x, gated.x);
    backward(v[0].y, v[1].y, g.y, da.y, db.y, gated.y);
    store_pair(at, gated);
    store_pair(d.at(blockIdx.z, y, x) + channel, da);
    store_pair(d.at(blockIdx.z, y, x) + walk.part + channel, db);
  });
}

}  // namespace image

template <class T>
int64_t queue(const GdfnForward<T>& a, void* memory, cudaStream_t stream) {
  using namespace image;
  Workspace workspace(memory);
  const Head h = head_of(a.shape, a.weights);
  const Shape& s = h.shape;
  const int64_t hidden = h.hidden(), padded = h.padded, channels = s.channels;
  const Steps steps(s, (hidden + padded) * static_cast<int64_t>(sizeof(T)), 1, kForwardBudget, kMostImages);
  const int64_t rows = steps.buffer_rows(1), pixels = steps.images * rows * s.width;
  const HeadWeights<T> weights(workspace, h, false);
  T* project_out = workspace.take<T>(channels * padded);
  float2* stats = workspace.take<float2>(pixels);
  T *hidden_data = workspace.take<T>(pixels * hidden), *gated_data = workspace.take<T>(pixels * padded);
  if (workspace.counts_only()) return workspace.used();

  weights.fill(h, stream);
  gather<T>({{channels, channels, 1, a.shape.hidden}, {padded, a.shape.hidden, 1, 1}, channels * padded, padded},
            a.weights.project_out, project_out, stream);
  steps.each([&](int64_t b, int64_t images, int y, int count) {
    const View<const T> x = view_of(a.x, s, b, 0);
    const View<T> hidden_rows = buffer_view(hidden_data, s, y, count, 1, hidden),
                  gated = buffer_view(gated_data, s, y, count, 0, padded);
    expand<T>(h, weights, x, images, stats, hidden_rows, stream);
    const Walk walk{y, y + count, s.height, s.width, static_cast<int>(padded), static_cast<int>(padded), images};
    launch_walk(gate<T>, walk, stream, hidden_rows, weights.dwconv, gated);
    product<T>({gated.from(y),
                {project_out, 0, padded, 0},
                x.from(y),
                view_of(a.y, s, b, 0).from(y),
                {},
                nullptr,
                int64_t{count} * s.width,
                static_cast<int>(padded),
                static_cast<int>(channels),
                1},
               images, stream);
  });
  return workspace.used();
}

template <class T>
int64_t queue(const GdfnBackward<T>& a, void* memory, cudaStream_t stream) {
  using namespace image;
  Workspace workspace(memory);
  const Head h = head_of(a.shape, a.weights);
  const Shape& s = h.shape;
  const int64_t hidden = h.hidden(), padded = h.padded, channels = s.channels;
  const int64_t pixel_bytes = (2 * hidden + padded) * static_cast<int64_t>(sizeof(T)) + HeadBackward<T>::pixel_bytes(h);
  const Steps steps(s, pixel_bytes, 2, kBackwardBudget, kMostImages);
  const int64_t pixels = steps.images * steps.buffer_rows(2) * s.width, near = steps.images * steps.buffer_rows(1) * s.width;
  const int64_t splits = splits_of(channels, a.shape.hidden, 1, steps.images * steps.rows * s.width);
  const HeadWeights<T> weights(workspace, h, true);
  const int64_t columns = round_up(channels, 8);
  T* project_out = workspace.take<T>(padded * columns);  // [padded][C], transposed
  float2* stats = workspace.take<float2>(pixels);
  T *hidden_data = workspace.take<T>(pixels * hidden), *gated_data = workspace.take<T>(near * padded),
    *d_data = workspace.take<T>(near * hidden);
  float* d_project_out = workspace.take<float>(splits * channels * a.shape.hidden);
  const HeadBackward<T> head(workspace, h, steps.images, steps.rows);
  if (workspace.counts_only()) return workspace.used();

  weights.fill(h, stream);
  gather<T>({{padded, a.shape.hidden, 1, 1}, {columns, channels, 1, a.shape.hidden}, padded * columns, columns},
            a.weights.project_out, project_out, stream);
  bool first = true;
  steps.each([&](int64_t b, int64_t images, int y, int count) {
    const View<const T> x = view_of(a.x, s, b, 0), dy = view_of(a.dy, s, b, 0);
    const View<T> hidden_rows = buffer_view(hidden_data, s, y, count, 2, hidden),
                  gated = buffer_view(gated_data, s, y, count, 1, padded), d = buffer_view(d_data, s, y, count, 1, hidden);
    expand<T>(h, weights, x, images, stats, hidden_rows, stream);
    product<T>({dy.from(gated.first),
                {project_out, 0, columns, 0},
                {},
                gated.from(gated.first),
                {},
                nullptr,
                int64_t{gated.rows} * s.width,
                static_cast<int>(channels),
                static_cast<int>(padded),
                1},
               images, stream);
    const Walk walk{gated.first, gated.first + gated.rows, s.height, s.width, static_cast<int>(padded), static_cast<int>(padded),
                    images};
    launch_walk(gate_backward<T>, walk, stream, hidden_rows, weights.dwconv, gated, d);
    outer<T>({dy.from(y),
              gated.from(y),
              {},
              d_project_out,
              images,
              int64_t{count} * s.width,
              static_cast<int>(channels),
              static_cast<int>(a.shape.hidden),
              1,
              !first},
             1, splits, stream);
    head.step(h, weights, images, y, count, x, dy, view_of(a.dx, s, b, 0), stats, hidden_rows, d, first, stream);
    first = false;
  });
  add_up(d_project_out, first ? 0 : splits, channels * a.shape.hidden, a.d_project_out, stream);  // all zero for no image
  head.finish(h, !first, a.d_norm_weight, a.d_norm_bias, a.d_project_in, a.d_dwconv, stream);
  return workspace.used();
}

}  // namespace autohdr
