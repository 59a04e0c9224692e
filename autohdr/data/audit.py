"""Near-duplicates: photos of one list, or of several, that show the same picture, re-encoded, mirrored, cropped or toned anew.

A 64-bit perceptual hash finds the candidates; a mirror only changes the signs of its odd frequencies, so that it finds mirrored
pictures too. Local features decide: patches of the one, found in the other by normalised correlation, must agree on one scale and
shift. Both work on 96 x 96 grey pixels, so that no library of key points is needed and two photos are compared in milliseconds.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from autohdr.data.images import read_samples, to_float
from autohdr.data.pairs import THREADS, Pair, check_pairs, pictures, read_pairs
from autohdr.data.splits import linked_groups

HASH_BITS = 64
HASH_DISTANCE = 20
"""Photos are candidates where at most so many of the 64 bits differ. A crop of 6% changes 11 bits most often and 24 at most; of a
hundred photos of other rooms, one or two are as near."""
WANTED_SHARE = 0.5
"""The share of each photo's patches that must agree: in the same picture 50 to 100% do, in other rooms up to 33%."""

_SIDE, _CELL = 96, 3  # pixels of a thumbnail, and those of them that make one sample of the hash
_PATCH, _PATCHES, _FEWEST = 15, 40, 8
_FLAT = 1e-6  # a patch with a weaker gradient along some direction looks the same when it moves that way
_APART, _SCALE, _TOLERANCE = 24, 1.25, 1.5
_TURNS = {"": (1, 1), "mirrored": (1, -1), "upside down and mirrored": (-1, 1), "upside down": (-1, -1)}


@dataclass(frozen=True)
class Match:
    """Two photos of one picture: how the second is turned against the first, and what says that they match."""

    first: Path
    second: Path
    turn: str
    distance: int
    share: float

    def __str__(self) -> str:
        turned = f"{self.turn}, " if self.turn else ""
        return f"{self.first} ~ {self.second} ({turned}{self.share:.0%} of the patches agree, {self.distance} bits differ)"


@dataclass(frozen=True)
class Audit:
    """The pairs of all lists, the groups of two and more that share a picture, and why they do."""

    pairs: list[Pair]
    groups: list[list[Pair]]
    matches: list[Match]
    same: dict[Path, Path]

    @property
    def crossing(self) -> list[list[Pair]]:
        """The groups that are in more than one list."""
        return [group for group in self.groups if _crosses(group)]

    def __str__(self) -> str:
        """Each group: its pairs by file and line, the near-duplicates among them, and whether lists share it."""
        lines = []
        for group in self.groups:
            across = "in MORE THAN ONE LIST, " * _crosses(group)
            lines.append(f"{across}{len(group)} pairs that share a picture:")
            lines += [f"  {pair.where}: {pair.src}, {pair.tar}" for pair in group]
            lines += [f"    {match}" for match in self._within(group)]
        groups = f"{len(self.groups)} group{'s' * (len(self.groups) != 1)}"
        lines.append(f"{len(self.pairs)} pairs, {groups}, {len(self.crossing)} in more than one list")
        return "\n".join(lines)

    def json(self) -> str:
        """The groups as JSON: of each pair its file, line, src and tar, of each match what Match holds."""
        groups = []
        for group in self.groups:
            pairs = [{"file": str(p.file), "line": p.line, "src": str(p.src), "tar": str(p.tar)} for p in group]
            matches = [vars(match) | {"first": str(match.first), "second": str(match.second)} for match in self._within(group)]
            groups.append({"crossing": _crosses(group), "pairs": pairs, "matches": matches})
        return json.dumps({"pairs": len(self.pairs), "groups": groups}, indent=2, ensure_ascii=False) + "\n"

    def _within(self, group: Sequence[Pair]) -> list[Match]:
        photos = {photo for pair in group for photo in pictures(pair)}
        return [match for match in self.matches if match.first in photos]


def _crosses(group: Sequence[Pair]) -> bool:
    return len({pair.file for pair in group}) > 1


def near_duplicates(pairs: Sequence[Pair]) -> list[Match]:
    """Every two photos, sources or targets, of different pairs that show the same picture; a file in two pairs is one photo.

    UserError for a photo that can't be read. Time grows as the square of the photos, some 3 ms for one in fifty of their
    pairs; memory is 40 kB a photo.
    """
    owners: dict[Path, set[int]] = {}
    for index, pair in enumerate(pairs):
        for photo in pictures(pair):
            owners.setdefault(photo, set()).add(index)
    photos = list(owners)
    with ThreadPoolExecutor(THREADS) as pool:  # decoders release the GIL
        thumbnails = list(pool.map(thumbnail, photos))
    features = lru_cache(maxsize=64)(lambda index: _Features(thumbnails[index]))
    matches = []
    for first, second, turn, distance in _candidates([perceptual_hash(picture) for picture in thumbnails]):
        if owners[photos[first]].isdisjoint(owners[photos[second]]):
            down, right = _TURNS[turn]
            share = features(first).share_in(thumbnails[second][::down, ::right])
            if share >= WANTED_SHARE:  # both ways: of a dark room only the window's corners show, and other rooms have those too
                share = min(share, features(second).share_in(thumbnails[first][::down, ::right]))
            if share >= WANTED_SHARE:
                matches.append(Match(photos[first], photos[second], turn, distance, share))
    return matches


def same_picture(matches: Iterable[Match]) -> dict[Path, Path]:
    """Each photo that matches others -> one that stands for them all, for splits.linked_groups and shared_photos."""
    same: dict[Path, Path] = {}
    for match in matches:
        old, new = (same.get(photo, photo) for photo in (match.first, match.second))
        same |= {photo: new for photo, stands in same.items() if stands == old} | {match.first: new, match.second: new}
    return same


def audit(lists: Sequence[Path]) -> Audit:
    """Reads lists of pairs and groups the pairs that share a picture. UserError for a bad list or photo."""
    pairs = [pair for file in lists for pair in read_pairs(file)]
    check_pairs(pairs)
    matches = near_duplicates(pairs)
    same = same_picture(matches)
    groups = [[pairs[index] for index in group] for group in linked_groups(pairs, same) if len(group) > 1]
    return Audit(pairs, groups, matches, same)


def thumbnail(path: str | Path) -> np.ndarray:
    """A photo as (96, 96) float32 grey in [0, 1], squashed. UserError as read_photo."""
    grey = to_float(read_samples(path, at_least=_SIDE)) @ np.array([0.299, 0.587, 0.114], np.float32)
    return np.asarray(Image.fromarray(grey).resize((_SIDE, _SIDE), Image.Resampling.BILINEAR))


def perceptual_hash(picture: np.ndarray) -> np.ndarray:
    """The signs, 1 or -1, of the 64 lowest frequencies of a (96, 96) thumbnail's cosine transform but for the mean: float32.

    A gain leaves them, a mirror negates those of odd order. After Zauner, "Implementation and benchmarking of perceptual
    image hash functions", 2010.
    """
    cells = np.sqrt(picture).reshape(_SIDE // _CELL, _CELL, _SIDE // _CELL, _CELL).mean((1, 3))
    frequencies = _COSINES @ cells @ _COSINES.T
    return np.where(frequencies[_ORDERS] > 0, np.float32(1), np.float32(-1))


_COSINES = np.cos(np.pi / 64 * np.outer(np.arange(11), np.arange(1, 64, 2))).astype(np.float32)
_LOWEST = np.argsort(np.add.outer(np.arange(11) ** 2, np.arange(11) ** 2), axis=None, kind="stable")[1 : HASH_BITS + 1]
_ORDERS = np.divmod(_LOWEST, 11)


def _candidates(hashes: Sequence[np.ndarray]) -> Iterator[tuple[int, int, str, int]]:
    """(first, second, turn, distance) of photos whose hashes are near, each two once, in the turn that is nearest."""
    signs = np.stack(hashes)
    turned = [signs * np.float32(down) ** _ORDERS[0] * np.float32(right) ** _ORDERS[1] for down, right in _TURNS.values()]
    for first in tqdm(range(len(signs)), desc="audit", unit="photo", leave=False, disable=None):
        distances = np.stack([(HASH_BITS - other[first + 1 :] @ signs[first]) / 2 for other in turned])
        nearest = distances.argmin(0)
        for offset in np.flatnonzero(distances.min(0) <= HASH_DISTANCE):
            turn = nearest[offset]
            yield first, first + 1 + int(offset), list(_TURNS)[turn], int(distances[turn, offset])


class _Features:
    """The patches of a thumbnail that are least like their surroundings, zero-mean and of unit norm."""

    def __init__(self, picture: np.ndarray):
        windows = np.lib.stride_tricks.sliding_window_view(picture, (_PATCH, _PATCH))[::6, ::6]
        rows, columns = np.indices(windows.shape[:2]).reshape(2, -1) * 6
        patches = windows.reshape(-1, _PATCH, _PATCH)
        patches = patches - patches.mean((1, 2), keepdims=True)
        down, right = np.gradient(patches, axis=(1, 2))
        yy, xx, xy = ((a * b).mean((1, 2)) for a, b in ((down, down), (right, right), (down, right)))
        corner = (yy + xx) / 2 - np.hypot((yy - xx) / 2, xy)  # Shi and Tomasi, "Good features to track", 1994
        best = np.argsort(-corner, kind="stable")[:_PATCHES]
        best = best[corner[best] > _FLAT]
        self.positions = np.stack([rows[best], columns[best]])
        norms = np.linalg.norm(patches[best], axis=(1, 2), keepdims=True)
        self.patches = torch.from_numpy(patches[best] / norms)[:, None]

    def share_in(self, picture: np.ndarray) -> float:
        """The share of the patches that are in another thumbnail where one scale and shift of each axis would put them."""
        count = self.positions.shape[1]
        if count < _FEWEST:
            return 0.0
        image = torch.from_numpy(picture.copy())[None, None]
        mean = F.avg_pool2d(image, _PATCH, 1)
        deviation = (F.avg_pool2d(image * image, _PATCH, 1) - mean * mean).clamp(min=_FLAT).sqrt()
        likeness = (F.conv2d(image, self.patches) / deviation)[0]  # (count, h, w)
        found = np.stack(np.divmod(likeness.flatten(1).argmax(1).numpy(), likeness.shape[2]))
        # Every two patches that are far enough apart give a scale and a shift, with which the other patches agree or not.
        i, j = np.triu_indices(count, 1)
        apart = (np.abs(self.positions[:, j] - self.positions[:, i]) >= _APART).all(0)
        i, j = i[apart], j[apart]
        scales = (found[:, j] - found[:, i]) / (self.positions[:, j] - self.positions[:, i])
        likely = ((scales > 1 / _SCALE) & (scales < _SCALE)).all(0)
        i, scales = i[likely], scales[:, likely]
        if not len(i):
            return 0.0
        expected = found[:, i, None] + scales[..., None] * (self.positions[:, None] - self.positions[:, i, None])
        agree = (np.abs(found[:, None] - expected) <= _TOLERANCE).all(0)
        return float(agree.sum(1).max()) / count
