"""Training losses: scalars of two image batches."""

from torch import Tensor


def l1(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error, mean |output - target|, taken in float32 whatever the inputs' dtype.

    output, target: (B, 3, H, W), sRGB-encoded values, nominally in [0, 1]. Returns a float32 scalar.
    """
    return (output.float() - target.float()).abs().mean()
