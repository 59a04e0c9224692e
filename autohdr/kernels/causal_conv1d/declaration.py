"""The op autohdr::causal_conv1d."""

from autohdr.kernels.causal_conv1d import reference
from autohdr.kernels.common import HALVES, contiguous_like
from autohdr.kernels.declare import declare


def _flops(x, weight, *_) -> int:
    batch, a, b = x
    return 2 * batch * a * b * weight[1]


causal_conv1d = declare(
    reference.causal_conv1d,
    dtypes={"cuda": HALVES, "triton": HALVES, "cpu": HALVES},
    fake=lambda x, *_: contiguous_like(x),
    flops=_flops,
    layout=lambda x: x if x.stride(2) == 1 else x.contiguous(),
    like=contiguous_like,
)
