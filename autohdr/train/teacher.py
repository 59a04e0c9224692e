"""Distillation: the network of another checkpoint, whose outputs a run learns beside its targets."""

from pathlib import Path

import torch
from torch import Tensor

from autohdr.errors import UserError
from autohdr.files import sha256
from autohdr.models import load_checkpoint


class Teacher:
    """A network that no step changes. Every process has all of it.

    record: its name, and the SHA-256 of its file, as states and the weights' metadata have them.
    trained_on: digests of the photos that its weights were trained on: what it learnt there, it teaches.

    Source: Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network (2015), with outputs in the place of classes.
    """

    def __init__(self, path: Path, device: torch.device):
        """Raises UserError for a file that is no checkpoint, and for a bridge's: its outputs are sampled in several passes."""
        network = load_checkpoint(path)
        if network.steps is not None:
            raise UserError(f"teacher: expected a model that makes a photo in one pass, got a diffusion bridge: {path}")
        self._network = network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.record = {"name": network.config.name, "sha256": sha256(path)}
        self.trained_on: list[str] = network.metadata.get("trained_on", [])

    @torch.no_grad()
    def __call__(self, source: Tensor) -> Tensor:
        """Its outputs for the sources of a batch, as augmentation made them: (B, 3, H, W)."""
        return self._network(source)
