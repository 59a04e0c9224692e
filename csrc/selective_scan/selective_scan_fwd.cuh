// selective_scan forward on a GPU. selective_scan_tile.cuh says what a block and a thread own.
//
// A block walks its segment tile by tile with the states in registers: one exponential for a state and token. The loads of the next
// tile are in flight meanwhile. y is summed over the lanes of a channel for 8 tokens at once and ends in shared memory, where the
// gate of z is applied and from where it is stored, in whichever order each tensor has. Shared memory: three tiles of channels, two
// of states; 18 KB for 16 states. 32 channels and 32 tokens a tile: 64-byte rows of bfloat16 in either layout, four warps, which
// share B and C, and 384 blocks for 8 × 1536 channels. Every sum has a fixed order.
#pragma once
#include "selective_scan/selective_scan_tile.cuh"

namespace autohdr {
namespace scan {

// Blocks on a multiprocessor. Mixed takes more registers: with one block less none is spilled.
template <class C, class L>
constexpr int kForwardBlocks = std::is_same_v<L, Mixed> && C::kBlocks == 4 ? 3 : C::kBlocks;

template <class C, class L>
__global__ void __launch_bounds__(C::kThreads, kForwardBlocks<C, L>) scan_forward(ScanForward a, Split p, const float* carries) {
  AUTOHDR_DYNAMIC_SHARED(float, shared);
  float *Bs = shared, *Cs = Bs + C::kStateTile, *delta = Cs + C::kStateTile, *input = delta + C::kTile, *y = input + C::kTile;
  float *rank_one = y + C::kTile, *weight = rank_one + C::kTokens, *bias = weight + C::kChannels, *D = bias + C::kChannels;
  const ScanShape& s = a.shape;
  const ScanInputs& in = a.in;
  const Block b(s, p);
  const Channel<C> ch(s, b, b.worker);
  const int dstate = static_cast<int>(s.dstate);
  const int64_t dim = s.dim(), channel = ch.row + ch.channel;
  float a2[C::kStates], h[C::kStates];
  ch.rates(s, in, a2);
#pragma unroll
  for (int j = 0; j < C::kStates; ++j) {
    h[j] = 0;
    if (!ch.has(s, j)) continue;
    if (p.segments > 1)
      h[j] = carries[((b.batch * p.segments + b.segment) * dstate + ch.state(j)) * dim + channel];
    else if (in.initial_state)
      h[j] = in.initial_state[(b.batch * dim + channel) * dstate + ch.state(j)];
  }
  ch.parameters(in, weight, bias, D);

  using Channels = Tile<C, C::kChannels, L>;
  using States = Tile<C, C::kPadded, L>;
  const Window<C> start(s, b.first_chunk * kChunk);
  const auto aligned = [&](const Sequence& q) {
    return is_aligned<C, C::kChannels, L>(q, ch.offset(b, q, b.worker), start, ch.count);
  };
  const auto states_aligned = [&](const Sequence& q) {
    return is_aligned<C, C::kPadded, L>(q, state_offset(b, q), start, dstate);
  };
  const bool u_aligned = aligned(in.u), delta_aligned = aligned(in.delta), out_aligned = aligned(a.out),
             z_aligned = in.z.data && aligned(in.z);
  const bool B_aligned = states_aligned(in.B), C_aligned = states_aligned(in.C);
  const int64_t end = min(b.last_chunk * kChunk, s.seqlen);
  for (int64_t from = b.first_chunk * kChunk; from < end; from += C::kTokens) {
    const Window<C> w(s, from);
    if (a.states && from % kChunk == 0)
#pragma unroll
      for (int j = 0; j < C::kStates; ++j)
        if (ch.has(s, j)) a.states[((b.batch * s.chunks() + from / kChunk) * dstate + ch.state(j)) * dim + channel] = h[j];
    __syncthreads();
    put_delta<C, L>(s, in, ch.delta_offset(b, in, b.worker), w, ch.count, delta_aligned, weight, bias, rank_one, delta);
    States::each(in.B, state_offset(b, in.B), w, dstate, B_aligned,
                 OneByOne{[&](int row, int n, float v, bool) { Bs[row * C::kStateRow + n] = v; }});
    States::each(in.C, state_offset(b, in.C), w, dstate, C_aligned,
                 OneByOne{[&](int row, int n, float v, bool) { Cs[row * C::kStateRow + n] = v; }});
    __syncthreads();
    Channels::each(in.u, ch.offset(b, in.u, b.worker), w, ch.count, u_aligned, [&](auto& v, const auto& at) {
      float skipped[sizeof v / sizeof v[0]];
#pragma unroll
      for (int k = 0; k < static_cast<int>(sizeof v / sizeof v[0]); ++k) skipped[k] = v[k] * D[at(k).column];
      multiply<C>(v, at, delta);
      put<C>(v, at, input);
      put<C>(skipped, at, y);
    });
    __syncthreads();
    for (int sub = 0; sub < C::kTokens; sub += C::kSub) {
      float sums[C::kSub];
#pragma unroll
      for (int k = 0; k < C::kSub; ++k) {
        const int row = sub + k;
        const float d = delta[row * C::kRow + ch.channel], x = input[row * C::kRow + ch.channel];
        float Bv[C::kStates], Cv[C::kStates];
        load_states<C>(Bs + row * C::kStateRow + ch.state(0), Bv);
        load_states<C>(Cs + row * C::kStateRow + ch.state(0), Cv);
        sums[k] = 0;
#pragma unroll
        for (int j = 0; j < C::kStates; ++j) {
          h[j] = exp2_approx(d * a2[j]) * h[j] + x * Bv[j];
          sums[k] += h[j] * Cv[j];
        }
      }
      const int first = sum_over_lanes<C::kSub, C::kLanes, 1>(sums);
      if (owns_sum<C::kSub, C::kLanes, 1>())
#pragma unroll
        for (int i = 0; i < kLeft<C::kSub, C::kLanes>; ++i) y[(sub + first + i) * C::kRow + ch.channel] += sums[i];
    }
    __syncthreads();
    if (in.z.data) {
      Channels::each(in.z, ch.offset(b, in.z, b.worker), w, ch.count, z_aligned, [&](auto& v, const auto& at) {
        silu(v);
        multiply<C>(v, at, y);
        put<C>(v, at, y);
      });
      __syncthreads();
    }
    Channels::store(a.out, ch.offset(b, a.out, b.worker), w, ch.count, out_aligned,
                    [&](int row, int c) { return y[row * C::kRow + c]; });
  }
  if (b.segment + 1 < p.segments) return;
#pragma unroll
  for (int j = 0; j < C::kStates; ++j)
    if (ch.has(s, j)) a.last_state[(b.batch * dim + channel) * dstate + ch.state(j)] = h[j];
}

template <class C>
constexpr size_t forward_shared() {
  return (2 * C::kStateTile + 3 * C::kTile + C::kTokens + 3 * C::kChannels) * sizeof(float);
}

}  // namespace scan
}  // namespace autohdr
