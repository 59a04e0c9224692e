"""Networks made of networks: more from the same weights, for as many passes as there are members or flips; or nearly as much, for
a fraction of one."""

import copy
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autohdr.autotone import luma
from autohdr.errors import UserError
from autohdr.models import guided
from autohdr.models.lite import Lite
from autohdr.models.network import Network, NetworkConfig, in_8_bits
from autohdr.models.registry import check_tensors
from autohdr.models.tiling import Rows, TensorRows

AverageOf = Literal["outputs", "weights"]
"""Of several models, what their mean is taken of."""
VIEWS = (2, 4, 8)
"""Of a photo: it and its mirror image, these two upside down, these four transposed."""
BLUR = 1.0  # standard deviation of the unsharp mask's blur, in pixels: of the finest detail
LEAST = 64  # pixels a side, below which a reduced image has too little left in it
GRAIN = 0.01  # a detail of less luma than this is taken for noise, and not made stronger

Pass = Callable[[Network, Tensor], Tensor]
"""How a network goes over an image, as in strips."""


class Combined(Network):
    """A network whose result is made of what `networks` make of the image, or of views of it. `metadata` is what all of them say.

    forward(image): (B, 3, H, W) to the same shape, float32 at least.
    """

    def __init__(self, name: str, networks: Sequence[Network]):
        super().__init__(NetworkConfig(name))
        self.networks: Sequence[Network] = nn.ModuleList(networks)  # pyright: ignore[reportAttributeAccessIssue]
        self.reduction = max(network.reduction for network in networks)
        self.metadata = _trained_on(networks)

    def forward(self, image: Tensor) -> Tensor:
        return self.over(image, lambda network, view: network(view))

    def over(self, image: Tensor, run: Pass) -> Tensor:
        """forward(image), where each network that is not itself Combined goes over a view of it by `run`."""
        raise NotImplementedError

    def parts(self) -> list[Network]:
        """The networks that are not themselves Combined."""
        found: list[Network] = []
        for network in self.networks:
            found += network.parts() if isinstance(network, Combined) else [network]
        return found


class Ensemble(Combined):
    """The mean of several networks' results."""

    def __init__(self, networks: Sequence[Network]):
        super().__init__("mean of " + ", ".join(network.config.name for network in networks), networks)

    def over(self, image: Tensor, run: Pass) -> Tensor:
        return _mean(_over(network, image, run) for network in self.networks)


class SelfEnsemble(Combined):
    """The mean of a network's results for 2, 4 or 8 views of the image, each turned back.

    Source: Timofte et al., Seven Ways to Improve Example-Based Single Image Super Resolution (2016), "enhanced prediction".
    UserError for another number of views, and for views upside down of a network that knows what is up.
    """

    def __init__(self, network: Network, views: int):
        if views not in VIEWS:
            raise UserError(f"flips: expected 1, 2, 4 or 8, got {views!r}")
        super().__init__(f"{network.config.name}, {views} views", [network])
        if views > 2 and any(isinstance(part, Lite) for part in self.parts()):
            raise UserError(f"flips: lite lightens ceilings, whose mean with floors is none: expected 1 or 2, got {views}")
        self.views = views

    def over(self, image: Tensor, run: Pass) -> Tensor:
        return _mean(self._back(_over(self.networks[0], self._view(image, i), run), i) for i in range(self.views))

    @staticmethod
    def _view(image: Tensor, i: int) -> Tensor:
        view = image.flip(_flipped(i))
        return view.transpose(-1, -2).contiguous(memory_format=torch.channels_last) if i & 4 else view

    @staticmethod
    def _back(view: Tensor, i: int) -> Tensor:
        return (view.transpose(-1, -2) if i & 4 else view).flip(_flipped(i))


class Reduced(Combined):
    """A network that sees the image at a third of its height and width; its edit is carried up to the whole: guided.carry_up.

    Of an image with a side of less than LEAST pixels it sees all. UserError for a network that looks at a thumbnail anyway.
    """

    def __init__(self, network: Network):
        super().__init__(f"{network.config.name}, at a third", [network])
        if any(isinstance(part, Lite) for part in self.parts()):
            raise UserError("fast: lite sees no more than a thumbnail as it is; expected another model")
        self.reduction = guided.FACTOR

    def over(self, image: Tensor, run: Pass) -> Tensor:
        result = torch.empty_like(image, dtype=torch.promote_types(image.dtype, torch.float32))
        for single, its_result in zip(image.split(1), result.split(1), strict=True):
            self.over_rows(TensorRows(single, its_result), run)
        return result

    def over_rows(self, image: Rows, run: Pass) -> None:
        """over() for Rows, which take the result: nothing of their size is made."""
        height, width = image.shape[2:]
        if not self.reduces(image):
            image.write(0, _over(self.networks[0], image.read(0, height), run))
            return
        cells = -(-height // guided.FACTOR), -(-width // guided.FACTOR)
        small = torch.empty((1, 3, *cells), dtype=image.dtype, device=image.device, memory_format=torch.channels_last)
        strips = [
            (first, slice(first * guided.FACTOR, min((first + guided.ROWS) * guided.FACTOR, height)))
            for first in range(0, cells[0], guided.ROWS)
        ]
        for first, rows in strips:
            small[:, :, first : first + guided.ROWS] = guided.reduced(image.read(rows.start, rows.stop))
        edited = _over(self.networks[0], small, run)
        with torch.autocast(image.device.type, enabled=False):
            small = small.to(edited.dtype)
            for first, rows in strips:
                pixels = image.read(rows.start, rows.stop).to(edited.dtype)
                image.write(rows.start, guided.carry_up(pixels, first, small, edited))

    @staticmethod
    def reduces(image: Tensor | Rows) -> bool:
        """Whether the network sees less than all of it."""
        return min(image.shape[2:]) >= LEAST


class Sharpened(Combined):
    """A network's result with more local contrast: an unsharp mask of the luma, which leaves grain and the colours alone.

    amount: how much of the detail is added, above 0, up to 2. UserError for another.
    """

    def __init__(self, network: Network, amount: float):
        if not 0 < amount <= 2:
            raise UserError(f"sharpen: expected a number above 0, up to 2, got {amount!r}")
        super().__init__(f"{network.config.name}, sharpened by {amount:g}", [network])
        self.amount = amount

    def over(self, image: Tensor, run: Pass) -> Tensor:
        return sharpen(_over(self.networks[0], image, run), self.amount)


def sharpen(image: Tensor, amount: float) -> Tensor:
    """image (B, 3, H, W) float32 and `amount` of its luma's finest detail, less GRAIN, in all channels alike."""
    bright = luma(image)[:, None]
    reach = round(3 * BLUR)
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=image.device, dtype=image.dtype) / BLUR) ** 2)
    weights = weights / weights.sum()
    with torch.autocast(image.device.type, enabled=False):  # half precision rounds as much away as the finest detail is
        blurred = F.conv2d(F.pad(bright, (reach, reach, 0, 0), "replicate"), weights.view(1, 1, 1, -1))
        blurred = F.conv2d(F.pad(blurred, (0, 0, reach, reach), "replicate"), weights.view(1, 1, -1, 1))
    return image + amount * F.softshrink(bright - blurred, GRAIN)


def combine(
    networks: Sequence[Network], *, average: AverageOf = "outputs", flips: int = 1, fast: bool = False, sharpen: float = 0.0
) -> Network:
    """One network of several, as the command line asks for it: 0 and 1 are none, and one network with none is itself.

    average: of several networks, outputs (Ensemble) or weights (soup). flips: SelfEnsemble's views. fast: Reduced, of all these.
    sharpen: Sharpened's amount, at full size.
    UserError as these raise it.
    """
    if average not in get_args(AverageOf):
        raise UserError(f"average: expected {' or '.join(get_args(AverageOf))}, got {average!r}")
    network = networks[0]
    if len(networks) > 1:
        network = soup(networks) if average == "weights" else Ensemble(networks)
    if flips != 1:
        network = SelfEnsemble(network, flips)
    if fast:
        network = Reduced(network)
    return Sharpened(network, sharpen) if sharpen else network


def soup(networks: Sequence[Network]) -> Network:
    """A network whose weights are the mean of those of several checkpoints of one run.

    Source: Wortsman et al., Model Soups (2022), uniform. UserError for networks of several kinds or runs: the mean of weights
    that no training has led from one another is no network; for weights in 8 bits, and as check_tensors.
    """
    first, runs = networks[0], {network.metadata.get("run") for network in networks}
    kinds = {network.config.name for network in networks}
    if len(kinds) > 1 or any(network.config != first.config for network in networks):
        raise UserError(f"a mean of weights: expected checkpoints of one model, got several: {', '.join(sorted(kinds))}")
    if len(runs) > 1 or None in runs:
        raise UserError("a mean of weights: expected checkpoints of one run, got several; a mean of outputs takes any")
    if in_8_bits(first):
        raise UserError(f"a mean of weights: expected weights in floats, got {first.config.name} in 8 bits")
    for network in networks:
        check_tensors(network, "a mean of weights")
    states, made = [network.state_dict() for network in networks], copy.deepcopy(first)
    with torch.no_grad():
        for name, value in made.state_dict().items():
            if value.is_floating_point():
                value.copy_(reduce(torch.add, (state[name].double() for state in states)) / len(states))
    made.metadata = {key: said for key, said in first.metadata.items() if key != "trained_on"} | _trained_on(networks)
    return made


def _trained_on(networks: Sequence[Network]) -> dict[str, Any]:
    """What any of them was trained on, as metadata; {} unless all say it."""
    said = [network.metadata.get("trained_on") for network in networks]
    return {} if None in said else {"trained_on": sorted({photo for photos in said for photo in photos or ()})}


def _over(network: Network, image: Tensor, run: Pass) -> Tensor:
    result = network.over(image, run) if isinstance(network, Combined) else run(network, image)
    return result if result.dtype == torch.float64 else result.float()


def _flipped(i: int) -> list[int]:
    return [axis for axis, bit in ((-1, 1), (-2, 2)) if i & bit]


def _mean(results) -> Tensor:
    total, count = None, 0
    for result in results:
        total, count = result if total is None else total.add_(result), count + 1
    assert total is not None
    return total.div_(count)
