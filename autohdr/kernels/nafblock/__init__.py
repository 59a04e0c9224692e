"""NAFNet's block as one op: both halves with their norms and residuals."""

from collections.abc import Sequence

import torch
from torch import Tensor

from autohdr.kernels.backends import preferred
from autohdr.kernels.common import WIDE, autocast, channels_of, check_image, check_tensors, keeps
from autohdr.kernels.nafblock import declaration


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
    *,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """A block of NAFNet, of two halves: ``m = x + beta ⊙ (W_3 · (s ⊙ t))`` and ``y = m + gamma ⊙ (W_5 · gate(W_4 · norm2(m)))``.

    ``t = gate(dwconv3x3(W_1 · norm1(x)))``, where gate multiplies the first half of the channels by the second, and the
    simplified channel attention ``s = W_sca · mean(t)`` is of the mean over all pixels; each convolution adds its bias. Saved
    for the backward pass: the inputs and the means; everything image-sized is computed again, but on a CPU from 256 channels
    on, where what lies between x and the second gate, norms apart, is saved too: six times x.

    Args:
        x: [batch, channels, height, width], float32, bfloat16, float16 or float64, any strides (channels_last is taken without a
            copy). Under autocast it is cast, the parameters are not.
        norm1_weight, norm1_bias, norm2_weight, norm2_bias: [channels].
        conv1_weight, conv4_weight: [2 · channels, channels, 1, 1].
        conv2_weight: [2 · channels, 1, 3, 3].
        sca_weight, conv3_weight, conv5_weight: [channels, channels, 1, 1].
        conv1_bias, conv2_bias, conv4_bias: [2 · channels].
        sca_bias, conv3_bias, conv5_bias: [channels].
        beta, gamma: [1, channels, 1, 1].
        eps: added to the norms' variances.
        backend: "auto", "cuda", "triton", "cpu" or "reference". Where gradients are taken of 256 channels or more on a GPU,
            "auto" is the reference, which keeps everything for the backward pass: what the kernels compute again is a third of
            all products (not measured). Sums are accumulated in float32 (float64 for float64).

    Returns:
        y, the shape and dtype of x. The compiled backends give it channels_last strides.

    Raises:
        ValueError: an argument's shape, dtype or device does not fit, named with what was expected.
        RuntimeError: the named backend cannot run here.

    Source: Chen et al., Simple Baselines for Image Restoration (ECCV 2022), sections 3 and 4.
    """
    parameters = (
        norm1_weight,
        norm1_bias,
        conv1_weight,
        conv1_bias,
        conv2_weight,
        conv2_bias,
        sca_weight,
        sca_bias,
        conv3_weight,
        conv3_bias,
        beta,
        norm2_weight,
        norm2_bias,
        conv4_weight,
        conv4_bias,
        conv5_weight,
        conv5_bias,
        gamma,
    )
    _check("nafblock", x, parameters)
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *parameters))
    if backend == "auto" and trains and x.shape[1] >= WIDE and not keeps(x):
        backend = preferred("reference")
    return declaration.nafblock(autocast(x), *parameters, eps, backend=backend)


def nafblock_statistics(
    x: Tensor, parameters: Sequence[Tensor], first: int, end: int, *, eps: float = 1e-6, backend: str = "auto"
) -> Tensor:
    """nafblock's first pass over a strip of an image: t, whose mean the channel attention takes, summed over some rows of x.

    The sums of strips that cover an image add up to the image's. Row first - 1 and row end must be in x unless the image ends
    there: the 3×3 convolution reads them. For inference: no gradients.

    Args:
        x: [batch, channels, rows, width], as for nafblock.
        parameters: nafblock's, in its order, from norm1_weight to gamma.
        first, end: the rows [first, end) are summed, 0 <= first < end <= rows.
        eps, backend: as for nafblock.

    Returns:
        The sums [batch, channels], float64.

    Raises:
        ValueError, RuntimeError: as nafblock; also for rows that x has not.
    """
    _check("nafblock_statistics", x, parameters)
    if not 0 <= first < end <= x.shape[2]:
        raise ValueError(f"nafblock_statistics: first and end must be rows of x, which has {x.shape[2]}, got {first} and {end}")
    return declaration.nafblock_statistics(autocast(x), *parameters[:6], eps, first, end, backend=backend)


def nafblock_apply(x: Tensor, parameters: Sequence[Tensor], means: Tensor, *, eps: float = 1e-6, backend: str = "auto") -> Tensor:
    """nafblock of a strip of an image, whose means of t over all pixels are given (see nafblock_statistics).

    The first and the last row of the result are right only where the image ends there: their neighbours are not in x. For
    inference: no gradients.

    Args:
        x, parameters, eps, backend: as for nafblock_statistics.
        means: [batch, channels], of any floating dtype.

    Returns:
        y, the shape and dtype of x.

    Raises:
        ValueError, RuntimeError: as nafblock; also where means are not those of such an image.
    """
    _check("nafblock_apply", x, parameters)
    check_tensors("nafblock_apply", "x", x, {"means": (means, tuple(x.shape[:2]))})
    x = autocast(x)
    wide = torch.promote_types(x.dtype, torch.float32)
    return declaration.nafblock_apply(x, *parameters, means.to(wide), eps, backend=backend)


def _check(op: str, x: Tensor, parameters: Sequence[Tensor]) -> None:
    c = channels_of(x)
    vector, double, square, scale = (c,), (2 * c,), (c, c, 1, 1), (1, c, 1, 1)
    expand = (2 * c, c, 1, 1)
    expected = {
        "norm1_weight": vector,
        "norm1_bias": vector,
        "conv1_weight": expand,
        "conv1_bias": double,
        "conv2_weight": (2 * c, 1, 3, 3),
        "conv2_bias": double,
        "sca_weight": square,
        "sca_bias": vector,
        "conv3_weight": square,
        "conv3_bias": vector,
        "beta": scale,
        "norm2_weight": vector,
        "norm2_bias": vector,
        "conv4_weight": expand,
        "conv4_bias": double,
        "conv5_weight": square,
        "conv5_bias": vector,
        "gamma": scale,
    }
    if len(parameters) != len(expected):
        raise ValueError(f"{op}: parameters must be {', '.join(expected)}, got {len(parameters)} of them")
    pairs = zip(parameters, expected.values(), strict=True)
    check_image(op, x, dict(zip(expected, pairs, strict=True)), ())
