"""What is drawn for a training pair: from (seed, epoch, index) alone, each kind by itself, and what it does to the photos."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from autohdr.data.augment import Augmentation
from autohdr.data.colour import decode_srgb
from autohdr.data.images import Photo, to_float, write_photo
from autohdr.data.pairs import Pair, PairDataset
from autohdr.errors import UserError

ALL = {"zoom": 2.0, "rotate": True, "flip": True, "exposure_jitter": 1.0, "white_balance_jitter": 0.5, "mixup": 1.2}
COUNT = 40


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A picture whose red says the column and whose green says the row, of 40 x 60 pixels; the target is the same."""
    file = tmp_path_factory.mktemp("pairs") / "a.png"
    samples = np.zeros((40, 60, 3), np.uint8)
    samples[..., 0], samples[..., 1], samples[..., 2] = 4 * np.arange(60), 6 * np.arange(40)[:, None], 128
    write_photo(file, Photo(to_float(samples), "PNG", 8))
    return [Pair(file, file)] * COUNT


def samples(pairs, size=16, resize="squash", augment=False, epoch=0, **variety):
    dataset = PairDataset(pairs, size, resize, augment, seed=3, variety=Augmentation(**variety))
    dataset.set_epoch(epoch)
    return [dataset[index] for index in range(len(dataset))]


def columns_and_rows(photo):
    """The slopes along x of red and of green, each the mean over the photo."""
    return photo[0].diff(dim=1).mean().item(), photo[1].diff(dim=1).mean().item()


@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_draws_depend_on_seed_epoch_and_index_alone(pairs, resize):
    def both(workers):
        dataset = PairDataset(pairs[:8], 16, resize, True, seed=3, variety=Augmentation(**ALL))
        loader = DataLoader(dataset, batch_size=3, num_workers=workers, persistent_workers=workers > 0)
        return [
            torch.cat([torch.cat((batch["src"], batch["tar"]), 1) for batch in loader])
            for epoch in (0, 1)
            if dataset.set_epoch(epoch) is None
        ]

    here, there = both(0), both(1)
    assert all(map(torch.equal, here, there)) and not torch.equal(*here)


@pytest.mark.parametrize("one", ALL)
def test_each_kind_is_seen_and_light_is_the_sources_alone(pairs, one):
    alone, none = samples(pairs, augment=True, **{one: ALL[one]}), samples(pairs, augment=True)
    changed = [not torch.equal(a["src"], b["src"]) for a, b in zip(alone, none, strict=True)]
    assert sum(changed) > COUNT / 4
    if "jitter" in one:
        assert all(torch.equal(a["tar"], b["tar"]) for a, b in zip(alone, none, strict=True))


def test_one_kind_changes_nothing_about_another(pairs):
    """A sample that is lit anew, and turned as well, is the lit one turned."""
    lit, both = (samples(pairs, exposure_jitter=1.0, flip=flip) for flip in (False, True))
    assert all(torch.equal(a["src"], b["src"]) or torch.equal(a["src"].flip(1), b["src"]) for a, b in zip(lit, both, strict=True))


def test_flips_and_turns_go_with_both_photos(pairs):
    flipped, turned = samples(pairs, flip=True), samples(pairs, rotate=True)
    assert all(torch.equal(sample["src"], sample["tar"]) for sample in (*flipped, *turned))
    upside_down = [sample["src"][1].diff(dim=0).mean().item() < 0 for sample in flipped]
    assert 10 < sum(upside_down) < 30 and all(columns_and_rows(sample["src"])[0] > 0 for sample in flipped)
    seen = {(round(np.sign(red)), round(np.sign(green))) for red, green in (columns_and_rows(s["src"]) for s in turned)}
    slopes = [columns_and_rows(sample["src"]) for sample in turned]
    quarters = [(red > 0.01, red < -0.01, green > 0.01, green < -0.01) for red, green in slopes]
    assert len(set(quarters)) == 4 and len(seen) >= 2  # each of the four is there


@pytest.mark.parametrize("augment", [False, True])
def test_zoom_shows_between_the_whole_and_a_part(pairs, augment):
    """squash, zoom 2: a sample spans half of the columns and rows at least, and at most all; without augment it is centred."""
    spans, middles = [], []
    for sample in samples(pairs, augment=augment, zoom=2.0):
        assert sample["src"].shape == (3, 16, 16) and torch.equal(sample["src"], sample["tar"])
        columns = sample["src"][0].mean(0) * 255 / 4
        spans.append(((columns.max() - columns.min()) * 16 / 15 / 60).item())
        middles.append(columns.mean().item())
    assert 0.45 < min(spans) < 0.6 and 0.9 < max(spans) < 1.05
    assert (max(middles) - min(middles) > 5) == augment


def test_zoom_of_crops_reduces_what_is_larger(pairs):
    """crop to 16 x 16, zoom 2: 16 to 32 pixels of the photo become 16, and no more of one that has fewer."""
    steps = [abs(sample["src"][0].diff(dim=1).mean().item()) * 255 / 4 for sample in samples(pairs, 16, "crop", True, zoom=2.0)]
    assert 0.95 < min(steps) < 1.15 and 1.8 < max(steps) < 2.05
    steps = [abs(sample["src"][0].diff(dim=1).mean().item()) * 255 / 4 for sample in samples(pairs, 32, "crop", True, zoom=2.0)]
    assert max(steps) < 1.3  # 40 rows become 32


def test_light_is_multiplied(pairs):
    plain = decode_srgb(samples(pairs[:1])[0]["src"])
    below = (plain > 0.02) & (plain < 0.2)  # not clipped, even two stops up
    exposed, tinted = samples(pairs, exposure_jitter=2.0), samples(pairs, white_balance_jitter=1.0)
    stops = []
    for sample in exposed:
        ratio = (decode_srgb(sample["src"]) / plain)[below].log2()
        assert ratio.std() < 1e-3
        stops.append(ratio.mean().item())
    assert -2 <= min(stops) < -1 and 1 < max(stops) <= 2
    gains = torch.stack(
        [(decode_srgb(s["src"]) / plain)[:, below.all(0) | (plain[0] > 0)].median(1).values for s in tinted]
    ).log2()
    assert gains[:, 1].abs().max() < 1e-3 and 0.5 < gains[:, 2].abs().max() <= 1.001
    assert all(0 <= sample["src"].min() and sample["src"].max() <= 1 for sample in (*exposed, *tinted))


def test_light_is_the_same_in_any_number_of_threads():
    """A worker has one, the training process several."""
    source, variety, before, seen = torch.rand(3, 211, 333), Augmentation(exposure_jitter=1.0), torch.get_num_threads(), set()
    try:
        for threads in (1, 3, 5, 7):
            torch.set_num_threads(threads)
            seen.add(variety.relight(source, np.random.default_rng(1)).numpy().tobytes())
    finally:
        torch.set_num_threads(before)
    assert len(seen) == 1


def test_mixup_blends_both_photos_of_two_pairs(tmp_path):
    for name, value in (("black", 0), ("white", 255), ("odd", 128)):
        write_photo(tmp_path / f"{name}.png", Photo(np.full((20, 20, 3), value / 255, np.float32), "PNG", 8))
    pairs = [Pair(tmp_path / "black.png", tmp_path / "white.png"), Pair(tmp_path / "white.png", tmp_path / "black.png")]
    pairs.append(Pair(tmp_path / "odd.png", tmp_path / "odd.png"))
    dataset = PairDataset(pairs, 16, variety=Augmentation(mixup=1.0))
    shares = []
    for epoch in range(30):
        dataset.set_epoch(epoch, apart=[2])  # which is mixed into no other
        sample, (other, share) = dataset[0], dataset.mixed(0)
        assert other == 1 and sample["src"].unique().tolist() == pytest.approx([1 - share], abs=1e-6)
        assert sample["tar"].unique().tolist() == pytest.approx([share], abs=1e-6)
        shares.append(share)
    assert min(shares) < 0.2 and max(shares) > 0.8
    dataset.set_epoch(0)
    assert {dataset.mixed(0)[0] for epoch in range(30) if dataset.set_epoch(epoch) is None} == {1, 2}
    assert PairDataset(pairs[:1], 16, variety=Augmentation(mixup=1.0)).mixed(0) is None


@pytest.mark.parametrize(
    ("settings", "variety", "message"),
    [
        ({}, {"zoom": 0.5}, "zoom: expected 1 to 16, got 0.5"),
        ({}, {"exposure_jitter": -1.0}, "exposure_jitter: expected 0 to 8, got -1.0"),
        ({}, {"mixup": float("nan")}, "mixup: expected at least 0, got nan"),
        ({"resize": "fit"}, {"mixup": 1.0}, "zoom, mixup: expected a size, and resize squash or crop; got 16 and fit"),
        ({"size": None}, {"zoom": 2.0}, "zoom, mixup: expected a size, and resize squash or crop; got None and squash"),
        ({"size": (16, 20)}, {"rotate": True}, "rotate: expected a square, got 16 x 20"),
    ],
)
def test_rejects(settings, variety, message):
    with pytest.raises(UserError, match=message):
        PairDataset([], **{"size": 16} | settings, variety=Augmentation(**variety))
