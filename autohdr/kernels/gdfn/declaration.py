"""The ops autohdr::gdfn and autohdr::gdfn_int8."""

import torch

from autohdr.kernels.common import HALVES, channels_last, fake_kept
from autohdr.kernels.declare import declare, declare_inference
from autohdr.kernels.gdfn import reference


def _fake(x, norm_weight, norm_bias, project_in_weight, *arguments):
    return torch.empty_like(x), fake_kept(x, project_in_weight.shape[0], arguments[-1])


def _flops(x, norm_weight, norm_bias, project_in_weight, *_) -> int:
    batch, channels, height, width = x
    hidden = project_in_weight[0] // 2
    return 2 * batch * height * width * (3 * channels * hidden + 18 * hidden)


gdfn = declare(
    reference.gdfn,
    dtypes={"cuda": HALVES, "triton": HALVES, "cpu": (torch.float32, torch.bfloat16)},
    outputs=("y", "kept"),
    keep="keep",
    fake=_fake,
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
