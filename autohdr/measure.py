"""Seconds and peak memory of a block of code."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass
class Measurement:
    """What `measure` found; filled in when its block ends.

    seconds: wall clock, the device's queue drained on both sides.
    start_bytes, peak_bytes: memory in use when the block began and its highest point inside it.
    memory_source: where the bytes come from.
        "cuda": tensors on the GPU, as PyTorch's allocator counts them.
        "VmHWM": resident memory of this process (Linux), high-water mark reset at the start of the block.
        "ru_maxrss": resident memory of this process, high-water mark of its whole life, where the system cannot reset
        it: peak_bytes is then an upper bound, and growth_bytes is 0 where an earlier moment needed more.
    """

    seconds: float = 0.0
    start_bytes: int = 0
    peak_bytes: int = 0
    memory_source: str = ""

    @property
    def growth_bytes(self) -> int:
        """How far the block went above what was in use when it began."""
        return max(0, self.peak_bytes - self.start_bytes)


@contextmanager
def measure(device: torch.device | str = "cpu") -> Iterator[Measurement]:
    """`with measure(device) as m: ...` fills m with the seconds and peak memory of the block, also when it raises."""
    device = torch.device(device)
    result = Measurement()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        result.start_bytes, result.memory_source = torch.cuda.memory_allocated(device), "cuda"
    elif _reset_high_water_mark():
        result.start_bytes, result.memory_source = _high_water_mark(), "VmHWM"  # just reset: what is resident now
    else:
        result.start_bytes, result.memory_source = _lifetime_peak(), "ru_maxrss"
    begin = time.perf_counter()
    try:
        yield result
    finally:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        result.seconds = time.perf_counter() - begin
        if device.type == "cuda":
            result.peak_bytes = torch.cuda.max_memory_allocated(device)
        else:
            result.peak_bytes = _high_water_mark() if result.memory_source == "VmHWM" else _lifetime_peak()


def _reset_high_water_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _high_water_mark() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def _lifetime_peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
