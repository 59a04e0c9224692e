"""The linear picture developed in two ways: as a camera would, and as a retoucher would."""

import io
from collections.abc import Callable
from functools import reduce

import numpy as np
from PIL import Image

from autohdr.data.synthetic.textures import Array, Rng

_EVEN = np.float32(0.4)  # how much of the unevenness of the light the editor takes out


def _encode(x: Array) -> Array:
    """Linear light in [0, 1] to sRGB."""
    x = np.clip(x, 0, 1)
    return np.where(x <= 0.0031308, 12.92 * x, 1.055 * np.maximum(x, 1e-6) ** np.float32(1 / 2.4) - 0.055).astype(np.float32)


def _luma(x: Array) -> Array:
    return x[..., 0] * np.float32(0.2126) + x[..., 1] * np.float32(0.7152) + x[..., 2] * np.float32(0.0722)


def _blur(x: Array) -> Array:
    """5-tap binomial blur of (H, W, ...) along both image axes."""
    for axis in (0, 1):
        pad = [(2, 2) if k == axis else (0, 0) for k in range(x.ndim)]
        y, n = np.pad(x, pad, mode="edge"), x.shape[axis]
        a, b, c, d, e = (np.take(y, np.arange(k, k + n), axis) for k in range(5))
        x = (a + e) * np.float32(0.0625) + (b + d) * np.float32(0.25) + c * np.float32(0.375)
    return x


def _expand(x: Array, shape: tuple[int, ...]) -> Array:
    return _blur(np.repeat(np.repeat(x, 2, 0), 2, 1)[: shape[0], : shape[1]])


def _gaussian_pyramid(x: Array, levels: int) -> list[Array]:
    out = [x]
    for _ in range(levels):
        out.append(_blur(out[-1])[::2, ::2])
    return out


def _levels(height: int, width: int) -> int:
    return max(1, int(np.log2(min(height, width))) - 2)


def _solve_gain(picture: Callable[[float], Array], mean: float, low: float, high: float) -> float:
    """The gain in [low, high] at which the mean luma of picture(gain), which grows with it, is `mean`."""
    for _ in range(12):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if float(picture(middle).mean()) > mean else (middle, high)
    return (low * high) ** 0.5


def photograph(rng: Rng, scene: Array, neutral: Array) -> Array:
    """One exposure for the windows, on a warm or cool white balance, through a real lens, sensor, tone curve and JPEG."""
    h, w = scene.shape[:2]
    warmth = np.clip(rng.normal(1.1, 1.0), -1.0, 2.8)
    cast = np.array([1 + 0.17 * warmth, 1 + 0.01 * warmth, 1 - 0.19 * warmth]) * np.exp(rng.normal(0, 0.025, 3))
    glare = scene
    for _ in range(_levels(h, w) - 1):
        glare = _blur(glare)[::2, ::2]
    while glare.shape[0] < h:
        glare = _expand(glare, (glare.shape[0] * 2, glare.shape[1] * 2))
    x = (scene + rng.uniform(0.005, 0.03) * glare[:h, :w]) * (cast / neutral).astype(np.float32)
    y, z = np.meshgrid(np.linspace(-1, 1, w), np.linspace(-1, 1, h))
    x *= (1 - rng.uniform(0.08, 0.32) * ((y * y + z * z) / 2))[..., None].astype(np.float32)
    shoulder, white, toe = rng.uniform(0.35, 0.9), rng.uniform(0.86, 1.0), rng.uniform(1.0, 1.25)

    def curve(value: Array) -> Array:
        return _encode((value * (1 + value * 0.004) / (1 + shoulder * value)) ** toe * white)

    small = x[::4, ::4]
    mean = np.clip(rng.normal(0.375, 0.065), 0.27, 0.46)
    x *= np.float32(_solve_gain(lambda g: _luma(curve(small * g)), mean, 1e-2, 1e3))
    noise = np.sqrt(x * rng.uniform(1e-4, 9e-4) + rng.uniform(1e-7, 4e-6)) * rng.standard_normal(x.shape, dtype=np.float32)
    stream = io.BytesIO()
    _to_image(curve(np.maximum(x + noise, 0))).save(stream, "JPEG", quality=int(rng.integers(84, 97)))
    return np.asarray(Image.open(stream).convert("RGB"))


def edit(scene: Array, outside: Array, neutral: Array) -> Array:
    """What the retoucher makes of the same light: neutral white, window pulled, light evened, exposures fused, clean contrast."""
    luma = _luma(scene)
    indoors = outside < 0.5
    gain = 0.33 / np.exp(np.log(luma[indoors] + 1e-5).mean()) if indoors.any() else 1.0
    pull = np.minimum(0.5 / (luma[~indoors].mean() + 1e-5), gain) if (~indoors).any() else gain
    daylight = np.array([0.97, 1.0, 1.03])
    inside_gain, outside_gain = (np.log(g).astype(np.float32) for g in (gain / neutral, pull / daylight))
    x = scene * np.exp(inside_gain + (outside_gain - inside_gain) * outside[..., None])
    y = np.maximum(_luma(x), 1e-4)
    base = _gaussian_pyramid(np.log(np.clip(y, 0.02, 2)), _levels(*y.shape))
    level = base[-1]
    for finer in reversed(base[:-1]):
        level = _expand(level, finer.shape)
    even = y * np.exp(_EVEN * (np.log(np.float32(0.33)) - level))
    fused = np.clip(_fuse([_encode(even * np.float32(2.0**stop)) for stop in (-1.6, 0, 1.4)]), 0, 1)
    low, high = np.percentile(fused[::2, ::2], (0.5, 98))
    low = min(0.75 * low, 0.1)
    fused = np.clip((fused - low) / (high - low) * 0.96, 1e-3, 1.2)
    mean = float(fused.mean())
    fused = fused ** np.float32(np.clip(np.log(0.59 + 0.4 * (mean - 0.59)) / np.log(mean), 0.5, 1.25))
    fused = np.where(fused > 0.9, 0.9 + 0.1 * np.tanh((fused - 0.9) * 10), fused)  # highlights roll off below white
    linear = np.where(fused <= 0.04045, fused / 12.92, ((fused + 0.055) / 1.055) ** np.float32(2.4))
    return np.asarray(_to_image(_encode(linear[..., None] * np.maximum(1 + (x / y[..., None] - 1) * np.float32(0.95), 0))))


def _fuse(frames: list[Array]) -> Array:
    """Mertens exposure fusion of (H, W) frames, weighted by how well each pixel is exposed."""
    levels = _levels(*frames[0].shape)
    weights = [np.exp(-((f - 0.58) ** 2) / np.float32(2 * 0.2**2)) + np.float32(1e-4) for f in frames]
    total = sum(weights)
    pyramids = []
    for frame, weight in zip(frames, weights, strict=True):
        steps = _gaussian_pyramid(frame, levels)
        masks = _gaussian_pyramid(weight / total, levels)
        laplace = [a - _expand(b, a.shape) for a, b in zip(steps, steps[1:], strict=False)] + [steps[-1]]
        pyramids.append([a * b for a, b in zip(laplace, masks, strict=True)])
    bands = [reduce(np.add, band) for band in zip(*pyramids, strict=True)]
    out = bands[-1]
    for band in reversed(bands[:-1]):
        out = _expand(out, band.shape) + band
    return out


def _to_image(x: Array) -> Image.Image:
    return Image.fromarray(np.round(np.clip(x, 0, 1) * 255).astype(np.uint8))
