"""The depthwise 3×3 convolution, as what a kernel reads, and its backward pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from autohdr.kernels.image.view import VARYING, Place, View, tile

_ROWS = 4  # that a program of the forward pass convolves at once: a row is loaded for three of them
_TILE = 2048  # pixels × channels that a program of the backward pass holds, nine sums of them
_SUMS = 131072  # channels × slots of the taps' gradients: enough programs for a device where there are few channels
_FEWEST_SLOTS, _MOST_SLOTS = 32, 512
_TILES_EACH = 4  # that a program of the backward pass takes at least, or its sums would cost more than they


@triton.jit
def row_at(image, there, y, i, place, channels):
    """The pixels i rows further down: where their elements are, and which of those that are `there` are in the image."""
    return image + i * place.width.to(tl.int64) * channels, there & ((y + i >= 0) & (y + i < place.height))[:, None]


@triton.jit
def load_tap(row, offset, there, x, J: tl.constexpr, width, channels):
    """The elements at row + offset of the pixels J further right, float32; zeros where not there and outside the image."""
    if J == -1:
        there &= (x > 0)[:, None]
    elif J == 1:
        there &= (x < width - 1)[:, None]
    return tl.load(row + J * channels + offset, mask=there, other=0.0).to(tl.float32)


@triton.jit
def depthwise(image, taps, place, begin, channel, has, channels, SIZE: tl.constexpr):
    """The 3×3 convolution with taps [9, channels] of SIZE of an image's pixels from `begin` on, float32 [SIZE, channel]."""
    pixel = begin + tl.arange(0, SIZE)
    y, x = place.first + pixel // place.width, pixel % place.width
    there = (pixel < place.pixels)[:, None] & has[None, :]
    image += begin.to(tl.int64) * channels
    offset = tl.arange(0, SIZE)[:, None] * channels + channel[None, :]
    total = tl.zeros(there.shape, tl.float32)
    for i in range(3):  # not unrolled: the loads of nine taps at once would not fit the registers
        row, in_row = row_at(image, there, y, i - 1, place, channels)
        for j in tl.static_range(3):
            tap = tl.load(taps + (i * 3 + j) * channels + channel, mask=has, other=0.0)
            total += load_tap(row, offset, in_row, x, j - 1, place.width, channels) * tap[None, :]
    return total


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
    out,  # [images][pixels][out.row]
    part,
    taps_pitch,
    pixels,
    first,
    height,
    width,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    BX: tl.constexpr,
    BC: tl.constexpr,
):
    """out = the 3×3 convolution, or its gelu times that `part` channels on. A program owns ROWS × BX pixels and BC channels."""
    of_row = tl.cdiv(width, BX)
    x = tl.program_id(0) % of_row * BX + tl.arange(0, BX)
    row, channel = tl.program_id(0) // of_row * ROWS, tl.program_id(1) * BC + tl.arange(0, BC)
    end = tl.minimum(height, first + pixels // width + 1)  # of what image has: a tile's rows may be more than are left
    place, begin = (end, width, image.row, taps_pitch), row * width.to(tl.int64)
    data = image.data + tl.program_id(2).to(tl.int64) * image.image + begin * image.row
    values = convolution(data, taps, first + row, x, channel, *place, ROWS)
    if GATED:
        gates = convolution(data + part, taps + part, first + row, x, channel, *place, ROWS)
    to = out.data + tl.program_id(2).to(tl.int64) * out.image + begin * out.row + x[:, None] * out.row + channel[None, :]
    for r in tl.static_range(ROWS):
        value = values[r]
        if GATED:
            value *= normal_cdf(value, out.data.dtype.element_ty) * gates[r]
        there = x < tl.where((row + r) * width < pixels, width, 0)
        tl.store(to + r * width.to(tl.int64) * out.row, value, mask=there[:, None])


def convolve(hidden: View, taps: Tensor, out: View, *, gated: bool = False) -> View:
    """out = hidden's 3×3 convolution with taps [9, channels], or the gelu of its first half of channels times the second one. The
    channels of both are multiples of 16, hidden reaches a row further. Returns out."""
    images, rows, width, channels = out.data.shape
    bc = min(channels & -channels, 64)
    bx = (512 if gated else 1024) // bc
    _convolve[triton.cdiv(width, bx) * triton.cdiv(rows, _ROWS), channels // bc, images](
        hidden.matrix,
        taps,
        out.matrix,
        channels,
        taps.stride(0),
        *hidden.place,
        GATED=gated,
        ROWS=_ROWS,
        BX=bx,
        BC=bc,
        enable_fp_fusion=True,
    )
    return out


@triton.jit(do_not_specialize=VARYING)
def _backward(
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
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """d_hidden, and sums += the gradients of the taps. A program owns BC channels and every slots-th tile of BP pixels."""
    place = Place(pixels, first, height, width)
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    has = channel < channels
    each = tl.cdiv(pixels, BP)
    at = tl.arange(0, BP)[:, None] * channels + channel[None, :]
    zero = tl.zeros([BP, BC], tl.float32)
    totals = (zero, zero, zero, zero, zero, zero, zero, zero, zero)
    for index in range(tl.program_id(1), each * images, tl.num_programs(1)):
        image, begin = (index // each).to(tl.int64), index % each * BP
        pixel, base = begin + tl.arange(0, BP), begin.to(tl.int64) * channels
        y, x, there = first + pixel // width, pixel % width, (pixel < pixels)[:, None] & has[None, :]
        value = tl.load(hidden.data + image * hidden.image + base + at, mask=there, other=0.0).to(tl.float32)
        gradient, result, added = d.data + image * d.image + base, tl.zeros([BP, BC], tl.float32), ()
        for i in tl.static_range(3):  # tap (i, j) leads back to a pixel from one 1 - i rows further down and 1 - j to the right
            row, in_row = row_at(gradient, there, y, 1 - i, place, channels)
            for j in tl.static_range(3):
                g = load_tap(row, at, in_row, x, 1 - j, width, channels)
                result += g * tl.load(taps + (i * 3 + j) * channels + channel, mask=has, other=0.0)[None, :]
                added = added + (totals[i * 3 + j] + g * value,)
        totals = added
        tl.store(d_hidden.data + image * d_hidden.image + base + at, result, mask=there)
    to = sums + tl.program_id(1).to(tl.int64) * 9 * channels + channel
    for t in tl.static_range(9):
        tap = to + t * channels
        tl.store(tap, tl.load(tap, mask=has, other=0.0) + tl.sum(totals[t], 0), mask=has)


def depthwise_sums(channels: int, pixels: int, device: torch.device) -> Tensor:
    """Zeros [slots, 9, channels] for the sums of depthwise_backward, over steps of up to `pixels`."""
    enough = triton.cdiv(pixels, _TILES_EACH * _TILE // tile(channels, 64))
    slots = min(max(_SUMS // channels, _FEWEST_SLOTS), _MOST_SLOTS, enough)
    return torch.zeros((slots, 9, channels), dtype=torch.float32, device=device)


def depthwise_backward(hidden: View, d: View, taps: Tensor, d_hidden: View, sums: Tensor) -> None:
    """d_hidden, given the gradient d of the convolution, which reaches a row further; adds the taps' gradients to sums."""
    images, *_, channels = hidden.data.shape
    pixels, *place = hidden.place
    bc = tile(channels, 64)
    _backward[triton.cdiv(channels, bc), sums.shape[0]](
        hidden.matrix,
        d.matrix,
        taps,
        d_hidden.matrix,
        sums,
        pixels,
        images,
        channels,
        *place,
        BP=_TILE // bc,
        BC=bc,
        num_warps=8,
        enable_fp_fusion=True,
    )
