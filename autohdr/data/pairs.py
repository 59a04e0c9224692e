"""Pairs of an unedited and an edited photo: the JSONL file that lists them, their check and the dataset."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TypedDict

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from autohdr.data.augment import LIGHT, MIX, NONE, SCALE, TURN, Augmentation
from autohdr.data.cache import DecodedCache
from autohdr.data.images import check_photo, photo_layout, read_samples, to_float
from autohdr.errors import UserError
from autohdr.files import sha256, write_text

_SOURCE_KEYS, _TARGET_KEYS = ("src", "source", "input"), ("tar", "target")
THREADS = min(8, os.cpu_count() or 1)
ALL_DIFFERENT: Mapping[Path, Path] = MappingProxyType({})
"""What audit.same_picture returns where no two photos show the same picture."""
RESIZE_MODES = ("squash", "fit", "crop")


@dataclass(frozen=True)
class Pair:
    """One line of a pairs file: the unedited photo, the edited one, and where they were listed (for messages)."""

    src: Path
    tar: Path
    line: int = 0
    file: Path | None = None

    @property
    def where(self) -> str:
        """What a message calls this pair: file:line."""
        return f"{self.file or 'pair'}:{self.line}"


def read_pairs(path: str | Path) -> list[Pair]:
    """Reads a JSONL file of {"src", "tar"} (also source or input, and target), with paths relative to the file.

    Blank lines are skipped. No photo is opened: check_pairs does that. UserError names every malformed line.
    """
    path = Path(path)
    try:
        lines = path.read_text("utf-8-sig").split("\n")  # splitlines would split at U+2028 too, inside a name
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected a UTF-8 JSONL file of pairs: {error}") from error
    pairs, problems = [], []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                src, tar = _parse(line)
                pairs.append(Pair(path.parent / src, path.parent / tar, number, path))
            except ValueError as error:
                problems.append(f"{path}:{number}: {error}")
    _raise(problems)
    if not pairs:
        raise UserError(f"{path}: expected at least one pair, got none")
    return pairs


def write_pairs(path: str | Path, pairs: Sequence[Pair]) -> None:
    """Writes pairs as JSONL with paths relative to the file."""
    folder = Path(path).parent.resolve()
    relative = [[Path(os.path.relpath(photo, folder)).as_posix() for photo in pictures(pair)] for pair in pairs]
    rows = [json.dumps({"src": src, "tar": tar}, ensure_ascii=False) for src, tar in relative]
    write_text(path, "".join(row + "\n" for row in rows))


def check_pairs(pairs: Sequence[Pair]) -> list[tuple[int, int]]:
    """Decodes every photo and returns each pair's (height, width).

    UserError lists each missing or damaged photo and each pair whose sizes differ, by line.
    """
    with ThreadPoolExecutor(THREADS) as pool:  # decoders release the GIL
        checked = list(pool.map(_check, pairs))
    _raise([problem for _, problems in checked for problem in problems])
    return [sizes[0] for sizes, _ in checked]


def photo_digests(pairs: Sequence[Pair]) -> dict[Path, str]:
    """SHA-256, in hexadecimal, of every photo's file.

    It is the file's, not the pixels': two versions of a decoder may give different pixels, and a photo that was trained on
    would pass for another. audit.near_duplicates finds a photo that was saved anew.
    """

    photos = list({photo for pair in pairs for photo in (pair.src, pair.tar)})
    with ThreadPoolExecutor(THREADS) as pool:  # hashing releases the GIL
        return dict(zip(photos, pool.map(sha256, photos), strict=True))


class Replaced:
    """Notices photos whose files are replaced while they are in use."""

    def __init__(self, pairs: Sequence[Pair]):
        self._stamps = {photo: _stamp(photo) for pair in pairs for photo in (pair.src, pair.tar)}

    def digests(self) -> Iterator[str]:
        """SHA-256 of each file that was replaced since the last call. One that is gone for now is looked at the next time."""
        for photo, before in self._stamps.items():
            if (now := _stamp(photo)) not in (None, before):
                try:
                    yield sha256(photo)
                except OSError:
                    continue
                self._stamps[photo] = now


def _stamp(photo: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(photo)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino


def shared_photos(
    some: Sequence[Pair], others: Sequence[Pair], same: Mapping[Path, Path] = ALL_DIFFERENT
) -> Iterator[tuple[Path, Pair, Pair]]:
    """Each photo, source or target, that is in both lists, with its pair in the one and its pair in the other.

    same: photos that count as another one (audit.same_picture).
    """
    listed = {picture: pair for pair in some for picture in pictures(pair, same)}
    for pair in others:
        for photo, picture in zip((pair.src, pair.tar), pictures(pair, same), strict=True):
            if picture in listed:
                yield photo, listed[picture], pair


def pictures(pair: Pair, same: Mapping[Path, Path] = ALL_DIFFERENT) -> tuple[Path, Path]:
    """What tells a pair's source and target from other photos: their resolved paths, or those that `same` has for them."""
    src, tar = (Path(os.path.realpath(photo)) for photo in (pair.src, pair.tar))  # resolve() raises at a circle of links
    return same.get(src, src), same.get(tar, tar)


class Sample(TypedDict):
    """A pair as tensors, (3, h, w) float32 in [0, 1], and its place in the list."""

    src: torch.Tensor
    tar: torch.Tensor
    index: int


class PairDataset(Dataset[Sample]):
    """Pairs as samples.

    size: (h, w), or n for (n, n), or None for each photo's own. resize, the same for both photos:
      squash: to h x w, whatever the aspect ratio;
      fit:    to the largest size within h x w that keeps the aspect ratio, sides rounded to the nearest integer;
      crop:   cut h x w out of the photo at full resolution, from one that is smaller after enlarging it.
    augment: mirror half of the samples, and cut anywhere instead of in the centre. variety: what else is drawn for a sample. All
    of it depends on (seed, epoch, index) alone, neither on the worker nor on the order. UserError for a photo that can't be read
    and for bad arguments.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        size: int | tuple[int, int] | None = None,
        resize: str = "squash",
        augment: bool = False,
        seed: int = 0,
        variety: Augmentation = NONE,
    ):
        if resize not in RESIZE_MODES:
            raise UserError(f"resize must be one of {', '.join(RESIZE_MODES)}, got {resize!r}")
        self.pairs = list(pairs)
        self.size = (size, size) if isinstance(size, int) else size
        if self.size and min(self.size) < 1:
            raise UserError(f"size must be at least 1, got {size}")
        variety.check()
        if (variety.zoom > 1 or variety.mixup) and (resize == "fit" or self.size is None):
            raise UserError(f"zoom, mixup: expected a size, and resize squash or crop; got {size} and {resize}")
        if variety.rotate and self.size and self.size[0] != self.size[1]:
            raise UserError(f"rotate: expected a square, got {self.size[0]} x {self.size[1]}")
        self.resize, self.augment, self.seed, self.variety = resize, augment, seed, variety
        zoom = variety.zoom if resize == "squash" else 1
        self._whole = self.size and (round(self.size[0] * zoom), round(self.size[1] * zoom))  # of a photo, before cutting
        self._cache: DecodedCache | None = None
        self._files: list[list[Path]] = []  # in the cache, or to be, of the first pairs
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see a new epoch too
        self._apart = torch.zeros(len(self.pairs), dtype=torch.bool).share_memory_()

    def set_epoch(self, epoch: int, apart: Sequence[int] = ()) -> None:
        """Chooses the epoch whose augmentation the next samples get, in running workers as well.

        apart: pairs that are mixed into no other.
        """
        self._epoch.fill_(epoch)
        self._apart.zero_()[list(apart)] = True

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        src, tar = self._sample(index)
        if mixed := self.mixed(index):
            other, share = mixed
            src, tar = (share * own + (1 - share) * another for own, another in zip((src, tar), self._sample(other), strict=True))
        return {"src": src, "tar": tar, "index": index}

    def mixed(self, index: int) -> tuple[int, float] | None:
        """(the pair that is mixed into a sample, the share of the sample itself); None: no pair is."""
        if not self.variety.mixup:
            return None
        rng = self._draws(index, MIX)
        others = [other for other, apart in enumerate(self._apart.tolist()) if not apart and other != index]
        return (others[rng.integers(len(others))], self.variety.share(rng)) if others else None

    def _sample(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A pair's source and target, before they are mixed with another's."""
        photos = self._resized(index)
        height, width = photos[0].shape[:2]
        h, w = to = self.size if self.size and self.resize != "fit" else (height, width)
        if self.variety.zoom > 1:
            scale = self.variety.scale(self._draws(index, SCALE), min(height / h, width / w))
            h, w = round(h * scale), round(w * scale)
        step, top, left = 1, (height - h) // 2, (width - w) // 2
        if self.augment:
            rng = self._draws(index)
            step, top, left = rng.choice((-1, 1)), rng.integers(height - h + 1), rng.integers(width - w + 1)
        windows = (_resize(photo[top : top + h, left : left + w], *to)[:, ::step] for photo in photos)
        turned = (self.variety.turn(window, self._draws(index, TURN)).transpose(2, 0, 1) for window in windows)
        src, tar = (torch.from_numpy(to_float(samples)) for samples in turned)
        return self.variety.relight(src, self._draws(index, LIGHT)), tar

    def _draws(self, index: int, *kind: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, int(self._epoch), index, *kind))

    def keep_decoded(self, folder: Path, limit: float) -> int:
        """Keeps the first pairs, decoded and resized, in `folder`: as many as fit in `limit` bytes. Returns the bytes they take.

        They are written when they are first read, and the samples are the same bit for bit. Processes may share the folder.
        """
        self._cache, self._files, total = DecodedCache(folder), [], 0
        for pair in self.pairs:
            height, width, *depths = *photo_layout(pair.src), photo_layout(pair.tar)[2]
            height, width = self.resized(height, width)
            wanted = height * width * 3 * sum(depths) // 8
            if total + wanted > limit:
                break
            self._files.append(self._cache.files((pair.src, pair.tar), self._whole, self.resize))
            total += wanted
        return total

    def drop_decoded(self, but: Sequence["PairDataset"] = ()) -> None:
        """Gives back the disk that keep_decoded has taken, apart from what these others have in the same files."""
        kept = {file for dataset in but for files in dataset._files for file in files}
        for file in {file for files in self._files for file in files} - kept:
            file.unlink(missing_ok=True)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """The size to which a photo of height x width is resized, before cropping."""
        if self._whole is None or self.resize == "squash":
            return self._whole or (height, width)
        scales = self._whole[0] / height, self._whole[1] / width
        scale = min(scales) if self.resize == "fit" else max(1, *scales)
        return max(1, round(height * scale)), max(1, round(width * scale))

    def _resized(self, index: int) -> Sequence[np.ndarray]:
        """The source and the target of a pair before cropping: (h, w, 3) uint8 or uint16."""
        pair = self.pairs[index]
        cache = self._cache if index < len(self._files) else None
        files = cache.files((pair.src, pair.tar), self._whole, self.resize) if cache else []
        if cache and (kept := cache.load(files or self._files[index])):  # of photos that are gone, what they were at first
            return kept
        photos = [read_samples(pair.src), read_samples(pair.tar)]
        if photos[0].shape != photos[1].shape:
            raise UserError(f"{pair.where}: {_sizes_differ(photos[0].shape, photos[1].shape)}")
        height, width = self.resized(*photos[0].shape[:2])
        photos = [_resize(photo, height, width) for photo in photos]
        if cache and files:
            cache.store(files, photos)
        return photos


def _resize(samples: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8 or uint16 resized by antialiased bicubic interpolation."""
    if samples.shape[:2] == (height, width):
        return samples
    if samples.dtype == np.uint8:
        return np.asarray(Image.fromarray(samples).resize((width, height), Image.Resampling.BICUBIC))
    planes = [Image.fromarray(plane) for plane in np.moveaxis(samples, 2, 0).astype(np.float32)]
    planes = [np.asarray(plane.resize((width, height), Image.Resampling.BICUBIC)) for plane in planes]
    return np.rint(np.clip(np.stack(planes, 2), 0, 65535)).astype(np.uint16)


def _parse(line: str) -> list[str]:
    """The source and target of one line. ValueError says what is wrong with it."""
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, got {line.strip()[:80]}")
    paths = []
    for keys in (_SOURCE_KEYS, _TARGET_KEYS):
        given = [key for key in keys if key in record]
        if len(given) != 1:
            raise ValueError(f"expected one of the keys {', '.join(keys)}, got {', '.join(record) or 'none'}")
        path = record[given[0]]
        if not isinstance(path, str) or not path:
            raise ValueError(f"expected a path for {given[0]}, got {path!r}")
        paths.append(path)
    return paths


def _check(pair: Pair) -> tuple[list[tuple[int, int]], list[str]]:
    """The sizes of the photos that can be read, and what is wrong with the pair."""
    sizes, problems = [], []
    for path in (pair.src, pair.tar):
        try:
            sizes.append(check_photo(path))
        except UserError as error:
            problems.append(f"{pair.where}: {error}")
    if not problems and sizes[0] != sizes[1]:
        problems.append(f"{pair.where}: {_sizes_differ(*sizes)}")
    return sizes, problems


def _sizes_differ(src: tuple[int, ...], tar: tuple[int, ...]) -> str:
    return f"expected photos of one size, got src of {src[1]}x{src[0]} and tar of {tar[1]}x{tar[0]} pixels"


def _raise(problems: list[str]) -> None:
    if problems:
        raise UserError("\n  ".join([f"{len(problems)} problem{'s'[: len(problems) > 1]} in the pairs:", *problems]))
