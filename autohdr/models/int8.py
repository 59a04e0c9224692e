"""A Restormer's products in 8 bits: scales of its weights from the weights, of what they are multiplied with from photos."""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autohdr.errors import UserError
from autohdr.kernels.common import as_codes, layer_norm, scale_of_codes
from autohdr.kernels.gdfn.reference import gated
from autohdr.kernels.mdta.reference import hidden
from autohdr.models.network import Network
from autohdr.models.registry import build, check_tensors
from autohdr.models.restormer import Attention, FeedForward, Restormer


def quantized(model: nn.Module, photos: Iterable[Tensor]) -> Network:
    """The model with the 1×1 products of its blocks in 8 bits, in eval mode; all else stays as it is.

    Codes are integers from -127 to 127. Each row of a weight has a scale, and so has each channel of what it is multiplied with:
    the largest magnitude that the channel has in any of the photos becomes 127. An attention's project_out stays in floats: what
    it is multiplied by first is another for each image.

    photos: as the model takes them, (1, 3, H, W) float32.
    Raises UserError unless the model is a Restormer in floats, where there are no photos, and as check_tensors.
    """
    if not isinstance(model, Restormer) or model.config.int8:
        name = model.config.name if isinstance(model, Network) else type(model).__name__
        raise UserError(f"8 bits: expected a Restormer in floats, got {name}{' in 8 bits' * isinstance(model, Restormer)}")
    check_tensors(model, "8 bits")
    largest = _largest(model, photos)
    if not largest:
        raise UserError("8 bits: expected at least one photo to calibrate with, got none")
    state = model.state_dict()

    def to_codes(layer: str, channels: Tensor) -> None:
        weight = state[f"{layer}.weight"] * channels[:, None, None]
        scale = scale_of_codes(weight.abs().amax((1, 2, 3)))
        state[f"{layer}.weight"] = as_codes(weight / scale[:, None, None, None]).to(torch.int8)
        state[f"{layer}.scale"] = scale

    for name, (normal, values) in largest.items():
        attends = name.endswith("attn")
        norm, first, dwconv = ("norm1", "qkv", "qkv_dwconv") if attends else ("norm2", "project_in", "dwconv")
        for key in [key for key in state if key.startswith(f"{name.rpartition('.')[0]}.{norm}.")]:
            state[key] = state[key] / normal
        taps = state[f"{name}.{dwconv}.weight"].clone()
        taps[-len(values) :] /= values[:, None, None, None]
        state[f"{name}.{dwconv}.weight"] = taps
        to_codes(f"{name}.{first}", normal)
        if attends:
            state[f"{name}.v_scale"] = values
        else:
            to_codes(f"{name}.project_out", values)
    made = build(replace(model.config, int8=True, overrides={**model.config.overrides, "int8": True}))
    made.load_state_dict(state)
    made.metadata = model.metadata
    return made.eval()


def made_of(model: nn.Module, original: nn.Module) -> bool:
    """Whether `model` is what `quantized` makes of `original`, by their configurations and a layer that stays as it is."""
    if not (isinstance(model, Restormer) and isinstance(original, Restormer) and model.config.int8):
        return False
    in_floats = {key: value for key, value in model.config.overrides.items() if key != "int8"}
    same = replace(model.config, int8=False, overrides=in_floats) == original.config
    return same and torch.equal(model.patch_embed.weight, original.patch_embed.weight)


def _largest(model: Restormer, photos: Iterable[Tensor]) -> dict[str, tuple[Tensor, ...]]:
    """Of each half of a block, by name, the scales of what becomes codes: of the norm, and of v or of the gate."""
    found: dict[str, tuple[Tensor, ...]] = {}

    def see(name: str, module: Any, inputs: Any) -> None:
        x, norm = inputs
        normal = layer_norm(x, norm.weight, norm.bias, module.eps)
        if isinstance(module, Attention):
            weight, dwconv = (layer.weight.chunk(3)[2] for layer in (module.qkv, module.qkv_dwconv))
            values = hidden(x, norm.weight, norm.bias, weight, dwconv, module.eps)
        else:
            values = gated(F.conv2d(normal, module.project_in.weight), module.dwconv.weight)
        seen = tuple(read.abs().amax((0, 2, 3)) for read in (normal, values))
        found[name] = tuple(map(torch.maximum, seen, found.get(name, seen)))

    halves = {name: module for name, module in model.named_modules() if isinstance(module, Attention | FeedForward)}
    hooks = [module.register_forward_pre_hook(partial(see, name)) for name, module in halves.items()]
    try:
        with torch.inference_mode():
            for photo in photos:
                model(photo)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: tuple(map(scale_of_codes, seen)) for name, seen in found.items()}
