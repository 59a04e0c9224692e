"""How pairs are varied for training, beside being mirrored: what is drawn, and what it does."""

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autohdr.data.colour import decode_srgb, encode_srgb
from autohdr.errors import UserError

SCALE, TURN, LIGHT, MIX = 2, 3, 4, 5
"""Which draws of a pair a generator is for: each has its own, so that one kind changes nothing about another."""

_PIECE = 1 << 15  # at::internal::GRAIN_SIZE


@dataclass(frozen=True)
class Augmentation:
    """What is drawn for each pair; by default nothing is.

    zoom: the sample is cut from its photo at a scale between 1 and this, whose logarithm is uniform.
    rotate: by 0, 90, 180 or 270 degrees. flip: half of the samples upside down.
    exposure_jitter: the source's light times 2**e, e uniform within so many stops up and down.
    white_balance_jitter: the same of red and of blue, each by itself.
    mixup: a share of the sample and the rest of another one, the share from Beta(mixup, mixup); 0: none. Zhang et al., "mixup:
        Beyond empirical risk minimization", 2018.
    """

    zoom: float = 1.0
    rotate: bool = False
    flip: bool = False
    exposure_jitter: float = 0.0
    white_balance_jitter: float = 0.0
    mixup: float = 0.0

    @classmethod
    def of(cls, settings: Any) -> "Augmentation":
        """The values that an object such as a TrainConfig has under these names."""
        return cls(**{item.name: getattr(settings, item.name) for item in fields(cls)})

    def check(self) -> None:
        """Raise UserError naming the first value that is out of range."""
        if not 1 <= self.zoom <= 16:
            raise UserError(f"zoom: expected 1 to 16, got {self.zoom}")
        for name, most in (("exposure_jitter", 8), ("white_balance_jitter", 8), ("mixup", math.inf)):
            if not 0 <= (value := getattr(self, name)) <= most or value == math.inf:
                raise UserError(f"{name}: expected {'at least 0' if most == math.inf else f'0 to {most}'}, got {value}")

    def scale(self, rng: np.random.Generator, most: float) -> float:
        """How many of the photo's pixels, in one direction, become one of the sample's: 1 to zoom, and to `most`."""
        return math.exp(rng.uniform(0, math.log(max(1.0, min(self.zoom, most)))))

    def turn(self, photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(H, W, C) turned and upside down as drawn. Called with an equal generator it does the same to another photo."""
        upside_down, quarters = rng.integers(2), rng.integers(4)
        photo = photo[::-1] if self.flip and upside_down else photo
        return np.rot90(photo, int(quarters)) if self.rotate else photo

    def relight(self, source: Tensor, rng: np.random.Generator) -> Tensor:
        """(3, H, W) in [0, 1] in other light; what gets brighter than white is white."""
        if not (self.exposure_jitter or self.white_balance_jitter):
            return source
        exposure, red, blue = rng.uniform(-1, 1, 3)
        gains = 2 ** (exposure * self.exposure_jitter + np.array((red, 0, blue)) * self.white_balance_jitter)
        planes = []
        for plane, gain in zip(source.flatten(1), gains.tolist(), strict=True):
            # PyTorch gives such a piece to one thread. The threads of a larger one decide which pixels lie at an end that is
            # not vectorised, and so a last bit of those: a worker has one thread, the training process several.
            planes += [encode_srgb(decode_srgb(piece) * gain).clamp_(0, 1) for piece in plane.split(_PIECE)]
        return torch.cat(planes).view_as(source)

    def share(self, rng: np.random.Generator) -> float:
        """How much of a mix is the sample itself."""
        return float(rng.beta(self.mixup, self.mixup))


NONE = Augmentation()
