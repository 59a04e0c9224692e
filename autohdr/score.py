"""The score of a method, of its quality and its cost, and the Pareto front. The reference points are our own choice."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from autohdr.errors import UserError

QUALITY = ("psnr", "ssim", "delta_e2000")
COST = ("parameters", "seconds_per_megapixel", "macs_per_megapixel")


@dataclass(frozen=True)
class Points:
    """What counts 0 and what counts 1. Between them a quality counts in proportion, a cost by its logarithm; beyond, no more."""

    psnr: tuple[float, float] = (15.0, 25.0)
    """PSNR in dB that counts 0, and that counts 1."""
    ssim: tuple[float, float] = (0.80, 0.95)
    """SSIM that counts 0, and that counts 1."""
    delta_e2000: tuple[float, float] = (15.0, 3.0)
    """ΔE2000 that counts 0, and that counts 1."""
    parameters: tuple[float, float] = (1e8, 1e4)
    """Parameters that count 0, and that count 1."""
    seconds_per_megapixel: tuple[float, float] = (100.0, 0.01)
    """Seconds per megapixel that count 0, and that count 1."""
    macs_per_megapixel: tuple[float, float] = (1e13, 1e8)
    """Multiply-accumulates per megapixel that count 0, and that count 1."""
    quality_weight: float = 0.7
    """What quality counts in the score, 0 to 1; cost counts the rest."""

    def __post_init__(self) -> None:
        if not 0 <= self.quality_weight <= 1:
            raise UserError(f"quality_weight must be from 0 to 1, got {self.quality_weight}")
        for name in (field.name for field in fields(self) if field.name != "quality_weight"):
            zero, one = getattr(self, name)
            if zero == one or not math.isfinite(zero - one) or (name in COST and min(zero, one) <= 0):
                kind = "finite numbers above 0" if name in COST else "finite numbers"
                raise UserError(f"{name}: expected two different {kind}, what counts 0 and what counts 1, got {zero:g} {one:g}")

    def quality(self, figures: Mapping[str, float]) -> float:
        """Mean over QUALITY of how far each figure is from what counts 0 to what counts 1."""
        return math.fsum(_share(figures[name], *getattr(self, name)) for name in QUALITY) / len(QUALITY)

    def cost(self, costs: Mapping[str, float]) -> float:
        """The same over COST, on a logarithmic scale: 1 is the cheapest. What costs nothing is cheaper than any."""
        return math.fsum(_share(_log(costs[name]), *map(_log, getattr(self, name))) for name in COST) / len(COST)

    def score(self, quality: float, cost: float) -> float:
        """quality_weight · quality + (1 - quality_weight) · cost."""
        return self.quality_weight * quality + (1 - self.quality_weight) * cost


def pareto_front(methods: Mapping[str, tuple[float, float]]) -> list[str]:
    """The methods of which no other has more of one of two scores and at least as much of the other."""

    def beaten(mine: tuple[float, float]) -> bool:
        return any(other != mine and other[0] >= mine[0] and other[1] >= mine[1] for other in methods.values())

    return [name for name, scores in methods.items() if not beaten(scores)]


def _share(value: float, zero: float, one: float) -> float:
    return min(max((value - zero) / (one - zero), 0.0), 1.0)


def _log(value: float) -> float:
    return math.log(value) if value else -math.inf
