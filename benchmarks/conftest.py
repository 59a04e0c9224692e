"""What the benchmarks share. Run them all with ``make bench``, or one file with ``pytest benchmarks/bench_NAME.py``."""

import os
from collections.abc import Sequence

import pytest
import torch

from autohdr.measure import measure

ROUNDS = int(os.environ.get("AUTOHDR_BENCH_ROUNDS", "5"))


@pytest.fixture
def timed(benchmark):
    """timed(function, op=..., mode=..., backend=..., ...): seconds a call, warm, and how far memory grew in one."""

    def run(function, **facts):
        # The first call, which takes its scratch memory. Meaningful under the default malloc alone: the tuned one keeps what
        # earlier calls gave back.
        with measure("cpu") as used:
            function()
        benchmark.extra_info.update(facts, growth_bytes=used.growth_bytes, memory_source=used.memory_source)
        benchmark.pedantic(function, rounds=ROUNDS, warmup_rounds=1)

    return run


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def refuse_if_wrong(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], limit: float) -> None:
    """A benchmark of a wrong result fails, so that nothing is reported of it."""
    error = max(relative_error(a, e) for a, e in zip(actual, expected, strict=True))
    if not error <= limit:
        pytest.fail(f"relative error {error:.1e} against the reference, allowed {limit:.0e}: nothing is reported")
