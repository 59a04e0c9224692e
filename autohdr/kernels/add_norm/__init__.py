"""A scaled residual and the layer norm that follows it, as one op."""

import torch
from torch import Tensor

from autohdr.kernels.add_norm import declaration
from autohdr.kernels.common import DTYPES, autocast, check_tensors

MOST_CHANNELS = 4096
"""A row of the CUDA kernels lies in one block's registers, of the Triton kernels in one program's."""


def add_norm(
    x: Tensor,
    branch: Tensor,
    scale: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    eps: float = 1e-5,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Scaled residual, then layer norm: ``y = x + scale ⊙ branch`` and ``LayerNorm(y) · norm_weight + norm_bias``, in one pass.

    The norm is of the sum before it is rounded to x's dtype. Saved for the backward pass: the inputs alone.

    Args:
        x: [..., channels], the residual stream: float32, bfloat16, float16 or float64. Autocast leaves it as it is.
        branch: the shape of x, and its dtype, unless x is float32 and this is bfloat16 or float16. Under autocast it is cast.
        scale: [channels], the branch's (layer scale).
        norm_weight, norm_bias: [channels].
        eps: added to the norm's variance.
        backend: "auto", "cuda", "triton", "cpu" or "reference". Sums are accumulated in float32 (float64 for float64).

    Returns:
        (y, in the dtype of x; its norm, in the dtype of branch), contiguous.

    Raises:
        ValueError: an argument's shape, dtype or device does not fit, named with what was expected; channels above 4096.
        RuntimeError: the named backend cannot run here.

    Source: Ba et al., Layer Normalization (2016); Touvron et al., Going deeper with Image Transformers (ICCV 2021) for the scale.
    """
    if not isinstance(x, Tensor) or x.dim() < 2 or x.dtype not in DTYPES or not 0 < x.shape[-1] <= MOST_CHANNELS:
        got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"add_norm: x must be a floating [..., channels] of 1 to {MOST_CHANNELS} channels, got {got}")
    channels = (x.shape[-1],)
    parameters = {"scale": (scale, channels), "norm_weight": (norm_weight, channels), "norm_bias": (norm_bias, channels)}
    check_tensors("add_norm", "x", x, {"branch": (branch, tuple(x.shape)), **parameters})
    branch = autocast(branch)
    if branch.dtype != x.dtype and (x.dtype != torch.float32 or branch.dtype not in (torch.bfloat16, torch.float16)):
        raise ValueError(f"add_norm: branch must be {x.dtype} as x is, or half precision where x is float32, got {branch.dtype}")
    return declaration.add_norm(x, branch, scale, norm_weight, norm_bias, eps, backend=backend)
