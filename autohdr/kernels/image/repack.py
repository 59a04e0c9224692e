"""Weights in the order that kernels want them, and sums in the order that weights have: padded in groups, added up over slots."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from autohdr.kernels.image.view import View

_FEW = 16  # slots that a program adds up one by one


def round_up(n: int) -> int:
    """Channels of a buffer for n of them, so that every pixel's begin at a multiple of 16 bytes."""
    return triton.cdiv(n, 16) * 16


class Axis(NamedTuple):
    """An axis of a copy, in groups: of each, as many elements as the source has or as are wanted, zeros behind them."""

    count: int
    source: int
    wanted: int

    @staticmethod
    def plain(n: int, wanted: int | None = None) -> "Axis":
        return Axis(1, n, n if wanted is None else wanted)

    @property
    def inverse(self) -> "Axis":
        return Axis(self.count, self.wanted, self.source)


class Groups:
    """Hidden channels in groups (q, k, v of each head; the two halves of the gate), each padded to whole tiles."""

    def __init__(self, count: int, size: int):
        self.count, self.size, self.padded = count, size, round_up(size)

    @property
    def channels(self) -> int:
        return self.count * self.padded

    @property
    def axis(self) -> Axis:
        """Of padding them."""
        return Axis(self.count, self.size, self.padded)


class _Copy(NamedTuple):
    """As _gather takes it: to[row][column] = Σ_slot source[slot][row][column], where the pitches are what lies between two."""

    source: Tensor
    to: Tensor
    row_groups: int
    row_source: int  # of each group
    row_wanted: int
    column_groups: int
    column_source: int
    column_wanted: int
    slots: int
    slot_pitch: int
    row_pitch: int
    column_pitch: int


@triton.jit(do_not_specialize=["copies"])
def _gather(copies, COUNT: tl.constexpr, BS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """A program owns BR × BC elements of a group of rows and columns of a copy, and adds up its slots, BS at once, in double."""
    block = tl.program_id(0)
    for i in tl.static_range(COUNT):
        c = copies[i]
        of_row, of_column = tl.cdiv(c.row_wanted, BR), tl.cdiv(c.column_wanted, BC)
        across = c.column_groups * of_column
        if (block >= 0) & (block < c.row_groups * of_row * across):
            row_group, column_group = block // across // of_row, block % across // of_column
            row = (block // across % of_row * BR + tl.arange(0, BR))[:, None]
            column = (block % of_column * BC + tl.arange(0, BC))[None, :]
            there = (row < c.row_source) & (column < c.column_source)
            source = c.source + (row_group * c.row_source + row).to(tl.int64) * c.row_pitch
            source += (column_group * c.column_source + column).to(tl.int64) * c.column_pitch
            total = tl.zeros([BS, BR, BC], tl.float64)
            for first in range(0, c.slots, BS):
                slot = (first + tl.arange(0, BS))[:, None, None]
                from_ = source[None, :, :] + slot.to(tl.int64) * c.slot_pitch
                total += tl.load(from_, mask=(slot < c.slots) & there[None, :, :], other=0.0).to(tl.float64)
            total = tl.sum(total, 0)
            if c.to.dtype.element_ty != tl.float64:
                total = total.to(tl.float32)
            at = (row_group * c.row_wanted + row) * (c.column_groups * c.column_wanted) + column_group * c.column_wanted + column
            tl.store(c.to + at, total, mask=(row < c.row_wanted) & (column < c.column_wanted))
        block -= c.row_groups * of_row * across


class Repack:
    """Copies to be made, all at once when `run` is called. Until then what `make` and `add_up` return holds nothing."""

    def __init__(self):
        self.copies: list[_Copy] = []

    def make(self, source: Tensor, rows: Axis, columns: Axis, dtype: torch.dtype = torch.float32) -> Tensor:
        """Of source [rows, columns] of any strides, contiguous."""
        return self.add_up(source[None], rows, columns, dtype)

    def add_up(self, slots: Tensor, rows: Axis, columns: Axis, dtype: torch.dtype = torch.float32) -> Tensor:
        """The sum over the slots of [slots, rows, columns] of any strides, in double and in order; contiguous."""
        shape = rows.count * rows.wanted, columns.count * columns.wanted
        to = torch.empty(shape, dtype=dtype, device=slots.device)
        self.copies.append(_Copy(slots, to, *rows, *columns, slots.shape[0], *slots.stride()))
        return to

    def run(self) -> None:
        """Makes those of few slots with one kernel, whose programs take many elements, and those of many slots with another."""
        for copies, (bs, br, bc) in (
            ([c for c in self.copies if c.slots <= _FEW], (1, 16, 64)),
            ([c for c in self.copies if c.slots > _FEW], (32, 1, 32)),
        ):
            if copies:
                rows = (c.row_groups * triton.cdiv(c.row_wanted, br) for c in copies)
                columns = (c.column_groups * triton.cdiv(c.column_wanted, bc) for c in copies)
                grid = (sum(r * c for r, c in zip(rows, columns, strict=True)),)
                _gather[grid](tuple(copies), COUNT=len(copies), BS=bs, BR=br, BC=bc, enable_fp_fusion=True)
        self.copies = []


def zeros(device: torch.device, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """float32, of each shape, in one piece of memory."""
    counts = [torch.Size(shape).numel() for shape in shapes]
    memory = torch.zeros(sum(counts), dtype=torch.float32, device=device)
    return [part.view(shape) for part, shape in zip(memory.split(counts), shapes, strict=True)]


def pixel_sums(image: View) -> Tensor:
    """Of every channel."""
    return image.data.sum((0, 1, 2), dtype=torch.float32)
