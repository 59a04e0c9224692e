"""What the networks share: checks of their configurations, and padding to a size that their levels divide."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from autohdr.errors import UserError


def require(config: Any, name: str, expected: str, met: bool) -> None:
    """UserError naming the setting, what was expected and what came, unless met. config has a `name`, its model's."""
    if not met:
        raise UserError(f"{config.name}: {name} must be {expected}, got {getattr(config, name)!r}")


def is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """image (B, C, H, W) reflected at the bottom and the right until both sides are multiples."""
    height, width = image.shape[-2:]
    bottom, right = -height % multiple, -width % multiple
    if not (bottom or right):
        return image
    # Reflection reads `bottom` rows beside the last one; an image too small to have them repeats its edge.
    mode = "reflect" if bottom < height and right < width else "replicate"
    return F.pad(image, (0, right, 0, bottom), mode=mode)
