"""Mamba's short causal convolution and the SiLU behind it, as one op."""

from torch import Tensor

from autohdr.kernels.causal_conv1d import declaration
from autohdr.kernels.common import DTYPES, autocast, check_tensors

MAX_WIDTH = 16
"""By the shared memory of the smallest GPUs."""


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    reverse: bool = False,
    layout: str = "bdl",
    backend: str = "auto",
) -> Tensor:
    """Depthwise causal convolution and SiLU: ``y_t = silu(bias + Σ_k weight_k x_{t - (width - 1) + k})``, zeros before the first
    token.

    Saved for the backward pass: the inputs alone; the convolution is computed again.

    Args:
        x: [batch, dim, seqlen], float32, bfloat16, float16 or float64, with at least one token. Under autocast it is cast, the
            parameters are not. A last axis that is not contiguous costs a copy.
        weight: [dim, width], width at most 16, any floating dtype; the last column meets the token itself.
        bias: [dim], or None for zero.
        reverse: whether each token meets those after it instead, ``y_t = silu(bias + Σ_k weight_k x_{t + (width - 1) - k})``: the
            same as to flip the sequence before and after.
        layout: "bdl", or "bld" where x and y are [batch, seqlen, dim].
        backend: "auto", "cuda", "triton", "cpu" or "reference". Sums are float32 (float64 for float64).

    Returns:
        y, the shape and dtype of x.

    Raises:
        ValueError: an argument's shape, dtype or device does not fit, named with what was expected.
        RuntimeError: the named backend cannot run here.

    Source: Gu and Dao, Mamba (2023), section 3.4, figure 3.
    """
    _check_arguments(x, weight, bias, layout)
    return declaration.causal_conv1d(autocast(x), weight, bias, reverse, layout == "bld", backend=backend)


def _check_arguments(x: Tensor, weight: Tensor, bias: Tensor | None, layout: str) -> None:
    def refuse(what: str):
        raise ValueError(f"causal_conv1d: {what}")

    if layout not in ("bdl", "bld"):
        refuse(f"layout must be 'bdl' or 'bld', got {layout!r}")
    for name, t in {"x": x, "weight": weight}.items():
        if not isinstance(t, Tensor):
            refuse(f"{name} must be a tensor, got {type(t).__name__}")
    axes = "[batch, dim, seqlen]" if layout == "bdl" else "[batch, seqlen, dim]"
    if x.dim() != 3 or x.dtype not in DTYPES or 0 in x.shape[1:]:
        refuse(f"x must be a floating {axes} with no empty sequence, got {x.dtype} {list(x.shape)}")
    dim = x.shape[1 if layout == "bdl" else 2]
    if weight.dim() != 2 or weight.shape[0] != dim or not 1 <= weight.shape[1] <= MAX_WIDTH:
        refuse(f"weight must be [{dim}, width] with width from 1 to {MAX_WIDTH}, got {list(weight.shape)}")
    check_tensors("causal_conv1d", "x", x, {"weight": (weight, weight.shape), "bias": (bias, (dim,))}, ("bias",))
