"""What pytest makes of the benchmarks. Run them all with ``make bench``, or one file with ``pytest benchmarks/bench_NAME.py``."""

import gc
import json
import os
import time
from collections.abc import Callable, Sequence

import measuring
import pytest
import torch

from autohdr.measure import is_out_of_memory


def pytest_collection_modifyitems(items):
    if measuring.DEVICE == "cuda":
        for item in items:
            item.add_marker(pytest.mark.benchmark(timer=measuring.Moment))


def pytest_runtest_setup():
    if time.time() > float(os.environ.get("AUTOHDR_BENCH_END", "inf")):
        pytest.exit("no time left", returncode=4)


@pytest.fixture
def timed(benchmark):
    """timed(function, error, limit, op=..., shape=..., mode=..., backend=..., dtype=...): seconds a call and the memory it takes.

    function returns tensors, error(tensors) is their error, and above limit (also where it is no number) nothing is reported.
    Where memory does not suffice, that is reported; where it did not for what to compare with (gold="none"), nothing is.
    """

    def run(function: Callable[[], Sequence[torch.Tensor]], error: Callable[[Sequence], float], limit: float, **facts):
        if facts.get("gold") == "none":
            pytest.fail("memory suffices for nothing to compare with: nothing is reported")
        try:
            row = facts | measuring.measured(benchmark, function, error, limit)
        except Exception as failure:
            if measuring.DEVICE == "cpu" or not is_out_of_memory(failure):
                raise
            row = facts | {"failed": "out of memory"}
        if measuring.DEVICE == "cuda":  # for the next case; a failure's traceback is gone here, which held tensors
            gc.collect()
            torch.cuda.empty_cache()
        if file := os.environ.get("AUTOHDR_BENCH_ROWS"):
            with open(file, "a") as out:
                out.write(json.dumps(row, ensure_ascii=False) + "\n")

    return run
