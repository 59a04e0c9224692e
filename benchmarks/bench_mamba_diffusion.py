"""A training step of MambaDiffusion: forward, backward, AdamW. On a GPU mamba_diffusion_large at 384×384 in bfloat16 (autocast).

On a CPU mamba_diffusion_nano at 64×64 in float32; a step of the large one takes a CPU many minutes.
"""

import functools

import pytest
import torch
from measuring import DEVICE, columns, relative_error

from autohdr import create_model, kernels

NAME, SIDE, DTYPE = {
    "cpu": ("mamba_diffusion_nano", 64, "float32"),
    "cuda": ("mamba_diffusion_large", 384, "bfloat16"),
}[DEVICE]
CHECKED = 32  # pixels a side: the loop that it is checked against runs through every token
LIMITS = {"float32": 1e-3, "bfloat16": 5e-2}


def fresh():
    """The same weights every time."""
    torch.manual_seed(0)
    return create_model(NAME).to(DEVICE, memory_format=torch.channels_last), torch.rand(1, 3, SIDE, SIDE, device=DEVICE)


def backward(model, source, backend: str, dtype: str) -> None:
    """Leaves the gradient in the parameters."""
    kernels.set_backend(backend)
    try:
        model.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == "bfloat16"):
            output = model(source)
        (output.float() - source.sqrt()).abs().mean().backward()
    finally:
        kernels.set_backend("auto")


def small_gradient(model, source, backend: str, dtype: str) -> list[torch.Tensor]:
    backward(model, source[..., :CHECKED, :CHECKED], backend, dtype)
    return [torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).cpu()]


@functools.cache
def gold() -> list[torch.Tensor]:
    return small_gradient(*fresh(), "reference", "float32")


# The loop would take minutes at 384×384.
@pytest.mark.parametrize("column", [n for n in columns("selective_scan", "causal_conv1d") if DEVICE == "cpu" or n != "reference"])
def test_mamba_diffusion(timed, column):
    expected = gold()
    model, source = fresh()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, weight_decay=0.01)
    error = relative_error(small_gradient(model, source, column, DTYPE), expected)

    def step() -> list[torch.Tensor]:
        backward(model, source, column, DTYPE)
        optimizer.step()
        return []

    facts = {"op": NAME, "shape": f"3×{SIDE}×{SIDE}", "mode": "training", "backend": column, "dtype": DTYPE}
    timed(step, lambda _: error, LIMITS[DTYPE], **facts, gold="float32")
