"""The ops autohdr::mdta and autohdr::mdta_int8, and the passes of each, such as autohdr::mdta_statistics and autohdr::mdta_apply,
over strips of an image."""

import torch

from autohdr.kernels.common import HALVES, channels_last
from autohdr.kernels.declare import declare, declare_inference, declare_pass
from autohdr.kernels.mdta import reference


def _fake_sums(x, num_heads, dtype):
    batch, channels = x.shape[:2]
    size = channels // num_heads
    sizes = (batch, num_heads, size, size), (batch, channels), (batch, channels)
    return tuple(x.new_empty(s, dtype=dtype) for s in sizes)


def _flops(x, num_heads) -> int:
    batch, channels, height, width = x
    per_pixel = 3 * channels * channels + 27 * channels + 2 * channels * (channels // num_heads) + channels * channels
    return 2 * batch * height * width * per_pixel


mdta = declare(
    reference.mdta,
    dtypes={"cuda": HALVES, "triton": HALVES, "cpu": (torch.float32, torch.bfloat16)},
    outputs=("y", "gram", "q_norm", "k_norm"),
    fake=lambda x, *rest: (torch.empty_like(x), *_fake_sums(x, rest[6], torch.float32)),
    flops=lambda x, *rest: _flops(x, rest[6]),
    layout=channels_last,
)
mdta_statistics = declare_pass(
    mdta,
    reference.mdta_statistics,
    outputs=("gram", "q_square", "k_square"),
    fake=lambda x, *rest: _fake_sums(x, rest[6], torch.float64),
)
mdta_apply = declare_pass(mdta, reference.mdta_apply, fake=lambda x, *_: torch.empty_like(x))
mdta_int8 = declare_inference(
    reference.mdta_int8,
    dtypes={"cpu": (torch.float32, torch.bfloat16)},
    fake=lambda x, *_: torch.empty_like(x),
    flops=lambda x, *rest: _flops(x, rest[8]),
    layout=channels_last,
)
mdta_int8_statistics = declare_pass(
    mdta_int8,
    reference.mdta_int8_statistics,
    outputs=("gram", "q_square", "k_square"),
    fake=lambda x, *rest: _fake_sums(x, rest[8], torch.float64),
)
mdta_int8_apply = declare_pass(mdta_int8, reference.mdta_int8_apply, fake=lambda x, *_: torch.empty_like(x))
