"""A model's figures on held-out pairs beside source and baselines, as results.json and as a page to look at (autohdr.report)."""

import json
import math
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
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
from autohdr.measure import measure
from autohdr.metrics import METRICS, mean_interval
from autohdr.report import SHOWN_PAIRS, encode_pictures, write_page

PRECISIONS = ("float32", "bfloat16")
MEGAPIXEL = 1_000_000
WARM_UP = 256  # pixels a side
BASELINES = {"gain_and_gamma": gain_and_gamma, "auto_tone": auto_tone}


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
) -> dict[str, Any]:
    """Measures source, gain and gamma, auto-tone and model against the targets; writes results.json and report.html into out_dir.

    model: (1, 3, H, W) -> same shape, put on `device` in eval mode; None measures the two baselines alone.
    size, resize: as in PairDataset, without augmentation; None keeps each photo's own size.
    precision: "float32", or "bfloat16" for autocast.
    allow_trained: measure pairs with a photo that the model was trained on too; the results say which they are. The digests of
    those photos (pairs.photo_digests) are the model's metadata["trained_on"], which `train` saves.
    checkpoint: the file of the model's weights, to be named in the results beside the lists of pairs and the date.

    Predictions are clamped to [0, 1] first. Returns what results.json holds, except that a figure that is not finite is
    null there: the PSNR of equal images, the interval of a single one. "seconds_per_megapixel" is the median over the
    images, of which a part of the first is predicted once beforehand; "bytes_per_megapixel" the highest growth of memory during
    a forward pass, nan where it cannot be told.
    Raises UserError where there are no pairs, for pairs that were trained on, and for a prediction that is not finite: it
    names the photo.
    """
    if not pairs:
        raise UserError("evaluate: expected at least one pair, got none")
    if precision not in PRECISIONS:
        raise UserError(f"evaluate: precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    trained = _trained(pairs, model)
    if trained and not allow_trained:
        _refuse_trained(pairs, trained)
    out_dir, device = Path(out_dir), torch.device(device)
    out_dir.mkdir(parents=True, exist_ok=True)
    dataset = PairDataset(pairs, size, resize)
    facts = None
    if model is not None:
        model = model.to(device).eval()
        facts = _facts(model, device) | {"trained_pairs": trained and sum(map(bool, trained))}

    folder = os.path.commonpath([pair.src.absolute().parent for pair in pairs])
    images, pictures = [], []
    for index, pair in enumerate(tqdm(pairs, desc="evaluate", unit="pair", leave=False, disable=None)):
        sample = dataset[index]
        source, target = sample["src"][None].to(device), sample["tar"][None].to(device)
        height, width = target.shape[-2:]
        image: dict[str, Any] = {"name": os.path.relpath(pair.src.absolute(), folder), "src": str(pair.src), "tar": str(pair.tar)}
        image |= {"height": height, "width": width}
        outputs = {"source": source} | {name: _toned(recipe, source) for name, recipe in BASELINES.items()}
        if model is not None:
            if index == 0:  # what happens once, such as memory that the kernels keep, is not counted
                _predict(model, source[..., :WARM_UP, :WARM_UP], precision, pair.src)
            outputs["model"], cost = _predict(model, source, precision, pair.src)
            image |= cost | {"trained_on": trained and bool(trained[index])}
        image["figures"] = _figures(outputs, target)
        images.append(image)
        if index < SHOWN_PAIRS:
            pictures.append(encode_pictures(outputs | {"target": target}))

    results = {
        "environment": _environment(device),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "settings": {
            "size": size,
            "resize": resize if size else None,
            "device": str(device),
            "precision": precision,
            "checkpoint": None if checkpoint is None else str(checkpoint),
            "pairs": sorted({str(pair.file) for pair in pairs if pair.file}),
        },
        "model": facts and facts | summarise_costs(images),
        "summary": summarise([image["figures"] for image in images]),
        "images": images,
    }
    write_json(out_dir / "results.json", results)
    write_page(out_dir / "report.html", results, pictures)
    return results


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
    summary = {
        method: {metric: mean_interval([image[method][metric] for image in figures]) for metric in METRICS}
        for method in figures[0]
    }
    for other in against if "model" in summary else ():
        summary["model_minus_" + other] = {
            metric: mean_interval([image["model"][metric] - image[other][metric] for image in figures]) for metric in METRICS
        }
    return summary


def summarise_costs(images: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Time and memory of a model on all images: `images` is what `evaluate` returns of each."""
    megapixels = [image["height"] * image["width"] / MEGAPIXEL for image in images]
    seconds, growth = (
        [image[key] / size for image, size in zip(images, megapixels, strict=True)] for key in ("seconds", "growth_bytes")
    )
    memory_source = images[0]["memory_source"]
    return {
        "seconds_per_megapixel": statistics.median(seconds),
        "bytes_per_megapixel": math.nan if memory_source == "ru_maxrss" else max(growth),
        "peak_bytes": max(image["peak_bytes"] for image in images),
        "memory_source": memory_source,
    }


def _trained(pairs: Sequence[Pair], model: nn.Module | None) -> list[list[Path]] | None:
    """The photos of each pair that the model was trained on; None where its metadata lacks the digests."""
    digests = getattr(model, "metadata", {}).get("trained_on")
    if digests is None:
        return None
    digests = set(digests)
    known = {photo for photo, digest in photo_digests(pairs).items() if digest in digests}
    return [[photo for photo in (pair.src, pair.tar) if photo in known] for pair in pairs]


def _refuse_trained(pairs: Sequence[Pair], trained: Sequence[Sequence[Path]]) -> None:
    named = [f"{pair.where}: {', '.join(map(str, seen))}" for pair, seen in zip(pairs, trained, strict=True) if seen]
    if named:
        said = f"the model was trained on {len(named)} of the {len(pairs)} pairs (--allow-trained measures them nevertheless)"
        raise UserError("\n  ".join([said, *named]))


def count_macs(model: nn.Module, device: torch.device | str = "cpu", side: int = 64) -> float:
    """Multiply-accumulates per pixel of (1, 3, side, side), as half of what torch's FlopCounterMode counts."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, side, side, device=device))
    return counter.get_total_flops() / 2 / side**2


def _facts(model: nn.Module, device: torch.device) -> dict[str, Any]:
    return {
        "name": getattr(getattr(model, "config", None), "name", type(model).__name__),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "macs_per_megapixel": count_macs(model, device) * MEGAPIXEL,
    }


def _toned(recipe: Callable[[np.ndarray], np.ndarray], source: Tensor) -> Tensor:
    pixels = source[0].permute(1, 2, 0).contiguous().cpu().numpy()
    return torch.from_numpy(recipe(pixels)).permute(2, 0, 1)[None].to(source.device)


def _predict(model: nn.Module, source: Tensor, precision: str, photo: Path) -> tuple[Tensor, dict[str, Any]]:
    """The prediction clamped to [0, 1], and what it took."""
    with (
        torch.inference_mode(),
        torch.autocast(source.device.type, torch.bfloat16, enabled=precision == "bfloat16"),
        measure(source.device) as measured,
    ):
        prediction = model(source)
    if prediction.shape != source.shape:
        raise UserError(f"{photo}: expected a prediction {list(source.shape)}, got {list(prediction.shape)}")
    if broken := prediction.numel() - int(prediction.isfinite().sum()):
        raise UserError(f"{photo}: {broken} of the prediction's {prediction.numel()} values are not finite")
    cost = {name: getattr(measured, name) for name in ("seconds", "growth_bytes", "peak_bytes", "memory_source")}
    return prediction.float().clamp(0, 1), cost


def _figures(outputs: Mapping[str, Tensor], target: Tensor) -> dict[str, dict[str, float]]:
    """{method: {metric: value}} of one image."""
    return {
        method: {name: metric(output, target).item() for name, metric in METRICS.items()} for method, output in outputs.items()
    }


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
