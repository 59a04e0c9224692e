"""Every Triton kernel compiled for sm_80 and sm_90, as the calls below launch it: no register spilled, no more shared memory than
a block may have there. Nothing runs: a driver that knows an architecture and no GPU takes the place of Triton's own."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from again import unless_passed

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import machine_code

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from autohdr.kernels import OPS  # noqa: E402

SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10}  # bytes that a block may have
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter compiles nothing"),
]


# <op>_calls: calls of the op's triton_impl as (function, arguments), which between them launch each of its kernels in each of its
# configurations. Shapes may be small: nothing is computed.


def selective_scan_calls():
    """The usual number of states and the most, in both layouts, with z or a rank-one Δ, in even sizes and in odd ones, of which
    the compiler knows nothing."""
    for dim, seqlen, dstate, dtype, channel_last in ((64, 1024, 16, torch.bfloat16, False), (7, 517, 200, torch.float32, True)):
        rank_one = channel_last
        shapes = [(1, dim, seqlen), (1, 1 if rank_one else dim, seqlen), (1, 1, dstate, seqlen), (1, dim, seqlen)]
        u, delta, B, z = (torch.zeros(s, dtype=dtype).movedim(-1, 1 if channel_last else -1).contiguous() for s in shapes)
        A, D, states = torch.zeros(dim, dstate), torch.zeros(dim), torch.zeros(dstate * dim * -(-seqlen // 128))
        inputs = u, delta, A, B, B, D, None if rank_one else z, D, D if rank_one else None, A[None]
        yield "forward", (*inputs, True, channel_last, channel_last, False, rank_one)
        yield "backward", (u, A[None], *inputs, states, True, channel_last, channel_last)


def _image_arguments(channels, dtype, *sizes):
    x = torch.zeros(1, channels, 4, 4, dtype=dtype).contiguous(memory_format=torch.channels_last)
    return x, *map(torch.zeros, ((channels,), (channels,), *sizes))


def gdfn_calls():
    """Products as wide as the widest tile and narrower ones, the most channels that one kernel expands and more."""
    cases = (48, 127, torch.bfloat16), (192, 510, torch.bfloat16), (128, 340, torch.bfloat16), (128, 340, torch.float32)
    for channels, hidden, dtype in (*cases, (48, 127, torch.float32)):
        sizes = (2 * hidden, channels, 1, 1), (2 * hidden, 1, 3, 3), (channels, hidden, 1, 1)
        arguments = _image_arguments(channels, dtype, *sizes)
        yield "forward", (*arguments, 1e-6, True)
        if channels == 48:
            yield "backward", (arguments[0], *arguments, torch.zeros(0), 1e-6)


def mdta_calls():
    """Heads of 48 and of 96 channels, products of both widths, and channels that 16, 32 and 64 divide."""
    cases = (48, 1, torch.bfloat16), (96, 2, torch.bfloat16), (192, 2, torch.bfloat16), (48, 1, torch.float32)
    for channels, heads, dtype in (*cases, (192, 2, torch.float32)):
        sizes = (3 * channels, channels, 1, 1), (3 * channels, 1, 3, 3), (heads, 1, 1), (channels, channels, 1, 1)
        arguments = _image_arguments(channels, dtype, *sizes)
        gram, norm = torch.ones(1, heads, channels // heads, channels // heads), torch.ones(1, channels)
        yield "forward", (*arguments, heads, 1e-6)
        yield "backward", (arguments[0], *arguments, gram, norm, norm, heads, 1e-6)


def nafblock_calls():
    """The narrowest and the widest level of a nafnet_32."""
    for channels, dtype in ((32, torch.bfloat16), (512, torch.bfloat16), (32, torch.float32)):
        vector, scale, square = (channels,), (1, channels, 1, 1), ((channels, channels, 1, 1), (channels,))
        double = (2 * channels, channels, 1, 1), (2 * channels,)
        first = *double, (2 * channels, 1, 3, 3), (2 * channels,), *square, *square, scale
        arguments = _image_arguments(channels, dtype, *first, vector, vector, *double, *square, scale)
        yield "forward", (*arguments, 1e-6, True)
        yield "statistics", (*arguments[:7], 1e-6, 0, 4)
        yield "backward", (arguments[0], *arguments, torch.zeros(1, channels), torch.zeros(0), 1e-6)


def causal_conv1d_calls():
    for dtype in (torch.float32, torch.bfloat16):
        for channel_last, x in ((True, torch.zeros(1, 40, 20, dtype=dtype)), (False, torch.zeros(1, 20, 40, dtype=dtype))):
            arguments = x, torch.zeros(20, 4), torch.zeros(20), False, channel_last
            yield "forward", arguments
            yield "backward", (x, *arguments)


def add_norm_calls():
    """Rows of which a program takes many, and the longest."""
    for channels, dtype in ((96, torch.bfloat16), (96, torch.float32), (4096, torch.bfloat16)):
        rows, parameters = torch.zeros(100, channels), [torch.zeros(channels)] * 3
        arguments = rows, rows.to(dtype), *parameters, 1e-5
        yield "forward", arguments
        yield "backward", (rows, rows.to(dtype), *arguments)


def apply_edit_calls():
    """With a grid and without, and a photo's samples."""
    edit = torch.zeros(1, 3, 33), torch.zeros(1, 3, 4)
    for dtype, bins in ((torch.float32, 8), (torch.float32, 0), (torch.bfloat16, 8), (torch.uint8, 8)):
        x = torch.zeros(1, 3, 64, 64, dtype=dtype).contiguous(memory_format=torch.channels_last)
        arguments = x, *edit, torch.zeros(1, 8, 8, bins, 3, 4) if bins else None
        yield "forward", arguments
        if dtype.is_floating_point:
            yield "backward", (x, *arguments)


def faults(architecture: str, call, monkeypatch, cache) -> list[str]:
    """What is wrong with the kernels that call() launches, a line each."""
    compiled = []
    run = triton.JITFunction.run
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    monkeypatch.setattr(triton.JITFunction, "run", lambda self, *a, warmup, **k: compiled.append(run(self, *a, warmup=True, **k)))
    monkeypatch.setattr(triton.runtime.driver, "_active", machine_code.NoGPU(architecture))
    call()
    assert compiled
    found = []
    for kernel in {k.hash: k for k in compiled}.values():
        binary = cache / f"{kernel.hash}.cubin"
        binary.write_bytes(kernel.asm["cubin"])
        taken = machine_code.usage(binary)[kernel.name]
        name = f"{architecture} {kernel.name}"
        if taken.spilled:
            found.append(f"{name}: {taken.spilled} bytes spilled at {taken.registers} registers")
        if kernel.metadata.shared > SHARED[architecture]:
            found.append(f"{name}: {kernel.metadata.shared} bytes of shared memory")
    return found


# What has no products is compiled alike for both, and has less shared memory on sm_80.
PRODUCTS = ("gdfn", "mdta", "nafblock")
CASES = [
    pytest.param(op, architecture, marks=[pytest.mark.drill] * (op not in PRODUCTS and architecture != "sm_80"))
    for op in OPS
    if "triton" in OPS[op]
    for architecture in SHARED
]


@pytest.mark.parametrize(("op", "architecture"), CASES)
def test_no_kernel_spills(op, architecture, monkeypatch, tmp_path):
    implementation = importlib.import_module(f"autohdr.kernels.{op}.triton_impl")

    def calls():
        for function, arguments in globals()[f"{op}_calls"]():
            getattr(implementation, function)(*arguments)

    with unless_passed(
        ["autohdr/kernels", "tests/kernels/test_triton_resources.py", "benchmarks/machine_code.py"], op, architecture
    ):
        assert not faults(architecture, calls, monkeypatch, tmp_path)


@pytest.mark.parametrize(("batch", "segments"), [(8, 3), (16, 1)])
def test_a_scan_is_split_where_few_warps_run(batch, segments, monkeypatch):
    """Three warps a multiprocessor, one on three of its four schedulers, and six."""
    scan = importlib.import_module("autohdr.kernels.selective_scan.triton_impl")
    monkeypatch.setattr(scan, "_limits", lambda device: (132, 12 << 20))
    u, A, B = (torch.empty(s, device="meta") for s in ((batch, 1536, 4096), (1536, 16), (batch, 1, 16, 4096)))
    assert scan._Scan(u, A, B, None, channel_last=False, per_thread=16).segments == segments


@triton.jit
def spilling(x, LENGTH: tl.constexpr):
    """Keeps all numbers in registers until their sum is known."""
    at = tl.arange(0, LENGTH)
    v = tl.load(x + at)
    tl.store(x + at, v * tl.sum(v))


@pytest.mark.parametrize("architecture", SHARED)
def test_a_kernel_that_takes_too_much_is_found(architecture, monkeypatch, tmp_path):
    monkeypatch.setitem(SHARED, architecture, 0)
    x = torch.zeros(1)
    found = faults(architecture, lambda: spilling[(1,)](x, 2**15, num_warps=2), monkeypatch, tmp_path)
    assert len(found) == 2 and "bytes spilled" in found[0] and "of shared memory" in found[1]
