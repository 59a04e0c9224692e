import math

import pytest

from autohdr.errors import UserError
from autohdr.score import Points, pareto_front

FREE = {"parameters": 0, "seconds_per_megapixel": 0, "macs_per_megapixel": 0}


def test_quality_is_the_mean_of_its_parts_between_their_points():
    points = Points()
    assert points.quality({"psnr": 20, "ssim": 0.95, "delta_e2000": 9}) == pytest.approx((0.5 + 1 + 0.5) / 3)
    assert points.quality({"psnr": math.inf, "ssim": 1, "delta_e2000": 0}) == 1
    assert points.quality({"psnr": 3, "ssim": 0.1, "delta_e2000": 40}) == 0


def test_cost_goes_by_the_logarithm():
    points = Points()
    costs = {"parameters": 1e6, "seconds_per_megapixel": 1, "macs_per_megapixel": 1e13}
    assert points.cost(costs) == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert points.cost(FREE) == 1
    assert points.cost({"parameters": 1e9, "seconds_per_megapixel": 1e3, "macs_per_megapixel": 1e15}) == 0


def test_points_and_weight_can_be_changed():
    points = Points(psnr=(20, 30), parameters=(1e6, 1e2), quality_weight=0.5)
    assert points.quality({"psnr": 30, "ssim": 0.8, "delta_e2000": 15}) == pytest.approx(1 / 3)
    assert points.cost(FREE | {"parameters": 1e4}) == pytest.approx(2.5 / 3)
    assert points.score(0.4, 0.8) == pytest.approx(0.6) and Points().score(0.4, 0.8) == pytest.approx(0.52)


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"quality_weight": 1.5}, "quality_weight must be from 0 to 1, got 1.5"),
        ({"psnr": (20, 20)}, "psnr: expected two different finite numbers, .* got 20 20"),
        ({"ssim": (math.nan, 1)}, "ssim: expected two different finite numbers"),
        ({"parameters": (1e8, 0)}, "parameters: expected two different finite numbers above 0"),
    ],
)
def test_points_that_mean_nothing_are_refused(wrong, said):
    with pytest.raises(UserError, match=said):
        Points(**wrong)


def test_pareto_front():
    methods = {
        "dear and good": (0.2, 0.9),
        "cheap": (1.0, 0.1),
        "beaten": (0.2, 0.8),
        "twin": (0.2, 0.9),
        "as cheap": (1.0, 0.05),
    }
    assert pareto_front(methods) == ["dear and good", "cheap", "twin"]
