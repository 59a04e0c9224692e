"""Restormer's gated-Dconv feed-forward network, with its layer norm and residual, as one op."""

from torch import Tensor

from autohdr.kernels.common import autocast, channels_of, check_image
from autohdr.kernels.gdfn import declaration


def gdfn(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    project_in_weight: Tensor,
    dwconv_weight: Tensor,
    project_out_weight: Tensor,
    *,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """Gated-Dconv feed-forward network: ``y = x + W_out · (gelu(a) ⊙ b)``.

    a and b are the halves of ``dwconv3x3(W_in · norm(x))``; gelu is the exact one. Saved for the backward pass: the inputs alone,
    and on a CPU, from 256 channels on, ``W_in · norm(x)``; everything else is computed again.

    Args:
        x: [batch, channels, height, width], float32, bfloat16, float16 or float64, any strides (channels_last is taken without a
            copy). Under autocast it is cast, the parameters are not.
        norm_weight: [channels].
        norm_bias: [channels], or None for the bias-free norm (the variance is centred, the value is not).
        project_in_weight: [2 · hidden, channels, 1, 1].
        dwconv_weight: [2 · hidden, 1, 3, 3].
        project_out_weight: [channels, hidden, 1, 1].
        eps: added to the norm's variance.
        backend: "auto", "cuda", "triton", "cpu" or "reference". Sums are accumulated in float32 (float64 for float64).

    Returns:
        y, the shape and dtype of x. The compiled backends give it channels_last strides.

    Raises:
        ValueError: an argument's shape, dtype or device does not fit, named with what was expected.
        RuntimeError: the named backend cannot run here.

    Source: Zamir et al., Restormer (CVPR 2022), section 3.2, equation 2.
    """
    parameters = (norm_weight, norm_bias, project_in_weight, dwconv_weight, project_out_weight)
    _check("gdfn", x, *parameters)
    return declaration.gdfn(autocast(x), *parameters, eps, backend=backend)


def gdfn_int8(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    project_in_weight: Tensor,
    project_in_scale: Tensor,
    dwconv_weight: Tensor,
    project_out_weight: Tensor,
    project_out_scale: Tensor,
    *,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """gdfn with its 1×1 products in 8 bits: ``y = x + s_out ⊙ (W_out · code(gelu(a) ⊙ b))``. For inference: no gradients.

    a and b are the halves of ``dwconv3x3(s_in ⊙ (W_in · code(norm(x))))``, and code rounds to the nearest integer from -127 to
    127, of two to the even one. So the scales of what becomes codes are in norm_weight and norm_bias, and in the second half of
    dwconv_weight, a number a channel: autohdr.models.int8 has them from photos. Sums of codes are exact, all else is float32.

    Args:
        x, norm_weight, norm_bias, dwconv_weight, eps: as for gdfn. What has no number, of a NaN in x, gets any code.
        project_in_weight: int8 [2 · hidden, channels, 1, 1], from -127 to 127.
        project_in_scale: [2 · hidden].
        project_out_weight: int8 [channels, hidden, 1, 1], from -127 to 127.
        project_out_scale: [channels].
        backend: "auto", "cpu" or "reference".

    Returns:
        y, the shape and dtype of x. The compiled backend gives it channels_last strides.

    Raises:
        ValueError, RuntimeError: as gdfn.
    """
    _check(
        "gdfn_int8",
        x,
        norm_weight,
        norm_bias,
        project_in_weight,
        dwconv_weight,
        project_out_weight,
        int8=("project_in_weight", "project_out_weight"),
        project_in_scale=project_in_scale,
        project_out_scale=project_out_scale,
    )
    into, out = (project_in_weight, project_in_scale), (project_out_weight, project_out_scale)
    return declaration.gdfn_int8(autocast(x), norm_weight, norm_bias, *into, dwconv_weight, *out, eps, backend=backend)


def _check(
    op: str,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    project_in_weight: Tensor,
    dwconv_weight: Tensor,
    project_out_weight: Tensor,
    int8: tuple[str, ...] = (),
    **scales: Tensor,
) -> None:
    """Raises ValueError for an argument that does not fit. scales: those of gdfn_int8, whose weights are named in int8."""
    channels = channels_of(x)
    hidden = project_out_weight.shape[1] if isinstance(project_out_weight, Tensor) and project_out_weight.dim() == 4 else 0
    expected = {
        "norm_weight": (norm_weight, (channels,)),
        "norm_bias": (norm_bias, (channels,)),
        "project_in_weight": (project_in_weight, (2 * hidden, channels, 1, 1)),
        "dwconv_weight": (dwconv_weight, (2 * hidden, 1, 3, 3)),
        "project_out_weight": (project_out_weight, (channels, hidden, 1, 1)),
    }
    rows = {"project_in_scale": (2 * hidden,), "project_out_scale": (channels,)}
    check_image(op, x, expected | {name: (scale, rows[name]) for name, scale in scales.items()}, int8=int8)
    if hidden == 0:
        raise ValueError(f"{op}: project_out_weight must be [channels, hidden, 1, 1], got {list(project_out_weight.shape)}")
