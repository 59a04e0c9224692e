"""What the image ops share in Triton: matrix products between pixels and channels, the depthwise convolution, layer norm, and the
backward pass of "norm, 1×1, 3×3".

An op walks its images in steps of some rows (or of some whole images), small enough that what one kernel of a step writes is
still in the second-level cache when the next one reads it. Images are NHWC; a step's buffers hold its rows and those of the halo
that exist, and a kernel gets pointers to the step's first row in each. A 3×3 convolution is computed where its result is
multiplied, and not stored. Every sum has a fixed order: a program adds to its own slot, and slots are added up in order.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# Bytes of a step's buffers: within the second-level cache of the larger GPUs forward, and in few steps backward. The interpreter
# takes several steps of its small images.
FORWARD_BUDGET, BACKWARD_BUDGET = (64 << 10, 448 << 10) if INTERPRETED else (32 << 20, 96 << 20)
_VARYING = ["pixels", "images", "height", "width", "first"]  # not worth a compilation for every kind of number


@triton.jit
def dot(a, b, sums):
    """sums + a·b. float32 goes through the tensor cores as three products, which reach its precision but for two bits."""
    if INTERPRETED:  # it would multiply bfloat16's bits as integers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums)
    return tl.dot(a, b, sums, input_precision="tf32x3")


@triton.jit
def row_at(image, there, y, i, height, width, channels):
    """The pixels i rows further down: where their elements are, and which of those that are `there` are in the image."""
    return image + i * width.to(tl.int64) * channels, there & ((y + i >= 0) & (y + i < height))[:, None]


@triton.jit
def load_tap(row, offset, there, x, J: tl.constexpr, width, channels):
    """The elements at row + offset of the pixels J further right, float32; zeros where not there and outside the image."""
    if J == -1:
        there &= (x > 0)[:, None]
    elif J == 1:
        there &= (x < width - 1)[:, None]
    return tl.load(row + J * channels + offset, mask=there, other=0.0).to(tl.float32)


@triton.jit
def convolve(image, taps, begin, pixels, channel, has, first, height, width, channels, SIZE: tl.constexpr):
    """The 3×3 convolution with taps [9, channels] of an image's SIZE pixels from `begin` on, float32 [SIZE, channel]."""
    pixel = begin + tl.arange(0, SIZE)
    y, x, there = first + pixel // width, pixel % width, (pixel < pixels)[:, None] & has[None, :]
    image += begin.to(tl.int64) * channels
    offset = tl.arange(0, SIZE)[:, None] * channels + channel[None, :]
    total = tl.zeros(there.shape, tl.float32)
    for i in range(3):  # not unrolled: the loads of nine taps at once would not fit the registers
        row, in_row = row_at(image, there, y, i - 1, height, width, channels)
        for j in tl.static_range(3):
            tap = tl.load(taps + (i * 3 + j) * channels + channel, mask=has, other=0.0)
            total += load_tap(row, offset, in_row, x, j - 1, width, channels) * tap[None, :]
    return total


@triton.jit
def normal_cdf(x):
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit(do_not_specialize=_VARYING)
def norm_stats(x, shift, factor, pixels, channels, x_image, eps, BIASED: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):
    """Of every pixel: the mean, or 0 without a bias, and 1 / sqrt(variance + eps). A program owns BM pixels of an image."""
    image = tl.program_id(1).to(tl.int64)
    pixel, channel = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BC)
    inside = pixel < pixels
    there = inside[:, None] & (channel < channels)[None, :]
    at = x + image * x_image + pixel.to(tl.int64)[:, None] * channels + channel[None, :]
    value = tl.load(at, mask=there, other=0.0).to(tl.float32)
    mean = tl.sum(value, 1) / channels
    centred = tl.where(there, value - mean[:, None], 0.0)
    place = image * pixels + pixel
    tl.store(factor + place, 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 1) / channels + eps), mask=inside)
    tl.store(shift + place, mean if BIASED else tl.zeros_like(mean), mask=inside)


@triton.jit
def operand(
    a,
    taps,
    shift,
    factor,
    norm_weight,
    norm_bias,
    image,
    begin,
    pixels,
    channel,
    has,
    origin,
    part,
    first,
    height,
    width,
    channels,
    a_image,
    stats_image,
    KIND: tl.constexpr,
    BIASED: tl.constexpr,
    SIZE: tl.constexpr,
):
    """SIZE pixels of an image from `begin` on, channels from `origin` on, as an operand of a product: a itself ("plain"), its
    layer norm ("norm"), its 3×3 convolution ("conv"), or the convolution's gelu times that `part` channels on ("gate")."""
    dtype: tl.constexpr = a.dtype.element_ty
    a += image * a_image + origin
    if KIND == "conv" or KIND == "gate":
        taps += origin
        value = convolve(a, taps, begin, pixels, channel, has, first, height, width, channels, SIZE)
        if KIND == "gate":
            gate = convolve(a + part, taps + part, begin, pixels, channel, has, first, height, width, channels, SIZE)
            value *= normal_cdf(value) * gate
        return value.to(dtype)
    else:
        pixel = begin + tl.arange(0, SIZE)
        inside = pixel < pixels
        at = pixel.to(tl.int64)[:, None] * channels + channel[None, :]
        value = tl.load(a + at, mask=inside[:, None] & has[None, :], other=0.0)
        if KIND == "norm":
            place = image * stats_image + pixel
            mean, scale = tl.load(shift + place, mask=inside, other=0.0), tl.load(factor + place, mask=inside, other=0.0)
            weight = tl.load(norm_weight + channel, mask=has, other=0.0)
            value = (value.to(tl.float32) - mean[:, None]) * scale[:, None] * weight[None, :]
            if BIASED:
                value += tl.load(norm_bias + channel, mask=has, other=0.0)[None, :]
            value = value.to(dtype)
        return value


@triton.jit(do_not_specialize=_VARYING)
def multiply(
    a,  # [images][pixels][a_pixel], of head h the channels from h · k on
    taps,  # [9][a_pixel], of "conv" and "gate"
    shift,  # [images][pixels], of "norm"; with factor, norm_weight and norm_bias
    factor,
    norm_weight,
    norm_bias,
    w,  # [images or 1][heads][n][w_row]; SPLIT: what its rounding left follows in every row
    added,  # [images][pixels][added_pixel]
    added_taps,  # [9][added_pixel], of ADDED "conv" and "gate"
    scale,  # [images][heads][2][n], of ADDED "conv"
    out,  # [images][pixels][out_pixel]
    gated,  # [images][pixels][n], of ADDED "gate"
    pixels,
    k,
    n,
    heads,
    part,
    first,
    height,
    width,
    a_image,
    a_pixel,
    w_image,
    w_row,
    added_image,
    added_pixel,
    out_image,
    out_pixel,
    KIND: tl.constexpr,
    ADDED: tl.constexpr,
    BIASED: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """out[p][n] = Σ_k operand(a)[p][k] w[n][k], and what is ADDED, for every image and head. A program owns BM pixels × BN.

    ADDED: "none", "plain", "conv" (the sum and added's convolution, each times a scale), or "gate": the sum is the gradient of
    the gate of added's convolution; out gets the gradient of the convolution, gated the gate's value.
    """
    dtype: tl.constexpr = w.dtype.element_ty
    image, head = (tl.program_id(2) // heads).to(tl.int64), tl.program_id(2) % heads
    begin, column = tl.program_id(0) * BM, tl.program_id(1) * BN + tl.arange(0, BN)
    wanted = column < n
    w += image * w_image + head * n * w_row
    sums = tl.zeros([BM, BN], tl.float32)
    for start in range(0, k, BK):
        channel = start + tl.arange(0, BK)
        has = channel < k
        left = operand(
            a,
            taps,
            shift,
            factor,
            norm_weight,
            norm_bias,
            image,
            begin,
            pixels,
            channel,
            has,
            head * k,
            part,
            first,
            height,
            width,
            a_pixel,
            a_image,
            pixels,
            KIND,
            BIASED,
            BM,
        )
        at, there = w + column[None, :] * w_row + channel[:, None], has[:, None] & wanted[None, :]
        sums = dot(left, tl.load(at, mask=there, other=0.0), sums)
        if SPLIT:
            sums = dot(left, tl.load(at + k, mask=there, other=0.0), sums)

    pixel = begin + tl.arange(0, BM)
    there, row = (pixel < pixels)[:, None] & wanted[None, :], pixel.to(tl.int64)[:, None]
    out += image * out_image + head * n + row * out_pixel + column[None, :]
    if ADDED != "none":
        added += image * added_image + head * n
    if ADDED == "conv" or ADDED == "gate":
        added_taps += head * n
    if ADDED == "plain":
        sums += tl.load(added + row * added_pixel + column[None, :], mask=there, other=0.0).to(tl.float32)
    elif ADDED == "conv":
        scale += (image * heads + head) * 2 * n + column
        own, of_added = tl.load(scale, mask=wanted, other=0.0), tl.load(scale + n, mask=wanted, other=0.0)
        value = convolve(added, added_taps, begin, pixels, column, wanted, first, height, width, added_pixel, BM)
        value = value.to(dtype).to(tl.float32)  # as the sum's operand is, which it nearly cancels
        sums = sums * own[None, :] + value * of_added[None, :]
    elif ADDED == "gate":
        value = convolve(added, added_taps, begin, pixels, column, wanted, first, height, width, added_pixel, BM)
        gate = convolve(added + part, added_taps + part, begin, pixels, column, wanted, first, height, width, added_pixel, BM)
        cdf = normal_cdf(value)
        tl.store(gated + (image * pixels + row) * n + column[None, :], value * cdf * gate, mask=there)
        tl.store(out + part, sums * value * cdf, mask=there)
        sums *= gate * (cdf + value * tl.exp(-0.5 * value * value) * 0.3989422804014327)
    tl.store(out, sums, mask=there)


@triton.jit(do_not_specialize=_VARYING)
def multiply_outer(
    a,  # [images][pixels][a_pixel], of head h the channels from h · m on
    a_taps,  # [9][a_pixel], of "conv"
    b,  # [images][pixels][b_pixel], of head h the channels from h · n on
    b_taps,
    shift,  # [images, stats_image apart][pixels], of "norm"; with factor, norm_weight and norm_bias
    factor,
    norm_weight,
    norm_bias,
    sums,  # [slots, sums_slot apart][matrices][m][n]
    a_squares,  # [slots, squares_slot apart][matrices][m]
    b_squares,  # [slots, squares_slot apart][matrices][n]
    pixels,
    images,  # that a matrix sums over
    m,
    n,
    heads,
    first,
    height,
    width,
    a_image,
    a_pixel,
    b_image,
    b_pixel,
    stats_image,
    sums_slot,
    squares_slot,
    A: tl.constexpr,
    B: tl.constexpr,
    BIASED: tl.constexpr,
    SQUARES: tl.constexpr,
    BP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """sums[slot][matrix][m][n] += Σ_p operand(a)[p][m] operand(b)[p][n], and the sums of a's and b's squares. A matrix is a head
    of an image, or of all images together. A program owns BM × BN sums over its slot's share of the pixels, a range of them."""
    head = tl.program_id(1) % heads
    tiles = tl.cdiv(n, BN)
    row, column = tl.program_id(0) // tiles * BM + tl.arange(0, BM), tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    has_row, has_column = row < m, column < n
    each = tl.cdiv(pixels, BP)
    chunks, slot, slots = each * images, tl.program_id(2), tl.num_programs(2)
    begin, end = (chunks.to(tl.int64) * slot // slots).to(tl.int32), (chunks.to(tl.int64) * (slot + 1) // slots).to(tl.int32)
    total, a_total, b_total = tl.zeros([BM, BN], tl.float32), tl.zeros([BM], tl.float32), tl.zeros([BN], tl.float32)
    for start in range(begin, end, 256 // BP):
        # The tensor cores' sums cut instead of rounding: a long one would drift.
        part = tl.zeros([BM, BN], tl.float32)
        for chunk in range(start, min(start + 256 // BP, end)):
            image = (tl.program_id(1) // heads + chunk // each).to(tl.int64)
            pixel = chunk % each * BP
            left = operand(
                a,
                a_taps,
                shift,
                factor,
                norm_weight,
                norm_bias,
                image,
                pixel,
                pixels,
                row,
                has_row,
                head * m,
                0,
                first,
                height,
                width,
                a_pixel,
                a_image,
                stats_image,
                A,
                BIASED,
                BP,
            )
            right = operand(
                b,
                b_taps,
                shift,
                factor,
                norm_weight,
                norm_bias,
                image,
                pixel,
                pixels,
                column,
                has_column,
                head * n,
                0,
                first,
                height,
                width,
                b_pixel,
                b_image,
                stats_image,
                B,
                BIASED,
                BP,
            )
            part = dot(tl.trans(left), right, part)
            if SQUARES:
                left, right = left.to(tl.float32), right.to(tl.float32)
                a_total += tl.sum(left * left, 0)
                b_total += tl.sum(right * right, 0)
        total += part
    matrix, slot = tl.program_id(1).to(tl.int64), slot.to(tl.int64)
    at = sums + slot * sums_slot + (matrix * m + row[:, None]) * n + column[None, :]
    there = has_row[:, None] & has_column[None, :]
    tl.store(at, total + tl.load(at, mask=there, other=0.0), mask=there)
    if SQUARES:
        of_a = a_squares + slot * squares_slot + matrix * m + row
        of_b = b_squares + slot * squares_slot + matrix * n + column
        if tl.program_id(0) % tiles == 0:
            tl.store(of_a, a_total + tl.load(of_a, mask=has_row, other=0.0), mask=has_row)
        if tl.program_id(0) < tiles:
            tl.store(of_b, b_total + tl.load(of_b, mask=has_column, other=0.0), mask=has_column)


@triton.jit
def _tap(T: tl.constexpr, row, taps, value, result, sums, offset, x, there, channel, has, width, channels):
    """What tap T leads back to a pixel from a row of the convolution's gradient: added to the pixel's gradient, and the tap's."""
    g = load_tap(row, offset, there, x, 1 - T % 3, width, channels)
    return result + g * tl.load(taps + T * channels + channel, mask=has, other=0.0)[None, :], sums + g * value


@triton.jit(do_not_specialize=_VARYING)
def convolve_backward(
    hidden,  # [images][pixels][channels]
    d,  # [images][pixels][channels], the gradient of hidden's convolution
    taps,  # [9][channels]
    d_hidden,  # [images][pixels][channels]
    sums,  # [slots][9][channels]
    pixels,
    images,
    channels,
    first,
    height,
    width,
    hidden_image,
    d_image,
    d_hidden_image,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """d_hidden, and sums += the gradients of the taps. A program owns BC channels and every slots-th tile of BP pixels."""
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    has = channel < channels
    each = tl.cdiv(pixels, BP)
    at = tl.arange(0, BP)[:, None] * channels + channel[None, :]
    s0 = tl.zeros([BP, BC], tl.float32)
    s1, s2, s3, s4, s5, s6, s7, s8 = s0, s0, s0, s0, s0, s0, s0, s0
    for tile in range(tl.program_id(1), each * images, tl.num_programs(1)):
        image, begin = (tile // each).to(tl.int64), tile % each * BP
        pixel, base = begin + tl.arange(0, BP), begin.to(tl.int64) * channels
        y, x, there = first + pixel // width, pixel % width, (pixel < pixels)[:, None] & has[None, :]
        v = tl.load(hidden + image * hidden_image + base + at, mask=there, other=0.0).to(tl.float32)
        g, r = d + image * d_image + base, tl.zeros([BP, BC], tl.float32)
        row, ok = row_at(g, there, y, 1, height, width, channels)
        r, s0 = _tap(0, row, taps, v, r, s0, at, x, ok, channel, has, width, channels)
        r, s1 = _tap(1, row, taps, v, r, s1, at, x, ok, channel, has, width, channels)
        r, s2 = _tap(2, row, taps, v, r, s2, at, x, ok, channel, has, width, channels)
        row, ok = row_at(g, there, y, 0, height, width, channels)
        r, s3 = _tap(3, row, taps, v, r, s3, at, x, ok, channel, has, width, channels)
        r, s4 = _tap(4, row, taps, v, r, s4, at, x, ok, channel, has, width, channels)
        r, s5 = _tap(5, row, taps, v, r, s5, at, x, ok, channel, has, width, channels)
        row, ok = row_at(g, there, y, -1, height, width, channels)
        r, s6 = _tap(6, row, taps, v, r, s6, at, x, ok, channel, has, width, channels)
        r, s7 = _tap(7, row, taps, v, r, s7, at, x, ok, channel, has, width, channels)
        r, s8 = _tap(8, row, taps, v, r, s8, at, x, ok, channel, has, width, channels)
        tl.store(d_hidden + image * d_hidden_image + base + at, r, mask=there)
    at = sums + tl.program_id(1).to(tl.int64) * 9 * channels + channel
    _add(at, s0, has)
    _add(at + channels, s1, has)
    _add(at + 2 * channels, s2, has)
    _add(at + 3 * channels, s3, has)
    _add(at + 4 * channels, s4, has)
    _add(at + 5 * channels, s5, has)
    _add(at + 6 * channels, s6, has)
    _add(at + 7 * channels, s7, has)
    _add(at + 8 * channels, s8, has)


@triton.jit
def _add(at, sums, has):
    tl.store(at, tl.load(at, mask=has, other=0.0) + tl.sum(sums, 0), mask=has)


@triton.jit(do_not_specialize=_VARYING)
def norm_backward(
    x,  # [images][pixels][channels], as dy and dx
    d_normal,  # [images][pixels][channels]
    dy,
    dx,
    weight,
    sums,  # [slots][2][channels]
    pixels,
    images,
    channels,
    x_image,
    d_normal_image,
    dy_image,
    dx_image,
    eps,
    BIASED: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """dx = dy + the norm's gradient, and sums += the gradients of its weight and bias. A program owns every slots-th tile of BM
    pixels."""
    channel = tl.arange(0, BC)
    has = channel < channels
    w = tl.load(weight + channel, mask=has, other=0.0)[None, :]
    each = tl.cdiv(pixels, BM)
    d_weight, d_bias = tl.zeros([BM, BC], tl.float32), tl.zeros([BM, BC], tl.float32)
    for tile in range(tl.program_id(0), each * images, tl.num_programs(0)):
        image, pixel = (tile // each).to(tl.int64), tile % each * BM + tl.arange(0, BM)
        there = (pixel < pixels)[:, None] & has[None, :]
        at = pixel.to(tl.int64)[:, None] * channels + channel[None, :]
        value = tl.load(x + image * x_image + at, mask=there, other=0.0).to(tl.float32)
        d = tl.load(d_normal + image * d_normal_image + at, mask=there, other=0.0)
        centred = tl.where(there, value - (tl.sum(value, 1) / channels)[:, None], 0.0)
        factor = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 1) / channels + eps)[:, None]
        normal = tl.where(there, (centred if BIASED else value) * factor, 0.0)  # where nothing is, factor may be infinite
        g = d * w
        result = g - centred * factor * (tl.sum(g * normal, 1) / channels)[:, None]
        if BIASED:
            result -= (tl.sum(g, 1) / channels)[:, None]
        result = tl.load(dy + image * dy_image + at, mask=there, other=0.0).to(tl.float32) + factor * result
        tl.store(dx + image * dx_image + at, result, mask=there)
        d_weight += d * normal
        d_bias += d
    at = sums + tl.program_id(0).to(tl.int64) * 2 * channels + channel
    _add(at, d_weight, has)
    _add(at + channels, d_bias, has)


def round_up(n: int) -> int:
    """Channels of a buffer for n of them, so that every pixel's begin at a multiple of 16 bytes."""
    return triton.cdiv(n, 16) * 16


class View(NamedTuple):
    """Rows of images, from `first` on of `height`: data [images, rows, width, channels]; the channels may be some of more."""

    data: Tensor
    first: int
    height: int

    @staticmethod
    def of(x: Tensor) -> "View":
        """Whole images [batch, channels, height, width], channels_last."""
        batch, channels, height, width = x.shape
        return View(x.permute(0, 2, 3, 1).flatten().view(batch, height, width, channels), 0, height)  # strides of size-1 axes too

    def at(self, rows: range, images: slice = slice(None)) -> "View":
        return self._replace(data=self.data[images, rows.start - self.first : rows.stop - self.first], first=rows.start)

    def channels(self, begin: int, end: int) -> "View":
        return self._replace(data=self.data[..., begin:end])

    @property
    def pixels(self) -> int:
        return self.data.shape[1] * self.data.shape[2]

    @property
    def strides(self) -> tuple[int, int]:
        """From an image to the next, from a pixel to the next."""
        return self.data.stride(0), self.data.stride(2)


class Buffer:
    """Memory for the rows of a step and a halo, of some channels."""

    def __init__(self, steps: "Steps", channels: int, halo: int, dtype: torch.dtype):
        _, self.height, self.width, _ = steps.x.data.shape
        self.channels, rows = channels, min(steps.rows + 2 * halo, self.height)
        self.memory = torch.empty(steps.images * rows * self.width * channels, dtype=dtype, device=steps.x.data.device)

    def view(self, images: slice, rows: range) -> View:
        shape = images.stop - images.start, len(rows), self.width, self.channels
        return View(self.memory[: shape[0] * shape[1] * shape[2] * shape[3]].view(shape), rows.start, self.height)


class Steps:
    """A walk over images, or some of their rows, so that rows of `bytes_a_pixel` with a halo on each side stay within a budget.

    matrices: how many an image has; a grid has no more than 65535 in one axis."""

    def __init__(self, x: View, bytes_a_pixel: int, halo: int, budget: int, matrices: int = 1, rows: range | None = None):
        self.x, self.all_rows = x, range(x.height) if rows is None else rows
        row_bytes = x.data.shape[2] * bytes_a_pixel
        self.rows = min(max(budget // row_bytes - 2 * halo, 1), len(self.all_rows))
        fit = budget // (row_bytes * self.rows) if self.rows == len(self.all_rows) else 1
        self.images = max(min(fit, x.data.shape[0], 65535 // matrices), 1)

    def __iter__(self) -> Iterator[tuple[slice, range]]:
        for b in range(0, self.x.data.shape[0], self.images):
            for y in range(self.all_rows.start, self.all_rows.stop, self.rows):
                yield slice(b, min(b + self.images, self.x.data.shape[0])), range(y, min(y + self.rows, self.all_rows.stop))

    def around(self, rows: range, halo: int) -> range:
        return range(max(rows.start - halo, 0), min(rows.stop + halo, self.x.height))


def _tile(n: int, most: int) -> int:
    return min(max(triton.next_power_of_2(n), 16), most)


class Norm(NamedTuple):
    """What an operand's layer norm needs: its parameters, and every pixel's mean and factor [2, images, rows, width]."""

    weight: Tensor
    bias: Tensor | None
    stats: Tensor | None


def product(
    a: View,
    w: Tensor,
    out: View,
    *,
    kind: str = "plain",
    taps: Tensor | None = None,
    norm: Norm | None = None,
    added: View | None = None,
    add: str = "none",
    added_taps: Tensor | None = None,
    scale: Tensor | None = None,
    split: bool = False,
    gated: View | None = None,
) -> None:
    """Launches multiply. a, added, out and gated begin at the same row; w [images or 1, heads, n, at least k]."""
    (images, _, width, _), (_, heads, n, _), pixels = a.data.shape, w.shape, a.pixels
    k = a.data.shape[3] // (2 * heads if kind == "gate" else heads)
    conv, wide = kind in ("conv", "gate"), a.data.element_size() == 4
    narrow = add == "gate" or wide and add == "conv"  # more would not fit the registers
    bn, bk = _tile(n, 64 if narrow else 256 if conv and not wide else 128), _tile(k, 32)
    area = 4096 if conv or wide or add in ("conv", "gate") else 16384
    bm = min(max(area // max(bn, bk), 64), 128 if bn > 32 else 256)
    shift, factor = (None, None) if norm is None else norm.stats
    multiply[triton.cdiv(pixels, bm), triton.cdiv(n, bn), images * heads](
        a.data,
        taps,
        shift,
        factor,
        norm and norm.weight,
        norm and norm.bias,
        w,
        added and added.data,
        added_taps,
        scale,
        out.data,
        gated and gated.data,
        pixels,
        k,
        n,
        heads,
        n if add == "gate" else k,
        a.first,
        a.height,
        width,
        *a.strides,
        w.stride(0) if w.shape[0] > 1 else 0,
        w.stride(2),
        *(added.strides if added else (0, 0)),
        *out.strides,
        KIND=kind,
        ADDED=add,
        BIASED=norm is not None and norm.bias is not None,
        SPLIT=split,
        BM=bm,
        BN=bn,
        BK=bk,
        num_warps=8 if bm * bn > (4096 if wide else 8192) or add in ("conv", "gate") else 4,
        num_stages=1 if conv else 3,
        enable_fp_fusion=True,
    )


def slots_of(m: int, n: int, matrices: int, pixels: int) -> int:
    """In how many parts a sum of m × n products over the pixels is taken, to fill a device; the same on all of them, so that the
    results are."""
    programs = triton.cdiv(m, 64) * triton.cdiv(n, 64) * matrices
    return min(max(triton.cdiv(512, programs), 1), max(1, min(64, pixels // 256)))


def outer(
    a: View,
    b: View,
    sums: Tensor,
    *,
    kinds: tuple[str, str] = ("plain", "plain"),
    taps: tuple[Tensor | None, Tensor | None] = (None, None),
    norm: Norm | None = None,
    heads: int = 1,
    squares: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Launches multiply_outer. a and b begin at the same row; sums [slots, matrices, m, n], where the matrices are those of every
    image and head, or one that sums over all images; squares [slots, matrices, m] and the same of n."""
    images, _, width, _ = a.data.shape
    slots, matrices, m, n = sums.shape
    conv = "conv" in kinds
    # A convolution is computed again for every tile of the other operand.
    bm, bn = _tile(m, 128 if kinds == ("plain", "conv") else 64), _tile(n, 64)
    bp = min(max((2048 if conv or a.data.element_size() == 4 else 4096) // max(bm, bn), 32), 128)
    shift, factor = (None, None) if norm is None else norm.stats
    a_squares, b_squares = squares or (None, None)
    multiply_outer[triton.cdiv(m, bm) * triton.cdiv(n, bn), matrices, slots](
        a.data,
        taps[0],
        b.data,
        taps[1],
        shift,
        factor,
        norm and norm.weight,
        norm and norm.bias,
        sums,
        a_squares,
        b_squares,
        a.pixels,
        1 if matrices == images * heads else images,
        m,
        n,
        heads,
        a.first,
        a.height,
        width,
        *a.strides,
        *b.strides,
        0 if norm is None else shift.stride(0),
        sums.stride(0),
        squares[0].stride(0) if squares else 0,
        A=kinds[0],
        B=kinds[1],
        BIASED=norm is not None and norm.bias is not None,
        SQUARES=squares is not None,
        BP=bp,
        BM=bm,
        BN=bn,
        num_warps=8 if conv else 4,
        num_stages=1 if conv else 3,
        enable_fp_fusion=True,
    )


class Head:
    """The head of both ops: hidden = 1×1 of the layer norm of x, its channels in groups, each padded to whole tiles; hidden's 3×3
    convolution is computed by who multiplies it."""

    def __init__(
        self, x: View, norm_weight: Tensor, norm_bias: Tensor | None, weight: Tensor, dwconv: Tensor, groups: int, eps: float
    ):
        self.norm, self.groups, self.eps = Norm(norm_weight, norm_bias, None), groups, eps
        channels = weight.shape[1]
        self.size = weight.shape[0] // groups  # of a group
        self.padded = round_up(self.size)
        self.channels = groups * self.padded
        pad = self.padded - self.size
        by_group = F.pad(weight.view(groups, self.size, channels), (0, round_up(channels) - channels, 0, pad))
        self.weight = by_group.view(1, 1, self.channels, -1).to(x.data.dtype)
        self.taps = F.pad(dwconv.view(groups, self.size, 9), (0, 0, 0, pad)).view(self.channels, 9).T.contiguous()

    def unpad(self, values: Tensor) -> Tensor:
        """Of [channels, ...] those that are not padding, contiguous."""
        return values.unflatten(0, (self.groups, self.padded))[:, : self.size].flatten(0, 1).contiguous()

    def expand(self, x: View, hidden: View, stats: View) -> Norm:
        """hidden of x, and what the norm of x needs; stats has two channels."""
        images, rows, width, channels = x.data.shape
        shift, factor = stats.data.view(2, images, rows * width)
        bc = triton.next_power_of_2(channels)
        bm = max(2048 // bc, 1)
        biased = self.norm.bias is not None
        norm_stats[triton.cdiv(x.pixels, bm), images](
            x.data, shift, factor, x.pixels, channels, x.strides[0], self.eps, BIASED=biased, BM=bm, BC=bc, enable_fp_fusion=True
        )
        norm = self.norm._replace(stats=stats.data.view(2, images, rows, width))
        product(x, self.weight, hidden, kind="norm", norm=norm)
        return norm


class Hidden:
    """Memory for a head's hidden image, a step at a time and with a halo, and for what its norm needs."""

    def __init__(self, head: Head, steps: Steps, halo: int):
        self.head, self.steps, self.halo = head, steps, halo
        self.values = Buffer(steps, head.channels, halo, steps.x.data.dtype)
        self.stats = Buffer(steps, 2, halo, torch.float32)

    def of(self, images: slice, rows: range) -> tuple[View, Norm]:
        """hidden of those rows and the halo around them, and the norm of the same."""
        near = self.steps.around(rows, self.halo)
        hidden = self.values.view(images, near)
        return hidden, self.head.expand(self.steps.x.at(near, images), hidden, self.stats.view(images, near))


class HeadBackward:
    """The backward pass of a head, step by step, given the gradient of its convolution."""

    def __init__(self, head: Head, steps: Steps):
        self.head, channels, dtype = head, steps.x.data.shape[3], steps.x.data.dtype
        pixels = steps.images * steps.rows * steps.x.data.shape[2]
        self.d_hidden = Buffer(steps, head.channels, 0, dtype)
        self.d_normal = Buffer(steps, channels, 0, torch.float32)
        self.transposed = head.weight[..., :channels].transpose(2, 3).contiguous()

        def zeros(*shape):
            return torch.zeros(shape, dtype=torch.float32, device=steps.x.data.device)

        self.d_weight = zeros(slots_of(head.channels, channels, 1, pixels), 1, head.channels, channels)
        self.tap_tile = _tile(head.channels, 64)
        self.tap_pixels = 2048 // self.tap_tile
        slots = min(max(131072 // head.channels, 32), 512, triton.cdiv(pixels, 4 * self.tap_pixels))
        self.d_taps = zeros(slots, 9, head.channels)
        self.norm_pixels = max(1024 // triton.next_power_of_2(channels), 1)
        self.d_norm = zeros(min(512, triton.cdiv(pixels, 4 * self.norm_pixels)), 2, channels)

    def step(self, x: View, dy: View, dx: View, hidden: View, d: View, norm: Norm, images: slice) -> None:
        """dx of its rows, and the sums. hidden reaches two rows further, d one; norm is of hidden's rows."""
        head, rows = self.head, range(dx.first, dx.first + dx.data.shape[1])
        norm = norm._replace(stats=norm.stats[:, :, rows.start - hidden.first : rows.stop - hidden.first])
        hidden, d = hidden.at(rows), d.at(rows)
        d_hidden, d_normal = self.d_hidden.view(images, rows), self.d_normal.view(images, rows)
        count, _, width, channels = x.data.shape
        convolve_backward[triton.cdiv(head.channels, self.tap_tile), self.d_taps.shape[0]](
            hidden.data,
            d.data,
            head.taps,
            d_hidden.data,
            self.d_taps,
            x.pixels,
            count,
            head.channels,
            x.first,
            x.height,
            width,
            hidden.strides[0],
            d.strides[0],
            d_hidden.strides[0],
            BP=self.tap_pixels,
            BC=self.tap_tile,
            num_warps=8,
            enable_fp_fusion=True,
        )
        outer(d_hidden, x, self.d_weight, kinds=("plain", "norm"), norm=norm)
        product(d_hidden, self.transposed, d_normal)
        norm_backward[(self.d_norm.shape[0],)](
            x.data,
            d_normal.data,
            dy.data,
            dx.data,
            head.norm.weight,
            self.d_norm,
            x.pixels,
            count,
            channels,
            x.strides[0],
            d_normal.strides[0],
            dy.strides[0],
            dx.strides[0],
            head.eps,
            BIASED=norm.bias is not None,
            BM=self.norm_pixels,
            BC=triton.next_power_of_2(channels),
            enable_fp_fusion=True,
        )

    def finish(self, weight: Tensor, dwconv: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The gradients of norm_weight, norm_bias, weight and dwconv."""
        d_norm = add_up(self.d_norm)
        d_norm_bias = d_norm[1] if self.head.norm.bias is not None else d_norm.new_empty(0)
        d_weight = self.head.unpad(add_up(self.d_weight)[0]).view_as(weight)
        return d_norm[0].clone(), d_norm_bias.clone(), d_weight, self.head.unpad(add_up(self.d_taps).T).view_as(dwconv)


def add_up(slots: Tensor) -> Tensor:
    return slots.sum(0, dtype=torch.float64).float()
