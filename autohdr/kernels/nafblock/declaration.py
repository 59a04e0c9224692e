"""The op autohdr::nafblock, and its passes autohdr::nafblock_statistics and autohdr::nafblock_apply over strips of an image."""

import torch

from autohdr.kernels.common import HALVES, channels_last, fake_kept
from autohdr.kernels.declare import declare, declare_pass
from autohdr.kernels.nafblock import reference

KEPT_IMAGES = 6
"""Images that the forward pass may keep; kKeptImages in nafblock.h."""


def _fake_means(x, dtype):
    return x.new_empty(x.shape[:2], dtype=dtype)


def _fake(x, *arguments):
    kept = fake_kept(x, KEPT_IMAGES * x.shape[1], arguments[-1])
    return torch.empty_like(x), _fake_means(x, torch.float32), kept


def _flops(x, *_) -> int:
    batch, channels, height, width = x
    return 2 * batch * height * width * (6 * channels * channels + 18 * channels)


nafblock = declare(
    reference.nafblock,
    dtypes={"cuda": HALVES, "triton": HALVES, "cpu": (torch.float32, torch.bfloat16)},
    outputs=("y", "means", "kept"),
    keep="keep",
    fake=_fake,
    flops=_flops,
    layout=channels_last,
)
nafblock_statistics = declare_pass(
    nafblock, reference.nafblock_statistics, outputs=("sums",), fake=lambda x, *_: _fake_means(x, torch.float64)
)
nafblock_apply = declare_pass(nafblock, reference.nafblock_apply, fake=lambda x, *_: torch.empty_like(x))
