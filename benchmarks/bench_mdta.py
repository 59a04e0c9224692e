"""mdta at the four levels of restormer_base for a 384×384 image: forward and training step, compiled against reference."""

import pytest
import torch
from conftest import refuse_if_wrong

from autohdr.kernels import mdta

LEVELS = [(48, 1, 384), (96, 2, 192), (192, 4, 96), (384, 8, 48)]  # channels, heads, side


def arguments(channels, heads, side):
    torch.manual_seed(0)
    x = torch.randn(1, channels, side, side).contiguous(memory_format=torch.channels_last)
    weights = [
        torch.rand(channels) + 0.5,
        torch.randn(channels) * 0.1,
        torch.randn(3 * channels, channels, 1, 1) / channels**0.5,
        torch.randn(3 * channels, 1, 3, 3) / 3,
        torch.ones(heads, 1, 1),
        torch.randn(channels, channels, 1, 1) / channels**0.5,
    ]
    return [x, *weights], torch.randn_like(x)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize(("channels", "heads", "side"), LEVELS)
def test_mdta(timed, channels, heads, side, mode, backend):
    tensors, dy = arguments(channels, heads, side)
    facts = {"op": "mdta", "shape": f"{channels}×{side}×{side}", "mode": mode, "backend": backend, "dtype": "float32"}

    def forward(backend=backend):
        with torch.inference_mode():
            return [mdta(*tensors, heads, backend=backend)]

    def step(backend=backend):
        leaves = [t.detach().requires_grad_() for t in tensors]
        return torch.autograd.grad(mdta(*leaves, heads, backend=backend), leaves, dy)

    function = forward if mode == "forward" else step
    timed(function, **facts)
    refuse_if_wrong(function(), function("reference"), 1e-4)
