"""A model's figures on held-out pairs beside source and baselines, as results.json and as a page to look at (autohdr.report)."""

import json
import math
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import autohdr
from autohdr.autotone import auto_tone, gain_and_gamma
from autohdr.data.pairs import Pair, PairDataset, photo_digests
from autohdr.errors import UserError
from autohdr.files import finite, write_text
from autohdr.lpips import LPIPS
from autohdr.measure import Measurement, give_back, measure
from autohdr.metrics import METRICS, mean_interval
from autohdr.models.network import not_finite
from autohdr.report import SHOWN_PAIRS, encode_pictures, write_page

PRECISIONS = ("float32", "bfloat16", "float16")
MEGAPIXEL = 1_000_000
WARM_UP = 256  # pixels a side
PASSES, PATIENCE = 3, 10.0  # where one photo alone tells the cost
COSTS = ("seconds", "growth_bytes", "peak_bytes", "memory_source", "joules")  # of measure.Measurement
BASELINES = {"gain_and_gamma": gain_and_gamma, "auto_tone": auto_tone}

Run = Callable[[Tensor], tuple[Tensor, dict[str, Any]]]
"""Of a source (1, 3, H, W): what is made of it, and what that took."""


def evaluate(
    pairs: Sequence[Pair],
    out_dir: str | Path,
    *,
    model: nn.Module | None = None,
    size: int | tuple[int, int] | None = None,
    resize: str = "squash",
    device: torch.device | str = "cpu",
    precision: str = "float32",
    allow_trained: bool = False,
    checkpoint: str | Path | None = None,
    whole: nn.Module | None = None,
    lpips: Sequence[str | Path] = (),
) -> dict[str, Any]:
    """Measures source, gain and gamma, auto-tone and model against the targets; writes results.json and report.html into out_dir.

    model: (1, 3, H, W) -> same shape, put on `device` in eval mode; None measures the two baselines alone.
    size, resize: as in PairDataset, without augmentation; None keeps each photo's own size.
    precision: of the model: "float32", or "bfloat16" or "float16" for autocast.
    allow_trained: measure pairs with a photo that the model was trained on too; the results say which they are. The digests of
    those photos (pairs.photo_digests) are the model's metadata["trained_on"], which `train` saves.
    checkpoint: the file of the model's weights, to be named in the results beside the lists of pairs and the date.
    whole: what the model is a cheaper form of, to be measured beside it in float32.
    lpips: files of weights for lpips.LPIPS, which is then one of the metrics.

    Predictions are clamped to [0, 1] first. Returns what results.json holds, except that a figure that is not finite is
    null there: the PSNR of equal images, the interval of a single one. "seconds_per_megapixel" is the median over the
    images, of which a part of the first is predicted once beforehand; "bytes_per_megapixel" the highest growth of memory during
    a forward pass, "joules_per_megapixel" the median energy; either nan where it cannot be told.
    Raises UserError where there are no pairs, for pairs that were trained on, and for a prediction that is not finite: it
    names the photo.
    """
    check_settings(pairs, precision)
    metrics = METRICS | perceptual(lpips, device)
    trained = trained_photos(pairs, model, "the model", allow_trained)
    out_dir, device = Path(out_dir), torch.device(device)
    out_dir.mkdir(parents=True, exist_ok=True)
    facts, models = None, {}
    if model is not None:
        models["model"] = model.to(device).eval(), precision
        facts = model_facts(model, device) | {"trained_pairs": count_trained(trained)}
    if whole is not None:
        models["whole"] = whole.to(device).eval(), "float32"

    images, pictures = [], []
    for image, outputs in measured(pairs, models, metrics, size=size, resize=resize, device=device):
        costs = image.pop("costs")
        if model is not None:
            image |= costs["model"] | {"trained_on": trained and bool(trained[len(images)])}
        images.append(image)
        if len(pictures) < SHOWN_PAIRS:
            pictures.append(encode_pictures(outputs))

    results = record(pairs, size=size, resize=resize, device=device, precision=precision)
    results["settings"] |= {"checkpoint": None if checkpoint is None else str(checkpoint), "lpips": [*map(str, lpips)]}
    results |= {
        "model": facts and facts | summarise_costs(images),
        "summary": summarise([image["figures"] for image in images], (*BASELINES, *models.keys() - {"model"})),
        "images": images,
    }
    write_json(out_dir / "results.json", results)
    write_page(out_dir / "report.html", results, pictures)
    return results


def check_settings(pairs: Sequence[Pair], precision: str) -> None:
    """UserError where there are no pairs, or no such precision."""
    if not pairs:
        raise UserError("evaluate: expected at least one pair, got none")
    if precision not in PRECISIONS:
        raise UserError(f"evaluate: precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")


def perceptual(files: Sequence[str | Path], device: torch.device | str) -> dict[str, LPIPS]:
    """The metrics that need files of weights: LPIPS where there are any. UserError as LPIPS raises it."""
    return {"lpips": LPIPS(files).to(device)} if files else {}


def measured(
    pairs: Sequence[Pair],
    models: Mapping[str, tuple[nn.Module, str]],
    metrics: Mapping[str, Callable[[Tensor, Tensor], Tensor]],
    *,
    size: int | tuple[int, int] | None,
    resize: str,
    device: torch.device,
) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
    """Of each pair what was found, and the pictures: {method: (1, 3, H, W) in [0, 1]} of source, baselines, models and target.

    models: by their names as methods, on `device` in eval mode, each with its precision. The others as in `evaluate`, also what
    is raised.
    What was found: the pair's name, src, tar, height and width; figures: {method: {metric: value}}; costs: {baseline or model:
    seconds, growth_bytes, peak_bytes, memory_source and joules}, as measure.Measurement has them.
    """
    dataset = PairDataset(pairs, size, resize)
    folder = os.path.commonpath([pair.src.absolute().parent for pair in pairs])
    for index, pair in enumerate(tqdm(pairs, desc="evaluate", unit="pair", leave=False, disable=None)):
        sample = dataset[index]
        source, target = sample["src"][None].to(device), sample["tar"][None].to(device)
        outputs, costs = {"source": source}, {}
        for name, run in _runs(models, pair.src).items():
            if index == 0:
                _warm_up(run, source)
            outputs[name], costs[name] = run(source)
        image: dict[str, Any] = {"name": os.path.relpath(pair.src.absolute(), folder), "src": str(pair.src), "tar": str(pair.tar)}
        image |= {"height": target.shape[2], "width": target.shape[3], "costs": costs}
        image["figures"] = {
            method: {name: metric(output, target).item() for name, metric in metrics.items()}
            for method, output in outputs.items()
        }
        yield image, outputs | {"target": target}


def measure_costs(
    pair: Pair, models: Mapping[str, tuple[nn.Module, str]], size: tuple[int, int], device: torch.device
) -> dict[str, list[dict[str, Any]]]:
    """What the baselines and each model take for a photo of this height and width, which the pair's source is brought to.

    models: as in `measured`. Of each up to PASSES passes, as long as they have not taken PATIENCE seconds: height and width
    beside the figures that `measured` calls costs.
    """
    source = PairDataset([pair], size)[0]["src"][None].to(device)
    costs: dict[str, list[dict[str, Any]]] = {}
    runs = _runs(models, pair.src)
    for name, run in tqdm(runs.items(), desc="cost", unit="model", leave=False, disable=None):
        _warm_up(run, source)
        costs[name] = []
        while len(costs[name]) < PASSES and sum(cost["seconds"] for cost in costs[name]) < PATIENCE:
            costs[name].append({"height": size[0], "width": size[1]} | run(source)[1])
    return costs


def record(
    pairs: Sequence[Pair], *, size: int | tuple[int, int] | None, resize: str, device: torch.device, precision: str
) -> dict[str, Any]:
    """Where, when, how and of which lists of pairs figures were measured."""
    return {
        "environment": _environment(device),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "settings": {
            "size": size,
            "resize": resize if size else None,
            "device": str(device),
            "precision": precision,
            "pairs": sorted({str(pair.file) for pair in pairs if pair.file}),
        },
    }


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Writes results; a figure that is not finite becomes null."""
    write_text(path, json.dumps(finite(results), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def summarise(
    figures: Sequence[dict[str, dict[str, float]]], against: Sequence[str] = tuple(BASELINES)
) -> dict[str, dict[str, tuple[float, float]]]:
    """{method: {metric: value}} of each image -> {method: {metric: (mean, half width of its 95% interval)}}.

    Where there is a model, "model_minus_X" for each X of `against` holds the mean of the differences image by image and its
    interval. Images differ more than methods do, so that the differences can tell two methods apart whose own intervals overlap.
    """
    summary = {method: means(figures, metrics, method) for method, metrics in figures[0].items()}
    for other in against if "model" in summary else ():
        summary["model_minus_" + other] = means(figures, figures[0]["model"], "model", other)
    return summary


def means(
    figures: Sequence[dict[str, dict[str, float]]], metrics: Iterable[str], method: str, minus: str | None = None
) -> dict[str, tuple[float, float]]:
    """{metric: (mean, half width of its 95% interval)} of a method or, with `minus`, of its differences from another one."""
    return {
        metric: mean_interval([image[method][metric] - (image[minus][metric] if minus else 0) for image in figures])
        for metric in metrics
    }


def summarise_costs(images: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Time, memory and energy of a model on all images: `images` is what `evaluate` returns of each."""
    megapixels = [image["height"] * image["width"] / MEGAPIXEL for image in images]
    seconds, growth, joules = (
        [image[key] / size for image, size in zip(images, megapixels, strict=True)]
        for key in ("seconds", "growth_bytes", "joules")
    )
    memory_source = images[0]["memory_source"]
    return {
        "seconds_per_megapixel": statistics.median(seconds),
        "bytes_per_megapixel": math.nan if memory_source == "ru_maxrss" else max(growth),
        "joules_per_megapixel": math.nan if any(map(math.isnan, joules)) else statistics.median(joules),
        "peak_bytes": max(image["peak_bytes"] for image in images),
        "memory_source": memory_source,
    }


def trained_photos(pairs: Sequence[Pair], model: nn.Module | None, named: str, allowed: bool) -> list[list[Path]] | None:
    """The photos of each pair that the model was trained on; None where its metadata lacks the digests.

    Raises UserError where there are any and they are not allowed: it calls the model `named`.
    """
    digests = getattr(model, "metadata", {}).get("trained_on")
    if digests is None:
        return None
    digests = set(digests)
    known = {photo for photo, digest in photo_digests(pairs).items() if digest in digests}
    trained = [[photo for photo in (pair.src, pair.tar) if photo in known] for pair in pairs]
    found = [f"{pair.where}: {', '.join(map(str, seen))}" for pair, seen in zip(pairs, trained, strict=True) if seen]
    if found and not allowed:
        said = f"{named} was trained on {len(found)} of the {len(pairs)} pairs (--allow-trained measures them nevertheless)"
        raise UserError("\n  ".join([said, *found]))
    return trained


def count_trained(trained: list[list[Path]] | None) -> int | None:
    """Of what trained_photos returns, how many pairs have any; None where it cannot be told."""
    return None if trained is None else sum(map(bool, trained))


def count_macs(model: nn.Module, device: torch.device | str = "cpu", side: int = 64) -> float:
    """Multiply-accumulates per pixel of (1, 3, side, side), as half of what torch's FlopCounterMode counts."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, side, side, device=device))
    return counter.get_total_flops() / 2 / side**2


def model_facts(model: nn.Module, device: torch.device) -> dict[str, Any]:
    """Name, parameters and MACs per megapixel."""
    return {
        "name": getattr(getattr(model, "config", None), "name", type(model).__name__),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "macs_per_megapixel": count_macs(model, device, 64 * getattr(model, "reduction", 1)) * MEGAPIXEL,
    }


def _toned(recipe: Callable[[np.ndarray], np.ndarray], source: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """What the recipe makes of the source, and what it took."""
    pixels = source[0].permute(1, 2, 0).contiguous().cpu().numpy()
    give_back()
    with measure() as cost:
        toned = recipe(pixels)
    return torch.from_numpy(toned).permute(2, 0, 1)[None].to(source.device), _cost(cost)


def _runs(models: Mapping[str, tuple[nn.Module, str]], photo: Path) -> dict[str, Run]:
    """The baselines, then the models, each as a function of a source that gives its result and what it took."""
    runs: dict[str, Run] = {name: partial(_toned, recipe) for name, recipe in BASELINES.items()}
    return runs | {name: partial(_predict, model, precision, photo) for name, (model, precision) in models.items()}


def _warm_up(run: Run, source: Tensor) -> None:
    """What happens once, such as memory that the kernels keep, is not counted."""
    run(source[..., :WARM_UP, :WARM_UP])


def _predict(model: nn.Module, precision: str, photo: Path, source: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """The prediction clamped to [0, 1], and what it took."""
    give_back()
    with (
        torch.inference_mode(),
        torch.autocast(source.device.type, getattr(torch, precision), enabled=precision != "float32"),
        measure(source.device) as cost,
    ):
        prediction = model(source)
    if prediction.shape != source.shape:
        raise UserError(f"{photo}: expected a prediction {list(source.shape)}, got {list(prediction.shape)}")
    if refused := not_finite(prediction, precision):
        raise UserError(f"{photo}: {refused}")
    return prediction.float().clamp(0, 1), _cost(cost)


def _cost(measured: Measurement) -> dict[str, Any]:
    return {name: getattr(measured, name) for name in COSTS}


def _environment(device: torch.device) -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        lines = cpuinfo.read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "autohdr": autohdr.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }
