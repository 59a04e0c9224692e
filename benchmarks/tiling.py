"""Whole photos in little memory: restormer_base under a memory cap against the same without one, each in a process of its own.

    python benchmarks/tiling.py [--photo FILE] [--cap 3GB] [--sizes 3297x2201 1024x1024] [--whole] [--out results/tiling.json]

Without --whole the run without a cap is left out at sizes above two megapixels. Writes for each size the seconds, the highest
resident memory of the whole process (Linux's VmHWM: interpreter, PyTorch, weights and photo included) and the largest
difference of a pixel.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from run import commit, processor

from autohdr import create_model
from autohdr.data.images import read_photo
from autohdr.measure import format_bytes, parse_bytes, resident_bytes
from autohdr.models import tiling

HERE = Path(__file__).parent


def worker(options: argparse.Namespace) -> None:
    """One forward pass; prints what it took, and leaves what the model adds to the photo in options.result."""
    width, height = map(int, options.sizes[0].split("x"))
    torch.manual_seed(0)
    model = create_model("restormer_base").eval()
    if options.photo:
        image = torch.from_numpy(read_photo(options.photo).pixels[:height, :width]).permute(2, 0, 1)[None]
    else:
        image = torch.rand(1, height, width, 3).permute(0, 3, 1, 2)
    facts = {"size": f"{image.shape[3]}×{image.shape[2]}", "cap_bytes": parse_bytes(options.cap) if options.cap else None}
    if options.cap:
        plan = tiling.make_plan(model, image, facts["cap_bytes"], resident_bytes())
        facts |= {"plan": str(plan), "planned_bytes": plan.peak_bytes}
    begin = time.perf_counter()
    with torch.inference_mode():
        output = tiling.in_strips(model, image, facts["cap_bytes"]) if options.cap else model(image)
    facts["seconds"] = time.perf_counter() - begin
    facts["peak_bytes"] = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    np.save(options.result, (output - image).numpy())
    print(json.dumps(facts))


def measured(options: argparse.Namespace, size: str, cap: str | None, result: Path) -> dict:
    command = [sys.executable, __file__, "--worker", "--sizes", size, "--result", str(result), "--cap", cap or ""]
    if options.photo:
        command += ["--photo", str(options.photo)]
    facts = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    print(
        size,
        cap or "no cap",
        f"{facts['seconds']:.1f} s, peak {format_bytes(facts['peak_bytes'])}",
        facts.get("plan", ""),
        flush=True,
    )
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photo", type=Path)
    parser.add_argument("--cap", default="3GB")
    parser.add_argument("--sizes", nargs="+", default=["3297x2201", "1024x1024"])
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "tiling.json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        capped, whole = Path(folder) / "capped.npy", Path(folder) / "whole.npy"
        for size in options.sizes:
            row = measured(options, size, options.cap, capped)
            width, height = map(int, size.split("x"))
            if options.whole or width * height <= 2e6:
                other = measured(options, size, None, whole)
                row["without_cap"] = {key: other[key] for key in ("seconds", "peak_bytes")}
                difference = np.abs(np.load(capped, mmap_mode="r") - np.load(whole, mmap_mode="r"))
                row["largest_difference"] = float(difference.max())
                row["largest_change"] = float(np.abs(np.load(whole, mmap_mode="r")).max())
                print(
                    f"largest difference {row['largest_difference']:.1e}, the model adds up to {row['largest_change']:.2f}",
                    flush=True,
                )
            rows.append(row)
    machine = {"processor": processor(), "threads": torch.get_num_threads()}
    results = {
        "machine": machine,
        "torch": torch.__version__,
        "commit": commit(),
        "model": "restormer_base, float32",
        "rows": rows,
    }
    options.out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
