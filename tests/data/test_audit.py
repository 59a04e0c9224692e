"""Near-duplicates: each way in which a picture comes again is found, other rooms are not, and no group crosses a split."""

import json

import numpy as np
import pytest
from PIL import Image, ImageOps

from autohdr.cli import main
from autohdr.data.audit import Match, near_duplicates, perceptual_hash, same_picture, thumbnail
from autohdr.data.images import read_samples
from autohdr.data.pairs import Pair, read_pairs
from autohdr.data.splits import k_folds, linked_groups, split_pairs
from autohdr.data.synthetic import render_pair
from autohdr.errors import UserError

ROOMS = 10


def brightened(image, factor=1.5):
    return image.point([min(255, round(factor * value)) for value in range(256)] * 3)


def cropped(image, share=0.04):
    left, top = round(share * image.width), round(share * image.height)
    return image.crop((left, top // 2, image.width, image.height - top // 2))


CHANGES = {
    "re-encoded": ("jpg", {"quality": 40}, lambda image: image),
    "mirrored": ("png", {}, ImageOps.mirror),
    "upside down": ("png", {}, lambda image: image.rotate(180)),
    "cropped": ("png", {}, cropped),
    "brightened": ("png", {}, brightened),
    "darkened": ("png", {}, lambda image: image.point([round(255 * (v / 255) ** 1.8) for v in range(256)] * 3)),
    "smaller": ("webp", {}, lambda image: image.resize((120, 80))),
    "all": ("jpg", {"quality": 60}, lambda image: brightened(ImageOps.mirror(cropped(image)), 1.3)),
}


@pytest.fixture(scope="session")
def rooms(tmp_path_factory):
    """A folder with different rooms, N_src.png and N_tar.png."""
    folder = tmp_path_factory.mktemp("rooms")
    for seed in range(ROOMS):
        for name, pixels in zip(("src", "tar"), render_pair(seed, 96, 144), strict=True):
            Image.fromarray(pixels).save(folder / f"{seed}_{name}.png")
    return folder


def pair_of(rooms, number):
    return Pair(rooms / f"{number}_src.png", rooms / f"{number}_tar.png", number + 1, rooms / "pairs.jsonl")


def changed(rooms, folder, number, change):
    """A pair made of another's photos."""
    suffix, options, apply = CHANGES[change]
    files = [folder / f"{number}_again_{name}.{suffix}" for name in ("src", "tar")]
    for name, file in zip(("src", "tar"), files, strict=True):
        apply(Image.open(rooms / f"{number}_{name}.png")).save(file, **options)
    return Pair(*files, 100 + number, folder / "pairs.jsonl")


def listed(file, pairs):
    file.write_text("".join(json.dumps({"src": str(pair.src), "tar": str(pair.tar)}) + "\n" for pair in pairs))
    return file


def test_other_rooms_are_not_duplicates(rooms):
    assert near_duplicates([pair_of(rooms, number) for number in range(ROOMS)]) == []


@pytest.mark.parametrize("change", CHANGES)
def test_the_same_room_is_found(rooms, tmp_path, change):
    pairs = [pair_of(rooms, number) for number in range(ROOMS)]
    pairs += [changed(rooms, tmp_path, number, change) for number in (1, 4, 7)]
    matches = near_duplicates(pairs)
    groups = [group for group in linked_groups(pairs, same_picture(matches)) if len(group) > 1]
    assert groups == [[1, ROOMS], [4, ROOMS + 1], [7, ROOMS + 2]]
    turns = {"mirrored": "mirrored", "all": "mirrored", "upside down": "upside down"}
    assert {match.turn for match in matches} == {turns.get(change, "")}


def test_an_edit_is_found_beside_the_photo_it_was_made_of(rooms):
    first, second = pair_of(rooms, 0), pair_of(rooms, 1)
    mixed = Pair(second.src, first.tar)
    only_source = Pair(first.src, first.src)
    (match,) = near_duplicates([only_source, mixed])
    assert {match.first, match.second} == {first.src.resolve(), first.tar.resolve()}


def test_a_mirrored_picture_has_the_hash_but_for_signs(rooms):
    picture = thumbnail(rooms / "0_tar.png")
    here, mirrored = perceptual_hash(picture), perceptual_hash(picture[:, ::-1])
    assert here.shape == (64,) and set(here) == {-1, 1}
    np.testing.assert_array_equal(perceptual_hash(0.5 * picture), here)
    assert 20 < (here != mirrored).sum() < 44


def test_flat_pictures_are_never_matched(tmp_path):
    pairs = []
    for number in range(3):
        for name in ("src", "tar"):
            Image.new("RGB", (60, 40), (90 + number,) * 3).save(tmp_path / f"{number}_{name}.png")
        pairs.append(Pair(tmp_path / f"{number}_src.png", tmp_path / f"{number}_tar.png"))
    assert near_duplicates(pairs) == []


def test_one_picture_stands_for_all_that_are_linked(tmp_path):
    a, b, c, d, e = (tmp_path / name for name in "abcde")
    same = same_picture(Match(x, y, "", 0, 1.0) for x, y in ((a, b), (c, d), (b, c)))
    assert same.keys() == {a, b, c, d} and len(set(same.values())) == 1 and e not in same


def test_large_jpegs_are_read_at_a_fraction_of_their_size(tmp_path):
    Image.fromarray(render_pair(3, 64, 96)[1]).resize((960, 640)).save(tmp_path / "a.jpg")
    assert read_samples(tmp_path / "a.jpg", at_least=100).shape == (160, 240, 3)
    assert np.abs(thumbnail(tmp_path / "a.jpg") - thumbnail_of(Image.open(tmp_path / "a.jpg"), tmp_path)).mean() < 0.01


def thumbnail_of(image, folder):
    image.save(folder / "whole.png")
    return thumbnail(folder / "whole.png")


def test_parts_and_folds_keep_a_picture_together(rooms, tmp_path):
    pairs = [pair_of(rooms, number) for number in range(6)] + [changed(rooms, tmp_path, 5, "mirrored")]
    same = same_picture(near_duplicates(pairs))
    for seed in range(5):
        for _, val in k_folds(pairs, 3, seed, same):
            assert (pairs[5] in val) == (pairs[6] in val)
        splits = split_pairs(pairs, 2, 0.4, seed, same)
        assert (pairs[5] in splits.val) == (pairs[6] in splits.val)
    with pytest.raises(UserError, match=r":105: .*5_again_src.png shows a picture that is also in .*:6, one of the first 6"):
        split_pairs(pairs, 6, same=same)


def test_audit_of_one_list_prints_the_groups(rooms, tmp_path, capsys):
    again = changed(rooms, tmp_path, 2, "all")
    file = listed(tmp_path / "pairs.jsonl", [*(pair_of(rooms, number) for number in range(4)), again])
    assert main(["data", "audit", str(file), "--out", str(tmp_path / "groups.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2 pairs that share a picture:" and lines[-1] == "5 pairs, 1 group, 0 in more than one list"
    assert [line.split(": ")[0] for line in lines[1:3]] == [f"  {file}:3", f"  {file}:5"]
    assert "2_tar.png ~ " in "".join(lines[3:-1]) and "(mirrored, " in lines[3]
    (group,) = json.loads((tmp_path / "groups.json").read_text())["groups"]
    assert not group["crossing"] and [pair["line"] for pair in group["pairs"]] == [3, 5] and group["matches"]


def test_audit_fails_where_a_group_is_in_two_lists(rooms, tmp_path, capsys):
    train = listed(tmp_path / "train.jsonl", [pair_of(rooms, number) for number in range(3)])
    val = listed(tmp_path / "val.jsonl", [pair_of(rooms, 3), changed(rooms, tmp_path, 1, "cropped")])
    assert main(["data", "audit", str(train), str(val)]) == 1
    output = capsys.readouterr().out
    assert "in MORE THAN ONE LIST" in output and f"{train}:2: " in output and f"{val}:2: " in output
    assert main(["data", "audit", str(train)]) == 0
    assert "3 pairs, 0 groups" in capsys.readouterr().out
    shared = listed(tmp_path / "test.jsonl", [pair_of(rooms, 0)])
    assert main(["data", "audit", str(train), str(shared)]) == 1  # the very file


def test_audit_names_every_photo_that_cannot_be_read(rooms, tmp_path, capsys):
    pairs = [pair_of(rooms, 0), Pair(tmp_path / "none.png", rooms / "0_tar.png"), Pair(rooms / "1_src.png", tmp_path / "no.png")]
    file = listed(tmp_path / "pairs.jsonl", pairs)
    assert main(["data", "audit", str(file)]) == 2
    error = capsys.readouterr().err
    assert f"{file}:2: " in error and f"{file}:3: " in error


def test_data_split_keeps_near_duplicates_together(rooms, tmp_path, capsys):
    pairs = [pair_of(rooms, number) for number in range(8)] + [changed(rooms, tmp_path, n, "brightened") for n in (5, 6)]
    file = listed(tmp_path / "pairs.jsonl", pairs)
    assert main(["data", "split", str(file), "--out", str(tmp_path / "parts"), "--test", "0", "--folds", "4"]) == 0
    assert capsys.readouterr().out.count("2 pairs that share a picture:") == 2
    for fold in range(4):
        names = {pair.src.stem for pair in read_pairs(tmp_path / f"parts/fold_{fold}/val.jsonl")}
        for number in (5, 6):
            assert (f"{number}_src" in names) == (f"{number}_again_src" in names)
