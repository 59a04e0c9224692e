"""What the benchmarks share: the device, the competitors, and one way to measure.

AUTOHDR_BENCH_DEVICE   cpu (the default) or cuda; each has cases of its own: a CPU gets sizes that it can do in minutes
AUTOHDR_BENCH_ROUNDS   calls timed on a CPU; on a GPU as many as take about 0.3 s
AUTOHDR_BENCH_ROWS     file that a line of JSON is added to for every case as soon as it is measured
AUTOHDR_BENCH_END      time (Unix seconds) from which no further case is begun
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from autohdr import kernels
from autohdr.measure import give_back, is_out_of_memory, measure

DEVICE = os.environ.get("AUTOHDR_BENCH_DEVICE", "cpu")
ROUNDS = int(os.environ.get("AUTOHDR_BENCH_ROUNDS", "5"))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "uint8": torch.uint8}


class Moment:
    """A point in the GPU's queue, as pytest-benchmark's timer: the later minus the earlier is in seconds."""

    def __init__(self):
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: "Moment") -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def columns(*ops: str) -> list[str]:
    """Our backends that all these ops have on this device, the reference, which is eager PyTorch, last."""
    names = ("cpu",) if DEVICE == "cpu" else ("cuda", "triton")
    return [n for n in names if all(kernels.backends(op)[n] == "available" for op in ops)] + ["reference"]


def most_precise(compute: Callable[[torch.dtype], Any], *dtypes: torch.dtype) -> tuple[Any, str]:
    """compute(dtype) in the first dtype that memory suffices for, and its name; without one None and "none".

    Returned, not raised, so that a cache keeps it; `timed` fails a case whose gold is "none".
    """
    for dtype in dtypes:
        try:
            return compute(dtype), str(dtype).removeprefix("torch.")
        except Exception as failure:
            if not is_out_of_memory(failure):
                raise
    return None, "none"


def measured(benchmark, function: Callable, error: Callable, limit: float) -> dict:
    """What a row of results says of a function, unless its error is above limit."""
    if DEVICE == "cuda":
        function()  # compiles, tunes, loads its libraries' workspaces
    else:
        give_back()
    # On a CPU the first call, which takes its scratch memory. Meaningful under the default malloc alone: the tuned one keeps
    # what earlier calls gave back.
    with measure(DEVICE) as used:
        actual = function()
    found = error(actual)
    if not found <= limit:
        pytest.fail(f"relative error {found:.1e}, allowed {limit:.0e}: nothing is reported")
    del actual
    if DEVICE == "cuda":
        rounds = max(3, min(50, int(0.3 / used.seconds)))
        benchmark.pedantic(function, setup=_head_start(), rounds=rounds, warmup_rounds=1)
    else:
        benchmark.pedantic(function, rounds=ROUNDS, warmup_rounds=1)
    stats = benchmark.stats.stats
    return {
        "error": found,
        "growth_bytes": used.growth_bytes,
        "peak_bytes": used.peak_bytes,
        "memory_source": used.memory_source,
        "rounds": stats.rounds,
        "seconds": stats.median,
        "fastest": stats.min,
    }


def _head_start() -> Callable[[], None]:
    """Before each call: nothing of its inputs in the GPU's cache, and the GPU busy for about half a millisecond, so that the host
    is ahead of it, as in a training loop, and the time of a short call is not that of its launches."""
    l2 = torch.cuda.get_device_properties().L2_cache_size
    flush = torch.empty(2 * l2, dtype=torch.uint8, device="cuda")

    def setup() -> None:
        flush.zero_()
        torch.cuda._sleep(1_000_000)

    return setup


def relative_error(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """The largest ‖actual − expected‖ / ‖expected‖ of all pairs; not a number if one is none."""
    pairs = zip(actual, expected, strict=True)
    errors = torch.stack([(a.double() - e.double()).norm() / e.double().norm() for a, e in pairs])
    return errors.max().item()  # of a NaN and a number the NaN
