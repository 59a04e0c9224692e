"""apply_edit on a photo, with a grid and without, forward of floats and of a photo's own bytes, and training step: our backends
against eager PyTorch and that under torch.compile.
"""

import functools

import pytest
import torch
from measuring import DEVICE, DTYPES, columns, relative_error
from problems import apply_edit

SHAPES = {"cpu": [(1000, 1500, 0), (1000, 1500, 8)], "cuda": [(4000, 6000, 0), (4000, 6000, 8)]}  # height, width, bins
CASES = [("uint8", "forward"), ("float32", "forward"), ("float32", "training")]
CASES += [("bfloat16", "forward"), ("bfloat16", "training")] * (DEVICE == "cuda")
LIMITS = {"float32": 1e-5, "bfloat16": 1e-2, "uint8": 1e-3}


@functools.lru_cache(maxsize=1)
def subject(shape: tuple[int, ...], dtype: str):
    """The problem, and the reference's results by mode: of floats in float64, of bytes as bytes."""
    problem = apply_edit(*shape, DTYPES[dtype], DEVICE)
    modes = [m for d, m in CASES if d == dtype]
    gold = problem.to(torch.float64) if DTYPES[dtype].is_floating_point else problem
    return problem, {mode: gold.runner(mode, "reference")() for mode in modes}


@pytest.mark.parametrize("column", [*columns("apply_edit"), "compiled"])
@pytest.mark.parametrize(("dtype", "mode"), CASES)
@pytest.mark.parametrize("shape", SHAPES[DEVICE], ids=str)
def test_apply_edit(timed, shape, dtype, mode, column):
    problem, gold = subject(shape, dtype)
    timed(
        problem.runner(mode, column),
        lambda actual: relative_error(actual, gold[mode]),
        LIMITS[dtype],
        op="apply_edit",
        shape="×".join(map(str, shape)),
        mode=mode,
        backend=column,
        dtype=dtype,
        gold="float64" if DTYPES[dtype].is_floating_point else dtype,
    )
