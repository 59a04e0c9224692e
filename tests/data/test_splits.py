"""Splits and folds: the arithmetic, and that no photo is ever in two parts."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autohdr.data.pairs import Pair, read_pairs, write_pairs
from autohdr.data.splits import k_folds, split_pairs, write_splits
from autohdr.errors import UserError


def pairs_of(names):
    """Pairs from (source, target) names, numbered from line 1."""
    return [Pair(Path(f"/d/{src}"), Path(f"/d/{tar}"), n, Path("p.jsonl")) for n, (src, tar) in enumerate(names, 1)]


def distinct(count):
    return pairs_of([(f"s{i}", f"t{i}") for i in range(count)])


def photos(pairs):
    return {photo for pair in pairs for photo in (pair.src, pair.tar)}


def count_groups(pairs):
    """How many parts the pairs can be divided into at most, by brute force."""
    groups = []
    for pair in pairs:
        linked = [g for g in groups if g & photos([pair])]
        groups = [g for g in groups if g not in linked] + [photos([pair]).union(*linked)]
    return len(groups)


linked_pairs = st.lists(
    st.tuples(st.integers(0, 25).map("s{}".format), st.integers(0, 25).map("t{}".format)), min_size=4, max_size=40
).map(pairs_of)


def test_577_pairs_become_5_515_57():
    pairs = distinct(577)
    splits = split_pairs(pairs)
    assert (len(splits.test), len(splits.train), len(splits.val)) == (5, 515, 57)
    assert splits.test == pairs[:5]
    assert sorted(splits.train + splits.val, key=lambda p: p.line) == pairs[5:]
    assert splits.train == sorted(splits.train, key=lambda p: p.line)


def test_the_seed_decides():
    pairs = distinct(60)
    assert split_pairs(pairs, seed=1) == split_pairs(pairs, seed=1)
    assert split_pairs(pairs, seed=1).val != split_pairs(pairs, seed=2).val
    assert k_folds(pairs, 3, seed=1) != k_folds(pairs, 3, seed=2)


@given(linked_pairs, st.integers(0, 10), st.floats(0.05, 0.5))
def test_no_photo_is_in_two_parts(pairs, seed, fraction):
    try:
        splits = split_pairs(pairs, test=0, val_fraction=fraction, seed=seed)
    except UserError:
        assert count_groups(pairs) == 1
        return
    assert splits.train and splits.val
    assert not photos(splits.train) & photos(splits.val)
    assert sorted(splits.train + splits.val, key=lambda p: p.line) == pairs


@given(linked_pairs, st.integers(2, 5), st.integers(0, 10))
def test_folds_cover_every_pair_once(pairs, k, seed):
    try:
        folds = k_folds(pairs, k, seed)
    except UserError:
        assert count_groups(pairs) < k
        return
    assert len(folds) == k
    assert sorted((p for _, val in folds for p in val), key=lambda p: p.line) == pairs
    for train, val in folds:
        assert train and val and not photos(train) & photos(val)
        assert sorted(train + val, key=lambda p: p.line) == pairs


@pytest.mark.parametrize("count, k", [(572, 5), (10, 5), (11, 4), (7, 7)])
def test_folds_are_even(count, k):
    sizes = [len(val) for _, val in k_folds(distinct(count), k)]
    assert sum(sizes) == count and max(sizes) - min(sizes) <= 1


def test_a_photo_of_the_test_pairs_further_down_is_refused():
    pairs = distinct(12)
    pairs[8] = Pair(pairs[8].src, pairs[2].tar, 9, Path("p.jsonl"))
    with pytest.raises(UserError, match=r"p.jsonl:9: .*t2 is also in p.jsonl:3"):
        split_pairs(pairs)


def test_test_pairs_may_share_photos_with_each_other():
    pairs = distinct(12)
    pairs[1] = Pair(pairs[1].src, pairs[0].tar, 2)
    assert split_pairs(pairs).test == pairs[:5]


def test_the_same_file_under_two_names_is_the_same_photo():
    pairs = distinct(12)
    pairs[8] = Pair(Path("/d/x/../s2"), pairs[8].tar, 9)
    with pytest.raises(UserError, match="also in"):
        split_pairs(pairs)


@pytest.mark.parametrize("count", [0, 4, 5, 6])
def test_too_few_pairs_are_refused(count):
    with pytest.raises(UserError, match=f"got {count}"):
        split_pairs(distinct(count))
    assert [len(part) for part in vars(split_pairs(distinct(7))).values()] == [5, 1, 1]


@pytest.mark.parametrize("k", [0, 1, 4])
def test_impossible_folds_are_refused(k):
    with pytest.raises(UserError, match=f"from 2 folds to 3, .*got {k}"):
        k_folds(distinct(3), k)


def test_folds_that_too_few_pairs_are_left_for_name_what_is_held_out(tmp_path):
    with pytest.raises(UserError, match="from 2 folds to 3, .*got 4; --test 5 holds out 5 of the 8 pairs"):
        write_splits(distinct(8), tmp_path, folds=4)


def test_pairs_that_are_all_linked_are_refused():
    with pytest.raises(UserError, match="share no photo"):
        split_pairs(pairs_of([(f"s{i}", "t") for i in range(9)]), test=0)


def test_written_splits_read_back(tmp_path):
    pairs = [Pair(tmp_path / f"in/{i}.png", tmp_path / f"out/{i}.png", i + 1) for i in range(25)]
    files = write_splits(pairs, tmp_path / "splits/a")
    assert [file.relative_to(tmp_path).as_posix() for file in files] == [
        f"splits/a/{name}.jsonl" for name in ("test", "train", "val")
    ]
    assert [len(read_pairs(file)) for file in files] == [5, 18, 2]
    found = {pair.src.resolve() for file in files for pair in read_pairs(file)}
    assert found == {pair.src for pair in pairs}


def test_written_folds_leave_the_test_pairs_out(tmp_path):
    pairs = [Pair(tmp_path / f"in/{i}.png", tmp_path / f"out/{i}.png", i + 1) for i in range(25)]
    files = write_splits(pairs, tmp_path / "splits", folds=4)
    assert len(files) == 9 and files[1] == tmp_path / "splits/fold_0/train.jsonl"
    held_out = photos(pairs[:5])
    for file in files[1:]:
        assert not held_out & {path.resolve() for path in photos(read_pairs(file))}
    assert sum(len(read_pairs(file)) for file in files[2::2]) == 20


def lines(folder):
    """What every file in a folder holds."""
    return {file.relative_to(folder).as_posix(): file.read_text() for file in folder.rglob("*.jsonl")}


@pytest.mark.parametrize("out", [".", "../in"])
def test_the_list_itself_is_not_replaced(tmp_path, out):
    folder = tmp_path / "in"
    folder.mkdir()
    write_pairs(folder / "train.jsonl", distinct(20))
    before = lines(folder)
    with pytest.raises(UserError, match="train.jsonl: would replace the list"):
        write_splits(read_pairs(folder / "train.jsonl"), folder / out)
    assert lines(folder) == before


@pytest.mark.parametrize(
    "first, then, left",
    [
        ({"folds": 5}, {"folds": 3}, "fold_3/train.jsonl, .*fold_3/val.jsonl, .*fold_4/train.jsonl, .*fold_4/val.jsonl"),
        ({}, {"test": 0}, "test.jsonl"),
        ({}, {"folds": 3}, "train.jsonl, .*val.jsonl"),
        ({"folds": 2, "test": 0}, {}, "fold_0/train.jsonl, .*fold_1/val.jsonl"),
    ],
    ids=["fewer folds", "no test", "folds after parts", "parts after folds"],
)
def test_parts_of_another_split_are_not_left_among_the_new_ones(tmp_path, first, then, left):
    write_splits(distinct(20), tmp_path, **first)
    before = lines(tmp_path)
    with pytest.raises(UserError, match=f"parts that are not of this split: .*{left}: remove"):
        write_splits(distinct(20), tmp_path, **then)
    assert lines(tmp_path) == before


def test_a_split_replaces_an_earlier_one_with_the_same_parts(tmp_path):
    write_splits(distinct(20), tmp_path, folds=3)
    before = lines(tmp_path)
    write_splits(distinct(20), tmp_path, folds=3, seed=1)
    assert lines(tmp_path).keys() == before.keys() and lines(tmp_path) != before


def test_an_unwritable_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_splits(distinct(20), tmp_path / "file")


@pytest.mark.parametrize("folds", [None, 3])
@pytest.mark.parametrize(("changes", "message"), [({"test": -3}, "test: .*at least 0, got -3"), ({"seed": -1}, "seed: .*got -1")])
def test_refuses_negative_numbers(tmp_path, folds, changes, message):
    with pytest.raises(UserError, match=message):
        write_splits(distinct(20), tmp_path / "parts", folds, **changes)
    assert not (tmp_path / "parts").exists()
