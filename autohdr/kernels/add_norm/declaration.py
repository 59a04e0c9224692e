"""The op autohdr::add_norm."""

import math

from torch import Tensor

from autohdr.kernels.add_norm import reference
from autohdr.kernels.common import HALVES, contiguous_like, parameter
from autohdr.kernels.declare import declare


def _prepare(x, branch, scale, norm_weight, norm_bias, eps):
    return x.contiguous(), branch.contiguous(), *map(parameter, (scale, norm_weight, norm_bias)), eps


def _flops(x, *_) -> int:
    """Of a number: its residual, its part in mean and variance, its norm with weight and bias."""
    return 9 * math.prod(x)


add_norm = declare(
    reference.add_norm,
    dtypes={"cuda": HALVES, "triton": HALVES, "cpu": HALVES},
    outputs=("y", "normed"),
    differentiable=2,
    fake=lambda x, branch, *_: (contiguous_like(x), contiguous_like(branch)),
    flops=_flops,
    layout=Tensor.contiguous,
    prepare=_prepare,
    like=contiguous_like,
)
