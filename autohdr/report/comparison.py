"""What `compare` found: the terminal's table, and the page, compare.html filled with tables, a chart and the worst photos.

`results` is in each function what `compare.compare` returns.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from itertools import product
from pathlib import Path
from typing import Any

from autohdr.files import write_text
from autohdr.report import tables
from autohdr.report.page import document, filled, image_table, pair, table
from autohdr.score import COST, QUALITY

_SCORE = {"quality": ("Quality ↑", 3)}
_DETAILS = {
    "shadows": ("Shadows L1 ↓", 4),
    "midtones": ("Midtones L1 ↓", 4),
    "highlights": ("Highlights L1 ↓", 4),
    "saturation": ("Saturation ×", 3),
    "hue": ("Hue ° ↓", 1),
}
_NAMES = {"psnr": "PSNR dB", "ssim": "SSIM", "delta_e2000": "ΔE2000", "parameters": "Parameters"} | {
    "seconds_per_megapixel": "Seconds per megapixel",
    "macs_per_megapixel": "MACs per megapixel",
}
_LEFT, _TOP, _RIGHT, _BOTTOM = 40, 10, 410, 260  # of the chart's area, in a picture of 420 by 300


def format_comparison(results: dict[str, Any]) -> str:
    """Scores, quality and costs, best first, as aligned text for a terminal."""
    columns = tables.columns(results["methods"]["source"]["figures"])
    rows = [["", "Score ↑", "Quality ↑", "Cost ↑", *(title for title, _ in columns.values()), "Parameters", "s/MP"]]
    for name in _ranked(results):
        method = results["methods"][name]
        costs = [f"{method['parameters']:,}", f"{method['seconds_per_megapixel']:.3g}"]
        rows.append([_label(results, name), *_scores(method), *_figures(method["figures"], columns), *costs])
    said = [_verdict(results), *_cautions(results)]
    return "\n".join([tables.setting(results), tables.origin(results), "", *tables.aligned(rows), "", *said])


def write_comparison(path: Path, results: dict[str, Any], worst: Sequence[tuple[dict[str, Any], Mapping[str, str]]]) -> None:
    """Writes the page. worst: images of results, each with its pictures as encode_pictures gives them."""
    methods, ranked = results["methods"], _ranked(results)
    whole = [name for name in ranked if not methods[name].get("form_of")]
    first, best = results["first"], next(name for name in whole if "checkpoint" in methods[name])
    numbered = {name: f"{number}\N{NO-BREAK SPACE}{_label(results, name)}" for number, name in enumerate(ranked, 1)}
    figures = {numbered[name]: methods[name]["figures"] for name in ranked}
    differences = {numbered[name]: methods[name]["difference"] for name in whole if name != first}
    formed = {numbered[name]: methods[name]["difference"] for name in ranked if name not in whole}
    told = [
        f"{title.split()[0].lower()} {results['told'][metric]}"
        for metric, (title, _) in _DETAILS.items()
        if results["told"][metric] < len(results["images"])
    ]
    points = results["settings"]["points"]
    labels = {name: tables.LABELS.get(name, name) for name in (*methods, "target") if name == "target" or name in whole}
    title = f"{_label(results, first)} and {len(whole) - 4} more" if len(whole) > 4 else _label(results, first)
    body = filled(
        "compare.html",
        text={
            "title": title,
            "setting": tables.setting(results),
            "origin": tables.origin(results),
            "verdict": _verdict(results),
            "caution": " ".join(_cautions(results)),
            "first": _label(results, first),
            "told": f"Not every photo has all of these; so many count: {', '.join(told)}." if told else "",
            "weights": f"{points['quality_weight']:g} × quality + {1 - points['quality_weight']:g} × cost",
            "measured": _measured(results),
            "worst": f"{len(worst)} of {len(results['images'])}",
            "versions": f"autohdr {results['environment']['autohdr']}, torch {results['environment']['torch']}",
        },
        markup={
            "scores": table(
                ["Score ↑", "Quality ↑", "Cost ↑", "Pareto"],
                [[numbered[n], *_scores(methods[n]), "●" if methods[n]["pareto"] else ""] for n in ranked],
            ),
            "chart": _chart(results, ranked),
            "points": table(
                ["counts 0", "counts 1"],
                [[_NAMES[name], *(f"{value:g}" for value in points[name])] for name in (*QUALITY, *COST)],
            ),
            "quality": _quality_table(tables.COLUMNS, figures),
            "details": _quality_table(_DETAILS, figures),
            "differences": _difference_tables(differences),
            "forms": f"<section><h2>Forms minus their model</h2>{_difference_tables(formed)}</section>" if formed else "",
            "costs": table(
                ["Parameters", "File", "MACs/megapixel", "s/megapixel", "J/megapixel", "Memory/megapixel"],
                [[numbered[n], *_costs(methods[n])] for n in ranked if n != "source"],
            ),
            "pairs": "".join(
                pair(image, pictures, labels, best, _image_table(labels, image["figures"])) for image, pictures in worst
            ),
        },
    )
    write_text(path, document(f"{title}, compared", body, "compare.css", "page.js"))


def _ranked(results: dict[str, Any]) -> list[str]:
    """The methods, best score first."""
    return sorted(results["methods"], key=lambda name: -results["methods"][name]["score"][0])


def _label(results: dict[str, Any], name: str) -> str:
    """What the reader calls a method, with the model's name where the file's does not say it."""
    model = results["methods"][name].get("name", name)
    return tables.LABELS.get(name, name) + (f" ({model})" if model not in name else "")


def _scores(method: dict[str, Any]) -> list[str]:
    quality = tables.with_interval(method["figures"]["quality"], 3)
    return [tables.with_interval(method["score"], 3), quality, f"{method['cost']:.3f}"]


def _figures(figures: Mapping[str, tuple[float, float]], columns: Mapping[str, tuple[str, int]], sign: str = "") -> list[str]:
    """A cell for each metric; of a difference whose interval leaves out 0, with an asterisk."""
    cells = []
    for metric, (_, digits) in columns.items():
        mean, half = figures[metric]
        tells = "\N{NO-BREAK SPACE}*" if sign and abs(mean) > half else ""
        cells.append("–" if math.isnan(mean) else tables.with_interval(figures[metric], digits, sign) + tells)
    return cells


def _quality_table(
    columns: Mapping[str, tuple[str, int]], rows: Mapping[str, Mapping[str, tuple[float, float]]], sign: str = ""
) -> str:
    """Of the columns that the rows have."""
    columns = {metric: column for metric, column in columns.items() if all(metric in figures for figures in rows.values())}
    titles = [title for title, _ in columns.values()]
    return table(titles, [[label, *_figures(figures, columns, sign)] for label, figures in rows.items()])


def _difference_tables(rows: Mapping[str, Mapping[str, tuple[float, float]]]) -> str:
    return _quality_table(_SCORE | tables.COLUMNS, rows, "+") + _quality_table(_DETAILS, rows, "+")


def _image_table(labels: Mapping[str, str], figures: Mapping[str, Mapping[str, float]]) -> str:
    shown = {name: figures[name] for name in labels if name in figures}
    return image_table(labels, shown)


def _costs(method: dict[str, Any]) -> list[str]:
    measured = [f"{method['seconds_per_megapixel']:.3g}", tables.joules(method["joules_per_megapixel"])]
    measured += [tables.memory(method["bytes_per_megapixel"])]
    if "checkpoint" not in method:
        return ["–", "–", "–", *measured]
    size, macs = f"{method['file_bytes'] / 1e6:.2f} MB", f"{method['macs_per_megapixel'] / 1e9:.3g} G"
    return [f"{method['parameters']:,}", size, macs, *measured]


def _verdict(results: dict[str, Any]) -> str:
    """Which method has the best score, which model the best quality, and which of them give nothing away."""
    methods, ranked = results["methods"], _ranked(results)
    models = [name for name in ranked if "checkpoint" in methods[name]]
    best = max(models, key=lambda name: methods[name]["figures"]["quality"][0])
    front = "; ".join(_label(results, name) for name in ranked if methods[name]["pareto"])
    said = f"Best score: {_label(results, ranked[0])}, {_scores(methods[ranked[0]])[0]}."
    if ranked[0] not in models:
        said += f" No model has more; the best is {_label(results, models[0])}, {_scores(methods[models[0]])[0]}."
    return f"{said} Best quality of a model: {_label(results, best)}, {_scores(methods[best])[1]}. On the Pareto front: {front}."


def _measured(results: dict[str, Any]) -> str:
    """How seconds and memory were found."""
    if not (cost_size := results["settings"]["cost_size"]):
        return "Seconds: the median over the photos, on this machine. Memory: the most that a photo took."
    height, width = cost_size
    return (
        f"Seconds: the median of a few passes over a photo of {width}×{height} pixels, on this machine. Memory: the most of them."
    )


def _cautions(results: dict[str, Any]) -> list[str]:
    """Why the figures may flatter a model, or what it costs may not be what a whole photo does; what was not measured."""
    said = [f"Not measured: {reason}." for reason in results["left_out"]]
    megapixels = statistics.median(image["height"] * image["width"] / 1e6 for image in results["images"])
    if cost_size := results["settings"]["cost_size"]:
        megapixels = math.prod(cost_size) / 1e6
    if megapixels < 1:
        said.append(
            f"Costs were measured on pictures of {megapixels:.2g} megapixels: what does not grow with a photo makes seconds and "
            "memory per megapixel larger than those of a whole one."
        )
    for name, method in results["methods"].items():
        if "checkpoint" not in method or method["form_of"] or method["trained_pairs"] == 0:
            continue
        seen = method["trained_pairs"]
        what = "does not say which photos it was trained on." if seen is None else f"was TRAINED ON {seen} of these pairs."
        said.append(f"{_label(results, name)} {what}")
    return said


def _chart(results: dict[str, Any], ranked: Sequence[str]) -> str:
    """Quality against cost score, both better towards the upper right, with the Pareto front and lines of equal score."""
    methods, weight = results["methods"], results["settings"]["points"]["quality_weight"]
    places = {name: (methods[name]["cost"], methods[name]["figures"]["quality"][0]) for name in ranked}
    whiskers = {name: _clipped(*methods[name]["figures"]["quality"]) for name in ranked}
    xs = _ticks([x for x, _ in places.values()])
    ys = _ticks([y for ends in whiskers.values() for y in ends])

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = (x - xs[0]) / (xs[-1] - xs[0]), (y - ys[0]) / (ys[-1] - ys[0])
        return round(_LEFT + across * (_RIGHT - _LEFT), 1), round(_BOTTOM - up * (_BOTTOM - _TOP), 1)

    def line(kind: str, *points: tuple[float, float]) -> str:
        return f'<polyline class={kind} points="{" ".join(f"{x},{y}" for x, y in points)}"/>'

    parts = []
    for x in xs:
        across, _ = at(x, ys[0])
        parts.append(
            line("grid", (across, _TOP), (across, _BOTTOM)) + f"<text class=x x={across} y={_BOTTOM + 15}>{x:.4g}</text>"
        )
    for y in ys:
        _, down = at(xs[0], y)
        parts.append(line("grid", (_LEFT, down), (_RIGHT, down)) + f"<text x={_LEFT - 6} y={down + 4}>{y:.4g}</text>")
    parts.append(f"<text class=x x={(_LEFT + _RIGHT) / 2} y={_BOTTOM + 33}>cost score: cheaper →</text>")
    parts.append(f'<text class=x transform="translate(10 {(_TOP + _BOTTOM) / 2}) rotate(-90)">quality →</text>')
    if weight:
        equal = [
            line("equal", *(at(x, (step / 10 - (1 - weight) * x) / weight) for x in (xs[0], xs[-1]))) for step in range(1, 10)
        ]
        parts.append(f"<clipPath id=area><rect x={_LEFT} y={_TOP} width={_RIGHT - _LEFT} height={_BOTTOM - _TOP} /></clipPath>")
        parts.append(f'<g clip-path="url(#area)">{"".join(equal)}</g>')
    parts.append(line("front", *(at(*place) for place in sorted(places[n] for n in ranked if methods[n]["pareto"]))))
    taken = [at(*place) for place in places.values()]
    for number, (name, (x, y)) in enumerate(places.items(), 1):
        across, down = at(x, y)
        kind = "model" if "checkpoint" in methods[name] else "recipe"
        beside = _beside((across, down), taken)
        taken.append(beside)
        score, quality, cost = _scores(methods[name])
        told = f"{_label(results, name)}: score {score}, quality {quality}, cost {cost}, {' · '.join(_told_costs(methods[name]))}"
        parts.append(
            f"<g class={kind}><title>{escape(told)}</title>"
            + line("half", *(at(x, end) for end in whiskers[name]))
            + f"<circle cx={across} cy={down} r=4 /><text class=x x={beside[0]} y={beside[1] + 4}>{number}</text></g>"
        )
    return f'<svg viewBox="0 0 420 300" role=img aria-label="Quality against cost">{"".join(parts)}</svg>'


def _clipped(mean: float, half: float) -> tuple[float, float]:
    """Both ends of an interval of a score, the mean twice where there is none."""
    return (max(mean - half, 0.0), min(mean + half, 1.0)) if math.isfinite(half) else (mean, mean)


def _told_costs(method: dict[str, Any]) -> list[str]:
    return [f"{method['parameters']:,} parameters", f"{method['seconds_per_megapixel']:.3g} s/megapixel"]


def _beside(point: tuple[float, float], taken: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The place near a point, for its number, that is farthest from all that is taken."""
    places = [(point[0] + 11 * x, point[1] + 11 * y) for x, y in product((1, -1, 0), repeat=2) if x or y]
    inside = [(x, y) for x, y in places if _LEFT + 6 < x < _RIGHT + 6 and _TOP < y < _BOTTOM - 6]
    return max(inside or places, key=lambda place: min(math.dist(place, other) for other in taken))


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers around the values, at even steps."""
    low, high = min(values), max(values)
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2, 1.0) if high - low <= 6 * step)
    first, last = math.floor(low / step), max(math.ceil(high / step), math.floor(low / step) + 1)
    return [round(number * step, 2) for number in range(first, last + 1)]
