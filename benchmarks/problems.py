"""The ops' inputs for benchmarks, and each op as every competitor runs it: a backend of ours, or PyTorch by other means."""

import functools
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.associative_scan import associative_scan
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from autohdr import kernels

SCAN_SHAPES = [(1, 192, 4096), (2, 96, 9216), (1, 192, 147456), (8, 1536, 4096)]  # batch, dim, seqlen
DSTATE = 16
NORM_SHAPES = [(147456, 96), (36864, 192), (2304, 768)]  # rows, channels: levels of mamba_diffusion_large at 384×384
COMPILED = "max-autotune-no-cudagraphs"  # graphs would copy x at every call, and hide their memory
LEVELS = (48, 96, 192, 384)  # channels of restormer_base's levels, each at half the resolution of the one before
NAFNET_LEVELS = (32, 64, 128, 256, 512)  # nafnet_32's


@dataclass(frozen=True)
class Problem:
    """An op's call on tensors.

    call(*tensors, backend=...): the op. tensors: its arguments, all of which get gradients. dy: the gradient of what it returns.
    """

    op: str
    call: Callable[..., Tensor | tuple[Tensor, ...]]
    tensors: tuple[Tensor, ...]
    dy: Tensor | tuple[Tensor, ...]

    def to(self, dtype: torch.dtype) -> "Problem":
        tensors, dy = tree_map(lambda t: t.to(dtype), (self.tensors, self.dy))
        return replace(self, tensors=tensors, dy=dy)

    def runner(self, mode: str, column: str) -> Callable[[], list[Tensor]]:
        """A function that returns the outputs or, in mode training, the gradients of all tensors."""
        call = functools.partial(self.call, backend="reference")
        if column == "compiled":
            torch.compiler.reset()  # each shape is compiled for itself
            call = torch.compile(call, mode=COMPILED, dynamic=False)
        elif column == "checkpointed":
            call = functools.partial(checkpoint, call, use_reentrant=False)
        else:
            call = functools.partial(self.call, backend=column)

        def forward() -> list[Tensor]:
            with torch.inference_mode():
                return tree_leaves(call(*self.tensors))

        def training() -> list[Tensor]:
            leaves = [t.detach().requires_grad_() for t in self.tensors]
            return list(torch.autograd.grad(call(*leaves), leaves, self.dy))

        return forward if mode == "forward" else training


def _image_problem(op: str, call: Callable, x: Tensor, weights: list[Tensor], dtype: torch.dtype) -> Problem:
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    return Problem(op, call, (x, *weights), torch.randn_like(x))


def _awkward(*shapes: tuple[int, ...]) -> Callable:
    """Marks a problem with sizes of its own for compute-sanitizer: small, and multiples of nothing."""

    def mark(make: Callable) -> Callable:
        make.awkward = shapes
        return make

    return mark


@_awkward((48, 13, 21), (96, 9, 34))
def mdta(channels: int, height: int, width: int, dtype: torch.dtype, device: str) -> Problem:
    """One image, as in a Restormer: 48 channels a head."""
    randn = _generator(device)
    heads = max(1, channels // 48)
    weights = [
        0.5 + torch.rand(channels, device=device),
        randn(channels) * 0.1,
        randn(3 * channels, channels, 1, 1) / channels**0.5,
        randn(3 * channels, 1, 3, 3) / 3,
        torch.ones(heads, 1, 1, device=device),
        randn(channels, channels, 1, 1) / channels**0.5,
    ]

    def call(*tensors: Tensor, backend: str) -> Tensor:
        return kernels.mdta(*tensors, heads, backend=backend)

    return _image_problem("mdta", call, randn(1, channels, height, width), weights, dtype)


@_awkward((48, 13, 21), (96, 9, 34))
def gdfn(channels: int, height: int, width: int, dtype: torch.dtype, device: str) -> Problem:
    """One image, as in a Restormer: 2.66 hidden channels for each."""
    randn = _generator(device)
    hidden = int(channels * 2.66)
    weights = [
        0.5 + torch.rand(channels, device=device),
        randn(channels) * 0.1,
        randn(2 * hidden, channels, 1, 1) / channels**0.5,
        randn(2 * hidden, 1, 3, 3) / 3,
        randn(channels, hidden, 1, 1) / hidden**0.5,
    ]
    return _image_problem("gdfn", kernels.gdfn, randn(1, channels, height, width), weights, dtype)


@_awkward((32, 13, 21), (37, 9, 34))
def nafblock(channels: int, height: int, width: int, dtype: torch.dtype, device: str) -> Problem:
    """One image, as in a NAFNet."""
    randn = _generator(device)

    def norm() -> list[Tensor]:
        return [0.5 + torch.rand(channels, device=device), randn(channels) * 0.1]

    def convolution(channels_out: int, *shape: int) -> list[Tensor]:
        return [randn(channels_out, *shape) / math.prod(shape) ** 0.5, randn(channels_out) * 0.1]

    pointwise, double, scale = (channels, channels, 1, 1), (2 * channels, channels, 1, 1), (1, channels, 1, 1)
    first = norm() + convolution(*double) + convolution(2 * channels, 1, 3, 3) + 2 * convolution(*pointwise) + [randn(*scale)]
    second = norm() + convolution(*double) + convolution(*pointwise) + [randn(*scale)]
    return _image_problem("nafblock", kernels.nafblock, randn(1, channels, height, width), first + second, dtype)


@_awkward((2, 33, 300), (1, 5, 1), (1, 192, 1030))
def selective_scan(batch: int, dim: int, seqlen: int, dtype: torch.dtype, device: str) -> Problem:
    """As in a trained Mamba: A = -1 ... -dstate, Δ between some thousandths and some tenths, D and a gate z."""
    randn = _generator(device)
    sequences = [randn(batch, dim, seqlen), randn(batch, dim, seqlen) * 0.5 - 4]
    sequences += [randn(batch, DSTATE, seqlen), randn(batch, DSTATE, seqlen), randn(batch, dim, seqlen)]
    u, delta, B, C, z = (t.to(dtype) for t in sequences)
    A = -torch.arange(1.0, DSTATE + 1, device=device).repeat(dim, 1)
    D, delta_bias = torch.ones(dim, device=device), torch.rand(dim, device=device)
    return Problem("selective_scan", scan, (u, delta, A, B, C, D, z, delta_bias), torch.randn_like(u))


@_awkward((2, 33, 300), (1, 5, 1), (1, 192, 1030))
def causal_conv1d(batch: int, dim: int, seqlen: int, dtype: torch.dtype, device: str) -> Problem:
    """As in MambaDiffusion: channel-last, four taps."""
    randn = _generator(device)
    x = randn(batch, seqlen, dim).to(dtype)
    call = functools.partial(kernels.causal_conv1d, layout="bld")
    return Problem("causal_conv1d", call, (x, randn(dim, 4) / 2, randn(dim) * 0.1), torch.randn_like(x))


@_awkward((300, 48), (33, 37), (5, 1999))
def add_norm(rows: int, channels: int, dtype: torch.dtype, device: str) -> Problem:
    """As in MambaDiffusion under autocast: the stream is float32."""
    randn = _generator(device)
    parameters = [randn(channels) * 0.01, 0.5 + torch.rand(channels, device=device), randn(channels) * 0.1]
    rows_of = [randn(rows, channels), randn(rows, channels).to(dtype)]
    return Problem("add_norm", kernels.add_norm, (*rows_of, *parameters), tuple(map(torch.randn_like, rows_of)))


@_awkward((37, 41, 0), (13, 21, 4), (3, 5, 6))
def apply_edit(height: int, width: int, bins: int, dtype: torch.dtype, device: str) -> Problem:
    """One image, with as many knots as the auto-tone has; a grid of 8×8 cells, or none where it has no bins."""
    randn = _generator(device)
    x = torch.rand(1, 3, height, width, device=device)
    x = x.to(dtype) if dtype.is_floating_point else (x * torch.iinfo(dtype).max).to(dtype)
    affine = torch.eye(3, 4, device=device)
    edit = [torch.linspace(0, 1, 33, device=device) ** 0.6 + 0.01 * randn(1, 3, 33), affine + 0.1 * randn(1, 3, 4)]
    edit += [affine + 0.1 * randn(1, 8, 8, bins, 3, 4)] if bins else []
    x = x.contiguous(memory_format=torch.channels_last)
    dy = torch.randn_like(x, dtype=dtype if dtype.is_floating_point else torch.float32)
    return Problem("apply_edit", kernels.apply_edit, (x, *edit), dy)


def _generator(device: str) -> Callable[..., Tensor]:
    torch.manual_seed(0)
    return functools.partial(torch.randn, device=device)


def sweeps(gate: Tensor, state: Tensor) -> Tensor:
    """h_t = gate_t h_{t-1} + state_t along the last axis, in log2(seqlen) sweeps over the whole sequence."""
    step = 1
    while step < gate.shape[-1]:
        state = torch.cat([state[..., :step], state[..., step:] + gate[..., step:] * state[..., :-step]], -1)
        gate = torch.cat([gate[..., :step], gate[..., step:] * gate[..., :-step]], -1)
        step *= 2
    return state


def _associative(gate: Tensor, state: Tensor) -> Tensor:
    def combine(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    if gate.is_cuda:  # the fused form, which exists compiled alone
        return _compiled_scan()(combine, (gate, state), 3, combine_mode="pointwise")[1]
    return associative_scan(combine, (gate, state), 3, combine_mode="generic")[1]


@functools.cache
def _compiled_scan() -> Callable:
    return torch.compile(associative_scan, dynamic=False)


def _mamba_py(gate: Tensor, state: Tensor) -> Tensor:
    from mambapy.pscan import pscan

    return pscan(gate.permute(0, 3, 1, 2), state.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


STATES = {"parallel": sweeps, "associative_scan": _associative, "mamba.py": _mamba_py}
"""Scans in PyTorch that keep every token's state: functions of gate and input, each [batch, dim, dstate, seqlen]."""

PEERS = {"mamba-ssm": "mamba_ssm", "mamba.py": "mambapy"}
"""What can be installed beside autohdr: the column's name and the module's."""


def scan_columns() -> list[str]:
    """The competitors that are installed."""
    return [name for name in (*STATES, "mamba-ssm") if name not in PEERS or importlib.util.find_spec(PEERS[name])]


def scan(u, delta, A, B, C, D, z, delta_bias, *, backend: str) -> Tensor:
    if backend == "mamba-ssm":
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        return selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus=True)
    if backend not in STATES:
        return kernels.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus=True, backend=backend)
    wide = torch.promote_types(u.dtype, torch.float32)
    narrow, (u, delta, B, C, z) = u.dtype, (t.to(wide) for t in (u, delta, B, C, z))
    delta = F.softplus(delta + delta_bias[:, None])
    gate = torch.exp(delta[:, :, None] * A[:, :, None])  # [batch, dim, dstate, seqlen]
    state = STATES[backend](gate, (delta * u)[:, :, None] * B[:, None])
    return (((state * C[:, None]).sum(2) + D[:, None] * u) * F.silu(z)).to(narrow)


def scan_gold(problem: Problem, mode: str, states: int = 1 << 25) -> list[Tensor]:
    """problem's result in float64 by sweeps, over some channels at a time so that they keep no more than so many states each.

    The loop of the reference backend would take a kernel launch or ten for every token.
    """
    u, delta, A, B, C, D, z, delta_bias = problem.to(torch.float64).tensors
    batch, dim, seqlen = u.shape
    width = max(1, states // (batch * DSTATE * seqlen))
    parts = []
    for i in range(0, dim, width):
        s = slice(i, i + width)
        part = Problem("", scan, (u[:, s], delta[:, s], A[s], B, C, D[s], z[:, s], delta_bias[s]), problem.dy[:, s].double())
        parts.append(part.runner(mode, "parallel")())
    if mode == "forward":
        return [torch.cat([p[0] for p in parts], 1)]
    du, ddelta, dA, dB, dC, dD, dz, dbias = zip(*parts, strict=True)
    du, ddelta, dz = (torch.cat(t, 1) for t in (du, ddelta, dz))
    dA, dD, dbias = (torch.cat(t) for t in (dA, dD, dbias))
    return [du, ddelta, dA, sum(dB), sum(dC), dD, dz, dbias]
