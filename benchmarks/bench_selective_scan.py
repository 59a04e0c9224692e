"""selective_scan, forward and training step: compiled against the loop over the tokens and a parallel scan in PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from conftest import refuse_if_wrong

from autohdr.kernels import selective_scan

SHAPES = [(1, 192, 4096), (2, 96, 9216)]  # batch, dim, seqlen
LARGE = [(1, 192, 147456), (8, 1536, 4096)]  # the second a language model's; too long for the loop, which keeps every state
DSTATE = 16
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


def arguments(batch, dim, seqlen, dtype):
    torch.manual_seed(0)

    def randn(*size):
        return torch.randn(*size).to(dtype)

    tensors = {
        "u": randn(batch, dim, seqlen),
        "delta": randn(batch, dim, seqlen) * 0.5 - 4,
        "A": -torch.arange(1.0, DSTATE + 1).repeat(dim, 1),
        "B": randn(batch, DSTATE, seqlen),
        "C": randn(batch, DSTATE, seqlen),
        "D": torch.ones(dim),
        "z": randn(batch, dim, seqlen),
        "delta_bias": torch.rand(dim),
    }
    return tensors, randn(batch, dim, seqlen)


def parallel(u, delta, A, B, C, D, z, delta_bias):
    """Every token's state in log2(seqlen) sweeps over the whole sequence, as mamba.py does; keeps all of them."""
    u, delta, B, C, z = (t.float() for t in (u, delta, B, C, z))
    delta = F.softplus(delta + delta_bias[:, None])
    gate = torch.exp(delta[:, :, None] * A[:, :, None])  # [batch, dim, dstate, seqlen]
    state = (delta * u)[:, :, None] * B[:, None]
    step = 1
    while step < u.shape[2]:
        state = torch.cat([state[..., :step], state[..., step:] + gate[..., step:] * state[..., :-step]], -1)
        gate = torch.cat([gate[..., :step], gate[..., step:] * gate[..., :-step]], -1)
        step *= 2
    return ((state * C[:, None]).sum(2) + D[:, None] * u) * F.silu(z)


def run(backend, tensors):
    if backend == "parallel":
        return parallel(**tensors).to(tensors["u"].dtype)
    return selective_scan(**tensors, delta_softplus=True, backend=backend)


CASES = [(s, d, b) for s in SHAPES for d in LIMITS for b in ("cpu", "reference", "parallel")]
CASES += [(s, d, "cpu") for s in LARGE for d in LIMITS]


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize(("shape", "dtype", "backend"), CASES, ids=str)
def test_selective_scan(timed, shape, dtype, backend, mode):
    tensors, d_out = arguments(*shape, dtype)
    facts = {"op": "selective_scan", "shape": "×".join(map(str, shape)), "mode": mode, "backend": backend}
    facts |= {"dtype": str(dtype).removeprefix("torch."), "dstate": DSTATE}

    def forward():
        with torch.inference_mode():
            return run(backend, tensors)

    def step():
        leaves = {k: v.detach().requires_grad_() for k, v in tensors.items()}
        return torch.autograd.grad(run(backend, leaves), list(leaves.values()), d_out)

    # By the first tokens alone: the loop would take minutes and gigabytes for all of a long sequence.
    head = {k: v[..., :1024] if k in ("u", "delta", "B", "C", "z") else v for k, v in tensors.items()}

    def on_head(backend):
        leaves = {k: v.detach().requires_grad_() for k, v in head.items()}
        out = run(backend, leaves)
        return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), d_out[..., :1024])]

    refuse_if_wrong(on_head(backend), on_head("reference"), LIMITS[dtype])
    timed(forward if mode == "forward" else step, **facts)
