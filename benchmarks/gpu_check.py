"""Everything that needs a GPU: make gpu-check, or python benchmarks/gpu_check.py [--only PART ...] [--files NAME ...].

    build       the CUDA kernels, for this GPU's architecture unless TORCH_CUDA_ARCH_LIST names others; fetches nothing
    tests       tests/kernels on the GPU, with the cuda and with the triton backend
    sanitizer   compute-sanitizer (memcheck, racecheck, initcheck, synccheck) over small calls of every op, forward and backward
    kernels     every kernel's time over the one predicted from its machine code (docs/performance.md), and what the constants
                of the predictions should be
    bench       the benchmarks, ops first, among them a training step of mamba_diffusion_large at 384×384
    compiled    torch.compile's columns of the benchmarks; compilation takes minutes, so only where --only names it

A part that fails is reported, and the rest still runs; the exit status is then 1. Results go to benchmarks/results/NAME.json as
soon as a part or a file of benchmarks is done; a later call with others adds to it, as long as GPU, versions and commit are the
same. What --minutes cuts off counts as failed: run it in a call of its own. The default, 8.5, keeps a call that may take ten
minutes from being killed. Two calls fit a quarter of an hour, the most valuable first:

    --only build tests sanitizer --minutes 6
    --only kernels bench compiled
"""

import argparse
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

BEGIN = time.monotonic()  # --minutes has what importing torch takes in it

import torch  # noqa: E402

HERE = Path(__file__).parent
ROOT = HERE.parent
PARTS = ("build", "tests", "sanitizer", "kernels", "bench", "compiled")
MODELS = ("restormer", "mamba_diffusion")  # measured after the ops
FILES = sorted((file.stem.removeprefix("bench_") for file in HERE.glob("bench_*.py")), key=lambda f: (f in MODELS, f))
BACKENDS = ("cuda", "triton")
NEEDED = ("einops", "ninja", "pybind11", "pytest", "pytest_benchmark", "safetensors", "setuptools")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# What reads memory that an earlier test freed is seen only if that memory goes back to the driver at once.
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
END = 15  # seconds at the end of a part, in which no further case of a benchmark is begun


class Check:
    """The run: what there is left of its time until end (of the monotonic clock), and what it found so far."""

    def __init__(self, end: float):
        self.end = end
        self.rows: list[dict] = []
        self.checks: dict[str, dict] = {}
        self.calibration: dict = {}
        before = {"PYTHONPATH": str(ROOT), "PATH": str(Path(sys.executable).parent)}  # ninja lies beside python
        self.environment = os.environ | {
            name: os.pathsep.join(filter(None, (place, os.environ.get(name)))) for name, place in before.items()
        }

    def left(self) -> float:
        return max(1.0, self.end - time.monotonic())

    def run(self, command: list, name: str, **variables: str) -> tuple[str, list[str]]:
        """A command's output, and what went wrong, with the end of that output."""
        arguments = [str(c) for c in command]
        options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
        with subprocess.Popen(arguments, env=self.environment | variables, start_new_session=True, **options) as process:
            try:
                output, _ = process.communicate(timeout=self.left())
                fault = f"exit code {process.returncode}" if process.returncode else ""
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)  # its children as well: a compiler, a program under the sanitizer
                fault = "no time left"
                try:
                    output = process.communicate(timeout=5)[0]
                except subprocess.TimeoutExpired as held:  # a child in a session of its own lives on, with the pipe
                    output = (held.stdout or b"").decode(errors="replace")
        return output, [f"{name}: {fault}\n{output[-6000:]}"] if fault else []

    def build(self) -> list[str]:
        major, minor = torch.cuda.get_device_capability()
        variables = {"AUTOHDR_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}")}
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        return self.run(command, "build", **variables)[1]

    def tests(self) -> list[str]:
        def run(backend: str) -> list[str]:
            files = [f"tests/kernels/test_{op}.py" for op in ops(backend)] + ["tests/kernels/test_gpu.py"]
            command = [sys.executable, "-m", "pytest", *files, "-p", "no:cacheprovider", "--durations=5"]
            command += ["-n", "4"] if importlib.util.find_spec("xdist") else []
            output, faults = self.run(command, f"tests, {backend}", AUTOHDR_TEST_BACKEND=backend)
            print(f"   tests, {backend}: {(output.splitlines() or [''])[-1]}", flush=True)
            return faults

        with ThreadPoolExecutor() as pool:
            return sum(pool.map(run, BACKENDS), [])

    def sanitizer(self) -> list[str]:
        toolkits = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
        places = [os.environ["PATH"], *(f"{home}/bin" for home in toolkits if home)]
        program = shutil.which("compute-sanitizer", path=os.pathsep.join(places))
        if program is None:
            return ["sanitizer: there is no compute-sanitizer (it comes with the CUDA toolkit; set CUDA_HOME)"]

        def run(job: tuple[str, str]) -> list[str]:
            tool, backend = job
            command = [program, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
            if tool == "memcheck":  # its own checks of memory alone: torch asks the driver for things that it may not have
                command += ["--report-api-errors", "no"]
            worker = [sys.executable, __file__, "--calls", backend]
            output, faults = self.run([*command, *worker], f"{tool}, {backend}", **UNCACHED)
            return faults or sanitizer_faults(output, f"{tool}, {backend}")

        with ThreadPoolExecutor(4) as pool:
            return sum(pool.map(run, [(tool, backend) for backend in BACKENDS if ops(backend) for tool in TOOLS]), [])

    def kernels(self) -> list[str]:
        output, faults = self.run([sys.executable, HERE / "calibrate.py"], "kernels")
        if not faults:
            self.calibration |= json.loads(output.splitlines()[-1])
        return faults if faults or self.calibration["kernels"] else [f"kernels: nothing is predicted of this GPU\n{output}"]

    def bench(self, name: str, selection: str) -> list[str]:
        variables = {"AUTOHDR_BENCH_DEVICE": "cuda", "AUTOHDR_BENCH_END": str(time.time() + self.left() - END)}
        variables["PYTHONPATH"] = self.environment["PYTHONPATH"]
        measure_file = importlib.import_module("run").measure_file
        rows, fault = measure_file(HERE / f"bench_{name}.py", variables, "-k", selection, timeout=self.left())
        self.rows += rows
        return [fault] if fault else []

    def stages(self, files: list[str]) -> list[dict[str, Callable[[], list[str]]]]:
        """All that comes after the build, by name; what is in one stage runs beside each other."""
        stages = [{"tests": self.tests, "sanitizer": self.sanitizer}, {"kernels": self.kernels}]
        for group in ([f for f in files if f not in MODELS], [f for f in files if f in MODELS]):
            stages += [{f"bench {name}": partial(self.bench, name, "not compiled")} for name in group]
            stages += [{f"compiled {name}": partial(self.bench, name, "compiled")} for name in group]
        return stages

    def part(self, name: str, function: Callable[[], list[str]]) -> None:
        """Runs one of them and notes what became of it."""
        print(f"== {name}", flush=True)
        begin = time.monotonic()
        try:
            faults = function() if begin < self.end else ["no time left"]
        except Exception as error:
            faults = [f"{type(error).__name__}: {error}"]
        self.checks[name] = {"passed": not faults, "seconds": round(time.monotonic() - begin, 1), "faults": faults}
        print("\n".join([f"== {name}: {'passed' if not faults else 'FAILED'}", *faults]), flush=True)


def gpu_ops() -> list[str]:
    kernels = importlib.import_module("autohdr.kernels")
    return [op for op, dtypes in kernels.OPS.items() if "cuda" in dtypes]


def ops(backend: str) -> list[str]:
    """Those with CUDA kernels that the backend can run here."""
    kernels = importlib.import_module("autohdr.kernels")
    return [op for op in gpu_ops() if kernels.backends(op)[backend] == "available"]


def missing() -> list[str]:
    """What every part leaves out, which therefore counts as a failure of its own."""
    kernels = importlib.import_module("autohdr.kernels")
    reasons = {(op, b): kernels.backends(op)[b] for op in gpu_ops() for b in BACKENDS if b in kernels.OPS[op]}
    return [f"{op}: {backend} cannot run: {why}" for (op, backend), why in reasons.items() if why != "available"]


def sanitizer_faults(output: str, name: str) -> list[str]:
    """Unless the sanitizer says that it watched, and found nothing, all the calls that were to be made."""
    clean = re.search(r"(ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards)", output)
    return [] if clean and "all calls made" in output else [f"{name}: no clean summary\n{output[-6000:]}"]


def calls(backend: str, device: str = "cuda") -> None:
    """Every op forward and backward on small and awkward sizes; what compute-sanitizer watches."""
    problems = importlib.import_module("problems")
    for op in ops(backend):
        make = getattr(problems, op)
        for shape, dtype in itertools.product(make.awkward, (torch.float32, torch.bfloat16, torch.float16)):
            problem = make(*shape, dtype, device)
            for mode in ("forward", "training"):
                for tensor in problem.runner(mode, backend)():
                    if not tensor.isfinite().all():
                        raise SystemExit(f"{op}, {dtype}, {mode}: not finite")
    print("all calls made")


def merge(before: dict, now: dict) -> dict:
    """now, and what before has beside it; nothing of before where it is of another GPU, version or commit.

    The processor may be another: it changes with every machine that is rented.
    """

    def origin(results: dict) -> tuple:
        return results["machine"]["gpu"]["name"], results["versions"], results["commit"]

    if origin(before) != origin(now):
        return now

    def key(row: dict) -> tuple:
        return tuple(row[k] for k in ("op", "shape", "mode", "dtype", "backend"))

    rows = {key(r): r for r in before["rows"]} | {key(r): r for r in now["rows"]}
    calibration = now["calibration"] or before["calibration"]
    return now | {"rows": list(rows.values()), "checks": before["checks"] | now["checks"], "calibration": calibration}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS[:-1], metavar="PART", help="default: all but compiled")
    parser.add_argument("--files", nargs="+", choices=FILES, default=FILES, metavar="NAME", help=f"of {', '.join(FILES)}")
    parser.add_argument("--minutes", type=float, default=8.5, help="of the whole call (default 8.5)")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/NAME.json, after the GPU")
    parser.add_argument("--commit", help="where the tree is no git checkout")
    parser.add_argument("--calls", metavar="BACKEND", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        built = f"with CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        print(f"gpu-check: there is no GPU that torch can use (torch {torch.__version__}, built {built})", file=sys.stderr)
        return 1
    if absent := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        print(f"gpu-check: these Python packages are missing: {', '.join(absent)}", file=sys.stderr)
        return 1
    sys.path[:0] = [str(ROOT)]
    if options.calls:
        calls(options.calls)
        return 0
    check = Check(BEGIN + 60 * options.minutes)
    if "build" in options.only:
        check.part("build", check.build)
    # Not before: these import autohdr, which loads what was built.
    run, floors, tables = (importlib.import_module(module) for module in ("run", "floors", "tables"))
    gpu = floors.gpu_properties()
    results = run.describe(options.commit or run.commit(), check.rows, gpu)
    results["versions"] |= {"cuda": torch.version.cuda, "triton": version("triton"), "driver": driver()}
    results["checks"], results["calibration"] = check.checks, check.calibration
    path = options.out or run.RESULTS / (re.sub(r"[^a-z0-9]+", "-", gpu["name"].lower()) + ".json")
    one_at_a_time = threading.Lock()

    def part(job: tuple[str, Callable[[], list[str]]]) -> None:
        """Written at once, so that what ends this process takes nothing that was done."""
        check.part(*job)
        with one_at_a_time:
            run.write(merge(json.loads(path.read_text()), results) if path.exists() else results, path)

    part(("backends", missing))
    for stage in check.stages(options.files):
        with ThreadPoolExecutor() as pool:
            list(pool.map(part, [job for job in stage.items() if job[0].split()[0] in options.only]))
    print(tables.gpu(json.loads(path.read_text())))
    for name, outcome in check.checks.items():
        print(f"{name:<25} {'passed' if outcome['passed'] else 'FAILED'} in {outcome['seconds']} s")
    print(f"results: {path}")
    return int(not all(outcome["passed"] for outcome in check.checks.values()))


def version(module: str) -> str | None:
    try:
        return importlib.import_module(module).__version__
    except ImportError:
        return None


def driver() -> str | None:
    file = Path("/proc/driver/nvidia/version")
    found = re.search(r"Kernel Module.*?(\d+\.[\d.]+)", file.read_text()) if file.exists() else None
    return found[1] if found else None


if __name__ == "__main__":
    sys.exit(main())
