"""The figures of an evaluation as rows of text, and the sentences that belong to them: the terminal and the page say the same.

`results` is in each function what `evaluate.evaluate` returns.
"""

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

COLUMNS = {
    "l1": ("L1 ↓", 4),
    "psnr": ("PSNR dB ↑", 2),
    "ssim": ("SSIM ↑", 3),
    "delta_e2000": ("ΔE2000 ↓", 2),
    "lpips": ("LPIPS ↓", 4),
}
"""Each metric's title and the digits that it is given after the point. Not every evaluation has them all."""
LABELS = {
    "source": "unedited",
    "gain_and_gamma": "gain and gamma",
    "auto_tone": "auto-tone",
    "whole": "the same, in full",
    "target": "target",
}
"""What the reader calls what every evaluation has."""
MINUS = "model_minus_"
"""A summary's key that begins so holds the differences between the model and another method, image by image."""


def format_table(results: dict[str, Any]) -> str:
    """The summary, the costs of the model and what to know about them, as aligned text for a terminal."""
    lines = aligned([["", *titles(results["summary"]["source"])], *summary_rows(results)])
    costs = [f"{name + ':':<23} {value}" for name, value in model_costs(results).items()]
    said = filter(None, [verdict(results), caution(results)])
    return "\n".join([setting(results), origin(results), "", *lines, "", *said, *costs]).rstrip()


def columns(figures: Mapping[str, Any]) -> dict[str, tuple[str, int]]:
    """COLUMNS of the metrics that figures, {metric: ...}, have."""
    return {metric: column for metric, column in COLUMNS.items() if metric in figures}


def titles(figures: Mapping[str, Any]) -> list[str]:
    """Those columns' titles."""
    return [title for title, _ in columns(figures).values()]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of as many cells as lines whose columns stand below one another."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def summary_rows(results: dict[str, Any]) -> list[list[str]]:
    """A row for each method: its label, then the mean of each metric and, where it is known, its confidence interval."""
    rows = []
    for method, figures in results["summary"].items():
        sign = "+" if method.startswith(MINUS) else ""
        cells = (with_interval(figures[metric], digits, sign) for metric, (_, digits) in columns(figures).items())
        rows.append([label(results, method), *cells])
    return rows


def with_interval(figure: tuple[float, float], digits: int, sign: str = "") -> str:
    """A mean and, where it is known, half the width of its interval. sign: "+" for a difference."""
    mean, half = figure
    return f"{mean:{sign}.{digits}f}" + (f" ± {half:.{digits}f}" if math.isfinite(half) else "")


def image_rows(labels: Mapping[str, str], figures: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """A row for each method: its label, then the metrics of one image. figures: {method: {metric: value}}."""
    return [
        [labels[method], *(f"{values[metric]:.{digits}f}" for metric, (_, digits) in columns(values).items())]
        for method, values in figures.items()
    ]


def label(results: dict[str, Any], method: str) -> str:
    """What the reader calls a method."""
    if method.startswith(MINUS):
        return f"model − {label(results, method.removeprefix(MINUS))}"
    if method == "model":
        return results["model"]["name"]
    return LABELS.get(method, method)


def setting(results: dict[str, Any]) -> str:
    """How many pairs were measured, at which size and precision, and where."""
    settings, environment, count = results["settings"], results["environment"], len(results["images"])
    size = settings["size"]
    if size:
        height, width = (size, size) if isinstance(size, int) else size
        resolution = f"{settings['resize']} to {width}×{height}"
    else:
        resolution = "own resolution"
    hardware = environment["gpu"] or f"{environment['cpu']}, {environment['threads']} CPU thread(s)"
    interval = "mean ± 95% confidence interval" if count > 1 else "a single pair has no confidence interval"
    return f"{count} pair{'s' * (count > 1)}, {resolution}, {settings['precision']}, {hardware}; {interval}"


def origin(results: dict[str, Any]) -> str:
    """Which weights and pairs were measured, and when."""
    settings = results["settings"]
    files = {"checkpoint": [settings["checkpoint"]] if settings["checkpoint"] else [], "pairs": settings["pairs"]}
    date = datetime.fromisoformat(results["date"]).strftime("%Y-%m-%d %H:%M")
    return "; ".join([*(f"{what} {', '.join(names)}" for what, names in files.items() if names), f"measured {date}"])


def verdict(results: dict[str, Any]) -> str:
    """By which metrics the model is better than auto-tone, by which worse, and which cannot tell; nothing without a model."""
    found: dict[str, list[str]] = {"better": [], "worse": [], "these pairs cannot tell": []}
    for metric, (mean, half) in results["summary"].get(MINUS + "auto_tone", {}).items():
        title, digits = COLUMNS[metric]
        (name, *unit), rises = title[:-1].split(), title[-1] == "↑"
        tells = abs(mean) > half  # not where the interval is unknown
        which = ("better" if (mean > 0) == rises else "worse") if tells else "these pairs cannot tell"
        interval = f" ± {half:.{digits}f}" if math.isfinite(half) else ""
        found[which].append(" ".join([name, f"{mean:+.{digits}f}{interval}", *unit]))
    said = "; ".join(f"{which}: {', '.join(figures)}" for which, figures in found.items() if figures)
    return said and f"Against auto-tone, {said}."


def caution(results: dict[str, Any]) -> str:
    """Why the figures may flatter the model: it was trained on some of the pairs, or its weights do not tell; else nothing."""
    if not (model := results["model"]) or model["trained_pairs"] == 0:
        return ""
    if model["trained_pairs"] is None:
        return "The weights do not say which photos they were trained on."
    return f"{model['trained_pairs']} of these pairs were TRAINED ON: this is not how the model does on other photos."


def model_costs(results: dict[str, Any]) -> dict[str, str]:
    """The model's size, time and memory by their names; nothing where there is no model."""
    if not (model := results["model"]):
        return {}
    whose = {"cuda": "GPU", "VmHWM": "process", "ru_maxrss": "process, at most"}[model["memory_source"]]
    return {
        "Parameters": f"{model['parameters']:,}",
        "MACs per megapixel": f"{model['macs_per_megapixel'] / 1e9:.1f} G",
        "Seconds per megapixel": f"{model['seconds_per_megapixel']:.3g}",
        "Joules per megapixel": joules(model["joules_per_megapixel"]),
        "Memory per megapixel": memory(model["bytes_per_megapixel"]),
        f"Peak memory ({whose})": f"{model['peak_bytes'] / 1e9:.2f} GB",
    }


def joules(energy: float) -> str:
    """Joules per megapixel; nan where the system does not tell."""
    return f"{energy:.3g}" if math.isfinite(energy) else "not measured"


def memory(growth: float) -> str:
    """Bytes per megapixel; nan where they cannot be told."""
    return f"{growth / 1e9:.2f} GB" if math.isfinite(growth) else "not measurable here"
