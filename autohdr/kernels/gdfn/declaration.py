"""The op autohdr::gdfn."""

import torch

from autohdr.kernels.common import HALVES, channels_last
from autohdr.kernels.declare import declare
from autohdr.kernels.gdfn import reference


def _flops(x, norm_weight, norm_bias, project_in_weight, dwconv_weight, project_out_weight, *_) -> int:
    batch, channels, height, width = x
    hidden = project_out_weight[1]
    return 2 * batch * height * width * (3 * channels * hidden + 18 * hidden)


gdfn = declare(
    reference.gdfn,
    dtypes={"cuda": HALVES, "triton": HALVES, "cpu": (torch.float32, torch.bfloat16)},
    fake=lambda x, *_: torch.empty_like(x),
    flops=_flops,
    layout=channels_last,
)
