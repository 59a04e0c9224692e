"""What a network learns: the photo in one pass, or a diffusion bridge's prediction. Also, which weights decay."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autohdr.errors import UserError
from autohdr.models import Bridge, Sampler
from autohdr.models.diffusion import STEPS
from autohdr.models.network import Network
from autohdr.train.config import TrainConfig
from autohdr.train.selection import lr_factors


class Objective:
    """Turns pairs into what the loss compares, and the network into a model that makes photos."""

    def __init__(self, config: TrainConfig, network: Network):
        """Raises UserError for a bridge if the network has no time embedding."""
        self.config, self.bridge = config, None
        if config.objective == "bridge":
            if not getattr(network.config, "time_embedding", False):
                raise UserError(f"objective: a bridge needs a model with a time embedding; {config.model} has none")
            if config.sample_steps > STEPS:
                raise UserError(f"sample_steps: expected at most {STEPS}, got {config.sample_steps}")
            self.bridge = Bridge(config.prediction, config.noise_scale)

    def predict(
        self, network: nn.Module, source: Tensor, target: Tensor, epoch: int, indices: list[int]
    ) -> tuple[Tensor, Tensor]:
        """(the network's output, the output wanted), both (B, 3, H, W), for the pairs `indices` with their source and target.

        A bridge draws t and noise from (seed, epoch, index) alone, as augmentation does: batches, devices and interruptions of
        the run change nothing.
        """
        if self.bridge is None:
            return network(source), target
        draws = [self._draw(epoch, index, target.shape[1:]) for index in indices]
        t, noise = (torch.stack(values).to(target.device) for values in zip(*draws, strict=True))
        x = self.bridge.diffuse(target, source, t, noise).contiguous(memory_format=torch.channels_last)
        return self.bridge.predict(network, x, t), self.bridge.wanted(target, source, t, noise)

    def photographer(self, network: Network) -> Network:
        """The model that maps source photos to edited ones. A bridge samples with a fixed seed."""
        return network if self.bridge is None else Sampler(network, self.bridge, self.config.sample_steps)

    def metadata(self) -> dict[str, Any]:
        """What load_checkpoint needs to build photographer() again; {} where that is the network itself."""
        if self.bridge is None:
            return {}
        settings = {"prediction": self.bridge.prediction, "noise_scale": self.bridge.noise_scale}
        return {"bridge": settings | {"steps": self.config.sample_steps}}

    def _draw(self, epoch: int, index: int, shape: torch.Size) -> tuple[Tensor, Tensor]:
        entropy = np.random.SeedSequence((self.config.seed, epoch, index, 1)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(entropy[0] >> 1))
        return torch.randint(STEPS, (), generator=generator), torch.randn(shape, generator=generator)


def decayed(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices and convolutions, not to scales, shifts and time constants.

    Norms, biases, temperatures, A_log, D, learned scales and Δ's projection have at most one axis longer than 1, whatever their
    shape. A table of relative position biases has more, and does not decay either.
    """
    return sum(side > 1 for side in parameter.shape) > 1 and "relative_position_bias" not in name


def parameter_groups(model: nn.Module, weight_decay: float, lr_groups: Mapping[str, float] | None = None) -> list[dict[str, Any]]:
    """The optimiser's parameter groups, of what is trained: those that decay, those that do not, without an empty one.

    Each has "lr_factor", its share of the learning rate: lr_groups' value of the first pattern that a name matches. Raises
    UserError as lr_factors does.
    """
    factors = lr_factors(model, lr_groups or {})
    named = [
        (decayed(name, parameter), factors[name], parameter) for name, parameter in model.named_parameters() if name in factors
    ]
    return [
        {"params": params, "weight_decay": weight_decay * wanted, "lr_factor": factor}
        for wanted in (True, False)
        for factor in dict.fromkeys(factors.values())
        if (params := [p for decays, f, p in named if (decays, f) == (wanted, factor)])
    ]
