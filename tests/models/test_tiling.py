"""Networks in strips: the whole image's result from every plan, within the memory that was planned."""

import copy
import logging
import re
import subprocess
import sys
import tempfile
import weakref

import pytest
import torch

from autohdr import kernels, measure
from autohdr.errors import UserError
from autohdr.models import create_model, tiling
from autohdr.models.tiling import FILED, MEMORY, PARKED, Plan, make_plan

GB = 10**9
RESIDENT = GB // 2  # what a process holds before it starts on a photo
MODELS = [
    ("restormer_nano", {}),
    ("restormer_official", {}),
    ("restormer_nano", {"norm_bias": False, "num_heads": (2, 2, 1, 4)}),
    ("nafnet_nano", {"encoder_blocks": (1, 0, 2)}),
]


def plan(rows, *places):
    return Plan(rows, places + (MEMORY,) * (5 - len(places)), 0, 0)


PLANS = [
    plan(2),
    plan(6),
    plan(32),
    plan(1000),
    plan(8, PARKED, PARKED, PARKED),
    plan(10, FILED, PARKED, FILED, FILED, FILED),
    plan(4, MEMORY, FILED, MEMORY, MEMORY, FILED),
]


def maps(model):
    return 5 if model.config.name == "restormer_official" else 4


@pytest.fixture(scope="module")
def cases(small):
    """Models with an image of an odd size each, and the result of the whole."""
    made = []
    for name, overrides in MODELS:
        model = small(name, **overrides).eval()
        with torch.no_grad():
            for p in model.parameters():  # attention far from even, so that wrong statistics would show
                p.mul_(1.2)
            image = torch.rand(2, 3, 37, 43)
            made.append((model, image, model(image)))
    return made


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_equals_the_whole(cases, plan):
    for model, image, whole in cases:
        with torch.inference_mode():
            strips = tiling.run(model, image, Plan(plan.rows, plan.places[: maps(model)], 0, 0))
        assert (whole - image).abs().max() > 0.1
        assert (strips - whole).abs().max() <= 1e-5


@pytest.mark.parametrize("size", [(1, 1), (4, 5), (7, 130), (129, 8)], ids=str)
def test_any_size(small, size):
    model, image = small().eval(), torch.rand(1, 3, *size)
    with torch.inference_mode():
        torch.testing.assert_close(tiling.in_strips(model, image, 100 * GB), model(image), atol=1e-5, rtol=0)


def test_on_the_reference_backend(cases):
    model, image, whole = cases[0]
    kernels.set_backend("reference")
    try:
        with torch.inference_mode():
            strips = tiling.run(model, image, Plan(6, (FILED, PARKED, MEMORY, MEMORY), 0, 0))
    finally:
        kernels.set_backend("auto")
    assert (strips - whole).abs().max() <= 1e-5


@pytest.mark.parametrize("case", [0, 3])
def test_autocast_and_bfloat16(cases, case):
    model, image, whole = cases[case]
    with torch.inference_mode():
        with torch.autocast("cpu", torch.bfloat16):
            strips, expected = tiling.run(model, image, Plan(6, (FILED, PARKED, MEMORY, MEMORY), 0, 0)), model(image)
        assert strips.dtype == expected.dtype == torch.float32
        error, allowed = ((t - whole).square().mean().sqrt() for t in (strips, expected))
        assert 0 < error < 1.5 * allowed  # as far from float32 as the whole image's own bfloat16
        half = copy.deepcopy(model).bfloat16()
        assert tiling.in_strips(half, image.bfloat16(), 100 * GB).dtype == torch.bfloat16


@pytest.mark.parametrize("case", [0, 3])
def test_statistics_of_a_strip_alone_would_show(cases, monkeypatch, case):
    model, image, whole = cases[case]
    monkeypatch.setattr(tiling, "_add", lambda strips: list(strips)[-1][1])  # of the last strip instead of all
    with torch.inference_mode():
        assert (tiling.run(model, image, Plan(16, (MEMORY,) * 4, 0, 0)) - whole).abs().max() > 1e-3


def test_convolutions_see_strips_as_channels_last(cases, monkeypatch):
    model, image, _ = cases[0]
    layers, strides = tiling._layers, []
    monkeypatch.setattr(
        tiling, "_layers", lambda stage, x, *rest: strides.append((x.stride(), x.shape)) or layers(stage, x, *rest)
    )
    with torch.inference_mode():
        tiling.run(model, image, Plan(6, (FILED, PARKED, MEMORY, MEMORY), 0, 0))
    assert len(strides) > 20
    assert all(stride == (c * h * w, 1, c * w, c) for stride, (_, c, h, w) in strides)


def test_less_memory_takes_more_files():
    model = create_model("restormer_base", num_blocks=(1, 1, 1, 1)).eval()
    image = torch.empty(1, 3, 2201, 3297)
    plans = [make_plan(model, image, int(cap * GB), RESIDENT) for cap in (8, 3, 1.5)]
    assert plans[0].places == (MEMORY,) * 4 and plans[0].rows == plans[1].rows == 38 and plans[0].file_bytes == 0
    assert plans[1].places == (PARKED, MEMORY, MEMORY, MEMORY)
    assert plans[2].places[0] == FILED
    assert [p.peak_bytes <= cap * GB for p, cap in zip(plans, (8, 3, 1.5), strict=True)] == [True] * 3
    assert "level 1 parked (2.80 GB through " in str(plans[1])
    assert make_plan(model, image, 4 * GB, RESIDENT + GB).places == plans[1].places  # what is held already is not there
    with pytest.raises(UserError, match=r"restormer_base: an image of 3297×2201 pixels in float32 takes \d+ MB .*, 1 MB are"):
        make_plan(model, image, 10**6, RESIDENT)


def test_an_untaken_half_needs_half():
    model, image = create_model("restormer_base", num_blocks=(1, 1, 1, 1)), torch.empty(1, 3, 1600, 1600)
    whole = make_plan(model, image, 100 * GB, RESIDENT).peak_bytes
    with torch.autocast("cpu", torch.bfloat16):
        assert make_plan(model, image, 100 * GB, RESIDENT).peak_bytes < whole - 0.4 * GB


@pytest.mark.parametrize("places", [(MEMORY,) * 4, (PARKED,) * 3 + (MEMORY,), (FILED,) * 4], ids=str)
def test_a_map_is_gone_once_it_is_not_needed(cases, monkeypatch, places):
    """Those of the levels below a merge, and all but the last at the end."""
    model, *_ = cases[0]
    alive, seen = weakref.WeakSet(), []
    for name in ("merge", "output"):
        step = getattr(tiling._Run, name)
        monkeypatch.setattr(
            tiling._Run, name, lambda *args, step=step: seen.append(sorted(m.height for m in alive)) or step(*args)
        )
    make = tiling._Map.__init__
    monkeypatch.setattr(tiling._Map, "__init__", lambda self, *args: alive.add(self) or make(self, *args))
    with torch.inference_mode():
        tiling.run(model, torch.rand(1, 3, 61, 43), Plan(6, places, 0, 0))
    target = [places[0] == PARKED] * 3  # a new map, beside the parked one
    assert seen == [
        [8] + [16] * (1 + target[2]) + [32, 64],
        [16] + [32] * (1 + target[1]) + [64],
        [32] + [64] * (1 + target[0]),
        [64],
    ]


class Starved:
    """Stands for an op: out of memory above so many rows."""

    def __init__(self, op, rows, error):
        self.op, self.rows, self.error, self.refused = op, rows, error, 0

    def __call__(self, x, *args, **keywords):
        if x.shape[2] > self.rows:
            self.refused += 1
            raise self.error
        return self.op(x, *args, **keywords)


@pytest.mark.parametrize("op", ["mdta_statistics", "mdta_apply", "gdfn"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), MemoryError(), RuntimeError("std::bad_alloc")], ids=repr)
def test_out_of_memory_goes_on_with_smaller_strips(cases, monkeypatch, op, error):
    model, image, whole = cases[0]
    starved = Starved(getattr(kernels, op), 10, error)
    monkeypatch.setattr(kernels, op, starved)
    with torch.inference_mode():
        strips = tiling.run(model, image[:1], Plan(64, (MEMORY,) * 4, 0, 0))
    assert starved.refused > 0
    assert (strips - whole[:1]).abs().max() <= 1e-5


def test_out_of_memory_with_the_smallest_strips_is_raised(cases, monkeypatch):
    model, image, _ = cases[0]
    monkeypatch.setattr(kernels, "gdfn", Starved(kernels.gdfn, 2, torch.OutOfMemoryError()))
    with pytest.raises(torch.OutOfMemoryError):
        tiling.run(model, image, Plan(64, (MEMORY,) * 4, 0, 0))


def test_other_errors_are_not_hidden(cases, monkeypatch):
    model, image, _ = cases[0]
    monkeypatch.setattr(kernels, "gdfn", Starved(kernels.gdfn, 2, RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        tiling.run(model, image, Plan(64, (MEMORY,) * 4, 0, 0))
    assert kernels.gdfn.refused == 1


def test_a_full_disk_is_named(cases, monkeypatch):
    class Full:
        def seek(self, offset):
            pass

        def write(self, data):
            raise OSError(28, "No space left on device")

    model, image, _ = cases[0]
    monkeypatch.setattr(tempfile, "TemporaryFile", Full)
    with pytest.raises(UserError, match=r"a feature map can't be kept in .* \(TMPDIR\): No space left on device"):
        tiling.run(model, image, Plan(64, (PARKED, MEMORY, MEMORY, MEMORY), 0, 0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("plan", PLANS[1:], ids=str)
def test_equals_the_whole_on_a_gpu(cases, plan, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for model, image, whole in cases:
        with torch.inference_mode():
            strips = tiling.run(copy.deepcopy(model).cuda(), image.cuda(), Plan(plan.rows, plan.places[: maps(model)], 0, 0))
        assert (strips.cpu() - whole).abs().max() <= 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("above", "in_memory"), [(150, False), (300, True)])
def test_stays_within_its_memory_on_a_gpu(above, in_memory):
    model = create_model("restormer_nano", dim=16, num_blocks=(1, 1, 1, 1), num_refinement_blocks=0).cuda().eval()
    image = torch.rand(1, 3, 1203, 797, device="cuda")
    resident = measure.resident_bytes("cuda")
    cap = resident + above * 10**6
    assert (make_plan(model, image, cap, resident).places[0] == MEMORY) == in_memory
    with torch.inference_mode(), measure.measure("cuda") as measured:
        tiling.in_strips(model, image, cap)
    assert measured.peak_bytes <= cap


def test_the_plan_is_logged_with_the_time_it_expects(cases, caplog):
    model, image, whole = cases[0]
    caplog.set_level(logging.INFO)
    with torch.inference_mode():
        strips = tiling.in_strips(model, image, 100 * GB)
    assert (strips - whole).abs().max() <= 1e-5
    expected = r"43×37: strips of 40 rows, expected peak \d+(\.\d+)? [MG]B, expected time [\d.]+ to [\d.]+ s"
    assert re.fullmatch(expected, caplog.messages[0])


def test_expected_time_follows_pixels_rows_and_files(cases, monkeypatch):
    model, image, _ = cases[0]
    sides = []

    def measured(run, side, pixels, device):
        run(side)
        sides.append(side)
        return 1e-6 * pixels, 2 + 1e-6 * pixels

    monkeypatch.setattr(tiling, "expected_seconds", measured)

    def expected(places, size, file_bytes=0, rows=20):
        return tiling.seconds_of(model, torch.empty(1, 3, *size), Plan(rows, (places,) * 4, 0, file_bytes))

    assert expected(MEMORY, (1000, 1000)) == pytest.approx((1.1, 2 * 3 * 1.1))  # 2 rows of 20 again, strips
    assert expected(MEMORY, (1000, 1000), rows=1000) == pytest.approx((1.002, 3 * 1.002))
    assert expected(MEMORY, (1999, 1995)) == pytest.approx((4 * 1.1, 2 * 6 * 1.1))
    assert expected(FILED, (1000, 1000), 10**9)[0] > 1.1 + 0.01
    assert sides == [112, 112, 240, 112]  # a hundredth of the pixels


def test_refused_where_gradients_are_recorded(small):
    with pytest.raises(UserError, match="max_memory is for inference"):
        tiling.in_strips(small(), torch.rand(1, 3, 8, 8), GB)


PEAK = """
import sys, torch
from autohdr.measure import measure, resident_bytes
from autohdr.models import create_model, tiling
model = create_model("restormer_nano", dim=16, num_blocks=(1, 1, 1, 1), num_refinement_blocks=0).eval()
with torch.inference_mode():
    tiling.in_strips(model, torch.rand(1, 3, 64, 64), 10**10)  # what is there once: threads, scratch memory
    image = torch.rand(1, 3, 1203, 797)
    cap = resident_bytes() + int(sys.argv[1])
    print(tiling.make_plan(model, image, cap, resident_bytes()).places[0])
    with measure() as measured:
        tiling.in_strips(model, image, cap)
print(cap, measured.peak_bytes)
"""


@pytest.mark.skipif(not measure._reset_high_water_mark(), reason="/proc/self/clear_refs cannot be written here")
@pytest.mark.skipif(kernels.backends("mdta")["cpu"] != "available", reason="no compiled kernels")
@pytest.mark.parametrize(("above", "level1"), [(115, FILED), (190, MEMORY)])
def test_stays_within_its_memory(above, level1):
    """The map of level 1 alone is 62 MB. In a process of its own, where nothing was freed that could be taken again."""
    command = [sys.executable, "-c", PEAK, str(above * 10**6)]
    place, cap, peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert place == level1
    assert int(peak) <= int(cap)
