"""Restormer's multi-Dconv head transposed attention, with its layer norm and residual, as one op."""

from collections.abc import Sequence

from torch import Tensor

from autohdr.kernels.common import autocast, channels_of, check_image, check_tensors
from autohdr.kernels.declare import Op
from autohdr.kernels.mdta import declaration, reference


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
    parameters = (norm_weight, norm_bias, qkv_weight, dwconv_weight, temperature, project_out_weight)
    _check("mdta", x, parameters, num_heads)
    return declaration.mdta(autocast(x), *parameters, num_heads, eps, backend=backend)


def mdta_statistics(
    x: Tensor,
    parameters: Sequence[Tensor | None],
    num_heads: int,
    first: int,
    end: int,
    *,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """mdta's first pass over a strip of an image: what its attention needs, summed over the rows [first, end) of x.

    The sums of strips that cover an image add up to the image's. Row first - 1 and row end must be in x unless the image ends
    there: the 3×3 convolution reads them. For inference: no gradients.

    Args:
        x: [batch, channels, rows, width], as for mdta.
        parameters: mdta's, in its order, from norm_weight to project_out_weight.
        num_heads, eps, backend: as for mdta.
        first, end: rows of x, 0 <= first < end <= rows.

    Returns:
        q kᵀ [batch, num_heads, channels / num_heads, channels / num_heads], and the sums of squares of q and of k
        [batch, channels], all float64.

    Raises:
        ValueError, RuntimeError: as mdta; also for rows that x has not.
    """
    return _statistics(declaration.mdta_statistics, x, parameters, num_heads, first, end, eps, backend)


def mdta_apply(
    x: Tensor,
    parameters: Sequence[Tensor | None],
    num_heads: int,
    statistics: Sequence[Tensor],
    *,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """mdta's second pass over a strip of an image, whose sums over all rows are `statistics` (see mdta_statistics).

    The first and the last row of the result are right only where the image ends there: their neighbours are not in x. For
    inference: no gradients.

    Args:
        x, parameters, num_heads, eps, backend: as for mdta_statistics.
        statistics: what mdta_statistics returns, of any floating dtype.

    Returns:
        y, the shape and dtype of x.

    Raises:
        ValueError, RuntimeError: as mdta; also where statistics are not those of such an image.
    """
    return _apply(declaration.mdta_apply, x, parameters, num_heads, statistics, eps, backend)


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
    *,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """mdta with its 1×1 products in 8 bits: ``y = x + s ⊙ (code(M / s) · code(v))``. For inference: no gradients.

    q, k, v are the thirds of ``dwconv3x3(s_qkv ⊙ (W_qkv · code(norm(x))))``. M is ``W_out · attn · diag(v_scale)``, one matrix an
    image, and s the largest magnitude of each of its rows over 127. code rounds to the nearest integer from -127 to 127, of two
    to the even one. So the scales of what becomes codes are in norm_weight and norm_bias, and in the last third of dwconv_weight,
    a number a channel; v_scale undoes the latter. autohdr.models.int8 has them from photos. Sums of codes are exact, all else is
    float32, q kᵀ too.

    Args:
        x, norm_weight, norm_bias, dwconv_weight, temperature, project_out_weight, num_heads, eps: as for mdta. What has no
            number, of a NaN in x, gets any code.
        qkv_weight: int8 [3 · channels, channels, 1, 1], from -127 to 127.
        qkv_scale: [3 · channels].
        v_scale: [channels], what a code of v stands for.
        backend: "auto", "cpu" or "reference".

    Returns:
        y, the shape and dtype of x. The compiled backend gives it channels_last strides.

    Raises:
        ValueError, RuntimeError: as mdta.
    """
    expansion = norm_weight, norm_bias, qkv_weight, qkv_scale, dwconv_weight
    parameters = (*expansion, temperature, project_out_weight, v_scale)
    _check("mdta_int8", x, parameters, num_heads)
    return declaration.mdta_int8(autocast(x), *parameters, num_heads, eps, backend=backend)


def mdta_int8_statistics(
    x: Tensor,
    parameters: Sequence[Tensor | None],
    num_heads: int,
    first: int,
    end: int,
    *,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """mdta_statistics of mdta_int8, whose parameters it takes, from norm_weight to v_scale."""
    return _statistics(declaration.mdta_int8_statistics, x, parameters, num_heads, first, end, eps, backend)


def mdta_int8_apply(
    x: Tensor,
    parameters: Sequence[Tensor | None],
    num_heads: int,
    statistics: Sequence[Tensor],
    *,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """mdta_apply of mdta_int8, whose parameters it takes, from norm_weight to v_scale."""
    return _apply(declaration.mdta_int8_apply, x, parameters, num_heads, statistics, eps, backend)


def _statistics(
    op: Op, x: Tensor, parameters: Sequence[Tensor | None], num_heads: int, first: int, end: int, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    _check(op.name, x, parameters, num_heads)
    if not 0 <= first < end <= x.shape[2]:
        raise ValueError(f"{op.name}: first and end must be rows of x, which has {x.shape[2]}, got {first} and {end}")
    return op(autocast(x), *parameters, num_heads, eps, first, end, backend=backend)


def _apply(
    op: Op,
    x: Tensor,
    parameters: Sequence[Tensor | None],
    num_heads: int,
    statistics: Sequence[Tensor],
    eps: float,
    backend: str,
) -> Tensor:
    _check(op.name, x, parameters, num_heads)
    if len(statistics) != 3:
        expected = f"the three tensors of {op.op}_statistics"
        raise ValueError(f"{op.name}: statistics must be {expected}, got {len(statistics)}")
    (batch, channels), size = x.shape[:2], x.shape[1] // num_heads
    shapes = (batch, num_heads, size, size), (batch, channels), (batch, channels)
    expected = {f"statistics[{i}]": pair for i, pair in enumerate(zip(statistics, shapes, strict=True))}
    check_tensors(op.name, "x", x, expected)
    x = autocast(x)
    gram, q_square, k_square = statistics
    attention = reference.lengths(gram, q_square, k_square, x.dtype)
    return op(x, *parameters, *attention, num_heads, eps, backend=backend)


def _check(op: str, x: Tensor, parameters: Sequence[Tensor | None], num_heads: int) -> None:
    c, int8 = channels_of(x), op.startswith("mdta_int8")
    shapes = {
        "norm_weight": (c,),
        "norm_bias": (c,),
        "qkv_weight": (3 * c, c, 1, 1),
        **({"qkv_scale": (3 * c,)} if int8 else {}),
        "dwconv_weight": (3 * c, 1, 3, 3),
        "temperature": (num_heads, 1, 1),
        "project_out_weight": (c, c, 1, 1),
        **({"v_scale": (c,)} if int8 else {}),
    }
    if len(parameters) != len(shapes):
        raise ValueError(f"{op}: parameters must be {', '.join(shapes)}, got {len(parameters)} of them")
    expected = dict(zip(shapes, zip(parameters, shapes.values(), strict=True), strict=True))
    check_image(op, x, expected, int8=("qkv_weight",) * int8)
    if num_heads < 1 or c % num_heads:
        raise ValueError(f"{op}: num_heads must divide the {c} channels, got {num_heads}")
