"""The planner against what is measured, and what it refuses."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch

from autohdr import kernels
from autohdr import measure as measuring
from autohdr.errors import UserError
from autohdr.models import create_model
from autohdr.models.tiling import make_plan
from autohdr.plan import AVERAGE, GRADIENTS, OPTIMIZER, PARAMETERS, SAVED, Plan, plan

# Freed memory goes back at once, as it does by itself from 32 MiB on: what is measured is what the pass needs.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
MEASURED = """
import json, sys, torch
from autohdr import kernels
from autohdr.measure import measure
from autohdr.models import create_model
from autohdr.plan import _step, _autocast, plan

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
]


@pytest.mark.skipif(not measuring._reset_high_water_mark(), reason="/proc/self/clear_refs cannot be written here")
@pytest.mark.skipif(kernels.backends("mdta")["cpu"] != "available", reason="no compiled kernels")
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_memory_is_what_is_measured(case):
    """In a process of its own, where nothing was freed that could be taken again."""
    run = subprocess.run(
        [sys.executable, "-c", MEASURED], input=json.dumps(case), env=os.environ | MALLOC, capture_output=True, text=True, check=True
    )
    measured, planned = json.loads(run.stdout)
    assert measured > 50e6
    assert abs(planned / measured - 1) <= 0.15, f"{planned / 1e6:.0f} MB planned, {measured / 1e6:.0f} MB measured"
