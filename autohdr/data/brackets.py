"""Brackets: exposures of one picture, aligned, merged to linear light, and toned to one photo.

After Debevec and Malik, Recovering High Dynamic Range Radiance Maps from Photographs (SIGGRAPH 1997). Their smooth response is
here a small change of sRGB's, their weights are those of photons' noise. Light is in units of the middle exposure's white.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from autohdr.data.colour import LUMA, decode_srgb, encode_srgb
from autohdr.errors import UserError

FARTHEST = 1 / 32
"""The longest shift that is looked for, in parts of a photo's longer side."""
GAUGED, ALIGNED, COMPARED = 128, 1536, 384  # pixels of the longer side at most, for exposures, shifts and what has moved
DISAGREE = 0.3  # of the logarithm of light: a third more, or a quarter less
FLOOR = 0.01  # of the white of the darker exposure: light as uncertain as this
CLEAR, CLIPPED, MURKY = 0.85, 0.97, 0.06
"""Stored values: up to the first an exposure counts, from the second on it is clipped; below the third it counts the less."""
KNOTS = 17  # of the change of the response
NARROWED = (0.25, 0.45)
"""How much of the range of large areas is taken out, of those darker and of those brighter than most: the brightest come to lie
where unedited photos have them, at a 95th percentile of luma of 0.61."""
TOE = 1.4  # the power of the response; with it, of those tried on 24 synthetic rooms, lite came nearest to the rooms' edits
BRIGHT = 0.465  # the 75th percentile of luma that unedited photos have in the mean
_BAND = 256


def merge(samples: Sequence[np.ndarray], stops: Sequence[float] | None = None) -> np.ndarray:
    """Linear light (H, W, 3), float32, where the middle exposure has its pixels.

    samples: (H, W, 3) each, uint8 or uint16, from the darkest to the brightest. stops: the exposure of each, as a power of two.
    Without them, or where the photos contradict them, they are gauged from the photos, whose response is then taken for sRGB's.

    A pixel is the mean of what the exposures say, weighted by exposure time, which is how many photons they have counted. Those
    that are clipped there, or lie in the murk, do not count, nor those that disagree with the middle one around it, as where
    something has moved; where that is all, the middle one counts alone. UserError where exposures can't be gauged.
    """
    exposures, middle = lay(samples, stops), len(samples) // 2
    height, width = samples[0].shape[:2]
    light = np.empty((height, width, 3), np.float32)
    for first, end in _bands(height):
        total, weights = torch.zeros(end - first, width, 3), torch.full((end - first, width, 1), 1e-12)
        for exposure in exposures:
            stored, values, inside = exposure.part(first, end)
            top = stored.amax(2, keepdim=True)
            bright, dark = ((CLIPPED - top) / (CLIPPED - CLEAR)).clamp(0, 1), (top / MURKY).clamp(0, 1)
            if exposure is exposures[0]:  # what is clipped in all, or black, this one or the last comes nearest to
                bright = bright.clamp(min=1e-3)
            if exposure is exposures[-1]:
                dark = dark.clamp(min=1e-3)
            weight = exposure.time * bright * dark
            if exposure is exposures[middle]:
                weight = weight.clamp(min=1e-6)
            else:
                weight = weight * _stretch(exposure.agree, exposure.cell, first, end, width)[..., None] * inside
            total += weight * values
            weights += weight
        light[first:end] = total / weights
    return light


def tone(light: np.ndarray) -> np.ndarray:
    """Linear light (H, W, 3) as unedited photos merged of brackets have it: sRGB-encoded, float32 in [0, 1), nothing clipped.

    What the synthetic camera does, whose photos lite has learnt from: the range of large areas is narrowed, then comes a response
    with a toe and a shoulder, with the 75th percentile of luma where unedited photos have it. Areas end at edges: a guided filter
    tells them (He, Sun and Tang, Guided Image Filtering, ECCV 2010), computed at a reduced size (He and Sun, Fast Guided Filter,
    2015).
    """
    height, width = light.shape[:2]
    cell = math.ceil(max(height, width) / 512)
    small = F.avg_pool2d(torch.from_numpy(light).permute(2, 0, 1), cell, ceil_mode=True).permute(1, 2, 0)
    small = _log_luma(small)
    slope, offset = _guided(small, max(small.shape) // 6, 0.6)
    base = slope * small + offset
    middle = base.median()
    aim = decode_srgb(torch.tensor(BRIGHT)) ** (1 / TOE)
    gain = aim / (1 - aim) / (small - _narrowed(base - middle)).exp().quantile(0.75)
    toned = np.empty_like(light)
    for first, end in _bands(height):
        values = torch.from_numpy(light[first:end])
        a, b = (_stretch(each, cell, first, end, width) for each in (slope, offset))
        base = a * _log_luma(values) + b
        values = values * (gain / _narrowed(base - middle).exp())[..., None]
        toned[first:end] = encode_srgb((values / (1 + values)) ** TOE)
    return toned


def lay(samples: Sequence[np.ndarray], stops: Sequence[float] | None = None) -> "list[Exposure]":
    """Exposures as `merge` takes them, each on the middle one. UserError as `merge`."""
    known, response = settle(samples, stops)
    middle = len(samples) // 2
    times = [2.0 ** (stop - known[middle]) for stop in known]
    exposures = [Exposure(each, light_table(each.dtype, response), time) for each, time in zip(samples, times, strict=True)]
    for exposure in exposures:
        if exposure is not exposures[middle]:
            exposure.align(exposures[middle])
            exposure.compare(exposures[middle])
    return exposures


def settle(samples: Sequence[np.ndarray], stops: Sequence[float] | None = None) -> tuple[Sequence[float], np.ndarray]:
    """The exposures of `merge` as it takes them, and the response (KNOTS,): the change of the logarithm of sRGB's light.

    UserError where they are neither known nor to be gauged.
    """
    small = [_thumbnail(each) for each in samples]
    gauged = np.cumsum([0.0, *(_gauge(*pair) for pair in pairwise(small))]).tolist()
    if stops is None or not all(is_plausible(*pair) for pair in zip(np.diff(stops), np.diff(gauged), strict=True)):
        if not np.isfinite(gauged).all():
            raise UserError("expected exposures of one picture, got photos in which too little is seen by two of them")
        return gauged, np.zeros(KNOTS)
    return stops, _response(small, np.diff(stops))


def is_plausible(stops: float, gauged: float) -> bool:
    """Whether photos can be so many stops apart as a camera says: their curves make more or less of them. NaN is not gauged."""
    return not abs(gauged - stops) > 0.5 + 0.4 * abs(stops)


@dataclass
class Exposure:
    """One exposure. samples: (H, W, 3). table: the light of each stored value at the time 1. time: relative to the middle one's.

    shift: rows and columns from the middle one's pixels to this one's. agree: of cells of cell × cell pixels of the middle one,
    1 where this one shows the same, 0 elsewhere. agreement: in how much of what tells it does, 0 where next to nothing tells.
    """

    samples: np.ndarray
    table: np.ndarray
    time: float
    shift: tuple[int, int] = (0, 0)
    agree: Tensor = field(default_factory=lambda: torch.ones(1, 1))
    cell: int = 1
    agreement: float = 1.0

    def part(self, first: int, end: int, channels: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
        """Of rows of the middle one: stored values in [0, 1], light (rows, W, channels), and which are inside (rows, W, 1)."""
        height, width = self.samples.shape[:2]
        down, right = self.shift
        spans = (first + down, end + down, height), (right, width + right, width)
        rows, columns = (slice(min(max(low, 0), side), min(max(high, 0), side)) for low, high, side in spans)
        there = self.samples[rows, columns, channels]
        stored, inside = np.zeros((end - first, width, there.shape[2]), there.dtype), torch.zeros(end - first, width, 1)
        top, left = rows.start - first - down, columns.start - right
        place = slice(top, top + there.shape[0]), slice(left, left + there.shape[1])
        stored[place], inside[place] = there, 1
        white = np.float32(np.iinfo(stored.dtype).max)
        return torch.from_numpy(stored / white), torch.from_numpy(self.table[stored] / np.float32(self.time)), inside

    def cells(self, cell: int, limit: float, channels: slice = slice(None)) -> Tensor:
        """Means of light up to a limit over cells of the middle one, (channels, rows, columns)."""
        height = self.samples.shape[0] // cell * cell
        bands = (self.part(first, min(end, height), channels)[1] for first, end in _bands(height, cell))
        return torch.cat([F.avg_pool2d(band.clamp(max=limit).permute(2, 0, 1), cell) for band in bands], 1)

    def align(self, middle: "Exposure") -> None:
        """Finds the shift, by phase correlation (Kuglin and Hines, 1975) of the light that both have seen, within FARTHEST."""
        cell, limit, floor = self._terms(middle, ALIGNED)
        green = slice(1, 2)  # has the least noise
        here, there = ((each.cells(cell, limit, green)[0] + floor).log() for each in (self, middle))
        tapers = [torch.hann_window(side, periodic=False) for side in here.shape]
        spectra = [torch.fft.rfft2((each - each.mean()) * tapers[0][:, None] * tapers[1]) for each in (here, there)]
        crossed = spectra[0] * spectra[1].conj()
        down, right = torch.fft.fftfreq(here.shape[0])[:, None], torch.fft.rfftfreq(here.shape[1])
        smooth = (-((down**2 + right**2) / (2 * 0.12**2))).exp()  # what is finer is mostly noise
        peaks = torch.fft.irfft2(crossed / (crossed.abs() + 1e-9) * smooth, here.shape)
        most = max(1, int(max(self.samples.shape[:2]) * FARTHEST / cell))
        reach = [min(most, (side - 1) // 2) for side in here.shape]
        near = peaks.roll(reach, (0, 1))[: 2 * reach[0] + 1, : 2 * reach[1] + 1]
        row, column = divmod(int(near.argmax()), near.shape[1])
        found = (row - reach[0] + _vertex(near[:, column], row), column - reach[1] + _vertex(near[row], column))
        self.shift = (round(found[0] * cell), round(found[1] * cell))

    def compare(self, middle: "Exposure") -> None:
        """Finds where it agrees with the middle one."""
        self.cell, limit, floor = self._terms(middle, COMPARED)
        here, there = (each.cells(self.cell, limit) for each in (self, middle))
        apart = (((here + floor) / (there + floor)).log().abs() > DISAGREE).any(0)
        low, high = torch.minimum(here, there).amin(0), torch.maximum(here, there).amax(0)
        telling = (high > 4 * floor) & (low > 0) & (low < 0.9 * limit)
        self.agree = 1 - F.max_pool2d(apart.float()[None], 3, 1, 1)[0]
        self.agreement = 1 - apart[telling].float().mean().item() if telling.float().mean() > 0.02 else 0.0

    def _terms(self, middle: "Exposure", side: int) -> tuple[int, float, float]:
        """Size of a cell, the white of the brighter of the two, and what light is too little to tell in the darker."""
        times = self.time, middle.time
        height, width = self.samples.shape[:2]
        cell = min(math.ceil(max(height, width) / side), height, width)
        return cell, float(self.table[-1]) / max(times), FLOOR * float(self.table[-1]) / min(times)


def _thumbnail(samples: np.ndarray) -> Tensor:
    """Means of stored values in [0, 1] over cells (rows, columns, 3), NaN where a cell has edges or lies near black or white."""
    cell = min(math.ceil(max(samples.shape[:2]) / GAUGED), *samples.shape[:2])
    step = max(1, cell // 8)
    values = torch.from_numpy(samples[::step, ::step] / np.float32(np.iinfo(samples.dtype).max)).permute(2, 0, 1)
    mean, square = (F.avg_pool2d(each, cell // step) for each in (values, values**2))
    flat = (square - mean**2 < 0.04**2) & (mean > 0.03) & (mean < 0.93)
    return torch.where(flat, mean, torch.nan)


def _gauge(darker: Tensor, brighter: Tensor) -> float:
    """Stops between two thumbnails; NaN where too little can be seen in both."""
    apart = (decode_srgb(brighter) / decode_srgb(darker)).log2()
    return apart.nanmedian().item() if apart.isfinite().float().mean() > 0.01 else math.nan


def _response(small: Sequence[Tensor], steps: np.ndarray) -> np.ndarray:
    """The change (KNOTS,), at even steps of stored values, of the logarithm of sRGB's light, by which the light of thumbnails is
    `steps` stops apart: least squares, smooth and small, without what then is farther off than DISAGREE."""
    rows, aims = [], []
    for darker, brighter, step in zip(small, small[1:], steps, strict=False):
        seen = (darker.isfinite() & brighter.isfinite()).flatten()
        a, b = (each.flatten()[seen].double() for each in (darker, brighter))
        rows.append(_hats(b) - _hats(a))
        aims.append(step * math.log(2) - (decode_srgb(b) / decode_srgb(a)).log())
    matrix, aim = torch.cat(rows), torch.cat(aims)
    knots = math.sqrt(max(1, len(matrix))) * torch.eye(KNOTS, dtype=torch.float64)
    prior = torch.cat([0.3 * knots.diff(n=2, dim=0), 0.02 * knots])
    change = torch.zeros(KNOTS, dtype=torch.float64)
    for _ in range(2):
        used = (matrix @ change - aim).abs() < (DISAGREE if change.any() else math.inf)
        system = torch.cat([matrix[used], prior])
        change = torch.linalg.lstsq(system, torch.cat([aim[used], aim.new_zeros(len(prior))])[:, None]).solution[:, 0]
    return change.numpy()


def _hats(values: Tensor) -> Tensor:
    """Weights of the knots at values in [0, 1], (N, KNOTS): linear between them."""
    return (1 - (values[:, None] * (KNOTS - 1) - torch.arange(KNOTS)).abs()).clamp(min=0)


def light_table(dtype: np.dtype, response: np.ndarray) -> np.ndarray:
    """The light of each stored value, rising, 1 for white as sRGB has it."""
    stored = np.linspace(0, 1, np.iinfo(dtype).max + 1)
    light = decode_srgb(stored) * np.exp(np.interp(stored, np.linspace(0, 1, KNOTS), response))
    return np.maximum.accumulate(light).astype(np.float32)


def _vertex(line: Tensor, peak: int) -> float:
    """How far from its highest point, which is at `peak`, a parabola through it and its neighbours has its own."""
    if not 0 < peak < len(line) - 1:
        return 0.0
    before, top, after = line[peak - 1 : peak + 2].tolist()
    return (before - after) / (2 * (before - 2 * top + after)) if before + after < 2 * top else 0.0


def _narrowed(base: Tensor) -> Tensor:
    """What is taken from the logarithm of light where large areas lie so far from the middle."""
    return base.clamp(max=0) * NARROWED[0] + base.clamp(min=0) * NARROWED[1]


def _guided(log: Tensor, radius: int, least: float) -> tuple[Tensor, Tensor]:
    """A guided filter of (H, W) by itself: slope and offset of each point. What varies by less than least ** 0.5 is smoothed."""

    def mean(x: Tensor) -> Tensor:
        x = F.avg_pool2d(x[None], (2 * radius + 1, 1), 1, (radius, 0), count_include_pad=False)
        return F.avg_pool2d(x, (1, 2 * radius + 1), 1, (0, radius), count_include_pad=False)[0]

    centre = mean(log)
    variance = (mean(log * log) - centre * centre).clamp(min=0)
    slope = variance / (variance + least)
    return mean(slope), mean(centre * (1 - slope))


def _stretch(cells: Tensor, cell: int, first: int, end: int, width: int) -> Tensor:
    """Rows of a picture of so many columns, linear between the centres of cells of cell × cell pixels."""
    for axis, (low, high) in enumerate(((first, end), (0, width))):
        count = cells.shape[axis]
        place = ((torch.arange(low, high) + 0.5) / cell - 0.5).clamp(0, count - 1)
        before = place.long().clamp(max=max(count - 2, 0))
        after = (before + 1).clamp(max=count - 1)
        part = (place - before)[:, None] if axis == 0 else place - before
        cells = torch.lerp(cells.index_select(axis, before), cells.index_select(axis, after), part)
    return cells


def _log_luma(light: Tensor) -> Tensor:
    return (light @ light.new_tensor(LUMA)).clamp(min=1e-5).log()


def _bands(height: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """First row and end of bands of rows, so that no copies of a large photo are made."""
    step = max(_BAND // multiple, 1) * multiple
    return ((first, min(first + step, height)) for first in range(0, height, step))
