"""causal_conv1d in plain PyTorch: the definition the other backends are checked against, in any floating dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool, channel_last: bool) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    sequence = (x.mT if channel_last else x).to(wide)
    edge = weight.shape[1] - 1
    padded = F.pad(sequence, (0, edge) if reverse else (edge, 0))
    taps = (weight.flip(1) if reverse else weight).to(wide)[:, None]
    y = F.silu(F.conv1d(padded, taps, None if bias is None else bias.to(wide), groups=len(weight)))
    return (y.mT if channel_last else y).to(x.dtype)
