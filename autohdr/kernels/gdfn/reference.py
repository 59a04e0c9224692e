"""gdfn in plain PyTorch: the definition the other backends are checked against, in any floating dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor

from autohdr.kernels.common import as_codes, layer_norm, product_of_codes


def gdfn(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    project_in_weight: Tensor,
    dwconv_weight: Tensor,
    project_out_weight: Tensor,
    eps: float,
) -> Tensor:
    hidden = F.conv2d(layer_norm(x, norm_weight, norm_bias, eps), project_in_weight.to(x.dtype))
    return x + F.conv2d(gated(hidden, dwconv_weight), project_out_weight.to(x.dtype))


def gdfn_int8(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    project_in_weight: Tensor,
    project_in_scale: Tensor,
    dwconv_weight: Tensor,
    project_out_weight: Tensor,
    project_out_scale: Tensor,
    eps: float,
) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    codes = as_codes(layer_norm(wide, norm_weight, norm_bias, eps))
    hidden = product_of_codes(codes, project_in_weight, project_in_scale)
    codes = as_codes(gated(hidden, dwconv_weight))
    return (wide + product_of_codes(codes, project_out_weight, project_out_scale)).to(x.dtype)


def gated(hidden: Tensor, dwconv_weight: Tensor) -> Tensor:
    """gelu(a) ⊙ b, a and b the halves of hidden's 3×3 convolution."""
    a, b = F.conv2d(hidden, dwconv_weight.to(hidden.dtype), padding=1, groups=hidden.shape[1]).chunk(2, dim=1)
    return F.gelu(a) * b
