"""The op autohdr::causal_conv1d: schema, fake kernels, autograd. C++ registers its kernels, triton_impl.py has Triton's."""

import torch

from autohdr.kernels.common import define_op

_ARGUMENTS = "Tensor x, Tensor weight, Tensor? bias, bool reverse, bool channel_last"


def _fake(x, *rest):
    return x.new_empty(x.shape)


def _fake_backward(dy, x, weight, bias, *flags):
    d_bias = weight.new_empty((0,)) if bias is None else torch.empty_like(bias)
    return x.new_empty(x.shape), torch.empty_like(weight), d_bias


def _setup_context(ctx, inputs, output):
    *tensors, ctx.reverse, ctx.channel_last = inputs
    ctx.save_for_backward(*tensors)


def _gradients(backward_op, ctx, dy):
    x, weight, bias = ctx.saved_tensors
    dy = dy if dy.stride(2) == 1 else dy.contiguous()
    dx, d_weight, d_bias = backward_op(dy, x, weight, bias, ctx.reverse, ctx.channel_last)
    return dx, d_weight, None if bias is None else d_bias, None, None


def _flops(x_shape, weight_shape, *rest, out_shape=None, **kwargs) -> int:
    batch, a, b = x_shape
    return 2 * batch * a * b * weight_shape[1]


def _flops_backward(dy_shape, x_shape, weight_shape, *rest, out_shape=None, **kwargs) -> int:
    """The gradient's own products; what is recomputed does not count."""
    return 2 * _flops(x_shape, weight_shape)


define_op(
    "causal_conv1d",
    f"({_ARGUMENTS}) -> Tensor",
    f"(Tensor dy, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    gradients=_gradients,
    flops=_flops,
    flops_backward=_flops_backward,
)
