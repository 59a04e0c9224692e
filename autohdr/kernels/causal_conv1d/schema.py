"""The op autohdr::causal_conv1d: schema, fake kernels, autograd. C++ registers its kernels."""

import torch
from torch.utils.flop_counter import register_flop_formula

from autohdr.kernels.common import refuse_double_backward

_ARGUMENTS = "Tensor x, Tensor weight, Tensor? bias, bool reverse, bool channel_last"
_TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)
torch.library.define("autohdr::causal_conv1d", f"({_ARGUMENTS}) -> Tensor", tags=_TAGS)
torch.library.define("autohdr::causal_conv1d_backward", f"(Tensor dy, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)", tags=_TAGS)


@torch.library.register_fake("autohdr::causal_conv1d")
def _(x, *rest):
    return x.new_empty(x.shape)


@torch.library.register_fake("autohdr::causal_conv1d_backward")
def _(dy, x, weight, bias, *flags):
    d_bias = weight.new_empty((0,)) if bias is None else torch.empty_like(bias)
    return x.new_empty(x.shape), torch.empty_like(weight), d_bias


def _setup_context(ctx, inputs, output):
    *tensors, ctx.reverse, ctx.channel_last = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dy):
    x, weight, bias = ctx.saved_tensors
    dy = dy if dy.stride(2) == 1 else dy.contiguous()
    dx, d_weight, d_bias = torch.ops.autohdr.causal_conv1d_backward(dy, x, weight, bias, ctx.reverse, ctx.channel_last)
    return dx, d_weight, None if bias is None else d_bias, None, None


torch.library.register_autograd("autohdr::causal_conv1d", _backward, setup_context=_setup_context)
refuse_double_backward("causal_conv1d")


@register_flop_formula(torch.ops.autohdr.causal_conv1d)
def _(x_shape, weight_shape, *rest, out_shape=None, **kwargs) -> int:
    batch, a, b = x_shape
    return 2 * batch * a * b * weight_shape[1]


@register_flop_formula(torch.ops.autohdr.causal_conv1d_backward)
def _(dy_shape, x_shape, weight_shape, *rest, out_shape=None, **kwargs) -> int:
    """The gradient's own products; what is recomputed does not count."""
    batch, a, b = x_shape
    return 4 * batch * a * b * weight_shape[1]
