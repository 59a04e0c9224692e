"""The benchmark of an op at given shapes against its reference: causal_conv1d's, add_norm's and apply_edit's."""

import functools
from collections.abc import Callable

import torch
from measuring import DEVICE, DTYPES, relative_error
from problems import Problem


@functools.lru_cache(maxsize=1)
def subject(make: Callable[..., Problem], shape: tuple[int, ...], dtype: str, modes: tuple[str, ...]):
    """The problem, and the reference's results by mode: of floats in float64, of bytes as bytes."""
    problem = make(*shape, DTYPES[dtype], DEVICE)
    gold = problem.to(torch.float64) if DTYPES[dtype].is_floating_point else problem
    return problem, {mode: gold.runner(mode, "reference")() for mode in modes}


def bench(timed, make, shape, dtype, mode, column, limit: float, modes: tuple[str, ...] = ("forward", "training")) -> None:
    """modes: those that there are in this dtype."""
    problem, gold = subject(make, shape, dtype, modes)
    timed(
        problem.runner(mode, column),
        lambda actual: relative_error(actual, gold[mode]),
        limit,
        op=problem.op,
        shape="×".join(map(str, shape)),
        mode=mode,
        backend=column,
        dtype=dtype,
        gold="float64" if DTYPES[dtype].is_floating_point else dtype,
    )
