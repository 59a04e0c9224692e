"""The second stage: what a camera makes of a scene, one exposure or several merged, before anybody edits it."""

import io

import numpy as np
from PIL import Image

from autohdr.data.images import from_float
from autohdr.data.synthetic.look import SOURCE, SOURCE_OUTDOORS, draw_luma, pin
from autohdr.data.synthetic.pixels import encode, levels_of, luma, surround
from autohdr.data.synthetic.scene import Scene
from autohdr.data.synthetic.textures import Array, Rng


def photograph(rng: Rng, scene: Scene) -> Array:
    """The photo (H, W, 3), uint8, sRGB, after JPEG: real lens, light that isn't one colour, brackets merged, no clipped white."""
    h, w = scene.radiance.shape[:2]
    x = scene.radiance.astype(np.float32) / scene.neutral
    x = x + rng.uniform(0.003, 0.03) * surround(x, levels_of(x.shape) - 1)  # the lens spreads some light over all of it
    across, down = np.meshgrid(np.linspace(-1, 1, w, dtype=np.float32), np.linspace(-1, 1, h, dtype=np.float32))
    x *= (1 - rng.uniform(0, 0.28) * ((across * across + down * down) / 2))[..., None]
    mixed = 0.02 if scene.exterior else 0.09
    lean, turn = rng.normal(0, mixed, 3).astype(np.float32), rng.uniform(0, 2 * np.pi)  # other light from one side
    lean -= lean.mean()
    x *= np.exp((across * np.float32(np.cos(turn)) + down * np.float32(np.sin(turn)))[..., None] * lean)
    look = SOURCE_OUTDOORS if scene.exterior else SOURCE
    levels = draw_luma(rng, look, scene.tones)
    cast = rng.normal(look.walls, look.walls_sd)
    x = np.maximum(x + _noise(rng, x), 0)
    x = merge(x, rng.uniform(0.1, 0.6))
    shoulder, toe = rng.uniform(0.4, 1.2), rng.uniform(0.95, 1.2)

    def response(value: Array) -> Array:
        return encode((value * (1 + value * 0.004) / (1 + shoulder * value)) ** toe)

    bright = np.percentile(luma(x[::2, ::2]), 75)
    gains = np.geomspace(1e-2, 1e2, 400)
    x *= np.float32(np.interp(levels[4], response(gains), gains) / bright)
    y = luma(x)[..., None]
    x = np.maximum(y + (x - y) * np.float32(rng.normal(1.42, 0.12)), 0)
    picture = pin(response(x), look, levels, cast)
    stream = io.BytesIO()
    Image.fromarray(from_float(picture)).save(stream, "JPEG", quality=int(rng.integers(84, 97)))
    return np.asarray(Image.open(stream).convert("RGB"))


def merge(x: Array, amount: float) -> Array:
    """Linear (H, W, 3) with the range of its large areas narrowed, as by merged brackets: to the power 1 - amount."""
    log = np.log(np.maximum(luma(x), 1e-4))
    base = surround(log, levels_of(log.shape) - 1)
    return x * np.exp(np.float32(-amount) * (base - np.median(base)))[..., None]


def _noise(rng: Rng, x: Array) -> Array:
    """Shot and read noise."""
    return np.sqrt(x * rng.uniform(1e-4, 9e-4) + rng.uniform(1e-7, 4e-6)) * rng.standard_normal(x.shape, dtype=np.float32)
