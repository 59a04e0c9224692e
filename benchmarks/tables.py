"""Tables in Markdown from results: ratios for a CPU, times for GPUs, measured or predicted."""

import floors
from problems import DSTATE

from autohdr.kernels import OPS
from autohdr.report.tables import LABELS, with_interval

MALLOCS = ("tuned", "default")
MISSING, UNPREDICTED = "not measured", "not predicted"
SEQUENCE_OPS = ("selective_scan", "causal_conv1d", "add_norm")  # those without products, whose least work is exact
MODES = {"forward": "forward", "training": "training step"}
SCANS = {"reference": "the loop", "parallel": "sweeps", "associative_scan": "associative_scan"}


def find(rows: list[dict], **facts) -> dict | None:
    """The row with these facts."""
    return next((r for r in rows if all(r.get(k) == v for k, v in facts.items())), None)


def ratio(ours: dict | None, theirs: dict | None) -> str:
    return f"{theirs['seconds'] / ours['seconds']:.2f}×" if ours and theirs else MISSING


def table(header: list[str], lines: list[list[str]]) -> str:
    written = ["| " + " | ".join(line) + " |" for line in (header, *lines)]
    return "\n".join([written[0], "|---" * len(header) + "|", *written[1:]])


def cpu(results: dict) -> str:
    """Ratios of the compiled kernels against PyTorch, under two mallocs."""
    rows, base = results["rows"], "restormer_base"

    def speed(malloc, other="reference", against=None, **facts):
        return ratio(
            find(rows, backend="cpu", malloc=malloc, **facts), find(rows, backend=other, malloc=malloc, **facts | (against or {}))
        )

    lines = []
    for label, mode, dtype in (
        ("forward, float32", "forward", "float32"),
        ("forward, bfloat16, against eager float32", "forward", "bfloat16"),
        ("training step, float32", "training", "float32"),
    ):
        cells = [speed(m, against={"dtype": "float32"}, op=base, mode=mode, dtype=dtype) for m in MALLOCS]
        lines.append([f"{label}: speed", *cells])
    title = f"{base}, 384×384, against eager PyTorch in channels-last"
    parts = [table([title, "tuned malloc", "default malloc"], lines)]

    lines = []
    for op in [op for op in OPS if op != "selective_scan"]:
        for shape in dict.fromkeys(r["shape"] for r in rows if r["op"] == op):
            lines.append([f"{op} {shape}", *(speed("tuned", op=op, shape=shape, mode=m, dtype="float32") for m in MODES)])
    parts.append(table(["one op, float32, against eager with tuned malloc", *MODES.values()], lines))

    lines = []
    for shape in ("1×192×4096", "2×96×9216"):
        facts = {"op": "selective_scan", "shape": shape, "dtype": "float32"}
        cells = [speed("tuned", other, **facts, mode=mode) for other in SCANS for mode in MODES]
        lines.append([shape, *cells])
    against = [f"{name}, {mode}" for name in SCANS.values() for mode in MODES.values()]
    parts.append(table(["selective_scan, float32, tuned malloc, against", *against], lines))

    m, v = results["machine"], results["versions"]
    parts.append(
        f"Ratios of median times in one run on {m['processor']}, {m['threads']} threads, {m['cpu_isa']} kernels,"
        f" torch {v['torch']}, commit {results['commit']}. Higher is better."
    )
    return "\n\n".join(parts)


def cell(row: dict | None, limits: floors.Ceilings | None, memory: str = "growth_bytes") -> str:
    """Milliseconds, in brackets how many times the floor; GB/s for a scan; memory."""
    if row is None:
        return MISSING
    if "failed" in row:
        return row["failed"]
    floor = floors.floor_seconds(row, limits) if limits else None
    parts = [f"{row['seconds'] * 1e3:.3g} ms" + (f" ({row['seconds'] / floor:.2f}×)" if floor else "")]
    if row["op"] == "selective_scan":
        parts.append(f"{floors.moved_bytes(row) / row['seconds'] / 1e9:.0f} GB/s")
    parts.append(f"{row[memory] / 1e9:.2f} GB")
    return ", ".join(parts)


def _error(row: dict | None) -> str:
    return f"{row['error']:.0e}" if row and "error" in row else MISSING


IMAGES = {
    "reference": "eager",
    "compiled": "torch.compile",
    "checkpointed": "checkpointed",
    "triton": "triton",
    "cuda": "cuda",
    "graph": "cuda, as a CUDA graph",
}
SCAN_COLUMNS = SCANS | {name: name for name in ("mamba.py", "mamba-ssm", "triton", "cuda")}
SIDES = ((384, 384), (896, 896), (2192, 3296))
CHANNELS = (48, 96, 192, 384)


def gpus(files: list[dict]) -> str:
    """A GPU after the other."""
    return "\n\n".join(map(gpu, files)) or f"GPU: {MISSING}. `make gpu-check` measures one, and its tables then stand here."


def gpu(results: dict) -> str:
    rows = results["rows"]
    limits = floors.ceilings(results["machine"]["gpu"])

    def lines(op: str, shapes: list[str], names: dict[str, str], memory: str, modes=tuple(MODES)) -> list[list[str]]:
        made = []
        for shape in shapes:
            for mode in modes:
                found = {n: find(rows, op=op, shape=shape, mode=mode, dtype="bfloat16", backend=n) for n in names}
                cells = [cell(row, limits, memory) for row in found.values()]
                made.append([f"{op} {shape}, {MODES[mode]}", *cells, _error(found["cuda"])])
        return made

    images = lines("restormer_base", [f"3×{h}×{w}" for h, w in SIDES], IMAGES, "peak_bytes")
    for op in ("mdta", "gdfn"):
        images += lines(op, [f"{c}×{896 >> i}×{896 >> i}" for i, c in enumerate(CHANNELS)], IMAGES, "growth_bytes")
    images += lines("causal_conv1d", ["1×192×147456", "2×96×9216", "1×192×4096"], IMAGES, "growth_bytes")
    scans = lines("selective_scan", ["8×1536×4096", "1×192×147456", "2×96×9216", "1×192×4096"], SCAN_COLUMNS, "growth_bytes")
    models = lines("mamba_diffusion_large", ["3×384×384"], {n: n for n in ("triton", "cuda")}, "peak_bytes", ("training",))
    ending = ["cuda's error"]
    m, v = results["machine"]["gpu"], results["versions"]
    source = f"{m['name']}, torch {v['torch']}, commit {results['commit']}"
    parts = [
        table(["bfloat16", *IMAGES.values(), *ending], images),
        table(["N = 16, bfloat16", *SCAN_COLUMNS.values(), *ending], scans),
        table(["bfloat16", "triton", "cuda", *ending], models),
        f"{source}. Median times (in brackets: as a multiple of the floor that the GPU's clocks and the op's least work give);"
        " memory: a model's peak with its weights, an op's beside its inputs; error: ‖actual − gold‖ / ‖gold‖ against float64.",
    ]
    return "\n\n".join(parts)


def subject(row: dict) -> str:
    """What a prediction is of."""
    return f"{row['op']} {row['shape']}, {MODES[row['mode']]}, {row['dtype']}, {row['backend']}"


def assumed(gpu: dict) -> floors.Ceilings:
    """A GPU's ceilings where predictions assume this of it: four schedulers a multiprocessor, each of them busy with a warp's
    instruction for so many cycles."""
    clocks, cycles = gpu["multiprocessors"] * gpu["clock"], gpu["pipes"]
    fma, special = (4 * 32 / cycles[pipe][unit] * clocks for pipe, unit in (("float", "fma"), ("special", "special")))
    return floors.Ceilings(bytes=gpu["memory"], products={}, fma=fma, special=special)


def predictions(results: dict) -> str:
    """What benchmarks/instructions.py wrote: times by GPU, how they came about, and what binds the kernels on the first GPU."""
    rows = results["predictions"]
    gpus = list(dict.fromkeys(row["gpu"] for row in rows))
    subjects = list(dict.fromkeys(map(subject, rows)))
    found = {(subject(row), row["gpu"]): row for row in rows}

    def time(row: dict | None) -> str:
        return f"predicted {row['ms']:.3g} ({row['ms_low']:.3g} to {row['ms_high']:.3g})" if row else UNPREDICTED

    def over_floor(row: dict | None) -> str:
        if row is None:
            return UNPREDICTED
        floor = floors.floor_seconds(row | {"dstate": DSTATE}, assumed(results["constants"]["gpus"][row["gpu"]]))
        return f"predicted {row['ms'] / floor / 1e3:.2f}×"

    parts = [table(["ms", *gpus], [[name, *(time(found.get((name, gpu))) for gpu in gpus)] for name in subjects])]
    sequences = [name for name in subjects if name.startswith(SEQUENCE_OPS)]
    lines = [[name, *(over_floor(found.get((name, gpu))) for gpu in gpus)] for name in sequences]
    parts.append(table(["as a multiple of the op's least work at the same rates", *gpus], lines))
    if history := results["history"]:
        lines = []
        for name in subjects:
            times = [entry["ms"].get(name) for entry in history]
            if any(times):
                times.append(found[name, gpus[0]]["ms"] if (name, gpus[0]) in found else None)
                lines.append([name, *(f"predicted {ms:.3g}" if ms else UNPREDICTED for ms in times)])
        commits = [entry["commit"] for entry in history] + [results["commit"]]
        parts.append(table([f"{gpus[0]}, ms, by commit", *commits], lines))
    for row in (found[name, gpus[0]] for name in subjects if (name, gpus[0]) in found):
        share = {kernel: (ms, bound) for kernel, (ms, bound) in row["bound_by"].items() if ms > 0.02 * row["ms"]}
        lines = [[f"`{kernel}`", f"predicted {ms:.3g}", bound] for kernel, (ms, bound) in share.items()]
        parts.append(table([f"{gpus[0]}, {subject(row)}: {row['launches']} launches", "ms", "bound by"], lines))
    parts.append(
        f"Commit {results['commit']}, nvcc {results['versions']['nvcc']}. Kernels of less than 2 % of the time are left out."
    )
    return "\n\n".join(parts)


def peers(results: dict) -> str:
    """What benchmarks/peers.py wrote: how many times as long as autohdr other runtimes take."""
    names = list(dict.fromkeys(name for row in results["rows"] for name in row["times_as_long"] if name != "autohdr"))
    lines = [
        [row["case"], *(f"{row['times_as_long'][name]:.2f}" if name in row["times_as_long"] else "" for name in names)]
        for row in results["rows"]
    ]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    source = (
        f"Medians of calls in turn on {results['processor']}, {results['instruction_set']}, {results['threads']} threads, tuned"
        f" malloc, {versions}, commit {results['commit']}."
    )
    return table(["forward, float32, times as long as autohdr", *names], lines) + "\n\n" + source


def families(results: dict | None) -> str:
    """What benchmarks/families.py wrote: quality and cost of each model, and of its forms what they gain or lose against it."""
    if results is None:
        return f"Families: {MISSING}. `make compare` measures them, and their table then stands here."

    titles = [
        "",
        "PSNR dB",
        "SSIM",
        "ΔE2000",
        "against itself, dB",
        "parameters",
        "file",
        "MACs/MP",
        "s/MP",
        "memory/MP",
        "score",
    ]
    lines = []
    for row in results["rows"]:
        form, figures = row.get("form_of") and row["method"].rsplit(", ", 1)[1], row["figures"]
        label = f"{row['name']}, {form}" if form else row.get("name") or LABELS[row["method"]]
        quality = [with_interval(figures["psnr"], 2), with_interval(figures["ssim"], 3), with_interval(figures["delta_e2000"], 2)]
        gain = with_interval(row["difference"]["psnr"], 2, "+") if form else ""
        model = ["", "", ""]
        if "name" in row:
            macs = f"{row['macs_per_megapixel'] / 1e9:.3g} G"
            model = [f"{row['parameters']:,}", f"{row['file_bytes'] / 1e6:.2f} MB", macs]
        cost = ["", ""]
        if row["method"] != "source":
            memory = row["bytes_per_megapixel"]
            cost = [f"{row['seconds_per_megapixel']:.3g}", f"{memory / 1e9:.2f} GB" if memory is not None else MISSING]
        lines.append([label, *quality, gain, *model, *cost, with_interval(row["score"], 3)])
    m, v = results["machine"], results["versions"]
    source = (
        f"Quality: means and 95 % intervals on {results['pairs']} pixels. Seconds and memory: on a photo of {results['photo']},"
        f" in the same run, on {m['processor']}, {m['threads']} threads, torch {v['torch']}, commit {results['commit']}."
    )
    return table(titles, lines) + "\n\n" + source
