"""The device to work on, seconds, peak memory and energy of a block of code, and the memory that there is."""

import ctypes
import math
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autohdr.errors import UserError

if TYPE_CHECKING:  # what is asked of a CPU needs no PyTorch
    import torch

POWERCAP = Path("/sys/class/powercap")


def pick_device(name: str) -> "torch.device":
    """The device of that name; "auto": CUDA where there is one. Raises UserError where it is absent."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros((), device=device).item()  # what holds no values, as meta does, is no device to work on
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device: {name!r} is not available here: {str(error).splitlines()[0]}") from None
    return device


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_workers(count: int) -> None:
    """Raise UserError for more processes than 64, or than four a processor where that is more: the machine would stall."""
    most = max(64, 4 * (os.cpu_count() or 1))
    if count > most:
        raise UserError(f"workers: expected at most {most}, got {count}")


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
    joules: energy of the whole GPU (NVML), or of all processors (Linux's powercap: RAPL), other processes' share included; nan
        where the system does not tell.
    """

    seconds: float = 0.0
    start_bytes: int = 0
    peak_bytes: int = 0
    memory_source: str = ""
    joules: float = math.nan

    @property
    def growth_bytes(self) -> int:
        """How far the block went above what was in use when it began."""
        return max(0, self.peak_bytes - self.start_bytes)


@contextmanager
def measure(device: "torch.device | str" = "cpu") -> Iterator[Measurement]:
    """`with measure(device) as m: ...` fills m with the seconds and peak memory of the block, also when it raises."""
    result, on_gpu = Measurement(), _is_gpu(device)
    if on_gpu:
        import torch

        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        result.start_bytes, result.memory_source = torch.cuda.memory_allocated(device), "cuda"
    elif _reset_high_water_mark():
        result.start_bytes, result.memory_source = _high_water_mark(), "VmHWM"  # just reset: what is resident now
    else:
        result.start_bytes, result.memory_source = _lifetime_peak(), "ru_maxrss"
    energy, begin = _energy(device), time.perf_counter()
    try:
        yield result
    finally:
        if on_gpu:
            torch.cuda.synchronize(device)
        result.seconds = time.perf_counter() - begin
        result.joules = _spent(energy, _energy(device))
        if on_gpu:
            result.peak_bytes = torch.cuda.max_memory_allocated(device)
        else:
            result.peak_bytes = _high_water_mark() if result.memory_source == "VmHWM" else _lifetime_peak()


def _energy(device: "torch.device | str") -> dict[str, tuple[int, int]]:
    """Counters of energy: {name: (microjoules until now, where it begins again)}; none where the system does not tell."""
    if _is_gpu(device):
        return _gpu_energy(device)
    found = {}
    try:
        for zone in POWERCAP.glob("intel-rapl:*"):  # AMD's too; a package's parts have zones of their own
            if (zone / "name").read_text().startswith("package"):
                found[zone.name] = int((zone / "energy_uj").read_text()), int((zone / "max_energy_range_uj").read_text())
    except (OSError, ValueError):  # for root alone, as Linux has it
        return {}
    return found


def _gpu_energy(device: "torch.device | str") -> dict[str, tuple[int, int]]:
    import torch

    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return {}
    handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
    name = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    failed = (
        nvml.nvmlInit_v2()
        or nvml.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(handle))
        or nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules))
    )
    return {} if failed else {name: (1000 * millijoules.value, 1000 << 64)}


def _spent(before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]]) -> float:
    """Joules between two readings of _energy; nan where one lacks what the other has."""
    if not before or before.keys() != after.keys():
        return math.nan
    return sum((after[name][0] - begun) % around for name, (begun, around) in before.items()) / 1e6


def expected_seconds(
    run: Callable[[int], Any], side: int, pixels: int, device: "torch.device | str" = "cpu"
) -> tuple[float, float]:
    """The least and the most seconds that the work of run(side), on a square image, would take on so many pixels.

    Images of half the side and of the whole run in turn, three times each. The most: every pixel takes what it took in the
    slowest of the whole, work that does not grow with the pixels included. The least: what a pixel more took from the fastest
    half to the fastest whole; where other processes made that nearly nothing, a quarter of what it took in the whole.
    """
    times: dict[int, list[float]] = {side // 2: [], side: []}
    for _ in range(3):
        for of_side, taken in times.items():
            with measure(device) as measured:
                run(of_side)
            taken.append(measured.seconds)
    (half, small), (_, large) = times.items()
    added = (min(large) - min(small)) / (side**2 - half**2)
    least, most = max(added, min(large) / side**2 / 4) * pixels, max(large) * max(pixels / side**2, 1)
    return min(least, most), most


def _is_gpu(device: "torch.device | str") -> bool:
    return str(device).partition(":")[0] == "cuda"


def give_back() -> None:
    """To the system, what glibc's malloc keeps of memory that was freed: else what a block takes of it is not seen to grow."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def _reset_high_water_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _high_water_mark() -> int:
    return _named(Path("/proc/self/status"))["VmHWM:"] * 1024


def _named(file: Path) -> dict[str, int]:
    """The lines of a file of the system that are a name, a whole number and perhaps a unit."""
    lines = [line.split() for line in file.read_text().splitlines()]
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal()}


def _lifetime_peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes(device: "torch.device | str" = "cpu") -> int:
    """What this process holds now: resident memory, or on a GPU the tensors on it."""
    if _is_gpu(device):
        import torch

        return torch.cuda.memory_allocated(device)
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else _lifetime_peak()


def free_bytes(device: "torch.device | str" = "cpu") -> int:
    """What this process can still take: on a GPU what is free there and what PyTorch keeps of freed tensors; else what the system
    and the process's control group leave, or, where the system does not tell, half of all memory."""
    if _is_gpu(device):
        import torch

        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    available = _named(meminfo)["MemAvailable:"] * 1024
    group = Path("/sys/fs/cgroup")  # inside a container, its own
    try:
        used = int((group / "memory.current").read_text()) - _named(group / "memory.stat")["inactive_file"]
        return min(available, int((group / "memory.max").read_text()) - used)
    except (OSError, ValueError):  # no control group, or one without a limit ("max")
        return available


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_bytes(text: str) -> int:
    """Bytes from a human's size: 3GB, 2.5 GiB, 800M, 123456. UserError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*", text.upper())
    if not match:
        raise UserError(f"expected an amount of memory such as 3GB or 512MiB, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def format_bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def format_seconds(expected: tuple[float, float]) -> str:
    """A range, such as 0.81 to 1.2 s."""
    return " to ".join(f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.2g}" for seconds in expected) + " s"


_OUT_OF_MEMORY = re.compile(
    "can(no|')t allocate|bad_alloc|could not create a primitive"  # the last: oneDNN's convolutions, without memory for their code
    r"|CUDA error: out of memory|Triton Error \[CUDA\]: out of memory|CU(BLAS|DNN)_STATUS_ALLOC_FAILED"
    "|unable to find an engine to execute this computation"  # cuDNN's convolutions, without memory for their workspace
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that an allocation failed, on any device."""
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)):
        return True
    torch = sys.modules.get("torch")  # else nothing raises its error
    return torch is not None and isinstance(error, torch.OutOfMemoryError)
