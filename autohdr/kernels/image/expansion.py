"""The expansion that the ops begin with: layer norm, and a 1×1 convolution to the channels that a 3×3 convolution reads."""

import copy

import torch
import triton
import triton.language as tl
from torch import Tensor

from autohdr.kernels.image.depthwise import depthwise_backward, depthwise_slots
from autohdr.kernels.image.norm import Norm, norm_backward, norm_slots, norm_stats, standardize
from autohdr.kernels.image.product import dot, outer, product, slots_of
from autohdr.kernels.image.repack import Axis, Groups, Repack, pixel_sums, round_up, zeros
from autohdr.kernels.image.steps import Buffer, Steps
from autohdr.kernels.image.view import VARYING, Matrix, View, tile

_WIDEST = 256  # bytes of a pixel that a program of _expand holds
_PROGRAMS = 264  # of _expand, where its columns are as many


@triton.jit(do_not_specialize=VARYING)
def _expand(
    x,  # [images][pixels][k]
    norm,
    w,  # [n][w.row]
    bias,  # [n], or None
    out,  # [images][pixels][n]
    k,
    n,
    each,
    eps,
    pixels,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """out[p][n] = Σ_k norm(x)[p][k] w[n][k] + bias[n]; norm's shift and factor. A program owns BM pixels and `each` columns."""
    image, begin, channel = tl.program_id(2).to(tl.int64), tl.program_id(0) * BM, tl.arange(0, BK)
    pixel, has = begin + tl.arange(0, BM), channel < k
    inside = pixel < pixels
    row, there = pixel.to(tl.int64)[:, None], inside[:, None] & has[None, :]
    data = x.data + image * x.image
    value = tl.load(data + row * k + channel[None, :], mask=there, other=0.0).to(tl.float32)
    left, mean, factor = standardize(value, data + pixel.to(tl.int64) * k, inside, there, k, eps)
    if norm.bias is None:
        left, mean = value, tl.zeros_like(mean)
    left *= factor[:, None] * tl.load(norm.weight + channel, mask=has, other=0.0)[None, :]
    if norm.bias is not None:
        left += tl.load(norm.bias + channel, mask=has, other=0.0)[None, :]
    left = left.to(w.data.dtype.element_ty)
    if tl.program_id(1) == 0:
        tl.store(norm.shift + image * norm.image + pixel, mean, mask=inside)
        tl.store(norm.factor + image * norm.image + pixel, factor, mask=inside)
    to = out.data + image * out.image + row * n
    for start in range(tl.program_id(1) * each, min(tl.program_id(1) * each + each, n), BN):
        column = start + tl.arange(0, BN)
        wanted = column < n
        right = w.data + column[None, :] * w.row + channel[:, None]
        sums = dot(left, tl.load(right, mask=has[:, None] & wanted[None, :], other=0.0), tl.zeros([BM, BN], tl.float32))
        if bias is not None:
            sums += tl.load(bias + column, mask=wanted, other=0.0)[None, :]
        tl.store(to + column[None, :], sums, mask=inside[:, None] & wanted[None, :])


class Expansion:
    """hidden = 1×1 of the layer norm of x, its channels in groups; who calls it computes hidden's 3×3 convolution, if any. The
    weights are there once repack has run."""

    def __init__(
        self,
        x: View,
        norm_weight: Tensor,
        norm_bias: Tensor | None,
        weight: Tensor,
        dwconv: Tensor | None,
        groups: int,
        eps: float,
        repack: Repack,
        bias: Tensor | None = None,
        dwconv_bias: Tensor | None = None,
    ):
        self.norm, self.eps = Norm(norm_weight, norm_bias), eps
        self.groups = Groups(groups, weight.shape[0] // groups)
        self.channels, axis, channels, dtype = self.groups.channels, self.groups.axis, weight.shape[1], x.data.dtype
        self.weight = repack.make(weight.flatten(1), axis, Axis.plain(channels, round_up(channels)), dtype)[None, None]
        self.taps = None if dwconv is None else repack.make(dwconv.flatten(1).T, Axis.plain(9), axis)
        biases = (None if b is None else repack.make(b[None], Axis.plain(1), axis)[None] for b in (bias, dwconv_bias))
        self.bias, self.taps_bias = biases

    def part(self, first: int, end: int) -> "Expansion":
        """Groups [first, end) of one without biases."""
        part, groups = copy.copy(self), self.groups
        part.groups = Groups(end - first, groups.size)
        part.channels = part.groups.channels
        channels = slice(first * groups.padded, end * groups.padded)
        part.weight, part.taps = self.weight[:, :, channels], self.taps[:, channels]
        return part

    def expand(self, x: View, hidden: View, stats: View) -> Norm:
        """Writes hidden of x, and the norm of x into stats, which has two channels."""
        norm, (images, *_, k), n = self.norm.of(stats), x.data.shape, self.channels
        size = x.data.element_size()
        if k * size > _WIDEST:
            norm_stats(x, norm, self.eps)
            product(x, self.weight, hidden, kind="norm", norm=norm, bias=self.bias)
            return norm
        pixels, bm, bn, bk = x.place.pixels, 256 // size, tile(n, 128 // size), tile(k, _WIDEST // size)
        tiles, columns = triton.cdiv(pixels, bm), triton.cdiv(n, bn)
        each = triton.cdiv(columns, triton.cdiv(_PROGRAMS, tiles * images)) * bn
        _expand[tiles, triton.cdiv(n, each), images](
            x.matrix,
            norm,
            Matrix(self.weight, 0, self.weight.stride(2)),
            self.bias,
            hidden.matrix,
            k,
            n,
            each,
            self.eps,
            pixels,
            BM=bm,
            BN=bn,
            BK=bk,
            num_warps=8,
            num_stages=2,
            enable_fp_fusion=True,
        )
        return norm


class Hidden:
    """Memory for an expansion's hidden image, a step at a time and with a halo, and for what its norm needs."""

    def __init__(self, expansion: Expansion, steps: Steps, halo: int):
        self.expansion, self.steps, self.halo = expansion, steps, halo
        self.values = Buffer(steps, expansion.channels, halo, steps.x.data.dtype)
        self.stats = Buffer(steps, 2, halo, torch.float32)

    def of(self, images: slice, rows: range) -> tuple[View, Norm]:
        """hidden of those rows and the halo around them, and the norm of the same."""
        near = self.steps.around(rows, self.halo)
        hidden = self.values.view(images, near)
        return hidden, self.expansion.expand(self.steps.x.at(near, images), hidden, self.stats.view(images, near))


class ExpansionBackward:
    """The backward pass of an expansion, step by step, given the gradient of its convolution, or of hidden where it has none.

    weight: the 1×1 convolution's, of whose transpose repack makes what this needs."""

    def __init__(self, expansion: Expansion, weight: Tensor, steps: Steps, repack: Repack):
        self.expansion, channels, dtype, device = expansion, steps.x.data.shape[3], steps.x.data.dtype, steps.x.data.device
        self.d_hidden = Buffer(steps, expansion.channels, 0, dtype)
        self.d_normal = Buffer(steps, channels, 0, torch.float32)
        self.transposed = repack.make(weight.flatten(1).T, Axis.plain(channels), expansion.groups.axis, dtype)[None, None]
        slots = slots_of(expansion.channels, channels, 1, steps.pixels)
        of_weight = slots, 1, expansion.channels, channels
        of_taps, of_norm = depthwise_slots(expansion.channels, steps.pixels), norm_slots(channels, steps.pixels)
        shapes = of_weight, (of_taps, 9, expansion.channels), (of_norm, 2, channels)
        self.d_weight, self.d_taps, self.d_norm = zeros(device, shapes)
        if expansion.bias is not None:
            self.d_bias, self.d_taps_bias = torch.zeros((2, 1, 1, expansion.channels), dtype=torch.float64, device=device)

    def step(self, x: View, dy: View, dx: View, hidden: View, d: View, norm: Norm, images: slice) -> None:
        """dx of its rows, and the sums. hidden reaches two rows further, d one; norm is of hidden's rows."""
        expansion, rows = self.expansion, range(dx.first, dx.first + dx.data.shape[1])
        norm = norm.at(rows.start - hidden.first, rows.stop - hidden.first)
        d_hidden = self.d_hidden.view(images, rows)
        depthwise_backward(hidden.at(rows), d.at(rows), expansion.taps, d_hidden, self.d_taps)
        if expansion.taps_bias is not None:
            self.d_taps_bias += pixel_sums(d.at(rows))
        self.through_product(x, dy, dx, d_hidden, norm, images)

    def through_product(self, x: View, dy: View, dx: View, d_hidden: View, norm: Norm, images: slice) -> None:
        """dx given d_hidden, and the sums, all of the same rows."""
        d_normal = self.d_normal.view(images, range(dx.first, dx.first + dx.data.shape[1]))
        outer(d_hidden, x, self.d_weight, kinds=("plain", "norm"), norm=norm)
        if self.expansion.bias is not None:
            self.d_bias += pixel_sums(d_hidden)
        product(d_hidden, self.transposed, d_normal)
        norm_backward(x, d_normal, dy, dx, norm, self.expansion.eps, self.d_norm)

    def finish(self, repack: Repack) -> list[Tensor]:
        """The gradients of norm_weight, norm_bias, weight, and of bias, dwconv and dwconv_bias where there are any: memory that
        repack fills. Convolutions' are matrices."""
        expansion, axis, channels = self.expansion, self.expansion.groups.axis.inverse, Axis.plain(self.d_norm.shape[2])
        count = 1 if expansion.norm.bias is None else 2
        d_norm = [repack.add_up(self.d_norm[:, i : i + 1], Axis.plain(1), channels)[0] for i in range(count)]
        d_norm += [self.d_norm.new_empty(0)] * (2 - count)
        gradients = [*d_norm, repack.add_up(self.d_weight[:, 0], axis, channels)]
        if expansion.bias is not None:
            gradients.append(repack.add_up(self.d_bias, Axis.plain(1), axis)[0])
        if expansion.taps is not None:
            gradients.append(repack.add_up(self.d_taps.mT, axis, Axis.plain(9)))
        if expansion.taps_bias is not None:
            gradients.append(repack.add_up(self.d_taps_bias, Axis.plain(1), axis)[0])
        return gradients
