// mdta in 8 bits on a CPU: mdta's walks, whose products of channels take codes; q kᵀ stays in float32. Compiled per instruction set
// (no include guard; see common/cpu_each_isa.h).

#include "common/cpu_view.h"
#include "common/cpu_norm.h"
#include "common/cpu_repack.h"
#include "common/cpu_depthwise.h"
#include "common/cpu_product.h"
#include "common/cpu_expansion.h"
#include "common/cpu_codes.h"
#include "mdta/mdta_cpu_forward.h"

// Of the rows of qkv from `first` on, as many as the groups have.
static ExpansionCodes make_expansion(Scratch& scratch, const Groups& groups, const MdtaShape& s, const MdtaInt8Weights& w,
                                     int64_t first) {
  return make_expansion(
      scratch, groups, s.channels,
      {{w.norm_weight, w.norm_bias, s.eps}, w.qkv + first * s.channels, w.qkv_scale + first, w.dwconv + first * 9});
}

template <class T>
static void run(const MdtaStatistics<T, MdtaInt8Weights>& a) {
  Scratch scratch;
  const Groups groups = query_key_groups(a.shape);
  statistics(scratch, groups, make_expansion(scratch, groups, a.shape, a.weights, 0), a);
}

template <class T>
static void run(const MdtaApply<T, MdtaInt8Weights>& a) {
  Scratch scratch;
  const MdtaShape& s = a.shape;
  const int64_t channels = s.channels, ld = round_up(channels, W);
  const Groups groups(1, s.channels);
  const ExpansionCodes op = make_expansion(scratch, groups, s, a.weights, 2 * channels);
  const PackedCodes combined = PackedCodes::make(scratch, channels, groups.channels());
  Code* codes = scratch.take<Code>(channels * ld);
  float* scale = scratch.take<float>(channels);
  apply<Code>(scratch, groups, op, combined, a, [&](float* matrix) {
    for (int64_t n = 0; n < channels; ++n) {
      float *row = matrix + n * channels, largest = 0;
      for (int64_t k = 0; k < channels; ++k) {
        const float magnitude = __builtin_fabsf(row[k] *= a.weights.v_scale[k]);
        largest = magnitude <= largest ? largest : magnitude;  // a NaN wins, so that it reaches the output
      }
      scale[n] = largest == 0 ? 1.0f : largest / kMostCode;
      for (int64_t k = 0; k < channels; k += W) store(codes + n * ld + k, load_at(row, k, channels) / scale[n]);
    }
    pack_codes(
        combined, groups.channels(),
        [&](int64_t k, int64_t n) { return n < channels && op.rows[k] >= 0 ? codes[n * ld + op.rows[k]].bits - kOffset : 0; },
        [&](int64_t n) { return n < channels ? scale[n] : 0.0f; });
  });
}
