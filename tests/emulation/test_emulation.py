"""The emulation of CUDA runs right kernels right and finds planted bugs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import build

pytestmark = pytest.mark.skipif(bool(build.why_not()), reason=build.why_not())
SEEDS = range(4)


@pytest.fixture(scope="module")
def run():
    program = build.build("samples", [build.HERE / "samples.cu"], [], [])

    def run(case: str, seed: int) -> str:
        env = os.environ | {"ASAN_OPTIONS": build.SANITIZER, "AUTOHDR_EMULATION_SEED": str(seed)}
        done = subprocess.run([program, case], env=env, capture_output=True, text=True, timeout=60)
        return done.stdout + done.stderr

    return run


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", ["sum", "transpose", "warp", "pipeline", "wide rows"])
def test_right_kernels(run, case, seed):
    assert run(case, seed) == "right\n"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("offset", "heap-buffer-overflow"),
        ("tail", "heap-buffer-overflow"),
        ("divergent", "deadlock: 64 of 128 threads wait at __syncthreads"),
        ("short shared", "heap-buffer-overflow"),
        ("static shared", "out of bounds"),
        ("uninitialised", "wrong"),
        ("mask", "a lane is not in the mask"),
        ("misaligned", "misaligned address"),
        ("no wait", "wrong"),
        ("early", "wrong"),
        ("threads", "more than 1024 threads"),
        ("grid", "a grid beyond"),
        ("empty", "an empty grid"),
        ("shared", "more than 99 KiB"),
    ],
)
def test_planted_bugs(run, case, message):
    for seed in SEEDS:
        assert message in run(case, seed)


def test_a_missing_barrier_is_found_under_some_schedule(run):
    assert any(run("barrier", seed) == "wrong\n" for seed in SEEDS)
