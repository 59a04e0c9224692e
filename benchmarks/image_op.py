"""The benchmark of an image op at the levels of a network: mdta and gdfn at restormer_base's, nafblock at nafnet_32's."""

import functools
from collections.abc import Callable

import pytest
import torch
from measuring import DEVICE, DTYPES, columns, most_precise, relative_error
from problems import LEVELS, Problem

LIMITS = {"float32": 1e-4, "bfloat16": 2e-2}
PLAIN_LIMITS = {"float32": 1e-2, "bfloat16": 2e-2}  # PyTorch's convolutions round float32 to TF32 on a GPU unless told otherwise
IMAGES = {  # of the whole network: height, width, dtypes
    "cpu": [(384, 384, ("float32",))],
    "cuda": [(896, 896, ("bfloat16", "float32")), (384, 384, ("bfloat16",)), (2192, 3296, ("bfloat16",))],
}


def cases(op: str, levels: tuple[int, ...] = LEVELS) -> list:
    """(channels, height, width, dtype, mode, column) of every case, those of one size beside each other."""
    found = []
    for height, width, dtypes in IMAGES[DEVICE]:
        for level, channels in enumerate(levels):
            for dtype in dtypes:
                for mode in ("forward", "training"):
                    names = columns(op)
                    if DEVICE == "cuda" and mode == "training":
                        names = [*names, "checkpointed"]
                    if DEVICE == "cuda" and (height, dtype) == (896, "bfloat16"):  # some minutes of compilation in all
                        names = [*names, "compiled"]
                    for name in names:
                        found.append(pytest.param(channels, height >> level, width >> level, dtype, mode, name))
    return found


@functools.lru_cache(maxsize=1)
def subject(make: Callable[..., Problem], *arguments) -> tuple[Problem, dict[str, list[torch.Tensor]], str]:
    """The problem, its results by mode in the widest dtype that memory suffices for, and that dtype's name."""
    problem = make(*arguments, DEVICE)

    def results(dtype: torch.dtype) -> dict[str, list[torch.Tensor]]:
        return {mode: problem.to(dtype).runner(mode, "reference")() for mode in ("forward", "training")}

    return problem, *most_precise(results, torch.float64, torch.float32)


def checked(results: list[torch.Tensor]) -> list[torch.Tensor]:
    """y, or the gradient of x and those of all parameters in one: temperature's, a number a head, can be near zero by chance."""
    first, *rest = results
    return [first, torch.cat([t.flatten() for t in rest])] if rest else [first]


def bench(timed, make: Callable[..., Problem], channels, height, width, dtype, mode, column) -> None:
    problem, gold, gold_dtype = subject(make, channels, height, width, DTYPES[dtype])
    plain = DEVICE == "cuda" and column in ("reference", "compiled", "checkpointed")
    timed(
        problem.runner(mode, column),
        lambda actual: relative_error(checked(actual), checked(gold[mode])),
        (PLAIN_LIMITS if plain else LIMITS)[dtype],
        op=problem.op,
        shape=f"{channels}×{height}×{width}",
        mode=mode,
        backend=column,
        dtype=dtype,
        gold=gold_dtype,
    )
