"""The least that an op can take on a GPU, and the ceilings of a machine: what "times the floor" and the roofline stand on.

A row of results says which work it timed (op, shape, mode, dtype), so that both are computed from the row alone.
"""

import ctypes
import math
from dataclasses import dataclass
from functools import cache

import torch

from autohdr import create_model, list_models
from autohdr.kernels import OPS
from autohdr.models.network import Blocks, Down, Up
from autohdr.models.restormer import Attention, FeedForward

SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1, "uint16": 2}
HEAD = 48  # channels of a head in every Restormer but the official one's decoder


@dataclass(frozen=True)
class Work:
    """What one pass of an op must do at least.

    bytes: through device memory: inputs read and outputs written once, again only what a sum over the whole image needs first.
    products: multiply-adds of matrix products, which tensor cores do.
    fma: float32 instructions of everything else.
    special: results of the special-function units: exponentials, logarithms, reciprocals.
    """

    bytes: int
    products: int = 0
    fma: int = 0
    special: int = 0


@dataclass(frozen=True)
class Ceilings:
    """Rates a second of what Work counts; products by dtype, float32 as TF32."""

    bytes: float
    products: dict[str, float]
    fma: float
    special: float


# Multiply-adds a clock and multiprocessor: 16-bit matrix products, float32 instructions. NVIDIA's architecture white papers.
_PER_CLOCK = {(8, 0): (1024, 64), (8, 6): (512, 128), (8, 9): (512, 128), (9, 0): (2048, 128), (10, 0): (4096, 128)}
_SPECIAL_PER_CLOCK = 16
_ATTRIBUTES = {"multiprocessors": 16, "clock_khz": 13, "memory_clock_khz": 36, "memory_bus_bits": 37, "l2_bytes": 38}


def gpu_properties() -> dict:
    """Of the current GPU, as its driver tells. (torch tells the clocks in some versions alone.)"""
    driver, value = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    major, minor = torch.cuda.get_device_capability()
    found = {"name": torch.cuda.get_device_name(), "capability": [major, minor]}
    for name, attribute in _ATTRIBUTES.items():
        if code := driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, torch.cuda.current_device()):
            raise RuntimeError(f"cuDeviceGetAttribute({attribute}) failed with code {code}")
        found[name] = value.value
    return found


def ceilings(gpu: dict) -> Ceilings | None:
    """From gpu_properties(); None for an architecture whose rates are not in the table."""
    rates = _PER_CLOCK.get(tuple(gpu["capability"]))
    if rates is None:
        return None
    clocks = gpu["clock_khz"] * 1e3 * gpu["multiprocessors"]
    products, fma = (rate * clocks for rate in rates)
    return Ceilings(
        bytes=2 * gpu["memory_clock_khz"] * 1e3 * gpu["memory_bus_bits"] / 8,
        products={"bfloat16": products, "float16": products, "float32": products / 2},
        fma=fma,
        special=_SPECIAL_PER_CLOCK * clocks,
    )


def scan_forward(batch: int, dim: int, seqlen: int, dstate: int, size: int, gated: bool = True) -> Work:
    """u, delta, (z,) B and C in, out out. A state and token: its gate's exponential, two products, two multiply-adds; a channel
    and token: softplus's exponential and logarithm, silu's exponential and reciprocal."""
    e = batch * dim * seqlen
    return Work(
        bytes=size * ((4 if gated else 3) * e + 2 * batch * dstate * seqlen),
        fma=4 * dstate * e,
        special=(dstate + (4 if gated else 2)) * e,
    )


def scan_backward(batch: int, dim: int, seqlen: int, dstate: int, size: int) -> Work:
    """u, delta, z, d_out, B and C in, five gradients out; fifteen instructions a state and token, eight a channel and token."""
    e = batch * dim * seqlen
    return Work(bytes=size * (7 * e + 4 * batch * dstate * seqlen), fma=(15 * dstate + 8) * e, special=(dstate + 4) * e)


def selective_scan(batch: int, dim: int, seqlen: int, size: int, dstate: int) -> tuple[Work, Work]:
    """Forward and backward."""
    return scan_forward(batch, dim, seqlen, dstate, size), scan_backward(batch, dim, seqlen, dstate, size)


def causal_conv1d(batch: int, dim: int, seqlen: int, size: int) -> tuple[Work, Work]:
    """Forward and backward: x in, y out; x and dy in, dx out. Four taps; an exponential and a reciprocal for SiLU."""
    e = batch * dim * seqlen
    return Work(2 * size * e, fma=4 * e, special=2 * e), Work(3 * size * e, fma=12 * e, special=2 * e)


def add_norm(rows: int, channels: int, size: int) -> tuple[Work, Work]:
    """Forward and backward: stream (float32) and branch in, both out; with their outputs' gradients in, theirs out."""
    e = rows * channels
    return Work(2 * (4 + size) * e, fma=8 * e), Work(3 * (4 + size) * e, fma=20 * e)


def mdta(channels: int, height: int, width: int, size: int) -> tuple[Work, Work]:
    """Forward and backward. x is read twice, since attention needs sums over the whole image; x and dy too on the way back.
    Attention and the output projection are one matrix an image."""
    pixels = height * width
    e = size * channels * pixels
    gram = channels * HEAD
    forward = Work(3 * e, (4 * channels**2 + gram) * pixels, 27 * channels * pixels)
    return forward, Work(5 * e, (8 * channels**2 + 2 * gram) * pixels, 54 * channels * pixels)


def gdfn(channels: int, height: int, width: int, size: int) -> tuple[Work, Work]:
    """Forward and backward."""
    pixels = height * width
    e = size * channels * pixels
    hidden = int(channels * 2.66)
    return Work(2 * e, 3 * channels * hidden * pixels, 18 * hidden * pixels), Work(
        3 * e, 6 * channels * hidden * pixels, 36 * hidden * pixels
    )


def nafblock(channels: int, height: int, width: int, size: int) -> tuple[Work, Work]:
    """Forward and backward. x is read twice, since attention needs means over the whole image; x and dy too on the way back."""
    pixels = height * width
    e = size * channels * pixels
    products, fma = 6 * channels**2 * pixels, 18 * channels * pixels
    return Work(3 * e, products, fma), Work(5 * e, 2 * products, 2 * fma)


def apply_edit(height: int, width: int, bins: int, size: int) -> tuple[Work, Work]:
    """Forward and backward: x in, y out; x and dy in, dx out. Curves and matrix; with a grid its matrix between four points, of a
    row that lies between the grid's, and the product with it."""
    pixels = height * width
    fma = 12 + (12 * 4 + 9 if bins else 0)
    return Work(2 * 3 * size * pixels, fma=fma * pixels), Work(3 * 3 * size * pixels, fma=3 * fma * pixels)


def work(row: dict) -> list[Work]:
    """The passes of a row of results, one after the other; empty for an op whose least work is not known.

    Of a Restormer its blocks alone: what resamples, merges and projects at the ends is left out.
    """
    sizes, size = [int(n) for n in row["shape"].split("×")], SIZES[row["dtype"]]
    if row["op"] == "copy":
        return [Work(2 * sizes[0])]
    if row["op"] == "matmul":
        m, n, k = sizes
        return [Work(size * (m * n + n * k + m * k), m * n * k)]
    training = row["mode"] == "training"
    if row["op"] in OPS:  # the function of that name
        more = [row["dstate"]] if row["op"] == "selective_scan" else []
        return list(globals()[row["op"]](*sizes, size, *more)[: 1 + training])
    return [w for op, *shape in _ops(row["op"], *sizes[1:]) for w in op(*shape, size)[: 1 + training]]


@cache
def _ops(model: str, height: int, width: int) -> list[tuple]:
    """(op, channels, pixels, 1) of each half of a block, in the order of a forward pass; empty for a network of other ops."""
    found, channels, level = [], 0, 0
    if model not in list_models():
        return found
    with torch.device("meta"):
        network = create_model(model)
    pixels = math.prod(side + -side % network.multiple for side in (height, width))
    for stage in network.stages():
        if isinstance(stage, Blocks):
            ops = ({Attention: mdta, FeedForward: gdfn}.get(half.kind) for half in stage.halves)
            found += [(op, channels, pixels >> 2 * level, 1) for op in ops if op]
        channels = getattr(stage, "channels", channels)
        level += isinstance(stage, Down) - isinstance(stage, Up)
    return found


def floor_seconds(row: dict, limits: Ceilings) -> float | None:
    """No version runs faster: the passes one after the other, each as long as the unit that it keeps busy the longest."""
    passes = work(row)
    if not passes:
        return None
    products = limits.products.get(row["dtype"], math.inf)  # of a photo's own samples there are none
    return sum(max(w.bytes / limits.bytes, w.products / products, w.fma / limits.fma, w.special / limits.special) for w in passes)


def flops(row: dict) -> int:
    """Floating-point operations of a row's least work, without special functions."""
    return sum(2 * (w.products + w.fma) for w in work(row))


def moved_bytes(row: dict) -> int:
    return sum(w.bytes for w in work(row))
