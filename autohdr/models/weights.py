"""Weights in files: our own, the original project's, the Restormer authors', and what the field's trainers write.

Every file goes the same way: read (weight_files: bytes to mappings), unwrap (which mapping and which prefix holds the network),
match (the model's names, shapes and kinds of numbers), copy.
"""

import json
import logging
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from autohdr.edits import SHIPPED
from autohdr.errors import UserError
from autohdr.files import replacing
from autohdr.models.diffusion import STEPS, Bridge, Sampler
from autohdr.models.network import Network
from autohdr.models.registry import CONFIGS, FAMILIES, create_model
from autohdr.models.weight_files import FLOATS, HEADER, WeightFile, oddity, read, some

log = logging.getLogger(__name__)

WRAPPERS = re.compile(
    r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module|_forward_module)\."
)
"""What DistributedDataParallel, torch.compile, FSDP, checkpoint wrappers and Fabric put into names, before or between modules."""

COUNTERS = re.compile(r"(?<![^.])(?:n_averaged|total_ops|total_params)$")
"""Scalars beside the weights: of torch's AveragedModel, and of thop at every module."""

OFFICIAL = (
    (re.compile(r"(?<![^.])patch_embed\.proj\."), "patch_embed."),
    (re.compile(r"(?<![^.])((?:en|de)coder_level[123]|latent|refinement)\.(\d+)\."), r"\1.blocks.\2."),
    (re.compile(r"\.norm([12])\.body\."), r".norm\1."),
)
"""From the names in the authors' models (and in deepinv's copies of them) to ours."""

AVERAGED = re.compile(r"(?<![a-z])(?:ema|swa|avg|averaged?|shadow)(?![a-z])", re.IGNORECASE)
"""Places of averaged weights: params_ema, state_dict_ema, ema_model, ..."""

LIVE = re.compile(r"(?<![a-z])(?:online|current)(?![a-z])", re.IGNORECASE)
"""Places of the weights that were averaged, where the averaged ones have the plain name: Lightning, ema-pytorch."""


@dataclass
class LoadReport:
    """What load_weights did: names of tensors, as the model calls them."""

    model: str
    path: Path
    place: str = ""
    """Where in the file the weights were, such as `params_ema` or `state_dict.model`; empty: at the top."""
    loaded: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    """In both, with different shapes or kinds of numbers."""
    missing: list[str] = field(default_factory=list)
    """In the model alone: these keep the values they had."""
    unexpected: list[str] = field(default_factory=list)
    """In the file alone."""
    left_out: list[str] = field(default_factory=list)
    """Places and tensors beside the weights that were taken: other copies of them, other networks."""
    faults: dict[str, str] = field(default_factory=dict)
    """Of each mismatched tensor, what was expected and what the file has."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """What else the file says, as load_checkpoint's model has it."""

    def __str__(self) -> str:
        total = len(self.loaded) + len(self.mismatched) + len(self.unexpected)
        place = f", {self.place}" if self.place else ""
        lines = [f"{self.model}: loaded {len(self.loaded)} of {total} tensors from {self.path}{place}"]
        for kind in ("mismatched", "missing", "unexpected", "left_out"):
            if names := getattr(self, kind):
                shown = [f"{name} ({self.faults[name]})" if kind == "mismatched" else name for name in names[:3]]
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                lines.append(f"  {len(names)} {kind.replace('_', ' ')}: {', '.join(shown)}{more}")
        if any(_is_norm_bias(name) and name.removesuffix("bias") + "weight" in self.loaded for name in self.missing):
            lines.append("  the file's layer norms have no bias and leave the mean in; this model's do not: train on")
        return "\n".join(lines)


@dataclass
class _Weights:
    """A place in a file, and what it holds: tensors by our names, and other values in the place of tensors."""

    place: str
    values: dict[str, Any]
    votes: int
    """How many of the wanted names are among them."""
    rank: int
    """0: averaged; 1: plain; 2: of a run whose averaged weights have the plain name."""
    beside: list[str]
    """Names in the same mapping that are not among them."""


def save_weights(path: str | Path, model: Network, metadata: dict[str, Any], weights: Mapping[str, Tensor] | None = None) -> None:
    """Writes the model, its configuration and `metadata` (anything JSON can hold) as safetensors.

    weights: a state dict to write in the place of the model's own.
    The file appears complete or not at all: a reader never sees half of it, and a crash leaves an older one whole.
    """
    header = {"model": model.config.name, "overrides": model.config.overrides, "metadata": metadata}
    tensors = {WRAPPERS.sub("", k): v.detach().contiguous() for k, v in (weights or model.state_dict()).items()}
    with replacing(path) as part:
        part.write_bytes(safetensors.torch.save(tensors, {HEADER: json.dumps(header)}))


def load_checkpoint(path: str | Path = SHIPPED) -> Network:
    """Builds the model a file was saved from, by default the `lite` that ships with the package, with its
    weights, on the CPU, in eval mode; a bridge's network within a Sampler.

    Reads what save_weights wrote and every layout that load_weights reads, by the same rule where a file holds several copies
    of the weights; where the file doesn't say which model it holds, the tensors' names and shapes do. The model is float32,
    whatever the file is in. What else the file says (epoch, metrics: numbers and texts) is in the model's `metadata`.
    Raises UserError where the file can't be read safely, or its tensors are not those of one whole model, or not finite.
    """
    file = read(Path(path))
    name, overrides = (file.model, file.overrides) if file.model else _infer(file)
    with torch.device("meta"):  # costs neither memory nor time, should the tensors not fit
        frame = _create(file.path, name, overrides)
    report, tensors = _match(frame, file)
    if report.mismatched or report.missing or report.unexpected:
        raise UserError(f"{path}: its tensors do not make a whole model\n{report}")
    model = _create(file.path, name, overrides)
    model.load_state_dict(tensors)
    log.info("%s", report)
    if file.model and (bridge := file.metadata.get("bridge")):
        model = _sampler(model, path, bridge)
    model.metadata = file.metadata
    return model.eval()


def load_weights(model: Network, path: str | Path) -> LoadReport:
    """Copies every tensor of a file that fits into the model, prints a summary and returns the report.

    Reads safetensors and PyTorch files, of ours, of the Restormer authors and of other trainers. The state dict may be plain or
    nested (`params`, `state_dict`, `model`, ... under any names), may have one prefix before all names (`model.`, `net_g.`, ...),
    and anywhere in them what DDP, FSDP, torch.compile and checkpoint wrappers add; other networks beside it are left out.

    Where a file holds several copies of the weights, the averaged ones are loaded: those under a name with `ema`, `swa`, `avg`,
    `average(d)` or `shadow` in it, and torch's AveragedModel. `online...` and `current...` are only loaded for want of others.
    Several different copies of the same rank are refused. The report says what was loaded (`place`) and what not (`left_out`).

    Tensors are float16, bfloat16, float32 or float64 and take the model's dtype; a shape may differ by axes of length 1.
    Raises UserError, and leaves the model as it was, if the file can't be read safely, if nothing fits, if a tensor that fits
    holds NaN or infinity, if the file's layer norms have a bias and the model's have none, or if only one of them is in 8 bits.
    """
    names = {WRAPPERS.sub("", name): name for name in model.state_dict()}
    report, tensors = _match(model, read(Path(path)))
    coded = _in_8_bits([*report.loaded, *report.mismatched, *report.unexpected])
    if coded != _in_8_bits(names):  # norms and 3×3 weights differ too, which no shape tells
        own = "holds products in 8 bits, for inference: expected the checkpoint that it was made of"
        raise UserError(f"{path}: {own if coded else 'expected products in 8 bits, as the model has them, got floats'}")
    model.load_state_dict({names[name]: tensor for name, tensor in tensors.items()}, strict=False)
    print(report)
    return report


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What a file that load_weights reads says beside its tensors, such as `trained_on`. Raises UserError for another file."""
    return read(Path(path)).metadata


def read_tensors(path: str | Path, names: Collection[str]) -> dict[str, Tensor]:
    """The tensors called `names` that a file has, on the CPU, found as load_weights finds a model's.

    Raises UserError where the file can't be read, or holds several different networks with these names.
    """
    weights = _find(read(Path(path)), names)
    return {name: value for name, value in weights.values.items() if name in names and isinstance(value, Tensor)}


# Unwrapping: which mapping, which prefix


def _find(file: WeightFile, names: Collection[str]) -> _Weights:
    """The weights that names belong to, by load_weights' rule. Raises UserError where two places have the same right to be it."""
    found = _candidates(file, names)
    most = max((weights.votes for weights in found), default=0)
    if most == 0:
        place, mapping = max(file.mappings, key=lambda item: len(item[1]))
        return _Weights(place, {n: v for n, v in _rename(file.path, mapping).items() if isinstance(v, Tensor)}, 0, 1, [])
    # A name by chance, or a part of the network elsewhere, is no candidate.
    found = sorted((weights for weights in found if 2 * weights.votes >= most), key=lambda weights: weights.rank)
    best, *others = found
    if rivals := [w.place or "the top" for w in others if w.rank == best.rank and not _same(w.values, best.values)]:
        places = ", ".join([best.place or "the top", *rivals])
        raise UserError(f"{file.path}: holds several networks that fit, at {places}; expected one: save it alone")
    beside = [name for name in best.beside if not any(name.startswith(f"{w.place}.") for w in others)]
    best.beside = [w.place or "the top" for w in others] + beside
    return best


def _candidates(file: WeightFile, names: Collection[str]) -> list[_Weights]:
    """Every place in a file that holds any of the names."""
    return [weights for place, mapping in file.mappings for weights in _unwrap(file.path, place, mapping, names)]


def _unwrap(path: Path, place: str, mapping: Mapping[str, Any], names: Collection[str]) -> Iterator[_Weights]:
    """For each prefix under which a mapping holds any of the names: what it holds there."""
    values = _rename(path, mapping)
    votes: Counter[str] = Counter()
    for name in values:
        parts = name.split(".")
        votes.update(".".join([*parts[:i], ""]) for i in range(len(parts)) if ".".join(parts[i:]) in names)
    for prefix, count in votes.items():
        whole = ".".join(part for part in (place, prefix.rstrip(".")) if part)
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", whole)  # modelEMA is model_EMA
        rank = 2 if LIVE.search(words) else 0 if AVERAGED.search(words) or "n_averaged" in mapping else 1
        inside = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
        inside = {name: value for name, value in inside.items() if isinstance(value, Tensor) or name in names}
        beside = [f"{place}.{name}" if place else name for name in values if not name.startswith(prefix)]
        yield _Weights(whole, inside, count, rank, beside)


def _rename(path: Path, mapping: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping without counters and wrappers, by our names."""
    renamed: dict[str, Any] = {}
    for name, value in mapping.items():
        if COUNTERS.search(name):
            continue
        name = WRAPPERS.sub("", name)
        for pattern, ours in OFFICIAL:
            name = pattern.sub(ours, name)
        if name in renamed and not _same({name: renamed[name]}, {name: value}):
            raise UserError(f"{path}: holds {name} twice, with different values")
        renamed[name] = value
    return renamed


def _same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    if a.keys() != b.keys():
        return False
    pairs = [(value, b[name]) for name, value in a.items()]
    return all(x is y or (not oddity(x) and not oddity(y) and torch.equal(x, y)) for x, y in pairs)


# Matching: names, shapes, kinds of numbers


def _match(model: Network, file: WeightFile) -> tuple[LoadReport, dict[str, Tensor]]:
    """What of the file fits into the model, by the model's names without wrappers, and the report."""
    own = {WRAPPERS.sub("", name): tensor for name, tensor in model.state_dict().items()}
    weights = _find(file, own)
    report = LoadReport(model.config.name, file.path, weights.place, left_out=weights.beside, metadata=file.metadata)
    report.missing = [name for name in own if name not in weights.values]
    fitting: dict[str, Tensor] = {}
    for name, value in weights.values.items():
        if name.rpartition(".")[2] in model.derived:
            report.left_out.append(name)
        elif name not in own:
            report.unexpected.append(name)
        elif fault := _fault(value, own[name]):
            report.mismatched.append(name)
            report.faults[name] = fault
        else:
            fitting[name] = value.reshape(own[name].shape).to(own[name].dtype)
    report.loaded = list(fitting)
    if not fitting:
        raise UserError(f"{file.path}: no tensor fits {report.model}\n{report}")
    if any(_is_norm_bias(name) and name.removesuffix("bias") + "weight" in own for name in report.unexpected):
        raise UserError(
            f"{file.path}: its layer norms have a bias, this model's have none; "
            f"create the model with create_model({report.model!r}, norm_bias=True)"
        )
    if bad := [name for name, tensor in fitting.items() if not tensor.isfinite().all()]:
        kinds = ", ".join(sorted({str(own[name].dtype) for name in bad}))
        raise UserError(f"{file.path}: holds NaN or values beyond {kinds} in {len(bad)} tensors: {some(bad)}")
    return report, fitting


def _fault(value: Any, own: Tensor) -> str:
    """Why a value can't take the place of a model's tensor: what was expected, what came. Empty where it can."""
    expected, came = f"{list(own.shape)} of {own.dtype}", oddity(value)
    if not came:
        came = f"{list(value.shape)} of {value.dtype}"
        fits = [n for n in value.shape if n != 1] == [n for n in own.shape if n != 1]
        if own.dtype.is_floating_point:
            fits = fits and value.dtype in FLOATS
        elif value.dtype in FLOATS:  # a trainer that casts everything casts an index too
            fits = fits and torch.equal(value, value.round())
        if fits:
            return ""
    return f"expected {expected}, got {came}"


def _is_norm_bias(name: str) -> bool:
    return name.endswith((".norm1.bias", ".norm2.bias"))


def _in_8_bits(names: Collection[str]) -> bool:
    return any(name.endswith(".ffn.project_in.scale") for name in names)


# Building: which model


def _create(path: Path, name: str, overrides: dict[str, Any]) -> Network:
    try:
        return create_model(name, **overrides)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (RuntimeError, TypeError, OverflowError, MemoryError) as error:
        raise UserError(f"{path}: {name} with {overrides or 'its own settings'} cannot be built or is too large") from error


def _sampler(network: Network, path: str | Path, bridge: Any) -> Sampler:
    try:
        steps = bridge["steps"]
        sampler = Sampler(network, Bridge(prediction=bridge["prediction"], noise_scale=bridge["noise_scale"]), steps)
        right = isinstance(steps, int) and 1 <= steps <= STEPS
    except (LookupError, TypeError, ValueError):
        right = False
    if not right:
        expected = f"expected prediction (x0, v or noise), noise_scale (above 0) and steps (1 to {STEPS})"
        raise UserError(f"{path}: its header's bridge is damaged: {expected}, got {bridge!r}")
    return sampler


def _infer(file: WeightFile) -> tuple[str, dict[str, Any]]:
    """The registered model that is nearest to a file's tensors, and the overrides that make it fit."""
    votes = {name: max((weights.votes for weights in _candidates(file, _names(name))), default=0) for name in FAMILIES}
    name = max(votes, key=votes.__getitem__)
    family, weights = FAMILIES[name], _find(file, _names(name))  # of the others a few names may be in several places
    if not weights.votes:
        kinds = " or ".join(family.__name__ for family in FAMILIES.values())
        expected = " or ".join(repr(next(n for n in _names(name) if n.endswith(".weight"))) for name in FAMILIES)
        raise UserError(f"{file.path}: holds no {kinds}: expected a tensor {expected}, got {some(weights.values)}")
    try:
        settings = family.settings_of(weights.values, partial(_shape, weights.values))
    except UserError as error:
        raise UserError(f"{file.path}: holds no {family.__name__}: {error}") from error
    kept = family.Config.tells_family
    configs = [c for c in CONFIGS.values() if type(c) is family.Config and all(getattr(c, k) == settings[k] for k in kept)]
    overrides = [{k: v for k, v in settings.items() if getattr(config, k) != v} for config in configs]
    return min(zip((c.name for c in configs), overrides, strict=True), key=lambda candidate: len(candidate[1]))


@cache
def _names(model: str) -> dict[str, None]:
    """The names of a registered model's tensors, in order."""
    with torch.device("meta"):
        return dict.fromkeys(create_model(model).state_dict())


def _shape(values: dict[str, Any], name: str) -> list[int]:
    """Raises UserError unless there is a tensor so called."""
    if came := oddity(values[name]) if name in values else "none":
        raise UserError(f"expected a tensor {name!r}, got {came}; there are {some(values)}")
    return list(values[name].shape) or [1]
