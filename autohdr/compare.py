"""Several models on the same pairs: what each is worth and costs, and a score of both, as compare.json and compare.html."""

import heapq
import itertools
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch

from autohdr.data.pairs import Pair
from autohdr.errors import UserError
from autohdr.evaluate import (
    BASELINES,
    PRECISIONS,
    check_settings,
    count_trained,
    means,
    measure_costs,
    measured,
    model_facts,
    perceptual,
    record,
    summarise_costs,
    trained_photos,
    write_json,
)
from autohdr.metrics import DETAILS, METRICS
from autohdr.models import combine, load_checkpoint
from autohdr.models.combined import AverageOf
from autohdr.models.int8 import made_of
from autohdr.models.network import Network
from autohdr.report import encode_pictures, write_comparison
from autohdr.report.tables import LABELS
from autohdr.score import Points, pareto_front

SHOWN_WORST = 10
_RESERVED = {*LABELS, *LABELS.values()}
Form = Literal["bfloat16", "float16", "fast", "flips-2", "flips-4", "flips-8", "sharpen"]
"""What a model can be measured as beside itself, by the options of `enhance`."""
_OPTIONS: dict[str, dict[str, Any]] = {"fast": {"fast": True}, "sharpen": {"sharpen": 0.3}} | {
    f"flips-{views}": {"flips": views} for views in (2, 4, 8)
}
"""What `combine` makes of each; half precision is none of its options."""
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
    forms: Sequence[Form] = (),
    ensembles: Sequence[Sequence[Path]] = (),
    average: Sequence[AverageOf] = ("outputs",),
    cost_size: tuple[int, int] | None = None,
    allow_trained: bool = False,
    points: Points | None = None,
    lpips: Sequence[str | Path] = (),
) -> dict[str, Any]:
    """Measures models beside source, gain and gamma and auto-tone; writes compare.json and compare.html into out_dir.

    checkpoints: as load_checkpoint reads them. Differences are taken from the first, image by image. What `quantize` made of one
        that stands before it counts as a form of that.
    forms: what each model is measured as besides: under autocast, at a third of the size, as the mean over so many views,
        sharpened. One that a model does not have is left out, and the results' "left_out" says why. A form's differences are from
        its own model.
    ensembles: checkpoints that are measured together as well, several times so many; they need not be compared by themselves.
    average: what each ensemble's mean is taken of: outputs, weights (a soup) or both. A soup counts as a form of the first of its
        members that is compared by itself; one whose members are not of one run is left out, and so is a mean of equal weights.
    cost_size: height and width of the photo that costs are measured on (evaluate.measure_costs), in the place of the pairs.
    points: what the score is made of; score.Points by default. The others as in `evaluate`.

    Returns what compare.json holds, except that a figure that is not finite is null there. "methods" has of each its costs, the
    mean of each metric with the half width of its 95% interval, the score and whether it is on the Pareto front; "told" how many
    images a metric is the mean of: those of which every method's is known (metrics.DETAILS). "worst" are the images that even the
    best of the models leaves farthest from the target, in ΔE2000.
    Raises UserError where there are no checkpoints or pairs, for an ensemble of one, for a checkpoint that can't be read, for
    pairs that one was trained on, and for a prediction that is not finite: before any file is written. OSError where out_dir
    can't be made: before anything is measured.
    """
    if not checkpoints:
        raise UserError("compare: expected at least one checkpoint, got none")
    if any(len(members) < 2 for members in ensembles):
        raise UserError(f"compare: ensemble: expected two checkpoints or more, got {min(map(len, ensembles))}")
    if "weights" in average and not ensembles:
        raise UserError("compare: average: expected ensembles to take the mean of the weights of, got none")
    check_settings(pairs, precision)
    for setting, given, known in (("forms", forms, get_args(Form)), ("average", average, get_args(AverageOf))):
        if unknown := sorted(set(given) - set(known)):
            raise UserError(f"compare: {setting}: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    if precision in forms:
        raise UserError(f"compare: forms: {precision} is the precision of all models as it is")
    if cost_size and min(cost_size) < 1:
        raise UserError(f"compare: cost_size: expected a height and a width above 0, got {list(cost_size)}")
    points, out_dir, device = points or Points(), Path(out_dir), torch.device(device)
    candidates, left_out = _candidates(checkpoints, forms, ensembles, average, precision, device)
    first = next(iter(candidates))
    methods: dict[str, dict[str, Any]] = {"source": dict(_FREE)} | {name: dict(_FREE) for name in BASELINES}
    for name, (model, _, files, model_name, form_of) in candidates.items():
        named = " and ".join(map(str, files))
        trained = count_trained(trained_photos(pairs, model, named, allow_trained))
        methods[name] = {"checkpoint": named, "file_bytes": sum(file.stat().st_size for file in files), "trained_pairs": trained}
        methods[name] |= model_facts(model, device) | {"name": model_name, "form_of": form_of}
    out_dir.mkdir(parents=True, exist_ok=True)  # before the work, which would be lost where it can't be
    models = {name: (candidate.model, candidate.precision) for name, candidate in candidates.items()}
    whole = [name for name, method in methods.items() if not method.get("form_of")]

    metrics = METRICS | perceptual(lpips, device) | DETAILS
    images: list[dict[str, Any]] = []
    worst: list[tuple[float, int, dict[str, str]]] = []
    setting = {"size": size, "resize": resize, "device": device}
    for image, outputs in measured(pairs, models, metrics, **setting):
        for figures in image["figures"].values():
            figures["quality"] = points.quality(figures)
        distance = min(image["figures"][name]["delta_e2000"] for name in models)
        if len(worst) < SHOWN_WORST or distance > worst[0][0]:
            shown = {name: outputs[name] for name in (*whole, "target")}
            heapq.heappush(worst, (distance, len(images), encode_pictures(shown)))
            if len(worst) > SHOWN_WORST:
                heapq.heappop(worst)
        images.append(image)

    if cost_size:
        costs = measure_costs(pairs[0], models, cost_size, device)
    else:
        costs = {name: [image | image["costs"][name] for image in images] for name in methods if name != "source"}
    _summarise(methods, first, images, costs, points)
    results = record(pairs, **setting, precision=precision)
    results["settings"] |= {"checkpoint": ", ".join(map(str, checkpoints)), "lpips": [*map(str, lpips)]}
    results["settings"] |= {"points": asdict(points), "cost_size": cost_size}
    results |= {"first": first, "methods": methods, "left_out": left_out}
    results |= {"told": {metric: len(kept) for metric, kept in _told(images).items()}}
    worst.sort(reverse=True)
    results |= {"worst": [images[index]["name"] for _, index, _ in worst], "images": images}
    write_json(out_dir / "compare.json", results)
    write_comparison(out_dir / "compare.html", results, [(images[index], pictures) for _, index, pictures in worst])
    return results


class _Candidate(NamedTuple):
    """What is measured: a model, its name, the files of its weights and, of a form, the method that it is a form of."""

    model: Network
    precision: str
    files: Sequence[Path]
    model_name: str
    form_of: str | None = None


def _candidates(
    checkpoints: Sequence[Path],
    forms: Sequence[Form],
    ensembles: Sequence[Sequence[Path]],
    average: Sequence[AverageOf],
    precision: str,
    device: torch.device,
) -> tuple[dict[str, _Candidate], list[str]]:
    """By their names as methods the models, each before its forms, then the ensembles; and why a form or a mean is left out."""
    names = _names(checkpoints)
    found: dict[str, _Candidate] = {}
    files = dict.fromkeys([*checkpoints, *itertools.chain(*ensembles)])
    networks, left_out = {path: load_checkpoint(path).to(device) for path in files}, []
    for name, path in zip(names, checkpoints, strict=True):
        network = networks[path]
        original = next((other for other, candidate in found.items() if made_of(network, candidate.model)), None)
        if original:
            coded = _Candidate(network, precision, [path], network.config.name, original)
            found[_free(f"{original}, int8", {*names, *found})] = coded
            continue
        found[name] = _Candidate(network, precision, [path], network.config.name)
        for form in dict.fromkeys(forms):
            try:
                formed = combine([network], **_OPTIONS.get(form, {}))
            except UserError as error:  # not every model has each
                left_out.append(f"{name}: {error}")
                continue
            its_own = form if form in PRECISIONS else precision
            found[_free(f"{name}, {form}", {*names, *found})] = _Candidate(formed, its_own, [path], network.config.name, name)
    for members, kind in itertools.product(ensembles, dict.fromkeys(average)):
        try:
            mean = _mean([networks[path] for path in members], kind)
        except UserError as error:  # such as checkpoints of several runs, for a mean of weights
            left_out.append(f"{' and '.join(map(str, members))}: {error}")
            continue
        name, own = "ensemble", None
        if kind == "weights":
            own = next((name for path, name in zip(checkpoints, names, strict=True) if path in members and name in found), None)
            name = f"{own}, soup" if own else "soup"
        found[_free(name, {*names, *found})] = _Candidate(mean, precision, members, mean.config.name, own)
    return found, left_out


def _mean(members: Sequence[Network], average: AverageOf) -> Network:
    """UserError as combine raises it, and where all members have the same weights, as a run's best and last epoch can be one."""
    first, *others = [network.state_dict() for network in members]
    if all(first.keys() == its.keys() and all(torch.equal(first[name], its[name]) for name in its) for its in others):
        raise UserError(f"a mean of {average}: expected different weights, got the same: it is each of them")
    return combine(members, average=average)


def _names(checkpoints: Sequence[Path]) -> list[str]:
    """Of each file as much of the end of its path as no other has, without .safetensors; a file's second time is numbered."""
    parts = [path.absolute().with_name(path.name.removesuffix(".safetensors")).parts for path in checkpoints]
    names: list[str] = []
    for mine in parts:
        ends = [mine[-length:] for length in range(1, len(mine) + 1)]
        own = ["/".join(end) for end in ends if sum(other[-len(end) :] == end for other in set(parts)) == 1]
        name = next(name for name in own if name not in _RESERVED)
        names.append(_free(name, names))
    return names


def _free(name: str, taken: Container[str]) -> str:
    """The name, numbered where it is taken."""
    numbered = (f"{name} ({number})" for number in itertools.count(2))
    return next(free for free in itertools.chain([name], numbered) if free not in taken)


def _told(images: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, dict[str, float]]]]:
    """The figures of the images that tell a metric of every method: all means are over the same ones."""
    figures = [image["figures"] for image in images]
    return {
        metric: [image for image in figures if not any(math.isnan(values[metric]) for values in image.values())]
        for metric in figures[0]["source"]
    }


def _summarise(
    methods: dict[str, dict[str, Any]],
    first: str,
    images: Sequence[dict[str, Any]],
    costs: Mapping[str, Sequence[dict[str, Any]]],
    points: Points,
) -> None:
    """Adds to each method its costs, its figures, their difference from the first model's or from its own, and its scores."""
    told = _told(images)

    def summary(method: str, minus: str | None = None) -> dict[str, tuple[float, float]]:
        unknown = {metric: (math.nan, math.nan) for metric in told}
        return unknown | {m: means(kept, [m], method, minus)[m] for m, kept in told.items() if kept}

    for name, method in methods.items():
        if name != "source":
            method |= summarise_costs(costs[name])
            del method["peak_bytes"]  # of the process, with all models in it
        method["figures"] = summary(name)
        if name != first:
            method["difference"] = summary(name, method.get("form_of") or first)
        quality, half = method["figures"]["quality"]
        method["cost"] = points.cost(method)
        method["score"] = points.score(quality, method["cost"]), points.quality_weight * half
    front = pareto_front({name: (method["figures"]["quality"][0], method["cost"]) for name, method in methods.items()})
    for name, method in methods.items():
        method["pareto"] = name in front
