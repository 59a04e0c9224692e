"""Mamba's short causal convolution and the SiLU behind it, as one op."""

import torch
from torch import Tensor

from autohdr.kernels.backends import resolve
from autohdr.kernels.causal_conv1d import reference, schema  # noqa: F401  schema defines the op
from autohdr.kernels.common import DTYPES, autocast, compiled_op, float_parameters

MAX_WIDTH = 16
"""By the shared memory of the smallest GPUs."""


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    reverse: bool = False,
    layout: str = "bdl",
    *,
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
    x = autocast(x)
    backend = resolve("causal_conv1d", backend, x)
    if backend == "reference":
        with torch.autocast(x.device.type, enabled=False):
            return reference.causal_conv1d(x, weight, bias, reverse, layout == "bld")
    x = x if x.stride(2) == 1 else x.contiguous()
    return compiled_op("causal_conv1d", backend)(x, *float_parameters(weight, bias), reverse, layout == "bld")


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
    if bias is not None and bias.shape != (dim,):
        refuse(f"bias must be [{dim}], got {list(bias.shape)}")
    for name, t in {"weight": weight, "bias": bias}.items():
        if t is not None and t.device != x.device:
            refuse(f"{name} must be on {x.device} as x is, got {t.device}")
        if t is not None and not t.dtype.is_floating_point:
            refuse(f"{name} must be floating, got {t.dtype}")
