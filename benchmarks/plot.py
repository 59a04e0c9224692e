"""A picture of results: python benchmarks/plot.py [FILE.json ...], each beside its file as a PNG.

Left, the roofline: operations a byte of each op's least work against the rate at which it was done, under the machine's ceilings
as bench_machine.py measured them (solid) and as a GPU's clocks give them (dotted). Right, bars: how many times faster than eager
PyTorch each competitor is.
"""

import argparse
import json
import sys
from pathlib import Path

import floors
import matplotlib
from tables import find

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
MARKERS = {"forward": "o", "training": "^"}
BACKENDS = (
    "reference",
    "cpu",
    "cuda",
    "triton",
    "compiled",
    "checkpointed",
    "graph",
    "mamba-ssm",
    "parallel",
    "associative_scan",
    "mamba.py",
)
COLORS = {name: f"C{i}" for i, name in enumerate(BACKENDS)}


def plot(results: dict, path: Path) -> None:
    rows = [r for r in results["rows"] if "seconds" in r and r.get("malloc") != "default"]
    gpu = results["machine"]["gpu"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(16, 9), layout="constrained")
    name = gpu["name"] if gpu else f"{results['machine']['processor']}, {results['machine']['threads']} threads"
    figure.suptitle(f"{name}, torch {results['versions']['torch']}, commit {results['commit']}")
    roofline(left, rows, floors.ceilings(gpu) if gpu else None)
    bars(right, rows, "bfloat16" if gpu else "float32")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def roofline(axes, rows: list[dict], limits: floors.Ceilings | None) -> None:
    points = [r for r in rows if r["op"] not in ("copy", "matmul") and floors.flops(r)]
    for row in points:
        work = floors.flops(row)
        color = COLORS[row["backend"]]
        place = work / floors.moved_bytes(row), work / row["seconds"]
        axes.loglog(*place, MARKERS[row["mode"]], color=color, markersize=4, alpha=0.7)
    span = [0.1, 1e5]
    copy = find(rows, op="copy")
    for dtype in ("float32", "bfloat16"):
        product = find(rows, op="matmul", dtype=dtype)
        if copy and product:
            bandwidth, peak = floors.moved_bytes(copy) / copy["seconds"], floors.flops(product) / product["seconds"]
            axes.loglog(*roof(span, bandwidth, peak), "-", color="k", linewidth=1)
            axes.annotate(f"{dtype} products, measured", (span[1], peak), ha="right", va="bottom", fontsize=8)
        if limits:
            peak = 2 * limits.products[dtype]
            axes.loglog(*roof(span, limits.bytes, peak), ":", color="k", linewidth=1)
            axes.annotate(f"{'TF32' if dtype == 'float32' else dtype} products, clocks", (span[1], peak), ha="right", fontsize=8)
    if not (copy or limits):
        axes.set_title("ceilings: not measured", fontsize=9)
    axes.set(xlabel="operations a byte (least work)", ylabel="operations a second (least work)")
    shown = {r["backend"] for r in points}
    marks = [plt.Line2D([], [], marker=m, linestyle="", color="k", label=mode) for mode, m in MARKERS.items()]
    marks += [plt.Line2D([], [], marker="s", linestyle="", color=COLORS[b], label=b) for b in COLORS if b in shown]
    axes.legend(handles=marks, fontsize=8)


def roof(span: list[float], bandwidth: float, peak: float) -> tuple[list[float], list[float]]:
    intensities = sorted([*span, peak / bandwidth])
    return intensities, [min(peak, bandwidth * i) for i in intensities]


def bars(axes, rows: list[dict], dtype: str) -> None:
    """Each case against its reference's time. Cases without one are left out: scans too long for it, models that have none."""
    labels, position = [], 0
    keys = ("op", "shape", "mode", "dtype")
    for case in dict.fromkeys(tuple(r[k] for k in keys) for r in rows if r["dtype"] == dtype):
        facts = dict(zip(keys, case, strict=True))
        eager = find(rows, **facts, backend="reference")
        others = [r for r in rows if all(r[k] == v for k, v in facts.items()) and r["backend"] != "reference"]
        if not (eager and others):
            continue
        height = 0.8 / len(others)
        for i, row in enumerate(others):
            color = COLORS[row["backend"]]
            axes.barh(position + i * height, eager["seconds"] / row["seconds"], height, align="edge", color=color)
        labels.append((position + 0.4, " ".join(case[:3])))
        position += 1
    axes.axvline(1, color="k", linewidth=1)
    axes.set_yticks([p for p, _ in labels], [text for _, text in labels], fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel=f"times faster than eager PyTorch (a scan: than the loop), {dtype}", xscale="log")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=[HERE / "results" / "cpu.json"])
    for file in parser.parse_args().files:
        plot(json.loads(file.read_text()), file.with_suffix(".png"))
        print(file.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
