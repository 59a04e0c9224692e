"""Layer norm over the channels: every pixel's statistics, and the backward pass."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from autohdr.kernels.image.view import VARYING, View

_TILE = 2048  # elements that a program of norm_stats holds; the backward pass holds several such tiles, and takes half of it
_MOST_SLOTS = 512  # for the sums of the backward pass: some programs a multiprocessor
_TILES_EACH = 4  # tiles that a program of the backward pass takes at least, or its sums would cost more than they


class Norm(NamedTuple):
    """A layer norm as an operand takes it: (x − shift) · factor · weight + bias. In the bias-free norm shift is 0."""

    weight: Tensor  # [channels]
    bias: Tensor | None
    shift: Tensor | None = None  # [images, rows, width], as factor
    factor: Tensor | None = None
    image: int = 0  # from an image's shift to the next one's

    def of(self, stats: View) -> "Norm":
        """stats: two channels of memory."""
        images, rows, width, _ = stats.data.shape
        shift, factor = stats.data.view(2, images, rows, width)
        return self._replace(shift=shift, factor=factor, image=rows * width)

    def at(self, first: int, end: int) -> "Norm":
        """The same of rows [first, end) of those that shift and factor have."""
        return self._replace(shift=self.shift[:, first:end], factor=self.factor[:, first:end])


@triton.jit
def standardize(value, first, inside, there, channels, eps):
    """Of pixels [BM, BC], the first of whose channels lie at `first`: value − mean, and [BM] the mean and
    1 / sqrt(variance + eps). The mean is summed as differences from the first channel: that of equal channels is exact, whose
    rounding 1 / √eps would multiply."""
    of_first = tl.load(first, mask=inside, other=0.0).to(tl.float32)
    mean = of_first + tl.sum(tl.where(there, value - of_first[:, None], 0.0), 1) / channels
    centred = tl.where(there, value - mean[:, None], 0.0)
    return centred, mean, 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 1) / channels + eps)


@triton.jit(do_not_specialize=VARYING)
def _stats(x, shift, factor, pixels, channels, eps, BIASED: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):
    """Of every pixel: the mean, or 0 without a bias, and 1 / sqrt(variance + eps). A program owns BM pixels of an image."""
    image = tl.program_id(1).to(tl.int64)
    pixel, channel = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BC)
    inside = pixel < pixels
    there = inside[:, None] & (channel < channels)[None, :]
    at = x.data + image * x.image + pixel.to(tl.int64)[:, None] * channels + channel[None, :]
    value = tl.load(at, mask=there, other=0.0).to(tl.float32)
    first = x.data + image * x.image + pixel.to(tl.int64) * channels
    _, mean, of_pixel = standardize(value, first, inside, there, channels, eps)
    place = image * pixels + pixel
    tl.store(factor + place, of_pixel, mask=inside)
    tl.store(shift + place, mean if BIASED else tl.zeros_like(mean), mask=inside)


def norm_stats(x: View, norm: Norm, eps: float) -> None:
    """Writes norm's shift and factor of every pixel of x."""
    pixels, channels = x.place.pixels, x.data.shape[3]
    bc = triton.next_power_of_2(channels)
    bm = max(_TILE // bc, 1)
    _stats[triton.cdiv(pixels, bm), x.data.shape[0]](
        x.matrix,
        norm.shift,
        norm.factor,
        pixels,
        channels,
        eps,
        BIASED=norm.bias is not None,
        BM=bm,
        BC=bc,
        enable_fp_fusion=True,
    )


@triton.jit(do_not_specialize=VARYING)
def _norm_backward(
    x,  # [images][pixels][channels], as d_normal, dy and dx
    d_normal,
    dy,
    dx,
    weight,
    sums,  # [slots][2][channels]
    pixels,
    images,
    channels,
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
    for index in range(tl.program_id(0), each * images, tl.num_programs(0)):
        image, pixel = (index // each).to(tl.int64), index % each * BM + tl.arange(0, BM)
        there = (pixel < pixels)[:, None] & has[None, :]
        at = pixel.to(tl.int64)[:, None] * channels + channel[None, :]
        value = tl.load(x.data + image * x.image + at, mask=there, other=0.0).to(tl.float32)
        d = tl.load(d_normal.data + image * d_normal.image + at, mask=there, other=0.0)
        first = x.data + image * x.image + pixel.to(tl.int64) * channels
        centred, _, factor = standardize(value, first, pixel < pixels, there, channels, eps)
        factor = factor[:, None]
        normal = tl.where(there, (centred if BIASED else value) * factor, 0.0)  # where nothing is, factor may be infinite
        g = d * w
        result = g - centred * factor * (tl.sum(g * normal, 1) / channels)[:, None]
        if BIASED:
            result -= (tl.sum(g, 1) / channels)[:, None]
        result = tl.load(dy.data + image * dy.image + at, mask=there, other=0.0).to(tl.float32) + factor * result
        tl.store(dx.data + image * dx.image + at, result, mask=there)
        d_weight += d * normal
        d_bias += d
    at = sums + tl.program_id(0).to(tl.int64) * 2 * channels + channel
    tl.store(at, tl.load(at, mask=has, other=0.0) + tl.sum(d_weight, 0), mask=has)
    tl.store(at + channels, tl.load(at + channels, mask=has, other=0.0) + tl.sum(d_bias, 0), mask=has)


def _pixels_a_program(channels: int) -> int:
    return max(_TILE // 2 // triton.next_power_of_2(channels), 1)


def norm_slots(channels: int, pixels: int) -> int:
    """For the sums of norm_backward, over steps of up to `pixels`."""
    return min(_MOST_SLOTS, triton.cdiv(pixels, _TILES_EACH * _pixels_a_program(channels)))


def norm_backward(x: View, d_normal: View, dy: View, dx: View, norm: Norm, eps: float, sums: Tensor) -> None:
    """dx = dy + the gradient through the norm; adds those of its weight and bias to sums [slots, 2, channels]."""
    images, *_, channels = x.data.shape
    _norm_backward[(sums.shape[0],)](
        x.matrix,
        d_normal.matrix,
        dy.matrix,
        dx.matrix,
        norm.weight,
        sums,
        x.place.pixels,
        images,
        channels,
        eps,
        BIASED=norm.bias is not None,
        BM=_pixels_a_program(channels),
        BC=triton.next_power_of_2(channels),
        enable_fp_fusion=True,
    )
