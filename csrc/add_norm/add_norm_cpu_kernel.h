// add_norm on a CPU, compiled once per instruction set (no include guard; see common/cpu_each_isa.h).
//
// A worker takes rows one after the other; what it computes of one stays in scratch. The backward pass computes sum and norm again.
// The gradients of the parameters are sums over a piece of rows, then over the pieces in order: they do not depend on the number of
// threads.

#include "common/cpu_math.h"
#include "common/cpu_norm.h"
#include "common/cpu_sequence.h"
#include "common/cpu_slots.h"

constexpr int64_t kPieceRows = 128;

template <class T>
AUTOHDR_INLINE T* row_of(const Rows& rows, int64_t row, int64_t channels) {
  return static_cast<T*>(rows.data) + row * channels;
}

// sum = x + scale · branch; zeros in the padding.
template <class X, class B>
AUTOHDR_INLINE void add_scaled(const X* x, const B* branch, const float* scale, int64_t channels, float* sum) {
  for (int64_t c = 0; c < channels; c += W)
    store(sum + c, load_at(x, c, channels) + load_at(scale, c, channels) * load_at(branch, c, channels));
}

template <class X, class B>
static void forward_rows(const AddNormForward& a) {
  const AddNormWeights& w = a.weights;
  const int64_t channels = a.channels, padded = round_up(channels, 16);
  Scratch scratch;
  float* memory = scratch.take<float>(thread_count() * padded);
  parallel_ranges(a.rows, [&](int64_t worker, int64_t first, int64_t end) {
    float* sum = memory + worker * padded;
    for (int64_t row = first; row < end; ++row) {
      add_scaled(row_of<X>(a.x, row, channels), row_of<B>(a.branch, row, channels), w.scale, channels, sum);
      X* y = row_of<X>(a.y, row, channels);
      B* normed = row_of<B>(a.normed, row, channels);
      for (int64_t c = 0; c < channels; c += W) store_at(y, c, channels, load(sum + c));
      Stats stats;
      normalize(sum, 1, channels, w.eps, true, sum, padded, &stats);
      for (int64_t c = 0; c < channels; c += W)
        store_at(normed, c, channels, load(sum + c) * load_at(w.norm_weight, c, channels) + load_at(w.norm_bias, c, channels));
    }
  });
}

static void run(const AddNormForward& a) {
  with_dtype(a.x.dtype,
             [&](auto x) { with_dtype(a.branch.dtype, [&](auto branch) { forward_rows<decltype(x), decltype(branch)>(a); }); });
}

template <class X, class B>
static void backward_rows(const AddNormBackward& a, int64_t pieces, float* slots) {
  const AddNormWeights& w = a.weights;
  const int64_t channels = a.channels, padded = round_up(channels, 16);
  Scratch scratch;
  float* memory = scratch.take<float>(thread_count() * 3 * padded);
  parallel_ranges(pieces, [&](int64_t worker, int64_t first, int64_t end) {
    float *normal = memory + worker * 3 * padded, *d = normal + padded, *grad = d + padded;
    for (int64_t piece = first; piece < end; ++piece) {
      float *d_scale = slots + piece * 3 * padded, *d_weight = d_scale + padded, *d_bias = d_weight + padded;
      __builtin_memset(d_scale, 0, 3 * padded * sizeof(float));
      for (int64_t row = piece * kPieceRows; row < std::min((piece + 1) * kPieceRows, a.rows); ++row) {
        const X *x = row_of<const X>(a.x, row, channels), *dy = row_of<const X>(a.dy, row, channels);
        const B *branch = row_of<const B>(a.branch, row, channels), *d_normed = row_of<const B>(a.d_normed, row, channels);
        X* dx = row_of<X>(a.dx, row, channels);
        B* d_branch = row_of<B>(a.d_branch, row, channels);
        for (int64_t c = 0; c < channels; c += W) store(grad + c, load_at(dy, c, channels));
        if (a.d_normed.data) {
          Stats stats;
          add_scaled(x, branch, w.scale, channels, normal);
          normalize(normal, 1, channels, w.eps, true, normal, padded, &stats);
          for (int64_t c = 0; c < channels; c += W) {
            const vf given = load_at(d_normed, c, channels);
            store(d_weight + c, load(d_weight + c) + given * load(normal + c));
            store(d_bias + c, load(d_bias + c) + given);
            store(d + c, given * load_at(w.norm_weight, c, channels));
          }
          norm_backward(grad, d, padded, normal, padded, &stats, 1, channels, true, grad);
        }
        for (int64_t c = 0; c < channels; c += W) {
          const vf g = load_at(grad, c, channels);
          store(d_scale + c, load(d_scale + c) + g * load_at(branch, c, channels));
          store_at(dx, c, channels, g);
          store_at(d_branch, c, channels, g * load_at(w.scale, c, channels));
        }
      }
    }
  });
}

static void run(const AddNormBackward& a) {
  const int64_t pieces = ceil_div(a.rows, kPieceRows), padded = round_up(a.channels, 16);
  Scratch scratch;
  float* slots = scratch.take<float>(pieces * 3 * padded);  // [piece][scale, weight, bias][channel]
  with_dtype(a.x.dtype, [&](auto x) {
    with_dtype(a.branch.dtype, [&](auto branch) { backward_rows<decltype(x), decltype(branch)>(a, pieces, slots); });
  });
  sum_slots(slots, pieces, 3 * padded, [&](int64_t i, float sum) {
    const int64_t which = i / padded, channel = i % padded;
    if (channel < a.channels) (which == 0 ? a.d_scale : which == 1 ? a.d_norm_weight : a.d_norm_bias)[channel] = sum;
  });
}
