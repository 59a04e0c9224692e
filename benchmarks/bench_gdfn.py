"""gdfn at the four levels of restormer_base for a 384×384 image: forward and training step, compiled against reference."""

import pytest
import torch
from conftest import refuse_if_wrong

from autohdr.kernels import gdfn

LEVELS = [(48, 127, 384), (96, 255, 192), (192, 510, 96), (384, 1021, 48)]  # channels, hidden channels, side


def arguments(channels, hidden, side):
    torch.manual_seed(0)
    x = torch.randn(1, channels, side, side).contiguous(memory_format=torch.channels_last)
    weights = [
        torch.rand(channels) + 0.5,
        torch.randn(channels) * 0.1,
        torch.randn(2 * hidden, channels, 1, 1) / channels**0.5,
        torch.randn(2 * hidden, 1, 3, 3) / 3,
        torch.randn(channels, hidden, 1, 1) / hidden**0.5,
    ]
    return [x, *weights], torch.randn_like(x)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize(("channels", "hidden", "side"), LEVELS)
def test_gdfn(timed, channels, hidden, side, mode, backend):
    tensors, dy = arguments(channels, hidden, side)
    facts = {"op": "gdfn", "shape": f"{channels}×{side}×{side}", "mode": mode, "backend": backend, "dtype": "float32"}

    def forward(backend=backend):
        with torch.inference_mode():
            return [gdfn(*tensors, backend=backend)]

    def step(backend=backend):
        leaves = [t.detach().requires_grad_() for t in tensors]
        return torch.autograd.grad(gdfn(*leaves, backend=backend), leaves, dy)

    function = forward if mode == "forward" else step
    timed(function, **facts)
    refuse_if_wrong(function(), function("reference"), 1e-4)
