"""restormer_base, forward and training step: our backends against PyTorch by other means.

On a CPU at 384×384; on a GPU also at 896×896 and 3296×2192, which a CPU does not do in reasonable time. bfloat16 is autocast.
"""

import functools
import warnings
from copy import deepcopy

import pytest
import torch
from measuring import DEVICE, columns, most_precise, relative_error
from problems import COMPILED
from torch.utils.checkpoint import checkpoint

from autohdr import create_model, kernels
from autohdr.models.graphs import REPEATS, Graphed
from autohdr.models.network import Blocks, Half

NAME = "restormer_base"
MODES = ("forward", "training")
# PyTorch's convolutions round float32 to TF32 on a GPU unless told otherwise.
LIMITS = {"float32": {"forward": 1e-4, "training": 1e-3}, "bfloat16": {"forward": 5e-2, "training": 5e-2}}
PLAIN_LIMITS = LIMITS | {"float32": {"forward": 5e-2, "training": 5e-2}}


def cases() -> list:
    """(height, width, mode, dtype, column) of every case, those of one size beside each other."""
    ours = columns("mdta", "gdfn")
    if DEVICE == "cpu":
        plain = [(384, 384, mode, "float32", name) for mode in MODES for name in ours]
        return plain + [(384, 384, "forward", "bfloat16", name) for name in ours if name != "reference"]
    found = []
    for height, width, dtypes in ((896, 896, ("bfloat16", "float32")), (384, 384, ("bfloat16",)), (2192, 3296, ("bfloat16",))):
        for mode in MODES:
            # The whole network takes minutes to compile: only where its time is asked for.
            more = ["checkpointed"] * (mode == "training") + ["compiled"] * (width == 896) + ["graph"] * (width == 384)
            found += [(height, width, mode, dtype, name) for dtype in dtypes for name in ours + more]
    return [c for c in found if c[3:] != ("float32", "compiled")]


def per_block(model: torch.nn.Module) -> list:
    """The model's stages, in which each block keeps its input alone."""

    def block(attention, feed_forward, x):
        return feed_forward.module(attention.module(x, **attention.beside), **feed_forward.beside)

    def checkpointed(halves: list[Half]) -> list[Half]:
        pairs = zip(halves[::2], halves[1::2], strict=True)
        blocks = [functools.partial(checkpoint, functools.partial(block, *pair), use_reentrant=False) for pair in pairs]
        return [Half(b, {}, None) for b in blocks]

    stages = type(model).stages(model)
    return [Blocks(checkpointed(stage.halves)) if isinstance(stage, Blocks) else stage for stage in stages]


def runner(model: torch.nn.Module, x: torch.Tensor, mode: str, dtype: str, column: str):
    """A function that returns [what the model adds to x], or [all gradients of a training step in one]."""
    network = model
    if column == "compiled":
        torch.compiler.reset()
        network = torch.compile(model, mode=COMPILED, dynamic=False)
    if column == "graph":
        network = Graphed(model, x.device)
    backend = {"compiled": "reference", "checkpointed": "reference", "graph": "auto"}.get(column, column)

    def run():
        kernels.set_backend(backend)
        if column == "checkpointed":
            model.stages = functools.partial(per_block, model)
        try:
            with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == "bfloat16"):
                if mode == "forward":
                    with torch.inference_mode():
                        return [network(x).to(x.dtype) - x]
                loss = (network(x) - x).abs().mean()
            model.zero_grad(set_to_none=True)
            loss.backward()
            return [torch.cat([p.grad.flatten() for p in model.parameters()])]
        finally:
            kernels.set_backend("auto")
            vars(model).pop("stages", None)
            model.zero_grad(set_to_none=True)

    if column == "graph":
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "cuda_graphs")  # what goes on without one is not to be measured as one
            for _ in range(REPEATS + 1):
                run()
    return run


@functools.lru_cache(maxsize=1)
def subject(height: int, width: int):
    torch.manual_seed(0)
    model = create_model(NAME).to(DEVICE, memory_format=torch.channels_last)
    return model, torch.rand(1, 3, height, width, device=DEVICE).contiguous(memory_format=torch.channels_last)


@functools.lru_cache(maxsize=1)
def gold(height: int, width: int, mode: str) -> tuple[list[torch.Tensor], str]:
    """The result, on the CPU, and its dtype: on a CPU, which float64 would take minutes, float32. As most_precise."""
    model, x = subject(height, width)
    column = "checkpointed" if mode == "training" else "reference"

    def results(dtype: torch.dtype) -> list[torch.Tensor]:
        with torch.autograd.graph.save_on_cpu():  # the blocks' inputs: of the largest image a GPU of 80 GB does not hold them all
            return [t.cpu() for t in runner(deepcopy(model).to(dtype), x.to(dtype), mode, "float32", column)()]

    return most_precise(results, *(torch.float64, torch.float32)[DEVICE == "cpu" :])


@pytest.mark.parametrize(("height", "width", "mode", "dtype", "column"), cases())
def test_restormer(timed, height, width, mode, dtype, column):
    model, x = subject(height, width)
    expected, gold_dtype = gold(height, width, mode)
    plain = DEVICE == "cuda" and column in ("reference", "compiled", "checkpointed")
    timed(
        runner(model, x, mode, dtype, column),
        lambda actual: relative_error([t.cpu() for t in actual], expected),
        (PLAIN_LIMITS if plain else LIMITS)[dtype][mode],
        op=NAME,
        shape=f"3×{height}×{width}",
        mode=mode,
        backend=column,
        dtype=dtype,
        gold=gold_dtype,
    )
