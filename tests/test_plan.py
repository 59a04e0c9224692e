"""The planner against what is measured, and what it refuses."""

import json
import math
import os
import re
import subprocess
import sys
from itertools import product

import pytest
import torch

from autohdr import kernels
from autohdr import measure as measuring
from autohdr.errors import UserError
from autohdr.kernels.backends import _DEVICES, _REASONS, default_backend
from autohdr.models import create_model
from autohdr.models.restormer import Attention, FeedForward
from autohdr.models.tiling import make_plan
from autohdr.plan import AVERAGE, GRADIENTS, OPTIMIZER, PARAMETERS, SAVED, SCRATCH, plan, table

# Freed memory goes back at once, as it does by itself from 32 MiB on: what is measured is what the pass needs.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
MEASURED = """
import json, os, sys, torch
from autohdr import kernels
from autohdr.measure import measure
from autohdr.models import create_model
from autohdr.plan import _step, _autocast, plan

if os.environ.get("AUTOHDR_TEST_ONEDNN") == "0":  # see tests/conftest.py
    torch._C._set_mkldnn_enabled(False)

def run(side):
    model = create_model(name)
    if mode == "training":
        optimizer = torch.optim.AdamW(model.parameters())
        for p in model.parameters():  # as the step before left them
            optimizer.state[p] = {"step": torch.tensor(1.0), "exp_avg": torch.ones_like(p), "exp_avg_sq": torch.ones_like(p)}
    source = torch.rand(1, 3, side, side).contiguous(memory_format=torch.channels_last)
    if mode == "training":
        _step(model, source, torch.rand_like(source), precision)
        optimizer.step()
    else:
        with torch.inference_mode(), _autocast(torch.device("cpu"), precision):
            model(source)

for line in sys.stdin:
    name, side, precision, mode, backend = json.loads(line)
    kernels.set_backend(backend)
    run(32)  # what happens once: compiled code, scratch memory
    with measure() as measured:
        run(side)
    print(json.dumps([measured.growth_bytes, plan(name, side, precision=precision, mode=mode).peak_bytes]))
"""
CASES = [
    ("restormer_nano", 768, "float32", "inference", "auto"),
    ("restormer_nano", 768, "bfloat16", "inference", "auto"),
    ("restormer_nano", 512, "float32", "training", "auto"),
    ("restormer_nano", 512, "bfloat16", "training", "auto"),
    ("restormer_nano", 160, "float32", "training", "reference"),
    ("mamba_diffusion_nano", 384, "float32", "inference", "auto"),
    ("mamba_diffusion_nano", 160, "float32", "training", "auto"),
    ("mamba_diffusion_nano", 160, "bfloat16", "training", "auto"),
    ("nafnet_nano", 768, "float32", "inference", "auto"),  # the scratch that earlier ones left is a small part of it
    ("nafnet_nano", 640, "bfloat16", "training", "auto"),
    ("swinir_nano", 384, "float32", "inference", "auto"),
    ("swinir_nano", 128, "bfloat16", "training", "auto"),
]


@pytest.fixture(scope="module")
def outcomes():
    """Bytes measured and planned of each case, in a process of its own."""
    options = {"env": os.environ | MALLOC, "capture_output": True, "text": True, "check": True}
    run = subprocess.run([sys.executable, "-c", MEASURED], input="\n".join(map(json.dumps, CASES)), **options)
    return dict(zip(CASES, map(json.loads, run.stdout.splitlines()), strict=True))


@pytest.mark.skipif(not measuring._reset_high_water_mark(), reason="/proc/self/clear_refs cannot be written here")
@pytest.mark.skipif(kernels.backends("mdta")["cpu"] != "available", reason="no compiled kernels")
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
@pytest.mark.long
@pytest.mark.xdist_group("plan")
def test_memory_is_what_is_measured(outcomes, case):
    measured, planned = outcomes[case]
    assert measured > 50e6
    assert abs(planned / measured - 1) <= 0.15, f"{planned / 1e6:.0f} MB planned, {measured / 1e6:.0f} MB measured"


def test_the_parts_are_what_they_are_called():
    parameters = sum(p.numel() * 4 for p in create_model("restormer_tiny").parameters())
    step = plan("restormer_tiny", 64, mode="training")
    assert step.parts[PARAMETERS] == parameters and step.parts[OPTIMIZER] == 2 * parameters
    assert sum(step.parts.values()) == step.peak_bytes
    averaged = plan("restormer_tiny", 64, mode="training", averaged=True)
    assert averaged.parts[AVERAGE] == averaged.peak_bytes - step.peak_bytes == parameters
    assert step.parts[GRADIENTS] > 0.9 * parameters  # the peak of a small image is the end of the backward pass,
    large = plan("restormer_tiny", 256, mode="training")  # of a large one the beginning, where there are none but earlier ones
    assert large.parts.get(GRADIENTS, 0) < 0.1 * parameters
    assert plan("restormer_tiny", 256, mode="training", accumulate=2).parts[GRADIENTS] == pytest.approx(parameters, rel=0.01)


@pytest.mark.skipif(kernels.backends("mdta")["cpu"] != "available", reason="no compiled kernels")
def test_a_block_saves_its_two_inputs_and_small_matrices():
    """Two images a block: of E bytes each at level 1, E / 2 at level 2, and so on."""
    size, e = 256, 12 * 256**2 * 4
    saved = [
        plan(create_model("restormer_nano", num_blocks=blocks), size, mode="training").parts[SAVED]
        for blocks in ((1, 1, 1, 1), (2, 1, 1, 1), (1, 1, 1, 3))
    ]
    assert saved[1] - saved[0] == pytest.approx(2 * 2 * e, rel=0.02)  # encoder and decoder
    assert saved[2] - saved[0] == pytest.approx(2 * 2 * e / 8, rel=0.05)


def test_memory_follows_pixels_batch_and_dtype():
    def saved(*args, **options):
        return plan("restormer_nano", *args, mode="training", **options).parts[SAVED]

    one = saved(256)
    assert saved((512, 256)) == pytest.approx(2 * one, rel=0.02) and saved(256, 2) == pytest.approx(2 * one, rel=0.02)
    assert saved(256, precision="bfloat16") == pytest.approx(one / 2, rel=0.1)  # the weights' copies and the output's beside it


def test_a_model_is_left_alone_and_planned_with_its_settings():
    model = create_model("restormer_nano", dim=8, num_blocks=(1, 1, 1, 2))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    assert plan(model, 64, mode="training") == plan(model, 64, mode="training") != plan("restormer_nano", 64, mode="training")
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_planning_takes_no_memory_of_what_it_plans():
    with measuring.measure() as measured:
        planned = plan("restormer_large", (8000, 6000), 4, mode="training")
    assert planned.peak_bytes > 1e12 > 1000 * measured.growth_bytes


def test_a_gpu_is_planned_for_where_there_is_none():
    asked = {"precision": "float16", "mode": "training"}
    here, there = plan("restormer_nano", 256, **asked), plan("restormer_nano", 256, device="cuda", timed=True, **asked)
    assert there.parts[PARAMETERS] == here.parts[PARAMETERS] and there.parts["kernel scratch"] == 192 << 20
    if not torch.cuda.is_available():
        assert there.seconds is None
        half = plan("restormer_nano", 256, precision="bfloat16", mode="training")
        # The fused ops save as much; PyTorch's convolutions keep their weights and the image in half precision on a GPU alone.
        model = create_model("restormer_nano")
        inside = {conv for block in model.modules() if isinstance(block, (Attention, FeedForward)) for conv in block.modules()}
        plain = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m not in inside)
        assert there.parts[SAVED] - half.parts[SAVED] == 2 * (plain + 3 * 256 * 256)


def test_the_meta_device_counts_tensors_alone():
    """As a GPU's, whose scratch memory comes on top; so does what a model on it is planned with elsewhere."""
    for options in ({}, {"precision": "bfloat16", "mode": "training"}):
        meta, gpu = (plan("restormer_nano", 128, device=device, timed=True, **options) for device in ("meta", "cuda"))
        assert meta.parts == gpu.parts | {SCRATCH: 0} and meta.seconds is None
    with torch.device("meta"):
        model = create_model("restormer_nano")
    assert plan(model, 128) == plan("restormer_nano", 128)
    assert "There is no meta here" in table("restormer_nano", (64, 64), 1, "meta")


def test_tritons_ops_are_planned_as_the_others(monkeypatch):
    """With the gradient between the halves of nafblock's backward pass, which no op declares."""
    compiled = plan("nafnet_nano", 128, mode="training", device="meta")
    monkeypatch.setitem(_DEVICES, "triton", "cpu")  # a plan runs no kernel
    monkeypatch.setitem(_REASONS, "triton", "")
    with default_backend("triton"):
        assert plan("nafnet_nano", 128, mode="training", device="meta") == compiled


@pytest.mark.long
@pytest.mark.no_cover  # tracing the lines of a large network's plan takes as long again
def test_recomputing_keeps_a_block_of_many():
    kept, recomputed = (plan("mamba_small", 64, mode="training", recompute=r) for r in (False, True))
    assert recomputed.parts[SAVED] < 0.1 * kept.parts[SAVED] and recomputed.parts[PARAMETERS] == kept.parts[PARAMETERS]


def test_a_model_in_8_bits_is_planned_for_inference_alone():
    model = create_model("restormer_nano", int8=True)
    assert plan(model, 64, timed=True).peak_bytes < plan("restormer_nano", 64).peak_bytes
    assert plan(model, 128, max_memory=10**10, timed=True).seconds[0] > 0
    with pytest.raises(UserError, match="a model in 8 bits is for inference on a CPU, but it is being trained"):
        plan(model, 64, mode="training")
    for device, options in product(("cuda", "meta"), ({}, {"max_memory": 10**10})):
        with pytest.raises(UserError, match=f"a model in 8 bits is for inference on a CPU, but the plan is for {device}: take"):
            plan(model, 64, device=device, **options)


def test_what_is_not_merged_is_not_planned():
    model = create_model("restormer_nano")
    torch.nn.utils.parametrizations.weight_norm(model.output)
    with pytest.raises(UserError, match="plan: expected the tensors of restormer_nano, got output.parametrizations.*: merge"):
        plan(model, 64)


def test_what_onednn_takes_inside_is_the_cpus():
    model = create_model("mamba_diffusion_nano", num_groups=1)
    here, there = (plan(model, 128, mode="training", device=d) for d in ("cpu", "cuda"))
    assert here.peak_bytes - here.parts[SCRATCH] > there.peak_bytes - there.parts[SCRATCH]


def test_a_limit_is_planned_in_strips():
    """Beside what this process holds, which may be more than the strips take."""
    model, size, resident = create_model("restormer_tiny"), (2201, 3297), measuring.resident_bytes()
    limit = resident + 15 * 10**8
    strips, whole = plan(model, size, max_memory=limit), plan(model, size)
    assert strips.peak_bytes <= limit - resident + 50e6 and strips.peak_bytes < whole.peak_bytes
    assert sum(strips.parts.values()) == strips.peak_bytes
    assert make_plan(model, torch.empty(1, 3, *size), limit, resident).peak_bytes > strips.peak_bytes


def test_time_is_measured_where_asked_for():
    assert plan("restormer_nano", 64).seconds is None
    timed = plan("restormer_nano", 64, timed=True)
    assert timed.seconds and 0 < timed.seconds[0] <= timed.seconds[1] < math.inf
    assert re.search(r"^\d+ MB \(parameters 2 MB, .*\), [\d.e-]+ to [\d.e-]+ s$", str(timed))
    for options in ({"mode": "training"}, {"max_memory": 10**10}):
        assert plan("restormer_nano", 128, timed=True, **options).seconds[0] > 0


def test_time_is_not_measured_where_the_measurement_does_not_fit(monkeypatch):
    monkeypatch.setattr("autohdr.plan.free_bytes", lambda device: 4 * 443_783 * 4)
    assert plan("restormer_nano", 64, timed=True).seconds is None


@pytest.mark.parametrize(
    ("args", "options", "reason"),
    [
        (("restormer_huge", 64), {}, "no model is called 'restormer_huge'"),
        (("restormer_nano", 0), {}, "expected a mode of inference, training, .* got inference, float32, 0×0, batch 1"),
        (("restormer_nano", (64, -1)), {}, "got inference, float32, -1×64, batch 1"),
        (("restormer_nano", 64, 0), {}, "batch 0"),
        (("restormer_nano", 64), {"precision": "float64"}, "got inference, float64"),
        (("restormer_nano", 64), {"mode": "both"}, "got both, float32"),
        (("restormer_nano", 64), {"device": "abacus"}, "device: expected cpu, cuda or meta, got 'abacus'"),
        (
            ("restormer_nano", 64),
            {"mode": "training", "max_memory": 10**9},
            "max_memory is for the inference of networks that .* got restormer_nano, training",
        ),
        (("restormer_nano", 64), {"recompute": True}, "recompute: restormer_nano has no such choice"),
        (
            ("mamba_small", 64),
            {"max_memory": 10**9},
            "max_memory is for the inference of networks that .* got mamba_small, inference",
        ),
        (("restormer_nano", 64), {"max_memory": 10**6}, "restormer_nano: an image of 64×64 .* 1 MB are allowed"),
    ],
)
def test_refusals(args, options, reason):
    with pytest.raises(UserError, match=reason):
        plan(*args, **options)
