"""Pairs: the file that lists them, every way in which it can be wrong, and the dataset's geometry and augmentation."""

import json
import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from autohdr.data.images import Photo, to_float, write_photo
from autohdr.data.pairs import Pair, PairDataset, check_pairs, read_pairs, write_pairs
from autohdr.errors import UserError


def save(path, height=12, width=20, seed=0, depth=8):
    """A PNG of noise whose red channel says where a pixel stands; returns its samples."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dtype = np.uint8 if depth == 8 else np.uint16
    samples = np.random.default_rng(seed).integers(0, 2**depth, (height, width, 3), dtype=dtype)
    samples[..., 0] = np.arange(width)
    write_photo(path, Photo(to_float(samples), "PNG", depth))
    return samples


def listed(folder, *lines):
    (folder / "pairs.jsonl").write_text("\n".join(lines), "utf-8")
    return folder / "pairs.jsonl"


def line(src="a.png", tar="b.png"):
    return json.dumps({"src": src, "tar": tar})


@pytest.fixture
def pair(tmp_path):
    save(tmp_path / "a.png", seed=1)
    save(tmp_path / "b.png", seed=2)
    return Pair(tmp_path / "a.png", tmp_path / "b.png", 1)


@pytest.mark.parametrize("keys", [("src", "tar"), ("source", "target"), ("input", "target")])
def test_reads_keys_and_blank_lines(tmp_path, keys):
    file = listed(tmp_path, "", json.dumps({keys[0]: "in/ä.jpg", keys[1]: "/out/b.jpg", "note": 1}), "  ", "")
    (pair,) = read_pairs(file)
    assert pair == Pair(tmp_path / "in/ä.jpg", type(tmp_path)("/out/b.jpg"), 2, file)
    assert pair.where == f"{file}:2"


def test_reads_a_byte_order_mark_and_windows_line_ends(tmp_path):
    (tmp_path / "pairs.jsonl").write_bytes(b"\xef\xbb\xbf" + line().encode() + b"\r\n" + line().encode() + b"\r\n")
    assert [p.line for p in read_pairs(tmp_path / "pairs.jsonl")] == [1, 2]


@pytest.mark.parametrize("separator", ["\u2028", "\u0085", "\x1c"])
def test_only_line_feeds_end_a_line(tmp_path, separator):
    pairs = [Pair(tmp_path / f"a{separator}{n}.png", tmp_path / f"b{separator}{n}.png", n, tmp_path / "p.jsonl") for n in (1, 2)]
    write_pairs(tmp_path / "p.jsonl", pairs)
    assert read_pairs(tmp_path / "p.jsonl") == pairs


@pytest.mark.parametrize(
    "text, reason",
    [
        ("{", "Expecting"),
        ('["a.png", "b.png"]', "expected a JSON object"),
        ('{"src": "a.png"}', "tar, target, got src"),
        ('{"tar": "a.png"}', "src, source, input, got tar"),
        ("{}", "got none"),
        ('{"src": "a.png", "source": "c.png", "tar": "b.png"}', "expected one of the keys"),
        ('{"src": 5, "tar": "b.png"}', "expected a path for src, got 5"),
        ('{"src": "", "tar": "b.png"}', "expected a path for src"),
    ],
)
def test_malformed_lines_are_named(tmp_path, text, reason):
    file = listed(tmp_path, line(), text, "", text)
    with pytest.raises(UserError, match="2 problems") as caught:
        read_pairs(file)
    first, second = str(caught.value).splitlines()[1:]
    assert f"{file}:2: " in first and f"{file}:4: " in second and reason in first


@pytest.mark.parametrize("content", [None, b"\n\n", b"\xff\xfe\x00"], ids=["missing", "blank", "binary"])
def test_no_pairs_file_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "pairs.jsonl").write_bytes(content)
    with pytest.raises(UserError, match="pairs.jsonl: expected"):
        read_pairs(tmp_path / "pairs.jsonl")


def test_check_lists_every_bad_pair(tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "b.png")
    save(tmp_path / "small.png", height=11)
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:-100])
    (tmp_path / "text.png").write_text("text")
    lines = [line(), line(tar="none.png"), line("cut.png"), line(), line(tar="small.png"), line("text.png", "none.png")]
    file = listed(tmp_path, *lines)
    with pytest.raises(UserError) as caught:
        check_pairs(read_pairs(file))
    found = [problem.strip() for problem in str(caught.value).splitlines()[1:]]
    for problem, (number, reason) in zip(
        found,
        [
            (2, "none.png: cannot be read: No such file"),
            (3, "cut.png: cannot be read: "),
            (5, "got src of 20x12 and tar of 20x11"),
            (6, "text.png: not a"),
            (6, "none.png: cannot"),
        ],
        strict=True,
    ):
        assert problem.startswith(f"{file}:{number}: ") and reason in problem


def test_check_gives_the_sizes_and_says_nothing_when_all_is_well(pair, capfd):
    assert check_pairs([pair] * 3) == [(12, 20)] * 3
    assert capfd.readouterr() == ("", "")


def test_long_lists_of_problems_are_whole(tmp_path):
    with pytest.raises(UserError, match="300 problems") as caught:
        read_pairs(listed(tmp_path, *["{"] * 300))
    assert len(str(caught.value).splitlines()) == 301


def test_pairs_of_equal_upright_size_pass(tmp_path):
    save(tmp_path / "a.png", 12, 20)
    turned = Image.Exif()
    turned[274] = 6
    Image.new("RGB", (12, 20)).save(tmp_path / "b.jpg", exif=turned)
    check_pairs(read_pairs(listed(tmp_path, line(tar="b.jpg"))))


def test_written_paths_are_relative_to_the_file(tmp_path):
    pairs = [Pair(tmp_path / "in/a.png", tmp_path / "x/../out/ö.png")]
    (tmp_path / "splits/deep").mkdir(parents=True)
    file = tmp_path / "splits/deep/train.jsonl"
    write_pairs(file, pairs)
    assert json.loads(file.read_text("utf-8")) == {"src": "../../in/a.png", "tar": "../../out/ö.png"}
    (again,) = read_pairs(file)
    assert [os.path.realpath(p) for p in (again.src, again.tar)] == [
        str(tmp_path / "in/a.png"),
        str(tmp_path / "out/ö.png"),
    ]


@pytest.mark.parametrize("depth", [8, 16])
def test_samples_are_the_photos(tmp_path, depth):
    src, tar = save(tmp_path / "a.png", seed=1, depth=depth), save(tmp_path / "b.png", seed=2, depth=depth)
    sample = PairDataset([Pair(tmp_path / "a.png", tmp_path / "b.png")])[0]
    for key, samples in (("src", src), ("tar", tar)):
        assert sample[key].dtype == torch.float32 and sample[key].is_contiguous()
        np.testing.assert_array_equal(sample[key].numpy(), to_float(samples).transpose(2, 0, 1))
    assert sample["index"] == 0


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("size", [6, (30, 7)], ids=str)
def test_squash_is_antialiased_and_keeps_the_mean(tmp_path, size, depth):
    samples = save(tmp_path / "a.png", 60, 90, depth=depth)
    sample = PairDataset([Pair(tmp_path / "a.png", tmp_path / "a.png")], size)[0]
    assert sample["src"].shape[1:] == ((6, 6) if size == 6 else (30, 7))
    assert torch.equal(sample["src"], sample["tar"])
    noise = sample["src"][1]
    assert noise.mean() == pytest.approx(to_float(samples)[..., 1].mean(), abs=0.03)
    assert noise.std() < 0.5 * to_float(samples)[..., 1].std()  # averaged, not picked


def test_16_bits_are_resized_with_all_their_bits(tmp_path):
    deep = np.full((40, 40, 3), 1000, np.uint16)
    deep[::2] = 1001
    write_photo(tmp_path / "a.png", Photo(to_float(deep), "PNG", 16))
    resized = PairDataset([Pair(tmp_path / "a.png", tmp_path / "a.png")], 10)[0]["src"]
    assert ((resized * 65535 - 1000.5).abs() <= 0.51).all()


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 60))
def test_fit_keeps_the_aspect_ratio(height, width, size):
    h, w = PairDataset([], size, "fit").resized(height, width)
    assert max(h, w) == size
    assert abs(h - size * height / max(height, width)) <= 0.5 or h == 1
    assert abs(w - size * width / max(height, width)) <= 0.5 or w == 1


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 60), st.integers(1, 60))
def test_crop_enlarges_just_enough(height, width, crop_height, crop_width):
    h, w = PairDataset([], (crop_height, crop_width), "crop").resized(height, width)
    assert h >= crop_height and w >= crop_width
    assert (h, w) == (height, width) or h == crop_height or w == crop_width


def test_crop_is_central_or_anywhere(tmp_path):
    samples = save(tmp_path / "a.png", 12, 20, seed=1)
    pairs = [Pair(tmp_path / "a.png", tmp_path / "a.png")] * 60
    centre = PairDataset(pairs, (4, 6), "crop")[0]["src"]
    np.testing.assert_array_equal(centre.numpy(), to_float(samples[4:8, 7:13]).transpose(2, 0, 1))
    dataset = PairDataset(pairs, (4, 6), "crop", augment=True)
    lefts, mirrored = set(), 0
    for i in range(60):
        columns = (dataset[i]["src"][0, 0] * 255).round().int()
        mirrored += int(columns[0] > columns[-1])
        lefts.add(int(columns.min()))
        assert (columns.diff().abs() == 1).all()
    assert lefts == set(range(15)) and 15 < mirrored < 45


def test_crop_of_a_small_photo_is_enlarged(pair):
    assert PairDataset([pair], 32, "crop")[0]["src"].shape == (3, 32, 32)


@pytest.mark.parametrize("resize", ["squash", "fit", "crop"])
def test_both_photos_are_augmented_in_step(tmp_path, resize):
    save(tmp_path / "a.png", 12, 20, seed=3)
    dataset = PairDataset([Pair(tmp_path / "a.png", tmp_path / "a.png")] * 10, 8, resize, augment=True)
    assert all(torch.equal(dataset[i]["src"], dataset[i]["tar"]) for i in range(10))


def test_augmentation_depends_on_seed_epoch_and_index_alone(pair):
    def epochs(seed, workers):
        dataset = PairDataset([pair] * 12, (5, 7), "crop", augment=True, seed=seed)
        loader = DataLoader(dataset, batch_size=4, num_workers=workers, persistent_workers=workers > 0)
        found = []
        for epoch in range(2):
            dataset.set_epoch(epoch)
            found.append(torch.cat([batch["src"] for batch in loader]))
        return found

    torch.manual_seed(1)
    here = epochs(0, 0)
    torch.manual_seed(2)
    np.random.seed(2)
    there = epochs(0, 2)
    assert torch.equal(here[0], there[0]) and torch.equal(here[1], there[1])
    assert not torch.equal(here[0], here[1])
    assert not torch.equal(here[0], epochs(1, 0)[0])
    assert len({sample.numpy().tobytes() for sample in here[0]}) > 6


def test_without_augmentation_nothing_is_random(pair):
    dataset = PairDataset([pair] * 8, 6, "crop")
    first = [dataset[i]["src"] for i in range(8)]
    dataset.set_epoch(3)
    assert all(torch.equal(first[0], dataset[i]["src"]) for i in range(8))


def test_bad_arguments_and_pairs_are_refused(tmp_path, pair):
    with pytest.raises(UserError, match="squash, fit, crop, got 'stretch'"):
        PairDataset([pair], 8, "stretch")
    with pytest.raises(UserError, match="at least 1, got 0"):
        PairDataset([pair], 0)
    save(tmp_path / "c.png", 13)
    with pytest.raises(UserError, match=":7: expected photos of one size"):
        PairDataset([Pair(pair.src, tmp_path / "c.png", 7)])[0]
    with pytest.raises(UserError, match="none.png"):
        PairDataset([Pair(pair.src, tmp_path / "none.png")])[0]
