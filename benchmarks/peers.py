"""Ours beside other people's runtimes on a CPU, in float32, forward, call by call in turn: whole networks against eager PyTorch,
torch.compile, ONNX Runtime and OpenVINO, and the scan against a plain loop in C, mamba.py and Intel's extension of PyTorch.

    pip install openvino mambapy        in an environment of their own; what is absent is left out, and named
    python benchmarks/peers.py [--rounds 5] [--avx2] [--ipex PYTHON] [--out results/peers_avx512.json]

--ipex names a Python of another environment, which has intel-extension-for-pytorch and the PyTorch of its version: the scan runs
there, in a process of its own. --avx2 keeps ours, PyTorch, its extension, torch.compile and the loop in C to AVX2 on a processor
with AVX-512; ONNX Runtime has no such setting, and of OpenVINO none is known.

Under the tuned malloc of run.py, with as many threads as PyTorch takes. What is farther from PyTorch in float32 than 1e-4 of the
network's change (of the scan's result) is not reported.
"""

import argparse
import ctypes
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import relative_error
from problems import DSTATE, Problem, selective_scan
from run import commit, processor
from runtimes import in_runtimes, under_tuned_malloc
from torch import Tensor, nn

from autohdr import _C, create_model, export
from autohdr.kernels.backends import default_backend
from autohdr.models import save_weights
from autohdr.models.network import Blocks

RESULTS = Path(__file__).parent / "results"
NETWORKS = [("restormer_base", 384), ("restormer_tiny", 1024)]
SCANS = [(1, 192, 4096), (2, 96, 9216)]
LIMIT = 1e-4

AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}

LOOP = """
#include <math.h>
#include <stddef.h>
extern "C" void scan(const float* u, const float* delta, const float* A, const float* B, const float* C, const float* D,
                     const float* z, const float* bias, float* y, long batch, long dim, long seqlen) {
#pragma omp parallel for collapse(2)
  for (long b = 0; b < batch; ++b)
    for (long d = 0; d < dim; ++d) {
      float h[N] = {0};
      for (long t = 0; t < seqlen; ++t) {
        const size_t at = (b * dim + d) * seqlen + t;
        const float x = delta[at] + bias[d], step = x > 20 ? x : log1pf(expf(x));
        float sum = D[d] * u[at];
        for (int n = 0; n < N; ++n) {
          const size_t from = (b * N + n) * seqlen + t;
          h[n] = expf(step * A[d * N + n]) * h[n] + step * B[from] * u[at];
          sum += h[n] * C[from];
        }
        y[at] = sum * z[at] / (1 + expf(-z[at]));
      }
    }
}
"""
"""The recurrence as one writes it down; gcc makes vectors of it."""

IPEX = """
import sys

import intel_extension_for_pytorch
import torch

folder, threads = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(threads)
tensors = torch.load(f"{folder}/tensors.pt")
for line in sys.stdin:
    with torch.inference_mode():
        y = torch.ops.torch_ipex.selective_scan_fn(*tensors, True, False)[0]
    if line == "keep\\n":
        torch.save(y, f"{folder}/y.pt")
    print("done", flush=True)
"""
"""A call a line."""

Run = Callable[[], list[Tensor]]


def networks(name: str, side: int, folder: Path) -> tuple[list[Tensor], dict[str, Run]]:
    """What PyTorch makes of a random image beside the image itself, and each competitor."""
    torch.manual_seed(0)
    model = create_model(name).eval().requires_grad_(False)
    x = torch.rand(1, 3, side, side).contiguous(memory_format=torch.channels_last)
    save_weights(folder / "model.safetensors", model, {})
    program = folder / "model.onnx"
    export.export(program, "onnx", folder / "model.safetensors")

    def ours() -> list[Tensor]:
        return [model(x) - x]

    def reference(network: nn.Module) -> Run:
        def run() -> list[Tensor]:
            with default_backend("reference"):
                return [network(x) - x]

        return run

    blocks = create_model(name).eval().requires_grad_(False)
    blocks.load_state_dict(model.state_dict())
    for stage in blocks.stages():
        if isinstance(stage, Blocks):
            for half in stage.halves:
                half.module.compile(dynamic=False)
    runs = {"autohdr": ours, "eager": reference(model.to(memory_format=torch.channels_last))}
    runs["torch.compile by block"] = reference(blocks.to(memory_format=torch.channels_last))
    expected = runs["eager"]()

    def added(run: Callable[[], Any]) -> Run:
        return lambda: [torch.from_numpy(run()) - x]

    others = in_runtimes(program, torch.get_num_threads(), {"image": x.numpy()}, spins=True)
    runs |= {runtime: added(run) for runtime, run in others.items()}
    return expected, runs


def c_loop(problem: Problem, folder: Path) -> Run:
    made, library = folder / "scan.o", folder / "scan.so"
    march = "haswell" if torch.backends.cpu.get_cpu_capability() == "AVX2" else "native"
    flags = ["-O3", f"-march={march}", "-ffast-math", "-fopenmp", f"-DN={DSTATE}", "-fPIC", "-x", "c++", "-c", "-"]
    subprocess.run(["g++", *flags, "-o", str(made)], input=LOOP, text=True, check=True)
    # Without -ffast-math, which would have the whole process flush subnormal numbers to zero.
    subprocess.run(["g++", "-shared", "-fopenmp", str(made), "-o", str(library), "-lm"], check=True)
    function = ctypes.CDLL(str(library)).scan
    tensors = [t.contiguous() for t in problem.tensors]

    def run() -> list[Tensor]:
        y = torch.empty_like(tensors[0])
        sizes = [ctypes.c_long(size) for size in y.shape]
        function(*(ctypes.c_void_p(t.data_ptr()) for t in (*tensors, y)), *sizes)
        return [y]

    return run


def in_ipex(python: str, problem: Problem, folder: Path) -> Run:
    torch.save([t.contiguous() for t in problem.tensors], folder / "tensors.pt")
    process = subprocess.Popen(
        [python, "-c", IPEX, str(folder), str(torch.get_num_threads())],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # Packages that are found by it are for this PyTorch.
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )

    def ask(line: str) -> None:
        assert process.stdin and process.stdout
        print(line, file=process.stdin, flush=True)
        if process.stdout.readline() != "done\n":
            raise SystemExit(f"{python}: intel-extension-for-pytorch does not run there")

    ask("keep")
    y = torch.load(folder / "y.pt")

    def run() -> list[Tensor]:
        ask("")
        return [y]

    return run


def scans(shape: tuple[int, int, int], folder: Path, ipex: str | None = None) -> tuple[list[Tensor], dict[str, Run]]:
    problem = selective_scan(*shape, torch.float32, "cpu")
    runs = {"autohdr": problem.runner("forward", "auto"), "the loop in C": c_loop(problem, folder)}
    if importlib.util.find_spec("mambapy"):
        runs["mamba.py"] = problem.runner("forward", "mamba.py")
    if ipex:
        runs["Intel's extension"] = in_ipex(ipex, problem, folder)
    return problem.runner("forward", "reference")(), runs


def row(case: str, expected: list[Tensor], runs: dict[str, Run], rounds: int) -> dict:
    """Median seconds of each competitor, called in turn after a call to warm up, whose result is compared."""
    errors = {name: relative_error(run(), expected) for name, run in runs.items()}
    if wrong := {name: error for name, error in errors.items() if not error <= LIMIT}:
        print(f"{case}: not reported, since they differ from PyTorch: {wrong}", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in runs if name not in wrong}
    for _ in range(rounds):
        for name, taken in seconds.items():
            time.sleep(0.01)  # until the other's threads no longer wait for work in a loop
            begin = time.perf_counter()
            runs[name]()
            taken.append(time.perf_counter() - begin)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    ratios = {name: round(median / medians["autohdr"], 2) for name, median in medians.items()}
    print(case, ", ".join(f"{name} {ratio}×" for name, ratio in ratios.items()), flush=True)
    return {"case": case, "seconds": medians, "times_as_long": ratios, "errors": errors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--avx2", action="store_true", help="no more than AVX2")
    parser.add_argument("--ipex", help="a Python that has intel-extension-for-pytorch")
    parser.add_argument("--out", type=Path, help="by default results/peers_INSTRUCTIONS.json")
    options = parser.parse_args()
    under_tuned_malloc(**AVX2 if options.avx2 else {})
    capability = torch.backends.cpu.get_cpu_capability()
    if options.avx2:
        _C.use_cpu_isa("avx2")
    versions = {"torch": torch.__version__, "python": sys.version.split()[0]}
    for name in ("onnxruntime", "openvino"):
        if importlib.util.find_spec(name):
            versions[name] = importlib.import_module(name).__version__
    absent = [name for name in ("openvino", "mambapy") if not importlib.util.find_spec(name)]
    if not options.ipex:
        absent.append("intel-extension-for-pytorch")
    rows = []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        # torch.compile would take from its cache what it wrote for other vectors, which crashes.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        for name, side in NETWORKS:
            rows.append(row(f"{name} {side}×{side}", *networks(name, side, Path(folder)), options.rounds))
        for shape in SCANS:
            case = f"selective_scan {'×'.join(map(str, shape))}"
            rows.append(row(case, *scans(shape, Path(folder), options.ipex), options.rounds))
    facts = {
        "processor": processor(),
        "instruction_set": capability,
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "absent": absent,
        "versions": versions,
        "rows": rows,
    }
    out = options.out or RESULTS / f"peers_{capability.lower()}.json"
    out.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
