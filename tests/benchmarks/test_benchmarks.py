"""The benchmarks' own parts: floors, tables, plots, what is refused, and gpu_check on a machine without a GPU."""

import copy
import importlib.util
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import bench_restormer
import calibrate
import families
import floors
import gpu_check
import instructions
import machine_code
import peers
import plot
import problems
import run
import tables
import warp
from machine_code import Resources
from recorded_graphs import recorded  # noqa: F401  a fixture
from warp import Launch, Way

from autohdr import create_model
from autohdr.evaluate import count_macs
from autohdr.kernels.gdfn.declaration import _flops
from autohdr.models.restormer import Level

HERE = Path(run.__file__).parent
H200 = {"name": "NVIDIA H200", "capability": [9, 0], "multiprocessors": 132, "clock_khz": 1980000}
H200 |= {"memory_clock_khz": 3201000, "memory_bus_bits": 6144, "l2_bytes": 60 << 20}
A100 = {"capability": [8, 0], "multiprocessors": 108, "clock_khz": 1410000, "memory_clock_khz": 1593000, "memory_bus_bits": 5120}


def row(op="selective_scan", shape="8×1536×4096", mode="forward", backend="cuda", dtype="bfloat16", **more):
    facts = {"op": op, "shape": shape, "mode": mode, "backend": backend, "dtype": dtype, "dstate": 16}
    facts |= {"seconds": 4e-4, "fastest": 4e-4, "growth_bytes": 2 << 28, "peak_bytes": 3 << 30, "error": 1.6e-3}
    return facts | more


def gpu_results(*rows):
    machine = {"processor": "a processor", "threads": 16, "cpu_isa": "avx512", "gpu": H200}
    return {
        "machine": machine,
        "versions": {"torch": "2.11.0"},
        "commit": "1234567",
        "rows": list(rows),
        "checks": {},
        "calibration": {},
    }


@pytest.mark.parametrize(
    ("gpu", "shape", "exponentials", "backward"),  # microseconds, by hand from the chips' data sheets
    [
        (H200, (8, 1536, 4096), 217, 373),
        (H200, (1, 192, 147456), 122, 210),
        (A100, (8, 1536, 4096), 372, 1281),
        (A100, (1, 192, 147456), 209, 720),
    ],
)
def test_scan_floor(gpu, shape, exponentials, backward):
    limits = floors.ceilings(gpu)
    assert floors.scan_forward(*shape, 16, 2, gated=False).special / limits.special * 1e6 == pytest.approx(
        exponentials, rel=0.005
    )
    assert floors.scan_backward(*shape, 16, 2).fma / limits.fma * 1e6 == pytest.approx(backward, rel=0.005)


def test_ceilings():
    h200, a100 = floors.ceilings(H200), floors.ceilings(A100)
    assert h200.bytes == pytest.approx(4.9e12, rel=0.01) and a100.bytes == pytest.approx(2.04e12, rel=0.01)
    assert 2 * a100.products["bfloat16"] == pytest.approx(312e12, rel=0.01)
    assert 2 * h200.products["float32"] == h200.products["bfloat16"]
    assert floors.ceilings(H200 | {"capability": [7, 5]}) is None


def test_work_of_the_image_ops():
    for mode, tensors in (("forward", (3, 2)), ("training", (8, 5))):
        rows = [row(op, "96×20×30", mode) for op in ("mdta", "gdfn")]
        assert tuple(floors.moved_bytes(r) / (2 * 96 * 20 * 30) for r in rows) == tensors
    flops = _flops((1, 96, 20, 30), None, None, (510, 96, 1, 1))
    assert floors.flops(row("gdfn", "96×20×30")) == flops
    assert floors.flops(row("gdfn", "96×20×30", "training")) == 3 * flops


def test_restormer_floor_is_its_blocks():
    whole = row("restormer_base", "3×384×384")
    assert 0.85 < floors.flops(whole) / 2 / (102.6e9 * 2.25) < 1  # 102.6 GMAC at 256×256, a tenth of it in resampling
    limits = floors.ceilings(H200)
    parts = 0
    for level, blocks in enumerate((12, 12, 12, 8)):
        shape = f"{48 << level}×{384 >> level}×{384 >> level}"
        parts += blocks * sum(floors.floor_seconds(row(op, shape), limits) for op in ("mdta", "gdfn"))
    assert floors.floor_seconds(whole, limits) == pytest.approx(parts)
    assert floors.floor_seconds(row("mamba_diffusion_large", "3×384×384", "training"), limits) is None


def test_gpu_tables():
    results = gpu_results(
        row(),
        row(mode="training", backend="mamba.py", failed="out of memory"),
        row("restormer_base", "3×896×896"),
        row("mamba_diffusion_large", "3×384×384", "training", seconds=0.5),
    )
    text = tables.gpu(results)
    floor = floors.floor_seconds(results["rows"][0], floors.ceilings(H200))
    gigabytes = floors.moved_bytes(results["rows"][0]) / 4e-4 / 1e9
    assert f"| 0.4 ms ({4e-4 / floor:.2f}×), {gigabytes:.0f} GB/s, 0.54 GB | 2e-03 |" in text
    line = next(line for line in text.splitlines() if line.startswith("| selective_scan 8×1536×4096, training step"))
    assert line.count("out of memory") == 1 and line.count(tables.MISSING) == 7
    assert "| mamba_diffusion_large 3×384×384, training step | not measured | 500 ms, 3.22 GB | 2e-03 |" in text
    assert "NVIDIA H200, torch 2.11.0, commit 1234567" in text


PREDICTED = {"gpu": "H200", "op": "gdfn", "shape": "48×8×8", "mode": "forward", "dtype": "bfloat16", "backend": "cuda"}
PREDICTED |= {"ms_low": 2.0, "ms": 4.0, "ms_high": 8.0, "launches": 5}
PREDICTED["bound_by"] = {
    "gate<__nv_bfloat16>": [3.0, "issue"],
    "norm<float>": [0.9, "latency"],
    "PyTorch's own ops": [0.01, "memory"],
}


def test_tables_of_predictions():
    rows = [PREDICTED, PREDICTED | {"gpu": "A100", "ms": 6.0}, PREDICTED | {"mode": "training"}]
    rows += [PREDICTED | {"dtype": "float32", "ms": 9.0}]
    rows += [PREDICTED | {"op": "add_norm", "shape": "1000×430", "ms": 0.01, "bound_by": {"norm<float>": [0.01, "memory"]}}]
    before = [{"commit": "1111111", "ms": {"gdfn 48×8×8, forward, bfloat16, cuda": 5.0}}]
    facts = {"history": before, "commit": "2222222", "versions": {"nvcc": "13.0"}}
    constants = {"gpus": {"H200": {**asdict(instructions.GPUS["H200"]), "memory": 1.29e12}}}
    text = tables.predictions({"predictions": rows, "constants": constants, **facts})
    assert "| add_norm 1000×430, forward, bfloat16, cuda | predicted 2.50× | not predicted |" in text  # 12 bytes an element
    assert "| gdfn 48×8×8, forward, bfloat16, cuda | predicted 4 (2 to 8) | predicted 6 (2 to 8) |" in text
    assert "| gdfn 48×8×8, training step, bfloat16, cuda | predicted 4 (2 to 8) | not predicted |" in text
    assert "| gdfn 48×8×8, forward, float32, cuda | predicted 9 (2 to 8) | not predicted |" in text
    assert "| H200, ms, by commit | 1111111 | 2222222 |" in text
    assert "| gdfn 48×8×8, forward, bfloat16, cuda | predicted 5 | predicted 4 |" in text
    assert text.count("| gdfn 48×8×8, training step, bfloat16, cuda |") == 1  # it has no history
    assert "| `gate<__nv_bfloat16>` | predicted 3 | issue |" in text and "PyTorch's own ops" not in text


def test_predictions_are_added_to_those_of_the_same_kernels():
    now = {"commit": "2222222", "constants": {"gpus": {}}}
    rows = [PREDICTED | {"op": "selective_scan", "shape": "1×192×4096"}, PREDICTED | {"op": "restormer_base", "shape": "896×896"}]
    results = instructions.begun(None, now)
    for row in (*rows, rows[0] | {"gpu": "A100"}, rows[0] | {"ms": 5.0}):
        results = instructions.with_row(results, row)
    assert [(r["op"], r["gpu"], r["ms"]) for r in results["predictions"]] == [
        ("restormer_base", "H200", 4.0),
        ("selective_scan", "H200", 5.0),
        ("selective_scan", "A100", 4.0),
    ]
    assert instructions.begun(results, now) == results
    assert instructions.begun(results, now | {"constants": {}}) == now | {"constants": {}, "predictions": [], "history": []}
    dirty = now | {"commit": "2222222-dirty"}
    assert instructions.begun(results | dirty, dirty)["predictions"] == []
    times = {"restormer_base 896×896, forward, bfloat16, cuda": 4.0, "selective_scan 1×192×4096, forward, bfloat16, cuda": 5.0}
    changed = instructions.begun(results, now | {"commit": "3333333"})
    assert changed["predictions"] == [] and changed["history"] == [{"commit": "2222222", "ms": times}]


def test_what_an_op_asks_of_pytorch_is_predicted_too(monkeypatch):
    ops = instructions.Ops()
    ops.calls["an op's"], ops.others, ops.other_bytes = 2, 1, 0
    monkeypatch.setattr(instructions, "ops_of", lambda *_: ops)
    monkeypatch.setattr(instructions, "recorded", lambda *_: [([], 3, 43_000_000)])
    row = instructions.predict("H200", instructions.GPUS["H200"], "gdfn", (48, 8, 8), "forward", "bfloat16", "triton")
    assert row["launches"] == 1 + 2 * 3
    assert row["ms"] == pytest.approx(7 * 1.2e-3 + 2 * 0.01, rel=1e-3)


@pytest.fixture
def kernel(monkeypatch):
    """A launch of a kernel of 64 registers, four blocks of which fit a multiprocessor of an H200, and its work."""
    monkeypatch.setattr(instructions, "program", lambda *_: (None, Resources(64, 0, 0, 0)))
    launch = Launch("kernel", (132 * 4, 1, 1), (256, 1, 1), 0, struct.pack("<QqQ", 0x7F0000000000, 5, 0x7F0000001000))
    work = instructions.Work(1000, 500, {"fma": 300, "special": 10}, 20, cached=0, memory=0, scratch=0, unknown=0)
    return launch, work


def test_blocks_of_a_multiprocessor(kernel):
    launch, gpu = kernel[0], instructions.GPUS["H200"]
    assert instructions.resident(launch, Resources(64, 0, 0, 0), gpu) == 4
    assert instructions.resident(launch, Resources(255, 0, 0, 0), gpu) == 1
    assert instructions.resident(launch, Resources(32, 0, 0, 0), instructions.GPUS["RTX 4090"]) == 6
    assert instructions.resident(replace(launch, shared=60 << 10), Resources(32, 0, 0, 1 << 10), gpu) == 3


def test_what_binds_a_kernel(kernel):
    (launch, work), gpu, scenario = kernel, instructions.GPUS["H200"], instructions.SCENARIOS["low"]

    def predicted(launch=launch, **changes):
        took, bound = instructions.seconds(launch, replace(work, **changes), gpu, scenario)
        return (took - scenario.gap) * gpu.clock, bound

    assert predicted() == (pytest.approx(8 * 500 / 0.95), "issue")
    assert predicted(replace(launch, grid=(132 * 8, 1, 1))) == (pytest.approx(2 * 8 * 500 / 0.95), "issue")
    # Three blocks of two warps: one of the four schedulers has two of the six at least, and the others wait for it.
    assert predicted(replace(launch, grid=(132 * 3, 1, 1), block=(64, 1, 1))) == (pytest.approx(2 * 500 / 0.95), "issue")
    assert predicted(cycles=1e5) == (pytest.approx(0.85e5), "latency")
    assert predicted(units={"special": 100}) == (pytest.approx(8 * 100 * 8), "special")
    assert predicted(shared=200) == (pytest.approx(4 * 8 * 200), "shared memory")
    assert predicted(memory=gpu.memory)[1] == "memory" and predicted(cached=gpu.cache)[1] == "second-level cache"
    assert predicted(scratch=gpu.memory)[1] == "memory" and predicted(scratch=gpu.cache_bytes)[1] == "issue"


def test_launches_that_differ_in_their_pointers(kernel):
    launch = kernel[0]
    moved, other = (replace(launch, parameters=struct.pack("<QqQ", 0x7F0000002000, n, 0x7F0000001000)) for n in (5, 6))
    assert instructions.without_places(moved) == instructions.without_places(launch)
    assert instructions.without_places(other) != instructions.without_places(launch)


@pytest.mark.parametrize(
    ("opcode", "address", "wavefronts"),
    [
        ("LDS", lambda lane: 4 * lane, 1),
        ("LDS.64", lambda lane: 8 * lane, 2),
        ("LDS.64", lambda lane: 8 * (lane // 4), 1),
        ("LDS.128", lambda lane: 16 * (lane % 4), 4),
        ("LDS.128", lambda lane: 16 * (lane // 2 % 4), 2),
        ("LDS.128", lambda lane: 16 * (lane % 2 + lane // 4 * 2), 2),
        ("LDS.128", lambda lane: 128 * (lane % 8), 32),
        ("STS.128", lambda lane: 16 * (lane // 2 % 4), 4),
    ],
)
def test_cycles_of_shared_memory(opcode, address, wavefronts):
    """Half as many where pairs of lanes read the same, neighbours or those two apart; not where they write it."""
    register = ("R2", "[R1]") if opcode[0] == "L" else ("[R1]", "R2")
    step = warp.Program(machine_code.Code("", [machine_code.Instruction("", opcode, register, 0)]), "sm_90").steps[0]
    way = Way()
    warp.touch(way, step, False, address(numpy.arange(32)), None, set())
    assert way.wavefronts == wavefronts


def test_what_neighbours_touch_as_well():
    way, beside, below = Way(loaded=set(range(8)), stored={100}), Way(loaded=set(range(4, 12)), stored={101}), Way(loaded={0})
    assert instructions.touched_by_all(way, [(3, beside)], [(0, 32 * 100)], True) == 32 * (8 + 2 * 4)
    assert instructions.touched_by_all(way, [(3, beside)], [(0, 32 * 100)], False) == 32 * 3
    assert instructions.touched_by_all(way, [(1, below)], [(0, 32 * 200)], True) == 32 * 9
    parameters, row, second, other_block = {0, 1}, {10}, {11}, {14}  # four warps a block, each a row
    way, *others = (Way(loaded=parameters | own) for own in (row, second, other_block))
    assert instructions.touched_by_all(way, list(zip((4, 100), others, strict=True)), [(0, 32 * 900)], True) == 32 * (2 + 400)


def test_measured_over_predicted():
    measured = {"gate<__nv_bfloat16>": 4.5, "norm<float>": 0.3, "void cudnn": 0.2, "Memcpy": 0.1}
    found = calibrate.compared(PREDICTED, measured)
    assert [k["measured_over_predicted"] for k in found] == pytest.approx([1.5, 0.333, 30.0], abs=1e-3)
    assert calibrate.fitted(found) == {"issue": 1.5, "latency": 0.333, "memory": 30.0}
    unseen = calibrate.compared(PREDICTED, {})[0]
    assert unseen["measured_ms"] is None and unseen["measured_over_predicted"] is None


def test_tables_without_a_gpu():
    assert tables.gpus([]).startswith("GPU: not measured.") and "|" not in tables.gpus([])


def test_cpu_tables():
    results = json.loads((HERE / "results" / "cpu.json").read_text())
    results["rows"] = [
        row(shape="1×192×4096", backend=backend, dtype="float32", malloc="tuned", seconds=seconds)
        for backend, seconds in (("cpu", 0.01), ("reference", 0.34), ("parallel", 0.1))
    ]
    text = tables.cpu(results)
    assert "| 1×192×4096 | 34.00× | not measured | 10.00× | not measured | not measured | not measured |" in text
    assert "| forward, float32: speed | not measured | not measured |" in text


def test_table_of_peers():
    rows = [
        {"case": "a network", "times_as_long": {"autohdr": 1.0, "eager": 2.0}},
        {"case": "a scan", "times_as_long": {"autohdr": 1.0, "C": 8.5}},
    ]
    lines = tables.peers(
        {
            "rows": rows,
            "processor": "Some CPU",
            "instruction_set": "AVX2",
            "threads": 2,
            "versions": {"torch": "2.13.0"},
            "commit": "1234567",
        }
    ).splitlines()
    assert lines[0].endswith("| eager | C |") and lines[2:4] == ["| a network | 2.00 |  |", "| a scan |  | 8.50 |"]
    assert all(fact in lines[-1] for fact in ("Some CPU, AVX2, 2 threads", "torch 2.13.0", "commit 1234567"))


def test_families(tmp_path, monkeypatch):
    """From what `autohdr compare` writes to the table; a figure that it does not know is null."""
    figures = {metric: [0.5, 0.125] for metric in ("psnr", "ssim", "delta_e2000", "quality", "hue")}
    cost = {"parameters": 0, "macs_per_megapixel": 0, "seconds_per_megapixel": 0.5, "bytes_per_megapixel": None}
    plain = cost | {"score": [0.75, 0.25], "pareto": True, "figures": figures, "difference": figures}
    model = plain | {"name": "lite", "file_bytes": 40_000, "checkpoint": "a/lite.pth", "parameters": 9035, "form_of": None}
    methods = {"source": plain, "auto_tone": plain, "a": model, "a, flips-4": model | {"form_of": "a"}}
    compared = {
        "methods": methods,
        "images": [{"width": 384, "height": 256}] * 12,
        "date": "2026-11-29",
        "environment": {"threads": 3},
    }
    (tmp_path / "compare.json").write_text(json.dumps(compared | {"settings": {"cost_size": [2201, 3297]}}))
    monkeypatch.setattr(sys, "argv", ["families.py", str(tmp_path / "compare.json"), "--out", str(tmp_path / "families.json")])
    families.main()
    results = json.loads((tmp_path / "families.json").read_text())
    assert {"machine", "versions", "commit", "date"} <= results.keys() and "checkpoint" not in results["rows"][2]
    lines = tables.families(results).splitlines()
    quality = "0.50 ± 0.12 | 0.500 ± 0.125 | 0.50 ± 0.12"
    assert lines[2] == f"| unedited | {quality} |  |  |  |  |  |  | 0.750 ± 0.250 |"
    assert lines[3] == f"| auto-tone | {quality} |  |  |  |  | 0.5 | not measured | 0.750 ± 0.250 |"
    assert lines[4].startswith(f"| lite | {quality} |  | 9,035 | 0.04 MB | 0 G | 0.5 | not measured |")
    assert lines[5].startswith(f"| lite, flips-4 | {quality} | +0.50 ± 0.12 | 9,035 |")
    assert "on 12 photos of 384×256 pixels" in lines[-1] and "a photo of 3297×2201" in lines[-1] and " 3 threads" in lines[-1]
    assert tables.families(None).startswith("Families: not measured.")


def test_the_families_of_make_compare_do_as_much_work_as_the_demos_model():
    """Multiply-accumulates, within a twentieth."""
    said = re.findall(r"--model (\w+)[\s\\]+--model-args '(.*)'", (HERE.parent / "Makefile").read_text())
    assert [name for name, _ in said] == ["nafnet_nano", "swinir_nano"]
    for name, settings in said:
        assert count_macs(create_model(name, **json.loads(settings))) == pytest.approx(
            count_macs(create_model("restormer_nano")), rel=0.05
        )


def test_plot(tmp_path):
    copied = row("copy", str(1 << 32), dtype="float32", seconds=2e-3), row("matmul", "8192×8192×8192", seconds=1.4e-3)
    results = gpu_results(
        row(), row(backend="reference", seconds=1e-2), row("gdfn", "48×896×896", failed="out of memory"), *copied
    )
    for name, found in (("gpu", results), ("cpu", json.loads((HERE / "results" / "cpu.json").read_text()))):
        plot.plot(found, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


BENCH = """
import os, measuring, pytest, torch
@pytest.mark.parametrize("case", ["right", "wrong", "nan", "alone", "large", "killed"])
def test_case(timed, case):
    def function():
        if case == "large":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if case == "killed":
            os.kill(os.getpid(), 9)
        return [torch.tensor([{"right": 1.0, "wrong": 1.1, "nan": float("nan")}[case]])]
    more = {"gold": "none"} if case == "alone" else {}
    timed(function, lambda actual: measuring.relative_error(actual, [torch.ones(1)]), 1e-2, op=case, **more)
"""
# A GPU's part in the measurement, acted by the processor: every call takes 2 ms of the device's time.
ACTOR = """
import types, torch
class Event:
    now = 0
    def __init__(self, enable_timing): assert enable_timing
    def record(self): self.time = Event.now = Event.now + 2
    def synchronize(self): pass
    def elapsed_time(self, later): return later.time - self.time
empty = torch.empty
torch.empty = lambda *size, device="cpu", **more: empty(*size, **more)
torch.cuda.Event, torch.cuda._sleep, torch.cuda.empty_cache = Event, lambda cycles: None, lambda: None
torch.cuda.synchronize = torch.cuda.reset_peak_memory_stats = lambda device=None: None
torch.cuda.memory_allocated, torch.cuda.max_memory_allocated = lambda device=None: 100, lambda device=None: 350
torch.cuda.get_device_properties = lambda: types.SimpleNamespace(L2_cache_size=4096)
"""


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """A benchmark of a right result, a wrong one, and none; of one that there is nothing to compare with, of one that memory does
    not suffice for, and of one that crashes."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(HERE), str(tmp_path), str(HERE.parent))))
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # beside other workers pytest-benchmark times nothing
    (tmp_path / "actor.py").write_text(ACTOR)
    (tmp_path / "bench_case.py").write_text(BENCH)
    return tmp_path / "bench_case.py"


def test_what_is_reported_of_a_cpu(bench):
    """What is right, although what came later was wrong, or ended the process."""
    rows, fault = run.measure_file(bench, {"AUTOHDR_BENCH_ROUNDS": "2"}, "-p", "conftest", "-k", "not large")
    assert fault == "bench_case.py: pytest ended with code -9"
    assert [(r["op"], r["error"], r["rounds"]) for r in rows] == [("right", 0, 2)] and rows[0]["seconds"] > 0


def test_what_is_reported_of_a_gpu(bench, capfd):
    variables = {"AUTOHDR_BENCH_DEVICE": "cuda"}
    rows, fault = run.measure_file(bench, variables, "-p", "actor", "-p", "conftest", "-k", "not killed", timeout=600)
    assert fault == "bench_case.py: pytest ended with code 1" and [r["op"] for r in rows] == ["right", "large"]
    assert rows[0]["seconds"] == rows[0]["fastest"] == 2e-3 and rows[0]["rounds"] == 50
    assert (rows[0]["growth_bytes"], rows[0]["peak_bytes"], rows[0]["memory_source"]) == (250, 350, "cuda")
    assert rows[1] == {"op": "large", "failed": "out of memory"}
    output = capfd.readouterr().out
    assert "relative error 1.0e-01, allowed 1e-02: nothing is reported" in output and "relative error nan" in output
    assert "Failed: memory suffices for nothing to compare with" in output


def test_a_machine_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert run.commit() == "unknown"


def load(name):
    """A module of the benchmarks whose name one of the tests has too."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_case_begins_after_the_end(monkeypatch):
    module = load("conftest")
    module.pytest_runtest_setup()
    monkeypatch.setenv("AUTOHDR_BENCH_END", "1")
    with pytest.raises(pytest.exit.Exception, match="no time left"):
        module.pytest_runtest_setup()


@pytest.mark.parametrize("mode", ["forward", "training"])
def test_scans_that_a_scan_is_compared_with(mode):
    problem = problems.selective_scan(2, 6, 45, torch.float32, "cpu")
    expected = problem.to(torch.float64).runner(mode, "reference")()
    torch.testing.assert_close(problems.scan_gold(problem, mode, states=3000), expected)
    for column in problems.scan_columns():
        for a, e in zip(problem.runner(mode, column)(), expected, strict=True):
            torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4)


def test_checkpointed_restormer():
    model = create_model("restormer_nano")
    x = torch.rand(1, 3, 16, 24)
    (expected,) = bench_restormer.runner(model, x, "training", "float32", "reference")()
    (actual,) = bench_restormer.runner(copy.deepcopy(model), x, "training", "float32", "checkpointed")()
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("mode", ["forward", "training"])
def test_a_restormer_as_a_cuda_graph(recorded, mode):  # noqa: F811
    model, x = create_model("restormer_nano"), torch.rand(1, 3, 16, 24)
    run = bench_restormer.runner(model, x, mode, "float32", "graph")
    replays = recorded[0].replays
    torch.testing.assert_close(run(), bench_restormer.runner(model, x, mode, "float32", "cpu")())
    assert recorded[0].replays == replays + 1


def test_a_gold_that_memory_does_not_suffice_for_is_tried_once(monkeypatch):
    tried = []

    def runner(model, x, mode, dtype, column):
        tried.append(x.dtype)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench_restormer, "DEVICE", "cuda")
    monkeypatch.setattr(bench_restormer, "subject", lambda height, width: (torch.nn.Linear(1, 1), torch.zeros(1)))
    monkeypatch.setattr(bench_restormer, "runner", runner)
    bench_restormer.gold.cache_clear()
    assert [bench_restormer.gold(1, 1, "training") for column in range(3)] == [(None, "none")] * 3
    assert tried == [torch.float64, torch.float32]
    bench_restormer.gold.cache_clear()


def test_restormer_s_gold_keeps_nothing_on_the_gpu(monkeypatch):
    """Whatever the backward pass needs goes through the hooks of save_on_cpu, the checkpoints' inputs too."""
    saved = []

    class Hooks(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self):
            super().__init__(lambda tensor: saved.append(tensor.shape) or tensor, lambda tensor: tensor)

    model, x = create_model("restormer_nano"), torch.rand(1, 3, 16, 24)
    blocks = sum(len(m.blocks) for m in model.modules() if isinstance(m, Level))
    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Hooks)
    monkeypatch.setattr(bench_restormer, "subject", lambda height, width: (model, x))
    bench_restormer.gold.cache_clear()
    ((actual,), dtype) = bench_restormer.gold(16, 24, "training")
    bench_restormer.gold.cache_clear()
    (expected,) = bench_restormer.runner(model, x, "training", "float32", "reference")()
    torch.testing.assert_close(actual, expected)
    assert dtype == "float32" and len(saved) >= blocks


def test_a_parameter_s_gradient_near_zero_is_checked_among_the_others():
    dx, weights, temperature = torch.ones(100), torch.ones(1000), torch.full((1,), 1e-3)
    problem = SimpleNamespace(op="mdta", to=lambda dtype: problem, runner=lambda mode, column: lambda: [dx, weights, temperature])
    found = []

    def timed(function, error, limit, **facts):
        changed = ([dx, weights, 3 * temperature], [dx, 1.1 * weights, temperature], [1.1 * dx, weights, temperature])
        found.extend(error(gradients) <= limit for gradients in changed)

    load("image_op").bench(timed, lambda *arguments: problem, 48, 8, 8, "float32", "training", "reference")
    assert found == [True, False, False]


def test_the_cases_of_a_gpu():
    """Every file is read and its cases are made as on a GPU."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", *sorted(HERE.glob("bench_*.py"))]
    env = os.environ | {"AUTOHDR_BENCH_DEVICE": "cuda"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=HERE.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    for case in (
        "[2192-3296-training-bfloat16-checkpointed]",
        "[896-896-forward-bfloat16-compiled]",
        "[384-384-training-bfloat16-graph]",
        "[8x1536x4096-bfloat16-training-parallel]",
    ):
        assert case in done.stdout
    assert "[1x192x147456-float32-forward-reference]" not in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_check_without_a_gpu():
    done = subprocess.run([sys.executable, HERE / "gpu_check.py"], capture_output=True, text=True)
    assert done.returncode == 1 and "gpu-check: there is no GPU that torch can use" in done.stderr


@pytest.fixture
def check_gpu(tmp_path, monkeypatch):
    """main() with these arguments, and what it wrote, where the build and the tests fail and each file measures one row."""

    def fail(check):
        raise OSError("no such compiler")

    def bench(check, name, selection):
        check.rows.append(row(name))
        return []

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(floors, "gpu_properties", lambda: H200)
    monkeypatch.setattr(gpu_check, "BEGIN", time.monotonic())
    monkeypatch.setattr(gpu_check, "missing", lambda: [])
    for part, function in {"build": fail, "tests": lambda check: ["2 failed"], "bench": bench}.items():
        monkeypatch.setattr(gpu_check.Check, part, function)
    out = tmp_path / "h200.json"

    def check(*arguments):
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(out), "--commit", "1234567", *arguments])
        return gpu_check.main(), json.loads(out.read_text())

    return check


def outcomes(results):
    return {name: part["passed"] for name, part in results["checks"].items()}


def test_gpu_check_goes_on_after_a_failure(check_gpu, monkeypatch, capsys):
    some = ("--files", "gdfn", "mdta", "--only")
    code, results = check_gpu(*some, "bench", "tests", "build")
    found = {"build": False, "backends": True, "tests": False, "bench gdfn": True, "bench mdta": True}
    assert (code, outcomes(results), results["commit"]) == (1, found, "1234567")
    assert results["checks"]["build"]["faults"] == ["OSError: no such compiler"]
    assert results["rows"] == [row("gdfn"), row("mdta")]

    monkeypatch.setattr(gpu_check.Check, "tests", lambda check: [])
    code, results = check_gpu("--only", "tests")
    assert (code, outcomes(results)) == (0, found | {"tests": True}) and results["rows"] == [row("gdfn"), row("mdta")]

    code, results = check_gpu("--only", "bench", "--files", "machine")
    assert (code, outcomes(results)) == (0, found | {"tests": True, "bench machine": True})
    assert results["rows"] == [row("gdfn"), row("mdta"), row("machine")]

    code, results = check_gpu(*some, "tests", "bench", "--minutes", "0")
    assert code == 1 and results["checks"]["bench mdta"]["faults"] == ["no time left"]
    assert re.search("^tests +FAILED", capsys.readouterr().out, re.MULTILINE)

    monkeypatch.setattr(gpu_check, "missing", lambda: ["mdta: cuda cannot run: no such kernel"])
    assert check_gpu("--only", "tests")[0] == 1


def test_gpu_check_keeps_what_was_done_before_it_was_killed(check_gpu, tmp_path, monkeypatch):
    def bench(check, name, selection):
        if name == "mdta":
            raise KeyboardInterrupt
        check.rows.append(row(name))
        return []

    monkeypatch.setattr(gpu_check.Check, "bench", bench)
    with pytest.raises(KeyboardInterrupt):
        check_gpu("--only", "bench")
    results = json.loads((tmp_path / "h200.json").read_text())
    done = ["add_norm", "apply_edit", "causal_conv1d", "gdfn", "machine"]
    assert list(results["checks"]) == ["backends", *(f"bench {name}" for name in done)]
    assert results["rows"] == [row(name) for name in done]


def test_results_of_another_commit_are_left_out():
    before, now = gpu_results(row(), row(backend="triton")), gpu_results(row(seconds=1.0))
    assert [r["seconds"] for r in gpu_check.merge(before, now)["rows"]] == [1.0, 4e-4]
    before["machine"] |= {"processor": "another", "threads": 8}  # beside the same GPU
    merged = gpu_check.merge(before, now)
    assert len(merged["rows"]) == 2 and merged["machine"] == now["machine"]
    for other in (
        {"commit": "7654321"},
        {"versions": {"torch": "2.12.0"}},
        {"machine": now["machine"] | {"gpu": H200 | {"name": "NVIDIA H100"}}},
    ):
        assert gpu_check.merge(before | other, now) == now


def soon(seconds):
    return time.monotonic() + seconds


def once_begun(folder: Path, check):
    """The check, whose time ends as soon as a part has begun, however slow the machine is."""

    def left():
        while not (folder / "begun").exists():
            time.sleep(0.05)
        return 0.1

    check.left = left
    return check


def test_a_part_that_hangs_is_stopped(tmp_path):
    code = "import sys, time; print('begun', flush=True); open(sys.argv[1] + '/begun', 'w'); time.sleep(600)"
    output, faults = once_begun(tmp_path, gpu_check.Check(soon(60))).run([sys.executable, "-c", code, tmp_path], "hang")
    assert output == "begun\n" and faults == ["hang: no time left\nbegun\n"]
    assert gpu_check.Check(soon(600)).run([sys.executable, "-c", "raise SystemExit(3)"], "end")[1] == ["end: exit code 3\n"]


CHILD = """
import subprocess, sys
from pathlib import Path
child = subprocess.Popen(["sh", "-c", "sleep 600; touch ended"], cwd=sys.argv[1], start_new_session=True)
print("begun", flush=True)
part = Path(sys.argv[1], "part")
part.write_text(str(child.pid))
part.rename(part.with_name("begun"))
child.wait()
"""


def test_a_child_that_keeps_the_pipe_is_not_waited_for(tmp_path):
    """It is in a session of its own, so that the end of its parent's is not its own."""
    check = once_begun(tmp_path, gpu_check.Check(soon(60)))
    assert check.run([sys.executable, "-c", CHILD, tmp_path], "hang") == ("begun\n", ["hang: no time left\nbegun\n"])
    assert not (tmp_path / "ended").exists()
    os.killpg(int((tmp_path / "begun").read_text()), signal.SIGKILL)


def test_tests_run_beside_each_other(monkeypatch):
    commands = []
    monkeypatch.setattr(gpu_check, "ops", lambda backend: ["mdta"])
    check = gpu_check.Check(soon(60))
    check.run = lambda command, name, **variables: commands.append(command) or ("", [])
    assert check.tests() == [] and len(commands) == 2
    for command in commands:
        assert "tests/kernels/test_mdta.py" in command and command[-2:] == ["-n", "4"]


def test_programs_beside_python_are_found():
    """ninja, where the environment of python is not activated."""
    command = [sys.executable, "-c", "import os; print(os.environ['PATH'])"]
    first = gpu_check.Check(soon(600)).run(command, "path")[0].split(os.pathsep)[0]
    assert first == str(Path(sys.executable).parent)


def test_the_sanitizer_must_have_watched():
    clean = "all calls made\n========= ERROR SUMMARY: 0 errors\n"
    assert gpu_check.sanitizer_faults(clean, "memcheck") == []
    assert (
        gpu_check.sanitizer_faults("all calls made\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors)", "racecheck")
        == []
    )
    for output in ("all calls made\n", "========= ERROR SUMMARY: 0 errors\n", clean.replace("0 errors", "3 errors")):
        assert gpu_check.sanitizer_faults(output, "memcheck")[0].startswith("memcheck: no clean summary")


def test_the_sanitizer_s_calls(capsys):
    gpu_check.calls("reference", "cpu")
    assert capsys.readouterr().out == "all calls made\n"


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_a_peer_that_is_wrong_is_not_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(problems.importlib.util, "find_spec", lambda name: None)
    expected, runs = peers.scans((2, 3, 50), tmp_path)
    assert runs.keys() == {"autohdr", "the loop in C"}
    runs["wrong"] = lambda: [1.001 * expected[0]]
    found = peers.row("a scan", expected, runs, rounds=1)
    assert found["seconds"].keys() == found["times_as_long"].keys() == {"autohdr", "the loop in C"}
    assert found["errors"]["wrong"] == pytest.approx(1e-3, rel=0.01) and max(list(found["errors"].values())[:2]) < 1e-6
    assert "a scan: not reported, since they differ from PyTorch: {'wrong': 0.00" in capsys.readouterr().out
    assert torch.tensor(2.0**-140).mul(0.5) > 0  # the loop has not made this process flush subnormal numbers to zero
