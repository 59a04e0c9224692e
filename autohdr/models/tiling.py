"""A network on whole photos under a memory cap: stage by stage in strips of rows, with the result of the whole image.

Attention sums over all pixels, so that parts of a photo can't be enhanced one by one. Here each half of a block that sums goes
over the image twice, first for its statistics, then to apply them, and everything else reads one row above and below its strip.
Nothing image-sized is alive but the feature maps of the levels, each worked on in place; those that don't fit lie in a temporary
file, by plain reads and writes: the pages of a mapped file would count as the process's memory.
"""

import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, Protocol, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autohdr.errors import UserError
from autohdr.kernels.backends import resolve
from autohdr.measure import expected_seconds, format_bytes, format_seconds, give_back, is_out_of_memory, resident_bytes
from autohdr.models.layers import Conv2d, Uncalled, reach
from autohdr.models.network import Blocks, Down, Embed, Half, Network, Output, Stage, Summing, Up

log = logging.getLogger(__name__)

MEMORY, PARKED, FILED = "memory", "parked", "filed"
MOST_ROWS = 128  # of a strip: the halo of taller ones is a percent of their work
MOST_BYTES = 24 << 20  # below 32 MiB, where glibc's malloc gives every block back at once and the next one faults in page by page
GOOD_ROWS = 16  # shorter strips cost more than another map in a file
LEAST_ROWS = 4
# Strips alive at once, in strips of the widest map: inputs, outputs, the one that waits to be written, and gaps between them.
STRIPS_COMPILED, STRIPS_REFERENCE = 10, 15
STRIPS_COST = 2  # a small Restormer in the CPU time of the whole: 1.3 to 2
FIXED_BYTES = 64 << 20  # the kernels' scratch memory, reordered weights, what malloc does not give back


@dataclass(frozen=True)
class Plan:
    """How an image goes through a network. Every plan gives the same pixels, to float rounding.

    rows: of a strip, even; on every level its own rows.
    places: where the feature maps, in the order in which they are made, are kept: in "memory"; "parked", in a file while deeper
        levels run; or "filed", always in a file. A Restormer's are those of levels 1 to 4, and with reduce_level1=False the last
        decoder's.
    peak_bytes: expected resident memory of the process (CUDA: of tensors on the device) at its peak.
    file_bytes: expected to be written to and read from files.
    seconds: what `seconds_of` says, or None where nobody asked.
    """

    rows: int
    places: tuple[str, ...]
    peak_bytes: int
    file_bytes: int
    seconds: tuple[float, float] | None = None

    def __str__(self) -> str:
        apart = [f"level {i + 1} {place}" for i, place in enumerate(self.places) if place != MEMORY]
        files = f", {', '.join(apart)} ({format_bytes(self.file_bytes)} through {tempfile.gettempdir()})" if apart else ""
        seconds = "" if self.seconds is None else f", expected time {format_seconds(self.seconds)}"
        return f"strips of {self.rows} rows{files}, expected peak {format_bytes(self.peak_bytes)}{seconds}"


class Rows(Protocol):
    """An image that is read, and its result written, by rows, each in the form that takes the least memory.

    shape: (1, 3, H, W). dtype, device: of what is read; a floating-point dtype. result_bytes: what the result takes on the device
    beside what is there before its first row is written.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    result_bytes: int

    def read(self, first: int, end: int) -> Tensor:
        """Rows [first, end) of the image, (1, 3, end - first, W)."""
        ...

    def write(self, first: int, rows: Tensor) -> None:
        """Takes the result's rows from `first` on, of which the image's are not read again."""
        ...


def works_in_strips(model: nn.Module | None) -> TypeGuard[Network]:
    return isinstance(model, Network) and bool(model.stages())


def in_strips(model: nn.Module, image: Tensor, max_memory: int) -> Tensor:
    """model(image) for inference, so that the process's resident memory (CUDA: its tensors) stays within max_memory bytes.

    Maps that don't fit go to a temporary file. Raises UserError for a model that does not work in strips, where gradients are
    recorded, for less memory than the smallest plan takes, and for a hook anywhere in the model: it would see strips.
    """
    if not works_in_strips(model):
        name = model.config.name if isinstance(model, Network) else type(model).__name__
        raise UserError(f"max_memory is for networks that work in strips, as a Restormer does, got {name}")
    model.check(image)
    return run(model, image, _planned(model, image, max_memory))


def rows_in_strips(model: Network, image: Rows, max_memory: int) -> None:
    """in_strips for Rows, which take the result."""
    run_rows(model, image, _planned(model, image, max_memory))


def _planned(model: Network, image: Tensor | Rows, max_memory: int) -> Plan:
    if torch.is_grad_enabled():
        raise UserError(f"{model.config.name}: max_memory is for inference, under torch.inference_mode or no_grad")
    plan = make_plan(model, image, max_memory, resident_bytes(image.device))
    if log.isEnabledFor(logging.INFO):
        plan = replace(plan, seconds=seconds_of(model, image, plan))
        log.info("%d×%d: %s", *image.shape[:1:-1], plan)
    return plan


@dataclass
class _Planned:
    """A feature map of a plan: its channels and bytes, how often its rows are written or read, and whether it waits for an Up."""

    channels: int
    bytes: int
    passes: int = 0
    waits: bool = False


def _walk(stages: Sequence[Stage], pixels: int, size: int) -> tuple[list[_Planned], list[tuple[list[_Planned], list[_Planned]]]]:
    """The maps in the order in which they are made; and for each moment with two in use, or the result and one, (those that wait,
    those in use). pixels: of the padded image; size: bytes of a number."""
    maps, moments, waiting = [], [], []

    def new(channels: int) -> _Planned:
        maps.append(_Planned(channels, channels * size * (pixels >> 2 * len(waiting))))
        return maps[-1]

    for stage in stages:
        if isinstance(stage, Embed):
            x = new(stage.channels)
            x.passes += 1
            moments.append(([], [x]))
        elif isinstance(stage, Blocks):
            x.passes += sum(3 if _sums(half) else 2 for half in stage.halves)
        elif isinstance(stage, Down):
            x.passes, x.waits, before = x.passes + 1, True, list(waiting)
            waiting.append(x)
            below = new(stage.channels)
            below.passes += 1
            moments.append((before, [x, below]))
            x = below
        elif isinstance(stage, Up):
            x.passes += 1
            skip = waiting.pop()
            skip.passes += 1
            target = skip if skip.channels == stage.channels else new(stage.channels)
            target.passes += 1
            moments.append((waiting + [skip] * (target is not skip), [x, target]))
            x = target
        else:
            x.passes += 1
            moments.append(([], [x]))
    return maps, moments


def _sums(half: Half) -> bool:
    return hasattr(half.kind, "statistics")


def make_plan(model: Network, image: Tensor | Rows, max_memory: int, resident: int) -> Plan:
    """The plan with the least file traffic, then the tallest strips, whose expected peak is within max_memory bytes.

    resident: what the process holds of them already, model and image included. UserError: not even the smallest plan fits.
    """
    dtype = _feature_dtype(image)
    height, width = (side + -side % model.multiple for side in image.shape[-2:])
    maps, moments = _walk(model.stages(), height * width, dtype.itemsize)
    row = max(m.bytes for m in maps) // height
    strips = _strips_alive(image)
    result = _bytes(image) if isinstance(image, Tensor) else image.result_bytes
    most = min(MOST_ROWS, max(MOST_BYTES // row, GOOD_ROWS))

    def plan(places: tuple[str, ...]) -> Plan:
        place = {id(m): p for m, p in zip(maps, places, strict=True)}

        def alive(waiting: list[_Planned], used: list[_Planned]) -> int:
            kept = sum(m.bytes for m in waiting if place[id(m)] == MEMORY)
            return kept + sum(m.bytes for m in used if place[id(m)] != FILED) + (result if len(used) == 1 else 0)

        strip = row * (strips + (FILED in places))
        fixed = resident + FIXED_BYTES + max(alive(*moment) for moment in moments)
        rows = min(max(max_memory - fixed, 0) // strip, most, height) // 2 * 2
        moved = sum({MEMORY: 0, PARKED: 2, FILED: m.passes}[p] * m.bytes for m, p in zip(maps, places, strict=True))
        return Plan(rows, places, fixed + strip * max(rows, LEAST_ROWS), moved)

    choices = [(MEMORY, PARKED, FILED) if m.waits else (MEMORY, FILED) for m in maps]
    plans = sorted((plan(places) for places in product(*choices)), key=lambda p: p.file_bytes)
    for least in (GOOD_ROWS, LEAST_ROWS):
        for candidate in plans:
            if candidate.rows >= min(least, height):
                return candidate
    size = f"{image.shape[-1]}×{image.shape[-2]} pixels in {str(dtype).removeprefix('torch.')}"
    raise UserError(
        f"{model.config.name}: an image of {size} takes {format_bytes(min(p.peak_bytes for p in plans))} of memory at least, "
        f"{format_bytes(max_memory)} are allowed"
    )


def most_bytes(model: Network, image: Tensor | Rows) -> int:
    """More than model(image) takes beside the two, a few times more: where there is so much, nobody needs to plan."""
    height, width = (side + -side % model.multiple for side in image.shape[-2:])
    maps, _ = _walk(model.stages(), height * width, _feature_dtype(image).itemsize)
    return FIXED_BYTES + sum(m.bytes for m in maps) + _strips_alive(image) * max(m.bytes for m in maps)


def _strips_alive(image: Tensor | Rows) -> int:
    compiled = resolve("mdta", "auto", torch.empty((1, 1, 1, 1), dtype=_feature_dtype(image), device=image.device)) == "cpu"
    return STRIPS_COMPILED if compiled else STRIPS_REFERENCE


def seconds_of(model: Network, image: Tensor | Rows, plan: Plan) -> tuple[float, float]:
    """How long `run` would take here, at least and at most, from the time of small images, a hundredth of the work, and of a
    small file. Strips took up to STRIPS_COST times as long as the whole image."""
    height, width = (side + -side % model.multiple for side in image.shape[-2:])
    side = max(32, min(256, math.isqrt(height * width) // 8 // 16 * 16))
    like = torch.empty(0, dtype=image.dtype, device=image.device)
    with torch.no_grad():
        least, most = expected_seconds(
            lambda side: model(like.new_zeros((1, 3, side, side))), side, image.shape[0] * height * width, image.device
        )
    begin, block = time.perf_counter(), bytes(1 << 24)
    with tempfile.TemporaryFile() as file:
        file.write(block)
        file.seek(0)
        file.read()
    moving = image.shape[0] * plan.file_bytes * (time.perf_counter() - begin) / (2 * len(block))
    again = 1 + 2 / plan.rows  # rows at a strip's edges are made twice
    return least * again + moving, most * again * (STRIPS_COST if plan.rows < height else 1) + moving


def run(model: Network, image: Tensor, plan: Plan) -> Tensor:
    """model(image) as planned. Strips that run out of memory are made smaller, down to two rows. Without gradients."""
    result = torch.empty_like(image)
    for single, its_result in zip(image.split(1), result.split(1), strict=True):
        run_rows(model, TensorRows(single, its_result), plan)
    return result


def run_rows(model: Network, image: Rows, plan: Plan) -> None:
    """run for Rows."""
    try:
        for module in model.modules():
            reach(module, type(module))
        with torch.no_grad():
            _Run(model, image, plan).run()
    except Uncalled as error:
        raise model.named(error) from None


def _bytes(image: Tensor) -> int:
    return image.numel() * image.element_size()


class TensorRows:
    """Rows of a tensor, the result's into another one."""

    def __init__(self, image: Tensor, result: Tensor):
        self.shape, self.dtype, self.device = tuple(image.shape), image.dtype, image.device
        self.image, self.result, self.result_bytes = image, result, _bytes(image)

    def read(self, first: int, end: int) -> Tensor:
        return self.image[:, :, first:end]

    def write(self, first: int, rows: Tensor) -> None:
        self.result[:, :, first : first + rows.shape[2]] = rows


def _feature_dtype(image: Tensor | Rows) -> torch.dtype:
    device = image.device.type
    cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and image.dtype != torch.float64
    return torch.get_autocast_dtype(device) if cast else image.dtype


def _image(rows: Tensor) -> Tensor:
    """Rows [height, width, channels] as an image. Convolutions look at the batch's stride too: without the one that it has here
    they would take it for channels-first, and be slower."""
    return rows[None].permute(0, 3, 1, 2)


class _Map:
    """A feature map (1, channels, height, width): its rows as [height, width, channels], in memory or in a file."""

    def __init__(self, channels: int, height: int, width: int, place: str, like: Tensor):
        self.channels, self.height, self.width, self.place = channels, height, width, place
        self.row_shape, self.like = (width, channels), like
        self.row_bytes = width * channels * like.itemsize
        self.file = tempfile.TemporaryFile() if place == FILED else None
        if self.file is None:
            self.rows = self.like.new_empty((height, *self.row_shape))

    def read(self, first: int, end: int) -> Tensor:
        """Rows [first, end) as an image; a view of them where the map is in memory."""
        if self.file is None:
            rows = self.rows[first:end]
        else:
            rows = torch.empty((end - first, *self.row_shape), dtype=self.like.dtype)
            self.file.seek(first * self.row_bytes)
            self.file.readinto(rows.view(torch.uint8).numpy().data)
            rows = rows.to(self.like.device)
        return _image(rows)

    def write(self, first: int, image: Tensor) -> None:
        rows = image[0].permute(1, 2, 0)
        if self.file is None:
            self.rows[first : first + len(rows)] = rows
            return
        self.file.seek(first * self.row_bytes)
        try:
            self.file.write(rows.to("cpu", self.like.dtype).contiguous().view(torch.uint8).numpy().data)
        except OSError as error:
            raise UserError(f"a feature map can't be kept in {tempfile.gettempdir()} (TMPDIR): {error.strerror}") from error

    def park(self, rows: int) -> None:
        """From memory to a file."""
        whole, self.file = self.rows, tempfile.TemporaryFile()
        for y in range(0, self.height, rows):
            self.write(y, _image(whole[y : y + rows]))
        del self.rows


class _Padded:
    """The image as the first stage reads it: layers.pad_to_multiple by rows."""

    def __init__(self, image: Rows, multiple: int):
        self.image, (height, width) = image, image.shape[-2:]
        self.height, self.width = (side + -side % multiple for side in (height, width))
        self.right = self.width - width
        self.reflects = self.height < 2 * height and self.width < 2 * width

    def read(self, first: int, end: int) -> Tensor:
        last = self.image.shape[2] - 1
        places = [y if y <= last else 2 * last - y if self.reflects else last for y in range(first, end)]
        rows = self.image.read(min(places), max(places) + 1)
        if places[-1] != end - 1:
            rows = rows[:, :, [y - min(places) for y in places]]
        if self.right:
            rows = F.pad(rows, (0, self.right, 0, 0), mode="reflect" if self.reflects else "replicate")
        return _image(rows[0].permute(1, 2, 0).contiguous())


class _Run:
    """One image's way through the network."""

    def __init__(self, model: Network, image: Rows, plan: Plan):
        self.model, self.image, self.plan, self.rows = model, image, plan, plan.rows
        self.dtype = _feature_dtype(image)

    def run(self) -> None:
        places, waiting = iter(self.plan.places), []
        like = torch.empty(0, dtype=self.dtype, device=self.image.device)

        def new(channels: int, height: int, width: int, place: str = "") -> _Map:
            return _Map(channels, height, width, place or next(places), like)

        embed, *stages = self.model.stages()
        assert isinstance(embed, Embed)
        padded = _Padded(self.image, self.model.multiple)
        x = new(embed.channels, padded.height, padded.width)
        self.convolve(padded, x, embed.layers)
        for stage in stages:
            if isinstance(stage, Blocks):
                for half in stage.halves:
                    self.half(x, half)
            elif isinstance(stage, Down):
                target = new(stage.channels, x.height // 2, x.width // 2)
                self.convolve(x, target, stage.layers)
                if x.place == PARKED:
                    x.park(self.rows)
                waiting.append(x)
                x = target
                del target
            elif isinstance(stage, Up):
                skip = waiting.pop()
                if skip.channels != stage.channels:
                    target = new(stage.channels, skip.height, skip.width)
                elif skip.place == PARKED:
                    target = new(skip.channels, skip.height, skip.width, MEMORY)
                else:
                    target = skip
                self.merge(x, skip, target, stage)
                x = target
                del skip, target
            elif isinstance(stage, Output):
                self.output(x, stage.layers)

    def half(self, x: _Map, half: Half) -> None:
        module, beside, kind = half
        layer = partial(reach(module, kind), **beside)
        if _sums(half):
            summing = cast(Summing, module)

            def of_strip(rows: Tensor, own: slice, y: int) -> tuple[Tensor, ...]:
                return summing.statistics(rows, first=own.start, end=own.stop, **beside)

            layer = partial(summing.attend, statistics=_add(self.strips(x, of_strip)), **beside)
        self.write(x, self.strips(x, lambda rows, own, y: layer(rows)[:, :, own]), 1)

    def convolve(self, source: _Map | _Padded, target: _Map, layers: Sequence[nn.Module]) -> None:
        self.write(target, self.strips(source, partial(_layers, layers)), target.height / source.height)

    def merge(self, low: _Map, skip: _Map, target: _Map, stage: Up) -> None:
        """target may be skip."""

        def step(rows: Tensor, own: slice, y: int) -> Tensor:
            out = _layers(stage.layers, rows, own)
            return stage.join(out, skip.read(2 * y, 2 * y + out.shape[2]))

        self.write(target, self.strips(low, step, scale=4), 2)

    def output(self, x: _Map, layers: Sequence[nn.Module]) -> None:
        height, width = self.image.shape[-2:]
        for y, out in self.strips(x, partial(_layers, layers)):
            end = min(y + out.shape[2], height)
            if y < end:  # not in the padding below
                self.image.write(y, out[:, :, : end - y, :width] + self.image.read(y, end))

    def write(self, target: _Map, strips: Iterator[tuple[int, Tensor]], scale: float) -> None:
        """Each strip only when the next one is made, which may read this one's rows as they were."""
        first, late = next(strips)
        for y, out in strips:
            target.write(int(first * scale), late)
            first, late = y, out
        target.write(int(first * scale), late)

    def strips(
        self, source: _Map | _Padded, step: Callable[[Tensor, slice, int], Any], scale: int = 1
    ) -> Iterator[tuple[int, Any]]:
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
                planned = self.plan.peak_bytes - FIXED_BYTES
                if self.image.device.type == "cpu" and resident_bytes(self.image.device) > planned:
                    give_back()  # malloc keeps pieces between those in use, too small for the next strip
                continue
            # Only here is the error gone, whose traceback kept the tensors of the failed step.
            self.rows = self.rows // 4 * 2
            log.info("out of memory: going on with strips of %d rows", self.rows)
            if self.image.device.type == "cuda":
                torch.cuda.empty_cache()


def _layers(layers: Sequence[Callable[[Tensor], Tensor]], x: Tensor, own: slice, y: int = 0) -> Tensor:
    """The layers' result for the rows `own` of x, which has a row more above and below for the first of them."""
    first, *others = layers
    if isinstance(first, Conv2d) and (first.kernel_size, first.padding) == (first.stride, (0, 0)):  # of separate patches
        x = reach(first, Conv2d, dilation=(1, 1))(x[:, :, own])
    else:
        x = reach(first, Conv2d, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), padding_mode="zeros")(x)
        x = x[:, :, own]
    for layer in others:
        x = layer(x)
    return x


def _add(strips: Iterator[tuple[int, tuple[Tensor, ...]]]) -> tuple[Tensor, ...]:
    _, total = next(strips)
    for _, sums in strips:
        total = tuple(map(torch.add, total, sums))
    return total
