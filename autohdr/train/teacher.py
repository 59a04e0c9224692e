"""Distillation: the network of another checkpoint, whose outputs, and features, a run learns beside its targets."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autohdr.errors import UserError
from autohdr.files import sha256
from autohdr.models import load_checkpoint
from autohdr.models.network import Network, StageEnd, stage_ends


class Teacher:
    """A network that no step changes. Every process has all of it.

    record: its name, and the SHA-256 of its file, as states and the weights' metadata have them.
    trained_on: digests of the photos that its weights were trained on: what it learnt there, it teaches.

    Source: Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network (2015), with outputs in the place of classes;
    features: Romero et al., FitNets: Hints for Thin Deep Nets (2015).
    """

    def __init__(self, path: Path, device: torch.device):
        """Raises UserError for a file that is no checkpoint, and for a bridge's: its outputs are sampled in several passes."""
        network = load_checkpoint(path)
        if network.steps is not None:
            raise UserError(f"teacher: expected a model that makes a photo in one pass, got a diffusion bridge: {path}")
        self._network = network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.record = {"name": network.config.name, "sha256": sha256(path)}
        self.trained_on: list[str] = network.metadata.get("trained_on", [])
        self._hinting: list[nn.Module] = []

    def guided(self, student: Network) -> list[nn.Module]:
        """The student's modules whose outputs can be compared with the features that calls return from now on: those at the end
        of a stage at which both networks' features have one shape. UserError where there is none."""
        own, its = stage_ends(self._network), stage_ends(student)
        found = [(a.module, b.module) for a, b in zip(own, its, strict=False) if a[1:] == b[1:] and a.module and b.module]
        if not found:
            raise UserError(
                "teacher_features_weight: expected a stage at which the teacher's features have the shape of the model's; "
                f"the teacher has {_shapes(own)}, the model {_shapes(its)}"
            )
        self._hinting = [teaching for teaching, _ in found]
        return [learning for _, learning in found]

    @torch.no_grad()
    def __call__(self, source: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Its outputs (B, 3, H, W) for the sources of a batch, as augmentation made them, and its features after guided()."""
        with outputs(self._hinting) as features:
            return self._network(source), features


@contextmanager
def outputs(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """What the modules return within the block, in the order in which they are called."""
    found: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        found.append(output)

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def feature_loss(features: list[Tensor], hints: list[Tensor]) -> Tensor:
    """Mean over stages and samples of the mean |feature - hint|² over the mean |hint|², a scalar in float32.

    features, hints: (B, C, H, W) of each stage; where one network has padded more than the other, what both have counts.
    """
    terms = []
    for feature, hint in zip(features, hints, strict=True):
        height, width = map(min, zip(feature.shape[2:], hint.shape[2:], strict=True))
        feature, hint = (tensor[:, :, :height, :width].float() for tensor in (feature, hint))
        apart, length = (tensor.square().mean((1, 2, 3)) for tensor in (feature - hint, hint))
        terms.append((apart / length.clamp(min=1e-12)).mean())
    return torch.stack(terms).mean()


def _shapes(ends: list[StageEnd]) -> str:
    return ", ".join(f"{channels} channels at 1/{scale}" for _, channels, scale in ends) or "no stages"
