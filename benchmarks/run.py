"""Runs the benchmarks and writes what they measured.

Every file runs in a process of its own under glibc's default malloc and under a tuned one, which keeps large blocks instead
of giving them back to the system, so that eager PyTorch does not pay for page faults at every tensor: the fairer baseline.
Ratios hold only within one run on one machine.

    python benchmarks/run.py [FILE ...] [--out results/NAME.json]
    python benchmarks/run.py --tables           the README's table from the newest results, in place
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import autohdr
from autohdr import kernels
from autohdr.kernels import _extension

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
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


def commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def run(files: list[Path]) -> dict:
    rows = []
    for file in files:
        for malloc, variables in MALLOCS.items():
            print(f"== {file.name}, {malloc} malloc", flush=True)
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "out.json"
                command = [
                    sys.executable,
                    "-m",
                    "pytest",
                    str(file),
                    f"--benchmark-json={out}",
                    "--benchmark-columns=min,median,max",
                ]
                subprocess.run(command, env=os.environ | variables, cwd=HERE.parent, check=True)
                for b in json.loads(out.read_text())["benchmarks"]:
                    rows.append(
                        {**b["extra_info"], "malloc": malloc, "seconds": b["stats"]["median"], "fastest": b["stats"]["min"]}
                    )
    return {
        "machine": {
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "cpu_isa": _extension.module.build_info()["cpu_isa"],
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": {"autohdr": autohdr.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "backends": {op: kernels.backends(op) for op in kernels.OPS},
        "commit": commit(),
        "rows": rows,
    }


def tables(results: dict) -> str:
    rows = results["rows"]

    def find(op, mode, dtype, backend, malloc):
        for r in rows:
            if (r["op"], r["mode"], r["dtype"], r["backend"], r["malloc"]) == (op, mode, dtype, backend, malloc):
                return r
        return None

    def ratio(ours, theirs, key="seconds"):
        return f"{theirs[key] / ours[key]:.2f}×" if ours and theirs else "not measured"

    base = "restormer_base"
    eager = {(mode, m): find(base, mode, "float32", "reference", m) for mode in ("forward", "training") for m in MALLOCS}
    lines = [
        "| restormer_base, 384×384, against eager PyTorch in channels-last | tuned malloc | default malloc |",
        "|---|---|---|",
    ]
    for label, mode, dtype in (
        ("forward, float32", "forward", "float32"),
        ("forward, bfloat16, against eager float32", "forward", "bfloat16"),
        ("training step, float32", "training", "float32"),
    ):
        cells = [ratio(find(base, mode, dtype, "cpu", m), eager[mode, m]) for m in ("tuned", "default")]
        lines.append(f"| {label}: speed | {cells[0]} | {cells[1]} |")
    # Only the default malloc gives memory back, so that one call's growth is all it took.
    ours, theirs = find(base, "training", "float32", "cpu", "default"), eager["training", "default"]
    known = ours and theirs and ours["memory_source"] == "VmHWM" and ours["growth_bytes"] > 0
    memory = ratio(ours, theirs, "growth_bytes") if known else "not measured"
    lines.append(f"| training step, float32: peak memory, eager's over ours | | {memory} |")
    lines += ["", "| one op, float32, against eager with tuned malloc | forward | training step |", "|---|---|---|"]
    for op in ("mdta", "gdfn"):
        for shape in dict.fromkeys(r["shape"] for r in rows if r["op"] == op):
            level = [r for r in rows if r["op"] == op and r["shape"] == shape and r["malloc"] == "tuned"]
            cells = []
            for mode in ("forward", "training"):
                pair = {r["backend"]: r for r in level if r["mode"] == mode}
                cells.append(ratio(pair.get("cpu"), pair.get("reference")))
            lines.append(f"| {op} {shape} | {cells[0]} | {cells[1]} |")
    m, v = results["machine"], results["versions"]
    lines += [
        "",
        f"Ratios of median times in one run on {m['processor']}, {m['threads']} threads, {m['cpu_isa']} kernels,"
        f" torch {v['torch']}, commit {results['commit']}. GPU: {m['gpu'] or 'not measured'}. Higher is better.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=sorted(HERE.glob("bench_*.py")))
    parser.add_argument("--out", type=Path, default=HERE / "results" / "cpu.json")
    parser.add_argument("--tables", action="store_true", help="only write the README's table anew from --out")
    options = parser.parse_args()
    if not options.tables:
        results = run([f.resolve() for f in options.files])
        options.out.parent.mkdir(exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    text = tables(json.loads(options.out.read_text()))
    print(text)
    if options.tables:
        before, rest = README.read_text().split(BEGIN)
        README.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
