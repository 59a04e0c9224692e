"""What a network is trained to do, in one pass or by a diffusion bridge, and which of its weights decay."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autohdr.errors import UserError
from autohdr.models import Bridge, Sampler
from autohdr.models.diffusion import STEPS
from autohdr.train.config import TrainConfig


class Objective:
    """The training example a pair becomes, and the model that makes photos of the network."""

    def __init__(self, config: TrainConfig, network: nn.Module):
        """Raises UserError where a bridge is wanted of a network without a time embedding."""
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
        """(what the network says, what it should have said) of the pairs `indices`, source and target (B, 3, H, W).

        A bridge's t and noise depend on (seed, epoch, index) alone, as augmentation does: neither on the batch, nor on
        the device, nor on how often the run was interrupted.
        """
        if self.bridge is None:
            return network(source), target
        draws = [self._draw(epoch, index, target.shape[1:]) for index in indices]
        t, noise = (torch.stack(values).to(target.device) for values in zip(*draws, strict=True))
        x = self.bridge.diffuse(target, source, t, noise).contiguous(memory_format=torch.channels_last)
        return self.bridge.predict(network, x, t), self.bridge.wanted(target, source, t, noise)

    def photographer(self, network: nn.Module) -> nn.Module:
        """The model that maps sources to photos; a bridge samples with a fixed seed."""
        return network if self.bridge is None else Sampler(network, self.bridge, self.config.sample_steps)

    def metadata(self) -> dict[str, Any]:
        """What load_checkpoint needs to build photographer() again; {} for the network itself."""
        if self.bridge is None:
            return {}
        settings = {"prediction": self.bridge.prediction, "noise_scale": self.bridge.noise_scale}
        return {"bridge": settings | {"steps": self.config.sample_steps}}

    def _draw(self, epoch: int, index: int, shape: torch.Size) -> tuple[Tensor, Tensor]:
        entropy = np.random.SeedSequence((self.config.seed, epoch, index, 1)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(entropy[0] >> 1))
        return torch.randint(STEPS, (), generator=generator), torch.randn(shape, generator=generator)


def decayed(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices and convolutions, never to what scales, shifts or times.

    Norms, biases, temperatures, A_log, D, learned scales and the projection of Δ have one axis longer than 1, or none, whatever
    shape they are kept in; a bias for each relative position is a table of them.
    """
    return sum(side > 1 for side in parameter.shape) > 1 and "relative_position_bias" not in name


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The optimiser's two groups: what decays, and what does not."""
    named = [(decayed(name, parameter), parameter) for name, parameter in model.named_parameters()]
    groups = [{"params": [p for d, p in named if d is wanted], "weight_decay": weight_decay * wanted} for wanted in (True, False)]
    return [group for group in groups if group["params"]]
