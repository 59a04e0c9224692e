"""The Triton kernels on the CPU: every test of an op again, with Triton's interpreter in place of a GPU."""

from pathlib import Path

import pytest
from again import KERNELS, ops_of, run_tests, unless_passed

pytest.importorskip("triton")
HERE = Path(__file__).parent
# Without GPUs: the interpreter would have to copy everything to and fro.
INTERPRETED = {"AUTOHDR_TEST_BACKEND": "triton", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
pytestmark = [pytest.mark.long]


@pytest.mark.parametrize("ops", ops_of("triton"))
def test_ops(ops):
    with unless_passed(KERNELS, "interpreted", ops):
        run_tests(*(HERE / f"test_{op}.py" for op in ops), env=INTERPRETED)
