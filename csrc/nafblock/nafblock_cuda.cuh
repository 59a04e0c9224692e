// nafblock on a GPU, for one dtype; what its steps share with mdta and gdfn is in common/cuda_expansion.cuh.
//
// Forward: pass 1, a step: norm, 1×1 (hidden), 3×3 and product of both halves, which lies in y, with sums over the pixels. Then the
// attention of every image, folded into the 1×1 that takes it. Pass 2, a step, in place: that 1×1 with the residual (middle), norm,
// 1×1 whose epilogue multiplies both halves, 1×1 with the residual. The residuals' scales are folded into the weights before them. For
// few channels of half precision each pass is one kernel (nafblock_fused.cuh).
#pragma once
#include "nafblock/nafblock.h"
#include "nafblock/nafblock_fused.cuh"

namespace autohdr {
namespace image {

// The halves in turns of two channels, or of four.
inline ExpansionWeights first_of(const NafblockShape& s, const NafblockWeights& w) {
  return {w.norm1_weight, w.norm1_bias, w.conv1_weight, w.conv2_weight, s.eps, {2, s.channels, 2}};
}
inline ExpansionWeights second_of(const NafblockShape& s, const NafblockWeights& w) {
  return {w.norm2_weight, w.norm2_bias, w.conv4_weight, nullptr, s.eps, {2, s.channels, 4}};
}
// A bias in the order of the hidden channels, and zeros after it for as many as a block takes at a time.
template <class T>
const float* hidden_bias(Workspace& memory, const Groups& groups, const float* bias, Repack<T>& repack) {
  const int64_t count = groups.channels() + 64;
  return repack.template make<float>(memory, {Axis::plain(1, 0), Axis::pad(groups, 1), count, count}, bias);
}

// + bias, times scale where there is one; then what Next does. Columns from `channels` on have none.
template <class Next>
struct Biased {
  static constexpr bool kGoesOn = false;
  static constexpr int kResults = Next::kResults, kAtOnce = Next::kAtOnce;
  const float *bias, *scale;
  int64_t of_image;  // from an image's bias to the next
  int channels;
  Next next;
  using Held = typename Next::Held;
  struct Columns {
    typename Next::Columns next;
    float bias[8];
  };
  __device__ __forceinline__ Columns columns(int64_t image, int64_t head, int64_t row, int column, int n) const {
    Columns c{next.columns(image, head, row, column, n), {}};
#pragma unroll
    for (int e = 0; e < 8; ++e)
      if (column + e < channels) c.bias[e] = bias[image * of_image + column + e] * (scale ? scale[column + e] : 1.0f);
    return c;
  }
  __device__ __forceinline__ Held load(const Columns& c, int64_t row, int count) const { return next.load(c.next, row, count); }
  static __device__ __forceinline__ void apply(const Columns& c, const Held& held, float (&v)[8]) {
#pragma unroll
    for (int e = 0; e < 8; ++e) v[e] += c.bias[e];
    Next::apply(c.next, held, v);
  }
};

// The product of both halves of the gate.
struct Halves : Plain {
  static constexpr bool kGoesOn = false;
  static constexpr int kResults = 4;
  static __device__ __forceinline__ void apply(const Columns&, const Held&, float (&v)[8]) {
#pragma unroll
    for (int e = 0; e < 4; ++e) v[e] *= v[e + 4];
  }
};

// local = a ⊙ b, and sums[image][block][channels] (+)= factor · its sums; either may be null. bias: of the 3×3, as the halves lie.
template <class T>
__global__ void __launch_bounds__(128) multiply_halves(Walk<2> walk, View<const T> hidden, const float* taps, const float* bias,
                                                       View<T> local, float* sums, float factor, bool add) {
  __shared__ float2 all[kWalkWarps][32];
  float2 sum = make_float2(0, 0);
  const Segment<2> s(walk);
  if (has_part(walk, s)) {
    Along<1, 2, T> to(local, s);
    const auto more = load_pairs<2>(bias + pair_of_lane() * 4);
    const float2 of_a = to_float2(more.v[0]), of_b = to_float2(more.v[1]);
    convolve<2>(walk, s, hidden, taps, hidden.channels, [&](int o, int, const float2(&v)[2]) {
      const float2 product[1] = {make_float2((v[0].x + of_a.x) * (v[1].x + of_b.x), (v[0].y + of_a.y) * (v[1].y + of_b.y))};
      if (local.data) to.store(o, product), to.next(o);
      sum.x += product[0].x, sum.y += product[0].y;
    });
  }
  if (!sums) return;
  all[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || !has_channels(walk)) return;
  for (int w = 1; w < kWalkWarps; ++w) sum.x += all[w][threadIdx.x].x, sum.y += all[w][threadIdx.x].y;
  float2& slot =
      *reinterpret_cast<float2*>(sums + (blockIdx.z * int64_t{gridDim.x} + blockIdx.x) * walk.channels + pair_of_lane() * 2);
  slot = make_float2((add ? slot.x : 0.0f) + factor * sum.x, (add ? slot.y : 0.0f) + factor * sum.y);
}

// attention[image][channel] = weight · means + bias. A warp owns a channel of an image.
constexpr int kAttendThreads = 256;
static __global__ void __launch_bounds__(kAttendThreads)
    attend(const float* weight, const float* bias, const float* means, int channels, int64_t count, float* attention) {
  const int64_t at = int64_t{blockIdx.x} * (kAttendThreads / 32) + threadIdx.x / 32, image = at / channels;
  if (at >= count) return;
  const int channel = at - image * channels, lane = threadIdx.x % 32;
  float sum = 0;
  for (int k = lane; k < channels; k += 32) sum += weight[int64_t{channel} * channels + k] * means[image * channels + k];
  sum = sum_over(32, sum);
  if (lane == 0) attention[at] = sum + bias[channel];
}

// Copies of a 1×1 convolution's weight [channels][channels] with scales, one for every image; zeros where there are no channels.
template <class T>
struct Folded {
  const float *weight, *row_scale, *column_scale;  // of the channels, or null; column_scale: [image][channels]
  int channels;
  T* to;              // [image][rows][columns]
  int rows, columns;  // columns: a multiple of 4
  enum { kPlain, kTransposed, kInSets } order = kPlain;
};
template <class T>
struct Folds {
  static constexpr int kMost = 3;
  Folded<T> of[kMost];
};
template <class T>
__global__ void fold_weights(Folds<T> all) {
  const Folded<T> f = all.of[blockIdx.z];
  const int count = f.rows * f.columns;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
    int n = i / f.columns, k = i - n * f.columns;
    if (f.order == f.kInSets) n = set_channel(n), k = set_channel(k);
    if (f.order == f.kTransposed) {
      const int row = n;
      n = k, k = row;
    }
    float v = 0;
    if (n < f.channels && k < f.channels) {
      v = f.weight[int64_t{n} * f.channels + k];
      if (f.row_scale) v *= f.row_scale[n];
      if (f.column_scale) v *= f.column_scale[int64_t{blockIdx.y} * f.channels + k];
    }
    f.to[int64_t{blockIdx.y} * count + i] = from_float<T>(v);
  }
}
template <class T>
void fold(const Folds<T>& all, int count, int64_t images, cudaStream_t stream) {
  const int64_t elements = int64_t{all.of[0].rows} * all.of[0].columns;
  launch(fold_weights<T>, dim3(std::min<int64_t>(ceil_div(elements, 256), 1024), images, count), dim3(256), 0, stream, all);
}

// The attention of some images' channels, and what it and the scales of the residuals are folded into.
struct ChannelAttention {
  const NafblockWeights& weights;
  int channels;
  float* values;  // [image][channels]
  ChannelAttention(Workspace& memory, const NafblockShape& s, const NafblockWeights& w, int64_t images)
      : weights(w), channels(static_cast<int>(s.channels)), values(memory.take<float>(images * s.channels)) {}
  // Of images from b on, given all means.
  void attend(const float* means, int64_t b, int64_t images, cudaStream_t stream) const {
    launch(image::attend, dim3(ceil_div(images * channels, kAttendThreads / 32)), dim3(kAttendThreads), 0, stream,
           weights.sca_weight, weights.sca_bias, means + b * channels, channels, images * channels, values);
  }
  template <class T>
  Folded<T> conv3(T* to, int rows, int columns, decltype(Folded<T>::order) order) const {
    return {weights.conv3_weight, weights.beta, values, channels, to, rows, columns, order};
  }
  template <class T>
  Folded<T> conv5(T* to, int rows, int columns, decltype(Folded<T>::order) order) const {
    return {weights.conv5_weight, weights.gamma, nullptr, channels, to, rows, columns, order};
  }
};

// What the first half takes, up to its gate.
template <class T>
struct FirstHalf {
  Expansion<T> op;
  const float *bias, *local_bias;  // of the 1×1 and the 3×3

  FirstHalf(Workspace& memory, const NafblockShape& s, const NafblockWeights& w, int columns, bool backward, Repack<T>& repack)
      : op(memory, first_of(s, w), static_cast<int>(s.channels), columns, backward, repack),
        bias(hidden_bias<T>(memory, op.groups, w.conv1_bias, repack)),
        local_bias(hidden_bias<T>(memory, op.groups, w.conv2_bias, repack)) {}
  void expand(View<const T> x, View<T> normal, View<T> hidden, int64_t images, cudaStream_t stream) const {
    op.expand(x, normal, hidden, op.hidden, 0, Biased<Plain>{bias, nullptr, 0, op.hidden, {}}, images, stream);
  }
  void multiply(View<const T> hidden, View<T> local, float* sums, float factor, bool add, int height, int64_t images,
                cudaStream_t stream) const {
    launch_walk(multiply_halves<T>, Walk<2>(local, height, local.channels, images), stream, hidden, op.taps, local_bias, local,
                sums, factor, add);
  }
};

// What follows: the weights of some images, and the second half.
template <class T>
struct Rest {
  NafblockShape shape;
  NafblockWeights weights;
  Expansion<T> op;
  const float* bias;  // of its 1×1
  int columns, padded;
  ChannelAttention attention;
  T *conv3, *conv5;  // [image][columns][columns], [columns][padded]

  Rest(Workspace& memory, const NafblockShape& s, const NafblockWeights& w, int columns_, int64_t images, bool backward,
       Repack<T>& repack)
      : shape(s), weights(w), op(memory, second_of(s, w), static_cast<int>(s.channels), columns_, backward, repack),
        bias(hidden_bias<T>(memory, op.groups, w.conv4_bias, repack)), columns(columns_), padded(op.groups.padded()),
        attention(memory, s, w, images), conv3(memory.take<T>(images * columns * columns)),
        conv5(memory.take<T>(columns * padded)) {}

  // The weights of images from b on, given all means.
  void attend(const float* means, int64_t b, int64_t images, cudaStream_t stream) const {
    attention.attend(means, b, images, stream);
    fold<T>({attention.conv3<T>(conv3, columns, columns, Folded<T>::kPlain)}, 1, images, stream);
  }
  // middle = x + the rest of the first half, given its gate.
  void attended(View<const T> x, View<const T> local, View<T> middle, int64_t images, cudaStream_t stream) const {
    product<T, T>({local.matrices(), {conv3, int64_t{columns} * columns, columns, 0}, local.pixels(), columns, columns, 1},
                  middle.matrices(), images, stream,
                  Biased<Plus<T>>{weights.conv3_bias, weights.beta, 0, static_cast<int>(shape.channels), {x.matrices()}});
  }
  // y = middle + the second half.
  void feed_forward(View<const T> middle, View<T> normal, View<T> gated, View<T> y, int64_t images, cudaStream_t stream) const {
    op.expand(middle, normal, gated, op.hidden, 0, Biased<Halves>{bias, nullptr, 0, op.hidden, {}}, images, stream);
    product<T, T>({gated.matrices(), {conv5, 0, padded, 0}, y.pixels(), padded, columns, 1}, y.matrices(), images, stream,
                  Biased<Plus<T>>{weights.conv5_bias, weights.gamma, 0, static_cast<int>(shape.channels), {middle.matrices()}});
  }
};

// sums of images from b on = what their slots hold.
template <class T, class Sum>
void add_up(const float* slot_sums, int64_t slots, int columns, int channels, int64_t b, int64_t images, Sum* sums,
            Repack<T>& repack) {
  const Gather each{Axis::plain(images, slots * columns),
                    Axis::plain(channels, 1),
                    images * channels,
                    channels,
                    columns,
                    static_cast<int>(slots)};
  repack.add(each, slot_sums, sums + b * channels);
  repack.run();
}

// The same as run_block does, by one kernel for each pass; of up to 32 · kSets channels.
template <class T, int kSets, class Sum>
int64_t run_fused_block(Workspace workspace, const NafblockShape& shape, const NafblockWeights& w, const FirstHalf<T>& first,
                        const T* x, const Range& rows, Sum* sums, float factor, const float* means, T* y, Repack<T>& repack,
                        cudaStream_t stream) {
  constexpr int kChannels = kSets * 32, kSquare = kChannels * kChannels;
  using Halves = FusedHalves<T, kSets * 2>;
  using After = FusedRest<T, kChannels>;
  const ImageShape s = image_of(shape);
  const int channels = s.channels, side = Halves::Tile::kSide;
  const int64_t across = ceil_div(s.width, side), tiles = across * ceil_div(rows.size(), side),
                slots = std::min(size_for(512, 2), tiles),
                most = std::clamp<int64_t>(kForwardBudget / (slots * channels * 4 + kSquare * 2), 1,
                                           std::clamp<int64_t>(s.batch, 1, kMostImages)),
                pixels = int64_t{s.height} * s.width;
  float* slot_sums = sums ? workspace.take<float>(most * slots * channels) : nullptr;
  const ChannelAttention attention(workspace, shape, w, most);
  T *conv3 = workspace.take<T>(most * kSquare), *conv4 = workspace.take<T>(2 * kSquare), *conv5 = workspace.take<T>(kSquare);
  if (workspace.counts_only()) return workspace.used();

  repack.run();
  if (y) {
    const auto half_of_conv4 = [&](int which) {
      return Folded<T>{w.conv4_weight + which * channels * channels,
                       nullptr,
                       nullptr,
                       channels,
                       conv4 + which * kSquare,
                       kChannels,
                       kChannels,
                       Folded<T>::kInSets};
    };
    fold<T>({attention.template conv5<T>(conv5, kChannels, kChannels, Folded<T>::kInSets), half_of_conv4(0), half_of_conv4(1)}, 3,
            1, stream);
  }
  for (int64_t b = 0; b < s.batch; b += most) {
    const int64_t images = std::min(most, s.batch - b);
    const View<T> out = y ? view_of(y, s, b) : View<T>{nullptr, 0, s.rows(), s.width, channels};
    launch(run_fused<T, Halves>, dim3(slots, images), dim3(Halves::Tile::kThreads), Halves::kShared, stream,
           Halves{view_of(x, s, b), rows, static_cast<unsigned>(across), static_cast<unsigned>(tiles), out, first.op.norm,
                  first.op.weight, first.bias, first.op.bands, first.local_bias, first.op.hidden, factor, slot_sums});
    if (sums) add_up<T>(slot_sums, slots, channels, channels, b, images, sums, repack);
    if (!y) continue;
    attention.attend(means, b, images, stream);
    fold<T>({attention.template conv3<T>(conv3, kChannels, kChannels, Folded<T>::kInSets)}, 1, images, stream);
    const int64_t blocks = std::min(ceil_div(pixels, After::kThreads / 32 * 16), size_for(multiprocessors() * After::kBlocks, 1));
    launch(run_rest<After>, dim3(blocks, images), dim3(After::kThreads), After::kShared, stream,
           After{static_cast<uint32_t>(pixels),
                 channels,
                 x + b * pixels * channels,
                 out.data,
                 out.data,
                 conv3,
                 conv4,
                 conv5,
                 {w.norm2_weight, w.norm2_bias, w.conv3_bias, w.conv4_bias, w.conv4_bias + channels, w.conv5_bias},
                 w.beta,
                 w.gamma,
                 shape.eps});
  }
  return workspace.used();
}

// The first pass over `rows`, with factor · the sums of its gate, unless these are null; and, where there is y, the second one.
template <class T, class Sum>
int64_t run_block(const NafblockShape& shape, const NafblockWeights& weights, const T* x_, const Range& all_rows, Sum* sums,
                  float factor, const float* means, T* y_, void* memory, cudaStream_t stream) {
  Workspace workspace(memory);
  const ImageShape s = image_of(shape);
  const Layout layout = Layout::of<T>(s, {x_, y_});
  const int columns = layout.channels, hidden = first_of(shape, weights).groups.channels(), padded = hidden / 2;
  Repack<T> repack(stream);
  const FirstHalf<T> first(workspace, shape, weights, columns, false, repack);
  if constexpr (kFuses<T>)
    if (!layout.copies && columns <= 64) {
      const auto run = [&](auto sets) {
        return run_fused_block<T, decltype(sets)::value>(workspace, shape, weights, first, x_, all_rows, sums, factor, means, y_,
                                                         repack, stream);
      };
      return columns <= 32 ? run(std::integral_constant<int, 1>{}) : run(std::integral_constant<int, 2>{});
    }
  const Steps steps(s, all_rows, (2 * columns + hidden + padded) * static_cast<int64_t>(sizeof(T)), 1, kForwardBudget,
                    kMostImages);
  const Rest<T> rest = [&] {
    Workspace none(nullptr);
    return Rest<T>(y_ ? workspace : none, shape, weights, columns, steps.images, false, repack);
  }();
  const Image<const T> x_image(workspace, x_, layout, steps, s, 1), local_image(workspace, y_, layout, steps, s, 0);
  const Image<T> y_image(workspace, y_, layout, steps, s, 0);
  const Buffer<T> normal(workspace, steps, s, columns, 1), hidden_rows(workspace, steps, s, hidden, 1),
      middle_rows(workspace, steps, s, y_ ? columns : 0, 0), gated_rows(workspace, steps, s, y_ ? padded : 0, 0);
  const int64_t slots = Walk<2>({0, steps.rows}, s.width).blocks();
  float* slot_sums = sums ? workspace.take<float>(steps.images * slots * columns) : nullptr;
  if (workspace.counts_only()) return workspace.used();

  repack.run();
  if (y_) fold<T>({rest.attention.template conv5<T>(rest.conv5, columns, padded, Folded<T>::kPlain)}, 1, 1, stream);
  steps.each_group([&](int64_t b, int64_t images) {
    steps.each_strip([&](const Range& rows) {
      const Range near = steps.around(rows, 1);
      const View<T> h = hidden_rows.view(near), local = y_ ? y_image.write(b, rows) : View<T>{nullptr, 0, rows, s.width, columns};
      first.expand(x_image.read(b, images, near, stream), normal.view(near), h, images, stream);
      first.multiply(h, local, slot_sums, factor, rows.first > all_rows.first, s.height, images, stream);
      if (y_) y_image.written(b, images, rows, stream);
    });
    if (sums) add_up<T>(slot_sums, slots, columns, s.channels, b, images, sums, repack);
    if (!y_) return;
    rest.attend(means, b, images, stream);
    steps.each_strip([&](const Range& rows) {
      const View<const T> x = x_image.read(b, images, rows, stream), local = local_image.read(b, images, rows, stream);
      const View<T> middle = middle_rows.view(rows), y = y_image.write(b, rows);
      rest.attended(x, local, middle, images, stream);
      rest.feed_forward(middle, normal.view(rows), gated_rows.view(rows), y, images, stream);
      y_image.written(b, images, rows, stream);
    });
  });
  return workspace.used();
}

}  // namespace image

template <class T>
int64_t queue(const NafblockForward<T>& a, void* memory, cudaStream_t stream) {
  const image::ImageShape s = image::image_of(a.shape);
  return image::run_block(a.shape, a.weights, a.x, s.rows(), a.means, static_cast<float>(1.0 / (double(s.height) * s.width)),
                          a.means, a.y, memory, stream);
}

template <class T>
int64_t queue(const NafblockStatistics<T>& a, void* memory, cudaStream_t stream) {
  return image::run_block<T>(a.shape, a.weights, a.x, {static_cast<int>(a.first), static_cast<int>(a.end)}, a.sums, 1, nullptr,
                             nullptr, memory, stream);
}

template <class T>
int64_t queue(const NafblockApply<T>& a, void* memory, cudaStream_t stream) {
  return image::run_block<T, float>(a.shape, a.weights, a.x, image::image_of(a.shape).rows(), nullptr, 1, a.means, a.y, memory,
                                    stream);
}

}  // namespace autohdr
