// selective_scan's checks and allocation, the same on every device. Kernels::run(parameters, u) runs them where u is.
#pragma once
#include <optional>
#include <tuple>

#include "common/registration.h"
#include "common/sequence_check.h"
#include "selective_scan/selective_scan.h"

namespace autohdr {
namespace {

constexpr const char* kOp = "selective_scan";

// u, delta, z, out [batch, dim, seqlen], or [batch, seqlen, dim] where channel_last.
inline Sequence channels_from(const char* name, const Tensor& t, bool channel_last, const ScanShape& s, int64_t dim) {
  return sequence_from(kOp, name, t, channel_last, s.batch, s.seqlen, dim, s.channels);
}

// B, C [batch, n_groups, dstate, seqlen], or [batch, seqlen, n_groups, dstate] where channel_last.
inline Sequence projection_from(const char* name, const Tensor& t, bool channel_last, const ScanShape& s) {
  const int64_t group = channel_last ? 2 : 1, state = channel_last ? 3 : 2, token = channel_last ? 1 : 3;
  STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == s.batch && t.size(group) == s.groups && t.size(state) == s.dstate &&
                      t.size(token) == s.seqlen,
                  kOp, ": ", name, " must have ", s.batch, " sequences of ", s.seqlen, " tokens, ", s.groups, " groups and ",
                  s.dstate, " states, got ", shape_of(t));
  STD_TORCH_CHECK(s.batch == 0 || t.stride(state) == 1 || t.stride(token) == 1, kOp, ": ", name,
                  " must have its states or its tokens one element apart, got shape ", shape_of(t));
  return {const_cast<void*>(t.const_data_ptr()),
          dtype_of(kOp, name, t),
          t.stride(0),
          t.stride(group),
          t.stride(state),
          t.stride(token)};
}

using Optional = std::optional<Tensor>;

struct Arguments {
  const Tensor &u, &delta, &A, &B, &C;
  const Optional &D, &z, &delta_bias, &delta_weight, &initial_state;
  bool softplus, reverse, channel_last;

  ScanShape shape() const {
    STD_TORCH_CHECK(u.dim() == 3 && A.dim() == 2 && B.dim() == 4, kOp, ": u must have 3 dimensions, A 2, B 4, got ", shape_of(u),
                    ", ", shape_of(A), ", ", shape_of(B));
    const int64_t dim = u.size(channel_last ? 2 : 1), groups = B.size(channel_last ? 2 : 1);
    STD_TORCH_CHECK(groups > 0 && dim % groups == 0, kOp, ": the groups of B must divide the ", dim, " channels, got ", groups);
    return {u.size(0), u.size(channel_last ? 1 : 2), groups, dim / groups, A.size(1), softplus, reverse};
  }
  ScanInputs inputs(const ScanShape& s) const {
    const int64_t dim = s.dim();
    return {channels_from("u", u, channel_last, s, dim),
            channels_from("delta", delta, channel_last, s, delta_weight ? 1 : dim),
            projection_from("B", B, channel_last, s),
            projection_from("C", C, channel_last, s),
            z ? channels_from("z", *z, channel_last, s, dim) : Sequence{},
            parameter(kOp, "A", A, dim * s.dstate),
            parameter(kOp, "D", D, dim),
            parameter(kOp, "delta_bias", delta_bias, dim),
            parameter(kOp, "delta_weight", delta_weight, dim),
            parameter(kOp, "initial_state", initial_state, s.batch * dim * s.dstate)};
  }
};

template <class Kernels>
std::tuple<Tensor, Tensor, Tensor> selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Optional D, Optional z,
                                                  Optional delta_bias, Optional delta_weight, Optional initial_state,
                                                  bool delta_softplus, bool reverse, bool channel_last, bool float_out,
                                                  bool keep_states) {
  const Arguments args{u, delta, A, B, C, D, z, delta_bias, delta_weight, initial_state, delta_softplus, reverse, channel_last};
  const ScanShape s = args.shape();
  const ScanInputs in = args.inputs(s);
  Tensor out = float_out ? torch::stable::new_empty(u, u.sizes(), ScalarType::Float) : contiguous_like(u);
  Tensor last_state = new_float(u, {s.batch, s.dim(), s.dstate});
  Tensor states = new_float(u, {keep_states ? s.batch * s.chunks() * s.dstate * s.dim() : 0});
  Kernels::run(ScanForward{s, in, channels_from("out", out, channel_last, s, s.dim()), write<float>(last_state),
                           keep_states ? write<float>(states) : nullptr},
               u);
  return {out, last_state, states};
}

template <class Kernels>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> selective_scan_backward(
    Tensor d_out, Optional d_last_state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Optional D, Optional z,
    Optional delta_bias, Optional delta_weight, Optional initial_state, Tensor states, bool delta_softplus, bool reverse,
    bool channel_last) {
  const Arguments args{u, delta, A, B, C, D, z, delta_bias, delta_weight, initial_state, delta_softplus, reverse, channel_last};
  const ScanShape s = args.shape();
  const int64_t dim = s.dim();
  const auto like = [&](const Optional& t) { return t ? contiguous_like(*t) : new_float(u, {0}); };
  Tensor du = contiguous_like(u), d_delta = contiguous_like(delta), dA = contiguous_like(A), dB = contiguous_like(B),
         dC = contiguous_like(C), dD = like(D), dz = like(z), d_bias = like(delta_bias), d_weight = like(delta_weight),
         d_initial = like(initial_state);
  Kernels::run(ScanBackward{s, args.inputs(s), parameter(kOp, "states", states, s.batch * s.chunks() * s.dstate * dim),
                            channels_from("d_out", d_out, channel_last, s, dim),
                            parameter(kOp, "d_last_state", d_last_state, s.batch * dim * s.dstate),
                            channels_from("du", du, channel_last, s, dim),
                            channels_from("d_delta", d_delta, channel_last, s, delta_weight ? 1 : dim),
                            projection_from("dB", dB, channel_last, s), projection_from("dC", dC, channel_last, s),
                            z ? channels_from("dz", dz, channel_last, s, dim) : Sequence{}, write<float>(dA), write<float>(dD),
                            write<float>(d_bias), write<float>(d_weight), initial_state ? write<float>(d_initial) : nullptr},
               u);
  return {du, d_delta, dA, dB, dC, dD, dz, d_bias, d_weight, d_initial};
}

template <class Kernels>
void add_kernels(const Registration& r) {
  r.add<&selective_scan<Kernels>>("selective_scan");
  r.add<&selective_scan_backward<Kernels>>("selective_scan_backward");
}

}  // namespace
}  // namespace autohdr
