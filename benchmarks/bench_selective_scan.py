"""selective_scan, forward and training step: our backends, the loop over the tokens, parallel scans in PyTorch, and what is
installed of mamba-ssm and mamba.py, on one problem (N = 16).

On a CPU only ours take the long sequences and the narrow dtypes: the others keep every token's state, in float32 always.
"""

import functools
import math

import pytest
import torch
from measuring import DEVICE, DTYPES, columns, relative_error
from problems import DSTATE, SCAN_SHAPES, Problem, scan_columns, scan_gold, selective_scan

LIMITS = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 2e-3}
LOOP = 4096  # tokens; on a GPU the loop takes some launches for each
EVERY_STATE = 30_000_000  # states that a CPU's memory and patience suffice for
HEAD = 1024


def cases() -> list:
    """(shape, dtype, mode, column) of every case, those of one problem beside each other."""
    found = []
    for shape in SCAN_SHAPES:
        for dtype in DTYPES:
            names = columns("selective_scan")
            if DEVICE == "cpu" and (dtype != "float32" or math.prod(shape) * DSTATE > EVERY_STATE):
                names.remove("reference")
            else:
                names += scan_columns()
            if DEVICE == "cuda" and shape[2] > LOOP:
                names.remove("reference")
            for mode in ("forward", "training"):
                found += [
                    pytest.param(shape, dtype, mode, n, id=f"{'x'.join(map(str, shape))}-{dtype}-{mode}-{n}") for n in names
                ]
    return found


@functools.lru_cache(maxsize=1)
def subject(shape: tuple[int, ...], dtype: str) -> tuple[Problem, Problem, dict[str, list[torch.Tensor]]]:
    """The problem, what of it is checked (on a CPU the first tokens, on a GPU all), and its results in float64 by mode."""
    problem = selective_scan(*shape, DTYPES[dtype], DEVICE)
    checked = problem if DEVICE == "cuda" else head(problem, HEAD)
    return problem, checked, {mode: scan_gold(checked, mode) for mode in ("forward", "training")}


def head(problem: Problem, tokens: int) -> Problem:
    seqlen = problem.dy.shape[-1]
    tensors = tuple(t[..., :tokens] if t.shape[-1] == seqlen else t for t in problem.tensors)
    return Problem(problem.op, problem.call, tensors, problem.dy[..., :tokens])


@pytest.mark.parametrize(("shape", "dtype", "mode", "column"), cases())
def test_selective_scan(timed, shape, dtype, mode, column):
    problem, checked, gold = subject(shape, dtype)
    timed(
        problem.runner(mode, column),
        lambda actual: relative_error(actual if checked is problem else checked.runner(mode, column)(), gold[mode]),
        LIMITS[dtype],
        op="selective_scan",
        shape="×".join(map(str, shape)),
        mode=mode,
        backend=column,
        dtype=dtype,
        dstate=DSTATE,
        gold="float64",
    )
