"""The op autohdr::gdfn: schema, fake kernels, autograd. C++ registers its kernels, triton_impl.py has Triton's."""

import torch

from autohdr.kernels.common import define_op

_PARAMETERS = (
    "Tensor x, Tensor norm_weight, Tensor? norm_bias, Tensor project_in_weight, Tensor dwconv_weight, Tensor project_out_weight,"
    " float eps"
)


def _fake(x, *rest):
    return torch.empty_like(x)


def _fake_backward(dy, x, norm_weight, norm_bias, *rest):
    weights = rest[:3]
    d_norm_bias = x.new_empty((0,), dtype=torch.float32) if norm_bias is None else torch.empty_like(norm_bias)
    return torch.empty_like(x), torch.empty_like(norm_weight), d_norm_bias, *(torch.empty_like(w) for w in weights)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _gradients(backward_op, ctx, dy):
    dy = dy.contiguous(memory_format=torch.channels_last)
    dx, d_norm_weight, d_norm_bias, *rest = backward_op(dy, *ctx.saved_tensors, ctx.eps)
    return dx, d_norm_weight, None if ctx.saved_tensors[2] is None else d_norm_bias, *rest, None


def _multiplications(x_shape: tuple[int, ...], project_out_shape: tuple[int, ...]) -> int:
    batch, channels, height, width = x_shape
    hidden = project_out_shape[1]
    return batch * height * width * (3 * channels * hidden + 18 * hidden)


def _flops(x_shape, *rest, out_shape=None, **kwargs) -> int:
    return 2 * _multiplications(x_shape, rest[4])


def _flops_backward(dy_shape, x_shape, *rest, out_shape=None, **kwargs) -> int:
    """The gradient's own products; what is recomputed does not count."""
    return 4 * _multiplications(x_shape, rest[4])


define_op(
    "gdfn",
    f"({_PARAMETERS}) -> Tensor",
    f"(Tensor dy, {_PARAMETERS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    gradients=_gradients,
    flops=_flops,
    flops_backward=_flops_backward,
)
