"""Peak memory of a training step of restormer_base against eager PyTorch, and what `autohdr plan` says of both.

    python benchmarks/memory.py [--model restormer_base] [--sizes 256] [--precisions float32 bfloat16] [--out results/memory.json]

A step is the forward pass, the L1 loss and the backward pass, with weights and gradients, without an optimiser. Each runs
in a process of its own, under the default malloc. Eager takes 8 GB at 256×256 and float32; it grows with the pixels.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from run import commit, processor

from autohdr import create_model, kernels
from autohdr.measure import format_bytes, measure
from autohdr.plan import OPTIMIZER, plan

HERE = Path(__file__).parent
BACKENDS = {"ours": "auto", "eager": "reference"}


def worker(model: str, size: int, precision: str, backend: str) -> None:
    """Prints the bytes measured and planned."""
    kernels.set_backend(backend)

    def step(name: str, size: int) -> None:
        network, source = create_model(name), torch.rand(1, 3, size, size).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            output = network(source)
        (output.float() - torch.rand_like(source)).abs().mean().backward()

    step("restormer_nano", 32)  # what PyTorch loads once
    with measure() as measured:
        step(model, size)
    planned = plan(model, size, precision=precision, mode="training")
    print(json.dumps([measured.growth_bytes, planned.peak_bytes - planned.parts[OPTIMIZER]]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="restormer_base")
    parser.add_argument("--sizes", nargs="+", type=int, default=[256])
    parser.add_argument("--precisions", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "memory.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options.model, options.sizes[0], options.precisions[0], options.worker)
    rows = []
    for size in options.sizes:
        for precision in options.precisions:
            row = {"size": size, "precision": precision}
            for name, backend in BACKENDS.items():
                command = [sys.executable, __file__, "--model", options.model, "--sizes", str(size), "--precisions", precision]
                done = subprocess.run([*command, "--worker", backend], check=True, stdout=subprocess.PIPE, text=True)
                row[f"{name}_bytes"], row[f"{name}_planned"] = json.loads(done.stdout)
            rows.append(row)
            figures = (f"{n} {format_bytes(row[f'{n}_bytes'])} (planned {format_bytes(row[f'{n}_planned'])})" for n in BACKENDS)
            print(f"{size}×{size} {precision}:", ", ".join(figures), f"{row['eager_bytes'] / row['ours_bytes']:.1f}×", flush=True)
    machine = {"processor": processor(), "threads": torch.get_num_threads()}
    results = {"machine": machine, "torch": torch.__version__, "commit": commit(), "model": options.model, "rows": rows}
    options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
