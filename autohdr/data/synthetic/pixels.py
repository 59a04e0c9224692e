"""Arithmetic on pictures (H, W, 3) and their luma (H, W): sRGB, CIELAB, pyramids, exposure fusion, monotone curves."""

from functools import reduce

import numpy as np

from autohdr.data.synthetic.textures import Array

# linear sRGB to XYZ over the white of D65 (IEC 61966-2-1)
_XYZ = np.array([[0.43395, 0.37622, 0.18984], [0.21267, 0.71515, 0.07218], [0.01776, 0.10948, 0.87277]], np.float32)
_RGB = np.linalg.inv(_XYZ)

_TABLE = 8192


def encode(x: Array) -> Array:
    """Linear light to sRGB, both clipped to [0, 1]."""
    x = np.clip(x, 0, 1)
    return np.where(x <= 0.0031308, 12.92 * x, 1.055 * np.maximum(x, 1e-6) ** np.float32(1 / 2.4) - 0.055).astype(np.float32)


def decode(x: Array) -> Array:
    """sRGB of at least 0 to linear light."""
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** np.float32(2.4)).astype(np.float32)


def luma(x: Array) -> Array:
    """Rec. 709 weights of (..., 3), whether x is linear or encoded."""
    return x[..., 0] * np.float32(0.2126) + x[..., 1] * np.float32(0.7152) + x[..., 2] * np.float32(0.0722)


def heights(rows: int) -> Array:
    """How high up each row of a picture is, (rows, 1): from 1 at its upper edge evenly to -1 at the lower one."""
    return 1 - (2 * np.arange(rows, dtype=np.float32)[:, None] + 1) / np.float32(rows)


def to_lab(x: Array) -> Array:
    """CIELAB (..., 3) of sRGB (..., 3) in [0, 1], white D65."""
    light = decode(x)
    xyz = [light[..., 0] * row[0] + light[..., 1] * row[1] + light[..., 2] * row[2] for row in _XYZ]
    a, b, c = (np.where(t > 0.008856, np.cbrt(t), t * np.float32(7.787) + np.float32(16 / 116)) for t in xyz)
    return np.stack([116 * b - 16, 500 * (a - b), 200 * (b - c)], -1)


def from_lab(lab: Array) -> Array:
    """The sRGB colour (3,) of one CIELAB colour (3,)."""
    middle = (lab[0] + 16) / 116
    f = np.array([middle + lab[1] / 500, middle, middle - lab[2] / 200])
    return encode(_RGB @ np.where(f > 6 / 29, f**3, (f - 16 / 116) / 7.787))


def blur(x: Array) -> Array:
    """5-tap binomial blur of (H, W, ...) along both image axes."""
    for axis in (0, 1):
        pad = [(2, 2) if k == axis else (0, 0) for k in range(x.ndim)]
        y, n = np.pad(x, pad, mode="edge"), x.shape[axis]
        a, b, c, d, e = (y[(slice(None),) * axis + (slice(k, k + n),)] for k in range(5))
        x = (a + e) * np.float32(0.0625) + (b + d) * np.float32(0.25) + c * np.float32(0.375)
    return x


def expand(x: Array, shape: tuple[int, ...]) -> Array:
    """Twice as many rows and columns, of which the first shape[0] and shape[1] remain."""
    return blur(np.repeat(np.repeat(x, 2, 0), 2, 1)[: shape[0], : shape[1]])


def gaussian_pyramid(x: Array, levels: int) -> list[Array]:
    """x (H, W, ...) and `levels` pictures of half the size each."""
    out = [x]
    for _ in range(levels):
        out.append(blur(out[-1])[::2, ::2])
    return out


def levels_of(shape: tuple[int, ...]) -> int:
    """How often a picture can be halved until its shorter side has 4 to 8 pixels."""
    return max(1, int(np.log2(min(shape[:2]))) - 2)


def surround(x: Array, levels: int) -> Array:
    """x (H, W, ...) without detail finer than 2**levels pixels."""
    steps = gaussian_pyramid(x, levels)
    return reduce(lambda coarse, finer: expand(coarse, finer.shape), reversed(steps[:-1]), steps[-1])


def fuse(frames: list[Array]) -> Array:
    """Exposure fusion of (H, W) frames, weighted by how well each pixel is exposed (Mertens et al., 2007)."""
    levels = levels_of(frames[0].shape)
    weights = [np.exp(-((f - 0.58) ** 2) / np.float32(2 * 0.2**2)) + np.float32(1e-4) for f in frames]
    total = sum(weights)
    pyramids = []
    for frame, weight in zip(frames, weights, strict=True):
        steps = gaussian_pyramid(frame, levels)
        masks = gaussian_pyramid(weight / total, levels)
        laplace = [a - expand(b, a.shape) for a, b in zip(steps, steps[1:], strict=False)] + [steps[-1]]
        pyramids.append([a * b for a, b in zip(laplace, masks, strict=True)])
    bands = [reduce(np.add, band) for band in zip(*pyramids, strict=True)]
    return reduce(lambda coarse, band: expand(coarse, band.shape) + band, reversed(bands[:-1]), bands[-1])


def curve(x: Array, knots: Array, values: Array) -> Array:
    """The smooth rising curve through (knots, values), both rising, at x: a monotone cubic (Fritsch and Butland, 1984)."""
    width, slope = np.diff(knots), np.diff(values) / np.diff(knots)
    tangent = np.concatenate([slope[:1], 2 * slope[1:] * slope[:-1] / (slope[1:] + slope[:-1]), slope[-1:]])
    grid = np.linspace(knots[0], knots[-1], _TABLE)
    k = np.clip(np.searchsorted(knots, grid, side="right") - 1, 0, len(width) - 1)
    h, t = width[k], (grid - knots[k]) / width[k]
    cubic = values[k] * (1 + 2 * t) * (1 - t) ** 2 + values[k + 1] * t * t * (3 - 2 * t)
    cubic += h * t * (1 - t) * (tangent[k] * (1 - t) - tangent[k + 1] * t)
    scale = np.float32((_TABLE - 1) / (knots[-1] - knots[0]))  # read off a table finer than 8 bits: no arithmetic per pixel
    return cubic.astype(np.float32)[np.clip((x - np.float32(knots[0])) * scale + 0.5, 0, _TABLE - 1).astype(np.int32)]
