"""The op autohdr::apply_edit."""

import torch

from autohdr.kernels.apply_edit import reference
from autohdr.kernels.common import HALVES, channels_last
from autohdr.kernels.declare import declare


def _flops(x, curves, matrix, grid=None, *_) -> int:
    batch, _, height, width = x
    return 2 * batch * height * width * (3 + 9 + (12 * 7 + 9 if grid else 0))


apply_edit = declare(
    reference.apply_edit,
    dtypes={
        "cuda": (*HALVES, *reference.WHITE),
        "triton": (*HALVES, *reference.WHITE),
        "cpu": (torch.float32, torch.bfloat16, *reference.WHITE),
    },
    fake=lambda x, *_: torch.empty_like(x),
    flops=_flops,
    layout=channels_last,
)
