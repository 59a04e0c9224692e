import numpy as np
import pytest
import torch

from autohdr.autotone import (
    BALANCE,
    FINISHED,
    PINNED,
    SATURATION,
    auto_tone,
    gain_and_gamma,
    luma,
    pinning,
    thumbnail,
    unfinished,
    walls_of,
)
from autohdr.errors import UserError
from autohdr.kernels import apply_edit


def room(seed=0, height=60, width=80, tint=(1.0, 0.9, 0.7)):
    """Dim, tinted walls, darker furniture, a bright window."""
    rng = np.random.default_rng(seed)
    image = np.full((height, width, 3), 0.45) * tint + rng.normal(0, 0.02, (height, width, 1))
    image[height // 2 :] = rng.random((height // 2, width, 3)) * 0.3
    image[5:10, 5:10] = 0.95
    return image.clip(0, 1).astype(np.float32)


def luma_of(image):
    return image @ np.array([0.2126, 0.7152, 0.0722], np.float32)


@pytest.mark.parametrize("height, width", [(60, 80), (900, 1204)])
def test_pins_the_percentiles(height, width):
    edited = luma_of(auto_tone(room(height=height, width=width)))
    for share, value in PINNED[:2]:
        assert np.quantile(edited, share) == pytest.approx(value, abs=0.03)


def test_balances_the_walls():
    before = room()
    after = auto_tone(before)
    ratios = [image[15:28].mean((0, 1))[2] / image[15:28].mean((0, 1))[0] for image in (before, after)]
    assert ratios[0] == pytest.approx(0.7, abs=0.02) and 0.7 ** (1 - BALANCE) - 0.03 < ratios[1] < 1


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_samples_are_toned_as_floats(dtype):
    white = np.iinfo(dtype).max
    samples = (room() * white).round().astype(dtype)
    edited = auto_tone(samples)
    assert edited.dtype == dtype
    np.testing.assert_allclose(edited, auto_tone((samples / white).astype(np.float32)) * white, atol=1)


def test_a_photo_stays_as_it_was_and_light_stays_in_order():
    image = room(tint=(1, 1, 1)).mean(2, keepdims=True).repeat(3, 2)
    before, toned = image.copy(), auto_tone(image)
    assert (image == before).all() and toned.shape == image.shape and toned.dtype == np.float32
    order = np.argsort(image[..., 0], axis=None)
    assert (np.diff(toned[..., 1].flatten()[order]) >= -1e-6).all()
    assert 0 <= toned.min() and toned.max() <= 1


def test_leaves_less_colour_than_the_curves_alone():
    x = torch.from_numpy(room()).permute(2, 0, 1)[None]
    curves, matrix, *_ = pinning(thumbnail(x))
    curved, edited = apply_edit(x, curves, torch.eye(3, 4)[None]), apply_edit(x, curves, matrix)
    distance = [image - luma(image)[:, None] for image in (curved, edited)]
    torch.testing.assert_close(distance[1], SATURATION * distance[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(luma(edited), luma(curved), rtol=1e-4, atol=1e-5)


def test_a_finished_photo_stays_as_it_is():
    bright = room() ** 0.3  # its 75th percentile is above the pin
    np.testing.assert_allclose(auto_tone(bright), bright, atol=1e-6)
    needed = [
        unfinished(torch.full((1, 3, 4, 4), PINNED[0][1] - below)).item() for below in (0.2, FINISHED, FINISHED / 2, 0, -0.1)
    ]
    assert needed == pytest.approx([1, 1, 0.5, 0, 0], abs=1e-4)


def test_what_is_burnt_out_stays_white():
    burnt = room()
    burnt[:20, :20] = 1
    edited = auto_tone(burnt)
    np.testing.assert_allclose(edited[:20, :20], 1, atol=1e-4)
    ramp = np.linspace(0, 1, 500, dtype=np.float32)[:, None, None] * np.array([1, 0.85, 0.6], np.float32)
    curves, *_ = pinning(thumbnail(torch.from_numpy(ramp.repeat(2, 1)).permute(2, 0, 1)[None]))
    assert (curves.diff(dim=2) >= 0).all()


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_flat_photos_stay_flat_and_finite(value):
    toned = auto_tone(np.full((4, 5, 3), value, dtype=np.float32))
    assert np.isfinite(toned).all() and toned.min() == toned.max() and (value or toned.max() < 0.01)


def test_a_batch_is_toned_as_its_photos_are():
    photos = torch.stack(
        [torch.from_numpy(room(seed, tint=(1, 0.9, tint))).permute(2, 0, 1) for seed, tint in enumerate((0.6, 1))]
    )
    together = pinning(thumbnail(photos))
    for i, photo in enumerate(photos):
        for whole, one in zip(together, pinning(thumbnail(photo[None])), strict=True):
            torch.testing.assert_close(whole[i], one[0])


def test_thumbnail_is_a_mean_over_cells():
    x = torch.rand(1, 3, 256, 384)
    torch.testing.assert_close(thumbnail(x), x.view(1, 3, 128, 2, 128, 3).mean((3, 5)))
    samples = (x * 255).round().to(torch.uint8)
    torch.testing.assert_close(thumbnail(samples), thumbnail(samples / 255))
    assert thumbnail(torch.rand(1, 3, 5000, 7)).shape == (1, 3, 128, 128)


def test_arrays_and_tensors_get_the_same_recipe():
    photos = np.stack([room(seed, 260, 300, tint).transpose(2, 0, 1) for seed, tint in enumerate(((1, 0.9, 0.7), (0.6, 1, 1)))])
    for one, other in zip(pinning(thumbnail(photos)), pinning(thumbnail(torch.from_numpy(photos))), strict=True):
        assert one.dtype == np.float32
        torch.testing.assert_close(torch.from_numpy(one), other, rtol=1e-5, atol=1e-6)


def test_wall_colour_ignores_window_and_furniture():
    small = thumbnail(torch.from_numpy(room()).permute(2, 0, 1)[None])
    walls = walls_of(small)[0][0]
    torch.testing.assert_close(
        walls / luma(walls[None]), torch.tensor([1, 0.9, 0.7]) / (0.2126 + 0.9 * 0.7152 + 0.7 * 0.0722), rtol=0.03, atol=0
    )


def test_gain_then_gamma():
    ramp = np.repeat(np.linspace(0, 0.5, 1001, dtype=np.float32)[None, :, None], 3, axis=2)
    toned = gain_and_gamma(ramp, clip=0.1, gamma=0.5)
    assert toned.dtype == np.float32 and toned.shape == ramp.shape
    np.testing.assert_allclose(toned, np.minimum(ramp / 0.45, 1) ** 0.5, atol=1e-5)
    assert (toned == 1).mean() == pytest.approx(0.1, abs=0.002)


def test_gain_and_gamma_is_one_curve():
    image = np.random.default_rng(0).random((20, 30, 3), dtype=np.float32) * 0.6
    before, toned = image.copy(), gain_and_gamma(image)
    assert (image == before).all()
    order = np.argsort(image, axis=None)
    assert (np.diff(toned.flatten()[order]) >= 0).all() and toned.max() <= 1 and toned.mean() > image.mean()


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_gain_and_gamma_leaves_black_and_white(value):
    flat = np.full((4, 5, 3), value, dtype=np.float32)
    np.testing.assert_allclose(gain_and_gamma(flat), flat, atol=1e-6)


def test_rejects_bad_input():
    image = np.zeros((4, 4, 3), dtype=np.float32)
    for recipe, kinds in ((auto_tone, "float32 or uint8 or uint16"), (gain_and_gamma, "float32")):
        for bad in (image[..., 0], image.astype(np.float64), image[:0], np.zeros((4, 4, 4), "f4")):
            with pytest.raises(UserError, match=rf"{recipe.__name__}: image must be {kinds} \[H, W, 3\]"):
                recipe(bad)
    for bad in ({"clip": 1.0}, {"clip": -0.1}, {"gamma": 0.0}, {"gamma": float("nan")}):
        with pytest.raises(UserError, match="expected 0 <= clip < 1 and gamma > 0"):
            gain_and_gamma(image, **bad)
