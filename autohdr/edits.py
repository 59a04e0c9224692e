"""What `lite` predicts: an edit, curves, a colour matrix and a tilt, from statistics of a thumbnail; and what becomes of edits.

What it predicts are changes to the fixed recipe autotone.pinning, whose result it sees beside the thumbnail: an untrained network
is that recipe. Several small networks' edits are averaged. All of it takes arrays of NumPy and tensors of PyTorch alike, in
float32: the network is models.lite.Lite, and ArrayLite its twin, for which no PyTorch is imported.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.numpy

from autohdr.arrays import Array, apply_edit, as_in_float32, constant, library
from autohdr.autotone import KNOTS, KNOTS_AT, UNMIXED, height, luma, pinning, quantiles, thumbnail
from autohdr.data.colour import LUMA

SHIPPED = Path(__file__).with_name("models") / "lite.safetensors"
"""The weights that `make model` makes."""

SHARES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
FEATURES = len(SHARES) * 4 + 3 + 3
BENDS, TINTS = 9, 4  # points at which the slope of all curves and of each curve changes
CHANGES = BENDS + 3 * TINTS + 1 + 9  # of them, of the curves' start, and of the matrix
LARGEST = 1.5  # change of a slope, as a logarithm
TILT = 0.25
"""Edit.tilt of a room: the mean over ten edits by professionals, ± 0.08 (standard error). An exterior has none."""
FARTHEST = 2.5  # standard deviations from what it was fitted to, beyond which a feature counts as no farther
SURE, LOST = 5.0, 10.0
"""Up to the first distance from what it was fitted to, a photo gets all of its edit, from the second on nothing: twice and four
times as far as the farthest of 300 photographs of 60 rooms held out. See Predictor.distances."""
SHARED, MOST_SHARED = 0.7, 0.05
"""How far what a photo's walls become goes towards its property's, as a part of the way, and in luma and in log(channel / luma)
at most."""
TRUST = 0.6  # how much of the predicted changes is made: photos are not the rooms that they were learnt from


class Edit(NamedTuple):
    """Curves and a matrix, as apply_edit takes them, and how much lighter what is high up becomes: see edited_by."""

    curves: Array
    """[B, 3, knots]."""
    matrix: Array
    """[B, 3, 4]."""
    tilt: Array
    """[B, 1, 1] in (-1, 1): ceilings become lighter by it, floors darker."""


class Inputs(NamedTuple):
    """What is seen of a batch of images: the features, for the members, and the recipe's edit, which they change."""

    curves: Array
    matrix: Array
    features: Array
    needed: Array
    """How much of an edit: autotone.unfinished."""
    walls: Array
    """autotone.walls_of, their colour."""
    up: Array
    """And where they are."""


class Prediction(NamedTuple):
    """Of a batch of images."""

    edit: Edit
    """Of which `share` is made."""
    share: Array
    """[B] in [0, 1]: 1 for a photo like those that it was fitted to, and for a finished one, which has no edit; see SURE."""
    distances: Array
    """Predictor.distances."""
    needed: Array
    """[B]: autotone.unfinished."""
    walls: Array
    """[B, 3]: autotone.walls_of, their colour."""
    up: Array
    """[B]: and where they are."""


class Predictor:
    """From images [B, 3, H, W] to edits, by members: what models.lite.Lite and ArrayLite have in common.

    centre, spread: [FEATURES], the mean of the features that it was fitted to, and their standard deviation.
    members: functions of features [B, FEATURES] to the changes of an edit [B, CHANGES].
    tilt: to how much of TILT there is, [B, 1], 1 for a room and 0 for an exterior or so.
    """

    takes_samples = True
    centre: Array
    spread: Array
    members: Sequence[Callable[[Array], Array]]
    tilt: Callable[[Array], Array]

    def predict(self, image: Array) -> Prediction:
        """The edit of each image of a batch [B, 3, H, W], in float32: TRUST of the way from the recipe to the members' mean, and
        less of both, the farther the image is from what the members were fitted to."""
        with as_in_float32(image):
            inputs = self.inputs(image)
            edit = mean([self.edit(inputs, number, TRUST) for number in range(len(self.members))])
            share = self.share(inputs)
            return Prediction(hedged(edit, share), share, self.distances(inputs), *inputs[3:])

    def distances(self, inputs: Inputs) -> Array:
        """[B, 2]: how far the features of light and of colour are from what it was fitted to: their root mean square, in standard
        deviations."""
        xp, squares = library(inputs.features), ((inputs.features - self.centre) / self.spread) ** 2
        percentiles, tint, spread = squares[:, : 2 * len(SHARES)], squares[:, 2 * len(SHARES) : -3], squares[:, -3:]
        kinds = [percentiles, spread[:, :2]], [tint, spread[:, 2:]]
        return xp.stack([xp.concatenate(kind, 1).mean(1) for kind in kinds], 1) ** 0.5

    def share(self, inputs: Inputs) -> Array:
        """See Prediction."""
        xp = library(inputs.needed)
        share = ((LOST - xp.amax(self.distances(inputs), 1)) / (LOST - SURE)).clip(0, 1)
        return xp.where(inputs.needed > 0, share, xp.ones_like(share))

    @staticmethod
    def inputs(image: Array) -> Inputs:
        small = thumbnail(image)
        curves, matrix, walls, up, needed = pinning(small)
        base = apply_edit(small, curves, matrix)
        return Inputs(curves, matrix, statistics(small, base, walls), needed, walls, up)

    def edit(self, inputs: Inputs, number: int, trust: float = 1.0) -> Edit:
        """A member's."""
        return changed(inputs, self.tilts(inputs), trust, self.changes(inputs, number))

    def tilts(self, inputs: Inputs) -> Array:
        """Edit.tilt."""
        return (TILT * inputs.needed[:, None] * self.tilt(self.seen(inputs)).clip(0, 1))[:, None]

    def changes(self, inputs: Inputs, number: int) -> Array:
        """What a member predicts, [B, CHANGES]: see changed."""
        return self.members[number](self.seen(inputs))

    def seen(self, inputs: Inputs) -> Array:
        """The features, in standard deviations, as members see them."""
        return ((inputs.features - self.centre) / self.spread).clip(-FARTHEST, FARTHEST)


@dataclass(frozen=True)
class Linear:
    weight: np.ndarray
    bias: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return x @ self.weight.T + self.bias


@dataclass(frozen=True)
class ArrayMember:
    """models.lite.Member."""

    hidden: Linear
    edit: Linear

    def __call__(self, features: np.ndarray) -> np.ndarray:
        x = self.hidden(features)
        erf = np.vectorize(math.erf, [x.dtype])
        return self.edit(x * (0.5 + 0.5 * erf(x * 0.5**0.5)))  # GELU


class ArrayLite(Predictor):
    """Of images that are NumPy's arrays, float32, uint8 or uint16.

    weights: what a Lite's state_dict has, in its order, as float32.
    """

    def __init__(self, weights: Mapping[str, np.ndarray]):
        self.weights = weights
        self.centre, self.spread, *rest = weights.values()
        layers = [Linear(*rest[i : i + 2]) for i in range(0, len(rest), 2)]
        self.members = [ArrayMember(*layers[i : i + 2]) for i in range(0, len(layers) - 1, 2)]
        self.tilt = layers[-1]


def shipped() -> ArrayLite:
    """By the weights that ship."""
    weights = {name: value.astype(np.float32) for name, value in safetensors.numpy.load_file(SHIPPED).items()}
    count = len({name.split(".")[1] for name in weights if name.startswith("members.")})
    layers = [f"members.{i}.{layer}.{part}" for i in range(count) for layer in ("hidden", "edit") for part in ("weight", "bias")]
    return ArrayLite({name: weights[name] for name in ("centre", "spread", *layers, "tilt.weight", "tilt.bias")})


def edited_by(image: Array, edit: Edit, first: int = 0, rows: int | None = None) -> Array:
    """What an edit makes of images [B, 3, H, W], or of the rows from `first` on of images that have so many rows.

    It is apply_edit with other curves in each row: tilted, by tilt · height. Black, white and order stay, and grey stays as grey
    as the curves make it.
    """
    batch, _, count, width = image.shape
    up = height(count, edit.curves, first, rows)[:, None, None]
    curves = tilted(edit.curves[:, None], edit.tilt[:, None] * up)  # [B, H, 3, knots]
    matrix = edit.matrix[:, None] + 0 * up
    lines = image.swapaxes(1, 2).reshape(batch * count, 3, 1, width)  # as many images of one row, without a copy of channels-last
    lines = apply_edit(lines, curves.reshape(batch * count, 3, -1), matrix.reshape(batch * count, 3, 4))
    return lines.reshape(batch, count, 3, width).swapaxes(1, 2)


def tilted(values: Array, part: Array) -> Array:
    """Values in [0, 1], lighter by a part of what they are from black and from white."""
    return values + part * values * (1 - values)


def untilted(values: Array, part: Array) -> Array:
    """What is tilted to values, of a part in (-1, 1)."""
    return 2 * values / (1 + part + ((1 + part) ** 2 - 4 * part * values) ** 0.5)


def changed(inputs: Inputs, tilt: Array, trust: float, changes: Array) -> Edit:
    """The recipe's edit, tilted, and `trust` of its changes: slopes of the curves times a power of e, which keeps them rising; a
    matrix that leaves grey grey."""
    curves, matrix, part = inputs.curves, inputs.matrix, trust * inputs.needed[:, None, None]
    xp = library(curves)
    ends = [BENDS, BENDS + 3 * TINTS, BENDS + 3 * TINTS + 1]
    bends, tints, lift, mixed = (changes[:, first:end] for first, end in pairwise([0, *ends, CHANGES]))
    slopes = (bends @ constant(_STRETCHED[BENDS], bends))[:, None]
    slopes = slopes + tints.reshape(-1, 3, TINTS) @ constant(_STRETCHED[TINTS], tints)
    steps = xp.diff(curves, 1, 2) * xp.exp(LARGEST * xp.tanh(slopes / LARGEST))
    start = curves[..., :1] + 0.1 * xp.tanh(lift)[:, None]
    steps = steps * (curves[..., -1:] - start) / steps.sum(2)[..., None]  # white stays as white as the recipe has it
    curves = curves + part * (xp.concatenate([start, start + steps.cumsum(2)], 2) - curves)
    mixed = 0.2 * part * mixed.reshape(-1, 3, 3)
    mixed = mixed - mixed.sum(2)[..., None] * constant(UNMIXED, mixed)[:, :3]
    return Edit(curves, xp.concatenate([matrix[..., :3] + mixed, matrix[..., 3:]], 2), tilt)


def hedged(edit: Edit, share: Array) -> Edit:
    """`share` [B] of an edit: the way from none, to the same bits where it is 1."""
    share = share[:, None, None]
    none = Edit(constant(KNOTS_AT, share), constant(UNMIXED, share), constant(0, share))
    return Edit(*((1 - share) * unedited + share * edited for unedited, edited in zip(none, edit, strict=True)))


def of_property(predictions: Sequence[Prediction]) -> Array | None:
    """The colour that the walls of a property become, [3] in sRGB, of predictions of one photo each: medians of luma and of
    channel / luma of what they become by their own edits, over the photos that get at least half of one; None unless there are
    two. In whole 255ths, in which machines' rounding does not show."""
    edited = [edited_walls(each)[1] for each in predictions if each.share * each.needed >= 0.5]
    if len(edited) < 2:
        return None
    xp = library(edited[0])
    colours = xp.concatenate(edited)
    light = luma(colours)
    look = quantiles(light[None], [0.5])[0] * quantiles((colours / light[:, None]).T, [0.5])[:, 0]
    return xp.round(look * 255) / 255


def shared(prediction: Prediction, look: Array) -> Edit:
    """The edit with which the photo's walls come SHARED of the way nearer to what those of its property become, less where that
    is beyond MOST_SHARED or less of an edit is made. Each curve is scaled below the walls, and above them so that white stays."""
    edit, part, xp = prediction.edit, SHARED * prediction.share * prediction.needed, library(look)
    with as_in_float32(look):
        toned, own = edited_walls(prediction)
        light, its = luma(own), luma(look[None])
        tint = xp.log(own / light[:, None])
        lighter = (part * (its - light)).clip(-MOST_SHARED, MOST_SHARED)
        redder = (part[:, None] * (xp.log(look / its) - tint)).clip(-MOST_SHARED, MOST_SHARED)
        wanted = (light + lighter)[:, None] * xp.exp(tint + redder) - edit.matrix[..., 3]
        mixed = xp.linalg.solve(edit.matrix[..., :3], wanted[..., None])[..., 0]
        mixed = untilted(mixed.clip(0, 1), _tilt_of_walls(prediction))
        before, after = (walls.clip(0.02, 0.98)[..., None] for walls in (toned, mixed))
        above = 1 - (1 - edit.curves) * ((1 - after) / (1 - before))
        return edit._replace(curves=xp.where(edit.curves < before, edit.curves * (after / before), above))


def edited_walls(prediction: Prediction) -> tuple[Array, Array]:
    """The colour of the walls, [B, 3], after the curves, and after the tilt where they are and the matrix as well."""
    edit, walls = prediction.edit, prediction.walls[..., None, None]
    toned = apply_edit(walls, edit.curves, constant(UNMIXED, walls) + 0 * edit.matrix)[..., 0, 0]
    edited = edit.matrix[..., :3] @ tilted(toned, _tilt_of_walls(prediction))[..., None] + edit.matrix[..., 3:]
    return toned, edited[..., 0].clip(min=0.02)


def _tilt_of_walls(prediction: Prediction) -> Array:
    """[B, 1]."""
    return prediction.edit.tilt[:, 0] * prediction.up[:, None]


def neutral(edit: Edit) -> Edit:
    """The edit that keeps a photo's own white balance: a grey of any lightness stays grey, of the luma that the edit gives it.

    All channels get one curve, the mean of the three by their parts of the luma. The matrix leaves grey grey as it is.
    """
    parts = constant(LUMA, edit.curves) @ edit.matrix[..., :3]
    return edit._replace(curves=library(parts).concatenate([parts[:, None] @ edit.curves] * 3, 1))


def mean(edits: Sequence[Edit]) -> Edit:
    """The edit whose curves, matrix and tilt are the means of the edits'."""
    return Edit(*(library(parts[0]).stack(parts).mean(0) for parts in zip(*edits, strict=True)))


def statistics(small: Array, base: Array, walls: Array) -> Array:
    """[B, FEATURES]: percentiles of luma before and after the recipe, and of how red and blue the pixels are; walls, spread."""
    xp, y, after = library(small), luma(small), luma(base)
    light = [quantiles(plane, SHARES) - 0.5 for plane in (y, after)]
    colour = [4 * quantiles(plane, SHARES) for plane in (base[:, 0] - after, base[:, 2] - after)]
    tint = 4 * xp.log(walls / luma(walls)[:, None])
    saturation = (xp.amax(base, 1) - xp.amin(base, 1)).mean((1, 2))
    spread = 4 * xp.stack([_deviation(y), _deviation(after), saturation], 1)
    return xp.concatenate([*light, *colour, tint, spread], 1)


def _deviation(planes: Array) -> Array:
    """The standard deviation of each plane of [B, H, W]."""
    squares = (planes - planes.mean((1, 2))[:, None, None]) ** 2
    return (squares.sum((1, 2)) / (planes.shape[1] * planes.shape[2] - 1)) ** 0.5


def _stretched(count: int) -> list[list[float]]:
    """[count, KNOTS - 1]: by this matrix `count` values become as many as a curve has steps, linear between them."""
    places = np.linspace(0, count - 1, KNOTS - 1)
    return (1 - np.abs(places - np.arange(count)[:, None])).clip(0).tolist()


_STRETCHED = {count: _stretched(count) for count in (BENDS, TINTS)}
