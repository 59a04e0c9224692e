"""restormer_base at 384×384: forward in float32 and bfloat16, and a training step; compiled kernels against the reference."""

import pytest
import torch
from conftest import refuse_if_wrong

from autohdr import create_model, kernels

SIDE = 384
CASES = [
    ("forward", "float32", "cpu"),
    ("forward", "float32", "reference"),
    ("forward", "bfloat16", "cpu"),
    ("forward", "bfloat16", "reference"),
    ("training", "float32", "cpu"),
    ("training", "float32", "reference"),
]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model("restormer_base").to(memory_format=torch.channels_last)


@pytest.mark.parametrize(("mode", "dtype", "backend"), CASES)
def test_restormer(timed, model, mode, dtype, backend):
    torch.manual_seed(1)
    x = torch.rand(1, 3, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
    facts = {"op": "restormer_base", "shape": f"3×{SIDE}×{SIDE}", "mode": mode, "backend": backend, "dtype": dtype}

    def forward():
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            return model(x)

    def step():
        model.zero_grad(set_to_none=True)
        (model(x) - x).abs().mean().backward()

    kernels.set_backend("reference")
    try:
        with torch.inference_mode():
            expected = model(x)
        kernels.set_backend(backend)
        refuse_if_wrong(forward().float() - x, expected - x, 1e-4 if dtype == "float32" else 5e-2)
        timed(forward if mode == "forward" else step, **facts)
    finally:
        kernels.set_backend("auto")
        model.zero_grad(set_to_none=True)
