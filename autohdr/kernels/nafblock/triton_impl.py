"""nafblock in Triton; what it shares with mdta and gdfn is in autohdr/kernels/image.

Forward, two passes over the image, a step at a time: norm and 1×1 (hidden), and 3×3 and gate in one, which lies in y,
with sums over the pixels; then, in place, the 1×1 that the image's attention is folded into and residual in one (middle), norm
statistics, 1×1 (expanded), and gate, 1×1 and residual in one. Backward, a pass through the second half to middle's gradient,
some small matrices in double, and a pass through the first half; both compute again what they need. The residuals' scales are
folded into the weights before them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from autohdr.kernels.image.depthwise import convolve, gate_sums
from autohdr.kernels.image.expansion import Expansion, ExpansionBackward, Hidden
from autohdr.kernels.image.norm import Norm
from autohdr.kernels.image.product import outer, product, slots_of
from autohdr.kernels.image.repack import Repack, pixel_sums, round_up
from autohdr.kernels.image.steps import BACKWARD_BUDGET, FORWARD_BUDGET, Buffer, Steps
from autohdr.kernels.image.view import View

_FIRST, _ATTENTION, _SECOND, _OUT = slice(0, 6), slice(6, 11), slice(11, 15), slice(15, 18)
"""The op's parameters: norm1, conv1 and conv2; attention, conv3 and beta; norm2 and conv4; conv5 and gamma."""


def forward(x: Tensor, *arguments) -> tuple[Tensor, Tensor, Tensor]:
    """arguments: the block's parameters in the op's order, eps, and whether there will be a backward pass: nothing is kept."""
    *parameters, eps, _ = arguments
    y = torch.empty_like(x)
    means = _local(x, parameters, eps, range(x.shape[2]), View.of(y)) / (x.shape[2] * x.shape[3])
    _finish(x, y, means, parameters, eps)
    return y, means.float(), x.new_empty(0)


def statistics(x: Tensor, *arguments) -> Tensor:
    *parameters, eps, first, end = arguments
    return _local(x, parameters, eps, range(first, end), None)


def apply(x: Tensor, *arguments) -> Tensor:
    *parameters, means, eps = arguments
    y = torch.empty_like(x)
    _local(x, parameters, eps, range(x.shape[2]), View.of(y))
    _finish(x, y, means, parameters, eps)
    return y


def backward(dy: Tensor, x: Tensor, *arguments) -> tuple[Tensor, ...]:
    *parameters, means, _, eps = arguments
    attention, conv5 = _Attention(means, *parameters[_ATTENTION]), _Scaled(*parameters[_OUT])
    d_middle, d_combined, d_conv5, second = _second_half_backward(dy, x, attention, conv5, parameters, eps)
    shift, of_attention = attention.backward(d_combined, pixel_sums(View.of(d_middle)), x.shape[2] * x.shape[3])
    dx, first = _first_half_backward(d_middle, x, attention, shift, parameters, eps)
    gradients = *first, *of_attention, *second, *conv5.backward(d_conv5, pixel_sums(View.of(dy)))
    return dx, *(d.float().view_as(parameter) for d, parameter in zip(gradients, parameters, strict=True))


def _local(x: Tensor, parameters: list[Tensor], eps: float, rows: range, out: View | None) -> Tensor:
    """Writes the gated 3×3 convolution of rows of x to out; returns its sums over these, double [batch, channels]."""
    from_, repack = View.of(x), Repack()
    expansion = _first_half(from_, parameters, eps, repack)
    repack.run()
    steps = Steps(from_, expansion.channels * x.element_size(), 1, FORWARD_BUDGET, rows=rows)
    memory = Hidden(expansion, steps, 1)
    sums = torch.zeros(x.shape[:2], dtype=torch.float64, device=x.device)
    for images, rows in steps:
        hidden, _ = memory.of(images, rows)
        sums[images] += _multiply_halves(expansion, hidden.at(rows), out and out.at(rows, images))
    return sums


def _finish(x: Tensor, y: Tensor, means: Tensor, parameters: list[Tensor], eps: float) -> None:
    """y of x and the gated 3×3 convolution, which is in y."""
    from_, to, channels, conv5 = View.of(x), View.of(y), x.shape[1], _Scaled(*parameters[_OUT])
    steps = Steps(from_, (channels + 2 * round_up(channels)) * x.element_size(), 0, FORWARD_BUDGET)
    repack = Repack()
    rest = _Rest(steps, _Attention(means, *parameters[_ATTENTION]), parameters, eps, repack)
    repack.run()
    weight, bias = _square(conv5.weight, x.dtype)[:, :, :channels], conv5.bias.float()[None, None]
    for images, rows in steps:
        there = to.at(rows, images)
        middle, expanded, _ = rest.expand(from_.at(rows, images), there, images)
        product(expanded, weight, there, kind="simple gate", bias=bias, added=middle, add="plain")


def _second_half_backward(
    dy: Tensor, x: Tensor, attention: "_Attention", conv5: "_Scaled", parameters: list[Tensor], eps: float
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The gradients of middle, of the images' combined weights, of conv5's scaled one and of norm2 and conv4."""
    batch, channels, _, width = x.shape
    from_, back, d_middle = View.of(x), View.of(dy), torch.empty_like(x)
    repack = Repack()
    to, expansion = View.of(d_middle), _first_half(from_, parameters, eps, repack)
    padded, size = expansion.groups.padded, x.element_size()
    steps = Steps(from_, 9 * padded * size + 4 * channels, 1, BACKWARD_BUDGET)
    memory, rest = Hidden(expansion, steps, 1), _Rest(steps, attention, parameters, eps, repack)
    local_memory, gated_memory = Buffer(steps, channels, 0, x.dtype), Buffer(steps, padded, 0, x.dtype)
    rest_backward = ExpansionBackward(rest.expansion, parameters[13], steps, repack)
    repack.run()
    transposed = _square(conv5.weight.T, x.dtype)
    slots = slots_of(channels, channels, steps.images, steps.rows * width)
    d_combined = torch.zeros((slots, batch, channels, channels), dtype=torch.float32, device=x.device)
    slots = slots_of(channels, channels, 1, steps.pixels)
    d_conv5 = torch.zeros((slots, 1, channels, channels), dtype=torch.float32, device=x.device)
    for images, rows in steps:
        here, there = back.at(rows, images), to.at(rows, images)
        local, gated = local_memory.view(images, rows), gated_memory.view(images, rows)
        d_halves = rest_backward.d_hidden.view(images, rows)
        hidden, _ = memory.of(images, rows)
        _multiply_halves(expansion, hidden.at(rows), local)
        middle, expanded, norm = rest.expand(from_.at(rows, images), local, images)
        product(here, transposed, d_halves, add="simple gate", added=expanded, gated=gated)
        outer(here, gated, d_conv5)
        rest_backward.through_product(middle, here, there, d_halves, norm, images)
        outer(there, local, d_combined[:, images])
    d_combined, d_conv5 = d_combined.sum(0, dtype=torch.float64), d_conv5.sum((0, 1), dtype=torch.float64)
    gradients = rest_backward.finish(repack)
    repack.run()
    return d_middle, d_combined, d_conv5, gradients


def _first_half_backward(
    d_middle: Tensor, x: Tensor, attention: "_Attention", shift: Tensor, parameters: list[Tensor], eps: float
) -> tuple[Tensor, list[Tensor]]:
    """The gradients of x and of norm1, conv1 and conv2. shift: at every pixel of the gated 3×3 convolution, through its means."""
    from_, back, dx = View.of(x), View.of(d_middle), torch.empty_like(x)
    repack = Repack()
    to, expansion = View.of(dx), _first_half(from_, parameters, eps, repack)
    steps = Steps(from_, 3 * expansion.channels * x.element_size() + 4 * x.shape[1], 2, BACKWARD_BUDGET)
    memory, d_memory = Hidden(expansion, steps, 2), Buffer(steps, expansion.channels, 1, x.dtype)
    expansion_backward = ExpansionBackward(expansion, parameters[2], steps, repack)
    repack.run()
    transposed = _square(attention.combined.transpose(1, 2), x.dtype)
    shift = F.pad(shift, (0, expansion.groups.padded - x.shape[1])).float()[:, None]
    for images, rows in steps:
        near, (hidden, norm) = steps.around(rows, 1), memory.of(images, rows)
        d = d_memory.view(images, near)
        product(back.at(near, images), transposed[images], d.channels(0, expansion.groups.padded), bias=shift[images])
        convolve(hidden.at(near), expansion.taps, None, bias=expansion.taps_bias, gate="simple", d=d)
        expansion_backward.step(from_.at(rows, images), back.at(rows, images), to.at(rows, images), hidden, d, norm, images)
    gradients = expansion_backward.finish(repack)
    repack.run()
    return dx, gradients


def _first_half(x: View, parameters: list[Tensor], eps: float, repack: Repack) -> Expansion:
    norm_weight, norm_bias, weight, bias, dwconv, dwconv_bias = parameters[_FIRST]
    return Expansion(x, norm_weight, norm_bias, weight, dwconv, 2, eps, repack, bias, dwconv_bias)


class _Rest:
    """What follows the gated 3×3 convolution up to the second gate, and memory for a step of it."""

    def __init__(self, steps: Steps, attention: "_Attention", parameters: list[Tensor], eps: float, repack: Repack):
        norm_weight, norm_bias, weight, bias = parameters[_SECOND]
        self.expansion = Expansion(steps.x, norm_weight, norm_bias, weight, None, 2, eps, repack, bias)
        dtype, channels = steps.x.data.dtype, steps.x.data.shape[3]
        self.weight = _square(attention.combined, dtype)[:, :, :channels]
        self.bias = attention.conv3.bias.float()[None, None]
        self.middle, self.expanded = Buffer(steps, channels, 0, dtype), Hidden(self.expansion, steps, 0)

    def expand(self, x: View, local: View, images: slice) -> tuple[View, View, Norm]:
        """middle, the image between the block's halves, of x and the gated 3×3 convolution; expanded, and middle's norm."""
        rows = range(x.first, x.first + x.data.shape[1])
        middle, expanded, stats = (b.view(images, rows) for b in (self.middle, self.expanded.values, self.expanded.stats))
        product(local, self.weight[images], middle, bias=self.bias, added=x, add="plain")
        return middle, expanded, self.expansion.expand(middle, expanded, stats)


class _Scaled:
    """A 1×1 convolution and the scale of its channels, as one weight [channels, channels] and bias, double."""

    def __init__(self, weight: Tensor, bias: Tensor, scale: Tensor):
        self.own_weight, self.own_bias, self.scale = weight[:, :, 0, 0].double(), bias.double(), scale.flatten().double()
        self.weight, self.bias = self.scale[:, None] * self.own_weight, self.scale * self.own_bias

    def backward(self, d_weight: Tensor, d_bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of the convolution's weight and bias and of the scale."""
        d_scale = (self.own_weight * d_weight).sum(1) + self.own_bias * d_bias
        return self.scale[:, None] * d_weight, self.scale * d_bias, d_scale


class _Attention:
    """The channel attention of every image, double."""

    def __init__(self, means: Tensor, weight: Tensor, bias: Tensor, conv3_weight: Tensor, conv3_bias: Tensor, beta: Tensor):
        self.means, self.sca, self.conv3 = means.double(), weight[:, :, 0, 0].double(), _Scaled(conv3_weight, conv3_bias, beta)
        self.values = self.means @ self.sca.T + bias
        self.combined = self.conv3.weight * self.values[:, None]
        """The scaled conv3 · attention [batch, channels, channels]"""

    def backward(self, d_combined: Tensor, d_bias: Tensor, pixels: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The gradient of every pixel whose means the attention takes [batch, channels], and the parameters'."""
        d_values = (d_combined * self.conv3.weight).sum(1)
        d_conv3 = self.conv3.backward((d_combined * self.values[:, None]).sum(0), d_bias)
        return d_values @ self.sca / pixels, (d_values.T @ self.means, d_values.sum(0), *d_conv3)


def _square(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """weight [..., channels, channels] as products take it, [images or 1, 1, padded, padded]."""
    channels = weight.shape[-1]
    padded = round_up(channels)
    weight = F.pad(weight, (0, padded - channels, 0, padded - channels)).to(dtype)
    return weight.reshape(-1, 1, padded, padded).contiguous()


def _multiply_halves(expansion: Expansion, hidden: View, out: View | None) -> Tensor:
    """Writes the simple gate of hidden's convolution to out; returns its sums over the pixels, double [images, channels]."""
    sums = gate_sums(hidden, expansion.groups.size)
    convolve(hidden, expansion.taps, out, bias=expansion.taps_bias, gate="simple", sums=sums)
    return sums.sum(1, dtype=torch.float64)
