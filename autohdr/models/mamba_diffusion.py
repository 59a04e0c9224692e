"""MambaDiffusion: a U-shaped image-to-image network of bidirectional state-space blocks, in one pass or as a diffusion model.

Its every image is kept channels-last, (B, C, H, W) in the memory order of (B, H, W, C): the tokens (B, H·W, C) that norms,
projections and scans work on are then a view of it, row by row from the top left.

Made to train: 72 blocks at full size start near the identity, since each adds only GAMMA times its own output to a residual
stream that stays float32 under autocast; Δ starts between 0.001 and 0.1 in every channel; Δ, A, D and the state are float32
under autocast.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autohdr import kernels
from autohdr.errors import UserError
from autohdr.kernels.common import autocast
from autohdr.models.diffusion import STEPS, cosine_schedule
from autohdr.models.layers import (
    Conv2d,
    ConvTranspose2d,
    Linear,
    Mean,
    crop,
    from_windows,
    linear,
    pad_to_multiple,
    pointwise,
    reach,
    relative_positions,
    to_windows,
)
from autohdr.models.network import Network, NetworkConfig, count, is_whole

HEADS = 8
WINDOW = 8
GAMMA = 1e-2
"""What a block's learned scales start at, and what the convolutions that end a group, and the network, are scaled by."""
DELTA = (1e-3, 1e-1)
"""Range of softplus(dt_proj.bias) at initialisation."""


@dataclass(frozen=True)
class MambaDiffusionConfig(NetworkConfig):
    """What fixes a MambaDiffusion."""

    dim: int
    """Channels at full resolution; they double in each group. A multiple of 8."""
    num_groups: int
    """Groups of the encoder, each at half the resolution of the one before; the decoder has as many."""
    num_blocks: int
    """Blocks of each group, the middle one included."""
    dstate: int = 16
    """States of each channel's recurrence, at most 256."""
    conv_size: int = 4
    """Tokens that the causal convolution sees, its own included, at most 16."""
    dual_attention: bool = True
    """Whether the middle has a block of window and channel attention too."""
    time_embedding: bool = False
    """Whether the network is told the step of a diffusion process; it then holds that process's schedule as well."""

    def __post_init__(self):
        self.require("dim", "a multiple of 8 above 0", is_whole(self.dim, 8) and self.dim % 8 == 0)
        self.require("num_groups", "a whole number above 0", is_whole(self.num_groups, 1))
        self.require("num_blocks", "a whole number above 0", is_whole(self.num_blocks, 1))
        self.require("dstate", "a whole number from 1 to 256", is_whole(self.dstate, 1) and self.dstate <= 256)
        self.require("conv_size", "a whole number from 1 to 16", is_whole(self.conv_size, 1) and self.conv_size <= 16)
        self.require("dual_attention", "true or false", isinstance(self.dual_attention, bool))
        self.require("time_embedding", "true or false", isinstance(self.time_embedding, bool))


def _tokens(x: Tensor) -> Tensor:
    """(B, C, H, W), channels-last, as (B, H·W, C): a view."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _image(tokens: Tensor, like: Tensor) -> Tensor:
    """(B, H·W, C) as (B, C, H, W), channels-last: a view. `like` gives the height and width."""
    return tokens.unflatten(1, like.shape[-2:]).permute(0, 3, 1, 2)


def _feed_forward(channels: int) -> nn.Sequential:
    # The third module stands where the layout has a dropout.
    return nn.Sequential(Linear(channels, 4 * channels), nn.GELU(), nn.Identity(), Linear(4 * channels, channels))


def _scaled(conv: Conv2d) -> Conv2d:
    """The convolution with its fresh weights times GAMMA: it starts near zero, yet hands gradients on from the first step."""
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.mul_(GAMMA)
    return conv


class SSM(nn.Module):
    """A Mamba block in one direction: a gated selective scan over the tokens (Gu and Dao, 2023, figure 3).

    forward(x): tokens (B, L, C) to the same shape. Backwards, the convolution and the scan run from the last token to the first,
    as if the sequence were flipped before and after, without doing so.
    """

    def __init__(self, channels: int, config: MambaDiffusionConfig, reverse: bool):
        super().__init__()
        inner, self.reverse = 2 * channels, reverse
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, config.dstate + 1)))  # A = -1 ... -dstate, in every channel
        self.D = nn.Parameter(torch.ones(inner))
        self.in_proj = Linear(channels, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, config.conv_size, groups=inner)
        self.x_proj = Linear(inner, 1 + 2 * config.dstate, bias=False)
        self.dt_proj = Linear(1, inner)
        self.out_proj = Linear(inner, channels, bias=False)
        low, high = map(math.log, DELTA)
        with torch.no_grad():
            delta = torch.empty(inner).uniform_(low, high).exp()
            self.dt_proj.bias.copy_(delta + torch.log(-torch.expm1(-delta)))  # softplus of it is delta

    def forward(self, x: Tensor) -> Tensor:
        # Two products, not one cut in half: the backward pass then need not put the halves' gradients together.
        u_weight, z_weight = reach(self.in_proj, Linear, bias=None).weight.chunk(2)
        conv1d = reach(self.conv1d, nn.Conv1d, stride=(1,), padding=(0,), dilation=(1,), groups=len(self.D))
        x_proj, dt_proj = reach(self.x_proj, Linear, bias=None), reach(self.dt_proj, Linear)
        u = linear(x, u_weight)
        u = kernels.causal_conv1d(u, conv1d.weight[:, 0], conv1d.bias, reverse=self.reverse, layout="bld")
        dstate = self.A_log.shape[0]
        # B and C begin at multiples of 8 elements, so that kernels load them in pieces of 16 bytes.
        gap, zeros = -dstate % 8, x_proj.weight.new_zeros(8, len(self.D))
        delta_row, B_rows, C_rows = x_proj.weight.split((1, dstate, dstate))
        rows = torch.cat((B_rows, zeros[:gap], C_rows, zeros[:gap], delta_row, zeros[1:]))
        B, _, C, _, delta, _ = linear(u, rows).split((dstate, gap, dstate, gap, 1, 7), dim=-1)
        wide = torch.promote_types(self.A_log.dtype, torch.float32)
        A = -self.A_log.to(wide).exp().expand(self.D.shape[0], dstate)
        y = kernels.selective_scan(
            u,
            delta.to(wide),
            A,
            B,
            C,
            self.D,
            z=linear(x, z_weight),
            delta_bias=dt_proj.bias,
            delta_softplus=True,
            reverse=self.reverse,
            layout="bld",
            delta_weight=dt_proj.weight[:, 0],
        )
        return self.out_proj(y)


class Block(nn.Module):
    """A state-space block: both scans, weighed channel by channel, and a local branch beside them; then an MLP.

    forward(x): x is (B, C, H, W), channels-last; so is the result.
    """

    def __init__(self, channels: int, config: MambaDiffusionConfig):
        super().__init__()
        self.gamma1 = nn.Parameter(torch.full((channels,), GAMMA))
        self.gamma2 = nn.Parameter(torch.full((channels,), GAMMA))
        self.norm1 = nn.LayerNorm(channels)
        self.ssm_forward = SSM(channels, config, reverse=False)
        self.ssm_backward = SSM(channels, config, reverse=True)
        self.local_enhance = nn.Sequential(
            Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
            Conv2d(channels, channels, 1, bias=False),
            nn.GELU(),
            Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
            Conv2d(channels, channels, 1, bias=False),
        )
        self.channel_attn = nn.Sequential(
            Mean(),
            nn.Flatten(),
            Linear(channels, channels // 4),
            nn.GELU(),
            Linear(channels // 4, channels),
            nn.Sigmoid(),
        )
        self.norm2 = nn.LayerNorm(channels)
        self.ffn = _feed_forward(channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens = _tokens(x)
        normed = autocast(self.norm1(tokens))  # once for all that read it
        both = self.ssm_forward(normed) + self.ssm_backward(normed)
        weight = self.channel_attn(_image(both, x))[:, None]
        local = _tokens(self.local_enhance(_image(normed, x)))
        norm2, branch = reach(self.norm2, nn.LayerNorm), torch.addcmul(local, both, weight)
        tokens, normed = kernels.add_norm(tokens, branch, self.gamma1, norm2.weight, norm2.bias, eps=norm2.eps)
        tokens = torch.addcmul(tokens, self.gamma2, self.ffn(normed))
        return _image(tokens, x)


class Group(nn.Module):
    """A run of blocks at one resolution, then a convolution with a residual. forward(x): (B, C, H, W) to the same shape.

    recompute: whether a block keeps its input alone for the backward pass and computes the rest again then.
    """

    def __init__(self, channels: int, config: MambaDiffusionConfig):
        super().__init__()
        self.blocks = nn.ModuleList(Block(channels, config) for _ in range(config.num_blocks))
        self.conv = _scaled(Conv2d(channels, channels, 3, padding=1, bias=False))

    def forward(self, x: Tensor, recompute: bool = False) -> Tensor:
        for block in reach(self.blocks, nn.ModuleList):
            # Nothing in a block is random.
            x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False) if recompute else block(x)
        return x + self.conv(x)


class WindowAttention(nn.Module):
    """Attention between the pixels of each 8x8 window, with a bias for each relative position (Liu et al., Swin, 2021).

    forward(x): (B, C, H, W) to the same shape, any H and W: windows that stick out attend to their pixels inside the image alone.
    """

    relative_position_index: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * WINDOW - 1) ** 2, HEADS))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", relative_positions(WINDOW))
        self.norm = nn.LayerNorm(channels)
        self.qkv = Linear(channels, 3 * channels, bias=False)
        self.proj = Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        bottom, right = -height % WINDOW, -width % WINDOW
        qkv = F.pad(self.qkv(self.norm(x.permute(0, 2, 3, 1))), (0, 0, 0, right, 0, bottom))
        windows = to_windows(qkv, WINDOW)  # (B, rows, columns, 64, 3C)
        batch, rows, columns = windows.shape[:3]
        q, k, v = windows.flatten(0, 2).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # each (windows, heads, 64, C/heads)
        # Of four axes: PyTorch's fused attention on a CPU takes no bias of three.
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1).to(q.dtype)[None]
        if torch.compiler.is_compiling() or bottom or right:  # compiled: one program for all sizes
            row, column = (torch.arange(n * WINDOW, device=x.device) for n in (rows, columns))
            inside = ((row < height)[:, None] & (column < width))[None, :, :, None].expand(batch, -1, -1, -1)
            inside = to_windows(inside, WINDOW).flatten(0, 2)
            bias = bias.masked_fill(~inside.mT[:, :, None], -math.inf)  # (windows, heads, 64, 64)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
        y = from_windows(y.unflatten(0, (batch, rows, columns)), WINDOW)
        return self.proj(crop(y.permute(0, 3, 1, 2), height, width).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ChannelAttention(nn.Module):
    """Attention between the channels of each head, over all pixels.

    Queries and keys have length 1 whatever the image's size, and the logits at most sqrt(channels a head): nothing can overflow.
    forward(x): (B, C, H, W) to the same shape.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.qkv = Linear(channels, 3 * channels, bias=False)
        self.proj = Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(_tokens(x)))
        q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 4, 1)  # each (B, heads, C/heads, H·W)
        logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * math.sqrt(q.shape[2])
        y = logits.softmax(-1).to(v.dtype) @ v
        return _image(self.proj(y.flatten(1, 2).mT), x)


class DualAttention(nn.Module):
    """Window attention, channel attention and an MLP, each with its norm, residual and learned scale (Chen et al., DAT, 2023)."""

    def __init__(self, channels: int):
        super().__init__()
        self.gamma1 = nn.Parameter(torch.full((channels,), GAMMA))
        self.gamma2 = nn.Parameter(torch.full((channels,), GAMMA))
        self.gamma3 = nn.Parameter(torch.full((channels,), GAMMA))
        self.spatial_attn = WindowAttention(channels)
        self.channel_attn = ChannelAttention(channels)
        self.norm = nn.LayerNorm(channels)
        self.ffn = _feed_forward(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.addcmul(x, self.gamma1[:, None, None], self.spatial_attn(x))
        x = torch.addcmul(x, self.gamma2[:, None, None], self.channel_attn(x))
        tokens = _tokens(x)
        return _image(torch.addcmul(tokens, self.gamma3, self.ffn(self.norm(tokens))), x)


class MambaDiffusion(Network):
    """Maps an image, and the step of a diffusion process, to an image of the same size by predicting the difference.

    forward(image, t=None): image is (B, 3, H, W), floating point, RGB, nominally in [0, 1]; any H, W >= 1. t is (B,), the step of
    each image, 0 ... 999, for a network with a time embedding; None is the last step, where a bridge has arrived at the source
    photo: one pass, no diffusion. (A network trained to predict v or noise gives no photo by itself: see diffusion.Sampler.)
    Returns the image's shape and, for parameters of its dtype or under autocast, its dtype, not clamped. Raises UserError for
    another shape, for a t that the network has no place for, and where a layer that is never called, since a kernel takes its
    weight, would do something else if it were.
    """

    Config = MambaDiffusionConfig
    config: MambaDiffusionConfig
    shard_units = {Group: False}
    can_recompute = True

    def __init__(self, config: MambaDiffusionConfig):
        super().__init__(config)
        self.multiple = 1 << (config.num_groups - 1)
        channels = [config.dim << i for i in range(config.num_groups)]
        dim, bottom, upwards = channels[0], channels[-1], channels[::-1]
        self.conv_first = nn.Sequential(Conv2d(3, dim, 3, padding=1), Conv2d(dim, dim, 3, padding=1))
        if config.time_embedding:
            betas, alphas_cumprod = cosine_schedule()
            self.register_buffer("betas", betas.float())
            self.register_buffer("alphas_cumprod", alphas_cumprod.float())
            self.register_buffer("sqrt_alphas_cumprod", alphas_cumprod.sqrt().float())
            self.register_buffer("sqrt_one_minus_alphas_cumprod", (1 - alphas_cumprod).sqrt().float())
            self.time_embed = nn.Sequential(Linear(dim, 4 * dim), nn.SiLU(), Linear(4 * dim, dim))
            self.time_proj = Linear(dim, dim)
        self.encoder_groups = nn.ModuleList(Group(c, config) for c in channels)
        self.downsamplers = nn.ModuleList(Conv2d(c, 2 * c, 4, stride=2, padding=1) for c in channels[:-1])
        self.middle = nn.ModuleList([Group(bottom, config)])
        self.middle_dat = DualAttention(bottom) if config.dual_attention else None
        self.decoder_groups = nn.ModuleList(Group(c, config) for c in upwards)
        # The first decoder group stands at the bottom beside the last encoder group: nothing to enlarge, no skip to merge.
        larger = (ConvTranspose2d(2 * c, c, 4, stride=2, padding=1) for c in upwards[1:])
        self.upsamplers = nn.ModuleList([nn.Identity(), *larger])
        self.skip_convs = nn.ModuleList([nn.Identity(), *(Conv2d(2 * c, c, 1) for c in upwards[1:])])
        self.conv_last = nn.Sequential(Conv2d(dim, dim, 3, padding=1), nn.GELU(), _scaled(Conv2d(dim, 3, 3, padding=1)))

    def forward(self, image: Tensor, t: Tensor | None = None) -> Tensor:
        self._check(image, t)
        padded = pad_to_multiple(image, self.multiple)
        x = self.conv_first(padded.contiguous(memory_format=torch.channels_last))
        if self.config.time_embedding:
            x = x + self._embed(t, image)[:, :, None, None]
        encoder, downsamplers, middle, decoder, upsamplers, skip_convs = (
            reach(modules, nn.ModuleList)
            for modules in (
                self.encoder_groups,
                self.downsamplers,
                self.middle,
                self.decoder_groups,
                self.upsamplers,
                self.skip_convs,
            )
        )
        skips, recompute = [], self.recompute and torch.is_grad_enabled()
        for group, down in zip(encoder, [*downsamplers, None], strict=True):
            x = group(x, recompute)
            if down is not None:
                skips.append(x)
                x = down(x)
        x = middle[0](x, recompute)
        if self.middle_dat is not None:
            x = self.middle_dat(x)
        for i, group in enumerate(decoder):
            if i > 0:
                x = upsamplers[i](x)
                # skip_convs[i](cat(x, skip)) without the concatenated image
                conv = reach(skip_convs[i], Conv2d, kernel_size=(1, 1), stride=(1, 1), padding=(0, 0), groups=1)
                for_x, for_skip = conv.weight.chunk(2, dim=1)
                x = pointwise(x, for_x, conv.bias) + pointwise(skips.pop(), for_skip)
            x = group(x, recompute)
        return crop(self.conv_last(x), *image.shape[-2:]) + image

    def _embed(self, t: Tensor | None, image: Tensor) -> Tensor:
        """(B,) steps as (B, C): sines and cosines of each step (Ho et al., 2020), in float32, then an MLP."""
        t = torch.full(image.shape[:1], STEPS - 1, device=image.device) if t is None else t
        half = self.config.dim // 2
        frequencies = torch.exp(torch.arange(half, device=image.device) * (-math.log(10_000) / half))
        angles = t.float()[:, None] * frequencies
        waves = torch.cat((angles.sin(), angles.cos()), dim=1).to(self.time_proj.weight.dtype)
        return self.time_proj(self.time_embed(waves))

    def _check(self, image: Tensor, t: Tensor | None):
        self.check(image)
        name = self.config.name
        if t is not None and not self.config.time_embedding:
            raise UserError(f"{name}: has no time embedding; expected no t, got one")
        if t is not None and t.shape != image.shape[:1]:
            raise UserError(f"{name}: expected t of [{len(image)}], one step for each image, got {list(t.shape)}")

    @classmethod
    def settings_of(cls, names: Collection[str], shape: Callable[[str], list[int]]) -> dict[str, Any]:
        ssm = "encoder_groups.0.blocks.0.ssm_forward"
        return {
            "dim": shape("conv_first.0.weight")[0],
            "num_groups": count(names, "encoder_groups."),
            "num_blocks": count(names, "encoder_groups.0.blocks."),
            "dstate": shape(f"{ssm}.A_log")[0],
            "conv_size": shape(f"{ssm}.conv1d.weight")[-1],
            "dual_attention": "middle_dat.gamma1" in names,
            "time_embedding": "time_proj.weight" in names,
        }
