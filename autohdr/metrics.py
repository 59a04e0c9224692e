"""L1, PSNR, SSIM and ΔE2000 of an image against its target, L1 by tone, drift of colour, and the confidence interval of means."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from autohdr.data.colour import LUMA
from autohdr.errors import UserError

SSIM_WINDOW = 11
_SSIM_SIGMA = 1.5
# SSIM and ΔE2000 hold some 40 temporary images. They go through bands of rows of about so many pixels: memory does not grow with
# the image.
_BAND_PIXELS = 1 << 18

# Linear sRGB to XYZ under D65 (IEC 61966-2-1), and that white point for the 2-degree observer.
_RGB_TO_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
_D65_WHITE = (0.95047, 1.0, 1.08883)
_GREY = 1  # an image of less mean chroma than is just visible has neither saturation nor hue


def l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error. Two float tensors (B, 3, H, W) in [0, 1] -> (B,) float32, float64 for float64 images."""
    prediction, target = checked("l1", prediction, target)
    return (prediction - target).abs().mean(dim=(1, 2, 3))


def psnr(prediction: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, peak 1: -10 log10(MSE), inf for equal images.

    Two float tensors (B, 3, H, W) in [0, 1] -> (B,) float32, float64 for float64 images.
    """
    prediction, target = checked("psnr", prediction, target)
    return -10 * (prediction - target).square().mean(dim=(1, 2, 3)).log10()


def ssim(prediction: Tensor, target: Tensor) -> Tensor:
    """Structural similarity: 11×11 Gaussian window, sigma 1.5, K1 = 0.01, K2 = 0.03, averaged over the three channels.

    Only windows that lie wholly inside the image count, so there is no padding to bias the mean.
    Two float tensors (B, 3, H, W) in [0, 1] with H, W >= 11 -> (B,) float32, float64 for float64 images.
    Raises UserError for a smaller image.
    Wang et al., "Image quality assessment: from error visibility to structural similarity", 2004.
    """
    prediction, target = checked("ssim", prediction, target)
    batch, _, height, width = target.shape
    if min(height, width) < SSIM_WINDOW:
        raise UserError(f"ssim: both sides must be at least {SSIM_WINDOW} pixels, got {height}x{width}")
    offset = torch.arange(SSIM_WINDOW, device=target.device, dtype=target.dtype) - SSIM_WINDOW // 2
    window = torch.exp(-offset.square() / (2 * _SSIM_SIGMA**2))
    window /= window.sum()

    total = target.new_zeros(batch, dtype=torch.float64)
    for rows in _bands(height, width, overlap=SSIM_WINDOW - 1):
        x, y = prediction[:, :, rows], target[:, :, rows]
        # On the CPU one grouped convolution of 15 channels, channels-last, is ten times as fast as one for each plane.
        moments = torch.cat((x, y, x * x, y * y, x * y), dim=1).contiguous(memory_format=torch.channels_last)
        for shape in ((15, 1, -1, 1), (15, 1, 1, -1)):
            moments = F.conv2d(moments, window.expand(15, SSIM_WINDOW).reshape(shape), groups=15)
        mean_x, mean_y, xx, yy, xy = moments.chunk(5, dim=1)
        luminance = (2 * mean_x * mean_y + 0.01**2) / (mean_x.square() + mean_y.square() + 0.01**2)
        variances = xx - mean_x.square() + yy - mean_y.square()
        similarity = luminance * (2 * (xy - mean_x * mean_y) + 0.03**2) / (variances + 0.03**2)
        total += similarity.sum(dim=(1, 2, 3))
    return (total / (3 * (height - SSIM_WINDOW + 1) * (width - SSIM_WINDOW + 1))).to(target.dtype)


def delta_e2000(prediction: Tensor, target: Tensor) -> Tensor:
    """CIEDE2000 colour difference, sRGB under D65, averaged over the pixels: about 1 is just visible, 0 is equal.

    Two float tensors (B, 3, H, W), sRGB-encoded in [0, 1] -> (B,) float32, float64 for float64 images.
    """
    prediction, target = checked("delta_e2000", prediction, target)
    height, width = target.shape[-2:]
    total = target.new_zeros(target.shape[0], dtype=torch.float64)
    for rows in _bands(height, width):
        total += ciede2000(srgb_to_lab(prediction[:, :, rows]), srgb_to_lab(target[:, :, rows])).sum(dim=(1, 2))
    return (total / (height * width)).to(target.dtype)


METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": l1,
    "psnr": psnr,
    "ssim": ssim,
    "delta_e2000": delta_e2000,
}


def tone_l1(prediction: Tensor, target: Tensor, third: int) -> Tensor:
    """Mean absolute error over the pixels whose luma, in the target, lies in a third of [0, 1]: 0 darkest, 2 brightest.

    Two float tensors (B, 3, H, W), sRGB-encoded in [0, 1] -> (B,) float32, float64 for float64 images; nan where there is no such
    pixel. Luma is Rec. 709's.
    """
    prediction, target = checked("tone_l1", prediction, target)
    luma = torch.einsum("bchw,c->bhw", target, target.new_tensor(LUMA))
    inside = (luma * 3).floor().clamp(0, 2) == third
    return ((prediction - target).abs().mean(1) * inside).sum((1, 2)) / inside.sum((1, 2))


def saturation(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean CIELAB chroma as a share of the target's: 1 is as colourful, below is paler.

    Two float tensors (B, 3, H, W), sRGB-encoded in [0, 1] -> (B,) float32, float64 for float64 images; nan for a grey target.
    """
    chroma, wanted, _, _ = _chroma_means("saturation", prediction, target)
    return torch.where(wanted < _GREY, math.nan, chroma / wanted)


def hue(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean angle between the CIELAB hues of prediction and target in degrees, weighted by the geometric mean of their chromas.

    Two float tensors (B, 3, H, W), sRGB-encoded in [0, 1] -> (B,) float32, float64 for float64 images; nan where either is grey.
    """
    _, _, weight, turned = _chroma_means("hue", prediction, target)
    return torch.where(weight < _GREY, math.nan, torch.rad2deg(turned / weight))


DETAILS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "shadows": functools.partial(tone_l1, third=0),
    "midtones": functools.partial(tone_l1, third=1),
    "highlights": functools.partial(tone_l1, third=2),
    "saturation": saturation,
    "hue": hue,
}
"""What METRICS do not tell apart. nan of an image that cannot tell."""


def _chroma_means(name: str, prediction: Tensor, target: Tensor) -> Tensor:
    """Over the pixels, (4, B): chroma, the target's chroma, their geometric mean, and that times the angle between the hues."""
    prediction, target = checked(name, prediction, target)
    sums = target.new_zeros(4, target.shape[0], dtype=torch.float64)
    for rows in _bands(*target.shape[-2:]):
        (_, a1, b1), (_, a2, b2) = srgb_to_lab(prediction[:, :, rows]).unbind(1), srgb_to_lab(target[:, :, rows]).unbind(1)
        c1, c2 = torch.hypot(a1, b1), torch.hypot(a2, b2)
        weight = (c1 * c2).sqrt()
        angle = torch.atan2(a1 * b2 - b1 * a2, a1 * a2 + b1 * b2).abs()
        sums += torch.stack([c1, c2, weight, weight * angle]).sum((2, 3))
    return (sums / target[0, 0].numel()).to(target.dtype)


def srgb_to_lab(image: Tensor) -> Tensor:
    """sRGB-encoded (B, 3, H, W) in [0, 1] -> CIELAB under D65, same shape and dtype, L in [0, 100]."""
    linear = torch.where(image > 0.04045, ((image.clamp(min=0) + 0.055) / 1.055) ** 2.4, image / 12.92)
    matrix = image.new_tensor(_RGB_TO_XYZ) / image.new_tensor(_D65_WHITE).unsqueeze(1)
    xyz = torch.einsum("xc,bchw->bxhw", matrix, linear)
    cube_root = xyz.clamp(min=0) ** (1 / 3)
    x, y, z = torch.where(xyz > (6 / 29) ** 3, cube_root, xyz * (29 / 6) ** 2 / 3 + 4 / 29).unbind(1)
    return torch.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), dim=1)


def ciede2000(lab1: Tensor, lab2: Tensor) -> Tensor:
    """CIEDE2000 (kL = kC = kH = 1) of two CIELAB tensors (B, 3, H, W) -> (B, H, W), per pixel.

    Sharma, Wu and Dalal, "The CIEDE2000 color-difference formula", 2005: their names and equation numbers.
    """
    (l1_, a1, b1), (l2_, a2, b2) = lab1.unbind(1), lab2.unbind(1)
    g = 0.5 * (1 - _chroma_weight((torch.hypot(a1, b1) + torch.hypot(a2, b2)) / 2))  # (4)
    a1, a2 = (1 + g) * a1, (1 + g) * a2  # (5)
    c1, c2 = torch.hypot(a1, b1), torch.hypot(a2, b2)  # (6)
    h1, h2 = torch.atan2(b1, a1) % (2 * math.pi), torch.atan2(b2, a2) % (2 * math.pi)  # (7), in radians

    turn = h2 - h1
    turn = torch.where(turn.abs() > math.pi, turn - 2 * math.pi * turn.sign(), turn)  # (10)
    delta_l, delta_c, delta_h = l2_ - l1_, c2 - c1, 2 * (c1 * c2).sqrt() * torch.sin(turn / 2)  # (8), (9), (11)

    l_mean, c_mean = (l1_ + l2_) / 2, (c1 + c2) / 2  # (12), (13)
    # (14): the mean hue lies on the shorter arc; where one chroma is 0 it is the other's hue.
    h_mean = torch.where(c1 == 0, h2, torch.where(c2 == 0, h1, h1 + turn / 2))
    t = (
        1  # (15)
        - 0.17 * torch.cos(h_mean - math.radians(30))
        + 0.24 * torch.cos(2 * h_mean)
        + 0.32 * torch.cos(3 * h_mean + math.radians(6))
        - 0.20 * torch.cos(4 * h_mean - math.radians(63))
    )
    theta = math.radians(30) * torch.exp(-(((torch.rad2deg(h_mean) % 360 - 275) / 25) ** 2))  # (16)
    s_l = 1 + 0.015 * (l_mean - 50) ** 2 / torch.sqrt(20 + (l_mean - 50) ** 2)  # (18)
    s_c, s_h = 1 + 0.045 * c_mean, 1 + 0.015 * c_mean * t  # (19), (20)
    r_t = -2 * torch.sin(2 * theta) * _chroma_weight(c_mean)  # (17), (21)
    dl, dc, dh = delta_l / s_l, delta_c / s_c, delta_h / s_h
    return (dl * dl + dc * dc + dh * dh + r_t * dc * dh).clamp(min=0).sqrt()  # (22)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half width of its 95% confidence interval by Student's t with n - 1 degrees of freedom.

    One value gives a half width of nan (nothing is known about the spread). Raises UserError for no values.
    """
    n = len(values)
    if n == 0:
        raise UserError("mean_interval: expected at least one value, got none")
    mean = math.fsum(values) / n
    if n == 1 or not math.isfinite(mean):
        return mean, math.nan
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    return mean, _t_quantile(n - 1) * deviation / math.sqrt(n)


def checked(name: str, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32, or float64 where one is. UserError, in the name of a metric, unless they are two batches of images."""
    if prediction.shape != target.shape or target.ndim != 4 or target.shape[1] != 3 or target.numel() == 0:
        shapes = f"{list(prediction.shape)} and {list(target.shape)}"
        raise UserError(f"{name}: prediction and target must both be [B, 3, H, W], got {shapes}")
    if not (prediction.is_floating_point() and target.is_floating_point()):
        raise UserError(f"{name}: expected floating-point images in [0, 1], got {prediction.dtype} and {target.dtype}")
    dtype = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    return prediction.to(dtype), target.to(dtype)


def _bands(height: int, width: int, overlap: int = 0) -> Iterator[slice]:
    """Row slices that cover an image; each reaches `overlap` rows into the next."""
    step = max(1, _BAND_PIXELS // width)
    return (slice(top, top + step + overlap) for top in range(0, height - overlap, step))


def _chroma_weight(chroma: Tensor) -> Tensor:
    seventh = chroma**7
    return torch.sqrt(seventh / (seventh + 25.0**7))


def _t_quantile(df: int) -> float:
    """The t that a Student variable with df degrees of freedom stays within, either side, 95% of the time."""

    def inside(theta: float) -> float:  # Abramowitz and Stegun 26.7.3 and 26.7.4, t = sqrt(df) tan(theta)
        odd = df % 2
        term, total = math.cos(theta) if odd else 1.0, 0.0
        for k in range(1 + odd, df, 2):
            total += term
            term *= math.cos(theta) ** 2 * k / (k + 1)
        total *= math.sin(theta)
        return (theta + total) * 2 / math.pi if odd else total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < 0.95 else (low, middle)
    return math.sqrt(df) * math.tan(low)
