"""Synthetic rooms: the same bits every time, statistics where real pairs have theirs, nothing overwritten."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from autohdr.data.images import from_float, read_rgb
from autohdr.data.pairs import check_pairs, read_pairs
from autohdr.data.synthetic import degrade, edit, photograph, render_pair, render_scene, statistics, synthesize
from autohdr.data.synthetic.house import House
from autohdr.data.synthetic.look import PERCENTILES, SOURCE_OUTDOORS, TARGET, TARGET_OUTDOORS, pin, walls_of
from autohdr.data.synthetic.pixels import to_lab
from autohdr.errors import UserError

LUMA = np.array([0.2126, 0.7152, 0.0722])


# mean and standard deviation of `statistics` over ten real pairs, at 128 x 128 pixels
REAL = json.loads((Path(__file__).parent / "real_pairs.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def rooms() -> list[tuple[np.ndarray, np.ndarray]]:
    return [tuple(x / np.float32(255) for x in render_pair(seed, 96, 128)) for seed in range(100, 160)]


@pytest.fixture(scope="module")
def scenes(rooms) -> list[tuple[np.ndarray, np.ndarray]]:
    return rooms[:12]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(-10 * np.log10(np.mean((a - b) ** 2)))


def test_render_is_uint8_and_deterministic():
    first, again, other = render_pair(7, 40, 56), render_pair(7, 40, 56), render_pair(8, 40, 56)
    for a, b, c in zip(first, again, other, strict=True):
        assert a.shape == (40, 56, 3) and a.dtype == np.uint8
        assert np.array_equal(a, b)
        assert not np.array_equal(a, c)


@pytest.fixture(scope="module")
def spreads(rooms) -> dict[str, tuple[float, float]]:
    found = [statistics(*pair) for pair in rooms]
    columns = {name: np.array([each.get(name, np.nan) for each in found]) for name in REAL}
    return {name: (float(np.nanmean(column)), float(np.nanstd(column))) for name, column in columns.items()}


@pytest.mark.parametrize("name", REAL)
def test_statistics_are_those_of_real_pairs(spreads, name):
    """Means within .6 of a standard deviation of real pairs, and as far from one another as those, or half or twice that."""
    (mean, sd), (real, real_sd) = spreads[name], REAL[name]
    if name.endswith("clipped"):
        assert mean < 2e-3
        return
    assert abs(mean - real) < 0.6 * real_sd
    assert 0.4 < sd / real_sd < 2.5


def test_target_is_no_global_curve_of_source(scenes):
    """A gain to a white point and a gamma to the target's own mean stay as far from it as on real pairs (20 dB)."""
    reached = []
    for source, target in scenes:
        x = np.clip(source / np.percentile(source @ LUMA, 98), 1e-4, 1)
        gammas = np.geomspace(0.2, 4, 60)
        means = np.array([(x**g @ LUMA).mean() for g in gammas])
        reached.append(psnr(x ** gammas[np.argmin(abs(means - (target @ LUMA).mean()))], target))
    assert 17 < np.mean(reached) < 21.5


@pytest.mark.parametrize("exterior", [False, True])
def test_a_scene_is_kept_and_photographed_again(tmp_path, exterior):
    """From the folder come the bits that were rendered; another generator makes another photo and edit of them."""
    first = render_scene(3, 40, 48, tmp_path, exterior)
    (kept,) = tmp_path.iterdir()
    again = render_scene(3, 40, 48, tmp_path, exterior)
    for name in ("radiance", "outside", "neutral", "tones", "exterior"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    assert first.radiance.dtype == np.float16 and first.radiance.shape == (40, 48, 3)
    whole = kept.read_bytes()
    for damaged in (b"", b"scene", whole[: len(whole) // 2]):  # it is this file that is read
        kept.write_bytes(damaged)
        with pytest.raises(UserError, match="got a damaged file"):
            render_scene(3, 40, 48, tmp_path, exterior)
    for develop in (photograph, edit):
        one, same, other = (develop(np.random.default_rng(seed), first) for seed in (1, 1, 2))
        assert np.array_equal(one, same) and not np.array_equal(one, other)


@pytest.fixture(scope="module")
def houses():
    """Exteriors, each with its photo and its edit."""
    made = []
    for seed in range(10):
        scene = render_scene(seed, 40, 56, exterior=True)
        made.append((scene, photograph(np.random.default_rng([seed, 1]), scene), edit(np.random.default_rng([seed, 2]), scene)))
    return made


def test_an_exterior_has_its_sky_above_and_its_lawn_below(houses):
    for scene, *_ in houses:
        assert scene.exterior and np.isfinite(scene.radiance).all()
        assert scene.outside[:3].mean() > 0.3 and not scene.outside[-12:].any()
    skies = [(target / 255)[scene.outside == 1].mean(0) for scene, _, target in houses]
    lawns = [np.median(target[-8:] / 255, (0, 1)) for _, _, target in houses]
    assert np.mean(skies, 0) @ LUMA > np.mean(lawns, 0) @ LUMA + 0.03
    assert np.mean([sky[2] - sky[0] for sky in skies]) > 0.02 > np.mean([lawn[2] - lawn[1] for lawn in lawns])


def test_houses_are_lit_at_dusk():
    """Where the sky is dim their windows and lamps are what shines, in warm light."""
    found = []
    for seed in range(16):
        stage = House(seed)
        lit = [shape for shape in stage.shapes if shape.emit is not None and shape.emit.any()]
        assert bool(lit) == stage.evening == bool(stage.lamps) and not (stage.evening and stage.sunlight.any())
        found += [shape.emit for shape in lit]
    assert found and all(red > blue for red, _, blue in found)


def test_exteriors_are_brought_to_their_own_luma(houses):
    for pictures, look in (
        ([source for _, source, _ in houses], SOURCE_OUTDOORS),
        ([target for *_, target in houses], TARGET_OUTDOORS),
    ):
        reached = np.mean([np.percentile(picture / 255 @ LUMA, PERCENTILES) for picture in pictures], 0)
        assert (abs(reached - look.luma) < 0.7 * np.array(look.luma_sd)).all(), reached


def test_pin_reaches_the_luma_and_the_walls_it_is_given(scenes):
    exact = replace(TARGET, pinned=(1,) * 7, walls_pinned=1)
    goal = np.array([0.1, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9])
    wide = []
    for source, _ in scenes:
        pinned = pin(source, exact, goal, np.array([1.0, 5.0]))
        assert np.abs(np.percentile(pinned @ LUMA, PERCENTILES) - goal).max() < 0.02
        wide.append(np.abs(np.median(to_lab(pinned)[walls_of(pinned)][:, 1:], 0) - [1, 5]))
    assert np.mean(wide) < 1  # other pixels count as walls once colours have changed


def test_an_edit_is_tilted_and_pinned_after_it(monkeypatch):
    """However light its ceiling is made, it has the luma that was drawn."""
    scene, made = render_scene(3, 96, 128), []
    for tilt in (0, 0.6):
        monkeypatch.setattr("autohdr.data.synthetic.editor.TARGET", replace(TARGET, pinned=(1,) * 7, tilt=tilt, tilt_sd=0))
        made.append(edit(np.random.default_rng(1), scene) / 255)
    flat, tilted = (np.percentile(picture @ LUMA, PERCENTILES) for picture in made)
    assert np.abs(flat - tilted).max() < 0.02
    assert abs(statistics(*made)["tilt"] - 0.6) < 0.15


def test_exteriors_are_not_tilted(monkeypatch):
    scene, made = render_scene(3, 40, 56, exterior=True), []
    for tilt in (0, 0.6):
        monkeypatch.setattr("autohdr.data.synthetic.editor.TARGET", replace(TARGET, tilt=tilt))
        made.append(edit(np.random.default_rng(1), scene))
    assert np.array_equal(*made) and TARGET_OUTDOORS.tilt == TARGET_OUTDOORS.tilt_sd == 0


def test_source_and_target_are_aligned(scenes):
    """Log-luma edges of the two agree better in place than one pixel off, in every scene."""
    for source, target in scenes:
        a, b = (np.diff(np.log(x @ LUMA + 0.1), axis=1) for x in (source, target))
        score = {k: np.corrcoef(a[:, 2:-2].ravel(), b[:, 2 + k : b.shape[1] - 2 + k].ravel())[0, 1] for k in (-1, 0, 1)}
        assert score[0] > 0.5
        assert score[0] > max(score[-1], score[1]) + 0.2


def test_sizes_show_the_same_room():
    small = render_pair(3, 48, 64)[1] / 255
    large = render_pair(3, 96, 128)[1].reshape(48, 2, 64, 2, 3).mean((1, 3)) / 255
    assert psnr(small, large) > 20


def test_strips_leave_no_seam(monkeypatch):
    whole = render_pair(5, 64, 64)[1]
    monkeypatch.setattr("autohdr.data.synthetic.render._STRIP", 64 * 16)
    assert np.abs(whole.astype(int) - render_pair(5, 64, 64)[1]).max() <= 2


def test_synthesize_writes_the_same_files_with_any_number_of_workers(tmp_path):
    one = synthesize(tmp_path / "one", 3, 32, 48, seed=4, workers=1, progress=False)
    two = synthesize(tmp_path / "two", 3, 32, 48, seed=4, workers=2, progress=False)
    assert one == tmp_path / "one" / "pairs.jsonl"
    assert one.read_bytes() == two.read_bytes()
    pairs = [json.loads(line) for line in one.read_text().splitlines()]
    assert pairs[0] == {"src": "images/0000_src.jpg", "tar": "images/0000_tar.jpg"} and len(pairs) == 3
    for pair in pairs:
        for name in pair.values():
            assert (one.parent / name).read_bytes() == (two.parent / name).read_bytes()
            assert Image.open(one.parent / name).size == (48, 32)


def test_exteriors_are_the_last_pairs(tmp_path):
    """The rooms before them are those that a call without exteriors makes."""
    rooms, mixed = (synthesize(tmp_path / str(n), 3, 32, 48, seed=4, workers=1, progress=False, exteriors=n) for n in (0, 2))
    for number, same in ((0, True), (1, False), (2, False)):
        images = [(path.parent / f"images/000{number}_tar.jpg").read_bytes() for path in (rooms, mixed)]
        assert (images[0] == images[1]) == same
    for exteriors in (-1, 4):
        with pytest.raises(UserError, match=f"exteriors must be from 0 to count, 3, got {exteriors}"):
            synthesize(tmp_path / "none", 3, 32, 48, exteriors=exteriors)
    assert not (tmp_path / "none").exists()


def test_synthesize_starts_anew_in_its_own_folder(tmp_path, monkeypatch):
    synthesize(tmp_path, 2, 32, 32, workers=1, progress=False)
    synthesize(tmp_path, 1, 32, 32, workers=1, progress=False)
    assert sorted(p.name for p in (tmp_path / "images").iterdir()) == ["0000_src.jpg", "0000_tar.jpg"]

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("autohdr.data.synthetic.pairs.render_pair", interrupted)
    with pytest.raises(KeyboardInterrupt):
        synthesize(tmp_path, 1, 32, 32, workers=1, progress=False)
    assert not (tmp_path / "pairs.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"height": 31}, "at least 32, got 31 x 40"),
        ({"width": 8}, "at least 32, got 40 x 8"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"workers": 100_000}, r"workers: expected at most \d+, got 100000"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
    ],
)
def test_synthesize_rejects_bad_arguments(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        synthesize(tmp_path / "out", **{"count": 1, "height": 40, "width": 40, **arguments})
    assert not (tmp_path / "out").exists()


def test_render_rejects_bad_arguments():
    with pytest.raises(UserError, match="at least 32"):
        render_pair(0, 16, 64)
    with pytest.raises(UserError, match="seed must be 0 or more"):
        render_pair(-1, 64, 64)


def test_synthesize_refuses_a_folder_it_did_not_make(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"dear")
    with pytest.raises(UserError, match="expected an empty folder"):
        synthesize(tmp_path, 1, 32, 32)
    assert (tmp_path / "holiday.jpg").read_bytes() == b"dear"
    with pytest.raises(UserError, match="got a file"):
        synthesize(tmp_path / "holiday.jpg", 1, 32, 32)


def test_degraded_photos_are_like_real_sources(rooms, tmp_path):
    """From finished rooms alone come sources with the statistics of real ones, beside the finished photos as they were."""
    finals, edits = tmp_path / "finals", [from_float(target) for _, target in rooms]
    finals.mkdir()
    for number, pixels in enumerate(edits):
        Image.fromarray(pixels).save(finals / f"{number:02}.png")
    made = degrade(finals, tmp_path / "pairs", workers=1, progress=False)
    pairs = read_pairs(made.pairs)
    assert made.count == len(pairs) == 60 and not made.skipped
    found = []
    for pair, pixels in zip(pairs, edits, strict=True):
        source, target = read_rgb(pair.src), read_rgb(pair.tar)
        assert psnr(target, pixels / 255) > 32
        found.append(statistics(source, target))
    for name in [name for name in REAL if name.startswith(("source_luma", "source_walls"))]:
        mean, (real, real_sd) = np.nanmean([each.get(name, np.nan) for each in found]), REAL[name]
        assert abs(mean - real) < 0.6 * real_sd, name


def test_degrade_is_the_same_with_any_number_of_workers_and_takes_strange_photos(tmp_path):
    finals = tmp_path / "finals"
    finals.mkdir()
    for name, colour in (("black", 0), ("white", 255)):
        Image.new("RGB", (40, 64), (colour,) * 3).save(finals / f"{name}.png")
    Image.new("L", (200, 100), 90).save(finals / "grey.tif")
    Image.new("RGB", (20, 90)).save(finals / "narrow.png")
    (finals / ".trash").mkdir()
    Image.new("RGB", (64, 64)).save(finals / ".trash" / "hidden.png")
    one = degrade(finals, tmp_path / "one", size=96, workers=1, progress=False)
    two = degrade(finals, tmp_path / "two", size=96, workers=2, progress=False)
    assert [(path.name, reason.rsplit("got ")[1]) for path, reason in one.skipped] == [("narrow.png", "90 x 20")]
    assert one.pairs.read_bytes() == two.pairs.read_bytes()
    for pair, other in zip(read_pairs(one.pairs), read_pairs(two.pairs), strict=True):
        assert pair.src.read_bytes() == other.src.read_bytes()
    assert check_pairs(read_pairs(one.pairs)) == [(64, 40), (48, 96), (64, 40)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 31}, "size must be at least 32, got 31"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
    ],
)
def test_degrade_rejects_bad_arguments(tmp_path, arguments, message):
    with pytest.raises(UserError, match="got none in"):
        degrade(tmp_path, tmp_path / "out")
    Image.new("RGB", (16, 16)).save(tmp_path / "small.png")
    with pytest.raises(UserError, match=message):
        degrade(tmp_path, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"none of 1 photos could be used; .*small.png: .*got 16 x 16"):
        degrade(tmp_path, tmp_path / "out", workers=1, progress=False)
