"""The machine code of every CUDA kernel, for sm_80 and sm_90: no register spilled, no more static shared memory than any GPU has,
and no count of instructions above its budget (benchmarks/machine_code.py counts them, and writes the budgets anew)."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from again import unless_passed

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import machine_code
from machine_code import ARCHITECTURES, SOURCES, build

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(build.toolkit() is None or shutil.which("g++") is None, reason="there is no nvcc"),
]
# For sm_90, where code is counted, all but float16, which is bfloat16's source with another type; for sm_80 a source of each op.
# The others are drills.
HALVES = {s for s in SOURCES if s.stem.endswith("_f16")}
OF_EACH_OP = {s.parent: s for s in sorted(SOURCES, key=lambda s: s in HALVES)}.values()  # float16's where there is one
TAKEN = {"sm_80": OF_EACH_OP, "sm_90": set(SOURCES) - HALVES}
EVERY_KERNEL = [
    pytest.param(s, a, id=f"{s.stem}-{a}", marks=[] if s in TAKEN[a] else [pytest.mark.drill])
    for s in SOURCES
    for a in ARCHITECTURES
]
FILES = ["csrc", "benchmarks/machine_code.py", "tests/kernels/test_instructions.py"]

SPILLING = """
__global__ void __launch_bounds__(1024, 2) spill(float* x) {
  float v[64];
  for (int i = 0; i < 64; ++i) v[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
  for (int i = 0; i < 64; ++i) x[i * 1024 + threadIdx.x] = v[63 - i] * v[i];
}
"""

HOT = """
__global__ void hot(float4* x, int n) {
  float v[4] = {};
  for (int i = threadIdx.x; i < n; i += 32) {
    float4 a = x[i];
    LOOP
    v[0] += a.x; v[1] += a.y; v[2] += a.z; v[3] += a.w;
  }
  STORE
}
"""
SHIPPED = {"LOOP": "", "STORE": "x[n + threadIdx.x] = make_float4(v[0], v[1], v[2], v[3]);"}
WORSE = {
    "branches in loops": {"LOOP": "if (a.x > v[3]) v[0] = sqrtf(v[0]) / a.y;"},
    "global stores of 32": {"STORE": "for (int k = 0; k < 4; ++k) reinterpret_cast<float*>(x + n + threadIdx.x)[k] = v[k];"},
    "stack": {"STORE": "float w[64]; for (int i = 0; i < 64; ++i) w[i] = x[i].x * v[i % 4]; x[n].x = w[n] + w[n / 2];"},
}


def spills(source: Path, architecture: str) -> list[str]:
    """What no kernel of a file may do, a line each."""
    found = []
    for name, taken in machine_code.resources(machine_code.compiled(source, architecture)[1]).items():
        if taken.spilled:
            found.append(f"{source.name} {architecture} {name}: {taken.spilled} bytes spilled at {taken.registers} registers")
        if taken.shared > 48 << 10:
            found.append(f"{source.name} {architecture} {name}: {taken.shared} bytes of static shared memory")
    return found


def beyond(found: dict[str, dict[str, int]], budgets: dict[str, dict[str, int]]) -> list[str]:
    """Where kernels' counts exceed their budgets, and kernels that have none, or are gone."""
    faults = [f"{name}: no budget, or no kernel any more" for name in found.keys() ^ budgets.keys()]
    for name in found.keys() & budgets.keys():
        for what, count in found[name].items():
            if count > (limit := budgets[name].get(what, 0)):
                faults.append(f"{name}: {what}: {count}, the budget is {limit}")
    return faults


@pytest.mark.parametrize(("source", "architecture"), EVERY_KERNEL)
def test_no_kernel_spills(source, architecture):
    with unless_passed(FILES, source.name, architecture):
        assert not spills(source, architecture)


@pytest.mark.parametrize(("source", "architecture"), EVERY_KERNEL)
def test_no_kernel_exceeds_its_budget(source, architecture):
    budgets = json.loads(machine_code.BUDGETS.read_text())
    if budgets["nvcc"] != machine_code.release():
        pytest.skip(f"the budgets are those of nvcc {budgets['nvcc']}, this is {machine_code.release()}")
    if machine_code.tool("nvdisasm") is None:
        pytest.skip("there is no nvdisasm: neither in the CUDA toolkit nor in Triton")
    with unless_passed([*FILES, str(machine_code.BUDGETS.relative_to(machine_code.ROOT))], source.name, architecture, "budget"):
        faults = beyond(machine_code.kernels(source, architecture), budgets.get(f"{source.stem} {architecture}", {}))
        assert not faults, "python benchmarks/machine_code.py writes the budgets anew\n" + "\n".join(faults)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_kernel_that_spills_is_found(tmp_path, monkeypatch, architecture):
    monkeypatch.setattr(machine_code, "CACHE", tmp_path)
    source = tmp_path / "spilling.cu"
    source.write_text(SPILLING)
    assert len(spills(source, architecture)) == 1


@pytest.mark.skipif(machine_code.tool("nvdisasm") is None, reason="there is no nvdisasm")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_kernel_that_became_worse_is_found(tmp_path, monkeypatch, architecture):
    monkeypatch.setattr(machine_code, "CACHE", tmp_path)

    def counted(**changes):
        text = HOT
        for place, code in (SHIPPED | changes).items():
            text = text.replace(place, code)
        source = tmp_path / "hot.cu"
        source.write_text(text)
        return machine_code.kernels(source, architecture)

    budgets = counted()
    assert not beyond(budgets, budgets)
    for what, changes in WORSE.items():
        if what == "stack" or architecture == ARCHITECTURES[-1]:
            assert any(f": {what}: " in fault for fault in beyond(counted(**changes), budgets)), what
