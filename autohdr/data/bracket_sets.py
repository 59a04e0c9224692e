"""Which photos are exposures of one picture: told by their EXIF and by what they show; and such a set read as one photo."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags

from autohdr.data.images import Photo, from_float, photo_layout, read_exif, read_photo, read_samples
from autohdr.errors import UserError

COUNTS = (9, 7, 5, 3)
"""How many exposures a set may have, in the order in which they are tried."""
PAUSE = 4.0  # seconds between two exposures at most, and twice the longer one: a camera may take a dark frame after it
LEAST_STEP, UNEVEN = 0.6, 0.4  # stops between exposures, and by how much steps may differ
ALIKE = 0.8  # in so much of what tells two exposures must agree
_SHOWN = 512  # pixels of the longer side at most, of what is compared

_BASE = ExifTags.Base


@dataclass(frozen=True)
class Shot:
    """A photo as its EXIF has it, None where that does not say.

    camera: what photos of one camera and size have in common. time: of its clock, in seconds. exposure: seconds. light, bias: the
    exposure as a power of two, by its time, aperture and ISO, and by the compensation that was set.
    """

    path: Path
    camera: tuple[Any, ...] = ()
    time: float | None = None
    exposure: float | None = None
    light: float | None = None
    bias: float | None = None

    @classmethod
    def of(cls, path: Path) -> "Shot":
        try:
            exif, size = read_exif(path), photo_layout(path)
        except UserError:  # it will fail
            return cls(path)
        details = exif.get_ifd(ExifTags.IFD.Exif)
        tags = _BASE.ExposureTime, _BASE.FNumber, _BASE.ISOSpeedRatings, _BASE.ExposureBiasValue
        *positive, bias = (_number(details.get(tag)) for tag in tags)
        exposure, aperture, iso = (value if value and value > 0 else None for value in positive)
        light = math.log2(exposure) - 2 * math.log2(aperture or 1) + math.log2(iso or 100) if exposure else None
        made = exif.get(_BASE.Make, ""), exif.get(_BASE.Model, ""), details.get(_BASE.BodySerialNumber, "")
        return cls(path, (*map(str, made), *size), _seconds(details), exposure, light, bias)


def bracket_sets(paths: Iterable[Path], count: int | None, pool: Executor) -> tuple[list[tuple[Path, ...]], dict[Path, str]]:
    """The sets of exposures among photos, each from the darkest to the brightest; and of others, why they may be none.

    A set is of one folder, camera and size, `count` exposures or, by default, as many of COUNTS as there are, taken one right
    after the other, evenly apart by their EXIF, and showing the same. With a count also photos whose EXIF does not say may be a
    set, one after the other by their names, where they show the same at different exposures.
    """
    shots = sorted(pool.map(Shot.of, paths), key=lambda shot: (shot.path.parent, shot.camera, shot.time or 0, shot.path))
    runs: list[list[Shot]] = [[shot] for shot in shots[:1]]
    for before, shot in pairwise(shots):
        if _follows(before, shot):
            runs[-1].append(shot)
        else:
            runs.append([shot])
    sets: list[tuple[Path, ...]] = []
    words: dict[Path, str] = {}
    for found, said in pool.map(lambda run: _sets_in(run, count), runs):
        sets += found
        words |= said
    return sets, words


def read_set(paths: Sequence[str | Path], keep_damaged: bool = False) -> Photo:
    """The photo that a set of bracket_sets makes: brackets.merge, then brackets.tone.

    Its pixels are float32, in the files' colour space, whose curve is taken for a part of the camera's; all else that it says is
    the middle one's. UserError as read_photo and merge, and where the exposures
    differ in size or profile.
    """
    photos = [read_photo(path, True, keep_damaged) for path in paths]
    photo = photos[len(photos) // 2]
    for path, other in zip(paths, photos, strict=True):
        if other.pixels.shape != photo.pixels.shape or other.icc_profile != photo.icc_profile:
            raise UserError(f"{path}: expected exposures of one size and colour profile, got others than the middle one's")
    samples = [each.pixels if each.pixels.dtype.kind == "u" else from_float(each.pixels, 16) for each in photos]
    photo.notes = list(dict.fromkeys(note for each in photos for note in each.notes))
    photo.pixels = _merged(samples, paths)
    return photo


def glimpse(paths: Sequence[str | Path], at_least: int) -> np.ndarray:
    """The pixels of a photo, or of what a set makes, in sRGB, (H, W, 3) uint8, uint16 or float32: at a reduced size where so many
    pixels a side are enough, as read_samples. UserError as read_set."""
    samples = [read_samples(path, at_least) for path in paths]
    return samples[0] if len(paths) == 1 else _merged(samples, paths)


def _merged(samples: list[np.ndarray], paths: Sequence[str | Path]) -> np.ndarray:
    from autohdr.data.brackets import merge, tone

    return tone(merge(samples, _stops([Shot.of(Path(path)) for path in paths])))


def _follows(before: Shot, shot: Shot) -> bool:
    """Whether a shot may be in one run with the one before."""
    if before.path.parent != shot.path.parent or before.camera != shot.camera or not shot.camera:
        return False
    if before.time is None or shot.time is None:
        return before.time is shot.time
    return shot.time - before.time <= PAUSE + 2 * max(before.exposure or 0, shot.exposure or 0)


def _sets_in(run: list[Shot], count: int | None) -> tuple[list[tuple[Path, ...]], dict[Path, str]]:
    sets, words, at, shown = [], {}, 0, functools.lru_cache(max(COUNTS))(_shown)
    known = [shot.time is not None and (shot.light is not None or shot.bias is not None) for shot in run]
    while at < len(run):
        for number in COUNTS if count is None else (count,):
            some = run[at : at + number]
            if len(some) < number or (count is None and not all(known[at : at + number])):
                continue
            if found := _as_set(some, shown):
                sets.append(tuple(shot.path for shot in found))
                at += number
                break
        else:
            at += 1
    taken = {path for paths in sets for path in paths}
    for index, shot in enumerate(run):
        beside = [run[i] for i in (index - 1, index + 1) if 0 <= i < len(run) and run[i].path not in taken]
        if shot.path in taken:
            continue
        if not known[index]:
            words[shot.path] = "its EXIF does not say when and how it was exposed: it is taken for a single photo"
        elif any(_stops([shot, other]) for other in beside):
            what = "3, 5, 7 or 9" if count is None else count
            words[shot.path] = f"no bracket of {what} can be told for it and its neighbours: it is taken for a single photo"
    return sets, words


def _as_set(shots: list[Shot], shown: Callable[[Path], np.ndarray]) -> list[Shot] | None:
    """The shots from the darkest to the brightest, or None if they are no set. shown: see _shown."""
    from autohdr.data.brackets import lay  # with PyTorch, which single photos need not wait for

    stops = _stops(shots)
    exposed = [shot.light is not None or shot.bias is not None for shot in shots]
    try:
        if stops:
            order = np.argsort(stops)
            stops = [stops[i] for i in order]
        elif not any(exposed):
            order = np.argsort([shown(shot.path).mean() for shot in shots])
        else:
            return None
        steps = np.diff(stops) if stops else np.ones(1)
        if steps.max() - steps.min() > UNEVEN:
            return None
        shots = [shots[i] for i in order]
        exposures = lay([shown(shot.path) for shot in shots], stops)
    except UserError:
        return None
    apart = np.diff(np.log2([exposure.time for exposure in exposures]))
    right = not stops or np.allclose(apart, np.diff(stops))
    alike = all(exposure.agreement > ALIKE for exposure in exposures)
    return shots if right and alike and apart.min() > LEAST_STEP else None


def _shown(path: Path) -> np.ndarray:
    """A photo's pixels, reduced, uint16. UserError as read_photo."""
    import torch
    import torch.nn.functional as F

    samples = read_samples(path, at_least=_SHOWN // 2)
    cell = min(math.ceil(max(samples.shape[:2]) / _SHOWN), *samples.shape[:2])
    values = torch.from_numpy(samples / np.float32(np.iinfo(samples.dtype).max)).permute(2, 0, 1)
    return from_float(F.avg_pool2d(values, cell).permute(1, 2, 0).numpy(), 16)


def _stops(shots: Sequence[Shot]) -> list[float] | None:
    """The exposures, where all are known and differ: by the light that the camera let in or, where that is the same, as for
    photos that were developed brighter and darker, by the compensation."""
    for values in ([shot.light for shot in shots], [shot.bias for shot in shots]):
        stops = [value for value in values if value is not None]
        if len(stops) == len(shots) and np.diff(sorted(stops)).min() > LEAST_STEP:
            return stops
    return None


def _number(value: Any) -> float | None:
    """Of an EXIF tag; None where it is none."""
    if isinstance(value, tuple):
        value = value[0] if value else None
    try:
        number = float(value)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return number if math.isfinite(number) else None


def _seconds(details: dict[int, Any]) -> float | None:
    try:
        time = datetime.strptime(str(details.get(_BASE.DateTimeOriginal, "")).strip("\0 "), "%Y:%m:%d %H:%M:%S")
    except ValueError:
        return None
    fraction = str(details.get(_BASE.SubsecTimeOriginal, "")).strip("\0 ")
    return (time - datetime(1970, 1, 1)).total_seconds() + (float(f"0.{fraction}") if fraction.isdecimal() else 0)
