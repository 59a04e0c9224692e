"""add_norm, a scaled residual and its layer norm, forward and training step: our backends against PyTorch's two ops, and on a GPU
those under torch.compile. In bfloat16 the branch alone is, as under autocast.
"""

import functools

import pytest
import torch
from measuring import DEVICE, DTYPES, columns, relative_error
from problems import NORM_SHAPES, add_norm

SHAPES = {"cpu": [(16384, 96), (4096, 384)], "cuda": NORM_SHAPES}  # rows, channels
LIMITS = {"float32": 1e-5, "bfloat16": 1e-2}


@functools.lru_cache(maxsize=1)
def subject(shape: tuple[int, ...], dtype: str):
    """The problem, and its results in float64 by mode."""
    problem = add_norm(*shape, DTYPES[dtype], DEVICE)
    gold = problem.to(torch.float64)
    return problem, {mode: gold.runner(mode, "reference")() for mode in ("forward", "training")}


@pytest.mark.parametrize("column", columns("add_norm") + ["compiled"] * (DEVICE == "cuda"))
@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shape", SHAPES[DEVICE], ids=str)
def test_add_norm(timed, shape, dtype, mode, column):
    problem, gold = subject(shape, dtype)
    timed(
        problem.runner(mode, column),
        lambda actual: relative_error(actual, gold[mode]),
        LIMITS[dtype],
        op="add_norm",
        shape="×".join(map(str, shape)),
        mode=mode,
        backend=column,
        dtype=dtype,
        gold="float64",
    )
