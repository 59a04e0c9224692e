"""gdfn in plain PyTorch: the definition the other backends are checked against, in any floating dtype."""

import torch.nn.functional as F
from torch import Tensor

from autohdr.kernels.common import layer_norm


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
    hidden = F.conv2d(hidden, dwconv_weight.to(x.dtype), padding=1, groups=hidden.shape[1])
    a, b = hidden.chunk(2, dim=1)
    return x + F.conv2d(F.gelu(a) * b, project_out_weight.to(x.dtype))
