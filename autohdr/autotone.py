"""Fixed recipes, what the "auto" button of an editor does: the baselines to beat, and what the model `lite` starts from.

All but gain_and_gamma takes arrays of NumPy and tensors of PyTorch alike, in float32, and returns what it was given.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from autohdr.arrays import Array, apply_edit, constant, counted_up, library, ordered, single
from autohdr.data.colour import LUMA
from autohdr.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

SIDE = 128
"""Of the thumbnail that says what an edit is to be."""

KNOTS = 33
"""Of the curves: enough for the bends at the pins to lie where they belong."""
KNOTS_AT = [knot / (KNOTS - 1) for knot in range(KNOTS)]
UNMIXED = np.eye(3, 4).tolist()
"""The matrix that changes nothing."""

PINNED = ((0.75, 0.745), (0.95, 0.825), (0.99, 0.88))
"""Luma percentiles of a photo, and where an edit puts them: the mean over ten edits by professionals, whose own spread is 0.033,
0.037 and 0.036: of a lit room's walls an editor makes the same white."""
TOE = 0.7
"""Below the first pin luma goes by this power: shadows are lifted."""
BALANCE = 0.7
"""How much of the walls' tint is taken out; editors leave some of a warm light."""
SATURATION = 0.8
"""What is left of each pixel's distance from its luma after the curves, which make it larger: with this the result is in the mean
as saturated as the ten edits."""
FINISHED = 0.1
"""A photo whose 75th percentile is so far below the pin, or farther, gets all of the edit; one that has it there or above is
finished and gets none; between them it gets a part."""
FADE = 0.6
"""Value from which the white balance fades towards white, where there is none."""
MOST_GAIN = 1.6
"""Of a channel, in the white balance, and its inverse the least."""


def auto_tone(image: np.ndarray) -> np.ndarray:
    """White balance by the walls, one curve that pins the luma percentiles 75, 95 and 99 (PINNED), and a little less colour.

    image: (H, W, 3), sRGB-encoded: float32 in [0, 1], uint8 or uint16; the result has the same shape, dtype and range.
    Raises UserError for another shape or dtype.
    """
    _check("auto_tone", image, (np.float32, np.uint8, np.uint16))
    x = image.transpose(2, 0, 1)[None]
    recipe = pinning(thumbnail(x))
    edited = apply_edit(x, recipe.curves, recipe.matrix)[0].transpose(1, 2, 0)
    return edited.clip(0, 1) if image.dtype == np.float32 else edited


def gain_and_gamma(image: np.ndarray, *, clip: float = 0.005, gamma: float = 0.6) -> np.ndarray:
    """Exposure, then a lift of the mid-tones: min(1, image / white) ** gamma, white being the luma that `clip` exceeds.

    image: float32 (H, W, 3), sRGB-encoded in [0, 1]; the result has the same shape, dtype and range.
    clip: share of the pixels that turn white, in [0, 1): 0.5% is what auto-levels usually takes.
    gamma: exponent after the gain, above 0; below 1 brightens. A grey of 0.5 becomes 0.66.
    Raises UserError for another shape or dtype, or a parameter out of range.
    """
    _check("gain_and_gamma", image, (np.float32,))
    if not (0 <= clip < 1 and gamma > 0):
        raise UserError(f"gain_and_gamma: expected 0 <= clip < 1 and gamma > 0, got clip={clip} and gamma={gamma}")
    white = max(float(np.quantile(image @ np.array(LUMA, np.float32), 1 - clip)), 1 / 255)  # a black photo stays black
    toned = image * np.float32(1 / white)
    np.clip(toned, 0, 1, out=toned)
    return np.power(toned, np.float32(gamma), out=toned)


def _check(name: str, image: np.ndarray, dtypes: tuple[type, ...]) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.size == 0 or image.dtype not in dtypes:
        kinds = " or ".join(dtype.__name__ for dtype in dtypes)
        raise UserError(f"{name}: image must be {kinds} [H, W, 3], got {image.dtype} {list(image.shape)}")


def thumbnail(x: Array) -> Array:
    """A batch of images [B, 3, H, W] as [B, 3, SIDE, SIDE] in [0, 1], float32: means over cells of what is counted, whatever the
    aspect ratio."""
    if isinstance(x, np.ndarray):
        white = np.iinfo(x.dtype).max if x.dtype.kind == "u" else 1
        return _pooled(counted(x).astype(np.float32) / np.float32(white)).clip(0, 1)
    import torch
    import torch.nn.functional as F

    white = {torch.uint8: 255, torch.uint16: 65535}.get(x.dtype, 1)
    height, width = x.shape[2:]
    if torch.compiler.is_compiling():  # one program for all sizes
        (rows, down), (columns, across) = _cells(height, x), _cells(width, x)
        return (down @ (x.index_select(2, rows).index_select(3, columns).float() / white) @ across.mT).clamp(0, 1)
    return F.adaptive_avg_pool2d(counted(x).float() / white, SIDE).clamp(0, 1)


def _pooled(x: np.ndarray) -> np.ndarray:
    """PyTorch's adaptive_avg_pool2d to SIDE, to the same bits: pixels of a cell are added up in the same order."""
    firsts, counts = [], []
    for size in x.shape[2:]:
        cell = np.arange(SIDE + 1) * size
        firsts.append(cell[:-1] // SIDE)
        counts.append(-(-cell[1:] // SIDE) - firsts[-1])
    total = np.zeros((*x.shape[:2], SIDE, SIDE), np.float32)
    for place in np.ndindex(*(count.max() for count in counts)):
        (rows, down), (columns, across) = (
            ((first + at).clip(max=size - 1), at < count)
            for first, count, at, size in zip(firsts, counts, place, x.shape[2:], strict=True)
        )
        total += np.where(down[:, None] & across, x[:, :, rows[:, None], columns], 0)
    return total / counts[0][:, None].astype(np.float32) / counts[1].astype(np.float32)


def counted(x: Array) -> Array:
    """What a thumbnail of images [B, 3, H, W] is made of: of a large one only every n-th row and column, as many as leave four
    times as many as the thumbnail has. Of these, all count."""
    height, width = x.shape[2:]
    return x[:, :, :: max(1, height // (4 * SIDE)), :: max(1, width // (4 * SIDE))]


def _cells(size: int, like: "Tensor") -> "tuple[Tensor, Tensor]":
    """Which rows of an image (or columns) count in its thumbnail, and how much of each is in each cell: [SIDE, rows]."""
    import torch

    from autohdr.kernels.common import any_count

    step: int = torch.sym_max(1, size // (4 * SIDE))  # pyright: ignore[reportAssignmentType]  no float
    count = any_count((size + step - 1) // step)
    row, cell = torch.arange(count, device=like.device), torch.arange(SIDE, device=like.device)[:, None]
    inside = (row >= cell * count // SIDE) & (row * SIDE < (cell + 1) * count)
    return row * step, inside / inside.sum(1, keepdim=True)


def luma(x: Array) -> Array:
    """[B, 3, ...] -> [B, ...]."""
    return LUMA[0] * x[:, 0] + LUMA[1] * x[:, 1] + LUMA[2] * x[:, 2]


class Recipe(NamedTuple):
    """What pinning makes of a batch of thumbnails."""

    curves: Array
    """[B, 3, KNOTS], for apply_edit, as matrix [B, 3, 4] is."""
    matrix: Array
    walls: Array
    """walls_of: their colour."""
    up: Array
    """And where they are."""
    needed: Array
    """unfinished."""


def pinning(small: Array) -> Recipe:
    """The recipe for a batch of thumbnails."""
    xp, (walls, up) = library(small), walls_of(small)
    gains = ((luma(walls)[:, None] / walls) ** BALANCE).clip(1 / MOST_GAIN, MOST_GAIN)
    shares, values = zip(*PINNED, strict=True)
    knots = constant(KNOTS_AT, small)
    pins = quantiles(luma(_balanced(small, gains[:, :, None, None])), shares)
    apart = constant([1, 2, 3], small) / 255  # and above 0 and below white, in a photo that is flat, black or burnt out
    pins = xp.minimum(pins, 0.94 + 3 * apart) + apart
    x = _balanced(knots, gains[:, :, None])
    ends = xp.concatenate([pins, xp.ones_like(pins[:, :1])], 1)[:, :, None, None]
    heights = (*values, 1.0)
    first = ends[:, 0]
    y = heights[0] * (xp.minimum(x, first) / first) ** TOE
    for i in range(len(PINNED)):
        low, high = ends[:, i], ends[:, i + 1]
        y = y + (heights[i + 1] - heights[i]) * ((x - low) / (high - low)).clip(0, 1)
    needed = unfinished(small)
    part = needed[:, None, None]
    less = part * (1 - SATURATION)
    matrix = (1 - less) * constant(UNMIXED, small) + less * constant((*LUMA, 0), small)
    return Recipe(knots + part * (y - knots), matrix, walls, up, needed)


def _balanced(values: Array, gains: Array) -> Array:
    """Values times gains, which fade from FADE on, so that white stays white: what is burnt out has no tint to take out."""
    return values * gains ** (1 - (values - FADE).clip(min=0) / (1 - FADE))


def unfinished(small: Array) -> Array:
    """How much of an edit each photo of a batch of thumbnails needs, [B] in [0, 1]: see FINISHED."""
    share, value = PINNED[0]
    return ((value - quantiles(luma(small), [share])[:, 0]) / FINISHED).clip(0, 1)


def walls_of(small: Array) -> tuple[Array, Array]:
    """The colour of the walls, [B, 3], and where they are, [B] by height: means of the less saturated three fifths of the pixels
    that are bright, but not the brightest, which are windows and lamps."""
    xp, pixels = library(small), small.reshape(small.shape[0], 3, -1)
    y = luma(pixels)
    low, high = quantiles(y, (0.6, 0.97)).T[..., None]
    bright = (y >= low) & (y <= high)
    saturation = xp.where(bright, xp.amax(pixels, 1) - xp.amin(pixels, 1), math.inf)
    last = counted_up(y.shape[1], small) == (bright.sum(1) * 3 // 5).clip(max=y.shape[1] - 1)[:, None]
    limit = xp.where(last, ordered(saturation, 1), 0).sum(1)[:, None]
    chosen = single(saturation <= limit)
    count = chosen.sum(1)
    up = (chosen.reshape(small[:, 0].shape).sum(2) * height(small.shape[2], small)).sum(1) / count
    return (pixels * chosen[:, None]).sum(2) / count[:, None] + 1e-3, up


def height(count: int, like: Array, first: int = 0, rows: int | None = None) -> Array:
    """How high up each of `count` rows of an image is, from `first` on of `rows`, by default all: from 1 at its upper edge evenly
    to -1 at the lower one."""
    return 1 - (single(counted_up(count, like)) + (first + 0.5)) * (2 / (rows or count))


def quantiles(x: Array, shares: Sequence[float]) -> Array:
    """Of each entry of a batch [B, ...], [B, shares]."""
    return library(x).quantile(x.reshape(x.shape[0], -1), constant(shares, x), 1).T
