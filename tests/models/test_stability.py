"""Drills of what once failed: MambaDiffusion under mixed precision, and distributed. Small networks, the original rate."""

import itertools
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from autohdr.models import create_model

LR = 2e-4
KINDS, DTYPES = ("ddp", "fsdp2"), (torch.float32, torch.bfloat16)
pytestmark = pytest.mark.no_cover  # tracing the lines of PyTorch takes as long again


def network(levels=2):
    torch.manual_seed(0)
    return create_model("mamba_diffusion_nano", dim=8, num_groups=levels)


def batch():
    """Two pictures and the same brightened."""
    generator = torch.Generator().manual_seed(1)
    source = nn.functional.interpolate(0.6 * torch.rand(2, 3, 4, 4, generator=generator), scale_factor=4, mode="bicubic").clamp(
        0, 1
    )
    return source, source.sqrt()


@pytest.mark.long
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_100_steps_at_the_original_learning_rate(precision):
    """Finite throughout, and the loss falls below a third, without warm-up or clipping."""
    model, (source, target) = network(levels=1), batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01, fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "float16")
    losses, skipped = [], 0
    for _ in range(100):
        with torch.autocast("cpu", getattr(torch, precision), enabled=precision != "float32"):
            output = model(source)
        loss = (output.float() - target).abs().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        skipped += not nn.utils.get_total_norm([p.grad for p in model.parameters()]).isfinite()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert all(torch.tensor(losses).isfinite()) and losses[-1] < losses[0] / 3
    assert skipped <= (3 if precision == "float16" else 0)  # the scale's search for its place
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.long
def test_block_compiles_whole():
    model = network()
    block = model.encoder_groups[0].blocks[0]
    x = torch.rand(1, 8, 6, 7).contiguous(memory_format=torch.channels_last).requires_grad_()
    results = []
    for function in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        y = function(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def two_steps(model, source, target, dtype):
    """Plain gradient descent, so that the weights' change is the gradients' sum."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(2):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            output = model(source)
        optimizer.zero_grad()
        (output.float() - target).abs().mean().backward()
        optimizer.step()


def wrapped(model, kind, dtype):
    if kind == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (2,))
    policy = MixedPrecisionPolicy(param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32)
    for group in (*model.encoder_groups, *model.middle, *model.decoder_groups):
        fully_shard(group, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def run_rank(rank, port, file):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    states, half = {}, slice(rank, rank + 1)
    for kind, dtype in itertools.product(KINDS, DTYPES):
        model, (source, target) = network(), batch()
        two_steps(wrapped(model, kind, dtype), source[half], target[half], dtype)
        states[kind, dtype] = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in model.state_dict().items()}
    if rank == 0:
        torch.save(states, file)
    dist.barrier()
    # Without destructors: DDP's waits, with Python's lock in hand, for a thread of gloo's that may want that lock.
    os._exit(0)


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """The weights after two steps of two processes."""
    file = tmp_path_factory.mktemp("ranks") / "states.pt"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(run_rank, (port, file), nprocs=2)
    return torch.load(file)


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.long
@pytest.mark.xdist_group("two processes")
def test_two_processes_train_as_one(states, kind, dtype):
    state, before, single = states[kind, dtype], network().state_dict(), network()
    two_steps(single, *batch(), dtype)
    moved = sum((v - before[k]).square().sum() for k, v in single.state_dict().items() if v.is_floating_point()).sqrt()
    apart = sum((v - state[k]).square().sum() for k, v in single.state_dict().items() if v.is_floating_point()).sqrt()
    assert moved > 0 and apart <= moved * (1e-4 if dtype == torch.float32 else 0.05), f"{apart / moved:.1e} of the change"
