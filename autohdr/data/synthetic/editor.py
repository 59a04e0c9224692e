"""The third stage: what a retoucher makes of the same light, each to a taste of their own around one look."""

import numpy as np

from autohdr.data.images import from_float
from autohdr.data.synthetic.look import TARGET, TARGET_OUTDOORS, draw_luma, pin
from autohdr.data.synthetic.pixels import encode, fuse, heights, levels_of, luma, surround
from autohdr.data.synthetic.scene import Scene
from autohdr.data.synthetic.textures import Array, Rng

_MIDDLE = np.float32(0.33)  # the linear luma that a room's light is brought to before exposures are fused


def edit(rng: Rng, scene: Scene) -> Array:
    """The edit (H, W, 3), uint8, sRGB: window pulled, light evened, exposures fused, ceiling lightened and floor darkened, white
    walls, luma where clients want it."""
    x = scene.radiance.astype(np.float32)
    outside = scene.outside.astype(np.float32)
    even, view, saturation = rng.uniform(0.0, 0.3), rng.uniform(0.5, 1.0), rng.normal(1.14, 0.1)
    look = TARGET_OUTDOORS if scene.exterior else TARGET
    levels, walls = draw_luma(rng, look, scene.tones), rng.normal(look.walls, look.walls_sd)
    tilt = np.float32(rng.normal(look.tilt, look.tilt_sd))
    y = luma(x)
    indoors = outside < 0.5
    gain = _MIDDLE / np.exp(np.log(y[indoors] + 1e-5).mean()) if indoors.any() else 1.0
    pull = np.minimum(view / (y[~indoors].mean() + 1e-5), gain) if (~indoors).any() else gain
    daylight = np.array([0.97, 1.0, 1.03])
    inside_gain, outside_gain = (np.log(g).astype(np.float32) for g in (gain / scene.neutral, pull / daylight))
    x = x * np.exp(inside_gain + (outside_gain - inside_gain) * outside[..., None])
    y = np.maximum(luma(x), 1e-4)
    level = surround(np.log(np.clip(y, 0.02, 2)), levels_of(y.shape))
    evened = y * np.exp(np.float32(even) * (np.log(_MIDDLE) - level))
    fused = np.clip(fuse([encode(evened * np.float32(2.0**stop)) for stop in (-1.2, 0, 0.8)]), 1e-3, 1)
    fused = fused + tilt * heights(len(fused)) * fused * (1 - fused)
    vivid = np.float32(saturation) * np.array([1.06, 1, 0.92], np.float32)  # yellow is what clients see first
    colour = np.maximum(1 + (x / y[..., None] - 1) * vivid, 0)  # ratios in linear light
    ratio = colour ** np.float32(1 / 2.4)
    return from_float(pin(ratio * (fused / luma(ratio))[..., None], look, levels, walls))
