"""The CUDA kernels on the CPU: every test of an op again, with the emulated library in place of the CPU kernels."""

import sys
from pathlib import Path

import pytest
from again import KERNELS, ops_of, run_tests, unless_passed

sys.path.insert(0, str(Path(__file__).parents[1] / "emulation"))
import build

HERE = Path(__file__).parent
pytestmark = [pytest.mark.long, pytest.mark.skipif(bool(build.why_not()), reason=build.why_not())]


@pytest.mark.parametrize("ops", ops_of("cuda"))
def test_ops(ops):
    with unless_passed(KERNELS, "emulated", ops):
        run_tests(*(HERE / f"test_{op}.py" for op in ops), "-s", env=build.environment())


def test_a_warp_may_run_ahead():
    """Under seed 0 a warp goes on until it waits for another: what it writes must not lie where that one has still to read."""
    with unless_passed(KERNELS, "emulated, a warp ahead"):
        tests = [HERE / "test_selective_scan.py", "-k", "test_forward_and_backward", "-s"]
        run_tests(*tests, env=build.environment() | {"AUTOHDR_EMULATION_SEED": "0"})
