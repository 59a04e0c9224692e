"""The depthwise 3×3 convolution, with the gates that follow it, and its backward pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from autohdr.kernels.image.view import VARYING, View

_ROWS = 4  # that a program of the forward pass convolves at once: a row is loaded for three of them
_BACKWARD_ROWS = 4
_TILE = 512  # pixels of a row × channels of a program of the backward pass, which holds nine sums of each
_PROGRAMS = 1056  # of the backward pass, where there are pixels enough
_FEWEST_SLOTS = 32
_TILES_EACH = 4  # that a program of the backward pass takes at least, or its sums would cost more than they


@triton.jit
def normal_cdf(x, DTYPE: tl.constexpr):
    """The standard normal distribution function, for results that become a DTYPE."""
    if DTYPE == tl.bfloat16:  # of csrc/common/cuda_math.cuh, which says its error: a third of erf's instructions
        t = x * x
        p = ((1.3276467e-05 * t - 1.4344088e-03) * t + 1.0953641e-01) * t + 2.2971661
        return 1.0 / (1.0 + tl.exp2(-x * p))
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))  # 1 / √2


@triton.jit
def convolution(image, taps, y, x, channel, end, width, pitch, taps_pitch, ROWS: tl.constexpr):
    """The 3×3 convolution with taps [9, taps_pitch] of the pixels x of ROWS rows from y on, each float32 [x, channel]; rows are
    zeros from `end` on. image is at row y; its pixels are `pitch` apart. A row that is loaded serves three."""
    sums = ()
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.zeros([x.shape[0], channel.shape[0]], tl.float32),)
    for j in tl.static_range(3):
        column = x + (j - 1)
        offset = column[:, None] * pitch + channel[None, :]
        above, own = tl.load(taps + j * taps_pitch + channel)[None, :], tl.load(taps + (3 + j) * taps_pitch + channel)[None, :]
        below = tl.load(taps + (6 + j) * taps_pitch + channel)[None, :]
        for i in tl.static_range(-1, ROWS + 1):
            there = (column >= 0) & (column < tl.where((y + i >= 0) & (y + i < end), width, 0))
            value = tl.load(image + i * width.to(tl.int64) * pitch + offset, mask=there[:, None], other=0.0).to(tl.float32)
            added = ()
            for r in tl.static_range(ROWS):
                if i == r - 1:
                    added = added + (sums[r] + value * above,)
                elif i == r:
                    added = added + (sums[r] + value * own,)
                elif i == r + 1:
                    added = added + (sums[r] + value * below,)
                else:
                    added = added + (sums[r],)
            sums = added
    return sums


@triton.jit(do_not_specialize=VARYING)
def _convolve(
    image,  # [images][pixels][image.row]
    taps,  # [9][taps_pitch]
    bias,  # [taps_pitch], or None
    out,  # [images][pixels][out.row], or None
    d,  # [images][pixels][d.row], of a gate's backward pass, or None
    sums,  # [images][programs of an image][channels], or None
    part,
    channels,
    taps_pitch,
    pixels,
    first,
    height,
    width,
    GATE: tl.constexpr,
    ROWS: tl.constexpr,
    BX: tl.constexpr,
    BC: tl.constexpr,
):
    """out = the 3×3 convolution plus bias, or a gate's value of its halves, the second `part` channels on; sums = what a program
    adds up of that. A program owns ROWS × BX pixels and BC channels.

    d, whose first half is the gradient of the gate's value, becomes that of the convolution.
    """
    of_row = tl.cdiv(width, BX)
    x = tl.program_id(0) % of_row * BX + tl.arange(0, BX)
    row, channel = tl.program_id(0) // of_row * ROWS, tl.program_id(1) * BC + tl.arange(0, BC)
    rows, image_at = pixels // width, tl.program_id(2).to(tl.int64)
    end, begin = tl.minimum(height, first + rows + 1), row * width.to(tl.int64)
    data, at = image.data + image_at * image.image + begin * image.row, x[:, None]
    values = convolution(data, taps, first + row, x, channel, end, width, image.row, taps_pitch, ROWS)
    if GATE != "none":
        gates = convolution(data + part, taps + part, first + row, x, channel, end, width, image.row, taps_pitch, ROWS)
    wanted = (channel < channels)[None, :]
    total = tl.zeros([BX, BC], tl.float32)
    for r in tl.static_range(ROWS):
        value = values[r]
        there = (x < tl.where(row + r < rows, width, 0))[:, None] & wanted
        if bias is not None:
            value += tl.load(bias + channel)[None, :]
        if GATE != "none":
            gate = gates[r]
            if bias is not None:
                gate += tl.load(bias + part + channel)[None, :]
            along = gate
            if GATE == "gelu":
                cdf = normal_cdf(value, image.data.dtype.element_ty)
                along *= cdf + value * tl.exp(-0.5 * value * value) * 0.3989422804014327  # 1 / √(2π)
                value *= cdf
            if d is not None:
                to = d.data + image_at * d.image + (begin + r * width) * d.row + at * d.row + channel[None, :]
                gradient = tl.load(to, mask=there, other=0.0).to(tl.float32)
                tl.store(to, gradient * along, mask=there)
                tl.store(to + part, gradient * value, mask=there)
            value *= gate
        if out is not None:
            to = out.data + image_at * out.image + (begin + r * width) * out.row + at * out.row + channel[None, :]
            tl.store(to, value, mask=there)
        if sums is not None:
            total += tl.where(there, value, 0.0)
    if sums is not None:
        to = sums + (image_at * tl.num_programs(0) + tl.program_id(0)) * channels + channel
        tl.store(to, tl.sum(total, 0), mask=channel < channels)


def _columns(channels: int, most: int) -> tuple[int, int]:
    """How many pixels of a row and channels, of a multiple of 16, a program takes: `most` elements."""
    bc = min(channels & -channels, 64)
    return most // bc, bc


def _forward_grid(hidden: View, gated: bool) -> tuple[int, int, tuple[int, int, int]]:
    """BX, BC, and how many programs: of an image, of its channels, and of images."""
    images, rows, width, channels = hidden.data.shape
    part = channels // 2 if gated else channels
    bx, bc = _columns(part, 512 if gated else 1024)
    return bx, bc, (triton.cdiv(width, bx) * triton.cdiv(rows, _ROWS), part // bc, images)


def gate_sums(hidden: View, channels: int) -> Tensor:
    """Memory for what programs of a gate add up [images, programs, channels]."""
    _, _, (programs, _, images) = _forward_grid(hidden, True)
    return torch.empty((images, programs, channels), dtype=torch.float32, device=hidden.data.device)


def convolve(
    hidden: View,
    taps: Tensor,
    out: View | None,
    *,
    bias: Tensor | None = None,
    gate: str = "none",
    d: View | None = None,
    sums: Tensor | None = None,
) -> None:
    """Launches _convolve: out = hidden's 3×3 convolution with taps [9, channels] plus bias, or the gate of its halves: "gelu" (of
    the first, times the second) or "simple" (the first times the second). hidden, whose channels are multiples of 16, reaches a
    row further; out and sums may have fewer channels."""
    bx, bc, grid = _forward_grid(hidden, gate != "none")
    part = grid[1] * bc
    channels = out.data.shape[3] if out else part if sums is None else sums.shape[2]
    _convolve[grid](
        hidden.matrix,
        taps,
        bias,
        out and out.matrix,
        d and d.matrix,
        sums,
        part,
        channels,
        taps.stride(0),
        *hidden.place,
        GATE=gate,
        ROWS=_ROWS,
        BX=bx,
        BC=bc,
        enable_fp_fusion=True,
    )


@triton.jit(do_not_specialize=VARYING)
def _depthwise_backward(
    hidden,  # [images][pixels][channels], as d and d_hidden
    d,  # the gradient of hidden's convolution
    taps,  # [9][channels]
    d_hidden,
    sums,  # [slots][9][channels]
    pixels,
    images,
    channels,
    first,
    height,
    width,
    ROWS: tl.constexpr,
    BX: tl.constexpr,
    BC: tl.constexpr,
):
    """d_hidden, and sums += the gradients of the taps. A program owns BC channels and every slots-th tile of ROWS × BX pixels."""
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    of_row, rows = tl.cdiv(width, BX), pixels // width
    each, end = of_row * tl.cdiv(rows, ROWS), tl.minimum(height, first + rows + 1)
    totals = ()
    for _ in tl.static_range(9):
        totals = totals + (tl.zeros([BX, BC], tl.float32),)
    for index in range(tl.program_id(1), each * images, tl.num_programs(1)):
        image, row = (index // each).to(tl.int64), index % each // of_row * ROWS
        x, begin = index % of_row * BX + tl.arange(0, BX), row * width.to(tl.int64) * channels
        at, pitch = x[:, None] * channels + channel[None, :], width.to(tl.int64) * channels
        values, results = (), ()
        for r in tl.static_range(ROWS):
            there = x < tl.where(row + r < rows, width, 0)
            value = tl.load(hidden.data + image * hidden.image + begin + r * pitch + at, mask=there[:, None], other=0.0)
            values, results = values + (value.to(tl.float32),), results + (tl.zeros([BX, BC], tl.float32),)
        for j in tl.static_range(3):  # tap (i, j) leads back to a pixel from one 1 - i rows further down and 1 - j to the right
            column, tap = x + (1 - j), taps + j * channels + channel
            above, own = tl.load(tap)[None, :], tl.load(tap + 3 * channels)[None, :]
            below = tl.load(tap + 6 * channels)[None, :]
            for i in tl.static_range(-1, ROWS + 1):
                inside = (column >= 0) & (column < tl.where((first + row + i >= 0) & (first + row + i < end), width, 0))
                from_ = d.data + image * d.image + begin + i * pitch + (1 - j) * channels + at
                g = tl.load(from_, mask=inside[:, None], other=0.0).to(tl.float32)
                changed, added = (), ()
                for r in tl.static_range(ROWS):
                    if i == r + 1:
                        changed = changed + (results[r] + g * above,)
                    elif i == r:
                        changed = changed + (results[r] + g * own,)
                    elif i == r - 1:
                        changed = changed + (results[r] + g * below,)
                    else:
                        changed = changed + (results[r],)
                for t in tl.static_range(9):
                    if t % 3 == j and i - 1 + t // 3 >= 0 and i - 1 + t // 3 < ROWS:
                        added = added + (totals[t] + g * values[i - 1 + t // 3],)
                    else:
                        added = added + (totals[t],)
                results, totals = changed, added
        for r in tl.static_range(ROWS):
            there = x < tl.where(row + r < rows, width, 0)
            tl.store(d_hidden.data + image * d_hidden.image + begin + r * pitch + at, results[r], mask=there[:, None])
    to = sums + tl.program_id(1).to(tl.int64) * 9 * channels + channel
    for t in tl.static_range(9):
        tap = to + t * channels
        tl.store(tap, tl.load(tap) + tl.sum(totals[t], 0))


def depthwise_slots(channels: int, pixels: int) -> int:
    """For the sums of depthwise_backward, over steps of up to `pixels`."""
    bx, bc = _columns(channels, _TILE)
    enough = triton.cdiv(pixels, _TILES_EACH * _BACKWARD_ROWS * bx)
    return min(max(_PROGRAMS * bc // channels, _FEWEST_SLOTS), enough)


def depthwise_backward(hidden: View, d: View, taps: Tensor, d_hidden: View, sums: Tensor) -> None:
    """d_hidden, given the gradient d of the convolution, which reaches a row further; adds the taps' gradients to sums
    [slots, 9, channels]."""
    images, *_, channels = hidden.data.shape
    pixels, *place = hidden.place
    bx, bc = _columns(channels, _TILE)
    _depthwise_backward[channels // bc, sums.shape[0]](
        hidden.matrix,
        d.matrix,
        taps,
        d_hidden.matrix,
        sums,
        pixels,
        images,
        channels,
        *place,
        ROWS=_BACKWARD_ROWS,
        BX=bx,
        BC=bc,
        num_warps=4,
        enable_fp_fusion=True,
    )
