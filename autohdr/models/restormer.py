"""Restormer: a U-shaped image-to-image transformer whose every block is one mdta and one gdfn kernel call.

Zamir et al., "Restormer: Efficient Transformer for High-Resolution Image Restoration", CVPR 2022.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autohdr import kernels
from autohdr.models.layers import Conv2d, add_pointwise, pointwise, reach
from autohdr.models.network import (
    Blocks,
    Down,
    Embed,
    Half,
    NetworkConfig,
    Output,
    Stage,
    StagedNetwork,
    Up,
    count,
    is_whole,
    only_on_a_cpu,
)


@dataclass(frozen=True)
class RestormerConfig(NetworkConfig):
    """What fixes a Restormer."""

    tells_family = ("reduce_level1",)  # the authors' models, which alone don't reduce, have another eps

    dim: int
    """Channels at full resolution; they double at each of the three levels below. Even."""
    num_blocks: tuple[int, int, int, int]
    """Blocks of each level; encoder and decoder have the same number, the last is the latent level's."""
    num_refinement_blocks: int
    num_heads: tuple[int, int, int, int] = (1, 2, 4, 8)
    expansion: float = 2.66
    """Hidden channels of the feed-forward part, as a multiple of the block's."""
    norm_bias: bool = True
    """False: the layer norms have no bias and leave the mean in (the variance is centred all the same)."""
    eps: float = 1e-6
    reduce_level1: bool = True
    """False, as in the authors' own models: the last decoder level and the refinement run on 2 * dim channels."""
    int8: bool = False
    """The blocks' 1×1 products are in 8 bits, for inference on a CPU: int8.quantized makes such a model."""

    def __post_init__(self):
        self.require("dim", "an even whole number above 0", is_whole(self.dim, 1) and self.dim % 2 == 0)
        self.require("num_blocks", "four whole numbers above 0", _four(self.num_blocks))
        self.require("num_refinement_blocks", "a whole number, 0 or more", is_whole(self.num_refinement_blocks, 0))
        channels = [self.dim << i for i in range(4)]
        divides = _four(self.num_heads) and all(c % n == 0 for c, n in zip(channels, self.num_heads, strict=True))
        self.require("num_heads", f"four divisors of the levels' channels {channels}", divides)
        self.require("expansion", "a number of at least 1", _number(self.expansion) and self.expansion >= 1)
        self.require("norm_bias", "true or false", isinstance(self.norm_bias, bool))
        self.require("eps", "a number above 0", _number(self.eps) and self.eps > 0)
        self.require("reduce_level1", "true or false", isinstance(self.reduce_level1, bool))
        self.require("int8", "true or false", isinstance(self.int8, bool))


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _four(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 4 and all(is_whole(v, 1) for v in value)


def _conv(channels_in: int, channels_out: int, size: int, groups: int = 1) -> Conv2d:
    return Conv2d(channels_in, channels_out, size, padding=size // 2, groups=groups, bias=False)


def _weight(conv: nn.Module, size: int, groups: int = 1) -> Tensor:
    """The weight of a convolution that _conv made, for who computes it otherwise."""
    geometry = {"kernel_size": (size, size), "stride": (1, 1), "padding": (size // 2, size // 2), "dilation": (1, 1)}
    return reach(conv, Conv2d, **geometry, groups=groups, padding_mode="zeros", bias=None).weight


class Norm(nn.Module):
    """The weights of a layer norm over channels; the kernels apply it."""

    def __init__(self, channels: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None


class Attention(nn.Module):
    """MDTA with its norm and residual: attention between channels, not pixels (equation 1).

    forward(x, norm): a whole image. For one in strips of rows, `statistics` of each strip, added up, are what `attend` needs.
    """

    op = "mdta"
    """The op of autohdr.kernels, whose passes have its name too."""
    projection: Callable[[int, int], Any] = staticmethod(partial(_conv, size=1))

    def __init__(self, channels: int, num_heads: int, eps: float):
        super().__init__()
        self.num_heads, self.eps = num_heads, eps
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = self.projection(channels, 3 * channels)
        self.qkv_dwconv = _conv(3 * channels, 3 * channels, 3, groups=3 * channels)
        self.project_out = _conv(channels, channels, 1)

    def _weights(self, x: Tensor, norm: nn.Module) -> tuple[Tensor | None, ...]:
        """As the op takes them for x."""
        norm, qkv = reach(norm, Norm), _weight(self.qkv, 1)
        dwconv = _weight(self.qkv_dwconv, 3, groups=len(qkv))
        return norm.weight, norm.bias, qkv, dwconv, self.temperature, _weight(self.project_out, 1)

    def forward(self, x: Tensor, norm: nn.Module) -> Tensor:
        return getattr(kernels, self.op)(x, *self._weights(x, norm), self.num_heads, eps=self.eps)

    def statistics(self, x: Tensor, norm: nn.Module, first: int, end: int) -> tuple[Tensor, ...]:
        """What attention sums over the pixels, of rows [first, end) of x."""
        op = getattr(kernels, f"{self.op}_statistics")
        return op(x, self._weights(x, norm), self.num_heads, first, end, eps=self.eps)

    def attend(self, x: Tensor, norm: nn.Module, statistics: tuple[Tensor, ...]) -> Tensor:
        """forward(x, norm) with the statistics of the image that x is a strip of."""
        op = getattr(kernels, f"{self.op}_apply")
        return op(x, self._weights(x, norm), self.num_heads, statistics=statistics, eps=self.eps)


class FeedForward(nn.Module):
    """GDFN with its norm and residual: a gated depthwise-convolution network (equation 2)."""

    def __init__(self, channels: int, hidden: int, eps: float):
        super().__init__()
        self.eps = eps
        self.project_in = _conv(channels, 2 * hidden, 1)
        self.dwconv = _conv(2 * hidden, 2 * hidden, 3, groups=2 * hidden)
        self.project_out = _conv(hidden, channels, 1)

    def forward(self, x: Tensor, norm: nn.Module) -> Tensor:
        norm, project_in = reach(norm, Norm), _weight(self.project_in, 1)
        dwconv = _weight(self.dwconv, 3, groups=len(project_in))
        weights = norm.weight, norm.bias, project_in, dwconv, _weight(self.project_out, 1)
        return kernels.gdfn(x, *weights, eps=self.eps)


class Codes(nn.Module):
    """A 1×1 convolution's weight in 8 bits, and what its rows are multiplied by."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        codes = torch.zeros(channels_out, channels_in, 1, 1, dtype=torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.scale = nn.Parameter(torch.ones(channels_out), requires_grad=False)


def _check_int8(half: nn.Module, x: Tensor) -> None:
    """UserError where a half of a block in 8 bits is not used as it can be."""
    if half.training or x.device.type == "cuda":
        raise only_on_a_cpu("it is being trained" if half.training else f"the image is on {x.device}")


class AttentionInt8(Attention):
    """Attention with its 1×1 products in 8 bits. Scales of what these read are in its norm and, of v, in qkv_dwconv; project_out
    becomes codes once it is multiplied by what attends."""

    op, projection = "mdta_int8", Codes

    def __init__(self, channels: int, num_heads: int, eps: float):
        super().__init__(channels, num_heads, eps)
        self.v_scale = nn.Parameter(torch.ones(channels))

    def _weights(self, x: Tensor, norm: nn.Module) -> tuple[Tensor | None, ...]:
        _check_int8(self, x)
        norm, qkv = reach(norm, Norm), reach(self.qkv, Codes)
        dwconv = _weight(self.qkv_dwconv, 3, groups=len(qkv.scale))
        rest = self.temperature, _weight(self.project_out, 1), self.v_scale
        return norm.weight, norm.bias, qkv.weight, qkv.scale, dwconv, *rest


class FeedForwardInt8(nn.Module):
    """FeedForward with its 1×1 convolutions in 8 bits. Scales of what these read are in its norm and in dwconv."""

    def __init__(self, channels: int, hidden: int, eps: float):
        super().__init__()
        self.eps = eps
        self.project_in = Codes(channels, 2 * hidden)
        self.dwconv = _conv(2 * hidden, 2 * hidden, 3, groups=2 * hidden)
        self.project_out = Codes(hidden, channels)

    def forward(self, x: Tensor, norm: nn.Module) -> Tensor:
        _check_int8(self, x)
        norm, project_in, project_out = reach(norm, Norm), reach(self.project_in, Codes), reach(self.project_out, Codes)
        dwconv = _weight(self.dwconv, 3, groups=len(project_in.scale))
        weights = project_in.weight, project_in.scale, dwconv, project_out.weight, project_out.scale
        return kernels.gdfn_int8(x, norm.weight, norm.bias, *weights, eps=self.eps)


class Block(nn.Module):
    def __init__(self, channels: int, num_heads: int, config: RestormerConfig):
        super().__init__()
        self.kinds = (AttentionInt8, FeedForwardInt8) if config.int8 else (Attention, FeedForward)
        attention, feed_forward = self.kinds
        self.norm1 = Norm(channels, config.norm_bias)
        self.attn = attention(channels, num_heads, config.eps)
        self.norm2 = Norm(channels, config.norm_bias)
        self.ffn = feed_forward(channels, int(channels * config.expansion), config.eps)


class Level(nn.Module):
    """A run of blocks at one resolution. It has no forward: the network takes the halves of its blocks one by one."""

    def __init__(self, channels: int, num_blocks: int, num_heads: int, config: RestormerConfig):
        super().__init__()
        self.blocks = nn.ModuleList(Block(channels, num_heads, config) for _ in range(num_blocks))

    def stage(self) -> Blocks:
        blocks = [reach(block, Block) for block in reach(reach(self, Level).blocks, nn.ModuleList)]
        halves = [(Half(b.attn, {"norm": b.norm1}, b.kinds[0]), Half(b.ffn, {"norm": b.norm2}, b.kinds[1])) for b in blocks]
        return Blocks([half for block in halves for half in block])


class Resample(nn.Module):
    """A 3x3 convolution, then pixel (un)shuffle: half the size and twice the channels, or the reverse."""

    def __init__(self, channels_in: int, channels_out: int, shuffle: nn.Module):
        super().__init__()
        self.body = nn.Sequential(_conv(channels_in, channels_out, 3), shuffle)

    def layers(self) -> list[nn.Module]:
        return list(reach(reach(self, Resample).body, nn.Sequential))


class Restormer(StagedNetwork):
    """Maps an image to an image of the same size by predicting the difference."""

    Config = RestormerConfig
    config: RestormerConfig
    shard_units = {Attention: True, FeedForward: True}
    multiple = 8

    def __init__(self, config: RestormerConfig):
        super().__init__(config)
        c1, c2, c3, c4 = (config.dim << i for i in range(4))
        c_out = c1 if config.reduce_level1 else 2 * c1
        n1, n2, n3, n4 = config.num_blocks
        h1, h2, h3, h4 = config.num_heads

        self.patch_embed = _conv(3, c1, 3)
        self.encoder_level1 = Level(c1, n1, h1, config)
        self.down1_2 = Resample(c1, c1 // 2, nn.PixelUnshuffle(2))
        self.encoder_level2 = Level(c2, n2, h2, config)
        self.down2_3 = Resample(c2, c2 // 2, nn.PixelUnshuffle(2))
        self.encoder_level3 = Level(c3, n3, h3, config)
        self.down3_4 = Resample(c3, c3 // 2, nn.PixelUnshuffle(2))
        self.latent = Level(c4, n4, h4, config)
        self.up4_3 = Resample(c4, c4 * 2, nn.PixelShuffle(2))
        self.reduce_chan_level3 = _conv(2 * c3, c3, 1)
        self.decoder_level3 = Level(c3, n3, h3, config)
        self.up3_2 = Resample(c3, c3 * 2, nn.PixelShuffle(2))
        self.reduce_chan_level2 = _conv(2 * c2, c2, 1)
        self.decoder_level2 = Level(c2, n2, h2, config)
        self.up2_1 = Resample(c2, c2 * 2, nn.PixelShuffle(2))
        self.reduce_chan_level1 = _conv(2 * c1, c1, 1) if config.reduce_level1 else None
        self.decoder_level1 = Level(c_out, n1, h1, config)
        self.refinement = Level(c_out, config.num_refinement_blocks, h1, config)
        self.output = _conv(c_out, 3, 3)

    def stages(self) -> list[Stage]:
        c1, c2, c3, c4 = (self.config.dim << i for i in range(4))
        found: list[Stage] = [Embed([self.patch_embed], c1)]
        for level, down, channels in (
            (self.encoder_level1, self.down1_2, c2),
            (self.encoder_level2, self.down2_3, c3),
            (self.encoder_level3, self.down3_4, c4),
        ):
            found += Level.stage(level), Down(Resample.layers(down), channels)
        found += [Level.stage(self.latent)]
        for up, reduce, level, channels in (
            (self.up4_3, self.reduce_chan_level3, self.decoder_level3, c3),
            (self.up3_2, self.reduce_chan_level2, self.decoder_level2, c2),
            (self.up2_1, self.reduce_chan_level1, self.decoder_level1, c1),
        ):
            layers, join = Resample.layers(up), _concatenate
            if reduce is None:
                channels *= 2
            else:  # reduce(cat(x, skip)) without the concatenated image
                for_x, for_skip = _weight(reduce, 1).chunk(2, dim=1)
                layers, join = [*layers, partial(pointwise, weight=for_x)], partial(add_pointwise, weight=for_skip)
            found += Up(layers, join, channels), Level.stage(level)
        return [*found, Level.stage(self.refinement), Output([self.output])]

    def scratch_bytes(self) -> int:
        """Rows of hidden channels and sums of weight gradients (csrc/common/cpu_expansion.h), at the widest level."""
        weights = [m.project_in.weight for m in self.modules() if isinstance(m, FeedForward | FeedForwardInt8)]
        return max(4 * weight.shape[0] * (1800 + 3 * weight.shape[1] // 2) for weight in weights)

    @classmethod
    def settings_of(cls, names: Collection[str], shape: Callable[[str], list[int]]) -> dict[str, Any]:
        levels = ("encoder_level1", "encoder_level2", "encoder_level3", "latent")
        return {
            "dim": shape("patch_embed.weight")[0],
            "num_blocks": tuple(count(names, f"{level}.blocks.") for level in levels),
            "num_refinement_blocks": count(names, "refinement.blocks."),
            "num_heads": tuple(math.prod(shape(f"{level}.blocks.0.attn.temperature")) for level in levels),
            "norm_bias": "latent.blocks.0.norm1.bias" in names,
            "reduce_level1": "reduce_chan_level1.weight" in names,
            "int8": "latent.blocks.0.ffn.project_in.scale" in names,
        }


def _concatenate(x: Tensor, skip: Tensor) -> Tensor:
    return torch.cat((x, skip), dim=1)
