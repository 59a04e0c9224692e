"""Several models on the same pairs: what each is worth and costs, and a score of both, as compare.json and compare.html."""

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autohdr.data.pairs import Pair
from autohdr.errors import UserError
from autohdr.evaluate import (
    BASELINES,
    check_settings,
    count_trained,
    means,
    measured,
    model_facts,
    record,
    summarise_costs,
    trained_photos,
    write_json,
)
from autohdr.metrics import DETAILS, METRICS
from autohdr.models import load_checkpoint
from autohdr.report import encode_pictures, write_comparison
from autohdr.report.tables import LABELS
from autohdr.score import Points, pareto_front

SHOWN_WORST = 10
_RESERVED = {*LABELS, *LABELS.values()}
_FREE = {"parameters": 0, "macs_per_megapixel": 0, "seconds_per_megapixel": 0}


def compare(
    checkpoints: Sequence[Path],
    pairs: Sequence[Pair],
    out_dir: str | Path,
    *,
    size: int | tuple[int, int] | None = None,
    resize: str = "squash",
    device: torch.device | str = "cpu",
    precision: str = "float32",
    allow_trained: bool = False,
    points: Points | None = None,
) -> dict[str, Any]:
    """Measures models beside source, gain and gamma and auto-tone; writes compare.json and compare.html into out_dir.

    checkpoints: as load_checkpoint reads them. Differences are taken from the first, image by image.
    points: what the score is made of; score.Points by default. The others as in `evaluate`.

    Returns what compare.json holds, except that a figure that is not finite is null there. "methods" has of each its costs, the
    mean of each metric with the half width of its 95% interval, the score and whether it is on the Pareto front; "told" how many
    images a metric is the mean of: those of which every method's is known (metrics.DETAILS). "worst" are the images that even the
    best of the models leaves farthest from the target, in ΔE2000.
    Raises UserError where there are no checkpoints or pairs, for a checkpoint that can't be read, for pairs that one was trained
    on, and for a prediction that is not finite: before anything is written.
    """
    if not checkpoints:
        raise UserError("compare: expected at least one checkpoint, got none")
    check_settings(pairs, precision)
    points, out_dir, device = points or Points(), Path(out_dir), torch.device(device)
    loaded = [load_checkpoint(path) for path in checkpoints]
    models: dict[str, nn.Module] = dict(zip(_names(checkpoints), (model.to(device) for model in loaded), strict=True))
    methods: dict[str, dict[str, Any]] = {"source": dict(_FREE)} | {name: dict(_FREE) for name in BASELINES}
    for (name, model), path in zip(models.items(), checkpoints, strict=True):
        trained = count_trained(trained_photos(pairs, model, str(path), allow_trained))
        methods[name] = {"checkpoint": str(path), "file_bytes": path.stat().st_size, "trained_pairs": trained}
        methods[name] |= model_facts(model, device)

    images: list[dict[str, Any]] = []
    worst: list[tuple[float, int, dict[str, str]]] = []
    setting = {"size": size, "resize": resize, "device": device, "precision": precision}
    for image, outputs in measured(pairs, models, METRICS | DETAILS, **setting):
        for figures in image["figures"].values():
            figures["quality"] = points.quality(figures)
        distance = min(image["figures"][name]["delta_e2000"] for name in models)
        if len(worst) < SHOWN_WORST or distance > worst[0][0]:
            heapq.heappush(worst, (distance, len(images), encode_pictures(outputs)))
            if len(worst) > SHOWN_WORST:
                heapq.heappop(worst)
        images.append(image)

    _summarise(methods, next(iter(models)), images, points)
    results = record(pairs, **setting)
    results["settings"] |= {"checkpoint": ", ".join(map(str, checkpoints)), "points": asdict(points)}
    results |= {"first": next(iter(models)), "methods": methods}
    results |= {"told": {metric: len(kept) for metric, kept in _told(images).items()}}
    worst.sort(reverse=True)
    results |= {"worst": [images[index]["name"] for _, index, _ in worst], "images": images}
    out_dir.mkdir(parents=True, exist_ok=True)
    write_json(out_dir / "compare.json", results)
    write_comparison(out_dir / "compare.html", results, [(images[index], pictures) for _, index, pictures in worst])
    return results


def _names(checkpoints: Sequence[Path]) -> list[str]:
    """Of each file as much of the end of its path as no other has, without .safetensors; a file's second time is numbered."""
    parts = [path.absolute().with_name(path.name.removesuffix(".safetensors")).parts for path in checkpoints]
    names: list[str] = []
    for mine in parts:
        ends = [mine[-length:] for length in range(1, len(mine) + 1)]
        own = ["/".join(end) for end in ends if sum(other[-len(end) :] == end for other in set(parts)) == 1]
        name = next(name for name in own if name not in _RESERVED)
        numbered = (f"{name} ({number})" for number in itertools.count(2))
        names.append(next(free for free in itertools.chain([name], numbered) if free not in names))
    return names


def _told(images: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, dict[str, float]]]]:
    """The figures of the images that tell a metric of every method: all means are over the same ones."""
    figures = [image["figures"] for image in images]
    return {
        metric: [image for image in figures if not any(math.isnan(values[metric]) for values in image.values())]
        for metric in figures[0]["source"]
    }


def _summarise(methods: dict[str, dict[str, Any]], first: str, images: Sequence[dict[str, Any]], points: Points) -> None:
    """Adds to each method its costs, its figures, their difference from the first model's, and its scores."""
    told = _told(images)

    def summary(method: str, minus: str | None = None) -> dict[str, tuple[float, float]]:
        unknown = {metric: (math.nan, math.nan) for metric in told}
        return unknown | {m: means(kept, [m], method, minus)[m] for m, kept in told.items() if kept}

    for name, method in methods.items():
        if name != "source":
            costs = summarise_costs([image | image["costs"][name] for image in images])
            del costs["peak_bytes"]  # of the process, with all models in it
            method |= costs
        method["figures"] = summary(name)
        if name != first:
            method["difference"] = summary(name, first)
        quality, half = method["figures"]["quality"]
        method["cost"] = points.cost(method)
        method["score"] = points.score(quality, method["cost"]), points.quality_weight * half
    front = pareto_front({name: (method["figures"]["quality"][0], method["cost"]) for name, method in methods.items()})
    for name, method in methods.items():
        method["pareto"] = name in front
