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
    ("training", "float32", "cpu"),
    ("training", "float32", "reference"),
]


def run(model, x, mode, dtype, backend):
    """What the model adds to x, or all gradients of a training step in one."""
    kernels.set_backend(backend)
    try:
        if mode == "forward":
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                return [model(x).float() - x]
        model.zero_grad(set_to_none=True)
        (model(x) - x).abs().mean().backward()
        return [torch.cat([p.grad.flatten() for p in model.parameters()])]
    finally:
        kernels.set_backend("auto")


@pytest.fixture(scope="module")
def subject():
    torch.manual_seed(0)
    model = create_model("restormer_base").to(memory_format=torch.channels_last)
    return model, torch.rand(1, 3, SIDE, SIDE).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("mode", "dtype", "backend"), CASES)
def test_restormer(timed, subject, mode, dtype, backend):
    model, x = subject
    facts = {"op": "restormer_base", "shape": f"3×{SIDE}×{SIDE}", "mode": mode, "backend": backend, "dtype": dtype}
    timed(lambda: run(model, x, mode, dtype, backend), **facts)
    if backend != "reference":
        actual = run(model, x, mode, dtype, backend)
        limit = {"forward": 1e-4, "training": 1e-3}[mode] if dtype == "float32" else 5e-2
        refuse_if_wrong(actual, run(model, x, mode, "float32", "reference"), limit)
    model.zero_grad(set_to_none=True)
