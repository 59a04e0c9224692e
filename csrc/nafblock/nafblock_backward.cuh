// nafblock's backward pass, image by image or some small ones at once. Pass 1, a step: the block again up to the gate of its second
// half; that half's gradients, and the image's between both halves, `middle`. Then the attention's small matrices. Pass 2, a step:
// hidden rows again, the gradient of the first gate, and the expansion's backward pass.
#pragma once
#include "nafblock/nafblock_cuda.cuh"

namespace autohdr {
namespace image {

// The gradients of both halves in place of these, in turns of 4, and their product in place of its gradient.
template <class T>
__global__ void __launch_bounds__(256) differentiate_product(T* halves, T* gated, int64_t fours) {
  for (int64_t i = int64_t{blockIdx.x} * 256 + threadIdx.x; i < fours; i += int64_t{gridDim.x} * 256) {
    float v[8], g[4];
    load_floats(halves + i * 8, v);
    load_floats(gated + i * 4, g);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float a = v[e], b = v[e + 4];
      v[e] = g[e] * b, v[e + 4] = g[e] * a, g[e] = a * b;
    }
    store_floats(halves + i * 8, v);
    store_floats(gated + i * 4, g);
  }
}

// d: the gradients of a and b, given that of a ⊙ b. bias: of the 3×3, as the halves lie.
template <class T>
__global__ void __launch_bounds__(128) differentiate_halves(Walk<2> walk, View<const T> hidden, const float* taps,
                                                            const float* bias, View<const T> d_local, View<T> d) {
  const Segment<2> s(walk);
  if (!has_part(walk, s)) return;
  Along<1, 2, const T> from(d_local, s);
  Along<2, 2, T> to(d, s);
  const auto more = load_pairs<2>(bias + pair_of_lane() * 4);
  const float2 of_a = to_float2(more.v[0]), of_b = to_float2(more.v[1]);
  convolve<2>(walk, s, hidden, taps, hidden.channels, [&](int o, int, const float2(&v)[2]) {
    const float2 g = to_float2(load_pairs<1>(from.at[o]).v[0]);
    const float2 both[2] = {make_float2(g.x * (v[1].x + of_b.x), g.y * (v[1].y + of_b.y)),
                            make_float2(g.x * (v[0].x + of_a.x), g.y * (v[0].y + of_a.y))};
    to.store(o, both), to.next(o), from.next(o);
  });
}

// slots[slot][channels] (+)= the sums of so many pixels one after the other. A lane owns two channels; warps take pixels in turns.
constexpr int kSumWarps = 8;
template <class T>
__global__ void __launch_bounds__(kSumWarps * 32) sum_pixels(const T* v, int channels, int64_t pixels, float* slots, bool add) {
  __shared__ float2 all[kSumWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, channel = (blockIdx.y * 32 + lane) * 2;
  float2 sum = make_float2(0, 0);
  if (channel < channels)
    for (int64_t i = int64_t{blockIdx.x} * kSumWarps + warp; i < pixels; i += int64_t{gridDim.x} * kSumWarps) {
      const float2 one = to_float2(load_pairs<1>(v + i * channels + channel).v[0]);
      sum.x += one.x, sum.y += one.y;
    }
  all[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || channel >= channels) return;
  for (int w = 1; w < kSumWarps; ++w) sum.x += all[w][lane].x, sum.y += all[w][lane].y;
  float2& slot = *reinterpret_cast<float2*>(slots + int64_t{blockIdx.x} * channels + channel);
  slot = add ? make_float2(slot.x + sum.x, slot.y + sum.y) : sum;
}

// The gradient of a bias: the sums over all pixels of some channels.
template <class T>
struct PixelSums {
  int channels;
  int64_t count;  // of slots
  float* slots;
  PixelSums(Workspace& memory, int channels_, int64_t pixels)
      : channels(channels_), count(std::clamp<int64_t>(pixels / 1024, 1, 256)), slots(memory.take<float>(count * channels)) {}
  void add(const View<const T>& v, int64_t images, bool first, cudaStream_t stream) const {
    launch(sum_pixels<T>, dim3(count, ceil_div(channels, 64)), dim3(kSumWarps * 32), 0, stream, v.data, channels,
           images * v.pixels(), slots, !first);
  }
  // order: of the channels wanted.
  void finish(bool any, const Axis& order, int64_t wanted, float* to, Repack<T>& repack) const {
    repack.add({Axis::plain(1, 0), order, wanted, wanted, channels, any ? static_cast<int>(count) : 0}, slots, to);
  }
};

// to[image][column] = factor · Σ_row v[image][row] · w[row][column] · m[image][row][column], without m where that is null, and 0 where
// there are no channels. A block owns 32 columns, its warps rows in turns.
static __global__ void __launch_bounds__(kSumWarps * 32)
    sum_rows(const float* v, int64_t of_image, const float* w, const float* m, float factor, int channels, float* to,
             int columns) {
  __shared__ float all[kSumWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = blockIdx.x * 32 + lane;
  const int64_t image = blockIdx.y;
  float sum = 0;
  if (column < channels)
    for (int row = warp; row < channels; row += kSumWarps) {
      const int64_t at = int64_t{row} * channels + column;
      sum += v[image * of_image + row] * w[at] * (m ? m[image * channels * channels + at] : 1.0f);
    }
  all[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || column >= columns) return;
  for (int k = 1; k < kSumWarps; ++k) sum += all[k][lane];
  to[image * columns + column] = factor * sum;
}

// to[row][column] (+)= Σ_image u[image][row][column] · v[image][column]; u's of its row alone where of_column is 0.
static __global__ void __launch_bounds__(256) sum_images(const float* u, int64_t of_image, int of_row, int of_column,
                                                         const float* v, int64_t images, int channels, float* to, bool add) {
  const int64_t i = int64_t{blockIdx.x} * 256 + threadIdx.x, row = i / channels, column = i - row * channels;
  if (row >= channels) return;
  float sum = add ? to[i] : 0.0f;
  for (int64_t b = 0; b < images; ++b) sum += u[b * of_image + row * of_row + column * of_column] * v[b * channels + column];
  to[i] = sum;
}

// The gradients of a 1×1 convolution and of the scale behind it from those of their product. A warp owns a row.
static __global__ void __launch_bounds__(kSumWarps * 32)
    unscale(const float* weight, const float* bias, const float* scale, const float* of_weight, const float* of_bias,
            int channels, float* d_weight, float* d_bias, float* d_scale) {
  const int row = blockIdx.x * kSumWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= channels) return;
  float along = 0;
  for (int k = lane; k < channels; k += 32) {
    const int64_t at = int64_t{row} * channels + k;
    d_weight[at] = scale[row] * of_weight[at];
    along += weight[at] * of_weight[at];
  }
  along = sum_over(32, along);
  if (lane > 0) return;
  d_bias[row] = scale[row] * of_bias[row];
  d_scale[row] = along + bias[row] * of_bias[row];
}

}  // namespace image

template <class T>
int64_t queue(const NafblockBackward<T>& a, void* memory, cudaStream_t stream) {
  using namespace image;
  Workspace workspace(memory);
  const NafblockTensors<float>& d = a.grads;
  const ImageShape s = image_of(a.shape);
  const Layout layout = Layout::of<T>(s, {a.x, a.dy, a.dx, a.middle});
  const int channels = s.channels, columns = layout.channels, hidden = first_of(a.shape, a.weights).groups.channels(),
            padded = hidden / 2;
  const int64_t square = int64_t{channels} * channels;
  const int64_t pixel_bytes = (3 * columns + 2 * hidden + 2 * padded) * static_cast<int64_t>(sizeof(T)) +
                              2 * ExpansionBackward<T>::pixel_bytes(hidden, columns);
  const Steps steps(s, s.rows(), pixel_bytes, 2, kBackwardBudget, kMostImages);
  const int64_t image_pixels = int64_t{steps.rows} * s.width, pixels = steps.images * image_pixels,
                splits3 = splits_of<T>(columns, columns, steps.images, image_pixels),
                splits5 = splits_of<T>(columns, padded, 1, pixels);
  Repack<T> repack(stream);
  const FirstHalf<T> first_half(workspace, a.shape, a.weights, columns, true, repack);
  const Rest<T> rest(workspace, a.shape, a.weights, columns, steps.images, true, repack);
  T *conv3_back = workspace.take<T>(steps.images * padded * columns),  // [image][padded][columns], the folded weights transposed
      *conv5_back = workspace.take<T>(padded * columns);
  float *conv3_slots = workspace.take<float>(splits3 * steps.images * columns * columns),
        *by_local = workspace.take<float>(steps.images * square),  // the gradient of conv3's weight before its scales
            *d_conv3 = workspace.take<float>(square), *d_attention = workspace.take<float>(s.batch * channels),
        *shift = workspace.take<float>(steps.images * padded),  // the gradient of each pixel through the means
            *conv5_slots = workspace.take<float>(splits5 * columns * padded), *d_conv5 = workspace.take<float>(square),
        *bias3 = workspace.take<float>(channels), *bias5 = workspace.take<float>(channels);
  const PixelSums<T> sums1(workspace, hidden, pixels), sums2(workspace, hidden, pixels), sums3(workspace, columns, pixels),
      sums4(workspace, hidden, pixels), sums5(workspace, columns, pixels);  // of the convolutions' biases
  const Image<const T> x_image(workspace, a.x, layout, steps, s, 2), dy_image(workspace, a.dy, layout, steps, s, 0),
      d_middle_image(workspace, a.middle, layout, steps, s, 1);
  const Image<T> middle_image(workspace, a.middle, layout, steps, s, 0), dx_image(workspace, a.dx, layout, steps, s, 0);
  const Buffer<T> normal_rows(workspace, steps, s, columns, 2), hidden_rows(workspace, steps, s, hidden, 2),
      local_rows(workspace, steps, s, padded, 1), d_rows(workspace, steps, s, hidden, 1),
      middle_rows(workspace, steps, s, columns, 0), gated_rows(workspace, steps, s, padded, 0);
  const ExpansionBackward<T> first_back(workspace, first_half.op, steps, s),
      second_back(workspace, rest.op, steps, s, [](int64_t, int64_t) { return int64_t{0}; });
  if (workspace.counts_only()) return workspace.used();

  repack.run();
  fold<T>({rest.attention.template conv5<T>(conv5_back, padded, columns, Folded<T>::kTransposed)}, 1, 1, stream);
  bool none = true, first = true;  // step yet, in each of the passes
  steps.each_group([&](int64_t b, int64_t images) {
    rest.attend(a.means, b, images, stream);
    fold<T>({rest.attention.template conv3<T>(conv3_back, padded, columns, Folded<T>::kTransposed)}, 1, images, stream);
    steps.each_strip([&](const Range& rows) {
      const Range near = steps.around(rows, 1);
      const View<const T> x = x_image.read(b, images, near, stream), dy = dy_image.read(b, images, rows, stream);
      const View<T> h = hidden_rows.view(near), local = local_rows.view(rows, columns), middle = middle_rows.view(rows),
                    normal = normal_rows.view(rows), halves = second_back.d_hidden.view(rows), gated = gated_rows.view(rows),
                    d_middle = middle_image.write(b, rows);
      first_half.expand(x, normal_rows.view(near), h, images, stream);
      first_half.multiply(h, local, nullptr, 0, false, s.height, images, stream);
      rest.attended(x.of(rows), local, middle, images, stream);
      rest.op.expand(middle, normal, halves, hidden, 0, Biased<Plain>{rest.bias, nullptr, 0, hidden, {}}, images, stream);
      product<T, T>({dy.matrices(), {conv5_back, 0, columns, 0}, gated.pixels(), columns, padded, 1}, gated.matrices(), images,
                    stream);
      const int64_t fours = images * gated.pixels() * padded / 4;
      launch(differentiate_product<T>, dim3(std::min<int64_t>(ceil_div(fours, 256), 8192)), dim3(256), 0, stream, halves.data,
             gated.data, fours);
      outer<T>({dy.matrices(), gated.matrices(), conv5_slots, images, gated.pixels(), columns, padded, 1, !none}, 1, splits5,
               stream);
      sums5.add(dy, images, none, stream);
      sums4.add(halves, images, none, stream);
      second_back.through_product(middle, dy, d_middle, normal, images, none, stream);
      sums3.add(d_middle, images, none, stream);
      outer<T>({d_middle.matrices(), local.matrices(), conv3_slots, 1, local.pixels(), columns, columns, 1, rows.first > 0},
               images, splits3, stream);
      middle_image.written(b, images, rows, stream);
      none = false;
    });

    // What the attention is made of.
    const int64_t padded_square = int64_t{columns} * columns;
    for (int64_t i = 0; i < images; ++i)
      repack.add({Axis::plain(channels, columns), Axis::plain(channels, 1), square, channels, images * padded_square,
                  static_cast<int>(splits3)},
                 conv3_slots + i * padded_square, by_local + i * square);
    repack.run();
    const auto small = [&](const float* v, int64_t of_image, const float* w, const float* m, float factor, float* to, int wide) {
      launch(sum_rows, dim3(ceil_div(wide, 32), images), dim3(kSumWarps * 32), 0, stream, v, of_image, w, m, factor, channels, to,
             wide);
    };
    float* of_images = d_attention + b * channels;
    small(a.weights.beta, 0, a.weights.conv3_weight, by_local, 1, of_images, channels);
    small(of_images, channels, a.weights.sca_weight, nullptr, static_cast<float>(1.0 / (double(s.height) * s.width)), shift,
          padded);
    launch(sum_images, dim3(ceil_div(square, 256)), dim3(256), 0, stream, by_local, square, channels, 1, rest.attention.values,
           images, channels, d_conv3, b > 0);

    steps.each_strip([&](const Range& rows) {
      const Range near = steps.around(rows, 1), far = steps.around(rows, 2);
      const View<const T> x = x_image.read(b, images, far, stream), d_middle = d_middle_image.read(b, images, near, stream);
      const View<T> normal = normal_rows.view(far), h = hidden_rows.view(far), d_local = local_rows.view(near),
                    d_halves = d_rows.view(near), dx = dx_image.write(b, rows);
      first_half.expand(x, normal, h, images, stream);
      product<T, T>(
          {d_middle.matrices(), {conv3_back, int64_t{padded} * columns, columns, 0}, d_local.pixels(), columns, padded, 1},
          d_local.matrices(), images, stream, Biased<Plain>{shift, nullptr, padded, padded, {}});
      launch_walk(differentiate_halves<T>, Walk<2>(d_halves, s.height, padded, images), stream, h, first_half.op.taps,
                  first_half.local_bias, d_local, d_halves);
      sums2.add(d_halves.of(rows), images, first, stream);
      first_back.through_taps(rows, h, d_halves, images, first, stream);
      sums1.add(first_back.d_hidden.view(rows), images, first, stream);
      first_back.through_product(x, d_middle, dx, normal, images, first, stream);
      dx_image.written(b, images, rows, stream);
      first = false;
    });
  });

  // All zero for no image.
  const Axis own = Axis::plain(channels, 1);
  if (none) repack.add({own, own, square, channels, 0, 0}, conv5_slots, d_conv3);
  repack.add({Axis::plain(channels, padded), own, square, channels, int64_t{columns} * padded,
              none ? 0 : static_cast<int>(splits5)},
             conv5_slots, d_conv5);
  sums1.finish(!none, Axis::unpad(first_half.op.groups, 1), 2 * channels, d.conv1_bias, repack);
  sums2.finish(!none, Axis::unpad(first_half.op.groups, 1), 2 * channels, d.conv2_bias, repack);
  sums3.finish(!none, own, channels, bias3, repack);
  sums4.finish(!none, Axis::unpad(rest.op.groups, 1), 2 * channels, d.conv4_bias, repack);
  sums5.finish(!none, own, channels, bias5, repack);
  repack.add_up(d_attention, s.batch, channels, d.sca_bias);
  first_back.finish(!none, d.norm1_weight, d.norm1_bias, d.conv1_weight, d.conv2_weight, repack);
  second_back.finish(!none, d.norm2_weight, d.norm2_bias, d.conv4_weight, nullptr, repack);
  repack.run();
  launch(sum_images, dim3(ceil_div(square, 256)), dim3(256), 0, stream, d_attention, channels, 1, 0, a.means, s.batch, channels,
         d.sca_weight, false);
  const auto unscaled = [&](const float* weight, const float* bias, const float* scale, const float* of_weight,
                            const float* of_bias, float* d_weight, float* d_bias, float* d_scale) {
    launch(unscale, dim3(ceil_div(channels, kSumWarps)), dim3(kSumWarps * 32), 0, stream, weight, bias, scale, of_weight, of_bias,
           channels, d_weight, d_bias, d_scale);
  };
  unscaled(a.weights.conv3_weight, a.weights.conv3_bias, a.weights.beta, d_conv3, bias3, d.conv3_weight, d.conv3_bias, d.beta);
  unscaled(a.weights.conv5_weight, a.weights.conv5_bias, a.weights.gamma, d_conv5, bias5, d.conv5_weight, d.conv5_bias, d.gamma);
  return workspace.used();
}

}  // namespace autohdr
