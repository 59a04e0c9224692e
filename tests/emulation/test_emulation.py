"""The emulation of CUDA runs right kernels right and finds planted bugs."""

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import build

pytestmark = [pytest.mark.long, pytest.mark.skipif(bool(build.why_not()), reason=build.why_not())]
SEEDS = range(4)


@pytest.fixture(scope="module")
def run():
    program = build.build("samples", [build.HERE / "samples.cu"], [], [])

    def run(case: str, seed: int, **variables: str) -> str:
        env = os.environ | {"ASAN_OPTIONS": build.SANITIZER, "AUTOHDR_EMULATION_SEED": str(seed)} | variables
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
        ("shared", "more shared memory than a block can have"),
    ],
)
def test_planted_bugs(run, case, message):
    for seed in SEEDS:
        assert message in run(case, seed)


def test_a_missing_barrier_is_found_under_some_schedule(run):
    assert any(run("barrier", seed) == "wrong\n" for seed in SEEDS)


def test_launches_are_recorded_and_nothing_runs(run, tmp_path):
    assert run("transpose", 0, AUTOHDR_RECORD_LAUNCHES=str(tmp_path / "launches")) == "wrong\n"
    _, *sizes, parameters = (tmp_path / "launches").read_text().split()
    assert sizes == ["3", "2", "1", "32", "8", "1", "0"]
    assert struct.unpack("<2Q2i", bytes.fromhex(parameters))[2:] == (64, 70)


def test_the_emulation_differs_where_it_must():
    """Elsewhere it would make another program than the one on a GPU, and other launches than those recorded."""
    found = subprocess.run(["grep", "-rl", "AUTOHDR_EMULATION", build.ROOT / "csrc"], capture_output=True, text=True).stdout
    common = {"cuda_async.cuh", "cuda_host.h", "cuda_launch.cuh", "cuda_math.cuh", "cuda_mma.cuh", "registration.h"}
    assert {Path(file).name for file in found.split()} == common | {"cuda_sequence.cuh"}


def test_a_source_is_compiled_anew_where_a_header_of_it_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "ROOT", tmp_path)
    files = {"op/op.cu": '#include "op/op.cuh"\n', "op/op.cuh": '#pragma once\n#include "common/math.h"\n#include <vector>\n'}
    files |= {"common/math.h": "int one;\n", "common/other.h": "int two;\n"}
    for name, text in files.items():
        (tmp_path / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "csrc" / name).write_text(text)
    before = build.hash_of(["g++"], [tmp_path / "csrc/op/op.cu"])
    for name, concerns in (("common/other.h", False), ("common/math.h", True), ("op/op.cuh", True)):
        (tmp_path / "csrc" / name).write_text(files[name] + "int more;\n")
        assert (build.hash_of(["g++"], [tmp_path / "csrc/op/op.cu"]) != before) == concerns
        (tmp_path / "csrc" / name).write_text(files[name])
    assert build.hash_of(["g++"], [tmp_path / "csrc/op/op.cu"]) == before
