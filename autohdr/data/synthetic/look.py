"""What real pairs look like in numbers, and how a picture is brought to such numbers."""

from dataclasses import dataclass, replace

import numpy as np

from autohdr.data.synthetic.pixels import curve, from_lab, heights, luma, to_lab
from autohdr.data.synthetic.textures import Array, Rng

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)


@dataclass(frozen=True)
class Look:
    """Mean and standard deviation over photos of what one of a pair looks like.

    luma, luma_sd: percentiles 1, 5, 25, 50, 75, 95, 99 of the encoded luma, [0, 1].
    together: correlation of each percentile with the exposure that they have in common.
    walls, walls_sd: a* and b* of the walls (`walls_of`).
    tilt, tilt_sd: how much lighter what is high up was made, and darker what is low down: a luma c by tilt · height · c (1 - c).
    pinned, walls_pinned: how far a picture is brought from where it lies by itself (0) to what was drawn (1).
    """

    luma: tuple[float, ...]
    luma_sd: tuple[float, ...]
    together: tuple[float, ...]
    walls: tuple[float, float]
    walls_sd: tuple[float, float]
    pinned: tuple[float, ...]
    walls_pinned: float
    tilt: float = 0.0
    tilt_sd: float = 0.0


# Summary statistics of ten real pairs of estate photos, unedited and edited, at 256 pixels on the long side. How far each is
# pinned is chosen so that the spread over rooms, which have one of their own, is the spread over the ten.
# fmt: off
SOURCE = Look(luma=(.075, .142, .269, .380, .465, .610, .763), luma_sd=(.056, .090, .127, .080, .071, .069, .080),
              together=(.75, .9, .93, .97, .9, .85, .55), walls=(1.8, 11.2), walls_sd=(3.4, 6.1),
              pinned=(.85, .85, .8, .9, 1, 1, 1), walls_pinned=.95)
TARGET = Look(luma=(.162, .267, .473, .640, .746, .831, .892), luma_sd=(.108, .125, .130, .080, .036, .039, .039),
              together=(.8, .85, .85, .75, .65, .65, .65), walls=(0, 4.4), walls_sd=(.7, 3.5),
              pinned=(.7, .7, .7, .8, 1, 1, 1), walls_pinned=.6, tilt=.26, tilt_sd=.15)
# Of exteriors there were no pairs to measure: rooms' spread, in light that is even already, and no walls whose colour is known.
SOURCE_OUTDOORS = replace(SOURCE, luma=(.08, .14, .27, .39, .51, .68, .77), walls_pinned=0, pinned=(.6, .6, .6, .7, .9, .9, .9))
TARGET_OUTDOORS = replace(TARGET, luma=(.12, .2, .39, .56, .7, .83, .9), walls_pinned=0, pinned=(.6, .6, .6, .7, .9, .9, .9),
                          tilt=0, tilt_sd=0)
# fmt: on


# What `tones_of_light` and `tones_of_edit` are measured by: mean and standard deviation over 60 rooms, over 60 exteriors, and
# over the ten edits.
_ROOMS, _ROOMS_SD = np.array([-1.0, -0.44, 0.92]), np.array([0.36, 0.18, 0.42])
_EXTERIORS, _EXTERIORS_SD = np.array([-1.58, -0.8, 0.21]), np.array([0.39, 0.51, 0.18])
_EDITS, _EDITS_SD = np.array([-0.273, -0.106, 0.085]), np.array([0.11, 0.06, 0.03])


def tones_of_light(light: Array, exterior: bool = False) -> Array:
    """How much lighter shadows, middle and highlights of linear (H, W, 3) are beside its bright walls, or its sky, than in most
    rooms, or exteriors, in standard deviations (3,)."""
    usual, spread = (_EXTERIORS, _EXTERIORS_SD) if exterior else (_ROOMS, _ROOMS_SD)
    low, middle, bright, high = np.log(np.percentile(luma(light), (25, 50, 75, 95)) + 1e-4)
    return np.clip((np.array([low, middle, high]) - bright - usual) / spread, -2.5, 2.5)


def tones_of_edit(picture: Array) -> Array:
    """The same (3,) of a finished photo, encoded (H, W, 3), among finished photos."""
    low, middle, bright, high = np.percentile(luma(picture), (25, 50, 75, 95))
    return np.clip((np.array([low, middle, high]) - bright - _EDITS) / _EDITS_SD, -2.5, 2.5)


def draw_luma(rng: Rng, look: Look, tones: Array) -> Array:
    """Percentiles (7,) for a photo of a scene of such tones: what moves all of them together, and what shadows, middle and
    highlights have each of their own, both more the scene's than the draw's: so that source and target agree on it."""
    together = np.array(look.together)
    own = np.repeat(0.8 * tones + 0.6 * rng.standard_normal(3), (3, 2, 2))
    exposure = 0.7 * (tones[0] + tones[1]) / 1.84 + 0.71 * rng.standard_normal()  # a light room is exposed to look light
    drawn = np.array(look.luma) + look.luma_sd * (together * exposure + np.sqrt(1 - together**2) * own)
    return _rising(drawn)


def pin(picture: Array, look: Look, levels: Array, walls: Array) -> Array:
    """Bring encoded (H, W, 3) towards luma percentiles `levels` (7,) by one curve, and its walls to a*, b* `walls` by gains.

    How far is the look's to say. Colours keep their ratios under the curve, so that its luma is exact.
    """
    every = max(1, min(picture.shape[:2]) // 96)
    small = picture[::every, ::every]
    gains, knots, values, goal = np.ones(3, np.float32), np.array([0.0, 1]), np.array([0.0, 1]), None
    for _ in range(3):  # the gains change the luma and the curve the walls, less and less
        toned = _tone(small * gains, knots, values)
        wall = toned[walls_of(toned)]
        if len(wall):
            colour = np.median(wall, 0)
            lab = to_lab(colour)
            if goal is None:
                goal = lab[1:] + (walls - lab[1:]) * look.walls_pinned
            gains = gains * np.clip(from_lab(np.array([lab[0], *goal])) / np.maximum(colour, 0.02), 0.5, 2).astype(np.float32)
        own = _rising(np.percentile(luma(small * gains), PERCENTILES))
        top = max(float(luma(small * gains).max()), own[-1] + 0.01)
        goals = _rising(own + (levels - own) * look.pinned)
        knots, values = np.array([0, *own, top]), np.array([0, *goals, max(min(top, 0.98), goals[-1] + 0.02)])
    return _tone(picture * gains, knots, values)


def walls_of(picture: Array) -> Array:
    """Where (H, W) encoded (H, W, 3) shows walls, mostly: its 60th to 92nd percentile of luma, without strong colour."""
    y = luma(picture)
    low, high = np.percentile(y, (60, 92))
    lab = to_lab(picture)
    return (y > low) & (y < high) & (np.hypot(lab[..., 1], lab[..., 2]) < 25)


def statistics(source: Array, target: Array) -> dict[str, float]:
    """What pairs are compared by, of encoded (H, W, 3) in [0, 1], best at 256 pixels on the long side.

    Of source and target: percentiles of luma; local_contrast (its mean standard deviation in blocks of 8 x 8); light (its
    standard deviation over 8 x 8 fields); a, b, chroma, their mean; a_sd, b_sd, chroma_95; walls_a, walls_b; clipped, the share
    of white pixels. Of both: tone_20 and so on, the target's median luma where the source's is .2; tilt, by least squares
    (`Look.tilt`), from the source with as much of each luma as the target has; psnr in dB.
    """
    found = {}
    for name, x in (("source", source), ("target", target)):
        y, lab, wall = luma(x), to_lab(x), walls_of(x)
        chroma = np.hypot(lab[..., 1], lab[..., 2])
        found |= {f"{name}_luma_{q}": np.percentile(y, q) for q in PERCENTILES}
        h, w = y.shape
        blocks = y[: h // 8 * 8, : w // 8 * 8].reshape(h // 8, 8, w // 8, 8)
        fields = [part.mean() for band in np.array_split(y, 8, 0) for part in np.array_split(band, 8, 1)]
        values = {"local_contrast": blocks.std((1, 3)).mean(), "light": np.std(fields), "clipped": (x.min(-1) > 0.99).mean()}
        values |= {
            "a": lab[..., 1].mean(),
            "b": lab[..., 2].mean(),
            "chroma": chroma.mean(),
            "chroma_95": np.percentile(chroma, 95),
        }
        values |= {"a_sd": lab[..., 1].std(), "b_sd": lab[..., 2].std()}
        values |= {"walls_a": np.median(lab[wall][:, 1]), "walls_b": np.median(lab[wall][:, 2])} if wall.any() else {}
        found |= {f"{name}_{key}": value for key, value in values.items()}
    before, after = luma(source), luma(target)
    for tone in (10, 20, 30, 40, 50, 60):
        near = np.abs(before - tone / 100) < 0.02
        if near.sum() > 20:
            found[f"tone_{tone}"] = np.median(after[near])
    untilted = np.empty(after.size)
    untilted[np.argsort(before, None, kind="stable")] = np.sort(after, None)
    untilted = untilted.reshape(after.shape)
    once = heights(len(after)) * untilted * (1 - untilted)
    found["tilt"] = (once * (after - untilted)).sum() / ((once**2).sum() + 1e-10)
    found["psnr"] = -10 * np.log10(np.mean((source - target) ** 2) + 1e-10)
    return {key: float(value) for key, value in found.items()}


def _tone(picture: Array, knots: Array, values: Array) -> Array:
    y = np.maximum(luma(picture), 1e-4)
    return np.clip(picture * (curve(y, knots, values) / y)[..., None], 0, 1)


def _rising(levels: Array) -> Array:
    """Levels within (0, 1), each at least .008 above the one before."""
    gap = 0.008 * np.arange(len(levels))
    return np.clip(np.maximum.accumulate(levels - gap), 0.005, 0.995 - gap[-1]) + gap
