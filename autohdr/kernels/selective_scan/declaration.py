"""The op autohdr::selective_scan."""

import torch
from torch import Tensor

from autohdr.kernels.common import HALVES, contiguous_like, parameter
from autohdr.kernels.declare import declare
from autohdr.kernels.selective_scan import reference

CHUNK = 64
"""Tokens between two saved states on every backend; kChunk in selective_scan.h."""


def _fake(
    u, delta, A, B, C, D, z, delta_bias, delta_weight, initial_state,
    delta_softplus, reverse, channel_last, float_out, keep_states,
):  # fmt: skip
    batch, dim, dstate = u.shape[0], *A.shape
    seqlen = u.shape[1] if channel_last else u.shape[2]
    out = u.new_empty(u.shape, dtype=torch.float32 if float_out else u.dtype)
    last_state = u.new_empty((batch, dim, dstate), dtype=torch.float32)
    # One axis, so that no seqlen is special to torch.export: an axis of chunks would be 1 long in short sequences.
    states = u.new_empty((batch * ((seqlen + CHUNK - 1) // CHUNK) * dstate * dim if keep_states else 0,), dtype=torch.float32)
    return out, last_state, states


def _flops(u, delta, A, *_) -> int:
    """Three multiply-adds for a state and token: the input into it, its decay, the output from it. Exponentials do not count."""
    batch, a, b = u
    return 6 * batch * a * b * A[1]


def _with_unit_stride(t: Tensor, axes: tuple[int, int] = (1, 2)) -> Tensor:
    """t itself if its channels (or states) or its tokens, which are these axes, are one element apart, else a contiguous copy."""
    return t if any(t.stride(axis) == 1 for axis in axes) else t.contiguous()


def _prepare(u, delta, A, B, C, D, z, delta_bias, delta_weight, initial_state, delta_softplus, reverse, channel_last, *flags):
    u, delta, z = (None if t is None else _with_unit_stride(t) for t in (u, delta, z))
    B, C = (_with_unit_stride(t, (1, 3) if channel_last else (2, 3)) for t in (B, C))
    A, D, delta_bias, delta_weight, initial_state = map(parameter, (A, D, delta_bias, delta_weight, initial_state))
    return u, delta, A, B, C, D, z, delta_bias, delta_weight, initial_state, delta_softplus, reverse, channel_last, *flags


selective_scan = declare(
    reference.selective_scan,
    dtypes={"cuda": HALVES, "triton": HALVES, "cpu": HALVES},
    outputs=("out", "last_state", "states"),
    differentiable=2,
    forward_only=1,
    keep="keep_states",
    fake=_fake,
    flops=_flops,
    layout=_with_unit_stride,
    prepare=_prepare,
    like=contiguous_like,
)
