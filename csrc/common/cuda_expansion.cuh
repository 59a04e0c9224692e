// The expansion that networks' blocks begin with: layer norm, and a 1×1 convolution to the channels that a 3×3 convolution reads. And
// its backward pass. Every sum has a fixed order: a block adds to its own slot, and slots are added up in order.
#pragma once
#include "common/cuda_depthwise.cuh"
#include "common/cuda_norm.cuh"
#include "common/cuda_product.cuh"
#include "common/cuda_repack.cuh"

namespace autohdr {
namespace image {

// Its parameters as the caller has them.
struct ExpansionWeights {
  const float *norm_weight, *norm_bias /* [C] */, *weight /* [groups·size, C] */, *dwconv /* [groups·size, 9], or null */;
  float eps;
  Groups groups;
};

// A channel's three taps of each row, and a zero after them; of all rows 16 elements.
constexpr int kBand = 16;

// The same as the kernels want them; columns: channels of x's view.
template <class T>
struct Expansion {
  Groups groups;
  int channels, columns, hidden, taps_stride;  // taps_stride: from a tap to the next
  Norm norm;
  const T *weight, *transposed = nullptr;  // [hidden][columns], [columns][hidden]; the latter for the backward pass only
  const float *taps, *flipped = nullptr;   // [9][hidden], likewise
  const T* bands = nullptr;                // [hidden + 64][kBand], for fused kernels alone

  Expansion(Workspace& memory, const ExpansionWeights& w, int channels_, int columns_, bool backward, Repack<T>& repack)
      : groups(w.groups), channels(channels_), columns(columns_), hidden(w.groups.channels()), taps_stride(hidden) {
    const int64_t c = channels;
    const Axis rows = Axis::pad(groups, c), each = Axis::pad(groups, 9), row = Axis::plain(1, 0);
    const Gather vector{row, Axis::plain(c, 1), columns, columns};
    norm = {repack.template make<float>(memory, vector, w.norm_weight),
            w.norm_bias ? repack.template make<float>(memory, vector, w.norm_bias) : nullptr, w.eps, channels};
    const int64_t size = int64_t{hidden} * columns;
    Gather operand{rows, Axis::plain(c, 1), size, columns};
    operand.rounds = std::is_same_v<T, float> && !backward && tf32_allowed();
    weight = repack.template make<T>(memory, operand, w.weight);
    if (backward) transposed = repack.template make<T>(memory, {Axis::plain(c, 1), rows, size, hidden}, w.weight);
    if (!w.dwconv) return;
    const auto make_taps = [&](const Axis& order, const float* from) {  // as T has them: some kernels take them so
      Gather gather{order, each, 9 * hidden, hidden};
      gather.rounds = sizeof(T) == 2;
      return repack.template make<float>(memory, gather, from);
    };
    taps = make_taps(Axis::plain(9, 1), w.dwconv);
    if (!backward) {
      const int64_t most = hidden + 64;  // a block takes so many at a time, and finds zeros beyond the last
      if (sizeof(T) == 2 || tf32_allowed())
        bands = repack.template make<T>(memory, {each, Axis::pad({3, 3, 4}, 1), most * kBand, kBand}, w.dwconv);
      return;
    }
    flipped = make_taps(Axis::plain(9, -1), w.dwconv + 8);
  }
  // Of `count` of the hidden channels, groups that lie one after the other, from `first` on.
  Expansion part(int first, int count) const {
    Expansion e = *this;
    e.hidden = count, e.weight += int64_t{first} * columns, e.taps += first;
    if (bands) e.bands += first * kBand;
    return e;
  }
  // normal: the norm of x, and out: hidden, as many channels of it as out has, from `first` on.
  void expand(View<const T> x, View<T> normal, View<T> out, int64_t images, cudaStream_t stream, int first = 0) const {
    expand(x, normal, out, out.channels, first, Plain{}, images, stream);
  }
  // The same of `count` channels, of which an epilogue makes out.
  template <class Epilogue>
  void expand(View<const T> x, View<T> normal, View<T> out, int count, int first, const Epilogue& epilogue, int64_t images,
              cudaStream_t stream) const {
    image::norm<T>(norm, x, normal, images, stream);
    expand_normal(normal, out, count, first, epilogue, images, stream);
  }
  // The same of an x whose norm is there.
  template <class Epilogue>
  void expand_normal(View<const T> normal, View<T> out, int count, int first, const Epilogue& epilogue, int64_t images,
                     cudaStream_t stream) const {
    product<T, T>({normal.matrices(), {weight + int64_t{first} * columns, 0, columns, 0}, out.pixels(), columns, count, 1},
                  out.matrices(), images, stream, epilogue);
  }
};

// The backward pass of an expansion, given the gradient d of its 3×3 convolution's result.
template <class T>
struct ExpansionBackward {
  const Expansion<T>& op;
  int height;
  int64_t splits, tap_slots, norm_slots;
  Buffer<T> d_hidden, d_normal;
  float *d_weight, *d_taps, *d_norm;  // of splits and slots

  // slots: of the taps' gradients, given the pixels of a step.
  ExpansionBackward(Workspace& memory, const Expansion<T>& op_, const Steps& steps, const ImageShape& s,
                    int64_t (*slots)(int64_t channels, int64_t pixels) = depthwise_slots)
      : op(op_), height(s.height), d_hidden(memory, steps, s, op.hidden, 0), d_normal(memory, steps, s, op.columns, 0) {
    const int64_t pixels = steps.images * steps.rows * s.width;
    splits = splits_of<T>(op.hidden, op.columns, 1, pixels);
    tap_slots = slots(op.hidden, pixels);
    norm_slots = image::norm_slots<T>(op.columns, pixels);
    d_weight = memory.take<float>(splits * op.hidden * op.columns);
    d_taps = memory.take<float>(tap_slots * 9 * op.hidden);
    d_norm = memory.take<float>(norm_slots * 2 * op.channels);
  }
  static int64_t pixel_bytes(int64_t hidden, int64_t columns) { return (hidden + columns) * static_cast<int64_t>(sizeof(T)); }

  // d_hidden of these rows, and the taps' gradients. hidden and d reach a row further.
  void through_taps(const Range& rows, View<const T> hidden, View<const T> d, int64_t images, bool first,
                    cudaStream_t stream) const {
    const View<T> dh = d_hidden.view(rows);
    depthwise_backward<T>({rows, dh.width, op.hidden, images}, hidden, d, op.flipped, dh, d_taps, tap_slots, !first, stream);
  }
  // After that, dx and the other sums.
  void through_product(View<const T> x, View<const T> dy, View<T> dx, View<const T> normal, int64_t images, bool first,
                       cudaStream_t stream) const {
    const View<T> dh = d_hidden.view(dx.rows), dn = d_normal.view(dx.rows);
    outer<T>({dh.matrices(), normal.of(dx.rows).matrices(), d_weight, images, dh.pixels(), op.hidden, op.columns, 1, !first}, 1,
             splits, stream);
    product<T, T>({dh.matrices(), {op.transposed, 0, op.hidden, 0}, dh.pixels(), op.hidden, op.columns, 1}, dn.matrices(), images,
                  stream);
    norm_backward<T>(op.norm, x.of(dx.rows), dn, dy.of(dx.rows), dx, images, d_norm, norm_slots, !first, stream);
  }

  // any: whether there was a step; without one the gradients are 0.
  void finish(bool any, float* norm_weight, float* norm_bias, float* weight, float* dwconv, Repack<T>& repack) const {
    const int64_t c = op.channels, real = op.groups.count * op.groups.size;
    const auto count = [&](int64_t n) { return any ? static_cast<int>(n) : 0; };
    repack.add({Axis::unpad(op.groups, op.columns), Axis::plain(c, 1), real * c, c, int64_t{op.hidden} * op.columns,
                count(splits)},
               d_weight, weight);
    repack.add({Axis::unpad(op.groups, 1), Axis::plain(9, op.hidden), real * 9, 9, 9 * int64_t{op.hidden}, count(tap_slots)},
               d_taps, dwconv);
    const Gather norm{Axis::plain(1, 0), Axis::plain(c, 1), c, c, 2 * c, count(norm_slots)};
    repack.add(norm, d_norm, norm_weight);
    if (op.norm.bias) repack.add(norm, d_norm + c, norm_bias);
  }
};

}  // namespace image
}  // namespace autohdr
