"""add_norm in plain PyTorch: the definition the other backends are checked against, in any floating dtypes."""

import torch
import torch.nn.functional as F
from torch import Tensor


def add_norm(
    x: Tensor, branch: Tensor, scale: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(torch.promote_types(x.dtype, branch.dtype), torch.float32)
    y = torch.addcmul(x.to(wide), scale.to(wide), branch.to(wide))
    normed = F.layer_norm(y, scale.shape, norm_weight.to(wide), norm_bias.to(wide), eps)
    return y.to(x.dtype), normed.to(branch.dtype)
