"""Restormer: a U-shaped image-to-image transformer whose every block is one mdta and one gdfn kernel call.

Zamir et al., "Restormer: Efficient Transformer for High-Resolution Image Restoration", CVPR 2022.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autohdr import kernels
from autohdr.errors import UserError
from autohdr.measure import resident_bytes
from autohdr.models import tiling
from autohdr.models.common import is_whole, pad_to_multiple, require


@dataclass(frozen=True)
class RestormerConfig:
    """What fixes a Restormer. `name` and `overrides` are what create_model needs to build it again."""

    name: str
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
    overrides: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        require(self, "dim", "an even whole number above 0", is_whole(self.dim, 1) and self.dim % 2 == 0)
        require(self, "num_blocks", "four whole numbers above 0", _four(self.num_blocks))
        require(self, "num_refinement_blocks", "a whole number, 0 or more", is_whole(self.num_refinement_blocks, 0))
        channels = [self.dim << i for i in range(4)]
        divides = _four(self.num_heads) and all(c % n == 0 for c, n in zip(channels, self.num_heads, strict=True))
        require(self, "num_heads", f"four divisors of the levels' channels {channels}", divides)
        require(self, "expansion", "a number of at least 1", _number(self.expansion) and self.expansion >= 1)
        require(self, "norm_bias", "true or false", isinstance(self.norm_bias, bool))
        require(self, "eps", "a number above 0", _number(self.eps) and self.eps > 0)
        require(self, "reduce_level1", "true or false", isinstance(self.reduce_level1, bool))


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _four(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 4 and all(is_whole(v, 1) for v in value)


def _conv(channels_in: int, channels_out: int, size: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, size, padding=size // 2, groups=groups, bias=False)


class Norm(nn.Module):
    """The weights of a layer norm over channels; the kernels apply it."""

    def __init__(self, channels: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None


class Attention(nn.Module):
    """MDTA with its norm and residual: attention between channels, not pixels (equation 1)."""

    def __init__(self, channels: int, num_heads: int, eps: float):
        super().__init__()
        self.num_heads, self.eps = num_heads, eps
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = _conv(channels, 3 * channels, 1)
        self.qkv_dwconv = _conv(3 * channels, 3 * channels, 3, groups=3 * channels)
        self.project_out = _conv(channels, channels, 1)

    def weights(self, norm: Norm) -> tuple[Tensor | None, ...]:
        """As kernels.mdta takes them."""
        own = self.qkv.weight, self.qkv_dwconv.weight, self.temperature, self.project_out.weight
        return norm.weight, norm.bias, *own

    def forward(self, x: Tensor, norm: Norm) -> Tensor:
        return kernels.mdta(x, *self.weights(norm), self.num_heads, eps=self.eps)


class FeedForward(nn.Module):
    """GDFN with its norm and residual: a gated depthwise-convolution network (equation 2)."""

    def __init__(self, channels: int, expansion: float, eps: float):
        super().__init__()
        hidden = int(channels * expansion)
        self.eps = eps
        self.project_in = _conv(channels, 2 * hidden, 1)
        self.dwconv = _conv(2 * hidden, 2 * hidden, 3, groups=2 * hidden)
        self.project_out = _conv(hidden, channels, 1)

    def forward(self, x: Tensor, norm: Norm) -> Tensor:
        weights = self.project_in.weight, self.dwconv.weight, self.project_out.weight
        return kernels.gdfn(x, norm.weight, norm.bias, *weights, eps=self.eps)


class Block(nn.Module):
    def __init__(self, channels: int, num_heads: int, config: RestormerConfig):
        super().__init__()
        self.norm1 = Norm(channels, config.norm_bias)
        self.attn = Attention(channels, num_heads, config.eps)
        self.norm2 = Norm(channels, config.norm_bias)
        self.ffn = FeedForward(channels, config.expansion, config.eps)


class Level(nn.Module):
    """A run of blocks at one resolution.

    It has no forward: a module's caller keeps the input alive until the call returns, which at full resolution is
    one or two images too many. Restormer.forward takes the steps one by one and rebinds x.
    """

    def __init__(self, channels: int, num_blocks: int, num_heads: int, config: RestormerConfig):
        super().__init__()
        self.blocks = nn.ModuleList(Block(channels, num_heads, config) for _ in range(num_blocks))

    def steps(self) -> list[Callable[[Tensor], Tensor]]:
        halves = [((b.attn, b.norm1), (b.ffn, b.norm2)) for b in self.blocks]
        return [partial(part, norm=norm) for block in halves for part, norm in block]


class Resample(nn.Module):
    """A 3x3 convolution, then pixel (un)shuffle: half the size and twice the channels, or the reverse."""

    def __init__(self, channels_in: int, channels_out: int, shuffle: nn.Module):
        super().__init__()
        self.body = nn.Sequential(_conv(channels_in, channels_out, 3), shuffle)


class Restormer(nn.Module):
    """Maps an image to an image of the same size by predicting the difference.

    forward(x): x is (B, 3, H, W), floating point, RGB, nominally in [0, 1]; any H, W >= 1. Returns the same shape and,
    for parameters of x's dtype or under autocast, the same dtype, not clamped. Raises UserError for another shape.

    forward(x, max_memory=bytes), for inference: the same, in strips of rows, so that the process's resident memory (CUDA: its
    tensors) stays within so many bytes; see tiling.Plan. Maps that don't fit go to a temporary file. Raises UserError where
    gradients are recorded, and for less memory than the smallest plan takes.
    """

    def __init__(self, config: RestormerConfig):
        super().__init__()
        self.config = config
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

    def forward(self, image: Tensor, max_memory: int | None = None) -> Tensor:
        if image.ndim != 4 or image.shape[1] != 3 or 0 in image.shape or not image.is_floating_point():
            raise UserError(
                f"{self.config.name}: expected a floating-point image batch [B, 3, H, W], "
                f"got {list(image.shape)} of {image.dtype}"
            )
        if max_memory is not None:
            if torch.is_grad_enabled():
                raise UserError(f"{self.config.name}: max_memory is for inference, under torch.inference_mode or no_grad")
            plan = tiling.make_plan(self, image, max_memory, resident_bytes(image.device))
            if tiling.log.isEnabledFor(logging.INFO):
                plan = replace(plan, seconds=tiling.expected_seconds(self, image, plan))
                tiling.log.info("%d×%d: %s", *image.shape[:1:-1], plan)
            return tiling.run(self, image, plan)
        height, width = image.shape[-2:]
        x = self.patch_embed(pad_to_multiple(image, 8).contiguous(memory_format=torch.channels_last))
        skips = []
        for level, down in (
            (self.encoder_level1, self.down1_2),
            (self.encoder_level2, self.down2_3),
            (self.encoder_level3, self.down3_4),
        ):
            for step in level.steps():
                x = step(x)
            skips.append(x)
            x = down.body(x)
        for level, up, reduce in (
            (self.latent, self.up4_3, self.reduce_chan_level3),
            (self.decoder_level3, self.up3_2, self.reduce_chan_level2),
            (self.decoder_level2, self.up2_1, self.reduce_chan_level1),
        ):
            for step in (*level.steps(), *up.body):
                x = step(x)
            skip = skips.pop()
            if reduce is None:
                x = torch.cat((x, skip), dim=1)
            else:  # reduce(cat(x, skip)) without the concatenated image
                for_x, for_skip = reduce.weight.chunk(2, dim=1)
                x = F.conv2d(x, for_x)
                x.add_(F.conv2d(skip, for_skip))
            del skip
        for step in (*self.decoder_level1.steps(), *self.refinement.steps()):
            x = step(x)
        return self.output(x)[..., :height, :width] + image
