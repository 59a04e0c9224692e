"""nafblock in plain PyTorch: the definition the other backends are checked against, in any floating dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor

from autohdr.kernels.backends import is_as_on_a_gpu
from autohdr.kernels.common import layer_norm


def nafblock(
    x: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    conv1_weight: Tensor,
    conv1_bias: Tensor,
    conv2_weight: Tensor,
    conv2_bias: Tensor,
    sca_weight: Tensor,
    sca_bias: Tensor,
    conv3_weight: Tensor,
    conv3_bias: Tensor,
    beta: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    conv4_weight: Tensor,
    conv4_bias: Tensor,
    conv5_weight: Tensor,
    conv5_bias: Tensor,
    gamma: Tensor,
    eps: float,
) -> Tensor:
    local = _local(x, norm1_weight, norm1_bias, conv1_weight, conv1_bias, conv2_weight, conv2_bias, eps)
    x = _attend(x, local, local.mean((2, 3)), sca_weight, sca_bias, conv3_weight, conv3_bias, beta)
    return _feed_forward(x, norm2_weight, norm2_bias, conv4_weight, conv4_bias, conv5_weight, conv5_bias, gamma, eps)


def nafblock_statistics(
    x: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    conv1_weight: Tensor,
    conv1_bias: Tensor,
    conv2_weight: Tensor,
    conv2_bias: Tensor,
    eps: float,
    first: int,
    end: int,
) -> Tensor:
    local = _local(x, norm1_weight, norm1_bias, conv1_weight, conv1_bias, conv2_weight, conv2_bias, eps)
    return local[:, :, first:end].sum((2, 3), dtype=torch.float64)


def nafblock_apply(
    x: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    conv1_weight: Tensor,
    conv1_bias: Tensor,
    conv2_weight: Tensor,
    conv2_bias: Tensor,
    sca_weight: Tensor,
    sca_bias: Tensor,
    conv3_weight: Tensor,
    conv3_bias: Tensor,
    beta: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    conv4_weight: Tensor,
    conv4_bias: Tensor,
    conv5_weight: Tensor,
    conv5_bias: Tensor,
    gamma: Tensor,
    means: Tensor,
    eps: float,
) -> Tensor:
    local = _local(x, norm1_weight, norm1_bias, conv1_weight, conv1_bias, conv2_weight, conv2_bias, eps)
    x = _attend(x, local, means.to(x.dtype), sca_weight, sca_bias, conv3_weight, conv3_bias, beta)
    return _feed_forward(x, norm2_weight, norm2_bias, conv4_weight, conv4_bias, conv5_weight, conv5_bias, gamma, eps)


def _local(x, norm_weight, norm_bias, weight, bias, dwconv_weight, dwconv_bias, eps: float) -> Tensor:
    hidden = _convolve(layer_norm(x, norm_weight, norm_bias, eps), weight, bias)
    return _gate(_convolve(hidden, dwconv_weight, dwconv_bias, padding=1, groups=hidden.shape[1]))


def _attend(x, local, means, sca_weight, sca_bias, weight, bias, scale) -> Tensor:
    attention = _convolve(means[:, :, None, None], sca_weight, sca_bias)
    return _add_scaled(x, _convolve(local * attention, weight, bias), scale)


def _feed_forward(x, norm_weight, norm_bias, in_weight, in_bias, out_weight, out_bias, scale, eps: float) -> Tensor:
    gated = _gate(_convolve(layer_norm(x, norm_weight, norm_bias, eps), in_weight, in_bias))
    return _add_scaled(x, _convolve(gated, out_weight, out_bias), scale)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor, padding: int = 0, groups: int = 1) -> Tensor:
    """On a CPU in float32 at least: in half precision PyTorch's own is slow on most processors."""
    dtype = torch.promote_types(x.dtype, torch.float32) if x.device.type == "cpu" and not is_as_on_a_gpu() else x.dtype
    return F.conv2d(x.to(dtype), weight.to(dtype), bias.to(dtype), padding=padding, groups=groups).to(x.dtype)


def _gate(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=1)
    return a * b


def _add_scaled(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(x, y, scale.to(x.dtype))
