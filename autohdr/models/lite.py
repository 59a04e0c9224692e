"""The network Lite: see autohdr.edits, which has its mathematics, and where it is from.

An encoder of the thumbnail, and a grid of gains as in Gharbi et al., Deep Bilateral Learning for Real-Time Image Enhancement
(SIGGRAPH 2017), were tried: docs/lite.md.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autohdr.edits import CHANGES, FEATURES, Predictor, edited_by
from autohdr.models.network import Network, NetworkConfig, count, is_whole


@dataclass(frozen=True)
class LiteConfig(NetworkConfig):
    """members: networks whose edits are averaged. width: of their hidden layer."""

    members: int = 5
    width: int = 24

    def __post_init__(self) -> None:
        for name in ("members", "width"):
            self.require(name, "a whole number, at least 1", is_whole(getattr(self, name), 1))


class Member(nn.Module):
    """One predictor: features [B, FEATURES] to the changes of an edit [B, CHANGES], none at first."""

    def __init__(self, width: int):
        super().__init__()
        self.hidden, self.edit = nn.Linear(FEATURES, width), nn.Linear(width, CHANGES)
        for parameter in self.edit.parameters():
            nn.init.zeros_(parameter)

    def forward(self, features: Tensor) -> Tensor:
        return self.edit(F.gelu(self.hidden(features)))


class Lite(Predictor, Network):
    """See LiteConfig. Takes uint8 and uint16 images too, a photo's own samples, and gives the same."""

    Config = LiteConfig

    def __init__(self, config: LiteConfig):
        super().__init__(config)
        members = (Member(config.width) for _ in range(config.members))
        self.members = nn.ModuleList(members)  # pyright: ignore[reportAttributeAccessIssue]
        self.tilt = nn.Linear(FEATURES, 1)
        for parameter in self.tilt.parameters():
            nn.init.zeros_(parameter)
        self.register_buffer("centre", torch.zeros(FEATURES))
        self.register_buffer("spread", torch.ones(FEATURES))

    def forward(self, image: Tensor) -> Tensor:
        self.check(image)
        return edited_by(image, self.predict(image).edit)

    @torch.no_grad()
    def shift(self, changes: Tensor) -> None:
        """Adds changes [CHANGES] to what every member predicts of any photo."""
        for member in self.members:
            assert isinstance(member, Member)
            member.edit.bias.add_(changes)

    @classmethod
    def settings_of(cls, names: Collection[str], shape: Callable[[str], list[int]]) -> dict[str, Any]:
        return {"members": count(names, "members."), "width": shape("members.0.hidden.weight")[0]}
