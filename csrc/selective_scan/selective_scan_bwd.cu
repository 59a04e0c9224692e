#include "selective_scan/selective_scan_bwd.cuh"

#include "selective_scan/selective_scan.h"
#include "selective_scan/selective_scan_fwd.cuh"

namespace autohdr {
namespace scan {
namespace {

// At most so many floats of parts, if one chunk of one entry of the batch does not take more.
const int64_t kPartFloats = size_for(12 << 20, 1 << 13);

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t clamp(int64_t v, int64_t least, int64_t most) { return v < least ? least : v > most ? most : v; }

// One segment if the channels alone fill more than half of the device: more of them cost a scan beforehand, a quarter of the time.
template <class C>
BackwardPlan plan_of(const ScanShape& s, int64_t slots) {
  BackwardPlan p;
  p.split.tiles = ceil_div(s.channels, C::kChannels);
  const int64_t blocks = s.batch * s.groups * p.split.tiles, chunks = s.chunks();
  p.split.segment_chunks = ceil_div(chunks, 2 * blocks > slots ? 1 : clamp(slots / blocks, 1, chunks));
  p.split.segments = ceil_div(chunks, p.split.segment_chunks);
  const int64_t part = s.groups * p.split.tiles * p.split.segments * kChunk * C::kColumns;  // of a chunk of every segment
  p.batches = ceil_div(s.batch, ceil_div(s.batch, clamp(kPartFloats / part, 1, s.batch)));
  p.round_chunks = clamp(kPartFloats / (part * p.batches), 1, p.split.segment_chunks);
  p.round_chunks = ceil_div(p.split.segment_chunks, p.rounds());
  return p;
}

// Floats of the parts of a workspace, in their order.
struct Sizes {
  int64_t carry, sums, parts, weighted;
  Sizes(const ScanBackward& a, const BackwardPlan& p, int64_t columns) {
    const ScanShape& s = a.shape;
    const int64_t tokens = p.batches * s.groups * p.split.segments * p.split.tiles * p.round_chunks * kChunk;
    carry = ceil_div(s.batch * p.split.segments * (s.dstate + 1) * s.dim(), 4) * 4;
    sums = ceil_div(s.batch * p.split.segments * (s.dstate + kMoreSums) * s.dim(), 4) * 4;
    parts = tokens * columns;
    weighted = a.in.delta_weight ? tokens : 0;
  }
};

void sum_over_segments(const ScanBackward& a, int64_t segments, const float* sums, cudaStream_t stream) {
  launch(sum_parameters, dim3(ceil_div((a.shape.dstate + kMoreSums) * a.shape.dim(), 256)), dim3(256), 0, stream, a, segments,
         sums);
}

// Bytes of the workspace; where there is memory for it, launches everything.
template <class C, class L, bool Gated>
int64_t backward(const ScanBackward& a, void* memory, cudaStream_t stream) {
  const ScanShape& s = a.shape;
  const auto kernel = scan_backward<C, L, Gated>;
  constexpr size_t kShared = backward_shared<C, L, Gated>();
  const BackwardPlan p = plan_of<C>(s, resident(kernel, C::kThreads, kShared, 4) * multiprocessors());
  const Sizes sizes(a, p, C::kColumns);
  const int64_t bytes = (sizes.carry + sizes.sums + sizes.parts + sizes.weighted) * static_cast<int64_t>(sizeof(float));
  if (!memory) return bytes;
  float *workspace = static_cast<float*>(memory), *sums = workspace + sizes.carry, *parts = sums + sizes.sums;
  const BackwardWorkspace ws{workspace, sums, parts, parts + sizes.parts};
  if (p.split.segments > 1)
    with_config(s.dstate, [&](auto config) {
      using Ends = decltype(config);
      Split split = p.split;
      split.tiles = ceil_div(s.channels, Ends::kChannels);
      find_carries<Ends, true>(s, a.in, a.d_out, split, a.d_last_state, ws.carry, stream);
    });
  for (int64_t first = 0; first < s.batch; first += p.batches)
    for (int64_t round = 0; round < p.rounds(); ++round) {
      const int64_t entries = (first + p.batches < s.batch ? p.batches : s.batch - first) * p.split.segments;
      const int64_t tokens = p.round_chunks * kChunk;
      launch(kernel, dim3(entries * s.groups * p.split.tiles), dim3(C::kThreads), kShared, stream, a, p, ws, first, round);
      launch(sum_projections<C>, dim3(entries * s.groups * (tokens / 32) * ceil_div(C::kColumns, 32)), dim3(256), 0, stream, s, p,
             a.dB, a.dC, static_cast<const float*>(ws.parts), first, round);
      if (a.in.delta_weight)
        launch(sum_weighted, dim3(ceil_div(entries * tokens, 256)), dim3(256), 0, stream, s, p, a.d_delta,
               static_cast<const float*>(ws.weighted), first, round);
    }
  sum_over_segments(a, p.split.segments, ws.sums, stream);
  return bytes;
}

}  // namespace
}  // namespace scan

int64_t queue(const ScanBackward& a, void* memory, cudaStream_t stream) {
  if (a.shape.dim() == 0) return 0;
  if (a.shape.batch == 0) {
    if (memory) scan::sum_over_segments(a, 0, nullptr, stream);
    return 0;
  }
  const ScanInputs& in = a.in;
  const bool by_channel = !in.delta_weight;
  int64_t bytes = 0;
  scan::with_backward_config(a.shape.dstate, [&](auto config) {
    using C = decltype(config);
    if (in.z.data)
      scan::with_layout<C>({in.z, in.u, by_channel ? in.delta : Sequence{}, in.B, in.C, a.d_out, a.du,
                            by_channel ? a.d_delta : Sequence{}, a.dz},
                           [&](auto layout) { bytes = scan::backward<C, decltype(layout), true>(a, memory, stream); });
    else  // few models: not compiled for each layout
      bytes = scan::backward<C, scan::Mixed, false>(a, memory, stream);
  });
  return bytes;
}

}  // namespace autohdr
