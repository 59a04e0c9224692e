"""The op autohdr::mdta: schema, fake kernels, autograd. C++ registers its kernels."""

import torch
from torch.utils.flop_counter import register_flop_formula

from autohdr.kernels.common import refuse_double_backward

_PARAMETERS = (
    "Tensor x, Tensor norm_weight, Tensor? norm_bias, Tensor qkv_weight, Tensor dwconv_weight, Tensor temperature,"
    " Tensor project_out_weight"
)
_TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)
torch.library.define(
    "autohdr::mdta",
    f"({_PARAMETERS}, int num_heads, float eps) -> (Tensor y, Tensor gram, Tensor q_norm, Tensor k_norm)",
    tags=_TAGS,
)
torch.library.define(
    "autohdr::mdta_backward",
    f"(Tensor dy, {_PARAMETERS}, Tensor gram, Tensor q_norm, Tensor k_norm, int num_heads, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
# The op's two passes, for images that are worked on in strips of rows; without gradients.
torch.library.define(
    "autohdr::mdta_statistics",
    f"({_PARAMETERS}, int num_heads, float eps, int first, int end) -> (Tensor gram, Tensor q_square, Tensor k_square)",
    tags=_TAGS,
)
torch.library.define(
    "autohdr::mdta_apply",
    f"({_PARAMETERS}, Tensor gram, Tensor q_norm, Tensor k_norm, int num_heads, float eps) -> Tensor",
    tags=_TAGS,
)


@torch.library.register_fake("autohdr::mdta_statistics")
def _(x, norm_weight, norm_bias, qkv_weight, dwconv_weight, temperature, project_out_weight, num_heads, eps, first, end):
    batch, channels = x.shape[:2]
    size = channels // num_heads
    gram = x.new_empty((batch, num_heads, size, size), dtype=torch.float64)
    square = x.new_empty((batch, channels), dtype=torch.float64)
    return gram, square, torch.empty_like(square)


@torch.library.register_fake("autohdr::mdta_apply")
def _(x, *rest):
    return torch.empty_like(x)


@torch.library.register_fake("autohdr::mdta")
def _(x, norm_weight, norm_bias, qkv_weight, dwconv_weight, temperature, project_out_weight, num_heads, eps):
    batch, channels = x.shape[:2]
    size = channels // num_heads
    gram = x.new_empty((batch, num_heads, size, size), dtype=torch.float32)
    norm = x.new_empty((batch, channels), dtype=torch.float32)
    return torch.empty_like(x), gram, norm, torch.empty_like(norm)


@torch.library.register_fake("autohdr::mdta_backward")
def _(dy, x, norm_weight, norm_bias, *rest):
    weights = rest[:4]
    d_norm_bias = x.new_empty((0,), dtype=torch.float32) if norm_bias is None else torch.empty_like(norm_bias)
    return torch.empty_like(x), torch.empty_like(norm_weight), d_norm_bias, *(torch.empty_like(w) for w in weights)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.num_heads, ctx.eps = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, *_):
    if dy is None:
        return (None,) * 9
    dy = dy.contiguous(memory_format=torch.channels_last)
    dx, d_norm_weight, d_norm_bias, *rest = torch.ops.autohdr.mdta_backward(dy, *ctx.saved_tensors, ctx.num_heads, ctx.eps)
    return dx, d_norm_weight, None if ctx.saved_tensors[2] is None else d_norm_bias, *rest, None, None


torch.library.register_autograd("autohdr::mdta", _backward, setup_context=_setup_context)
refuse_double_backward("mdta")


def _multiplications(x_shape: tuple[int, ...], num_heads: int) -> int:
    batch, channels, height, width = x_shape
    per_pixel = 3 * channels * channels + 27 * channels + 2 * channels * (channels // num_heads) + channels * channels
    return batch * height * width * per_pixel


@register_flop_formula(torch.ops.autohdr.mdta)
def _(x_shape, *rest, out_shape=None, **kwargs) -> int:
    return 2 * _multiplications(x_shape, rest[6])


@register_flop_formula(torch.ops.autohdr.mdta_backward)
def _(dy_shape, x_shape, *rest, out_shape=None, **kwargs) -> int:
    """The gradient's own products; what is recomputed does not count."""
    return 4 * _multiplications(x_shape, rest[9])
