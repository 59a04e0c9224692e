"""add_norm in Triton, forward and backward: bound by memory.

A program owns some rows at a time, whole, in registers. Backward it computes sum and norm again, walks from rows to rows, and
leaves its sums for the parameters in a slot; the slots are added up in order, in float64.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 1024  # of a program's rows at a time, where a row has no more
SLOTS = 1024  # at most


@triton.jit
def _parameter(data, channel, channels):
    return tl.load(data + channel, mask=channel < channels, other=0.0)


@triton.jit
def _row(x, branch, scale, row, channel, rows, channels, eps):
    """Of the rows: where they lie, which of that is inside, the branch, the sum, its norm without weight and bias, and the norm's
    factor [rows, 1]. Summed as differences from the first channel: the mean of equal channels is exact."""
    inside = (row < rows) & (channel < channels)
    first = row.to(tl.int64) * channels
    at = first + channel
    b = tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + _parameter(scale, channel, channels) * b
    origin = tl.load(x + first, mask=row < rows, other=0.0).to(tl.float32)
    origin += tl.load(scale) * tl.load(branch + first, mask=row < rows, other=0.0).to(tl.float32)
    mean = origin + tl.sum(tl.where(inside, y - origin, 0.0), 1, keep_dims=True) / channels
    centred = tl.where(inside, y - mean, 0.0)
    factor = 1.0 / tl.sqrt(tl.sum(centred * centred, 1, keep_dims=True) / channels + eps)
    return at, inside, b, y, centred * factor, factor


@triton.jit
def _forward(x, branch, scale, weight, bias, y, normed, rows, channels, eps, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, CHANNELS)[None, :]
    at, inside, _, total, normal, _ = _row(x, branch, scale, row, channel, rows, channels, eps)
    tl.store(y + at, total, mask=inside)
    tl.store(normed + at, normal * _parameter(weight, channel, channels) + _parameter(bias, channel, channels), mask=inside)


@triton.jit
def _backward(
    dy, d_normed, x, branch, scale, weight, dx, d_branch, slots, rows, channels, eps, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    channel = tl.arange(0, CHANNELS)[None, :]
    d_scale = tl.zeros((1, CHANNELS), tl.float32)
    d_weight, d_bias = d_scale, d_scale
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        at, inside, b, _, normal, factor = _row(x, branch, scale, row, channel, rows, channels, eps)
        grad = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        if d_normed is not None:
            d = tl.load(d_normed + at, mask=inside, other=0.0).to(tl.float32)
            d_weight += tl.sum(d * normal, 0, keep_dims=True)
            d_bias += tl.sum(d, 0, keep_dims=True)
            d *= _parameter(weight, channel, channels)
            along = tl.sum(d * normal, 1, keep_dims=True) / channels
            grad += factor * (d - tl.sum(d, 1, keep_dims=True) / channels - normal * along)
        d_scale += tl.sum(tl.where(inside, grad * b, 0.0), 0, keep_dims=True)
        tl.store(dx + at, grad, mask=inside)
        tl.store(d_branch + at, grad * _parameter(scale, channel, channels), mask=inside)
    to = slots + tl.program_id(0) * 3 * channels + channel
    tl.store(to, d_scale, mask=channel < channels)
    tl.store(to + channels, d_weight, mask=channel < channels)
    tl.store(to + 2 * channels, d_bias, mask=channel < channels)


def _tile(x: Tensor) -> tuple[int, dict[str, Any]]:
    """(tiles of rows, a launch's options: a tile's size and warps)."""
    channels = x.shape[-1]
    side = triton.next_power_of_2(channels)
    at_once = max(1, ELEMENTS // side)
    return triton.cdiv(x.numel() // channels, at_once), {
        "ROWS": at_once,
        "CHANNELS": side,
        "num_warps": max(8, side // 128),
        "enable_fp_fusion": True,
    }


def forward(
    x: Tensor, branch: Tensor, scale: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    y, normed, channels = x.new_empty(x.shape), branch.new_empty(branch.shape), x.shape[-1]
    tiles, tile = _tile(x)
    if tiles:
        _forward[(tiles,)](x, branch, scale, norm_weight, norm_bias, y, normed, x.numel() // channels, channels, eps, **tile)
    return y, normed


def backward(
    dy: Tensor,
    d_normed: Tensor | None,
    x: Tensor,
    branch: Tensor,
    scale: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> tuple[Tensor, ...]:
    dx, d_branch, channels = x.new_empty(x.shape), branch.new_empty(branch.shape), x.shape[-1]
    tiles, tile = _tile(x)
    slots = scale.new_empty((min(tiles, SLOTS), 3, channels))
    if tiles:
        _backward[(len(slots),)](
            dy, d_normed, x, branch, scale, norm_weight, dx, d_branch, slots, x.numel() // channels, channels, eps, **tile
        )
    return dx, d_branch, *(t.clone() for t in slots.sum(0, dtype=torch.float64).float())
