"""Which photos are a bracket: by EXIF and by what they show."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import ExifTags, Image

from autohdr.data.bracket_sets import bracket_sets, glimpse, read_set
from autohdr.data.images import read_photo
from autohdr.data.synthetic import render_scene
from autohdr.data.synthetic.pixels import encode

BASE = ExifTags.Base


@pytest.fixture(scope="module")
def rooms():
    lights = [render_scene(seed, 96, 144).radiance.astype(np.float32) for seed in (100, 112)]
    return [light * np.float32(0.2 / np.percentile(light, 75)) for light in lights]


def save(path, light, stop, second=0.0, model="A", bias=False, time=True):
    """A photo of light, developed so many stops brighter than 1/100 s, with its EXIF."""
    noise = np.random.default_rng(int(stop * 10) + 100).standard_normal(light.shape, np.float32)
    exposed = light * np.float32(2.0**stop)
    picture = Image.fromarray(np.rint(encode(exposed + 0.002 * noise) * 255).astype(np.uint8))
    exif = Image.Exif()
    exif[BASE.Make], exif[BASE.Model] = "Maker", model
    details = exif.get_ifd(ExifTags.IFD.Exif)
    if time:
        details[BASE.DateTimeOriginal] = f"2025:06:01 12:{int(second) // 60:02}:{int(second) % 60:02}"
    details[BASE.ExposureTime] = 0.01 if bias else 2.0**stop / 100
    details[BASE.FNumber], details[BASE.ISOSpeedRatings], details[BASE.ExposureBiasValue] = 8.0, 100, float(stop)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, exif=exif, quality=95, subsampling=0)
    return path


def told(folder, count=None):
    """The sets as tuples of names, and the words by name."""
    with ThreadPoolExecutor(2) as pool:
        sets, words = bracket_sets(sorted(folder.rglob("*.*")), count, pool)
    return [tuple(path.stem for path in paths) for paths in sets], {path.stem: text for path, text in words.items()}


@pytest.mark.parametrize("stops", [(0, -2, 2), (0, -1, 1, -2, 2), (2, 0, -2)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_set_goes_from_dark_to_bright(tmp_path, rooms, stops, bias):
    """Whether a camera exposed longer, or the photos were developed brighter."""
    for number, stop in enumerate(stops):
        save(tmp_path / f"{number}.jpg", rooms[0], stop, number, bias=bias)
    order = tuple(str(stops.index(stop)) for stop in sorted(stops))
    assert told(tmp_path) == ([order], {})
    assert told(tmp_path, len(stops)) == ([order], {})


def test_singles_before_between_and_after_sets(tmp_path, rooms):
    """Two sets back to back, of two rooms and of one, with singles a second away."""
    plan = [(0, 0), (0, -2), (0, 0), (0, 2), (0, -2), (0, 0), (0, 2), (1, -2), (1, 0), (1, 2), (1, 0)]
    for number, (room, stop) in enumerate(plan):
        save(tmp_path / f"{number:02}.jpg", rooms[room], stop, number)
    sets, words = told(tmp_path)
    assert sorted(sets) == [("01", "02", "03"), ("04", "05", "06"), ("07", "08", "09")] and not words


def test_a_single_of_the_same_picture_before_a_set(tmp_path, rooms):
    """A camera's exposures are evenly apart."""
    for number, stop in enumerate((1, -2, 0, 2)):
        save(tmp_path / f"{number}.jpg", rooms[0], stop, number)
    assert told(tmp_path) == ([("1", "2", "3")], {})


def test_photos_of_different_rooms_folders_cameras_or_times_are_no_set(tmp_path, rooms):
    for number, stop in enumerate((-2, 0, 2)):
        save(tmp_path / f"rooms/r{number}.jpg", rooms[number % 2], stop, number)
        save(tmp_path / f"folder{number}/f{number}.jpg", rooms[0], stop, number)
        save(tmp_path / f"cameras/c{number}.jpg", rooms[0], stop, number, model="ABC"[number])
        save(tmp_path / f"times/t{number}.jpg", rooms[0], stop, 60 * number)
        save(tmp_path / f"sizes/s{number}.jpg", rooms[0][number:], stop, number)
    sets, words = told(tmp_path)
    assert sets == [] and {name[0] for name in words} == {"r"}
    assert words["r0"] == "no bracket of 3, 5, 7 or 9 can be told for it and its neighbours: it is taken for a single photo"


def test_two_cameras_at_once(tmp_path, rooms):
    for number, stop in enumerate((-2, 0, 2)):
        for model, room in zip("AB", rooms, strict=True):
            save(tmp_path / f"{model}{number}.jpg", room, stop, number, model=model)
    assert sorted(told(tmp_path)[0]) == [("A0", "A1", "A2"), ("B0", "B1", "B2")]


def test_without_exif_photos_are_single_unless_a_number_is_given(tmp_path, rooms):
    for number, stop in enumerate((0, 2, -2, 0)):
        save(tmp_path / f"{number}.jpg", rooms[0], stop, time=False)
        Image.open(tmp_path / f"{number}.jpg").save(tmp_path / f"{number}.png", exif=b"")
        (tmp_path / f"{number}.jpg").unlink()
    sets, words = told(tmp_path)
    assert not sets and set(words) == set("0123")
    assert words["0"] == "its EXIF does not say when and how it was exposed: it is taken for a single photo"
    sets, words = told(tmp_path, 3)
    assert sets == [("2", "0", "1")] and set(words) == {"3"}


def test_a_set_of_another_number_than_asked_for_stays_single(tmp_path, rooms):
    for number, stop in enumerate((-2, 2)):
        save(tmp_path / f"{number}.jpg", rooms[0], stop, number)
    sets, words = told(tmp_path)
    assert not sets and set(words) == {"0", "1"}
    save(tmp_path / "2.jpg", rooms[0], 0, 2)
    assert told(tmp_path, 5)[0] == [] and told(tmp_path, 3)[0] == [("0", "2", "1")]


def test_damaged_photos_are_single(tmp_path):
    (tmp_path / "a.jpg").write_text("no photo")
    (tmp_path / "b.jpg").write_bytes(b"")
    sets, words = told(tmp_path)
    assert not sets and set(words) == {"a", "b"}


def test_a_set_is_read_with_what_the_middle_one_says(tmp_path, rooms):
    paths = [save(tmp_path / f"{stop}.jpg", rooms[1], stop) for stop in (-2, 0, 2)]
    photo, middle = read_set(paths), read_photo(paths[1])
    assert photo.pixels.dtype == np.float32 and photo.pixels.shape == middle.pixels.shape and photo.pixels.max() < 1
    np.testing.assert_allclose(glimpse(paths, 1000), photo.pixels, atol=1e-6)
    halved = photo.pixels.reshape(48, 2, 72, 2, 3).mean((1, 3))
    np.testing.assert_allclose(np.mean(np.abs(glimpse(paths, 48) - halved)), 0, atol=0.02)
    assert (photo.exif, photo.format, photo.depth, photo.options) == (middle.exif, "JPEG", 8, middle.options)
