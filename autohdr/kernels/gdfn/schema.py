"""The op autohdr::gdfn: schema, fake kernels, autograd. C++ registers its kernels."""

import torch
from torch.utils.flop_counter import register_flop_formula

from autohdr.kernels.common import refuse_double_backward

_PARAMETERS = (
    "Tensor x, Tensor norm_weight, Tensor? norm_bias, Tensor project_in_weight, Tensor dwconv_weight, Tensor project_out_weight,"
    " float eps"
)
_TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)
torch.library.define("autohdr::gdfn", f"({_PARAMETERS}) -> Tensor", tags=_TAGS)
torch.library.define(
    "autohdr::gdfn_backward",
    f"(Tensor dy, {_PARAMETERS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


@torch.library.register_fake("autohdr::gdfn")
def _(x, *rest):
    return torch.empty_like(x)


@torch.library.register_fake("autohdr::gdfn_backward")
def _(dy, x, norm_weight, norm_bias, *rest):
    weights = rest[:3]
    d_norm_bias = x.new_empty((0,), dtype=torch.float32) if norm_bias is None else torch.empty_like(norm_bias)
    return torch.empty_like(x), torch.empty_like(norm_weight), d_norm_bias, *(torch.empty_like(w) for w in weights)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dy):
    dy = dy.contiguous(memory_format=torch.channels_last)
    dx, d_norm_weight, d_norm_bias, *rest = torch.ops.autohdr.gdfn_backward(dy, *ctx.saved_tensors, ctx.eps)
    return dx, d_norm_weight, None if ctx.saved_tensors[2] is None else d_norm_bias, *rest, None


torch.library.register_autograd("autohdr::gdfn", _backward, setup_context=_setup_context)
refuse_double_backward("gdfn")


def _multiplications(x_shape: tuple[int, ...], project_out_shape: tuple[int, ...]) -> int:
    batch, channels, height, width = x_shape
    hidden = project_out_shape[1]
    return batch * height * width * (3 * channels * hidden + 18 * hidden)


@register_flop_formula(torch.ops.autohdr.gdfn)
def _(x_shape, *rest, out_shape=None, **kwargs) -> int:
    return 2 * _multiplications(x_shape, rest[4])


@register_flop_formula(torch.ops.autohdr.gdfn_backward)
def _(dy_shape, x_shape, *rest, out_shape=None, **kwargs) -> int:
    """The gradient's own products; what is recomputed does not count."""
    return 4 * _multiplications(x_shape, rest[4])
