"""Restormer's multi-Dconv head transposed attention, with its layer norm and residual, as one op."""

import torch
from torch import Tensor

from autohdr.kernels.backends import resolve
from autohdr.kernels.common import autocast, check_arguments, float_parameters
from autohdr.kernels.mdta import reference, schema  # noqa: F401  schema defines the op


def mdta(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    dwconv_weight: Tensor,
    temperature: Tensor,
    project_out_weight: Tensor,
    num_heads: int,
    *,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """Multi-Dconv head transposed attention: attention between channels, summed over the pixels.

    ``y = x + W_out · attn(v)``, where q, k, v are the thirds of ``dwconv3x3(W_qkv · norm(x))``, split into heads along the
    channels, and ``attn = softmax(temperature · q̂ k̂ᵀ)`` with q̂ and k̂ of unit length along the pixels (at least 1e-12).

    Saved for the backward pass: the inputs, q kᵀ and the lengths of q and k; everything image-sized is computed again.

    Args:
        x: [batch, channels, height, width], float32, bfloat16, float16 or float64, any strides (channels_last is taken without a
            copy). Under autocast it is cast, the parameters are not.
        norm_weight: [channels].
        norm_bias: [channels], or None for the bias-free norm (the variance is centred, the value is not).
        qkv_weight: [3 · channels, channels, 1, 1].
        dwconv_weight: [3 · channels, 1, 3, 3].
        temperature: [num_heads, 1, 1].
        project_out_weight: [channels, channels, 1, 1].
        num_heads: divides channels.
        eps: added to the norm's variance.
        backend: "auto", "cuda", "triton", "cpu" or "reference". Sums are accumulated in float32 (float64 for float64).

    Returns:
        y, the shape and dtype of x. The compiled backends give it channels_last strides.

    Raises:
        ValueError: an argument's shape, dtype or device does not fit, named with what was expected.
        RuntimeError: the named backend cannot run here.

    Source: Zamir et al., Restormer (CVPR 2022), section 3.1, equation 1.
    """
    channels = x.shape[1] if x.dim() == 4 else 0
    check_arguments(
        "mdta",
        x,
        {
            "norm_weight": (norm_weight, (channels,)),
            "norm_bias": (norm_bias, (channels,)),
            "qkv_weight": (qkv_weight, (3 * channels, channels, 1, 1)),
            "dwconv_weight": (dwconv_weight, (3 * channels, 1, 3, 3)),
            "temperature": (temperature, (num_heads, 1, 1)),
            "project_out_weight": (project_out_weight, (channels, channels, 1, 1)),
        },
    )
    if num_heads < 1 or channels % num_heads:
        raise ValueError(f"mdta: num_heads must divide the {channels} channels, got {num_heads}")
    x = autocast(x)
    backend = resolve("mdta", backend, x)
    parameters = (norm_weight, norm_bias, qkv_weight, dwconv_weight, temperature, project_out_weight)
    if backend == "reference":
        with torch.autocast(x.device.type, enabled=False):
            return reference.mdta(x, *parameters, num_heads, eps)
    x = x.contiguous(memory_format=torch.channels_last)
    return torch.ops.autohdr.mdta(x, *float_parameters(*parameters), num_heads, eps)[0]
