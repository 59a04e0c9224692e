"""mdta in plain PyTorch: the definition the other backends are checked against, in any floating dtype."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from autohdr.kernels.common import as_codes, layer_norm, product_of_codes, scale_of_codes


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
    qkv = hidden(x, norm_weight, norm_bias, qkv_weight, dwconv_weight, eps)
    q, k, v = (rearrange(t, "b (h c) y x -> b h c (y x)", h=num_heads) for t in qkv.chunk(3, dim=1))
    # Normalised after the product: the same value, and the sums over the pixels stay exact in half precision.
    wide = torch.promote_types(x.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).transpose(-2, -1)
    attention = _attention(scores, q.to(wide).norm(dim=-1), k.to(wide).norm(dim=-1), temperature)
    out = rearrange(attention.to(x.dtype) @ v, "b h c (y x) -> b (h c) y x", y=height, x=width)
    return x + F.conv2d(out, project_out_weight.to(x.dtype))


def hidden(x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, weight: Tensor, dwconv: Tensor, eps: float) -> Tensor:
    """The 3×3 convolution of the 1×1 one of norm(x): q, k and v, or those whose rows of the weights these are."""
    channels = F.conv2d(layer_norm(x, norm_weight, norm_bias, eps), weight.to(x.dtype))
    return F.conv2d(channels, dwconv.to(x.dtype), padding=1, groups=channels.shape[1])


def _attention(scores: Tensor, q_norm: Tensor, k_norm: Tensor, temperature: Tensor) -> Tensor:
    cosine = scores / (q_norm.clamp_min(1e-12)[..., :, None] * k_norm.clamp_min(1e-12)[..., None, :])
    return torch.softmax(cosine * temperature.to(scores.dtype), dim=-1)


def mdta_statistics(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    dwconv_weight: Tensor,
    temperature: Tensor,
    project_out_weight: Tensor,
    num_heads: int,
    eps: float,
    first: int,
    end: int,
) -> tuple[Tensor, Tensor, Tensor]:
    two = 2 * x.shape[1]
    qk = hidden(x, norm_weight, norm_bias, qkv_weight[:two], dwconv_weight[:two], eps)[:, :, first:end]
    return _sums(qk, num_heads)


def _sums(qk: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(qk.dtype, torch.float32)
    q, k = (rearrange(t, "b (h c) y x -> b h c (y x)", h=num_heads).to(wide) for t in qk.chunk(2, dim=1))
    gram, q_square, k_square = q @ k.transpose(-2, -1), q.square().sum(-1).flatten(1), k.square().sum(-1).flatten(1)
    return gram.double(), q_square.double(), k_square.double()


def lengths(gram: Tensor, q_square: Tensor, k_square: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The statistics as mdta_apply takes them for images of this dtype."""
    wide = torch.promote_types(dtype, torch.float32)
    return gram.to(wide), q_square.sqrt().to(wide), k_square.sqrt().to(wide)


def mdta_apply(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    dwconv_weight: Tensor,
    temperature: Tensor,
    project_out_weight: Tensor,
    gram: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    num_heads: int,
    eps: float,
) -> Tensor:
    two = 2 * x.shape[1]
    v = hidden(x, norm_weight, norm_bias, qkv_weight[two:], dwconv_weight[two:], eps)
    combined = _combined(gram, q_norm, k_norm, temperature, project_out_weight).to(x.dtype)
    return x + (combined @ v.flatten(2)).view_as(x)


def _combined(gram: Tensor, q_norm: Tensor, k_norm: Tensor, temperature: Tensor, project_out_weight: Tensor) -> Tensor:
    """project_out · blockdiag(attention): one matrix an image."""
    num_heads = gram.shape[1]
    attention = _attention(gram, q_norm.unflatten(1, (num_heads, -1)), k_norm.unflatten(1, (num_heads, -1)), temperature)
    out = project_out_weight[:, :, 0, 0].to(attention.dtype).unflatten(1, (num_heads, -1))
    return torch.einsum("ohi,bhij->bohj", out, attention).flatten(2)


def mdta_int8(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    qkv_scale: Tensor,
    dwconv_weight: Tensor,
    temperature: Tensor,
    project_out_weight: Tensor,
    v_scale: Tensor,
    num_heads: int,
    eps: float,
) -> Tensor:
    expansion = norm_weight, norm_bias, qkv_weight, qkv_scale, dwconv_weight
    rest = temperature, project_out_weight, v_scale
    statistics = mdta_int8_statistics(x, *expansion, *rest, num_heads, eps, 0, x.shape[2])
    return mdta_int8_apply(x, *expansion, *rest, *lengths(*statistics, x.dtype), num_heads, eps)


def _hidden_int8(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, weight: Tensor, scale: Tensor, dwconv: Tensor, eps: float
) -> Tensor:
    hidden = product_of_codes(as_codes(layer_norm(x, norm_weight, norm_bias, eps)), weight, scale)
    return F.conv2d(hidden, dwconv.to(x.dtype), padding=1, groups=hidden.shape[1])


def mdta_int8_statistics(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    qkv_scale: Tensor,
    dwconv_weight: Tensor,
    temperature: Tensor,
    project_out_weight: Tensor,
    v_scale: Tensor,
    num_heads: int,
    eps: float,
    first: int,
    end: int,
) -> tuple[Tensor, Tensor, Tensor]:
    two, wide = 2 * x.shape[1], x.to(torch.promote_types(x.dtype, torch.float32))
    qk = _hidden_int8(wide, norm_weight, norm_bias, qkv_weight[:two], qkv_scale[:two], dwconv_weight[:two], eps)
    return _sums(qk[:, :, first:end], num_heads)


def mdta_int8_apply(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    qkv_scale: Tensor,
    dwconv_weight: Tensor,
    temperature: Tensor,
    project_out_weight: Tensor,
    v_scale: Tensor,
    gram: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    num_heads: int,
    eps: float,
) -> Tensor:
    two, wide = 2 * x.shape[1], x.to(torch.promote_types(x.dtype, torch.float32))
    v = as_codes(_hidden_int8(wide, norm_weight, norm_bias, qkv_weight[two:], qkv_scale[two:], dwconv_weight[two:], eps))
    combined = _combined(gram, q_norm, k_norm, temperature, project_out_weight) * v_scale.to(gram.dtype)
    scale = scale_of_codes(combined.abs().amax(-1, keepdim=True))
    sums = (as_codes(combined / scale).double() @ v.flatten(2).double()).to(wide.dtype)
    return (wide + (sums * scale).view_as(x)).to(x.dtype)
