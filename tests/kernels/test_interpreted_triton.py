"""The Triton kernels on the CPU: every test of an op again, with Triton's interpreter in place of a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from autohdr.kernels import OPS

pytest.importorskip("triton")


@pytest.mark.parametrize("op", OPS)
def test_op(op):
    command = [sys.executable, "-m", "pytest", Path(__file__).parent / f"test_{op}.py", "-p", "no:cacheprovider"]
    # Without GPUs: the interpreter would have to copy everything to and fro.
    more = {"AUTOHDR_TEST_BACKEND": "triton", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=os.environ | more, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-20000:]
