"""Decoded photos on disk: the same samples bit for bit, within the budget, whatever happens to the files."""

import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from autohdr.data import pairs as module
from autohdr.data.images import Photo, photo_layout, read_samples, to_float, write_photo
from autohdr.data.pairs import Pair, PairDataset
from autohdr.errors import UserError

DEPTHS = [(8, 8), (16, 16), (8, 16)]


@pytest.fixture
def pairs(tmp_path):
    """Three pairs of 30 x 20 photos of different depths."""
    rng = np.random.default_rng(0)
    made = []
    for number, depths in enumerate(DEPTHS):
        files = [tmp_path / f"{number}_{name}.png" for name in ("src", "tar")]
        for file, depth in zip(files, depths, strict=True):
            samples = rng.integers(0, 2**depth, (20, 30, 3), np.uint8 if depth == 8 else np.uint16)
            write_photo(file, Photo(to_float(samples), "PNG", depth))
        made.append(Pair(*files, number + 1))
    return made


def samples(dataset):
    return [torch.cat([item["src"], item["tar"]]) for item in (dataset[index] for index in range(len(dataset)))]


def same(some, others):
    return len(some) == len(others) and all(map(torch.equal, some, others))


def refuse_to_decode(monkeypatch):
    monkeypatch.setattr(module, "read_samples", lambda path: pytest.fail(f"{path} was decoded"))


@pytest.mark.parametrize("augment", [False, True], ids=["plain", "augmented"])
@pytest.mark.parametrize("resize, size", [("squash", 12), ("fit", 12), ("crop", 12), ("crop", 25), ("squash", None)])
def test_samples_are_the_same_bit_for_bit(pairs, tmp_path, monkeypatch, resize, size, augment):
    plain, kept = (PairDataset(pairs, size, resize, augment, seed=3) for _ in range(2))
    kept.keep_decoded(tmp_path / "cache", 1e9)
    expected = samples(plain)
    assert same(samples(kept), expected)
    refuse_to_decode(monkeypatch)
    assert same(samples(kept), expected)
    again = PairDataset(pairs, size, resize, augment, seed=3)  # another process's, or a resumed run's
    again.keep_decoded(tmp_path / "cache", 1e9)
    assert same(samples(again), expected)


def test_workers_share_the_files(pairs, tmp_path, monkeypatch):
    plain, kept = (PairDataset(pairs * 4, 12, "crop", augment=True) for _ in range(2))
    kept.keep_decoded(tmp_path / "cache", 1e9)

    def epoch(number, dataset, workers):
        dataset.set_epoch(number)
        loader = DataLoader(dataset, batch_size=None, num_workers=workers)
        return [torch.cat([item["src"], item["tar"]]) for item in loader]

    expected = [epoch(number, plain, 0) for number in range(2)]
    assert same(epoch(0, kept, 2), expected[0]) and len(list((tmp_path / "cache").iterdir())) == 6
    refuse_to_decode(monkeypatch)
    assert same(epoch(1, kept, 2), expected[1])


def test_a_full_disk_is_told_once_for_all_workers(pairs, tmp_path, recwarn):
    (tmp_path / "cache").write_text("a file in the way")
    dataset = PairDataset(pairs, 12)
    dataset.keep_decoded(tmp_path / "cache", 1e9)
    for _ in DataLoader(dataset, batch_size=None, num_workers=1):
        pass
    samples(dataset)
    assert not [warning for warning in recwarn if "keeps no more" in str(warning.message)]  # the worker has said so


def test_the_budget_is_in_bytes_and_the_first_pairs_have_it(pairs, tmp_path):
    pixels = 12 * 12 * 3
    dataset = PairDataset(pairs, 12)
    assert dataset.keep_decoded(tmp_path / "cache", 1e9) == pixels * (2 + 4 + 3)
    samples(dataset)
    files = list((tmp_path / "cache").iterdir())
    assert sum(np.load(file).nbytes for file in files) == pixels * (2 + 4 + 3) and len(files) == 6
    shutil.rmtree(tmp_path / "cache")
    for limit, count in ((pixels * 6, 2), (pixels * 6 - 1, 1), (0, 0)):
        assert dataset.keep_decoded(tmp_path / str(count), limit) == pixels * (0, 2, 6)[count]
        samples(dataset)
        folder = tmp_path / str(count)
        assert len(list(folder.iterdir()) if folder.exists() else []) == 2 * count


@pytest.mark.parametrize("suffix, depth", [("jpg", 8), ("png", 8), ("png", 16), ("webp", 8), ("tif", 8), ("tif", 16)])
@pytest.mark.parametrize("orientation", [1, 6])
def test_the_header_tells_size_and_depth(tmp_path, suffix, depth, orientation):
    formats = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "tif": "TIFF"}
    exif = Image.Exif()
    exif[274] = orientation
    pixels = np.random.default_rng(0).random((20, 30, 3), np.float32)
    write_photo(tmp_path / f"a.{suffix}", Photo(pixels, formats[suffix], depth))
    if depth == 8:
        Image.open(tmp_path / f"a.{suffix}").save(tmp_path / f"a.{suffix}", exif=exif)
    decoded = read_samples(tmp_path / f"a.{suffix}")
    assert photo_layout(tmp_path / f"a.{suffix}") == (*decoded.shape[:2], 8 * decoded.itemsize)


def test_a_replaced_photo_is_decoded_again(pairs, tmp_path):
    dataset = PairDataset(pairs, 12)
    dataset.keep_decoded(tmp_path / "cache", 1e9)
    before = samples(dataset)
    Image.new("RGB", (30, 20), "red").save(pairs[1].tar)
    after = samples(dataset)
    assert same(after, samples(PairDataset(pairs, 12))) and not torch.equal(before[1], after[1])
    pairs[0].src.unlink()
    assert same(samples(dataset), after)  # from the cache: it is as it was
    with pytest.raises(UserError, match="0_src.png"):
        PairDataset(pairs, 12)[0]


@pytest.mark.parametrize("content", [lambda b: b"", lambda b: b[:-1], lambda b: b[:40], lambda b: b"text" * 100], ids=range(4))
def test_a_damaged_file_is_made_again(pairs, tmp_path, content):
    dataset = PairDataset(pairs, 12)
    dataset.keep_decoded(tmp_path / "cache", 1e9)
    expected = samples(dataset)
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(content(file.read_bytes()))
    assert same(samples(dataset), expected) and same(samples(dataset), expected)
    assert all(np.load(file).shape == (12, 12, 3) for file in (tmp_path / "cache").iterdir())


@pytest.mark.parametrize("fault", ["full", "nearly full", "a file in the way"])
def test_without_a_disk_the_samples_come_all_the_same(pairs, tmp_path, monkeypatch, fault):
    dataset = PairDataset(pairs, 12)
    dataset.keep_decoded(tmp_path / "cache", 1e9)
    if fault == "full":
        monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    elif fault == "nearly full":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12 - 10**10, 10**10))
    else:
        (tmp_path / "cache").write_text("")
    with pytest.warns(UserWarning, match="keeps no more decoded photos") as warned:
        assert same(samples(dataset), samples(PairDataset(pairs, 12)))
    assert len(warned) == 1
    assert fault == "a file in the way" or not list((tmp_path / "cache").iterdir())
