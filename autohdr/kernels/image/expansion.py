"""The expansion that the ops begin with: layer norm, and a 1×1 convolution to the channels that a 3×3 convolution reads."""

import torch
from torch import Tensor

from autohdr.kernels.image.depthwise import depthwise_backward, depthwise_sums
from autohdr.kernels.image.norm import Norm, norm_backward, norm_stats, norm_sums
from autohdr.kernels.image.product import outer, product, slots_of
from autohdr.kernels.image.repack import Groups, add_up, pixel_sums, round_up
from autohdr.kernels.image.steps import Buffer, Steps
from autohdr.kernels.image.view import View


class Expansion:
    """hidden = 1×1 of the layer norm of x, its channels in groups; hidden's 3×3 convolution, if any, is computed by who
    multiplies it."""

    def __init__(
        self,
        x: View,
        norm_weight: Tensor,
        norm_bias: Tensor | None,
        weight: Tensor,
        dwconv: Tensor | None,
        groups: int,
        eps: float,
        bias: Tensor | None = None,
        dwconv_bias: Tensor | None = None,
    ):
        self.norm, self.eps = Norm(norm_weight, norm_bias), eps
        self.groups = Groups(groups, weight.shape[0] // groups)
        self.channels = self.groups.channels
        self.weight = self.groups.pad(weight, round_up(weight.shape[1])).to(x.data.dtype)[None, None]
        self.taps = None if dwconv is None else self.groups.pad(dwconv, 9).T.contiguous()
        self.bias, self.taps_bias = (None if b is None else self.groups.pad(b, 1).T[None] for b in (bias, dwconv_bias))

    def expand(self, x: View, hidden: View, stats: View) -> Norm:
        """Writes hidden of x, and the norm of x into stats, which has two channels."""
        norm = self.norm.of(stats)
        norm_stats(x, norm, self.eps)
        product(x, self.weight, hidden, kind="norm", norm=norm, bias=self.bias)
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
    """The backward pass of an expansion, step by step, given the gradient of its convolution, or of hidden where it has none."""

    def __init__(self, expansion: Expansion, steps: Steps):
        self.expansion, channels, dtype, device = expansion, steps.x.data.shape[3], steps.x.data.dtype, steps.x.data.device
        self.d_hidden = Buffer(steps, expansion.channels, 0, dtype)
        self.d_normal = Buffer(steps, channels, 0, torch.float32)
        self.transposed = expansion.weight[..., :channels].transpose(2, 3).contiguous()
        slots = slots_of(expansion.channels, channels, 1, steps.pixels)
        self.d_weight = torch.zeros((slots, 1, expansion.channels, channels), dtype=torch.float32, device=device)
        self.d_taps = depthwise_sums(expansion.channels, steps.pixels, device)
        self.d_norm = norm_sums(channels, steps.pixels, device)
        self.d_bias, self.d_taps_bias = torch.zeros((2, expansion.channels), dtype=torch.float64, device=device)

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

    def finish(self, weight: Tensor, dwconv: Tensor | None) -> list[Tensor]:
        """The gradients of norm_weight, norm_bias, weight, and of bias, dwconv and dwconv_bias where there are any."""
        expansion, d_norm, unpad = self.expansion, add_up(self.d_norm), self.expansion.groups.unpad
        d_norm_bias = d_norm[1] if expansion.norm.bias is not None else d_norm.new_empty(0)
        gradients = [d_norm[0].clone(), d_norm_bias.clone(), unpad(add_up(self.d_weight)[0]).view_as(weight)]
        if expansion.bias is not None:
            gradients.append(unpad(self.d_bias.float()))
        if dwconv is not None:
            gradients.append(unpad(add_up(self.d_taps).T).view_as(dwconv))
        if expansion.taps_bias is not None:
            gradients.append(unpad(self.d_taps_bias.float()))
        return gradients
