"""causal_conv1d in Triton, forward and backward: bound by memory.

A program owns a tile of tokens × channels, whose inner side is the one that is contiguous in memory. It loads the tile once for
every tap, shifted: all but the first come from the first-level cache. Backward it computes the gradient before SiLU again at
every tap's place, and leaves its sums for weight and bias in a slot; the slots are added up in order, in float64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Of a tile of 2048 elements, by channel_last: the contiguous side is a cache line or two in half precision.
TOKENS, CHANNELS = {True: 32, False: 128}, {True: 64, False: 16}


@triton.jit
def _load(data, batch, token_stride, channel_stride, token, channel, seqlen, dim):
    """The tile [token, channel] in float32, zero beyond the sequence."""
    inside = (token >= 0) & (token < seqlen) & (channel < dim)
    at = data + batch + token.to(tl.int64) * token_stride + channel.to(tl.int64) * channel_stride
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _tap(weight, j, channel, dim, WIDTH: tl.constexpr, REVERSE: tl.constexpr):
    """The tap that meets the j-th token from the first that an output reads."""
    return tl.load(weight + channel * WIDTH + (WIDTH - 1 - j if REVERSE else j), mask=channel < dim, other=0.0)


@triton.jit
def _convolve(
    x, batch, token_stride, channel_stride, weight, bias, token, channel, seqlen, dim,
    WIDTH: tl.constexpr, REVERSE: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    v = tl.zeros(SHAPE, tl.float32)
    if bias is not None:
        v += tl.load(bias + channel, mask=channel < dim, other=0.0)
    for j in tl.static_range(WIDTH):
        seen = token + (j if REVERSE else j - (WIDTH - 1))
        tap = _tap(weight, j, channel, dim, WIDTH, REVERSE)
        v += tap * _load(x, batch, token_stride, channel_stride, seen, channel, seqlen, dim)
    return v


@triton.jit
def _place(seqlen, dim, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    """(the program's batch entry, its first token, its channels [1, CHANNELS], the slot of its sums)."""
    strips, chunks = tl.cdiv(dim, CHANNELS), tl.cdiv(seqlen, TOKENS)
    program = tl.program_id(0)
    channel = program % strips * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    slot = program // strips
    return (slot // chunks).to(tl.int64), slot % chunks * TOKENS, channel, slot.to(tl.int64)


@triton.jit
def _forward(
    x, weight, bias, y, seqlen, dim, x_batch, x_token, x_channel, y_batch, y_token, y_channel,
    WIDTH: tl.constexpr, REVERSE: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    entry, first, channel, _ = _place(seqlen, dim, TOKENS, CHANNELS)
    token = first + tl.arange(0, TOKENS)[:, None]
    v = _convolve(
        x, entry * x_batch, x_token, x_channel, weight, bias, token, channel, seqlen, dim, WIDTH, REVERSE, (TOKENS, CHANNELS)
    )
    at = y + entry * y_batch + token.to(tl.int64) * y_token + channel.to(tl.int64) * y_channel
    tl.store(at, v * tl.sigmoid(v), mask=(token < seqlen) & (channel < dim))


@triton.jit
def _before_silu(
    dy, x, weight, bias, dy_batch, dy_token, dy_channel, x_batch, x_token, x_channel, token, channel, seqlen, dim,
    WIDTH: tl.constexpr, REVERSE: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """The gradient before SiLU, zero beyond the sequence."""
    v = _convolve(x, x_batch, x_token, x_channel, weight, bias, token, channel, seqlen, dim, WIDTH, REVERSE, SHAPE)
    gate = tl.sigmoid(v)
    g = _load(dy, dy_batch, dy_token, dy_channel, token, channel, seqlen, dim)
    return tl.where((token >= 0) & (token < seqlen), g * (gate + v * gate * (1.0 - gate)), 0.0)


@triton.jit
def _backward(
    dy, x, weight, bias, dx, slots, seqlen, dim,
    dy_batch, dy_token, dy_channel, x_batch, x_token, x_channel, dx_batch, dx_token, dx_channel,
    WIDTH: tl.constexpr, REVERSE: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    entry, first, channel, slot = _place(seqlen, dim, TOKENS, CHANNELS)
    dy_batch, x_batch, dx_batch = entry * dy_batch, entry * x_batch, entry * dx_batch
    token = first + tl.arange(0, TOKENS)[:, None]
    to = slots + slot * (WIDTH + 1) * dim + channel
    total = tl.zeros((TOKENS, CHANNELS), tl.float32)
    # Loops, not unrolled: their loads would all be under way at once, in more registers than there are.
    for j in range(WIDTH):  # the outputs that read the tile's tokens by tap j
        reader = token - (j if REVERSE else j - (WIDTH - 1))
        d = _before_silu(
            dy, x, weight, bias, dy_batch, dy_token, dy_channel, x_batch, x_token, x_channel, reader, channel, seqlen, dim,
            WIDTH, REVERSE, (TOKENS, CHANNELS),
        )  # fmt: skip
        total += _tap(weight, j, channel, dim, WIDTH, REVERSE) * d
    at = dx + dx_batch + token.to(tl.int64) * dx_token + channel.to(tl.int64) * dx_channel
    tl.store(at, total, mask=(token < seqlen) & (channel < dim))
    own = _before_silu(
        dy, x, weight, bias, dy_batch, dy_token, dy_channel, x_batch, x_token, x_channel, token, channel, seqlen, dim,
        WIDTH, REVERSE, (TOKENS, CHANNELS),
    )  # fmt: skip
    for j in range(WIDTH):
        seen = token + (j if REVERSE else j - (WIDTH - 1))
        product = own * _load(x, x_batch, x_token, x_channel, seen, channel, seqlen, dim)
        place = to + (WIDTH - 1 - j if REVERSE else j) * dim
        tl.store(place, tl.sum(product, 0, keep_dims=True), mask=channel < dim)
    tl.store(to + WIDTH * dim, tl.sum(own, 0, keep_dims=True), mask=channel < dim)


def _sizes(x: Tensor, channel_last: bool) -> tuple[int, int]:
    """(seqlen, dim)."""
    return (x.shape[1], x.shape[2]) if channel_last else (x.shape[2], x.shape[1])


def _strides(t: Tensor, channel_last: bool) -> tuple[int, int, int]:
    """From a batch entry, a token and a channel to the next."""
    batch, a, b = t.stride()
    return (batch, a, b) if channel_last else (batch, b, a)


def _grid(x: Tensor, channel_last: bool) -> tuple[int, int]:
    """(slots, strips of channels)."""
    seqlen, dim = _sizes(x, channel_last)
    return len(x) * triton.cdiv(seqlen, TOKENS[channel_last]), triton.cdiv(dim, CHANNELS[channel_last])


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool, channel_last: bool) -> Tensor:
    y = x.new_empty(x.shape)
    slots, strips = _grid(x, channel_last)
    if slots:
        _forward[(slots * strips,)](
            x, weight, bias, y, *_sizes(x, channel_last), *_strides(x, channel_last), *_strides(y, channel_last),
            weight.shape[1], reverse, TOKENS[channel_last], CHANNELS[channel_last], enable_fp_fusion=True,
        )  # fmt: skip
    return y


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool, channel_last: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx, (dim, width) = x.new_empty(x.shape), weight.shape
    count, strips = _grid(x, channel_last)
    slots = weight.new_empty((count, width + 1, dim))
    if count:
        _backward[(count * strips,)](
            dy, x, weight, bias, dx, slots, *_sizes(x, channel_last),
            *(s for t in (dy, x, dx) for s in _strides(t, channel_last)),
            width, reverse, TOKENS[channel_last], CHANNELS[channel_last], num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
    sums = slots.sum(0, dtype=torch.float64).float()
    return dx, sums[:width].T.contiguous(), weight.new_empty((0,)) if bias is None else sums[width].clone()
