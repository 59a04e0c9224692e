"""Weights in the order that kernels want them, and sums in the order that weights have: padded in groups, added up over slots."""

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from autohdr.kernels.image.view import View


def round_up(n: int) -> int:
    """Channels of a buffer for n of them, so that every pixel's begin at a multiple of 16 bytes."""
    return triton.cdiv(n, 16) * 16


class Groups:
    """Hidden channels in groups (q, k, v of each head; the two halves of the gate), each padded to whole tiles."""

    def __init__(self, count: int, size: int):
        self.count, self.size, self.padded = count, size, round_up(size)

    @property
    def channels(self) -> int:
        return self.count * self.padded

    @property
    def padding(self) -> int:
        """Of a group."""
        return self.padded - self.size

    def pad(self, weight: Tensor, channels: int) -> Tensor:
        """weight [count · size, c], padded with zeros to [count · padded, channels]."""
        by_group = weight.reshape(self.count, self.size, -1)
        if not self.padding and by_group.shape[2] == channels:  # F.pad would copy it
            return by_group.flatten(0, 1)
        by_group = F.pad(by_group, (0, channels - by_group.shape[2], 0, self.padding))
        return by_group.view(self.channels, channels)

    def pad_taps(self, taps: Tensor) -> Tensor:
        """taps [count · size, ...] of a convolution as [..., count · padded]."""
        by_tap = taps.reshape(self.count, self.size, -1).permute(2, 0, 1)
        return (F.pad(by_tap, (0, self.padding)) if self.padding else by_tap).contiguous().flatten(1)

    def unpad(self, values: Tensor) -> Tensor:
        """Of [count · padded, ...] those that are not padding, contiguous."""
        return values.unflatten(0, (self.count, self.padded))[:, : self.size].flatten(0, 1).contiguous()


def pixel_sums(image: View) -> Tensor:
    """Of every channel."""
    return image.data.sum((0, 1, 2), dtype=torch.float32)


def add_up(slots: Tensor) -> Tensor:
    return slots.sum(0, dtype=torch.float64).float()
