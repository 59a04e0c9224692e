"""The CUDA kernels on the CPU: every test of an op again, with the emulated library in place of the CPU kernels."""

import sys
from pathlib import Path

import pytest
from again import KERNELS, run_tests, unless_passed

from autohdr.kernels import OPS

sys.path.insert(0, str(Path(__file__).parents[1] / "emulation"))
import build

HERE = Path(__file__).parent
pytestmark = [pytest.mark.long, pytest.mark.skipif(bool(build.why_not()), reason=build.why_not())]


@pytest.mark.parametrize("op", [op for op in OPS if "cuda" in OPS[op]])
def test_op(op):
    with unless_passed(KERNELS, "emulated", op):
        run_tests(HERE / f"test_{op}.py", "-s", env=build.environment())
