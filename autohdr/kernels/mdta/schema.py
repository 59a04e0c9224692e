"""The op autohdr::mdta: schema, fake kernels, autograd. C++ registers its kernels, triton_impl.py has Triton's."""

import torch

from autohdr.kernels.common import define_op, define_pass

_PARAMETERS = (
    "Tensor x, Tensor norm_weight, Tensor? norm_bias, Tensor qkv_weight, Tensor dwconv_weight, Tensor temperature,"
    " Tensor project_out_weight"
)


def _fake_statistics(
    x, norm_weight, norm_bias, qkv_weight, dwconv_weight, temperature, project_out_weight, num_heads, eps, first, end
):
    batch, channels = x.shape[:2]
    size = channels // num_heads
    gram = x.new_empty((batch, num_heads, size, size), dtype=torch.float64)
    square = x.new_empty((batch, channels), dtype=torch.float64)
    return gram, square, torch.empty_like(square)


def _fake_apply(x, *rest):
    return torch.empty_like(x)


def _fake(x, norm_weight, norm_bias, qkv_weight, dwconv_weight, temperature, project_out_weight, num_heads, eps):
    batch, channels = x.shape[:2]
    size = channels // num_heads
    gram = x.new_empty((batch, num_heads, size, size), dtype=torch.float32)
    norm = x.new_empty((batch, channels), dtype=torch.float32)
    return torch.empty_like(x), gram, norm, torch.empty_like(norm)


def _fake_backward(dy, x, norm_weight, norm_bias, *rest):
    weights = rest[:4]
    d_norm_bias = x.new_empty((0,), dtype=torch.float32) if norm_bias is None else torch.empty_like(norm_bias)
    return torch.empty_like(x), torch.empty_like(norm_weight), d_norm_bias, *(torch.empty_like(w) for w in weights)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.num_heads, ctx.eps = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradients(backward_op, ctx, dy, *_):
    if dy is None:
        return (None,) * 9
    dy = dy.contiguous(memory_format=torch.channels_last)
    dx, d_norm_weight, d_norm_bias, *rest = backward_op(dy, *ctx.saved_tensors, ctx.num_heads, ctx.eps)
    return dx, d_norm_weight, None if ctx.saved_tensors[2] is None else d_norm_bias, *rest, None, None


def _multiplications(x_shape: tuple[int, ...], num_heads: int) -> int:
    batch, channels, height, width = x_shape
    per_pixel = 3 * channels * channels + 27 * channels + 2 * channels * (channels // num_heads) + channels * channels
    return batch * height * width * per_pixel


def _flops(x_shape, *rest, out_shape=None, **kwargs) -> int:
    return 2 * _multiplications(x_shape, rest[6])


def _flops_backward(dy_shape, x_shape, *rest, out_shape=None, **kwargs) -> int:
    """The gradient's own products; what is recomputed does not count."""
    return 4 * _multiplications(x_shape, rest[9])


# For images that are worked on in strips of rows.
define_pass(
    "mdta",
    "statistics",
    f"({_PARAMETERS}, int num_heads, float eps, int first, int end) -> (Tensor gram, Tensor q_square, Tensor k_square)",
    _fake_statistics,
)
define_pass(
    "mdta",
    "apply",
    f"({_PARAMETERS}, Tensor gram, Tensor q_norm, Tensor k_norm, int num_heads, float eps) -> Tensor",
    _fake_apply,
)
define_op(
    "mdta",
    f"({_PARAMETERS}, int num_heads, float eps) -> (Tensor y, Tensor gram, Tensor q_norm, Tensor k_norm)",
    f"(Tensor dy, {_PARAMETERS}, Tensor gram, Tensor q_norm, Tensor k_norm, int num_heads, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    gradients=_gradients,
    flops=_flops,
    flops_backward=_flops_backward,
)
