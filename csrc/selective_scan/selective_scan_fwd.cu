#include "selective_scan/selective_scan_fwd.cuh"

#include "selective_scan/selective_scan.h"

namespace autohdr {

int64_t queue(const ScanForward& a, void* memory, cudaStream_t stream) {
  if (a.shape.batch * a.shape.dim() == 0) return 0;
  int64_t floats = 0;
  scan::with_config(a.shape.dstate, [&](auto config) {
    using C = decltype(config);
    const ScanInputs& in = a.in;
    scan::with_layout<C>({in.u, in.delta_weight ? Sequence{} : in.delta, in.B, in.C, in.z}, [&](auto layout) {
      using L = decltype(layout);
      const auto kernel = scan::scan_forward<C, L>;
      constexpr size_t kShared = scan::walk_shared<C, L, scan::Purpose::kOutputs>();
      const auto held = [&] { return resident(kernel, C::kThreads, kShared, scan::kForwardBlocks<C, L>); };
      const scan::Split p = scan::split_of<C>(a.shape, multiprocessors(), held);
      floats = scan::carry_floats(a.shape, p);
      if (!memory) return;
      float* carries = static_cast<float*>(memory);
      if (p.segments > 1) scan::find_carries<C, false>(a.shape, in, Sequence{}, p, in.initial_state, carries, stream);
      launch(kernel, dim3(p.blocks(a.shape)), dim3(C::kThreads), kShared, stream, a, p, static_cast<const float*>(carries));
    });
  });
  return floats * static_cast<int64_t>(sizeof(float));
}

}  // namespace autohdr
