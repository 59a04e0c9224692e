"""Someone's own look, from some tens of their pairs: one shift of what the shipped Lite predicts, the same for every photo.

The shift is fitted by least squares on the pixels, linearised and solved a few times (Gauss and Newton), and shrunk towards none:
ridge regression. How much is chosen by leaving out one picture after the other, and so is what the look is said to gain: each
picture is measured by a shift whose fit and whose shrinkage were made without it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from autohdr.data.audit import audit
from autohdr.data.pairs import PairDataset, photo_digests
from autohdr.data.splits import linked_groups
from autohdr.edits import CHANGES, TRUST, Inputs, changed, edited_by, hedged, mean
from autohdr.errors import UserError
from autohdr.metrics import mean_interval
from autohdr.models import load_checkpoint, save_weights
from autohdr.models.lite import Lite

LEAST = 8  # pictures: of fewer no interval says anything
SHRINKAGE = (1, 4, 16, 64)  # the pairs that the shipped weights count for
SOLVED = 2  # times, each where the last one ended
SIDE, FIT_SIDE = 128, 32  # of the pictures that are measured, and fitted to
NEARLY = 1e-3  # an error, squared, that is as good as none
STEP = 0.02  # of the differences that stand for derivatives


@dataclass(frozen=True)
class Adapted:
    """What `adapt` found.

    pairs, pictures: how many there were; pairs that show one picture are left out together.
    shipped, adapted: PSNR in dB, the mean over the pictures, of the shipped weights, and of looks that had not seen the picture.
    gain, interval: mean of the differences, and half width of its 95% interval. An approximation: the looks share most pairs.
    shrinkage: how many pairs the shipped weights count for; None: no look was better than they.
    """

    pairs: int
    pictures: int
    shipped: float
    adapted: float
    gain: float
    interval: float
    shrinkage: int | None

    @property
    def helps(self) -> bool:
        """Whether the gain is above chance."""
        return self.shrinkage is not None and self.gain > self.interval

    def __str__(self) -> str:
        return (
            f"{self.pairs} pairs, {self.pictures} pictures, each measured by a look that has not seen it: "
            f"PSNR {self.shipped:.2f} dB as shipped, {self.adapted:.2f} dB adapted, {self.gain:+.2f} ± {self.interval:.2f}"
        )


def adapt(pairs: str | Path, out: str | Path) -> Adapted:
    """Fits the model that ships to a JSONL file of pairs and, where that helps, writes the weights to `out`.

    The weights have in their metadata the digests of the pairs' photos (`trained_on`) and these figures.
    Raises UserError for pairs that can't be read or are of fewer than LEAST pictures, and where the folder of `out` is not there.
    """
    if not Path(out).absolute().parent.is_dir():
        raise UserError(f"{out}: expected a file in a folder that exists")
    found = audit([Path(pairs)])
    groups = linked_groups(found.pairs, found.same)
    if len(groups) < LEAST:
        raise UserError(f"{pairs}: expected pairs of at least {LEAST} different pictures, got {len(groups)}")
    dataset = PairDataset(found.pairs, SIDE)
    samples = [dataset[index] for index in range(len(dataset))]
    model = load_checkpoint()
    assert isinstance(model, Lite)
    result, shift = fit(model, torch.stack([s["src"] for s in samples]), torch.stack([s["tar"] for s in samples]), groups)
    if result.helps:
        model.shift(shift)
        trained_on = sorted({*model.metadata["trained_on"], *photo_digests(found.pairs).values()})
        save_weights(out, model, {"trained_on": trained_on, "adapted": vars(result)})
    return result


@torch.no_grad()
def fit(model: Lite, sources: Tensor, targets: Tensor, groups: Sequence[Sequence[int]]) -> tuple[Adapted, Tensor]:
    """The figures, and the shift [CHANGES] for Lite.shift.

    sources, targets: [N, 3, SIDE, SIDE] in [0, 1]. groups: the indices of each picture's pairs.
    """
    looks = _Looks(model, sources, targets)
    shipped, adapted = [], []
    for group in groups:
        others = [other for other in groups if other is not group]
        rows = torch.tensor(group)
        shipped.append(float(looks.psnr(rows, torch.zeros(len(group), CHANGES)).mean()))
        shift = looks.solve(others, looks.choose(others))
        adapted.append(float(looks.psnr(rows, shift.expand(len(group), -1)).mean()))
    gain, interval = mean_interval([after - before for before, after in zip(shipped, adapted, strict=True)])
    shrinkage = looks.choose(groups)
    count = len(groups)
    result = Adapted(len(sources), count, sum(shipped) / count, sum(adapted) / count, gain, interval, shrinkage)
    return result, looks.solve(groups, shrinkage)


class _Looks:
    """Fits and measures shifts on pairs, from what does not change: the model's inputs and what its members predict of them."""

    def __init__(self, model: Lite, sources: Tensor, targets: Tensor):
        self.inputs = model.inputs(sources)
        self.share, self.tilts = model.share(self.inputs), model.tilts(self.inputs)
        self.changes = [model.changes(self.inputs, number) for number in range(len(model.members))]
        self.pictures = {side: [F.adaptive_avg_pool2d(x, side) for x in (sources, targets)] for side in (SIDE, FIT_SIDE)}
        every = torch.arange(len(sources))
        shipped = self.differences(every, torch.zeros(len(sources), CHANGES), FIT_SIDE)
        self.weights = 1 / (shipped.square().mean((1, 2, 3)) + NEARLY)
        self.first = self.normal(every, torch.zeros(CHANGES))

    def differences(self, rows: Tensor, shifts: Tensor, side: int) -> Tensor:
        """Target − output [B, 3, side, side] of pairs `rows` [B], each by its own shift [B, CHANGES]."""
        inputs = Inputs(*(part[rows] for part in self.inputs))
        edit = mean([changed(inputs, self.tilts[rows], TRUST, changes[rows] + shifts) for changes in self.changes])
        source, target = self.pictures[side]
        return target[rows] - edited_by(source[rows], hedged(edit, self.share[rows])).clamp(0, 1)

    def psnr(self, rows: Tensor, shifts: Tensor, side: int = SIDE) -> Tensor:
        """[B] dB, at most 60: a difference between two equal pictures is none."""
        return -10 * self.differences(rows, shifts, side).square().mean((1, 2, 3)).clamp(min=1e-6).log10()

    def normal(self, rows: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Each pair's part of the normal equations, linearised at shift: [B, CHANGES, CHANGES] and [B, CHANGES]."""
        shifts = torch.cat([shift[None], shift + STEP * torch.eye(CHANGES)])
        every = self.differences(rows.repeat_interleave(len(shifts)), shifts.repeat(len(rows), 1), FIT_SIDE)
        every = every.reshape(len(rows), len(shifts), -1)
        slopes = (every[:, :1] - every[:, 1:]) / STEP
        scale = (self.weights[rows] / every.shape[2])[:, None, None]
        gram = slopes @ slopes.mT * scale
        return gram, (slopes @ every[:, 0, :, None] * scale + gram @ shift[:, None])[..., 0]

    def solve(self, groups: Sequence[Sequence[int]], shrinkage: int | None) -> Tensor:
        """The shift [CHANGES] for the pairs of groups."""
        shift = torch.zeros(CHANGES)
        if shrinkage is None:
            return shift
        rows = torch.tensor([index for group in groups for index in group])
        for number in range(SOLVED):
            gram, goal = [part[rows] for part in self.first] if number == 0 else self.normal(rows, shift)
            shift = _ridge(gram.sum(0), goal.sum(0), shrinkage / len(rows))
        return shift

    def choose(self, groups: Sequence[Sequence[int]]) -> int | None:
        """The shrinkage by which shifts, solved for once, gain most on the groups that they leave out; None: they lose."""
        rows = torch.tensor([index for group in groups for index in group])
        gram, goal = (part[rows].sum(0) for part in self.first)
        own = [tuple(part[list(group)].sum(0) for part in self.first) for group in groups]
        count = [len(rows) - len(group) for group in groups]
        gains = []
        for shrinkage in SHRINKAGE:
            left = [_ridge(gram - g, goal - h, shrinkage / n) for (g, h), n in zip(own, count, strict=True)]
            shifts = torch.stack([shift for shift, group in zip(left, groups, strict=True) for _ in group])
            gains.append(float((self.psnr(rows, shifts, FIT_SIDE) - self.psnr(rows, 0 * shifts, FIT_SIDE)).mean()))
        best = max(range(len(gains)), key=gains.__getitem__)
        return SHRINKAGE[best] if gains[best] > 0 else None


def _ridge(gram: Tensor, goal: Tensor, share: float) -> Tensor:
    """The solution of gram · x = goal, with a diagonal that is `share` of gram's mean one on top."""
    return torch.linalg.solve(gram + (share * gram.diagonal().mean() + 1e-9) * torch.eye(CHANGES), goal)
