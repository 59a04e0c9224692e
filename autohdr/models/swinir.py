"""SwinIR: an image-to-image transformer of shifted windows at one resolution, under its authors' names of tensors.

Liang et al., "SwinIR: Image Restoration Using Swin Transformer", ICCV workshops 2021.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autohdr.models.layers import Conv2d, Linear, crop, from_windows, pad_to_multiple, reach, relative_positions, to_windows
from autohdr.models.network import Network, NetworkConfig, count, is_whole

MEAN = (0.4488, 0.4371, 0.4040)
"""Of the photos that the authors trained on; what the network sees has it taken off."""


@dataclass(frozen=True)
class SwinIRConfig(NetworkConfig):
    """What fixes a SwinIR that keeps the image's size, as the authors' for denoising and, with window=7 and img_range=255, for
    JPEG artefacts."""

    dim: int
    """Channels."""
    depths: tuple[int, ...]
    """Blocks of each group."""
    heads: tuple[int, ...]
    """Heads of attention in each group; divisors of dim."""
    window: int = 8
    """Side of the windows in pixels."""
    mlp_ratio: float = 2.0
    """Hidden channels of the feed-forward part, as a multiple of dim."""
    img_range: float = 1.0
    """What the network takes white for."""

    def __post_init__(self):
        self.require("dim", "a whole number above 0", is_whole(self.dim, 1))
        wholes = isinstance(self.depths, tuple) and len(self.depths) > 0 and all(is_whole(v, 1) for v in self.depths)
        self.require("depths", "whole numbers above 0, one a group", wholes)
        divides = isinstance(self.heads, tuple) and all(is_whole(v, 1) and self.dim % v == 0 for v in self.heads)
        self.require("heads", f"{len(self.depths)} divisors of {self.dim}", divides and len(self.heads) == len(self.depths))
        self.require("window", "a whole number from 2 to 64", is_whole(self.window, 2) and self.window <= 64)
        hidden = _number(self.mlp_ratio) and int(self.dim * self.mlp_ratio) >= 1
        self.require("mlp_ratio", "a number that leaves a hidden channel", hidden)
        self.require("img_range", "a number above 0", _number(self.img_range) and self.img_range > 0)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class WindowAttention(nn.Module):
    """Attention between the pixels of each window, with a bias for each relative position (Liu et al., Swin, 2021).

    forward(x, shift): x is (B, H, W, C), sides multiples of the window's; so is the result. The windows lie `shift` pixels
    further down and right; pixels that come round the edge and those that were there do not see each other.
    """

    relative_position_index: Tensor

    def __init__(self, dim: int, heads: int, window: int):
        super().__init__()
        self.heads, self.window = heads, window
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", relative_positions(window))
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, shift: int) -> Tensor:
        qkv, (height, width) = self.qkv(torch.roll(x, (-shift, -shift), (1, 2)) if shift else x), x.shape[1:3]
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1).to(qkv.dtype)[None]
        if not shift:
            return self.proj(self._attend(qkv, bias))
        rows, columns = (torch.arange(n, device=x.device) >= n - shift for n in (height, width))  # those that came round
        if torch.compiler.is_compiling():  # one program for all sizes: a bias for each window
            y = self._attend(qkv, self._apart(bias, rows, columns).repeat(x.shape[0], 1, 1, 1))
        else:  # one for all windows but the last row's, the last column's, and the last one's
            down, right = ([n - self.window, self.window] if n > self.window else [n] for n in (height, width))
            strips = [
                [
                    self._attend(part, self._apart(bias, r[-self.window :], c[-self.window :]))
                    for part, c in zip(strip.split(right, 2), columns.split(right), strict=True)
                ]
                for strip, r in zip(qkv.split(down, 1), rows.split(down), strict=True)
            ]
            y = torch.cat([torch.cat(parts, 2) for parts in strips], 1)
        return self.proj(torch.roll(y, (shift, shift), (1, 2)))

    def _apart(self, bias: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """The bias of each window, (windows, heads, N, N), between pixels that came round and others minus infinity.

        rows, columns: of the image, whether they came round.
        """
        side = to_windows((2 * rows[:, None] + columns)[None, :, :, None], self.window).flatten(0, 2).mT  # (windows, 1, N)
        return bias.masked_fill((side != side.mT)[:, None], -math.inf)

    def _attend(self, qkv: Tensor, bias: Tensor) -> Tensor:
        """qkv (B, H, W, 3C) to (B, H, W, C). bias: of all windows, or (1, ...) for every one."""
        windows = to_windows(qkv, self.window)
        q, k, v = (
            windows.flatten(0, 2).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )  # each (windows, heads, N, C/heads)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
        return from_windows(y.unflatten(0, windows.shape[:3]), self.window)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention in windows, then an MLP, each with its norm and residual. forward(x): (B, H, W, C) to the same shape."""

    def __init__(self, config: SwinIRConfig, heads: int, shift: int):
        super().__init__()
        self.shift = shift
        self.norm1 = nn.LayerNorm(config.dim)
        self.attn = WindowAttention(config.dim, heads, config.window)
        self.norm2 = nn.LayerNorm(config.dim)
        self.mlp = Mlp(config.dim, int(config.dim * config.mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), self.shift)
        return x + self.mlp(self.norm2(x))


class Group(nn.Module):
    """Blocks whose windows are shifted by half their size in every second one, then a convolution, with a residual around both.

    forward(x): (B, H, W, C) to the same shape.
    """

    def __init__(self, config: SwinIRConfig, depth: int, heads: int):
        super().__init__()
        blocks = nn.Sequential(*(Block(config, heads, i % 2 * (config.window // 2)) for i in range(depth)))
        self.residual_group = nn.ModuleDict({"blocks": blocks})
        self.conv = Conv2d(config.dim, config.dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = reach(self.residual_group, nn.ModuleDict)["blocks"](x)
        return x + _last(self.conv(_first(y)))


def _first(x: Tensor) -> Tensor:
    """(B, H, W, C) as (B, C, H, W), channels-last: a view."""
    return x.permute(0, 3, 1, 2)


def _last(x: Tensor) -> Tensor:
    """(B, C, H, W) as (B, H, W, C): a view."""
    return x.permute(0, 2, 3, 1)


class SwinIR(Network):
    """Maps an image to an image of the same size by predicting the difference.

    forward(image): (B, 3, H, W), floating point, RGB, nominally in [0, 1]; any H, W >= 1. Returns the same shape and, for
    parameters of its dtype or under autocast, its dtype, not clamped. Raises UserError for another shape.

    The authors' training leaves out whole branches at random (stochastic depth); this network does not.
    """

    Config = SwinIRConfig
    config: SwinIRConfig
    shard_units = {Group: True}
    derived = frozenset({"attn_mask"})
    mean: Tensor

    def __init__(self, config: SwinIRConfig):
        super().__init__(config)
        self.multiple = config.window
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.conv_first = Conv2d(3, config.dim, 3, padding=1)
        self.patch_embed = nn.ModuleDict({"norm": nn.LayerNorm(config.dim)})
        self.layers = nn.Sequential(*(Group(config, d, h) for d, h in zip(config.depths, config.heads, strict=True)))
        self.norm = nn.LayerNorm(config.dim)
        self.conv_after_body = Conv2d(config.dim, config.dim, 3, padding=1)
        self.conv_last = Conv2d(config.dim, 3, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, image: Tensor) -> Tensor:
        self.check(image)
        padded = pad_to_multiple(image, self.multiple).contiguous(memory_format=torch.channels_last)
        first = self.conv_first((padded - self.mean) * self.config.img_range)
        x = self.layers(reach(self.patch_embed, nn.ModuleDict)["norm"](_last(first)))
        x = self.conv_last(first + self.conv_after_body(_first(self.norm(x))))
        return crop(x, *image.shape[-2:]) / self.config.img_range + image

    @classmethod
    def settings_of(cls, names: Collection[str], shape: Callable[[str], list[int]]) -> dict[str, Any]:
        groups = [f"layers.{i}.residual_group.blocks." for i in range(max(count(names, "layers."), 1))]
        tables = [shape(f"{group}0.attn.relative_position_bias_table") for group in groups]
        dim, window = shape("conv_first.weight")[0], (math.isqrt(tables[0][0]) + 1) // 2
        return {
            "dim": dim,
            "depths": tuple(count(names, group) for group in groups),
            "heads": tuple(table[-1] for table in tables),
            "window": window,
            "mlp_ratio": shape("layers.0.residual_group.blocks.0.mlp.fc1.weight")[0] / dim,
            "img_range": 255.0 if window == 7 else 1.0,  # the authors' for JPEG artefacts, whose windows alone are these
        }
