"""Weights in files: our own checkpoints, those of the original project, and the Restormer authors' own models."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from autohdr.errors import UserError
from autohdr.files import replacing
from autohdr.models.diffusion import Bridge, Sampler
from autohdr.models.mamba_diffusion import MambaDiffusionConfig
from autohdr.models.registry import CONFIGS, create_model
from autohdr.models.restormer import RestormerConfig

HEADER = "autohdr"
"""The safetensors header key of our own files; JSON {"model": name, "overrides": {...}, "metadata": {...}}."""

NESTED = ("params", "model_state_dict", "state_dict")
"""Where a training script's file keeps the state dict."""

WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")
"""What DistributedDataParallel and torch.compile put before every name."""

OFFICIAL = (
    (re.compile(r"^patch_embed\.proj\."), "patch_embed."),
    (re.compile(r"^((?:en|de)coder_level[123]|latent|refinement)\.(\d+)\."), r"\1.blocks.\2."),
    (re.compile(r"\.norm([12])\.body\."), r".norm\1."),
)
"""From the names in the authors' models (and in deepinv's copies of them) to ours."""


@dataclass
class LoadReport:
    """What load_weights did: names of tensors, as the model calls them."""

    model: str
    path: Path
    loaded: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    """In both, with different shapes."""
    missing: list[str] = field(default_factory=list)
    """In the model alone: these keep the values they had."""
    unexpected: list[str] = field(default_factory=list)
    """In the file alone."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """What else the file says, as load_checkpoint's model has it."""

    def __str__(self) -> str:
        total = len(self.loaded) + len(self.mismatched) + len(self.unexpected)
        lines = [f"{self.model}: loaded {len(self.loaded)} of {total} tensors from {self.path}"]
        for kind in ("mismatched", "missing", "unexpected"):
            if names := getattr(self, kind):
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                lines.append(f"  {len(names)} {kind}: {', '.join(names[:3])}{more}")
        if any(_is_norm_bias(name) and name.removesuffix("bias") + "weight" in self.loaded for name in self.missing):
            lines.append("  the file's layer norms have no bias and leave the mean in; this model's do not: train on")
        return "\n".join(lines)


@dataclass
class _Checkpoint:
    path: Path
    tensors: dict[str, Tensor]
    """By our names."""
    metadata: dict[str, Any]
    model: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)


def save_weights(
    path: str | Path, model: nn.Module, metadata: dict[str, Any], weights: Mapping[str, Tensor] | None = None
) -> None:
    """Writes the model, its configuration and `metadata` (anything JSON can hold) as safetensors.

    weights: a state dict to write in the place of the model's own.
    The file appears complete or not at all: a reader never sees half of it, and a crash leaves an older one whole.
    """
    header = {"model": model.config.name, "overrides": model.config.overrides, "metadata": metadata}
    tensors = {WRAPPERS.sub("", k): v.detach().contiguous() for k, v in (weights or model.state_dict()).items()}
    with replacing(path) as part:
        part.write_bytes(safetensors.torch.save(tensors, {HEADER: json.dumps(header)}))


def load_checkpoint(path: str | Path) -> nn.Module:
    """Builds the model a file was saved from, with its weights, on the CPU, in eval mode; a bridge's network within a Sampler.

    Reads what save_weights wrote, the original project's `{epoch, model_state_dict, val_loss}`, and every layout that
    load_weights reads; where the file doesn't say which model it holds, the tensors' names and shapes do. What else
    the file says (epoch, metrics) is in the model's `metadata`. Raises UserError for anything else.
    """
    checkpoint = _read(Path(path))
    try:
        if checkpoint.model is None:
            checkpoint.model, checkpoint.overrides = _infer(checkpoint.tensors)
        model = create_model(checkpoint.model, **checkpoint.overrides)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    report = _load(model, checkpoint)
    if report.mismatched or report.missing or report.unexpected:
        raise UserError(f"{path}: its tensors do not make a whole model\n{report}")
    if bridge := checkpoint.metadata.get("bridge"):
        model = _sampler(model, path, bridge)
    model.metadata = checkpoint.metadata
    return model.eval()


def _sampler(network: nn.Module, path: str | Path, bridge: Any) -> Sampler:
    try:
        settings = {"prediction": bridge["prediction"], "noise_scale": bridge["noise_scale"]}
        sampler = Sampler(network, Bridge(**settings), bridge["steps"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: its header's bridge is damaged: {error!r}") from error
    sampler.config = network.config
    return sampler


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What a file that load_weights reads says beside its tensors, such as `trained_on`. Raises UserError as that does."""
    return _read(Path(path)).metadata


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of a file that load_weights can read, on the CPU, by our names. Raises UserError where it can't be read."""
    return _read(Path(path)).tensors


def load_weights(model: nn.Module, path: str | Path) -> LoadReport:
    """Copies every tensor of a file that fits into the model, prints a summary and returns the report.

    Reads safetensors and PyTorch files; a state dict of ours or in the Restormer authors' layout, plain or nested
    under `params`, `state_dict` or `model_state_dict`, with or without `module.` before the names. Raises UserError,
    and leaves the model as it was, if the file can't be read safely, if nothing fits, or if the file's layer norms
    have a bias and the model's have none.
    """
    report = _load(model, _read(Path(path)))
    print(report)
    return report


def _load(model: nn.Module, checkpoint: _Checkpoint) -> LoadReport:
    own, tensors = model.state_dict(), checkpoint.tensors
    report = LoadReport(model.config.name, checkpoint.path, metadata=checkpoint.metadata)
    for name, tensor in tensors.items():
        kind = "unexpected" if name not in own else "loaded" if own[name].shape == tensor.shape else "mismatched"
        getattr(report, kind).append(name)
    report.missing = [name for name in own if name not in tensors]
    if not report.loaded:
        raise UserError(f"{checkpoint.path}: no tensor fits {report.model}\n{report}")
    if any(_is_norm_bias(name) and name.removesuffix("bias") + "weight" in own for name in report.unexpected):
        raise UserError(
            f"{checkpoint.path}: its layer norms have a bias, this model's have none; "
            f"create the model with create_model({report.model!r}, norm_bias=True)"
        )
    model.load_state_dict({name: tensors[name] for name in report.loaded}, strict=False)
    return report


def _is_norm_bias(name: str) -> bool:
    return name.endswith((".norm1.bias", ".norm2.bias"))


def _infer(tensors: dict[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """The registered model that is nearest to a state dict, and the overrides that make it fit."""
    is_mamba = any(name.endswith("ssm_forward.A_log") for name in tensors)
    try:
        family, found = _infer_mamba_diffusion(tensors) if is_mamba else _infer_restormer(tensors)
    except (KeyError, IndexError) as error:
        kind = "MambaDiffusion" if is_mamba else "Restormer"
        raise UserError(f"holds no {kind}: expected a tensor {error}, got {_some(tensors)}") from error
    overrides = [{k: v for k, v in found.items() if getattr(config, k) != v} for config in family]
    return min(zip((c.name for c in family), overrides, strict=True), key=lambda candidate: len(candidate[1]))


def _infer_restormer(tensors: dict[str, Tensor]) -> tuple[list[RestormerConfig], dict[str, Any]]:
    levels = ("encoder_level1", "encoder_level2", "encoder_level3", "latent")
    found = {
        "dim": tensors["patch_embed.weight"].shape[0],
        "num_blocks": tuple(_count_blocks(tensors, level) for level in levels),
        "num_refinement_blocks": _count_blocks(tensors, "refinement"),
        "num_heads": tuple(tensors[f"{level}.blocks.0.attn.temperature"].shape[0] for level in levels),
        "norm_bias": "latent.blocks.0.norm1.bias" in tensors,
    }
    # Which of the two families decides more than shapes (eps), so it is never an override.
    reduces = "reduce_chan_level1.weight" in tensors
    return [c for c in CONFIGS.values() if isinstance(c, RestormerConfig) and c.reduce_level1 == reduces], found


def _infer_mamba_diffusion(tensors: dict[str, Tensor]) -> tuple[list[MambaDiffusionConfig], dict[str, Any]]:
    ssm = "encoder_groups.0.blocks.0.ssm_forward"
    found = {
        "dim": tensors["conv_first.0.weight"].shape[0],
        "num_groups": len({name.split(".")[1] for name in tensors if name.startswith("encoder_groups.")}),
        "num_blocks": len({name.split(".")[3] for name in tensors if name.startswith("encoder_groups.0.blocks.")}),
        "dstate": tensors[f"{ssm}.A_log"].shape[0],
        "conv_size": tensors[f"{ssm}.conv1d.weight"].shape[2],
        "dual_attention": "middle_dat.gamma1" in tensors,
        "time_embedding": "time_proj.weight" in tensors,
    }
    return [c for c in CONFIGS.values() if isinstance(c, MambaDiffusionConfig)], found


def _count_blocks(tensors: dict[str, Tensor], level: str) -> int:
    return len({name.split(".")[2] for name in tensors if name.startswith(f"{level}.blocks.")})


def _read(path: Path) -> _Checkpoint:
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    # safetensors: eight bytes of length, then JSON. PyTorch: a zip archive, or before 1.6 a bare pickle.
    if start[8:] == b"{":
        return _read_safetensors(path)
    if start.startswith((b"PK", b"\x80")):
        return _read_pickle(path)
    raise UserError(f"{path}: is no checkpoint: expected safetensors or a PyTorch file")


def _read_safetensors(path: Path) -> _Checkpoint:
    try:
        with safetensors.safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            header = (file.metadata() or {}).get(HEADER)
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: is damaged or truncated: {error}") from error
    if header is None:
        return _Checkpoint(path, _rename(tensors), {})
    try:
        header = json.loads(header)
        model, overrides, metadata = str(header["model"]), dict(header["overrides"]), dict(header["metadata"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: its {HEADER!r} header is damaged: {error!r}") from error
    return _Checkpoint(path, tensors, metadata, model, overrides)


def _read_pickle(path: Path) -> _Checkpoint:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can fail in any way
        reason = f"is damaged, truncated or no PyTorch checkpoint ({type(error).__name__})"
        if unsafe := re.search(r"GLOBAL (\S+)", str(error)):
            reason = f"needs {unsafe[1]}, which is neither a tensor nor plain data; loading it could run foreign code"
        raise UserError(f"{path}: {reason}") from error
    state, metadata = content, {}
    while isinstance(state, Mapping) and (nested := next((k for k in NESTED if k in state), None)):
        metadata |= {k: v for k, v in state.items() if k != nested}
        state = state[nested]
    named = state.items() if isinstance(state, Mapping) else ()
    tensors = {name: value for name, value in named if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        got = type(state).__name__ if not isinstance(state, Mapping) else _some(state) or "nothing"
        raise UserError(f"{path}: expected a state dict, plain or under {', '.join(NESTED)}, got {got}")
    return _Checkpoint(path, _rename(tensors), _plain(metadata))


def _rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in tensors.items():
        name = WRAPPERS.sub("", name)
        for pattern, ours in OFFICIAL:
            name = pattern.sub(ours, name)
        renamed[name] = tensor
    return renamed


def _plain(metadata: dict[str, Any]) -> dict[str, Any]:
    """What of a training state JSON can hold; an optimiser's tensors are no metadata."""
    scalars = {k: v.item() if isinstance(v, Tensor) and v.numel() == 1 else v for k, v in metadata.items()}
    return {k: v for k, v in scalars.items() if isinstance(v, str | int | float | None)}


def _some(names: Mapping[Any, Any]) -> str:
    return ", ".join(str(name) for name in list(names)[:3]) + (", ..." if len(names) > 3 else "")
