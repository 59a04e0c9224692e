"""Test, training and validation parts of a list of pairs, and folds for cross-validation.

A photo that occurs in several pairs keeps them together: no photo is ever in two parts. Nor is a picture, where `same` says
which photos show the same one (audit.same_picture).
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from autohdr.data.pairs import ALL_DIFFERENT, Pair, pictures, shared_photos, write_pairs
from autohdr.errors import UserError

FEW = 5
"""Of fewer pairs a mean's confidence interval says next to nothing."""
_PARTS = ("test.jsonl", "train.jsonl", "val.jsonl", "fold_*/train.jsonl", "fold_*/val.jsonl")


@dataclass(frozen=True)
class Splits:
    """The three parts, each in the order of the file."""

    test: list[Pair]
    train: list[Pair]
    val: list[Pair]


def split_pairs(
    pairs: Sequence[Pair],
    test: int = 5,
    val_fraction: float = 0.1,
    seed: int = 0,
    same: Mapping[Path, Path] = ALL_DIFFERENT,
) -> Splits:
    """Holds out the first `test` pairs, then a random `val_fraction` of the others for validation (577: 5, 515 and 57).

    UserError if a photo of the first pairs occurs again further down, if there are too few pairs, or for a negative test or seed.
    """
    held_out, rest = _hold_out(pairs, test, same)
    groups = _shuffled_groups(rest, seed, same)
    if len(groups) < 2:
        raise UserError(f"expected {test} pairs to test and 2 or more that share no photo with another, got {len(pairs)}")
    wanted = max(1, round(val_fraction * len(rest)))
    chosen: list[int] = []
    for group in groups:
        if len(chosen) + len(group) <= wanted:
            chosen += group
    return Splits(held_out, *_divided(rest, chosen or min(groups, key=len)))


def k_folds(
    pairs: Sequence[Pair], k: int, seed: int = 0, same: Mapping[Path, Path] = ALL_DIFFERENT
) -> list[tuple[list[Pair], list[Pair]]]:
    """(training, validation) pairs of each of k folds; every pair validates once.

    UserError if there are fewer pairs (those that share a photo count as one) than folds, or for a negative seed.
    """
    groups = _shuffled_groups(pairs, seed, same)
    if not 2 <= k <= len(groups):
        raise UserError(f"expected from 2 folds to {len(groups)}, the number of pairs that share no photo, got {k}")
    folds: list[list[int]] = [[] for _ in range(k)]
    for group in sorted(groups, key=len, reverse=True):  # large ones first, so that the folds come out even
        min(folds, key=len).extend(group)
    return [_divided(pairs, fold) for fold in folds]


def write_splits(
    pairs: Sequence[Pair],
    out_dir: str | Path,
    folds: int | None = None,
    seed: int = 0,
    test: int = 5,
    same: Mapping[Path, Path] = ALL_DIFFERENT,
) -> list[Path]:
    """Writes test.jsonl, train.jsonl and val.jsonl, or with folds test.jsonl and fold_0/{train,val}.jsonl, fold_1/... .

    Paths in them are relative to where they stand. The folds divide what is not held out to test. Returns the files
    written. UserError as split_pairs and k_folds, if out_dir cannot be written, and, before anything is written, if a
    file would replace the list that the pairs are from or if out_dir holds parts that this split would leave there.
    """
    if folds is None:
        splits = split_pairs(pairs, test, seed=seed, same=same)
        parts = {"test": splits.test, "train": splits.train, "val": splits.val}
    else:
        held_out, rest = _hold_out(pairs, test, same)
        parts = {"test": held_out}
        try:
            divided = k_folds(rest, folds, seed, same)
        except UserError as error:
            raise UserError(f"{error}; --test {test} holds out {len(held_out)} of the {len(pairs)} pairs") from None
        for number, (train, val) in enumerate(divided):
            parts |= {f"fold_{number}/train": train, f"fold_{number}/val": val}
    files = {Path(out_dir, f"{name}.jsonl"): part for name, part in parts.items() if part}
    sources = {pair.file.resolve() for pair in pairs if pair.file}
    if replaced := [str(file) for file in files if file.resolve() in sources]:
        raise UserError(f"{', '.join(replaced)}: would replace the list that is to be split: give another folder")
    earlier = sorted(str(file) for pattern in _PARTS for file in Path(out_dir).glob(pattern) if file not in files)
    if earlier:
        raise UserError(
            f"{out_dir} holds parts that are not of this split: {', '.join(earlier)}: remove them or give another folder"
        )
    try:
        for file, part in files.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_pairs(file, part)
    except OSError as error:
        raise UserError(f"{out_dir}: cannot be written: {error.strerror}") from error
    return list(files)


def _hold_out(pairs: Sequence[Pair], test: int, same: Mapping[Path, Path]) -> tuple[list[Pair], list[Pair]]:
    """The first `test` pairs and the others, which must not share a photo with them."""
    if test < 0:
        raise UserError(f"test: expected a number of pairs, at least 0, got {test}")
    for photo, other, pair in shared_photos(pairs[:test], pairs[test:], same):
        is_ = "is" if os.path.realpath(photo) in map(os.path.realpath, (other.src, other.tar)) else "shows a picture that is"
        raise UserError(
            f"{pair.where}: {photo} {is_} also in {other.where}, one of the first {test} pairs, held out to "
            "test: remove one of the two, or move them both among or away from the first"
        )
    return list(pairs[:test]), list(pairs[test:])


def linked_groups(pairs: Sequence[Pair], same: Mapping[Path, Path] = ALL_DIFFERENT) -> list[list[int]]:
    """Indices of pairs, those linked by shared photos in one group, in the order of each group's first pair."""
    leader = list(range(len(pairs)))

    def find(index: int) -> int:
        while leader[index] != index:
            index = leader[index]
        return index

    first: dict[Path, int] = {}
    for index, pair in enumerate(pairs):
        for picture in pictures(pair, same):
            leader[find(index)] = find(first.setdefault(picture, index))
    groups: dict[int, list[int]] = {}
    for index in range(len(pairs)):
        groups.setdefault(find(index), []).append(index)
    return list(groups.values())


def _shuffled_groups(pairs: Sequence[Pair], seed: int, same: Mapping[Path, Path]) -> list[list[int]]:
    if seed < 0:
        raise UserError(f"seed: expected at least 0, got {seed}")
    groups = linked_groups(pairs, same)
    return [groups[i] for i in np.random.default_rng(seed).permutation(len(groups))]


def _divided(pairs: Sequence[Pair], chosen: Sequence[int]) -> tuple[list[Pair], list[Pair]]:
    """The pairs not chosen and the chosen ones, both in their order."""
    picked = set(chosen)
    return [p for i, p in enumerate(pairs) if i not in picked], [p for i, p in enumerate(pairs) if i in picked]
