"""Lite: predicts an edit, curves and a colour matrix, from statistics of a thumbnail, and applies it at full size.

What it predicts are changes to the fixed recipe autotone.pinning, whose result it sees beside the thumbnail: an untrained network
is that recipe. Several small networks' edits are averaged. An encoder of the thumbnail, and a grid of gains as in Gharbi et al.,
Deep Bilateral Learning for Real-Time Image Enhancement (SIGGRAPH 2017), were tried: docs/lite.md.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autohdr import kernels
from autohdr.autotone import KNOTS, luma, pinning, thumbnail
from autohdr.kernels.apply_edit.reference import LUMA, apply_edit
from autohdr.models.network import Network, NetworkConfig, count, is_whole

SHARES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
FEATURES = len(SHARES) * 4 + 3 + 3
BENDS, TINTS = 9, 4  # points at which the slope of all curves and of each curve changes
CHANGES = BENDS + 3 * TINTS + 1 + 9  # of them, of the curves' start, and of the matrix
LARGEST = 1.5  # change of a slope, as a logarithm
FARTHEST = 2.5  # standard deviations from what it was fitted to, beyond which a feature counts as no farther
SURE, LOST = 5.0, 10.0
"""Up to the first distance from what it was fitted to, a photo gets all of its edit, from the second on nothing: twice and four
times as far as the farthest of 300 photographs of 60 rooms held out. See Lite.distances."""
SHARED, MOST_SHARED = 0.7, 0.05
"""How far what a photo's walls become goes towards its property's, as a part of the way, and in luma and in log(channel / luma)
at most."""
TRUST = 0.6  # how much of the predicted changes is made: photos are not the rooms that they were learnt from


class Edit(NamedTuple):
    """What apply_edit takes beside the image."""

    curves: Tensor
    matrix: Tensor


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


class Inputs(NamedTuple):
    """What is seen of a batch of images: the features, for the members, and the recipe's edit, which they change."""

    curves: Tensor
    matrix: Tensor
    features: Tensor
    needed: Tensor
    """How much of an edit: autotone.unfinished."""
    walls: Tensor
    """autotone.wall_colour."""


class Prediction(NamedTuple):
    """Of a batch of images."""

    edit: Edit
    """Of which `share` is made."""
    share: Tensor
    """[B] in [0, 1]: 1 for a photo like those that it was fitted to, and for a finished one, which has no edit; see SURE."""
    distances: Tensor
    """Lite.distances."""
    needed: Tensor
    """[B]: autotone.unfinished."""
    walls: Tensor
    """[B, 3]: autotone.wall_colour."""


class Lite(Network):
    """See LiteConfig. Takes uint8 and uint16 images too, a photo's own samples, and gives the same."""

    Config = LiteConfig
    takes_samples = True
    centre: Tensor  # of the features that it was fitted to, and their standard deviation
    spread: Tensor

    def __init__(self, config: LiteConfig):
        super().__init__(config)
        self.members = nn.ModuleList(Member(config.width) for _ in range(config.members))
        self.register_buffer("centre", torch.zeros(FEATURES))
        self.register_buffer("spread", torch.ones(FEATURES))

    def forward(self, image: Tensor) -> Tensor:
        self.check(image)
        return kernels.apply_edit(image, *self.predict(image).edit)

    def predict(self, image: Tensor) -> Prediction:
        """The edit of each image of a batch [B, 3, H, W], in float32: TRUST of the way from the recipe to the members' mean, and
        less of both, the farther the image is from what the members were fitted to."""
        with torch.autocast(image.device.type, enabled=False):
            inputs = self.inputs(image)
            edit = mean([self.edit(inputs, number, TRUST) for number in range(len(self.members))])
            share = self.share(inputs)
            return Prediction(hedged(edit, share), share, self.distances(inputs), inputs.needed, inputs.walls)

    def distances(self, inputs: Inputs) -> Tensor:
        """[B, 2]: how far the features of light and of colour are from what it was fitted to: their root mean square, in standard
        deviations."""
        squares = ((inputs.features - self.centre) / self.spread).square()
        light = squares.new_zeros(FEATURES, dtype=torch.bool)
        light[: 2 * len(SHARES)] = light[-3:-1] = True
        return torch.stack([squares[:, light].mean(1), squares[:, ~light].mean(1)], 1).sqrt()

    def share(self, inputs: Inputs) -> Tensor:
        """See Prediction."""
        share = ((LOST - self.distances(inputs).amax(1)) / (LOST - SURE)).clamp(0, 1)
        return torch.where(inputs.needed > 0, share, 1)

    @staticmethod
    def inputs(image: Tensor) -> Inputs:
        small = thumbnail(image)
        curves, matrix, walls, needed = pinning(small)
        base = kernels.apply_edit(small, curves, matrix)
        return Inputs(curves, matrix, statistics(small, base, walls), needed, walls)

    def edit(self, inputs: Inputs, number: int, trust: float = 1.0) -> Edit:
        """A member's."""
        return changed(inputs.curves, inputs.matrix, trust * inputs.needed, self.changes(inputs, number))

    def changes(self, inputs: Inputs, number: int) -> Tensor:
        """What a member predicts, [B, CHANGES]: see changed."""
        features = ((inputs.features - self.centre) / self.spread).clamp(-FARTHEST, FARTHEST)
        return self.members[number](features)

    @torch.no_grad()
    def shift(self, changes: Tensor) -> None:
        """Adds changes [CHANGES] to what every member predicts of any photo."""
        for member in self.members:
            assert isinstance(member, Member)
            member.edit.bias.add_(changes)

    @classmethod
    def settings_of(cls, names: Collection[str], shape: Callable[[str], list[int]]) -> dict[str, Any]:
        return {"members": count(names, "members."), "width": shape("members.0.hidden.weight")[0]}


def changed(curves: Tensor, matrix: Tensor, part: Tensor, changes: Tensor) -> Edit:
    """The recipe's edit and `part` [B] of its changes: slopes of the curves times a power of e, which keeps them rising; a matrix
    that leaves grey grey."""
    part = part[:, None, None]
    bends, tints, lift, mixed = changes.split([BENDS, 3 * TINTS, 1, 9], 1)
    slopes = F.interpolate(bends[:, None], KNOTS - 1, mode="linear", align_corners=True)
    slopes = slopes + F.interpolate(tints.view(-1, 3, TINTS), KNOTS - 1, mode="linear", align_corners=True)
    steps = curves.diff(dim=2) * (LARGEST * torch.tanh(slopes / LARGEST)).exp()
    start = curves[..., :1] + 0.1 * torch.tanh(lift)[:, None]
    steps = steps * (curves[..., -1:] - start) / steps.sum(2, keepdim=True)  # white stays as white as the recipe has it
    curves = curves + part * (torch.cat([start, start + steps.cumsum(2)], 2) - curves)
    mixed = 0.2 * part * mixed.view(-1, 3, 3)
    return Edit(curves, torch.cat([matrix[..., :3] + mixed - torch.diag_embed(mixed.sum(2)), matrix[..., 3:]], 2))


def hedged(edit: Edit, share: Tensor) -> Edit:
    """`share` [B] of an edit: the way from none, to the same bits where it is 1."""
    share = share[:, None, None]
    knots = torch.linspace(0, 1, edit.curves.shape[2], device=share.device)
    unmixed = torch.eye(3, 4, device=share.device)
    return Edit(knots.lerp(edit.curves, share), unmixed.lerp(edit.matrix, share))


def of_property(predictions: Sequence[Prediction]) -> Tensor | None:
    """The colour that the walls of a property become, [3] in sRGB, of predictions of one photo each: medians of luma and of
    channel / luma of what they become by their own edits, over the photos that get at least half of one; None unless there are
    two. In whole 255ths, in which machines' rounding does not show."""
    edited = [edited_walls(each)[1] for each in predictions if each.share * each.needed >= 0.5]
    if len(edited) < 2:
        return None
    colours = torch.cat(edited)
    light = luma(colours)
    return (light.quantile(0.5) * (colours / light[:, None]).quantile(0.5, 0) * 255).round() / 255


def shared(prediction: Prediction, look: Tensor) -> Edit:
    """The edit with which the photo's walls come SHARED of the way nearer to what those of its property become, less where that
    is beyond MOST_SHARED or less of an edit is made. Each curve is scaled below the walls, and above them so that white stays."""
    edit, part = prediction.edit, SHARED * prediction.share * prediction.needed
    with torch.autocast(edit.curves.device.type, enabled=False):
        toned, own = edited_walls(prediction)
        light, its = luma(own), luma(look[None])
        tint = (own / light[:, None]).log()
        lighter = (part * (its - light)).clamp(-MOST_SHARED, MOST_SHARED)
        redder = (part[:, None] * ((look / its).log() - tint)).clamp(-MOST_SHARED, MOST_SHARED)
        wanted = (light + lighter)[:, None] * (tint + redder).exp()
        mixed = torch.linalg.solve(edit.matrix[..., :3], wanted - edit.matrix[..., 3])
        before, after = (walls.clamp(0.02, 0.98)[..., None] for walls in (toned, mixed))
        above = 1 - (1 - edit.curves) * ((1 - after) / (1 - before))
        return edit._replace(curves=torch.where(edit.curves < before, edit.curves * (after / before), above))


def edited_walls(prediction: Prediction) -> tuple[Tensor, Tensor]:
    """The colour of the walls, [B, 3], after the curves, and after the matrix as well."""
    edit, walls = prediction.edit, prediction.walls[..., None, None]
    none = torch.eye(3, 4, device=walls.device).expand_as(edit.matrix)
    toned, edited = (apply_edit(walls, edit.curves, matrix, None) for matrix in (none, edit.matrix))
    return toned[..., 0, 0], edited[..., 0, 0].clamp(min=0.02)


def neutral(edit: Edit) -> Edit:
    """The edit that keeps a photo's own white balance: a grey of any lightness stays grey, of the luma that the edit gives it.

    All channels get one curve, the mean of the three by their parts of the luma. The matrix leaves grey grey as it is.
    """
    parts = edit.curves.new_tensor(LUMA) @ edit.matrix[..., :3]
    return edit._replace(curves=(parts[:, None] @ edit.curves).expand_as(edit.curves).contiguous())


def mean(edits: Sequence[Edit]) -> Edit:
    """The edit whose curves and matrix are the means of the edits'."""
    return Edit(*(torch.stack(parts).mean(0) for parts in zip(*edits, strict=True)))


def statistics(small: Tensor, base: Tensor, walls: Tensor) -> Tensor:
    """[B, FEATURES]: percentiles of luma before and after the recipe, and of how red and blue the pixels are; walls, spread."""
    y, after = luma(small), luma(base)
    planes = torch.stack([y, after, base[:, 0] - after, base[:, 2] - after], 1).flatten(2)
    shares = torch.quantile(planes, planes.new_tensor(SHARES), dim=2).permute(1, 2, 0)  # [B, 4, shares]
    scaled = torch.cat([shares[:, :2] - 0.5, 4 * shares[:, 2:]], 1).flatten(1)
    tint = 4 * (walls / luma(walls)[:, None]).log()
    spread = 4 * torch.stack([y.std((1, 2)), after.std((1, 2)), (base.amax(1) - base.amin(1)).mean((1, 2))], 1)
    return torch.cat([scaled, tint, spread], 1)
