"""The Triton kernels on the CPU: every test of an op again, with Triton's interpreter in place of a GPU."""

from pathlib import Path

import pytest
from again import KERNELS, run_tests, unless_passed

from autohdr.kernels import OPS

pytest.importorskip("triton")
HERE = Path(__file__).parent
PARTS = {"selective_scan": 2}
# Without GPUs: the interpreter would have to copy everything to and fro.
INTERPRETED = {"AUTOHDR_TEST_BACKEND": "triton", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
pytestmark = [pytest.mark.long]
CASES = [(op, f"{i}/{PARTS.get(op, 1)}") for op in OPS if "triton" in OPS[op] for i in range(PARTS.get(op, 1))]


@pytest.mark.parametrize(("op", "part"), CASES)
def test_op(op, part):
    with unless_passed(KERNELS, "interpreted", op, part):
        run_tests(HERE / f"test_{op}.py", env=INTERPRETED, part=part)
