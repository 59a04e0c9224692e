"""A retoucher's edit of an image: curves, a colour matrix, and a grid of local adjustments, as one op."""

from torch import Tensor

from autohdr.kernels.apply_edit import declaration
from autohdr.kernels.apply_edit.reference import WHITE
from autohdr.kernels.common import DTYPES, autocast, check_tensors


def apply_edit(x: Tensor, curves: Tensor, matrix: Tensor, grid: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Curves, a 3×4 matrix, and a bilateral grid of 3×4 matrices: ``m = M · [c_r(r), c_g(g), c_b(b), 1]``, ``y = G · [m, 1]``.

    c is linear between its knots, which stand at 0, 1 / (knots - 1), ..., 1, and goes on beyond them as at its ends. G lies
    between the eight nearest points of the grid, by the pixel's place and by m's luma (Rec. 709) in [0, 1]: rows and columns are
    cells of the image, whose centres are the points, the first and the last bin stand at luma 0 and 1, and outside them G is
    the nearest point's. Without a grid y is m. Each pixel is read once; saved for the backward pass: the inputs alone.

    Args:
        x: [batch, 3, height, width], RGB, nominally in [0, 1], float32, bfloat16, float16 or float64; or uint8 or uint16, a
            photo's own samples, which have no gradients. Any strides (channels_last is taken without a copy). Under autocast
            it is cast where it is floating, the parameters are not.
        curves: [batch, 3, knots], at least two knots.
        matrix: [batch, 3, 4].
        grid: [batch, rows, columns, bins, 3, 4], or None.
        backend: "auto", "cuda", "triton", "cpu" or "reference". Computes in float32 (float64 for float64).

    Returns:
        y, the shape and dtype of x; integers rounded and clipped to their range, floats not. The compiled backends give it
        channels_last strides.

    Raises:
        ValueError: an argument's shape, dtype or device does not fit, named with what was expected.
        RuntimeError: the named backend cannot run here; or, on CUDA, the edit does not fit the shared memory of a block: columns
            times bins above some 1,000, with gradients 700.

    Source: Gharbi et al., Deep Bilateral Learning for Real-Time Image Enhancement (SIGGRAPH 2017), sections 3.3 and 3.4.
    """
    if not isinstance(x, Tensor) or x.dim() != 4 or x.dtype not in (*DTYPES, *WHITE) or x.shape[1] != 3 or 0 in x.shape[2:]:
        got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(
            f"apply_edit: x must be floating, uint8 or uint16 [batch, 3, height, width] with no empty image, got {got}"
        )
    batch = x.shape[0]
    knots = curves.shape[2] if isinstance(curves, Tensor) and curves.dim() == 3 else 0
    cells = tuple(grid.shape[1:4]) if isinstance(grid, Tensor) and grid.dim() == 6 else (0, 0, 0)
    expected = {"curves": (curves, (batch, 3, knots)), "matrix": (matrix, (batch, 3, 4)), "grid": (grid, (batch, *cells, 3, 4))}
    check_tensors("apply_edit", "x", x, expected, ("grid",))
    if knots < 2:
        raise ValueError(f"apply_edit: curves must be [batch, 3, knots] with at least 2 knots, got {list(curves.shape)}")
    if grid is not None and 0 in cells:
        raise ValueError(f"apply_edit: grid must have rows, columns and bins, got {list(grid.shape)}")
    return declaration.apply_edit(autocast(x) if x.is_floating_point() else x, curves, matrix, grid, backend=backend)
