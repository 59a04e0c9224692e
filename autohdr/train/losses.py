"""Training losses: scalars of two image batches, and their weighted sum.

A loss takes output and target, (B, 3, H, W) in float32 or float64, and returns the mean over the batch, a scalar of that dtype.
It is 0 where the two are equal.
"""

from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autohdr import metrics
from autohdr.errors import UserError
from autohdr.models.weights import read_tensors
from autohdr.train.config import TrainConfig

VGG19_FILE = "vgg19-dcbb9e9d.pth"
VGG19_URL = f"https://download.pytorch.org/models/{VGG19_FILE}"

_VGG19 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 256, 0, 512, 512, 512, 512, 0, 512)  # convolutions' channels; 0: pooling
_TAPS = (0, 2, 7, 12, 21, 30)  # features[2:7] leads from relu1_1 to relu2_1, and so on
_TAP_WEIGHTS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1)


def l1(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error, mean |output - target|."""
    return (output - target).abs().mean()


def charbonnier(output: Tensor, target: Tensor) -> Tensor:
    """Mean of sqrt(d² + ε²) - ε with d = output - target and ε = 0.001: L1 that is smooth at 0.

    Charbonnier et al., "Two deterministic half-quadratic regularization algorithms for computed imaging", 1994; ε of Lai et al.,
    "Deep Laplacian pyramid networks for fast and accurate super-resolution", 2017, whose loss is this one plus ε.
    """
    return ((output - target).square() + 1e-3**2).sqrt().mean() - 1e-3


def ssim(output: Tensor, target: Tensor) -> Tensor:
    """1 - SSIM, with metrics.ssim's window and constants; values nominally in [0, 1], H, W >= 11.

    Zhao et al., "Loss functions for image restoration with neural networks", 2017.
    """
    return 1 - metrics.ssim(output, target).mean()


def edge(output: Tensor, target: Tensor) -> Tensor:
    """Mean |S_x * d| and |S_y * d| with d = output - target and S Sobel's kernels over 8, which give slopes per pixel; H, W >= 3.

    As the operator is linear, this is the L1 distance between the two images' gradients: the gradient matching of Li and Snavely,
    "MegaDepth", 2018, at one scale. Only windows that lie wholly inside the image count.
    """
    smooth, slope = (output.new_tensor(taps) for taps in ((1, 2, 1), (-1, 0, 1)))
    kernels = torch.stack((torch.outer(smooth, slope), torch.outer(slope, smooth))) / 8
    return F.conv2d(output - target, kernels.unsqueeze(1).repeat(3, 1, 1, 1), groups=3).abs().mean()


class VGG(nn.Module):
    """Perceptual loss: Σ_k w_k mean |φ_k(output) - φ_k(target)| of sRGB-encoded images in [0, 1]; H, W >= 16.

    φ_k are relu1_1, relu2_1, relu3_1, relu4_1 and relu5_1 of VGG19 (Simonyan and Zisserman, 2015, configuration E) trained on
    ImageNet, whose mean and deviation normalise the images; w_k = 1/32, 1/16, 1/8, 1/4, 1. Johnson et al., "Perceptual losses for
    real-time style transfer and super-resolution", 2016; layers and w_k of pix2pixHD (Wang et al., "High-resolution image
    synthesis and semantic manipulation with conditional GANs", 2018).

    The weights are frozen. The backward pass needs 284 MiB of features for a 384×384 image, in proportion to the pixels.
    Computing them again, level by level, lowers the peak by only an eighth, and is not done.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, path: str | Path):
        """path: torchvision's vgg19 (features.0.weight, ...), or only the layers used here. Raises UserError for another file."""
        super().__init__()
        layers, channels = [], 3
        with torch.device("meta"):  # to draw none of the run's random numbers
            for width in _VGG19:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)] if width else [nn.MaxPool2d(2)]
                channels = width or channels
            self.features = nn.Sequential(*layers)
        tensors = read_tensors(path, self.state_dict())
        for name, wanted in self.state_dict().items():
            found = list(tensors[name].shape) if name in tensors else "no such tensor"
            if found != list(wanted.shape):
                raise UserError(f"{path}: expected torchvision's vgg19 with {name} {list(wanted.shape)}, got {found}")
        self.load_state_dict({name: tensors[name] for name in self.state_dict()}, assign=True)
        self.float().requires_grad_(False)
        self.register_buffer("mean", torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1), persistent=False)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        x, y = ((image - self.mean) / self.std for image in (output, target))
        total = output.new_zeros(())
        for (start, end), weight in zip(pairwise(_TAPS), _TAP_WEIGHTS, strict=True):
            x = self.features[start:end](x)
            with torch.no_grad():
                y = self.features[start:end](y)
            total = total + weight * (x - y).abs().mean()
        return total


class Criterion:
    """The loss that a run minimises: the weighted sum of config.losses, but for the adversarial one, which is the Adversary's."""

    def __init__(self, config: TrainConfig, device: torch.device):
        """Raises UserError where vgg is among the losses, and the file of its weights is absent or another network's."""
        self.weights = {"l1": 0.0} | {name: weight for name, weight in config.losses.items() if name != "adversarial"}
        self.losses = {"l1": l1, "charbonnier": charbonnier, "ssim": ssim, "edge": edge}
        if "vgg" in self.weights:
            vgg = VGG(_vgg_file(config))
            vgg.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  torch declares no memory_format
            self.losses["vgg"] = vgg

    def __call__(self, output: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(total, {name: component}) of two image batches (B, 3, H, W): float32 scalars, computed in float32 even under autocast.

        The components are means over the batch, unweighted and without gradients. l1 is always the first of them.
        """
        output, target = output.float(), target.float()
        total, components = output.new_zeros(()), {}
        with torch.autocast(output.device.type, enabled=False):
            for name, weight in self.weights.items():
                loss = self.losses[name](output if weight else output.detach(), target)
                components[name] = loss.detach()
                if weight:
                    total = total + weight * loss
        return total, components


def _vgg_file(config: TrainConfig) -> Path:
    path = config.vgg_weights or Path(torch.hub.get_dir(), "checkpoints", VGG19_FILE)
    if path.is_file():
        return path
    rest = {name: weight for name, weight in config.losses.items() if name != "vgg" and weight} or {"l1": 1.0}
    raise UserError(
        f"vgg_weights: the loss vgg needs VGG19's ImageNet weights, and there is no file {path}. Put torchvision's there, from "
        f"{VGG19_URL} (548 MB; autohdr fetches nothing), or name a file with --vgg-weights PATH. To train without: "
        f"losses = {{{', '.join(f'{name} = {weight}' for name, weight in rest.items())}}}"
    )
