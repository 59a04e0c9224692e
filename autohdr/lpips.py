"""LPIPS, a perceptual distance of images, made of AlexNet's features. Its weights are files that the caller has."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autohdr.errors import UserError
from autohdr.metrics import checked
from autohdr.models.weight_files import oddity
from autohdr.models.weights import read_tensors

# AlexNet's convolutions: place among torchvision's features, input channels, channels, side, stride, padding.
_CONVOLUTIONS = (
    (0, 3, 64, 11, 4, 2),
    (3, 64, 192, 5, 1, 2),
    (6, 192, 384, 3, 1, 1),
    (8, 384, 256, 3, 1, 1),
    (10, 256, 256, 3, 1, 1),
)
_POOLED = (3, 6)  # those after a maximum over 3x3 at stride 2
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of images in [-1, 1]
_EPSILON = 1e-10
LEAST_SIDE = 31  # pixels, of which the third convolution has one

_SHAPES: dict[str, tuple[int, ...]] = {}  # of the tensors, by the names of torchvision and, where it has none, of lpips
_SLICES: dict[str, str] = {}  # from the names that lpips gives AlexNet's to torchvision's
for _layer, (_place, _ins, _outs, _side, *_) in enumerate(_CONVOLUTIONS):
    for _kind, _shape in {"weight": (_outs, _ins, _side, _side), "bias": (_outs,)}.items():
        _SHAPES[f"features.{_place}.{_kind}"] = _shape
        _SLICES[f"net.slice{_layer + 1}.{_place}.{_kind}"] = f"features.{_place}.{_kind}"
    _SHAPES[f"lin{_layer}.model.1.weight"] = (1, _outs, 1, 1)


class LPIPS(nn.Module):
    """Σ_l mean over the pixels of Σ_c w_lc (φ_lc(prediction) - φ_lc(target))²: 0 of equal images, lower is closer.

    φ_l are AlexNet's five convolutions after their ReLU, brought to unit length over the channels c at each pixel.
    Zhang et al., "The unreasonable effectiveness of deep features as a perceptual metric", 2018, version 0.1 with AlexNet.

    Called with two float tensors (B, 3, H, W), sRGB-encoded in [0, 1], H, W >= 31 -> (B,) in the weights' dtype, float32 unless
    the module is brought to another, without gradients. Raises UserError for a smaller image.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, files: Sequence[str | Path]):
        """files: in any order torchvision's alexnet-owt-7be5be79.pth and lpips' weights/v0.1/alex.pth, or one file with a
        state dict of lpips.LPIPS(net="alex"). lpips' weights of version 0.0 look the same, and are not told from those of 0.1.

        Raises UserError with the name of a tensor that none has or two have, that has another shape, or is not finite.
        """
        super().__init__()
        tensors = _read(files)
        with torch.device("meta"):
            self.convolutions = nn.ModuleList(
                nn.Conv2d(ins, outs, side, stride, padding) for _, ins, outs, side, stride, padding in _CONVOLUTIONS
            )
        for (place, *_), convolution in zip(_CONVOLUTIONS, self.convolutions, strict=True):
            convolution.load_state_dict({kind: tensors[f"features.{place}.{kind}"] for kind in ("weight", "bias")}, assign=True)
        self.linear = nn.ParameterList(tensors[f"lin{layer}.model.1.weight"] for layer in range(len(_CONVOLUTIONS)))
        self.register_buffer("shift", torch.tensor(_SHIFT).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).view(3, 1, 1))
        self.float().requires_grad_(False)

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        images = checked("lpips", prediction, target)
        height, width = target.shape[-2:]
        if min(height, width) < LEAST_SIDE:
            raise UserError(f"lpips: both sides must be at least {LEAST_SIDE} pixels, got {height}x{width}")
        with torch.no_grad():
            layers = zip(*map(self._features, images), self.linear, strict=True)
            return sum((((x - y).square() * weight).sum(1).mean((1, 2)) for x, y, weight in layers), self.shift.new_zeros(()))

    def _features(self, image: Tensor) -> Iterator[Tensor]:
        x = (2 * image.to(self.shift.dtype) - 1 - self.shift) / self.scale
        for (place, *_), convolution in zip(_CONVOLUTIONS, self.convolutions, strict=True):
            x = convolution(F.max_pool2d(x, 3, 2) if place in _POOLED else x).relu()
            yield x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + _EPSILON)


def _read(files: Sequence[str | Path]) -> dict[str, Tensor]:
    """The tensors of _SHAPES, each of one of the files."""
    found: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in read_tensors(file, {*_SHAPES, *_SLICES}).items():
            ours = _SLICES.get(name, name)
            if ours in found:
                raise UserError(
                    f"lpips: {file}: has {ours} a second time; expected one AlexNet, and one file of lpips' own weights"
                )
            found[ours] = tensor
    named = ", ".join(map(str, files))
    for name, shape in _SHAPES.items():
        if name not in found:
            whose = "lpips' weights/v0.1/alex.pth" if name.startswith("lin") else "torchvision's alexnet-owt-7be5be79.pth"
            raise UserError(f"lpips: {named}: expected {name} {list(shape)}, as {whose} has it, got no such tensor")
        if odd := _odd(found[name], shape):
            raise UserError(f"lpips: {named}: expected {name} {list(shape)} of AlexNet, got {odd}")
        if not found[name].isfinite().all():
            raise UserError(f"lpips: {named}: {name} is not finite")
    return found


def _odd(tensor: Tensor, shape: tuple[int, ...]) -> str:
    """What it is, if not the weights that are expected."""
    if odd := oddity(tensor):
        return odd
    if not tensor.is_floating_point():
        return f"a tensor of {tensor.dtype}"
    return "" if tensor.shape == shape else str(list(tensor.shape))
