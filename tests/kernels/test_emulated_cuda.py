"""The CUDA kernels on the CPU: every test of an op again, with the emulated library in place of the CPU kernels."""

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "emulation"))
import build

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(bool(build.why_not()), reason=build.why_not())


@pytest.mark.parametrize("seed", [0, 1], ids=["in order", "shuffled"])
@pytest.mark.parametrize("op", ["selective_scan", "causal_conv1d", "gdfn", "mdta"])
def test_op(op, seed):
    command = [sys.executable, "-m", "pytest", HERE / f"test_{op}.py", "-s", "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=build.environment(seed), capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-20000:]
