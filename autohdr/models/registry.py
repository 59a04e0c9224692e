"""The models by name."""

from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn

from autohdr.errors import UserError
from autohdr.models.diffusion import Sampler
from autohdr.models.lite import Lite, LiteConfig
from autohdr.models.mamba_diffusion import MambaDiffusion, MambaDiffusionConfig
from autohdr.models.nafnet import NAFNet, NAFNetConfig
from autohdr.models.network import Network, NetworkConfig
from autohdr.models.restormer import Restormer, RestormerConfig
from autohdr.models.swinir import SwinIR, SwinIRConfig

FAMILIES: dict[str, type[Network]] = {
    "restormer_nano": Restormer,
    "nafnet_nano": NAFNet,
    "swinir_nano": SwinIR,
    "mamba_diffusion_nano": MambaDiffusion,
    "lite": Lite,
}
"""By the smallest model of each."""

CONFIGS: dict[str, NetworkConfig] = {
    config.name: config
    for config in (
        LiteConfig("lite"),
        RestormerConfig("restormer_nano", 12, (1, 1, 1, 1), 1),
        RestormerConfig("restormer_tiny", 24, (2, 3, 3, 4), 2),
        RestormerConfig("restormer_small", 32, (3, 4, 4, 6), 3),
        RestormerConfig("restormer_base", 48, (4, 6, 6, 8), 4),
        RestormerConfig("restormer_large", 64, (6, 8, 8, 12), 6),
        RestormerConfig("restormer_official", 48, (4, 6, 6, 8), 4, norm_bias=False, eps=1e-5, reduce_level1=False),
        NAFNetConfig("nafnet_nano", 16, (1, 1, 1), 2, (1, 1, 1)),
        NAFNetConfig("nafnet_32", 32, (2, 2, 4, 8), 12, (2, 2, 2, 2)),
        NAFNetConfig("nafnet_64", 64, (2, 2, 4, 8), 12, (2, 2, 2, 2)),
        SwinIRConfig("swinir_nano", 12, (2, 2), (2, 2)),
        SwinIRConfig("swinir_light", 60, (6,) * 4, (6,) * 4),
        SwinIRConfig("swinir", 180, (6,) * 6, (6,) * 6),
        MambaDiffusionConfig("mamba_small", 48, 3, 4, dstate=8, conv_size=3, dual_attention=False),
        MambaDiffusionConfig("mamba_base", 64, 4, 6),
        MambaDiffusionConfig("mamba_large", 96, 4, 8),
        MambaDiffusionConfig("mamba_diffusion_nano", 16, 3, 1, dstate=8, conv_size=3, time_embedding=True),
        MambaDiffusionConfig("mamba_diffusion_base", 64, 4, 6, time_embedding=True),
        MambaDiffusionConfig("mamba_diffusion_large", 96, 4, 8, time_embedding=True),
    )
}


def list_models() -> list[str]:
    """The names create_model takes, sorted."""
    return sorted(CONFIGS)


def create_model(name: str, **overrides: Any) -> Network:
    """Builds a model with fresh weights. `overrides` replace single fields of its configuration, e.g. norm_bias=False.

    The model's `config` holds every field, and the name and overrides it was made from.
    Raises UserError for an unknown name, an unknown override, and an override's impossible value.
    """
    if name not in CONFIGS:
        raise UserError(f"no model is called {name!r}; there are {', '.join(list_models())}")
    config = CONFIGS[name]
    known = {f.name for f in fields(config)} - {"name", "overrides"}
    if unknown := sorted(set(overrides) - known):
        raise UserError(f"{name} has no setting {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    # A configuration file's or a checkpoint header's tuples arrive as lists.
    overrides = {k: tuple(v) if isinstance(v, list) else v for k, v in overrides.items()}
    return build(replace(config, **overrides, overrides=overrides))


def build(config: NetworkConfig) -> Network:
    """A network of this configuration, with fresh weights."""
    (family,) = (family for family in FAMILIES.values() if family.Config is type(config))
    return family(config)


def check_tensors(network: Network, what: str) -> None:
    """UserError, which says for what, unless the network's tensors have the names that its configuration gives them.

    Adapters and parametrisations have others until they are merged into the weights: who goes by names would miss what they do.
    """
    plain: nn.Module = network.network if isinstance(network, Sampler) else network
    with torch.device("meta"):
        expected = build(network.config).state_dict().keys()
    if others := plain.state_dict().keys() ^ expected:
        unlike = next((name for name in plain.state_dict() if name in others), min(others))
        raise UserError(
            f"{what}: expected the tensors of {network.config.name}, {'got' if unlike not in expected else 'without'} {unlike}: "
            "merge adapters and parametrisations into the weights first: docs/fine_tuning.md"
        )
