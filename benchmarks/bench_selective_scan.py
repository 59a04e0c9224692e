"""selective_scan, forward and training step: our backends, the loop over the tokens, parallel scans in PyTorch, and what is
installed of mamba-ssm and mamba.py, on one problem (N = 16).

On a CPU only ours take the long sequences and the narrow dtypes: the others keep every token's state, in float32 always.
"""

import functools
import math

import pytest
import torch
from measuring import DEVICE, DTYPES, columns, relative_error
from problems import DSTATE, PEERS, SCAN_SHAPES, STATES, Problem, scan_columns, scan_gold, selective_scan

LIMITS = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 2e-3}
LOOP = 4096  # tokens; on a GPU the loop takes some launches for each
EVERY_STATE = 30_000_000  # states that a CPU's memory and patience suffice for
HEAD = 1024
OTHERS = ("associative_scan", *PEERS)  # other people's code, which may be of another version than it was tried with


def competitors(shape: tuple[int, ...], dtype: str) -> list[str]:
    """Ours; the loop, where the sequence is not too long for it; the scans in PyTorch, which compute in float32 always, in one
    dtype; mamba-ssm."""
    names, others = columns("selective_scan"), scan_columns()
    if DEVICE == "cpu":
        fits = dtype == "float32" and math.prod(shape) * DSTATE <= EVERY_STATE
        return names + others if fits else names[:-1]
    names = names if shape[2] <= LOOP else names[:-1]
    return names + [name for name in others if name not in STATES or dtype == "bfloat16"]


def cases() -> list:
    """(shape, dtype, mode, column) of every case, those of one problem beside each other."""
    found = []
    for shape in SCAN_SHAPES:
        for dtype in DTYPES:
            for mode in ("forward", "training"):
                for name in competitors(shape, dtype):
                    label = f"{'x'.join(map(str, shape))}-{dtype}-{mode}-{name}"
                    if name == "associative_scan" and DEVICE == "cuda":
                        label += "-compiled"  # it takes minutes, as what torch.compile does elsewhere
                    found.append(pytest.param(shape, dtype, mode, name, id=label))
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
    facts = {"op": "selective_scan", "shape": "×".join(map(str, shape)), "mode": mode, "backend": column, "dtype": dtype}
    try:
        timed(
            problem.runner(mode, column),
            lambda actual: relative_error(actual if checked is problem else checked.runner(mode, column)(), gold[mode]),
            LIMITS[dtype],
            **facts,
            dstate=DSTATE,
            gold="float64",
        )
    except Exception as failure:  # refusals are none
        if column not in OTHERS:
            raise
        pytest.skip(f"{column} does not run here: {failure}")
