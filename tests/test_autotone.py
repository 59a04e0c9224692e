import numpy as np
import pytest

from autohdr.autotone import auto_tone
from autohdr.errors import UserError


def test_gain_then_gamma():
    ramp = np.repeat(np.linspace(0, 0.5, 1001, dtype=np.float32)[None, :, None], 3, axis=2)
    toned = auto_tone(ramp, clip=0.1, gamma=0.5)
    assert toned.dtype == np.float32 and toned.shape == ramp.shape
    np.testing.assert_allclose(toned, np.minimum(ramp / 0.45, 1) ** 0.5, atol=1e-5)
    assert (toned == 1).mean() == pytest.approx(0.1, abs=0.002)


def test_same_curve_for_every_channel_and_pixel():
    image = np.random.default_rng(0).random((20, 30, 3), dtype=np.float32) * 0.6
    before, toned = image.copy(), auto_tone(image)
    assert (image == before).all()
    order = np.argsort(image, axis=None)
    assert (np.diff(toned.flatten()[order]) >= 0).all() and toned.max() <= 1 and toned.mean() > image.mean()


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_black_and_white_stay(value):
    flat = np.full((4, 5, 3), value, dtype=np.float32)
    np.testing.assert_allclose(auto_tone(flat), flat, atol=1e-6)


def test_rejects_bad_input():
    image = np.zeros((4, 4, 3), dtype=np.float32)
    for bad in (image[..., 0], image.astype(np.uint8), image.astype(np.float64), image[:0], np.zeros((4, 4, 4), "f4")):
        with pytest.raises(UserError, match=r"image must be float32 \[H, W, 3\]"):
            auto_tone(bad)
    for bad in ({"clip": 1.0}, {"clip": -0.1}, {"gamma": 0.0}, {"gamma": float("nan")}):
        with pytest.raises(UserError, match="expected 0 <= clip < 1 and gamma > 0"):
            auto_tone(image, **bad)
