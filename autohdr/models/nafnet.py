"""NAFNet: a U-shaped image-to-image convolutional network without activation functions, under its authors' names of tensors.

Chen et al., "Simple Baselines for Image Restoration", ECCV 2022.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autohdr import kernels
from autohdr.models.layers import Conv2d, Mean, Uncalled, reach
from autohdr.models.network import Blocks, Down, Embed, Half, NetworkConfig, Output, Stage, StagedNetwork, Up, count, is_whole

EPS = 1e-6


@dataclass(frozen=True)
class NAFNetConfig(NetworkConfig):
    """What fixes a NAFNet. The authors' networks for SIDD are the registered ones; those for GoPro and REDS have encoder_blocks
    (1, 1, 1, 28), one middle block and decoder_blocks (1, 1, 1, 1)."""

    width: int
    """Channels at full resolution; they double at each level below."""
    encoder_blocks: tuple[int, ...]
    """Blocks of each level of the encoder, from full resolution down."""
    middle_blocks: int
    """Blocks of the level below them."""
    decoder_blocks: tuple[int, ...]
    """Blocks of each level of the decoder, up to full resolution: as many levels as the encoder has."""

    def __post_init__(self):
        self.require("width", "a whole number above 0", is_whole(self.width, 1))
        self.require("encoder_blocks", "whole numbers, 0 or more, one a level", _counts(self.encoder_blocks))
        self.require("middle_blocks", "a whole number, 0 or more", is_whole(self.middle_blocks, 0))
        levels = len(self.encoder_blocks)
        met = _counts(self.decoder_blocks) and len(self.decoder_blocks) == levels
        self.require("decoder_blocks", f"{levels} whole numbers, 0 or more, as encoder_blocks has", met)


def _counts(value: Any) -> bool:
    return isinstance(value, tuple) and 1 <= len(value) <= 8 and all(is_whole(v, 0) for v in value)


class Norm(nn.Module):
    """The weights of a layer norm over channels; the kernels apply it."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))


class Block(nn.Module):
    """A gated depthwise convolution, whose channels are weighed by their means over all pixels, then a gated pointwise one; each
    with its norm and a residual of learned scale.

    forward(x): a whole image. For one in strips of rows, `statistics` of each strip, added up, are what `attend` needs.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.conv1 = Conv2d(channels, 2 * channels, 1)
        self.conv2 = Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=2 * channels)
        self.conv3 = Conv2d(channels, channels, 1)
        self.sca = nn.Sequential(Mean(), Conv2d(channels, channels, 1))
        self.conv4 = Conv2d(channels, 2 * channels, 1)
        self.conv5 = Conv2d(channels, channels, 1)
        self.norm1 = Norm(channels)
        self.norm2 = Norm(channels)

    def _weights(self) -> tuple[Tensor, ...]:
        """As kernels.nafblock takes them."""
        mean, attention = reach(self.sca, nn.Sequential)
        reach(mean, Mean)
        norm1, norm2 = reach(self.norm1, Norm), reach(self.norm2, Norm)
        return (
            norm1.weight,
            norm1.bias,
            *_parameters(self.conv1, 1),
            *_parameters(self.conv2, 3, groups=2 * len(norm1.weight)),
            *_parameters(attention, 1),
            *_parameters(self.conv3, 1),
            self.beta,
            norm2.weight,
            norm2.bias,
            *_parameters(self.conv4, 1),
            *_parameters(self.conv5, 1),
            self.gamma,
        )

    def forward(self, x: Tensor) -> Tensor:
        return kernels.nafblock(x, *self._weights(), eps=EPS)

    def statistics(self, x: Tensor, first: int, end: int) -> tuple[Tensor, ...]:
        """Of rows [first, end) of x: the sums over pixels (B, C) that channels are weighed by, and the number of pixels."""
        pixels = torch.tensor((end - first) * x.shape[3], device=x.device)
        return kernels.nafblock_statistics(x, self._weights(), first, end, eps=EPS), pixels

    def attend(self, x: Tensor, statistics: tuple[Tensor, ...]) -> Tensor:
        """forward(x) with the statistics of the image that x is a strip of."""
        total, pixels = statistics
        return kernels.nafblock_apply(x, self._weights(), total / pixels, eps=EPS)


def _parameters(conv: nn.Module, size: int, groups: int = 1) -> tuple[Tensor, Tensor]:
    """The weight and the bias of a convolution, for who computes it otherwise."""
    geometry = {"kernel_size": (size, size), "stride": (1, 1), "padding": (size // 2, size // 2), "dilation": (1, 1)}
    conv = reach(conv, Conv2d, **geometry, groups=groups, padding_mode="zeros")
    if conv.bias is None:
        raise Uncalled(conv, "expected a bias, got none")
    return conv.weight, conv.bias


class NAFNet(StagedNetwork):
    """Maps an image to an image of the same size by predicting the difference.

    An image whose sides are no multiples is reflected at its edges, where the authors' code adds zeros. The means are over the
    whole image, as in the authors' NAFNet; their NAFNetLocal, with the same weights, takes means around each pixel.
    """

    Config = NAFNetConfig
    config: NAFNetConfig
    shard_units = {Block: True}

    def __init__(self, config: NAFNetConfig):
        super().__init__(config)
        self.multiple = 1 << len(config.encoder_blocks)
        channels = [config.width << i for i in range(len(config.encoder_blocks))]
        below = 2 * channels[-1]
        self.intro = Conv2d(3, config.width, 3, padding=1)
        self.ending = Conv2d(config.width, 3, 3, padding=1)
        self.encoders = nn.ModuleList(_blocks(c, n) for c, n in zip(channels, config.encoder_blocks, strict=True))
        self.downs = nn.ModuleList(Conv2d(c, 2 * c, 2, stride=2) for c in channels)
        self.middle_blks = _blocks(below, config.middle_blocks)
        upwards = channels[::-1]
        self.ups = nn.ModuleList(nn.Sequential(Conv2d(2 * c, 4 * c, 1, bias=False), nn.PixelShuffle(2)) for c in upwards)
        self.decoders = nn.ModuleList(_blocks(c, n) for c, n in zip(upwards, config.decoder_blocks, strict=True))

    def stages(self) -> list[Stage]:
        encoders, downs, ups, decoders = (
            reach(modules, nn.ModuleList) for modules in (self.encoders, self.downs, self.ups, self.decoders)
        )
        channels = [self.config.width << i for i in range(len(downs))]
        found: list[Stage] = [Embed([self.intro], self.config.width)]
        for blocks, down, c in zip(encoders, downs, channels, strict=True):
            found += _stage(blocks), Down([down], 2 * c)
        found += [_stage(self.middle_blks)]
        for up, blocks, c in zip(ups, decoders, channels[::-1], strict=True):
            found += Up(list(reach(up, nn.Sequential)), torch.add, c), _stage(blocks)
        return [*found, Output([self.ending])]

    def scratch_bytes(self) -> int:
        """Rows of hidden channels, pixels between the convolutions, and sums of weight gradients
        (csrc/nafblock/nafblock_cpu_kernel.h), at the widest level."""
        channels = max(m.conv1.in_channels for m in self.modules() if isinstance(m, Block))
        return 4 * 2 * channels * (4000 + 8 * channels)

    @classmethod
    def settings_of(cls, names: Collection[str], shape: Callable[[str], list[int]]) -> dict[str, Any]:
        return {
            "width": shape("intro.weight")[0],
            "encoder_blocks": tuple(count(names, f"encoders.{i}.") for i in range(count(names, "downs."))),
            "middle_blocks": count(names, "middle_blks."),
            "decoder_blocks": tuple(count(names, f"decoders.{i}.") for i in range(count(names, "ups."))),
        }


def _blocks(channels: int, number: int) -> nn.ModuleList:
    return nn.ModuleList(Block(channels) for _ in range(number))


def _stage(blocks: nn.Module) -> Blocks:
    return Blocks([Half(block, {}, Block) for block in reach(blocks, nn.ModuleList)])
