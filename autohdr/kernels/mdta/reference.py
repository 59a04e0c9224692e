"""mdta in plain PyTorch: the definition the other backends are checked against, in any floating dtype."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from autohdr.kernels.common import layer_norm


def mdta(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    dwconv_weight: Tensor,
    temperature: Tensor,
    project_out_weight: Tensor,
    num_heads: int,
    eps: float,
) -> Tensor:
    height, width = x.shape[2:]
    normal = layer_norm(x, norm_weight, norm_bias, eps)
    qkv = F.conv2d(normal, qkv_weight.to(x.dtype))
    qkv = F.conv2d(qkv, dwconv_weight.to(x.dtype), padding=1, groups=qkv.shape[1])
    q, k, v = (rearrange(t, "b (h c) y x -> b h c (y x)", h=num_heads) for t in qkv.chunk(3, dim=1))
    # Normalised after the product: the same value, and the sums over the pixels stay exact in half precision.
    wide = torch.promote_types(x.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).transpose(-2, -1)
    q_norm = q.to(wide).norm(dim=-1).clamp_min(1e-12)
    k_norm = k.to(wide).norm(dim=-1).clamp_min(1e-12)
    cosine = scores / (q_norm[..., :, None] * k_norm[..., None, :])
    attention = torch.softmax(cosine * temperature.to(wide), dim=-1)
    out = rearrange(attention.to(x.dtype) @ v, "b h c (y x) -> b (h c) y x", y=height, x=width)
    return x + F.conv2d(out, project_out_weight.to(x.dtype))
