"""Runs the benchmarks and writes what they measured.

Every file runs in a process of its own under glibc's default malloc and under a tuned one, which keeps large blocks instead
of giving them back to the system, so that eager PyTorch does not pay for page faults at every tensor: the fairer baseline.
Ratios hold only within one run on one machine.

    python benchmarks/run.py [FILE ...] [--out results/NAME.json]
    python benchmarks/run.py --tables           the tables of the README and of docs/performance.md from the newest results

A GPU's results come from benchmarks/gpu_check.py.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import tables
import torch

import autohdr
from autohdr import kernels
from autohdr.files import replacing
from autohdr.kernels import _extension

HERE = Path(__file__).parent
RESULTS = HERE / "results"
README = HERE.parent / "README.md"
PERFORMANCE = HERE.parent / "docs" / "performance.md"
MALLOCS = {
    "default": {},
    "tuned": {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=17179869184"},
}


def processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        fields = {k.strip(): v.strip() for k, v in fields.items()}
        return f"{fields.get('model name')} (family {fields.get('cpu family')}, model {fields.get('model')})"
    return platform.processor()


def commit(*of: str) -> str:
    """The last one, or the last that changed one of these paths. Marked dirty where such a file was changed since, by default any
    tracked file but the results themselves."""
    if shutil.which("git") is None:
        return "unknown"

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=HERE.parent, capture_output=True, text=True).stdout.strip()

    paths = of or (".", ":!benchmarks/results", ":!README.md")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *paths)
    head = git("log", "-1", "--format=%h", "--", *of)
    return (head + "-dirty" * bool(changed)) if head else "unknown"


def measure_file(file: Path, variables: dict[str, str], *arguments: str, timeout: float | None = None) -> tuple[list[dict], str]:
    """The rows of one file's cases, measured in a process of its own, and what went wrong, if anything."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.jsonl"
        command = [
            sys.executable,
            "-m",
            "pytest",
            str(file),
            "--benchmark-columns=min,median,max",
            "-p",
            "no:cacheprovider",
            "-rs",
        ]
        fault = ""
        try:
            env = os.environ | variables | {"AUTOHDR_BENCH_ROWS": str(out)}
            done = subprocess.run([*command, *arguments], env=env, cwd=HERE.parent, timeout=timeout)
            if done.returncode not in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
                fault = f"{file.name}: pytest ended with code {done.returncode}"
        except subprocess.TimeoutExpired:
            fault = f"{file.name}: stopped after {timeout:.0f} s"
        lines = out.read_text().splitlines() if out.exists() else []
        return [json.loads(line) for line in lines], fault


def describe(commit: str, rows: list[dict], gpu: dict | None) -> dict:
    """The results as they are written."""
    module = _extension.module
    return {
        "machine": {
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "cpu_isa": module.build_info()["cpu_isa"] if module else "none",
            "gpu": gpu,
        },
        "versions": {"autohdr": autohdr.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "backends": {op: kernels.backends(op) for op in kernels.OPS},
        "commit": commit,
        "rows": rows,
    }


def run(files: list[Path]) -> tuple[dict, list[str]]:
    """On the CPU: the results, and what went wrong."""
    rows, faults = [], []
    for file in files:
        for malloc, variables in MALLOCS.items():
            print(f"== {file.name}, {malloc} malloc", flush=True)
            found, fault = measure_file(file, variables | {"AUTOHDR_BENCH_DEVICE": "cpu"})
            rows += [row | {"malloc": malloc} for row in found]
            faults += [f"{fault} ({malloc} malloc)"] if fault else []
    return describe(commit(), rows, None), faults


def write(results: dict, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as part:
        part.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=sorted(HERE.glob("bench_*.py")))
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu.json")
    parser.add_argument(
        "--tables", action="store_true", help="only write the pages' tables anew, from --out, the GPUs' files and the predictions"
    )
    options = parser.parse_args()
    faults = []
    if not options.tables:
        results, faults = run([f.resolve() for f in options.files])
        write(results, options.out)
    results = json.loads(options.out.read_text())
    others = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))]
    text = tables.cpu(results) + "\n\n" + tables.gpus([r for r in others if is_gpu(r)])
    print(text)
    if options.tables:
        put(text, README, "benchmarks")
        put(tables.predictions(json.loads((RESULTS / "instructions.json").read_text())), PERFORMANCE, "predictions")
        measured = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("peers_*.json"))]
        put("\n\n".join(map(tables.peers, measured)), README, "peers")
        compared = RESULTS / "families.json"
        put(tables.families(json.loads(compared.read_text()) if compared.exists() else None), README, "families")
    for fault in faults:
        print(f"failed: {fault}", file=sys.stderr)
    return int(bool(faults))


def put(text: str, page: Path, name: str) -> None:
    """Between the page's marks of that name."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = page.read_text().split(begin)
    page.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")


def is_gpu(results: dict) -> bool:
    """Whether these are a GPU's results as gpu_check.py writes them (tiling.json has no such machine)."""
    return isinstance(results.get("machine", {}).get("gpu"), dict)


if __name__ == "__main__":
    sys.exit(main())
