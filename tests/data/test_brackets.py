"""Brackets of a rendered room, whose light is known: merged, aligned, without ghosts; and which photos are a set."""

import numpy as np
import pytest

from autohdr.data.brackets import lay, merge, settle, tone
from autohdr.data.synthetic import render_scene
from autohdr.data.synthetic.pixels import encode
from autohdr.errors import UserError

LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)
MARGIN = 12


@pytest.fixture(scope="module")
def room():
    """Light of a room with large windows, darker to one corner, and a margin around the picture."""
    scene = render_scene(112, 120 + 2 * MARGIN, 180 + 2 * MARGIN)
    light = scene.radiance.astype(np.float32) / scene.neutral
    down, across = (np.linspace(1, 0, side, dtype=np.float32) for side in light.shape[:2])
    light *= np.float32(10) ** -((1 - down[:, None, None]) * across[:, None])
    return light * np.float32(0.2 / np.percentile(light @ LUMA, 75))


def framed(light, shift=(0, 0)):
    """The picture, its content moved down and to the right."""
    (height, width), (down, right) = light.shape[:2], shift
    return light[MARGIN - down : height - MARGIN - down, MARGIN - right : width - MARGIN - right]


def shoot(light, stop, shift=(0, 0), seed=0, dtype=np.uint8, curve=None):
    """What a camera stores of light: clipped, with shot and read noise."""
    exposed = framed(light, shift) * np.float32(2.0**stop)
    noise = np.random.default_rng([seed, int(10 * stop) + 100]).standard_normal(exposed.shape, np.float32)
    stored = encode(exposed + np.sqrt(exposed * 1e-4 + 1e-6) * noise)
    stored = curve(stored) if curve else stored
    return np.rint(stored * np.iinfo(dtype).max).astype(dtype)


def contrast(stored):
    """A camera's curve: darker shadows, brighter highlights."""
    return 0.6 * stored + 0.4 * (3 * stored**2 - 2 * stored**3)


def off(light, truth, last=2):
    """How far light is from the truth, as logarithms, where exposures up to +-last stops see it."""
    seen = (truth.min(2) * 2**last > 0.004) & (truth.max(2) / 2**last < 0.9)
    assert seen.mean() > 0.9
    return np.abs(np.log(np.maximum(light, 1e-6) / truth))[seen]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("stops", [(-2, 0, 2), (-4, -2, 0, 2, 4)])
def test_light_is_recovered_where_any_exposure_sees_it(room, stops, dtype):
    shots = [shoot(room, stop, dtype=dtype) for stop in stops]
    white = np.iinfo(dtype).max
    assert (shots[len(stops) // 2].min(2) == white).mean() > 0.02 and (shots[0].max(2) < 0.05 * white).mean() > 0.01
    errors = off(merge(shots, stops), framed(room))
    assert np.median(errors) < 0.02 and np.percentile(errors, 99) < 0.1


@pytest.mark.parametrize("shift", [(0, 0), (3, -4), (-5, 5), (1, 0)])
def test_exposures_are_aligned_to_a_pixel(room, shift):
    samples = shoot(room, -2), shoot(room, 0), shoot(room, 2, shift)
    dark, _, bright = lay(samples, (-2, 0, 2))
    assert bright.shift == shift and dark.shift == (0, 0)
    assert bright.agreement > 0.95 and dark.agreement > 0.95
    errors = off(merge(samples, (-2, 0, 2)), framed(room))
    assert np.percentile(errors, 99) < 0.15


def test_what_moves_is_as_the_middle_exposure_has_it(room):
    def with_cat(column):
        light = room.copy()
        light[100:120, column : column + 20] = (0.03, 0.02, 0.015)
        return light

    seen = [with_cat(column) for column in (40, 80, 120)]
    shots = [shoot(light, stop) for light, stop in zip(seen, (-2, 0, 2), strict=True)]
    light, truth = merge(shots, (-2, 0, 2)), framed(seen[1])
    places = np.s_[100 - MARGIN : 120 - MARGIN, 40 - MARGIN : 140 - MARGIN]
    blocks = [x[places].reshape(4, 5, 20, 5, 3).mean((1, 3)) for x in (light, truth)]
    assert np.abs(np.log(blocks[0] / blocks[1])).max() < 0.1
    assert np.percentile(off(light, truth), 99) < 0.25


def test_the_cameras_curve_is_found(room):
    """Without it the exposures would contradict each other."""
    shots = [shoot(room, stop, curve=contrast) for stop in (-2, 0, 2)]
    light, truth = merge(shots, (-2, 0, 2)), framed(room)
    scale = np.median(light / truth)
    errors = off(light / scale, truth)
    assert np.median(errors) < 0.06 and np.percentile(errors, 95) < 0.2
    _, response = settle(shots, (-2, 0, 2))
    assert np.abs(response).max() > 0.2
    _, response = settle([shoot(room, stop) for stop in (-2, 0, 2)], (-2, 0, 2))
    assert np.abs(response).max() < 0.05


@pytest.mark.parametrize("stops", [None, (0, 0.1, 0.2)])
def test_exposures_that_are_not_known_or_wrong_are_gauged(room, stops):
    shots = [shoot(room, stop) for stop in (-2, 0, 2)]
    gauged, _ = settle(shots, stops)
    np.testing.assert_allclose(np.diff(gauged), 2, atol=0.05)
    assert np.median(off(merge(shots, stops), framed(room))) < 0.05


def test_the_toned_merge_is_like_an_unedited_photo(room):
    picture = tone(framed(room))
    assert picture.dtype == np.float32 and picture.max() < 1 and picture.min() >= 0
    assert abs(np.percentile(picture @ LUMA, 75) - 0.465) < 0.02
    lighter = tone(framed(room) * 7)
    np.testing.assert_allclose(lighter, picture, atol=2e-3)
    windows = framed(room).min(2) > 1
    assert windows.mean() > 0.02 and np.std(picture[windows] @ LUMA) > 0.02
    assert (shoot(room, 0)[windows] > 250).all()


@pytest.mark.parametrize("value", [0, 255])
def test_black_and_burnt_out_photos_stay_finite(value):
    samples = [np.full((7, 33, 3), value, np.uint8)] * 3
    assert np.isfinite(tone(merge(samples, (-2, 0, 2)))).all()
    with pytest.raises(UserError, match="too little is seen by two of them"):
        merge(samples)


def test_what_a_shifted_exposure_has_not_seen_does_not_count(room):
    """Else the border, black in the middle one but for a trace, would be darker still."""
    light = room.copy()
    light[-MARGIN - 8 :] = 1 / 255 / 12.92
    views = (0.25, (0, 0)), (1, (0, 0)), (4, (5, 0))
    shots = [np.rint(encode(framed(light, shift) * np.float32(time)) * 255).astype(np.uint8) for time, shift in views]
    merged = merge(shots, (-2, 0, 2))
    np.testing.assert_allclose(merged[-5:], np.broadcast_to(merged[-6], merged[-5:].shape), rtol=0.02)
