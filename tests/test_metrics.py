"""Metrics against the published ΔE2000 pairs and against constants computed with scikit-image 0.26 and scipy 1.17."""

import math

import pytest
import torch

from autohdr import metrics
from autohdr.data.colour import encode_srgb
from autohdr.errors import UserError

ALL = metrics.METRICS | metrics.DETAILS

# Sharma, Wu and Dalal 2005, table 1: L1 a1 b1, L2 a2 b2, ΔE00.
SHARMA = """
50.0000 2.6772 -79.7751 50.0000 0.0000 -82.7485 2.0425
50.0000 3.1571 -77.2803 50.0000 0.0000 -82.7485 2.8615
50.0000 2.8361 -74.0200 50.0000 0.0000 -82.7485 3.4412
50.0000 -1.3802 -84.2814 50.0000 0.0000 -82.7485 1.0000
50.0000 -1.1848 -84.8006 50.0000 0.0000 -82.7485 1.0000
50.0000 -0.9009 -85.5211 50.0000 0.0000 -82.7485 1.0000
50.0000 0.0000 0.0000 50.0000 -1.0000 2.0000 2.3669
50.0000 -1.0000 2.0000 50.0000 0.0000 0.0000 2.3669
50.0000 2.4900 -0.0010 50.0000 -2.4900 0.0009 7.1792
50.0000 2.4900 -0.0010 50.0000 -2.4900 0.0010 7.1792
50.0000 2.4900 -0.0010 50.0000 -2.4900 0.0011 7.2195
50.0000 2.4900 -0.0010 50.0000 -2.4900 0.0012 7.2195
50.0000 -0.0010 2.4900 50.0000 0.0009 -2.4900 4.8045
50.0000 -0.0010 2.4900 50.0000 0.0010 -2.4900 4.8045
50.0000 -0.0010 2.4900 50.0000 0.0011 -2.4900 4.7461
50.0000 2.5000 0.0000 50.0000 0.0000 -2.5000 4.3065
50.0000 2.5000 0.0000 73.0000 25.0000 -18.0000 27.1492
50.0000 2.5000 0.0000 61.0000 -5.0000 29.0000 22.8977
50.0000 2.5000 0.0000 56.0000 -27.0000 -3.0000 31.9030
50.0000 2.5000 0.0000 58.0000 24.0000 15.0000 19.4535
50.0000 2.5000 0.0000 50.0000 3.1736 0.5854 1.0000
50.0000 2.5000 0.0000 50.0000 3.2972 0.0000 1.0000
50.0000 2.5000 0.0000 50.0000 1.8634 0.5757 1.0000
50.0000 2.5000 0.0000 50.0000 3.2592 0.3350 1.0000
60.2574 -34.0099 36.2677 60.4626 -34.1751 39.4387 1.2644
63.0109 -31.0961 -5.8663 62.8187 -29.7946 -4.0864 1.2630
61.2901 3.7196 -5.3901 61.4292 2.2480 -4.9620 1.8731
35.0831 -44.1164 3.7933 35.0232 -40.0716 1.5901 1.8645
22.7233 20.0904 -46.6940 23.0331 14.9730 -42.5619 2.0373
36.4612 47.8580 18.3852 36.2715 50.5065 21.2231 1.4146
90.8027 -2.0831 1.4410 91.1528 -1.6435 0.0447 1.4441
90.9257 -0.5406 -0.9208 88.6381 -0.8985 -0.7239 1.5381
6.7747 -0.2908 -2.4247 5.8714 -0.0985 -2.2286 0.6377
2.0776 0.0795 -1.1350 0.9033 -0.0636 -0.5514 0.9082
"""


def waves(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two different colourful images from integer arithmetic alone, equal on every machine: (1, 3, H, W) float32."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    channels = [(x * (3 + c) + y * (5 - c) + (x * y) % (7 + c) * 9) % 256 for c in range(3)]
    first = torch.stack(channels).float()[None] / 255
    return first, 0.8 * first.flip(1) ** 1.5 + 0.1


def test_agrees_with_scikit_image():
    first, second = waves(41, 57)
    expected = {"l1": 0.20539520, "psnr": 10.68870807, "ssim": 0.33846855, "delta_e2000": 23.12407285}
    for name, metric in metrics.METRICS.items():
        assert metric(first, second).tolist() == pytest.approx([expected[name]], abs=1e-4, rel=1e-5), name


def test_large_image_equals_its_bands(monkeypatch):
    first, second = waves(41, 57)
    whole = {name: metric(first, second) for name, metric in ALL.items()}
    monkeypatch.setattr(metrics, "_BAND_PIXELS", 57 * 4)
    for name, metric in ALL.items():
        torch.testing.assert_close(metric(first, second), whole[name], rtol=1e-5, atol=1e-6)


def test_batch_is_one_figure_per_image():
    first, second = waves(24, 31)
    prediction, target = torch.cat([first, second]), torch.cat([second, second])
    for name, metric in ALL.items():
        value = metric(prediction, target)
        assert value.shape == (2,) and value.dtype == torch.float32
        assert value[0].item() == pytest.approx(metric(first, second).item(), rel=1e-5), name
    assert [metric(second, second).item() for metric in ALL.values()] == [0, math.inf, 1, 0, 0, 0, 0, 1, 0]


def test_known_values():
    black, grey = torch.zeros(1, 3, 16, 16), torch.full((1, 3, 16, 16), 0.1)
    assert metrics.l1(black, grey).item() == pytest.approx(0.1)
    assert metrics.psnr(black, grey).item() == pytest.approx(20)
    assert metrics.ssim(black, grey).item() == pytest.approx(1e-4 / (0.01 + 1e-4))


def test_delta_e2000_published_pairs():
    rows = torch.tensor([[float(v) for v in line.split()] for line in SHARMA.split("\n") if line], dtype=torch.float64)
    assert len(rows) == 34
    lab1, lab2, expected = rows[:, 0:3, None, None], rows[:, 3:6, None, None], rows[:, 6]
    for one, other in ((lab1, lab2), (lab2, lab1)):
        assert (metrics.ciede2000(one, other).flatten() - expected).abs().max() < 1e-4


def test_error_by_tone_is_that_of_its_pixels():
    target = torch.zeros(1, 3, 16, 16)
    target[..., 8:] = 0.5
    target[..., 12:] = 0.9
    prediction = target.clone()
    prediction[..., :8] += 0.1
    prediction[..., 12:] -= 0.3
    errors = [metrics.tone_l1(prediction, target, third).item() for third in range(3)]
    assert errors == pytest.approx([0.1, 0, 0.3], abs=1e-6)
    assert metrics.tone_l1(prediction[..., :12], target[..., :12], 2).isnan().all()


def test_drift_of_colour():
    """Colours of one lightness, built in CIELAB: half the chroma, a quarter of a turn, and none at all."""
    lab = torch.tensor([[60.0, 20.0, 0.0], [60.0, 10.0, 0.0], [60.0, 0.0, 20.0], [60.0, 0.0, 0.0]], dtype=torch.float64)
    y = (lab[:, 0] + 16) / 116
    xyz = torch.stack([y + lab[:, 1] / 500, y, y - lab[:, 2] / 200], 1) ** 3 * lab.new_tensor(metrics._D65_WHITE)
    rgb = encode_srgb(torch.linalg.solve(lab.new_tensor(metrics._RGB_TO_XYZ), xyz.T).T)
    red, pale, yellow, grey = (colour.view(1, 3, 1, 1).expand(-1, -1, 4, 4) for colour in rgb)
    assert metrics.saturation(pale, red).item() == pytest.approx(0.5, abs=1e-4)
    assert metrics.hue(pale, red).item() == pytest.approx(0, abs=1e-2)
    assert metrics.saturation(yellow, red).item() == pytest.approx(1, abs=1e-4)
    assert metrics.hue(yellow, red).item() == pytest.approx(90, abs=1e-2)
    assert metrics.saturation(grey, red).item() == pytest.approx(0, abs=1e-3) and metrics.hue(grey, red).isnan()
    assert metrics.saturation(red, grey).isnan() and metrics.hue(red, grey).isnan()


@pytest.mark.parametrize("name", metrics.METRICS)
def test_rejects_bad_input(name):
    image = torch.zeros(1, 3, 16, 16)
    for other in (torch.zeros(1, 3, 16, 17), torch.zeros(3, 16, 16), torch.zeros(2, 3, 16, 16)):
        with pytest.raises(UserError, match=rf"{name}: prediction and target must both be \[B, 3, H, W\]"):
            metrics.METRICS[name](image, other)
    with pytest.raises(UserError, match=f"{name}: expected floating-point"):
        metrics.METRICS[name](image, image.byte())


def test_ssim_rejects_small_image():
    small = torch.zeros(1, 3, 10, 40)
    with pytest.raises(UserError, match="at least 11 pixels, got 10x40"):
        metrics.ssim(small, small)


def test_mean_interval():
    assert metrics.mean_interval([1.0, 2.0, 3.0, 4.0]) == pytest.approx((2.5, 3.1824463 * math.sqrt(5 / 3) / 2))
    assert metrics.mean_interval([2.0] * 5) == (2, 0)
    mean, half = metrics.mean_interval([7.0])
    assert mean == 7 and math.isnan(half)
    mean, half = metrics.mean_interval([7.0, math.inf])
    assert mean == math.inf and math.isnan(half)
    with pytest.raises(UserError, match="at least one value"):
        metrics.mean_interval([])


def test_t_quantile():
    expected = {1: 12.7062047, 2: 4.3026527, 4: 2.7764451, 9: 2.2621572, 57: 2.0024655, 1000: 1.9623391}
    assert {df: metrics._t_quantile(df) for df in expected} == pytest.approx(expected, rel=1e-7)
