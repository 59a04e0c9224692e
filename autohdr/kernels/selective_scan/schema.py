"""The op autohdr::selective_scan: schema, fake kernels, autograd. C++ registers its kernels, triton_impl.py has Triton's."""

import torch

from autohdr.kernels.common import define_op

CHUNK = 128
"""Tokens between two saved states on every backend; kChunk in selective_scan.h."""

_TENSORS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, Tensor? delta_weight,"
    " Tensor? initial_state"
)
_FLAGS = "bool delta_softplus, bool reverse, bool channel_last"


def _new_like(t, anchor):
    """Contiguous, whatever the strides of t; empty where t is None."""
    return anchor.new_empty((0,), dtype=torch.float32) if t is None else t.new_empty(t.shape)


def _fake(u, delta, A, B, C, D, z, delta_bias, delta_weight, initial_state, delta_softplus, reverse, channel_last, float_out):
    batch, dim, dstate = u.shape[0], *A.shape
    seqlen = u.shape[1] if channel_last else u.shape[2]
    out = u.new_empty(u.shape, dtype=torch.float32 if float_out else u.dtype)
    last_state = u.new_empty((batch, dim, dstate), dtype=torch.float32)
    # One axis, so that no seqlen is special to torch.export: an axis of chunks would be 1 long in short sequences.
    states = u.new_empty((batch * ((seqlen + CHUNK - 1) // CHUNK) * dstate * dim,), dtype=torch.float32)
    return out, last_state, states


def _fake_backward(d_out, d_last_state, u, delta, A, B, C, D, z, delta_bias, delta_weight, initial_state, states, *flags):
    return tuple(_new_like(t, u) for t in (u, delta, A, B, C, D, z, delta_bias, delta_weight, initial_state))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.delta_softplus, ctx.reverse, ctx.channel_last, _ = inputs
    _, _, states = output
    ctx.save_for_backward(*tensors, states)
    ctx.mark_non_differentiable(states)
    ctx.set_materialize_grads(False)


def _gradients(backward_op, ctx, d_out, d_last_state, _):
    if d_out is None and d_last_state is None:
        return (None,) * 14
    *tensors, states = ctx.saved_tensors
    if d_out is None:
        d_out = torch.zeros_like(tensors[0], memory_format=torch.contiguous_format)
    if d_out.stride(1) != 1 and d_out.stride(2) != 1:
        d_out = d_out.contiguous()
    if d_last_state is not None:
        d_last_state = d_last_state.contiguous()
    grads = backward_op(d_out, d_last_state, *tensors, states, ctx.delta_softplus, ctx.reverse, ctx.channel_last)
    return *(None if t is None else g for t, g in zip(tensors, grads, strict=True)), None, None, None, None


def _flops(u_shape, delta_shape, A_shape, *rest, out_shape=None, **kwargs) -> int:
    """Three multiply-adds for a state and token: the input into it, its decay, the output from it. Exponentials do not count."""
    batch, a, b = u_shape
    return 6 * batch * a * b * A_shape[1]


def _flops_backward(d_out_shape, d_last_state_shape, u_shape, delta_shape, A_shape, *rest, out_shape=None, **kwargs) -> int:
    """The gradient's own products; what is recomputed does not count."""
    batch, a, b = u_shape
    return 12 * batch * a * b * A_shape[1]


define_op(
    "selective_scan",
    f"({_TENSORS}, {_FLAGS}, bool float_out) -> (Tensor out, Tensor last_state, Tensor states)",
    f"(Tensor d_out, Tensor? d_last_state, {_TENSORS}, Tensor states, {_FLAGS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    gradients=_gradients,
    flops=_flops,
    flops_backward=_flops_backward,
)
