"""What every family of networks is to the rest of autohdr, and the stages of those that can work in strips."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from autohdr.errors import UserError
from autohdr.models.layers import Uncalled, crop, pad_to_multiple


@dataclass(frozen=True)
class NetworkConfig:
    """What fixes a network. `name` and `overrides` are what create_model needs to build it again."""

    tells_family: ClassVar[tuple[str, ...]] = ()
    """Fields that go with others which no state dict tells: of the registered models, one with the same is meant."""

    name: str
    overrides: dict[str, Any] = field(default_factory=dict, kw_only=True)

    def require(self, name: str, expected: str, met: bool) -> None:
        """UserError naming the setting, what was expected and what came, unless met."""
        if not met:
            raise UserError(f"{self.name}: {name} must be {expected}, got {getattr(self, name)!r}")


def is_whole(value: Any, least: int) -> bool:
    """Whether a setting is a whole number of at least that."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


class Embed(NamedTuple):
    """The first stage: layers that make features (B, channels, H, W) of an image."""

    layers: list[nn.Module]
    channels: int


class Half(NamedTuple):
    """Of a block, or all of it: x = module(x, **beside), with its residual. It reads one pixel around each.

    beside: modules that it takes and does not hold: its norm.
    kind: the class of the module, for who doesn't call it for a whole image. One that also sums over all pixels is
        Summing too, as restormer.Attention and nafnet.Block are.
    """

    module: nn.Module
    beside: dict[str, nn.Module]
    kind: type[nn.Module]


class Summing(Protocol):
    """The module of a half that sums over all pixels: `statistics` of each strip, added up, are what `attend` needs."""

    def statistics(self, x: Tensor, *, first: int, end: int, **beside: nn.Module) -> tuple[Tensor, ...]: ...

    def attend(self, x: Tensor, *, statistics: tuple[Tensor, ...], **beside: nn.Module) -> Tensor: ...


class Blocks(NamedTuple):
    """Blocks at one resolution, by their halves."""

    halves: list[Half]


class Down(NamedTuple):
    """Layers to half the height and width, and another number of channels. Their input waits for the Up back to its size."""

    layers: list[nn.Module]
    channels: int


class Up(NamedTuple):
    """Layers to twice the height and width; then x = join(x, what waited for it), pixel by pixel, perhaps in place."""

    layers: Sequence[Callable[[Tensor], Tensor]]
    join: Callable[[Tensor, Tensor], Tensor]
    channels: int


class Output(NamedTuple):
    """The last stage: layers that make an image of the features."""

    layers: list[nn.Module]


Stage = Embed | Blocks | Down | Up | Output
"""Of a stage's layers the first reads one pixel around each, unless it is a convolution of separate patches; the others none."""


class Network(nn.Module):
    """Base class of the families: an image (B, 3, H, W), floating point, RGB, nominally in [0, 1], to one of the same size.

    config: what fixes it.
    metadata: what its checkpoint says beside the weights; {} for a new one.
    steps: how often a diffusion bridge's sampler calls its network; None for a network itself.
    recompute: whether blocks compute what their backward pass needs again instead of keeping it. Raises UserError when it is
        set to True for a family that does not have the choice.
    """

    Config: ClassVar[type[NetworkConfig]]
    shard_units: ClassVar[dict[type[nn.Module], bool]] = {}
    """Parts whose weights several processes gather and free as one, each with whether these may travel in half precision: a
    scan's A, D and Δ may not, nor what is outside the units."""
    can_recompute: ClassVar[bool] = False
    takes_samples: ClassVar[bool] = False
    """Whether it also takes a photo's own samples, uint8 or uint16, and gives the same."""
    derived: ClassVar[frozenset[str]] = frozenset()
    """Last parts of the names of tensors that the family's files may hold and a network computes itself."""
    reduction: int = 1
    """How many times smaller, in height and width, than the image is what its layers see."""
    multiple: int = 1
    """What the sides of the image are padded to a multiple of."""

    def __init__(self, config: NetworkConfig):
        super().__init__()
        self.config, self.metadata, self.steps, self._recompute = config, {}, None, False

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        try:
            return super().__call__(*args, **keywords)
        except Uncalled as error:
            raise self.named(error) from None

    def named(self, error: Uncalled) -> UserError:
        """The error, which knows the module, with the module's name."""
        names = (name for name, module in self.named_modules() if module is error.module)
        return UserError(f"{self.config.name}: {next(names, type(error.module).__name__)} {error}")

    @property
    def recompute(self) -> bool:
        return self._recompute

    @recompute.setter
    def recompute(self, value: bool) -> None:
        if value and not self.can_recompute:
            raise UserError(f"recompute: {self.config.name} has no such choice: its ops always compute again")
        self._recompute = value

    def check(self, image: Tensor) -> None:
        """UserError unless image is a batch that a forward pass takes."""
        samples = self.takes_samples and image.dtype in (torch.uint8, torch.uint16)
        if image.ndim != 4 or image.shape[1] != 3 or 0 in image.shape or not (samples or image.is_floating_point()):
            raise UserError(
                f"{self.config.name}: expected a floating-point image batch [B, 3, H, W], "
                f"got {list(image.shape)} of {image.dtype}"
            )

    def stages(self) -> Sequence[Stage]:
        """The network in the order of its forward pass, for those who walk through it: tiling and counting.

        Empty for a family that can't work in strips of rows.
        """
        return ()

    def scratch_bytes(self) -> int:
        """The scratch memory that one worker of the compiled CPU kernels takes at most in a training step."""
        return 0

    @classmethod
    def settings_of(cls, names: Collection[str], shape: Callable[[str], list[int]]) -> dict[str, Any]:
        """The configuration's fields that a state dict tells. names: of its tensors; shape: of the one so called, which raises
        UserError where there is none."""
        raise NotImplementedError


class StageEnd(NamedTuple):
    """What comes out of a stage of Blocks: the output of `module` (None: it has no block), of so many channels, `scale` times
    smaller in height and width than the padded image."""

    module: nn.Module | None
    channels: int
    scale: int


def stage_ends(network: Network) -> list[StageEnd]:
    """Those of all Blocks, in the order of the forward pass; [] for a family without stages."""
    channels, scale, ends = 0, 1, []
    for stage in network.stages():
        if isinstance(stage, Blocks):
            ends.append(StageEnd(stage.halves[-1].module if stage.halves else None, channels, scale))
        elif not isinstance(stage, Output):
            channels = stage.channels
            scale = 2 * scale if isinstance(stage, Down) else scale // 2 if isinstance(stage, Up) else scale
    return ends


class StagedNetwork(Network):
    """A network that is its stages: it predicts the difference to the image by them.

    forward(x): x is (B, 3, H, W), floating point, RGB, nominally in [0, 1]; any H, W >= 1. Returns the same shape and, for
    parameters of x's dtype or under autocast, the same dtype, not clamped. Raises UserError for another shape, and where a layer
    that is never called, since a kernel takes its weight, would do something else if it were.
    """

    def forward(self, image: Tensor) -> Tensor:
        self.check(image)
        x, skips = pad_to_multiple(image, self.multiple).contiguous(memory_format=torch.channels_last), []
        # No module's forward is a run of blocks: its caller would keep the input alive, at full resolution an image too many.
        for stage in self.stages():
            if isinstance(stage, Blocks):
                for half, beside, _ in stage.halves:
                    x = half(x, *beside.values())
                continue
            if isinstance(stage, Down):
                skips.append(x)
            for layer in stage.layers:
                x = layer(x)
            if isinstance(stage, Up):
                x = stage.join(x, skips.pop())
        return crop(x, *image.shape[-2:]) + image


def in_8_bits(network: nn.Module) -> bool:
    """Whether weights of it are codes of 8 bits, as int8.quantized makes them: for inference on a CPU alone."""
    return any(parameter.dtype == torch.int8 for parameter in network.parameters())


def only_on_a_cpu(use: str) -> UserError:
    """The error for a model in 8 bits of which such a use is made."""
    return UserError(f"a model in 8 bits is for inference on a CPU, but {use}: take the checkpoint that it was made of")


def not_finite(output: Tensor, precision: str) -> str:
    """Why a network's output is refused that has a value which is not finite; empty for another one, and for samples."""
    if not output.is_floating_point() or output.sum(dtype=torch.float32).isfinite():  # without a mask as large as the image
        return ""
    why = "; its largest number is 65504: take bfloat16 or float32" if precision == "float16" else ""
    return f"the network's result is not finite in {precision}{why}"


def count(names: Collection[str], prefix: str) -> int:
    """How many modules are numbered behind a prefix."""
    return len({name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)})
