"""Every CUDA kernel compiled for sm_80 and sm_90: no register spilled, no more static shared memory than any GPU has."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from again import unless_passed

sys.path.insert(0, str(Path(__file__).parents[1] / "emulation"))
import build

SOURCES = sorted((build.ROOT / "csrc").rglob("*.cu"))
ARCHITECTURES = ("sm_80", "sm_90")
needs_nvcc = pytest.mark.skipif(build.toolkit() is None or shutil.which("g++") is None, reason="there is no nvcc")
pytestmark = [pytest.mark.long, needs_nvcc]

SPILLING = """
__global__ void __launch_bounds__(1024, 2) spill(float* x) {
  float v[64];
  for (int i = 0; i < 64; ++i) v[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
  for (int i = 0; i < 64; ++i) x[i * 1024 + threadIdx.x] = v[63 - i] * v[i];
}
"""


def faults(source: Path, architecture: str, folder: Path) -> list[str]:
    """What is wrong with the kernels of a file, a line each."""
    nvcc = build.toolkit() / "bin" / "nvcc"
    command = [nvcc, "-O3", "-std=c++17", f"-arch={architecture}", "-Xptxas=-v", f"-I{build.ROOT / 'csrc'}", "-cubin", source]
    done = subprocess.run([*command, "-o", folder / f"{source.stem}.cubin"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = re.findall(
        r"entry function '(\w+)' for.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers(.*?)\n",
        done.stderr,
        re.DOTALL,
    )
    assert len(kernels) == done.stderr.count("entry function")
    found = []
    for name, stores, loads, registers, rest in kernels:
        shared = re.search(r"(\d+) bytes smem", rest)
        if int(stores) or int(loads):
            found.append(f"{source.name} {architecture} {name}: {stores} bytes spilled at {registers} registers")
        if shared and int(shared[1]) > 48 << 10:
            found.append(f"{source.name} {architecture} {name}: {shared[1]} bytes of static shared memory")
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_no_kernel_spills(source, architecture, tmp_path):
    with unless_passed(["csrc", "tests/kernels/test_cuda_resources.py"], source.name, architecture):
        assert not faults(source, architecture, tmp_path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_kernel_that_spills_is_found(tmp_path, architecture):
    source = tmp_path / "spilling.cu"
    source.write_text(SPILLING)
    assert len(faults(source, architecture, tmp_path)) == 1
