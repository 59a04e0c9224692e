"""The op autohdr::nafblock, and its passes autohdr::nafblock_statistics and autohdr::nafblock_apply over strips of an image."""

import torch

from autohdr.kernels.common import HALVES, channels_last
from autohdr.kernels.declare import declare, declare_pass
from autohdr.kernels.nafblock import reference


def _fake_means(x, dtype):
    return x.new_empty(x.shape[:2], dtype=dtype)


def _flops(x, *_) -> int:
    batch, channels, height, width = x
    return 2 * batch * height * width * (6 * channels * channels + 18 * channels)


nafblock = declare(
    reference.nafblock,
    dtypes={"cuda": HALVES, "triton": HALVES, "cpu": (torch.float32, torch.bfloat16)},
    outputs=("y", "means"),
    fake=lambda x, *_: (torch.empty_like(x), _fake_means(x, torch.float32)),
    flops=_flops,
    layout=channels_last,
)
nafblock_statistics = declare_pass(
    nafblock, reference.nafblock_statistics, outputs=("sums",), fake=lambda x, *_: _fake_means(x, torch.float64)
)
nafblock_apply = declare_pass(nafblock, reference.nafblock_apply, fake=lambda x, *_: torch.empty_like(x))
