"""Restormer on whole photos under a memory cap: layer by layer in strips of rows, with the result of the whole image.

Attention sums over all pixels, so that parts of a photo can't be enhanced one by one. Here each mdta goes over the image twice,
first for its statistics, then to apply them, and everything else reads one row above and below its strip. Nothing image-sized
is alive but the feature maps of the levels, each worked on in place; those that don't fit lie in a temporary file, by plain
reads and writes: the pages of a mapped file would count as the process's memory.
"""

import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autohdr import kernels
from autohdr.errors import UserError
from autohdr.kernels.backends import resolve
from autohdr.measure import format_bytes, is_out_of_memory, seconds_by_pixels
from autohdr.models.common import pad_to_multiple

if TYPE_CHECKING:
    from autohdr.models.restormer import Level, Resample, Restormer

log = logging.getLogger(__name__)

MEMORY, PARKED, FILED = "memory", "parked", "filed"
MOST_ROWS = 128  # of a strip: the halo of taller ones is a percent of their work
MOST_BYTES = 24 << 20  # below 32 MiB, where glibc's malloc gives every block back at once and the next one faults in page by page
GOOD_ROWS = 16  # shorter strips cost more than another map in a file
LEAST_ROWS = 4
# Strips alive at once, in strips of the widest map: inputs, outputs, the one that waits to be written, and gaps between them.
STRIPS_COMPILED, STRIPS_REFERENCE = 10, 15
FIXED_BYTES = 64 << 20  # the kernels' scratch memory, reordered weights, what malloc does not give back


@dataclass(frozen=True)
class Plan:
    """How an image goes through a Restormer. Every plan gives the same pixels, to float rounding.

    rows: of a strip, even; on every level its own rows.
    places: where the maps of levels 1 to 4, and with reduce_level1=False the last decoder's, are kept: in "memory"; "parked", in
        a file while deeper levels run; or "filed", always in a file.
    peak_bytes: expected resident memory of the process (CUDA: of tensors on the device) at its peak.
    file_bytes: expected to be written to and read from files.
    seconds: what `expected_seconds` says, or None where nobody asked.
    """

    rows: int
    places: tuple[str, ...]
    peak_bytes: int
    file_bytes: int
    seconds: float | None = None

    def __str__(self) -> str:
        apart = [f"level {i + 1} {place}" for i, place in enumerate(self.places) if place != MEMORY]
        files = f", {', '.join(apart)} ({format_bytes(self.file_bytes)} through {tempfile.gettempdir()})" if apart else ""
        seconds = "" if self.seconds is None else f", expected time {self.seconds:.0f} s"
        return f"strips of {self.rows} rows{files}, expected peak {format_bytes(self.peak_bytes)}{seconds}"


def make_plan(model: "Restormer", image: Tensor, max_memory: int, resident: int) -> Plan:
    """The plan with the least file traffic, then the tallest strips, whose expected peak is within max_memory bytes.

    resident: what the process holds of them already, model and image included. UserError: not even the smallest plan fits.
    """
    config, dtype = model.config, _feature_dtype(image)
    height, width = (side + -side % 8 for side in image.shape[-2:])
    row = width * config.dim * dtype.itemsize
    maps = [row * height >> i for i in range(4)]
    # Rows written and read of a filed map: five times a block, and on the way in and out of each level.
    passes = [5 + 10 * n for n in config.num_blocks[:3]] + [2 + 5 * config.num_blocks[3]]
    if config.reduce_level1:
        passes[0] += 5 * config.num_refinement_blocks
    else:
        row *= 2
        maps.append(row * height)
        passes[0] = 3 + 5 * config.num_blocks[0]
        passes.append(2 + 5 * (config.num_blocks[0] + config.num_refinement_blocks))
    compiled = resolve("mdta", "auto", image.new_empty((1, 1, 1, 1), dtype=dtype)) == "cpu"
    pixels = image.numel() * image.element_size()
    most = min(MOST_ROWS, max(MOST_BYTES // row, GOOD_ROWS))

    def plan(places: tuple[str, ...]) -> Plan:
        held = [0 if place == FILED else size for place, size in zip(places, maps, strict=True)]
        kept = [size if place == MEMORY else 0 for place, size in zip(places, held, strict=True)]
        last = 0 if config.reduce_level1 else 4  # the map of the last decoder
        peaks = [held[0] + pixels, held[last] + pixels, (kept[0] if last else 0) + held[1] + held[last]]
        peaks += [sum(kept[:i]) + held[i] + held[i + 1] for i in range(3)]  # rows go from one level to the next
        strip = row * ((STRIPS_COMPILED if compiled else STRIPS_REFERENCE) + (FILED in places))
        fixed = resident + FIXED_BYTES + max(peaks)
        rows = min(max(max_memory - fixed, 0) // strip, most, height) // 2 * 2
        moves = [{MEMORY: 0, PARKED: 2, FILED: n}[place] for place, n in zip(places, passes, strict=True)]
        moved = sum(n * size for n, size in zip(moves, maps, strict=True))
        return Plan(rows, places, fixed + strip * max(rows, LEAST_ROWS), moved)

    # The deepest map has nothing to be parked for, nor has the last decoder's.
    choices = [(MEMORY, PARKED, FILED)] * 3 + [(MEMORY, FILED)] * (len(maps) - 3)
    plans = sorted((plan(places) for places in product(*choices)), key=lambda p: p.file_bytes)
    for least in (GOOD_ROWS, LEAST_ROWS):
        for candidate in plans:
            if candidate.rows >= min(least, height):
                return candidate
    raise UserError(
        f"{config.name}: an image of {image.shape[-1]}×{image.shape[-2]} pixels in {str(dtype).removeprefix('torch.')} takes"
        f" {format_bytes(min(p.peak_bytes for p in plans))} of memory at least, {format_bytes(max_memory)} are allowed"
    )


def expected_seconds(model: "Restormer", image: Tensor, plan: Plan) -> float:
    """How long `run` would take here, from the time of two small images, a hundredth of the work, and of a small file."""
    height, width = (side + -side % 8 for side in image.shape[-2:])
    side = max(32, min(256, math.isqrt(height * width) // 8 // 16 * 16))
    with torch.no_grad():
        fixed, each = seconds_by_pixels(lambda side: model(image.new_zeros((1, 3, side, side))), side, image.device)
    begin, block = time.perf_counter(), bytes(1 << 24)
    with tempfile.TemporaryFile() as file:
        file.write(block)
        file.seek(0)
        file.read()
    moving = plan.file_bytes * (time.perf_counter() - begin) / (2 * len(block))
    return len(image) * (fixed + each * height * width * (1 + 2 / plan.rows) + moving)


def run(model: "Restormer", image: Tensor, plan: Plan) -> Tensor:
    """model(image) as planned. Strips that run out of memory are made smaller, down to two rows. Without gradients."""
    with torch.no_grad():
        results = [_Run(model, single, plan).result() for single in image.split(1)]
    return results[0] if len(results) == 1 else torch.cat(results)


def _feature_dtype(image: Tensor) -> torch.dtype:
    device = image.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else image.dtype


class _Map:
    """A feature map (1, channels, height, width): its rows as [height, width, channels], in memory or in a file."""

    def __init__(self, channels: int, height: int, width: int, like: Tensor, dtype: torch.dtype, filed: bool = False):
        self.height, self.row_shape, self.like = height, (width, channels), like.new_empty(0, dtype=dtype)
        self.row_bytes = width * channels * dtype.itemsize
        self.file = tempfile.TemporaryFile() if filed else None
        self.rows = None if filed else self.like.new_empty((height, *self.row_shape))

    def read(self, first: int, end: int) -> Tensor:
        """Rows [first, end) as an image; a view of them where the map is in memory."""
        if self.file is None:
            rows = self.rows[first:end]
        else:
            rows = torch.empty((end - first, *self.row_shape), dtype=self.like.dtype)
            self.file.seek(first * self.row_bytes)
            self.file.readinto(rows.view(torch.uint8).numpy())
            rows = rows.to(self.like.device)
        return rows.permute(2, 0, 1)[None]

    def write(self, first: int, image: Tensor) -> None:
        rows = image[0].permute(1, 2, 0)
        if self.file is None:
            self.rows[first : first + len(rows)] = rows
            return
        self.file.seek(first * self.row_bytes)
        try:
            self.file.write(rows.to("cpu", self.like.dtype).contiguous().view(torch.uint8).numpy())
        except OSError as error:
            raise UserError(f"a feature map can't be kept in {tempfile.gettempdir()} (TMPDIR): {error.strerror}") from error

    def park(self, rows: int) -> None:
        """From memory to a file."""
        whole, self.file = self.rows, tempfile.TemporaryFile()
        for y in range(0, self.height, rows):
            self.write(y, whole[y : y + rows].permute(2, 0, 1)[None])
        self.rows = None


class _Run:
    """One image's way through the network."""

    def __init__(self, model: "Restormer", image: Tensor, plan: Plan):
        self.model, self.image, self.plan, self.rows = model, image, plan, plan.rows
        self.dtype = _feature_dtype(image)

    def result(self) -> Tensor:
        model = self.model
        config, places = model.config, self.plan.places
        padded = pad_to_multiple(self.image, 8)
        height, width = padded.shape[-2:]
        source = _Map(3, height, width, padded, padded.dtype)
        source.rows = padded[0].permute(1, 2, 0)
        del padded

        def new_map(level: int, place: str, channels: int | None = None) -> _Map:
            channels = channels or config.dim << level
            return _Map(channels, height >> level, width >> level, self.image, self.dtype, place == FILED)

        x = new_map(0, places[0])
        self.convolve(source, x, model.patch_embed)
        del source
        skips = []
        for i, (level, down) in enumerate(
            (
                (model.encoder_level1, model.down1_2),
                (model.encoder_level2, model.down2_3),
                (model.encoder_level3, model.down3_4),
            )
        ):
            self.run_level(x, level)
            below = new_map(i + 1, places[i + 1])
            self.convolve(x, below, *down.body)
            if places[i] == PARKED:
                x.park(self.rows)
            skips.append(x)
            x = below
            del below
        self.run_level(x, model.latent)
        for i, up, reduce, level in (
            (2, model.up4_3, model.reduce_chan_level3, model.decoder_level3),
            (1, model.up3_2, model.reduce_chan_level2, model.decoder_level2),
            (0, model.up2_1, model.reduce_chan_level1, model.decoder_level1),
        ):
            skip = skips.pop()
            if reduce is None:
                target = new_map(0, places[4], 2 * config.dim)
            else:
                target = new_map(i, MEMORY) if places[i] == PARKED else skip
            self.merge(x, skip, target, up, reduce)
            x = target
            del skip, target
            self.run_level(x, level)
        self.run_level(x, model.refinement)
        return self.output(x)

    def run_level(self, x: _Map, level: "Level") -> None:
        for block in level.blocks:
            attention, feed_forward = block.attn, partial(block.ffn, norm=block.norm2)
            weights, heads, eps = attention.weights(block.norm1), attention.num_heads, attention.eps
            sums = _add(self.strips(x, partial(_statistics, weights, heads, eps)))
            apply = partial(kernels.mdta_apply, parameters=weights, num_heads=heads, statistics=sums, eps=eps)
            self.convolve(x, x, apply)
            self.convolve(x, x, feed_forward)

    def convolve(self, source: _Map, target: _Map, layer: Callable[[Tensor], Tensor], after: Callable | None = None) -> None:
        """target = after(layer(source)); layer sees one row around an own one, after none. target may be source."""

        def step(x: Tensor, own: slice, y: int) -> Tensor:
            out = layer(x)[:, :, own]
            return after(out) if after else out

        self.write(target, self.strips(source, step), target.height / source.height)

    def merge(self, low: _Map, skip: _Map, target: _Map, up: "Resample", reduce: nn.Conv2d | None) -> None:
        """target = reduce(cat(up(low), skip)), without the concatenated image; target may be skip."""

        def step(x: Tensor, own: slice, y: int) -> Tensor:
            out = up.body(x)[:, :, 2 * own.start : 2 * own.stop]
            beside = skip.read(2 * y, 2 * y + out.shape[2])
            if reduce is None:
                return torch.cat((out, beside), dim=1)
            for_low, for_skip = reduce.weight.chunk(2, dim=1)
            out = F.conv2d(out, for_low)
            return out.add_(F.conv2d(beside, for_skip))

        self.write(target, self.strips(low, step, scale=4), 2)

    def output(self, x: _Map) -> Tensor:
        result, (height, width) = torch.empty_like(self.image), self.image.shape[-2:]
        for y, out in self.strips(x, lambda x, own, y: self.model.output(x)[:, :, own, :width]):
            rows = slice(y, min(y + out.shape[2], height))  # none in the padding below
            result[:, :, rows] = out[:, :, : max(rows.stop - y, 0)] + self.image[:, :, rows]
        return result

    def write(self, target: _Map, strips: Iterator[tuple[int, Tensor]], scale: float) -> None:
        """Each strip only when the next one is made, which may read this one's rows as they were."""
        late = None
        for y, out in strips:
            if late:
                target.write(*late)
            late = int(y * scale), out
        target.write(*late)

    def strips(self, source: _Map, step: Callable[[Tensor, slice, int], Any], scale: int = 1) -> Iterator[tuple[int, Any]]:
        """y, step(x, own, y) for strips from row y on: x has a row more above and below, where there are any; own: the strip's.

        scale: for steps that hold more than others, by how much their strips are shorter.
        """
        y = 0
        while y < source.height:
            end = min(y + max(self.rows // scale // 2 * 2, 2), source.height)
            above = max(y - 1, 0)
            try:
                result = step(source.read(above, min(end + 1, source.height)), slice(y - above, end - above), y)
            except (MemoryError, RuntimeError) as error:
                if self.rows <= 2 or not is_out_of_memory(error):
                    raise
            else:
                yield y, result
                y = end
                continue
            # Only here is the error gone, whose traceback kept the tensors of the failed step.
            self.rows = self.rows // 4 * 2
            log.info("out of memory: going on with strips of %d rows", self.rows)
            if self.image.is_cuda:
                torch.cuda.empty_cache()


def _statistics(weights: tuple, heads: int, eps: float, x: Tensor, own: slice, y: int) -> tuple[Tensor, ...]:
    return kernels.mdta_statistics(x, weights, heads, own.start, own.stop, eps=eps)


def _add(strips: Iterator[tuple[int, tuple[Tensor, ...]]]) -> tuple[Tensor, ...]:
    total = None
    for _, sums in strips:
        total = sums if total is None else tuple(map(torch.add, total, sums))
    return total
