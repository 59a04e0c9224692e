"""The ops autohdr::gdfn and autohdr::gdfn_int8."""

import torch

from autohdr.kernels.common import HALVES, channels_last
from autohdr.kernels.declare import declare, declare_inference
from autohdr.kernels.gdfn import reference


def _flops(x, norm_weight, norm_bias, project_in_weight, *_) -> int:
    batch, channels, height, width = x
    hidden = project_in_weight[0] // 2
    return 2 * batch * height * width * (3 * channels * hidden + 18 * hidden)


gdfn = declare(
    reference.gdfn,
    dtypes={"cuda": HALVES, "triton": HALVES, "cpu": (torch.float32, torch.bfloat16)},
    fake=lambda x, *_: torch.empty_like(x),
    flops=_flops,
    layout=channels_last,
)
gdfn_int8 = declare_inference(
    reference.gdfn_int8,
    dtypes={"cpu": (torch.float32, torch.bfloat16)},
    fake=lambda x, *_: torch.empty_like(x),
    flops=_flops,
    layout=channels_last,
)
