"""Predicts the times of the CUDA and Triton kernels from their machine code, without a GPU: python benchmarks/instructions.py

1. The ops are those that a model really calls, forward and backward, on tensors without data.
2. The launches of an op are those that its host code really makes: the emulation records them (tests/emulation). Triton compiles
   what it would launch, and PyTorch's own ops that are called beside it count as much as the bytes that they touch.
3. Some warps of every launch walk through its machine code (warp.py). Counted are instructions by unit, the cycles that a warp
   takes alone (the code says where it waits), wavefronts of shared memory and sectors of global memory. How much of what one warp
   touches its neighbours in block and grid touch too says what caches keep.
4. A kernel takes as long as the scarcest of issue slots, units, shared memory, a block's own latency, second-level cache, memory.

What is assumed, and how uncertain it is, stands in GPUS, LATENCIES and SCENARIOS. Nothing of this was measured: `make gpu-check`
does that, kernel by kernel, where there is a GPU. Tensors hold nothing, and what depends on their values is not followed.

Each row is written as soon as it is there, beside those of the same kernels. The first compiles the emulation and its kernels, in
some minutes; then a model's forward pass takes one, its training step two, the scan's up to seven.

    python benchmarks/instructions.py [--gpus H200 ...] [--only restormer_base ...] [--sizes 896x896 ...] [--dtypes float32 ...]
                                      [--backends cuda triton]

The same of mamba-ssm's selective scan, from its unpacked source distribution: --mamba-ssm FOLDER.
"""

import argparse
import importlib
import itertools
import json
import math
import operator
import os
import pickle
import re
import struct
import subprocess
import sys
import tempfile
from ast import literal_eval
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import machine_code
import mamba_launches
import tables
import torch
from machine_code import build
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from warp import Launch, Program, Timing, Way

sys.path.insert(0, str(build.ROOT))  # this tree's ops, whatever is installed
HERE = Path(__file__).parent
OUT = HERE / "results" / "instructions.json"
TRITON = machine_code.CACHE / "triton"  # what it compiled for the launches


@dataclass(frozen=True)
class GPU:
    """Rates of a GPU. Those of memory and of the second-level cache are what benchmarks reach, not what the datasheet says."""

    architecture: str  # whose code it runs
    multiprocessors: int
    clock: float
    memory: float  # bytes a second
    cache: float  # the same of the second-level cache
    cache_bytes: int
    shared: int  # bytes of shared memory that a multiprocessor's blocks have
    warps: int  # that a multiprocessor can hold
    blocks: int
    pipes: dict[str, dict[str, float]]
    """Cycles for which a pipe of one of a multiprocessor's four schedulers is busy with a warp's instruction of a unit, or with
    2,048 multiply-adds of a tensor core."""


def _pipes(fma: float, tensor: float, double: float) -> dict[str, dict[str, float]]:
    own = {"integer": 2.0, "special": 8.0, "tensor": tensor, "double": double}
    both = {"float": {"fma": fma, "multiply": fma}, "multiply": {"multiply": 2.0}}
    return both | {unit: {unit: cycles} for unit, cycles in own.items()}


_HOPPER = {"architecture": "sm_90", "multiprocessors": 132, "clock": 1.8e9, "cache": 5.5e12, "cache_bytes": 50 << 20}
_HOPPER |= {"shared": 228 << 10, "warps": 64, "blocks": 32, "pipes": _pipes(1, 4 / 0.62, 2)}  # mma.sync: 62 % of wgmma's rate
GPUS = {
    "H200": GPU(memory=4.3e12, **_HOPPER),
    "H100": GPU(memory=3.0e12, **_HOPPER),
    "A100": GPU("sm_80", 108, 1.41e9, 1.75e12, 4.2e12, 40 << 20, 164 << 10, 64, 32, _pipes(2, 8, 4)),
    "RTX 4090": GPU("sm_80", 128, 2.5e9, 0.92e12, 5.0e12, 72 << 20, 100 << 10, 48, 24, _pipes(1, 32, 64)),
}
LATENCIES = {"operands": 15, "shared": 30, "special": 22, "double": 40, "constant": 40, "barrier": 25, "tensor": 33, "local": 35}
LATENCIES |= {"cached": 38, "global": 290}  # the first-level cache, and the second
_OWNER = {"sm_90": "H200", "sm_80": "A100"}  # whose pipes time a lone warp
TIMINGS = {
    architecture: Timing(LATENCIES, {unit: cycles for pipe in GPUS[name].pipes.values() for unit, cycles in pipe.items()})
    for architecture, name in _OWNER.items()
}


@dataclass(frozen=True)
class Scenario:
    """What is guessed: the part of a scheduler's slots that can be filled; how issue and latency add up (a p-norm); a warp's own
    latency, and the rates of memories, against the GPU's; seconds between two kernels."""

    efficiency: float
    norm: float
    latency: float
    memory: float
    gap: float


SCENARIOS = {
    "low": Scenario(0.95, math.inf, 0.85, 1.1, 0.8e-6),
    "middle": Scenario(0.8, 3, 1.0, 1.0, 1.2e-6),
    "high": Scenario(0.7, 1.5, 1.2, 0.85, 2.0e-6),
}


# ---------------------------------------------------------------------------------------------------------------------
# Which ops, and which launches.


def described(value):
    """A tensor as a string, which says what matters of it here; anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)} {value.stride()}".replace(", ", ",")


def made(value):
    """The uninitialised tensor that a string describes."""
    if not isinstance(value, str):
        return value
    dtype, shape, stride = value.split(" ")
    return torch.empty_strided(literal_eval(shape), literal_eval(stride), dtype=getattr(torch, dtype))


class Ops(TorchDispatchMode):
    """Calls of our ops, each with how often it is made, and the bytes that PyTorch's own ops read and write."""

    def __init__(self):
        super().__init__()
        self.calls, self.others, self.other_bytes = Counter(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.namespace == "autohdr":
            self.calls[repr((function._schema.name.split("::")[1], tree_map(described, args)))] += 1
        elif function.namespace == "aten" and not function.is_view and "empty" not in function.name():
            self.others += 1
            tensors = [v for v in tree_leaves((args, kwargs, result)) if isinstance(v, torch.Tensor)]
            self.other_bytes += sum(v.numel() * v.element_size() for v in tensors)
        return result


def ops_of(subject: str, size: tuple[int, ...], mode: str, dtype: str, backend: str) -> Ops:
    """Those of a model's pass over an image, or of one op, all on tensors without data."""
    import problems

    from autohdr import create_model, kernels
    from autohdr.kernels.backends import as_on_a_gpu

    dtype = "float32" if dtype == "tf32" else dtype
    kernels.backends  # noqa: B018
    resolving = sys.modules["autohdr.kernels.backends"]
    resolving._REASONS[backend], resolving._DEVICES[backend] = "", "cpu"  # fake tensors are on no GPU
    kernels.set_backend(backend)
    ops, training = Ops(), mode == "training"
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), as_on_a_gpu():
            if subject in kernels.OPS:
                run = getattr(problems, subject)(*size, getattr(torch, dtype), "cpu").runner(mode, backend)
                with ops:
                    run()
                return ops
            network = create_model(subject)
            source = torch.empty(1, 3, *size).contiguous(memory_format=torch.channels_last)
            with ops, torch.set_grad_enabled(training), torch.autocast("cpu", getattr(torch, dtype), enabled=dtype != "float32"):
                output = network(source)
            if training:
                with ops:
                    (output.float() - source).abs().mean().backward()
        return ops
    finally:
        kernels.set_backend("auto")


Recorded = tuple[Launch, list[tuple[int, int]]]
"""A launch, and (address, bytes) of each tensor that its op was called with or returned."""


@cache
def recorded(
    calls: tuple[str, ...], architecture: str, multiprocessors: int, shared: int, backend: str, tf32: bool
) -> list[tuple[list[Recorded], int, int]]:
    """Of each call its launches, and how many of PyTorch's own ops it makes and their bytes. No kernel runs."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "calls").write_text("\n".join(calls))
        environment = os.environ | {
            "PYTHONPATH": str(build.ROOT),
            "OMP_NUM_THREADS": "1",
            "AUTOHDR_RECORD_LAUNCHES": f"{folder}/launches",
        }
        if backend == "cuda":
            library = str(build.emulated_kernels(checked=False))
            environment |= {"AUTOHDR_EMULATED_LIBRARY": library, "AUTOHDR_MULTIPROCESSORS": str(multiprocessors)}
            environment |= {"AUTOHDR_SHARED": str(shared - 1024)}  # of a block: the rest is the system's
            environment |= {"AUTOHDR_TF32": "1"} if tf32 else {}
        command = [sys.executable, __file__, "--record", folder, backend, architecture, str(multiprocessors)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-4000:])
        return pickle.loads((Path(folder) / "recorded").read_bytes())


def record(folder: Path, backend: str, architecture: str, multiprocessors: int) -> None:
    """In that process."""
    import autohdr.kernels  # noqa: F401  the ops' declarations

    kernels = record_triton(architecture, multiprocessors) if backend == "triton" else record_cuda(folder / "launches")
    found = []
    for call in (folder / "calls").read_text().splitlines():
        name, arguments = literal_eval(call)
        tensors = tree_map(made, arguments)
        with torch.no_grad(), Ops() as ops:
            returned = kernels(name, tensors)
        places = [(t.data_ptr(), t.untyped_storage().nbytes()) for t in tree_leaves((tensors, returned[0])) if torch.is_tensor(t)]
        found.append(([(launch, places) for launch in returned[1]], ops.others, ops.other_bytes))
    (folder / "recorded").write_bytes(pickle.dumps(found))


def record_cuda(file: Path):
    library = os.environ["AUTOHDR_EMULATED_LIBRARY"]
    torch.ops.load_library(library)
    listed = subprocess.run(["nm", "-C", library], capture_output=True, text=True, check=True).stdout
    names = {int(found[1], 16): found[2] for found in re.finditer(r"^([0-9a-f]+) [tTwW] (.+)$", listed, re.MULTILINE)}

    def run(name: str, arguments) -> tuple:
        file.write_text("")
        returned = getattr(torch.ops.autohdr, name).default(*arguments)
        launches = []
        for line in file.read_text().splitlines():
            *numbers, parameters = line.split(" ")
            kernel, *n = (int(number) for number in numbers)
            launches.append(Launch(names[kernel], tuple(n[:3]), tuple(n[3:6]), n[6], bytes.fromhex(parameters)))
        return returned, launches

    return run


def record_triton(architecture: str, multiprocessors: int):
    import triton

    from autohdr.kernels import declare

    PACKED = {
        "i1": "?",
        "i8": "b",
        "i16": "h",
        "i32": "i",
        "i64": "q",
        "u8": "B",
        "u32": "I",
        "u64": "Q",
        "fp32": "f",
        "fp64": "d",
    }
    run, launches = triton.JITFunction.run, []
    TRITON.mkdir(parents=True, exist_ok=True)

    def packed(parameters: bytes, kind, value) -> bytes:
        """Another parameter after these, which lies at a multiple of its size."""
        if isinstance(kind, tuple):
            for k, v in zip(kind, value, strict=True):
                parameters = packed(parameters, k, v)
            return parameters
        if kind == "constexpr":
            return parameters
        added = struct.pack(f"<{PACKED.get(kind, 'Q')}", value.data_ptr() if kind.startswith("*") else value)
        return parameters.ljust(-(-len(parameters) // len(added)) * len(added), b"\0") + added

    def launch(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        given = self.signature.bind(*args, **{k: v for k, v in kwargs.items() if k in self.signature.parameters})
        given.apply_defaults()
        parameters = b""
        for name, kind in kernel.src.signature.items():
            parameters = packed(parameters, kind, given.arguments[name])
        name = f"{kernel.name}@{kernel.hash[:12]}{architecture}"
        (TRITON / f"{name}.cubin").write_bytes(kernel.asm["cubin"])
        sizes = tuple(grid(given.arguments) if callable(grid) else grid)
        threads = 32 * kernel.metadata.num_warps
        launches.append(Launch(name, (*sizes, 1, 1)[:3], (threads, 1, 1), kernel.metadata.shared, parameters))
        return kernel

    triton.JITFunction.run = launch
    triton.runtime.driver._active = machine_code.NoGPU(architecture)
    scan = importlib.import_module("autohdr.kernels.selective_scan.triton_impl")
    scan._limits = lambda device: (multiprocessors, 12 << 20)  # not those of a CPU's tensors, which are the interpreter's

    def call(name: str, arguments) -> tuple:
        launches.clear()
        op, function = declare.KERNELS[name.removesuffix("_triton")]
        returned = getattr(importlib.import_module(f"autohdr.kernels.{op}.triton_impl"), function)(*arguments)
        return returned, list(launches)

    return call


# ---------------------------------------------------------------------------------------------------------------------
# From launches to time.


@cache
def kernels_in(source: Path, architecture: str) -> dict[str, tuple[str, Path, machine_code.Resources]]:
    """A file's CUDA kernels: of a demangled name the mangled one, the compiled file, what it takes."""
    cubin, log = machine_code.compiled(source, architecture)
    taken = machine_code.resources(log)
    names = machine_code.demangled(tuple(taken))
    return {name: (symbol, cubin, taken[symbol]) for symbol, name in zip(taken, names, strict=True)}


def located(kernel: str, architecture: str) -> tuple[str, Path, machine_code.Resources]:
    """Where a CUDA kernel is. Files are compiled until one has it: first those of its namespace, and of its dtype."""
    space, dtype = kernel.split("autohdr::")[1].split("::")[0], "bf16" if "bfloat16" in kernel else "f32"
    for source in sorted(machine_code.SOURCES, key=lambda s: (space not in s.stem, dtype not in s.stem)):
        if kernel in (kernels := kernels_in(source, architecture)):
            return kernels[kernel]
    raise RuntimeError(f"no file has {kernel}")


disassembled = cache(machine_code.disassemble)


@cache
def program(kernel: str, architecture: str) -> tuple[Program, machine_code.Resources]:
    if "@" in kernel:
        cubin, symbol = TRITON / f"{kernel}.cubin", kernel.split("@")[0]
        taken = machine_code.usage(cubin)[symbol]
    else:
        symbol, cubin, taken = located(kernel, architecture)
    return Program(disassembled(cubin)[symbol], architecture), taken


@dataclass
class Work:
    """Of a launch: what one of its warps does, on average; bytes through the second-level cache, those of the op's tensors and of
    scratch memory that are touched, each once; the share of instructions that could not be followed."""

    cycles: float
    issued: float
    units: dict[str, float]
    shared: float
    cached: float
    memory: float
    scratch: float
    unknown: float


def touched_by_all(way: Way, neighbours: list[tuple[int, Way]], places, inside: bool) -> float:
    """Bytes inside of the op's tensors, or outside, that all warps read or write, each once: where a warp touches a sector, along
    each axis of warps one where its neighbour touches it too (a parameter), else one for every warp (its own pixels)."""
    total = 0
    for kind in ("loaded", "stored"):
        others = [(count, getattr(other, kind)) for count, other in neighbours]
        for sector in getattr(way, kind):
            if inside == any(a <= sector << 5 < a + size for a, size in places):
                total += math.prod(count for count, touched in others if sector not in touched)
    return 32.0 * total


def work_of(recorded: Recorded, architecture: str) -> Work:
    launch, tensors = recorded
    code, timing = program(launch.kernel, architecture)[0], TIMINGS[architecture]
    warps = math.ceil(math.prod(launch.block) / 32)
    middle = tuple(n // 2 for n in launch.grid)
    kept: dict = {}
    code.walk(launch, (middle, 0), timing, kept)
    neighbours = [(warps, code.walk(launch, (middle, 1), timing, kept))] if warps > 1 else []
    in_block = list(neighbours)
    for axis, count in enumerate(launch.grid):
        if count > 1:
            beside = tuple(m + (-1 if m + 1 == count else 1) * (i == axis) for i, m in enumerate(middle))
            neighbours.append((count, code.walk(launch, (beside, 0), timing, {})))
    near = set.intersection(*(other.loaded for _, other in neighbours)) if neighbours else set()
    way = code.walk(launch, (middle, 0), timing, kept, near)
    ways = [way, *(w for _, w in neighbours)]
    blocks = math.prod(launch.grid)

    def mean(f) -> float:
        return sum(map(f, ways)) / len(ways)

    cached = blocks * sum(touched_by_all(way, in_block, tensors, inside) for inside in (True, False))
    return Work(
        way.cycles,
        mean(lambda w: w.issued),
        {unit: mean(lambda w, unit=unit: w.units[unit]) for unit in {u for w in ways for u in w.units}},
        mean(lambda w: w.wavefronts + w.accesses / 4),
        cached,
        touched_by_all(way, neighbours, tensors, True),
        touched_by_all(way, neighbours, tensors, False),
        way.unknown / way.issued,
    )


def resident(launch: Launch, taken: machine_code.Resources, gpu: GPU) -> int:
    """Blocks that a multiprocessor can hold."""
    warps = math.ceil(math.prod(launch.block) / 32)
    of_registers = 65536 // (math.ceil(taken.registers * 32 / 256) * 256)
    shared = math.ceil((taken.shared + launch.shared + 1024) / 128) * 128
    return max(1, min(of_registers // warps, gpu.shared // shared, gpu.warps // warps, gpu.blocks))


def seconds(launch: Launch, work: Work, gpu: GPU, scenario: Scenario) -> tuple[float, str]:
    """A kernel's time, and what binds it."""
    _, taken = program(launch.kernel, gpu.architecture)
    warps, held = math.ceil(math.prod(launch.block) / 32), resident(launch, taken, gpu)

    def wave(blocks: int) -> dict[str, float]:
        """Cycles of so many blocks on one multiprocessor."""
        each = math.ceil(blocks * warps / 4)  # on the scheduler that has most of them
        found = {"issue": each * work.issued / scenario.efficiency, "latency": work.cycles * scenario.latency}
        for pipe, units in gpu.pipes.items():
            found[pipe] = each * sum(cost * work.units.get(unit, 0) for unit, cost in units.items())
        return found | {"shared memory": blocks * warps * work.shared}

    def together(parts: dict[str, float]) -> float:
        busy = max(v for k, v in parts.items() if k != "latency")
        if scenario.norm == math.inf:
            return max(busy, parts["latency"])
        return (busy**scenario.norm + parts["latency"] ** scenario.norm) ** (1 / scenario.norm)

    full, rest = divmod(math.prod(launch.grid), gpu.multiprocessors * held)
    parts = wave(held if full else math.ceil(rest / gpu.multiprocessors))
    cycles = full * together(parts)
    if rest:
        last = together(wave(math.ceil(rest / gpu.multiprocessors)))
        cycles += min(last, together(parts) * max(rest / (gpu.multiprocessors * held), 0.35)) if full else last
    found = {max(parts, key=parts.get): cycles / gpu.clock}
    spilled = work.scratch * max(0.0, 1 - gpu.cache_bytes / work.scratch) if work.scratch else 0.0
    found["second-level cache"] = work.cached / gpu.cache / scenario.memory
    found["memory"] = (work.memory + spilled) / gpu.memory / scenario.memory
    bound = max(found, key=found.get)
    return found[bound] + scenario.gap, bound


def without_places(launch: Launch) -> Launch:
    """Without its parameters' pointers."""
    words = [launch.parameters[i : i + 8] for i in range(0, len(launch.parameters), 8)]
    return replace(launch, parameters=b"".join(w if w[5:].strip(b"\0") == b"" or w[6:] != b"\0\0" else b"*" for w in words))


_WORKS: dict[tuple[Launch, str], Work] = {}


def works_of(launches: list[Recorded], architecture: str) -> Iterator[tuple[Launch, int, Work]]:
    """The launches of a call, those that are alike once with how many there are, and their work.

    Words of the parameters that differ in more than four ways among the launches of a kernel on one grid say where it works, not
    what. Where most launches of a kernel do the same (strips of an image), the others' warps (its ends) are taken to do so too.
    """
    grids = defaultdict(list)
    for recorded in launches:
        launch = recorded[0]
        grids[launch.kernel, launch.grid, launch.block, launch.shared].append(recorded)
    alike = []
    for group in grids.values():
        words = [[launch.parameters[i : i + 4] for i in range(0, len(launch.parameters), 4)] for launch, _ in group]
        fixed = [i for i, column in enumerate(zip(*words, strict=True)) if len(set(column)) <= 4]
        same = defaultdict(list)
        for recorded, w in zip(group, words, strict=True):
            same[tuple(w[i] for i in fixed)].append(recorded)
        alike += [(rs[len(rs) // 2], len(rs)) for rs in same.values()]
    usual: dict[tuple, list[tuple[Launch, Work]]] = defaultdict(list)
    for recorded, count in sorted(alike, key=lambda one: -one[1]):
        launch = recorded[0]
        others = usual[launch.kernel, launch.grid[1:], launch.block]
        if count == 1 and others:
            like, work = max(others, key=lambda other: sum(map(operator.eq, other[0].parameters, launch.parameters)))
            share = math.prod(launch.grid) / math.prod(like.grid)
            yield launch, 1, replace(work, cached=work.cached * share, memory=work.memory * share, scratch=work.scratch * share)
            continue
        key = without_places(launch), architecture
        if key not in _WORKS:
            _WORKS[key] = work_of(recorded, architecture)
        if count > 2:
            others.append((launch, _WORKS[key]))
        yield launch, count, _WORKS[key]


def predict(
    name: str, gpu: GPU, subject: str, size: tuple[int, ...], mode: str, dtype: str, backend: str, mamba: Path | None = None
) -> dict:
    """One row of the results. mamba: the folder of mamba-ssm, which is the backend of that name."""
    if backend == mamba_launches.NAME:
        ops = Ops()
        ops.calls[subject] = 1
        launches_of = [(mamba_launches.launches(mamba, size, mode, dtype, gpu.architecture, TRITON), 0, 0)]
    else:
        ops = ops_of(subject, size, mode, dtype, backend)
        launches_of = recorded(tuple(ops.calls), gpu.architecture, gpu.multiprocessors, gpu.shared, backend, dtype == "tf32")
    totals, launched = dict.fromkeys(SCENARIOS, 0.0), 0
    kernels, bounds = defaultdict(dict.fromkeys(SCENARIOS, 0.0).copy), defaultdict(Counter)
    for called, (launches, others, other_bytes) in zip(ops.calls.values(), launches_of, strict=True):
        ops.others, ops.other_bytes = ops.others + called * others, ops.other_bytes + called * other_bytes
        for launch, count, work in works_of(launches, gpu.architecture):
            count *= called
            launched += count
            if work.unknown > 0.01:
                print(f"not followed: {work.unknown:.1%} of {machine_code.short_name(launch.kernel)}", file=sys.stderr)
            for scenario, values in SCENARIOS.items():
                took, bound = seconds(launch, work, gpu, values)
                totals[scenario] += count * took
                kernels[launch.kernel][scenario] += count * took
                if scenario == "middle":
                    bounds[launch.kernel][bound] += count * took
    by_kernel = Counter()
    bound_by = {}
    for kernel, times in kernels.items():
        name_of = machine_code.short_name(machine_code.demangled((kernel.split("@")[0],))[0])
        by_kernel[name_of] += round(1e3 * times["middle"], 4)
        bound_by[name_of] = [by_kernel[name_of], max(bounds[kernel], key=bounds[kernel].get)]
    if ops.others:
        for scenario, values in SCENARIOS.items():
            took = ops.other_bytes / gpu.memory / values.memory + ops.others * values.gap
            totals[scenario] += took
            if scenario == "middle":
                bound_by["PyTorch's own ops"] = [round(1e3 * took, 4), "memory"]
    low, middle, high = (round(1e3 * totals[s], 4) for s in SCENARIOS)
    facts = {"gpu": name, "op": subject, "shape": "×".join(map(str, size)), "mode": mode, "dtype": dtype, "backend": backend}
    times = {"ms_low": low, "ms": middle, "ms_high": high, "launches": launched + ops.others}
    return facts | times | {"bound_by": dict(sorted(bound_by.items(), key=lambda k: -k[1][0]))}


MODELS = [("restormer_base", size) for size in ((384, 384), (896, 896), (2192, 3296))]
DTYPES = ("bfloat16", "float32", "tf32")  # the last: float32 whose products PyTorch allows to be of TF32


def cases() -> list[tuple]:
    """(subject, size, mode, dtype) of every row."""
    import problems

    subjects = [*MODELS, *(("selective_scan", shape) for shape in problems.SCAN_SHAPES)]
    subjects += [("causal_conv1d", shape) for shape in problems.SCAN_SHAPES]
    subjects += [("add_norm", shape) for shape in problems.NORM_SHAPES]
    multiplies = {subject for subject, _ in MODELS}
    return [
        (subject, size, mode, dtype)
        for dtype in DTYPES
        for subject, size in subjects
        for mode in ("forward", "training")
        if dtype != "tf32" or subject in multiplies
    ]


IDENTITY = ("gpu", "op", "shape", "mode", "dtype", "backend")


def with_row(results: dict, row: dict) -> dict:
    """Results with another row, in place of an earlier one of the same."""
    order = [(subject, "×".join(map(str, size)), mode, dtype) for subject, size, mode, dtype in cases()]

    def place(r: dict) -> tuple:
        return order.index((r["op"], r["shape"], r["mode"], r["dtype"])), list(GPUS).index(r["gpu"]), r["backend"]

    others = [r for r in results["predictions"] if any(r[key] != row[key] for key in IDENTITY)]
    return results | {"predictions": sorted([*others, row], key=place)}


def begun(before: dict | None, now: dict) -> dict:
    """Results to add rows to: those before where they are of the same committed kernels, constants and compiler; else none, and
    the times that were predicted for the first GPU are history."""
    if before and all(before[key] == value for key, value in now.items()) and not now["commit"].endswith("-dirty"):
        return before
    history = before["history"] if before else []
    if before and before["predictions"] and before["commit"] != now["commit"]:
        first = before["predictions"][0]["gpu"]
        times = {tables.subject(row): row["ms"] for row in before["predictions"] if row["gpu"] == first}
        history = [*history, {"commit": before["commit"], "ms": times}]
    return {"predictions": [], **now, "history": history}


def main() -> None:
    import run

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", nargs="+", choices=GPUS, default=list(GPUS))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="models and ops; default: all")
    parser.add_argument("--sizes", nargs="+", metavar="HxW", help="default: all")
    parser.add_argument("--modes", nargs="+", default=["forward", "training"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--backends", nargs="*", choices=("cuda", "triton"), default=["cuda"])
    parser.add_argument("--mamba-ssm", type=Path, metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    if options.mamba_ssm and not (options.mamba_ssm / mamba_launches.HEADERS).is_dir():
        parser.error(f"{options.mamba_ssm} is no unpacked source distribution of mamba-ssm: it has no {mamba_launches.HEADERS}")
    constants = {"gpus": {k: asdict(v) for k, v in GPUS.items()}, "scenarios": {k: asdict(v) for k, v in SCENARIOS.items()}}
    now = {"constants": constants | {"latencies": LATENCIES}}
    now |= {"versions": {"torch": torch.__version__, "nvcc": machine_code.release()}}
    now |= {"commit": run.commit("csrc", "autohdr/kernels", "autohdr/models")}
    results = begun(json.loads(options.out.read_text()) if options.out.exists() else None, json.loads(json.dumps(now)))
    backends = [*options.backends, *[mamba_launches.NAME] * bool(options.mamba_ssm)]
    for (subject, size, mode, dtype), name, backend in itertools.product(cases(), options.gpus, backends):
        if backend == mamba_launches.NAME and subject != "selective_scan":
            continue
        if options.only and subject not in options.only or options.sizes and "x".join(map(str, size)) not in options.sizes:
            continue
        if mode not in options.modes or dtype not in options.dtypes:
            continue
        row = predict(name, GPUS[name], subject, size, mode, dtype, backend, options.mamba_ssm)
        results = with_row(results, row)
        run.write(results, options.out)
        heading = f"{row['ms']:.2f} ms ({row['ms_low']:.2f} to {row['ms_high']:.2f}), {row['launches']} launches"
        print(f"{name} {subject} {row['shape']} {mode} {dtype} {backend}: {heading}")
        for kernel, (ms, bound) in list(row["bound_by"].items())[:12]:
            print(f"    {ms:9.3f} ms  {bound:<20} {kernel}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--record"]:
        record(Path(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5]))
    else:
        main()
