"""Which backends there are, which of them can run here, and which one a call takes."""

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from autohdr.kernels import _extension

NAMES = ("cuda", "triton", "cpu", "reference")
"""In the order in which "auto" tries them, the same for every op. That CUDA's kernels are before Triton's is what
benchmarks/instructions.py predicts for an H200 in bfloat16, not measured: 3.49 and 10.4 ms for a restormer_base's forward pass at
384×384 (mdta and gdfn), 0.41 and 1.01 ms for selective_scan's at 8×1536×4096; not predicted for the other ops."""
OPS: dict[str, dict[str, tuple[torch.dtype, ...]]] = {}
"""Every declared op (declare.py): for each backend that it has beside the reference, the dtypes of x."""

_DEVICES = {"cuda": "cuda", "triton": "cuda", "cpu": "cpu"}  # where a backend's tensors are
_default = "auto"


def _reason(backend: str) -> str:
    """Empty if the backend can run on this machine, else why not."""
    if backend == "reference":
        return ""
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed (pip install triton)"
    elif _extension.reason or backend == "cpu":
        return _extension.reason
    elif _extension.module and _extension.module.build_info()["cuda"] == "none":
        return "this installation was built without CUDA kernels"
    return "" if torch.cuda.is_available() else "there is no GPU that torch can use"


_REASONS = {name: _reason(name) for name in NAMES}


def _runs_on(architectures: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """The first and the last compute capability that each of these, such as "8.0 9.0a 10.0+PTX", runs on.

    A GPU runs binaries of its own major version up to its minor one, PTX of any version up to its own, and with an "a" its own
    version's alone. What torch knows by a name, such as Hopper, is trusted.
    """
    ranges = []
    for word in architectures.split():
        built = re.fullmatch(r"(\d+)\.(\d)(a?)f?(\+PTX)?", word)
        major, minor, exact, ptx = built.groups() if built else (0, 0, "", "+PTX")
        first = int(major), int(minor)
        ranges.append((first, first if exact else (99 if ptx else first[0], 9)))
    return ranges


_BUILT_FOR = _extension.module.build_info()["cuda_architectures"] if _extension.module else ""
_RUNS_ON = _runs_on(_BUILT_FOR)


def _without_code(backend: str, device: torch.device) -> str:
    """Empty if the backend has code for this GPU, else why not. At each call: at import, the question would start CUDA."""
    if _DEVICES.get(backend) != "cuda":  # nor where an emulation takes its place
        return ""
    gpu = torch.cuda.get_device_properties(device)
    if backend == "triton":
        return "" if gpu.major >= 8 else f"Triton kernels need 8.0 or newer, this GPU is {gpu.major}.{gpu.minor}"
    if any(first <= (gpu.major, gpu.minor) <= last for first, last in _RUNS_ON):
        return ""
    return f"it was built for {_BUILT_FOR}, this GPU is {gpu.major}.{gpu.minor}"


def _absent(op: str, backend: str) -> str:
    return "" if backend == "reference" or backend in OPS[op] else f"{op} has no {backend} kernels"


def backends(op: str) -> dict[str, str]:
    """Each backend of an op with "available" or the reason why it cannot run here.

    Raises:
        ValueError: no such op.
    """
    if op not in OPS:
        raise ValueError(f"op: expected one of {', '.join(OPS)}, got {op!r}")
    return {
        name: _absent(op, name) or _REASONS[name] or _without_code(name, torch.device("cuda")) or "available" for name in NAMES
    }


def set_backend(name: str) -> None:
    """Sets the backend that ``backend="auto"`` stands for, for every op: a backend's name, or "auto" again.

    Raises:
        ValueError: no such backend.
    """
    global _default
    _check(name)
    _default = name


def preferred(name: str) -> str:
    """What "auto" stands for where an op prefers a backend: this one, unless set_backend has named another."""
    return name if _default == "auto" else _default


@contextmanager
def default_backend(name: str) -> Iterator[None]:
    """``set_backend(name)`` for a while."""
    before = _default
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


_as_on_a_gpu = False


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Ops and convolutions on the CPU save and take what those of a GPU do: to plan for one where there is none."""
    global _as_on_a_gpu
    _as_on_a_gpu = True
    try:
        yield
    finally:
        _as_on_a_gpu = False


def is_as_on_a_gpu() -> bool:
    """Whether as_on_a_gpu holds."""
    return _as_on_a_gpu


def _check(name: str) -> None:
    if name != "auto" and name not in NAMES:
        raise ValueError(f"backend: expected auto, {', '.join(NAMES)}, got {name!r}")


def _unfit(op: str, backend: str, x: torch.Tensor) -> str:
    """Empty if the backend can run op on x, else why not."""
    reason = _absent(op, backend) or _REASONS[backend]
    if reason or backend == "reference":
        return reason
    if x.device.type not in (_DEVICES[backend], "meta"):  # on meta nothing runs: shapes and dtypes follow from the declaration
        return f"x is on {x.device.type}"
    if x.dtype not in OPS[op][backend]:
        *others, last = (str(dtype).removeprefix("torch.") for dtype in OPS[op][backend])
        return f"it takes {', '.join(others)} or {last}, x is {x.dtype}"
    return _without_code(backend, x.device) if x.device.type != "meta" else ""


def resolve(op: str, backend: str, x: torch.Tensor) -> str:
    """The backend a call takes: the named one, or for "auto" the first that can run.

    Raises:
        ValueError: no such backend.
        RuntimeError: the named backend cannot run op on x here; it never falls back.
    """
    _check(backend)
    if backend == "auto":
        backend = _default
    if backend == "auto":
        for name in NAMES:
            if not _unfit(op, name, x):
                return name
    reason = _unfit(op, backend, x)
    if reason:
        raise RuntimeError(f"{op}: backend {backend!r} cannot run: {reason}")
    return backend
