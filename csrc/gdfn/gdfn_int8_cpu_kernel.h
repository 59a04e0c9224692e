// gdfn in 8 bits on a CPU: gdfn's walk, whose products take codes. Compiled per instruction set (no include guard; see
// common/cpu_each_isa.h).

#include "common/cpu_math.h"
#include "common/cpu_view.h"
#include "common/cpu_norm.h"
#include "common/cpu_repack.h"
#include "common/cpu_depthwise.h"
#include "common/cpu_product.h"
#include "common/cpu_expansion.h"
#include "common/cpu_codes.h"
#include "gdfn/gdfn_cpu_forward.h"

template <class T>
static void run(const GdfnInt8Forward<T>& a) {
  Scratch scratch;
  const GdfnShape& s = a.shape;
  const GdfnInt8Weights& w = a.weights;
  const Groups groups(2, s.hidden);
  const ExpansionCodes op = make_expansion(scratch, groups, s.channels,
                                           {{w.norm_weight, w.norm_bias, s.eps}, w.project_in, w.project_in_scale, w.dwconv});
  const PackedCodes project_out = PackedCodes::make(scratch, s.channels, groups.padded());
  pack_codes(
      project_out, groups.padded(),
      [&](int64_t k, int64_t n) { return k < s.hidden && n < s.channels ? w.project_out[n * s.hidden + k] : 0; },
      [&](int64_t n) { return n < s.channels ? w.project_out_scale[n] : 0.0f; });
  forward<Code>(scratch, {s.batch, s.height, s.width, s.channels}, groups, op, project_out, a.x, a.y);
}
