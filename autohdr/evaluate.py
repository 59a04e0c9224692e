"""A model's figures on held-out pairs beside two baselines: a table, results.json and report.html."""

import base64
import html
import io
import json
import math
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import autohdr
from autohdr.autotone import auto_tone
from autohdr.data.pairs import Pair, PairDataset, photo_digests
from autohdr.errors import UserError
from autohdr.files import replacing
from autohdr.measure import Measurement, measure
from autohdr.metrics import METRICS, mean_interval

PRECISIONS = ("float32", "bfloat16")
MEGAPIXEL = 1_000_000
SHOWN_PAIRS = 24  # a page with the pictures of hundreds of pairs would not open
_PICTURE_SIDE = 1280
_COLUMNS = {"l1": ("L1 ↓", 4), "psnr": ("PSNR dB ↑", 2), "ssim": ("SSIM ↑", 3), "delta_e2000": ("ΔE2000 ↓", 2)}
_MINUS = "model_minus_"
_DIFFERENCE = _MINUS + "auto_tone"


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
) -> dict[str, Any]:
    """Measures source, auto-tone and model against the targets; writes results.json and report.html into out_dir.

    model: (1, 3, H, W) -> same shape, put on `device` in eval mode; None measures the two baselines alone.
    size, resize: as in PairDataset, without augmentation; None keeps each photo's own size.
    precision: "float32", or "bfloat16" for autocast.
    allow_trained: measure pairs with a photo that the model was trained on too; the results say which they are. A model tells
    by its metadata's "trained_on", the photos' digests (pairs.photo_digests), as what `train` saves does.

    Predictions are clamped to [0, 1] first. Returns what results.json holds, except that a figure that is not finite is
    null there: the PSNR of equal images, the interval of a single one. "seconds_per_megapixel" is the median over the
    images; "bytes_per_megapixel" the highest growth of memory during a forward pass, nan where it cannot be told.
    Raises UserError where there are no pairs, for pairs that were trained on, and for a prediction that is not finite: it
    names the photo.
    """
    if not pairs:
        raise UserError("evaluate: expected at least one pair, got none")
    if precision not in PRECISIONS:
        raise UserError(f"evaluate: precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    trained = _trained(pairs, model)
    if trained and any(trained) and not allow_trained:
        named = [f"{pair.where}: {', '.join(map(str, seen))}" for pair, seen in zip(pairs, trained, strict=True) if seen]
        said = f"the model was trained on {len(named)} of the {len(pairs)} pairs (--allow-trained measures them nevertheless)"
        raise UserError("\n  ".join([said, *named]))
    out_dir, device = Path(out_dir), torch.device(device)
    out_dir.mkdir(parents=True, exist_ok=True)
    dataset = PairDataset(pairs, size, resize)
    model_facts = None
    if model is not None:
        model = model.to(device).eval()
        model_facts = _facts(model, device) | {"trained_pairs": trained and sum(map(bool, trained))}

    folder = os.path.commonpath([pair.src.absolute().parent for pair in pairs])
    images, pictures = [], []
    for index, pair in enumerate(tqdm(pairs, desc="evaluate", unit="pair", leave=False, disable=None)):
        sample = dataset[index]
        source, target = (sample[key][None].to(device) for key in ("src", "tar"))
        toned = auto_tone(np.ascontiguousarray(sample["src"].permute(1, 2, 0).numpy()))
        outputs = {"source": source, "auto_tone": torch.from_numpy(toned).permute(2, 0, 1)[None].to(device)}
        entry = {"name": os.path.relpath(pair.src.absolute(), folder), "src": str(pair.src), "tar": str(pair.tar)}
        entry["height"], entry["width"] = target.shape[-2:]
        if model is not None:
            entry["trained_on"] = trained and bool(trained[index])
            outputs["model"], cost = _predict(model, source, precision, pair)
            entry["seconds"], entry["growth_bytes"] = cost.seconds, cost.growth_bytes
            entry["peak_bytes"], entry["memory_source"] = cost.peak_bytes, cost.memory_source
        entry["figures"] = {
            method: {name: metric(output, target).item() for name, metric in METRICS.items()}
            for method, output in outputs.items()
        }
        images.append(entry)
        if index < SHOWN_PAIRS:
            pictures.append({method: _data_uri(image) for method, image in (outputs | {"target": target}).items()})

    if model_facts:
        megapixels = [image["height"] * image["width"] / MEGAPIXEL for image in images]
        memory_source = images[0]["memory_source"]
        seconds = statistics.median(i["seconds"] / p for i, p in zip(images, megapixels, strict=True))
        growth = max(i["growth_bytes"] / p for i, p in zip(images, megapixels, strict=True))
        model_facts |= {
            "seconds_per_megapixel": seconds,
            "bytes_per_megapixel": math.nan if memory_source == "ru_maxrss" else growth,
            "peak_bytes": max(image["peak_bytes"] for image in images),
            "memory_source": memory_source,
        }
    results = {
        "environment": _environment(device),
        "settings": {"size": size, "resize": resize if size else None, "device": str(device), "precision": precision},
        "model": model_facts,
        "summary": summarise([image["figures"] for image in images]),
        "images": images,
    }
    write_json(out_dir / "results.json", results)
    with replacing(out_dir / "report.html") as part:
        part.write_text(_page(results, pictures), "utf-8")
    return results


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Writes results; a figure that is not finite becomes null."""
    with replacing(path) as part:
        part.write_text(json.dumps(_finite(results), indent=2, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")


def summarise(
    figures: Sequence[dict[str, dict[str, float]]], against: Sequence[str] = ("auto_tone",)
) -> dict[str, dict[str, tuple[float, float]]]:
    """{method: {metric: value}} of each image -> {method: {metric: (mean, half width of its 95% interval)}}.

    Where there is a model, "model_minus_X" for each X of `against` holds the mean of the differences image by image and its
    interval: images differ more than methods do, so it tells apart what the two means' own intervals cannot.
    """
    summary = {
        method: {metric: mean_interval([image[method][metric] for image in figures]) for metric in METRICS}
        for method in figures[0]
    }
    for other in against if "model" in summary else ():
        summary[_MINUS + other] = {
            metric: mean_interval([image["model"][metric] - image[other][metric] for image in figures]) for metric in METRICS
        }
    return summary


def _trained(pairs: Sequence[Pair], model: nn.Module | None) -> list[list[Path]] | None:
    """The photos of each pair that the model was trained on; None where it does not tell."""
    digests = getattr(model, "metadata", {}).get("trained_on")
    if digests is None:
        return None
    digests = set(digests)
    known = {photo for photo, digest in photo_digests(pairs).items() if digest in digests}
    return [[photo for photo in (pair.src, pair.tar) if photo in known] for pair in pairs]


def count_macs(model: nn.Module, device: torch.device | str = "cpu", side: int = 64) -> float:
    """Multiply-accumulates per pixel of (1, 3, side, side), as half of what torch's FlopCounterMode counts."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, side, side, device=device))
    return counter.get_total_flops() / 2 / side**2


def format_table(results: dict[str, Any]) -> str:
    """What `evaluate` returned, as aligned text for a terminal."""
    rows = [["", *(title for title, _ in _COLUMNS.values())], *_rows(results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([_setting(results), "", *lines, "", *_caution(results), *_cost_lines(results)]).rstrip()


def _facts(model: nn.Module, device: torch.device) -> dict[str, Any]:
    return {
        "name": getattr(getattr(model, "config", None), "name", type(model).__name__),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "macs_per_megapixel": count_macs(model, device) * MEGAPIXEL,
    }


def _predict(model: nn.Module, source: Tensor, precision: str, pair: Pair) -> tuple[Tensor, Measurement]:
    with (
        torch.inference_mode(),
        torch.autocast(source.device.type, torch.bfloat16, enabled=precision == "bfloat16"),
        measure(source.device) as cost,
    ):
        prediction = model(source)
    if prediction.shape != source.shape:
        raise UserError(f"{pair.src}: expected a prediction {list(source.shape)}, got {list(prediction.shape)}")
    if broken := prediction.numel() - int(prediction.isfinite().sum()):
        raise UserError(f"{pair.src}: {broken} of the prediction's {prediction.numel()} values are not finite")
    return prediction.float().clamp(0, 1), cost


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


def _finite(value: Any) -> Any:
    """JSON has neither inf nor nan."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _label(results: dict[str, Any], method: str) -> str:
    if method.startswith(_MINUS):
        return f"model − {_label(results, method.removeprefix(_MINUS))}"
    model = results["model"]["name"] if results["model"] else ""
    return {"source": "unedited", "auto_tone": "auto-tone", "model": model}.get(method, method)


def _rows(results: dict[str, Any]) -> list[list[str]]:
    rows = []
    for method, figures in results["summary"].items():
        sign = "+" if method.startswith(_MINUS) else ""
        cells = []
        for metric, (_, digits) in _COLUMNS.items():
            mean, half = figures[metric]
            cells.append(f"{mean:{sign}.{digits}f}" + (f" ± {half:.{digits}f}" if math.isfinite(half) else ""))
        rows.append([_label(results, method), *cells])
    return rows


def _setting(results: dict[str, Any]) -> str:
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


def _caution(results: dict[str, Any]) -> list[str]:
    """What keeps these from being figures of pairs that the model has not seen."""
    if not (model := results["model"]) or model["trained_pairs"] == 0:
        return []
    if model["trained_pairs"] is None:
        return ["the weights do not say which photos they were trained on"]
    return [f"{model['trained_pairs']} of these pairs were TRAINED ON: this is not how the model does on other photos"]


def _costs(results: dict[str, Any]) -> dict[str, str]:
    if not (model := results["model"]):
        return {}
    growth = model["bytes_per_megapixel"]
    whose = {"cuda": "GPU", "VmHWM": "process", "ru_maxrss": "process, at most"}[model["memory_source"]]
    return {
        "Parameters": f"{model['parameters']:,}",
        "MACs per megapixel": f"{model['macs_per_megapixel'] / 1e9:.1f} G",
        "Seconds per megapixel": f"{model['seconds_per_megapixel']:.3g}",
        "Memory per megapixel": f"{growth / 1e9:.2f} GB" if math.isfinite(growth) else "not measurable here",
        f"Peak memory ({whose})": f"{model['peak_bytes'] / 1e9:.2f} GB",
    }


def _cost_lines(results: dict[str, Any]) -> list[str]:
    return [f"{name + ':':<23} {value}" for name, value in _costs(results).items()]


def _data_uri(image: Tensor) -> str:
    pixels = image[0].clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).cpu().numpy()
    picture = Image.fromarray(pixels)
    picture.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _page(results: dict[str, Any], pictures: list[dict[str, str]]) -> str:
    model = results["model"]["name"] if results["model"] else None
    sections = "\n".join(_section(results, *item) for item in zip(results["images"], pictures, strict=False))
    shown, count = len(pictures), len(results["images"])
    costs = "".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in _costs(results).items())
    return Template(_PAGE).substitute(
        title=html.escape(f"{model} against auto-tone" if model else "Auto-tone against the unedited source"),
        setting=html.escape(_setting(results)),
        verdict=html.escape(" ".join([_verdict(results), *_caution(results)])),
        table=_html_table(_rows(results)),
        costs=f"<dl>{costs}</dl>" if costs else "",
        shown="" if shown == count else f"<p>The first {shown} of {count} pairs; results.json has the figures of all.</p>",
        sections=sections,
        versions=html.escape(f"autohdr {results['environment']['autohdr']}, torch {results['environment']['torch']}"),
    )


def _verdict(results: dict[str, Any]) -> str:
    if _DIFFERENCE not in results["summary"]:
        return ""
    mean, half = results["summary"][_DIFFERENCE]["psnr"]
    if not abs(mean) > half:  # also where the interval is unknown
        return f"PSNR against auto-tone: {mean:+.2f} dB. These pairs cannot tell it from no difference."
    return f"{'Better' if mean > 0 else 'Worse'} than auto-tone by {abs(mean):.2f} ± {half:.2f} dB PSNR."


def _html_table(rows: list[list[str]]) -> str:
    head = "".join(f"<th scope=col>{title}</th>" for title, _ in _COLUMNS.values())
    body = "".join(
        f"<tr><th scope=row>{html.escape(label)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        for label, *cells in rows
    )
    return f"<div class=scroll><table><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _section(results: dict[str, Any], image: dict[str, Any], pictures: dict[str, str]) -> str:
    """One pair: its pictures on top of one another, the buttons that choose two of them, and its figures."""
    name = html.escape(image["name"])
    labels = {method: "target" if method == "target" else _label(results, method) for method in pictures}
    left, right = "source", "model" if "model" in pictures else "auto_tone"
    layers = "".join(
        f'<img class="{"left" * (method == left)}{"right" * (method == right)}" data-show={method} '
        f'alt="{html.escape(labels[method])} of {name}" draggable=false src="{uri}">'
        for method, uri in pictures.items()
    )
    groups = "".join(
        f'<div role=group aria-label="{side} picture"><span>{side}</span>'
        + "".join(
            f"<button data-side={side} data-show={method} aria-pressed={'true' if method == chosen else 'false'}>"
            f"{html.escape(label)}</button>"
            for method, label in labels.items()
        )
        + "</div>"
        for side, chosen in (("left", left), ("right", right))
    )
    rows = [
        [_label(results, method), *(f"{figures[metric]:.{digits}f}" for metric, (_, digits) in _COLUMNS.items())]
        for method, figures in image["figures"].items()
    ]
    seen = ", trained on" if image.get("trained_on") else ""
    return (
        f"<section><h2>{name}</h2><p>{image['width']} × {image['height']} pixels{seen}</p>"
        f'<div class=compare style="--ratio:{image["width"] / image["height"]:.4f}">{layers}<i></i>'
        f"<b class=left>{html.escape(labels[left])}</b><b class=right>{html.escape(labels[right])}</b>"
        f'<input type=range min=0 max=100 value=50 aria-label="where the left picture of {name} ends">'
        f"</div><div class=sides>{groups}</div>{_html_table(rows)}</section>"
    )


_PAGE = """<!doctype html>
<html lang=en>
<head>
<meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<meta http-equiv=Content-Security-Policy
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<link rel=icon href="data:,">
<title>$title</title>
<style>
:root { color-scheme: light; --ink: #1d2327; --soft: #66717a; --line: #e1e5e8; --accent: #0b6bcb }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; background: #fafbfc; color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
h1 { margin: 0; font-size: 1.7rem; line-height: 1.2; overflow-wrap: anywhere }
h2 { margin: 0; font-size: 1.05rem; overflow-wrap: anywhere }
p { margin: .3rem 0; color: var(--soft); font-size: .9rem }
.verdict { color: var(--ink); font-size: 1.1rem }
.scroll { overflow-x: auto; margin: 1rem 0 0; background: #fff; border: 1px solid var(--line); border-radius: .5rem }
table { width: 100%; border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .45rem .8rem; text-align: right; white-space: nowrap }
tbody tr { border-top: 1px solid var(--line) }
th { font-weight: 600 }
th[scope=row] { position: sticky; left: 0; background: #fff; text-align: left }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .6rem; margin: 1rem 0 }
dl div { padding: .6rem .8rem; background: #fff; border: 1px solid var(--line); border-radius: .5rem }
dt { color: var(--soft); font-size: .8rem }
dd { margin: 0; font-weight: 600; font-variant-numeric: tabular-nums }
section { margin-top: 2.5rem }
.compare { --split: 50%; position: relative; width: min(100%, 80vh * var(--ratio)); aspect-ratio: var(--ratio);
  overflow: hidden; margin: .6rem auto 0; border-radius: .5rem; background: #ddd; cursor: ew-resize;
  touch-action: pan-y; user-select: none }
.compare:has(:focus-visible) { outline: 3px solid var(--accent); outline-offset: 2px }
.compare > * { position: absolute; pointer-events: none }
img { inset: 0; width: 100%; height: 100%; visibility: hidden }
img.left, img.right { visibility: visible }
img.right { z-index: 1; clip-path: inset(0 0 0 var(--split)) }
img.left.right { clip-path: none }
.compare i { z-index: 2; inset: 0 auto 0 calc(var(--split) - 1px); width: 2px;
  background: #fff; box-shadow: 0 0 4px #0008 }
.compare i::after { content: "\\2039\\2002\\203A"; position: absolute; top: 50%; left: 50%; translate: -50% -50%;
  padding: .25rem .55rem; border-radius: 2rem; background: #fff; color: var(--ink); box-shadow: 0 1px 6px #0006;
  font: 700 1.1rem/1.3 system-ui; white-space: nowrap }
.compare b { z-index: 2; top: .6rem; max-width: 45%; padding: .1rem .55rem; border-radius: 1rem;
  background: #000a; color: #fff; font-size: .8rem; font-weight: 500 }
.compare b.left { left: .6rem }
.compare b.right { right: .6rem }
.compare input { inset: 0; width: 100%; opacity: 0 }
.sides { display: flex; flex-wrap: wrap; justify-content: space-between; gap: .5rem; margin-top: .6rem }
.sides div { display: flex; overflow: hidden; border: 1px solid var(--line); border-radius: .5rem }
.sides span { width: 3.2rem; padding: .4rem .6rem; color: var(--soft); font-size: .8rem }
button { padding: .4rem .7rem; border: 0; border-right: 1px solid var(--line); background: #fff; color: var(--ink);
  font: inherit; font-size: .85rem; cursor: pointer }
button:last-child { border: 0 }
button[aria-pressed=true] { background: var(--accent); color: #fff }
button:focus-visible { outline: 3px solid var(--accent); outline-offset: -3px }
@media (max-width: 40rem) {
  .sides div { width: 100% }
  button { flex: 1; padding: .5rem .2rem }
  h1 { font-size: 1.35rem }
  th, td { padding: .4rem .5rem; font-size: .82rem }
}
</style>
</head>
<body>
<h1>$title</h1>
<p>$setting</p>
<p class=verdict>$verdict</p>
$table
$costs
<p>Drag across a picture, or focus it and use the arrow keys; the buttons choose what is on its left and on its right.
An arrow up means more is better. ΔE2000 is a colour difference: about 1 is just visible.</p>
$shown
$sections
<p>$versions</p>
<script>
for (const box of document.querySelectorAll(".compare")) {
  const input = box.querySelector("input");
  const split = value => { input.value = value; box.style.setProperty("--split", value + "%"); };
  const follow = event => {
    const area = box.getBoundingClientRect();
    split(Math.min(100, Math.max(0, 100 * (event.clientX - area.left) / area.width)));
  };
  input.addEventListener("input", () => split(input.value));
  box.addEventListener("pointerdown", event => {
    event.preventDefault();
    box.setPointerCapture(event.pointerId);
    input.focus({preventScroll: true});
    follow(event);
  });
  box.addEventListener("pointermove", event => { if (box.hasPointerCapture(event.pointerId)) follow(event); });
  for (const button of box.nextElementSibling.querySelectorAll("button"))
    button.addEventListener("click", () => {
      const {side, show} = button.dataset;
      for (const image of box.querySelectorAll("img")) image.classList.toggle(side, image.dataset.show === show);
      for (const other of button.parentElement.querySelectorAll("button"))
        other.setAttribute("aria-pressed", other === button);
      box.querySelector("b." + side).textContent = button.textContent;
    });
}
</script>
</body>
</html>
"""
