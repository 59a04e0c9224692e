"""What is to be seen through the windows."""

from collections.abc import Callable

import numpy as np

from autohdr.data.synthetic.textures import Array, Rng, draw_seed, line, mix, noise, step, tint


def outside(rng: Rng, evening: bool) -> Callable[[Array], Array]:
    """The view: sky with clouds over hills, trees, houses and a lawn, as a function of direction (3, N) -> radiance (3, N).

    In the evening all of it is dim and blue, but for the sky's glow low down and the houses' windows.
    """
    seed, haze, cover, trees = draw_seed(rng), rng.uniform(0.3, 0.8), rng.uniform(0.2, 0.7), rng.uniform(0.02, 0.22)
    blue = np.array([0.38, 0.57, 0.95]) * rng.uniform(0.9, 1.3)
    leaf = np.array([0.16, 0.2, 0.085]) * rng.uniform(0.8, 1.5)
    grass = np.array([0.18, 0.21, 0.085]) * rng.uniform(0.8, 1.5)
    light = rng.uniform(0.02, 0.15)
    dusk, glow = np.array([0.55, 0.75, 1.25]) * light, np.array([1.3, 0.85, 0.8]) * light
    houses = []
    for a in np.linspace(-np.pi, np.pi, 9)[:-1]:
        colour = rng.uniform(0.4, 0.8) * rng.uniform(0.85, 1.0, 3)
        houses.append((a + rng.uniform(-0.2, 0.2), rng.uniform(0.14, 0.26), rng.uniform(0.05, 0.12), colour))

    def foliage(around: Array, rise: Array, scale: float) -> Array:
        clumps, leaves = (noise(around * scale, rise * scale, seed + 40, 2), noise(around * 70, rise * 70, seed + 45, 3))
        return tint(leaf, 0.3 + 0.7 * clumps + 1.2 * leaves * leaves) * mix([1, 1, 1], [1.5, 1.1, 0.7], clumps)

    def radiance(d: Array) -> Array:
        around, flat = np.arctan2(d[1], d[0]), np.hypot(d[0], d[1]) + np.float32(1e-6)
        rise = d[2] / flat
        foot = np.full_like(rise, 0.004)
        up = np.clip(rise, 0, 3)
        clouds = np.clip((noise(around * 3, up * 9, seed, 4) - 1 + cover) * 3, 0, 1)
        out = mix(mix([0.95, 1.0, 1.08], blue, np.clip(up * 1.6, 0, 1) * haze), [1.25, 1.25, 1.28], clouds)
        hills = 0.02 + 0.06 * noise(around * 2, around * 0, seed + 9, 3)
        out = mix(out, [0.3, 0.38, 0.42], step(hills - rise))
        crowns = 0.65 * noise(around * 5, around * 0, seed + 20, 2) + 0.35 * noise(around * 45, rise * 45, seed + 30, 2)
        out = mix(out, foliage(around, rise, 14), step(trees * (crowns * 2.6 - 0.7) - rise))
        for centre, half, height, colour in houses:
            x = (around - centre + np.pi) % (2 * np.pi) - np.pi
            if not (np.abs(x) < half * 1.1).any():
                continue
            across, storey = x / half, rise / height
            siding = 1 - 0.2 * line((rise * 120 % 1 - 0.5) / 120, 0.002, foot)
            pane = np.maximum(np.abs(across * 2 % 1 - 0.5) / 0.16, np.abs(storey - 0.35) / 0.35)
            glass = [4.0, 2.6, 1.2] if evening else [0.1, 0.12, 0.15]
            wall = mix(mix(tint(colour * 0.9, siding), [0.85] * 3, step(1.25 - pane, 8)), glass, step(1 - pane, 8))
            out = mix(out, wall, step(np.minimum(half - np.abs(x), height - rise)))
            slope = height + 0.07 * np.clip(1.6 * (1.1 - np.abs(across)), 0, 1)
            roof = np.minimum(np.minimum(rise - height, slope - rise), 1.1 * half - np.abs(x))
            out = mix(out, tint(colour * [0.3, 0.24, 0.22], 0.8 + 0.4 * noise(around * 90, rise * 200, seed)), step(roof))
        far = 1.5 / np.maximum(-rise, 0.02)
        x, y = far * np.cos(around), far * np.sin(around)
        lawn = tint(
            grass, 0.65 + 0.4 * noise(x * 0.6, y * 0.6, seed + 50, 2) + 0.3 * noise(around * 60, rise * 150, seed + 51, 2)
        )
        path = (x * np.cos(seed) + y * np.sin(seed) + noise(y * 0.3, x * 0.3, seed)) % 9 - 4.5
        out = mix(out, mix(lawn, [0.5, 0.48, 0.45], step(0.7 - np.abs(path), 8)), step(-0.03 - rise))
        hedge = -0.11 + 0.16 * noise(around * 6, around * 0, seed + 60, 4)
        shade = np.clip(1.1 - 4 * (hedge - rise), 0.3, 1)
        out = mix(out, foliage(around, rise, 22) * shade, step(np.minimum(hedge - rise, rise + 0.25)))
        return (out * mix(dusk, glow, np.exp(-4 * up)) if evening else out).astype(np.float32)

    return radiance
