"""Surfaces: the colour they have where, made of noise and lines."""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

Array = np.ndarray
Texture = Callable[[Array, Array, Array], Array]  # (u, v, footprint), each (N,) in metres -> albedo (3, N)
Rng = np.random.Generator


def _hash(i: Array, j: Array, seed: int) -> Array:
    """Lattice coordinates (any float integers) to uniform [0, 1)."""
    h = i.astype(np.int32).view(np.uint32) * np.uint32(374761393) + np.uint32(seed * 2654435761 & 0xFFFFFFFF)
    h = h + j.astype(np.int32).view(np.uint32) * np.uint32(668265263)
    h = (h ^ (h >> np.uint32(13))) * np.uint32(1274126177)
    return ((h ^ (h >> np.uint32(16))) >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


def noise(x: Array, y: Array, seed: int, octaves: int = 1) -> Array:
    """Value noise in [0, 1], mean 0.5; each octave has half the size and half the weight."""
    total = np.zeros_like(x)
    for octave in range(octaves):
        i, j = np.floor(x), np.floor(y)
        a, b = x - i, y - j
        a, b = a * a * (3 - 2 * a), b * b * (3 - 2 * b)
        s = seed + octave
        low = _hash(i, j, s) * (1 - a) + _hash(i + 1, j, s) * a
        high = _hash(i, j + 1, s) * (1 - a) + _hash(i + 1, j + 1, s) * a
        total += (low * (1 - b) + high * b) * np.float32(0.5**octave)
        x, y = x * 2, y * 2
    return total / np.float32(2 - 0.5 ** (octaves - 1))


def line(distance: Array, width: float, foot: Array) -> Array:
    """Coverage of a line of that width, filtered over the pixel's footprint so that distant lines fade and don't alias."""
    return np.clip((0.5 * (width + foot) - np.abs(distance)) / foot, 0, np.minimum(1, width / foot))


def tint(colour: ArrayLike, value: Array) -> Array:
    return np.asarray(colour, np.float32)[:, None] * value


def mix(a: ArrayLike, b: ArrayLike, weight: Array) -> Array:
    """Blend two albedos, each (3,) or (3, N), by a weight (N,)."""
    first, second = (np.asarray(c, np.float32).reshape(3, -1) for c in (a, b))
    return first + (second - first) * weight


def step(x: Array, sharpness: float = 150.0) -> Array:
    """0 below zero to 1 above, over about 1 / sharpness."""
    return np.clip(x * np.float32(sharpness) + np.float32(0.5), 0, 1)


def draw_seed(rng: Rng) -> int:
    return int(rng.integers(1 << 30))


def plain(colour: ArrayLike) -> Texture:
    return lambda u, v, foot: tint(colour, np.ones_like(u))


def grained(colour: ArrayLike, seed: int, scale: float = 3.0, depth: float = 0.12) -> Texture:
    """Paint, plaster, fabric, stone: one colour, mottled at one scale (cells per metre)."""

    def texture(u: Array, v: Array, foot: Array) -> Array:
        fade = np.clip(1 / (foot * scale * 2), 0, 1)
        return tint(colour, 1 + depth * fade * (2 * noise(u * scale, v * scale, seed, 2) - 1))

    return texture


def woven(rng: Rng, colour: ArrayLike, other: ArrayLike) -> Texture:
    """Cloth with a pattern of a second colour: stripes, checks, dots or a blotted print."""
    kind, pitch, share, seed = rng.integers(4), rng.uniform(0.03, 0.14), rng.uniform(0.25, 0.5), draw_seed(rng)

    def texture(u: Array, v: Array, foot: Array) -> Array:
        a, b = np.abs(u / pitch % 1 - 0.5) * 2, np.abs(v / pitch % 1 - 0.5) * 2
        blur = np.clip(4 * foot / pitch, 0.02, 8)
        if kind == 0:
            pattern = np.clip((share - a) / blur + 0.5, 0, 1)
        elif kind == 1:
            pattern = (np.clip((share - a) / blur + 0.5, 0, 1) + np.clip((share - b) / blur + 0.5, 0, 1)) / 2
        elif kind == 2:
            pattern = np.clip((share * 1.6 - np.hypot(a, b)) / blur + 0.5, 0, 1)
        else:
            pattern = np.clip((noise(u / pitch, v / pitch, seed, 2) - 0.5) * 8 / np.maximum(blur, 1) + 0.5, 0, 1)
        fade = np.clip(1 - foot / pitch, 0, 1)
        pattern = share + (pattern - share) * fade  # too small to be seen: one colour
        weave = 1 + 0.3 * np.clip(0.006 / foot, 0, 1) * (2 * noise(u * 90, v * 90, seed + 1, 2) - 1)
        return mix(colour, other, pattern) * weave

    return texture


def wood_grain(colour: ArrayLike, seed: int, along_u: bool = True) -> Texture:
    def texture(u: Array, v: Array, foot: Array) -> Array:
        a, b = (u, v) if along_u else (v, u)
        warp = noise(a * 1.5, b * 6, seed)
        rings = noise(a * 1.2, b * 40 + warp * 8, seed + 1, 2)
        return tint(colour, 0.78 + 0.44 * rings)

    return texture


def planks(rng: Rng, colour: ArrayLike) -> Texture:
    width, length, seed, spread = rng.uniform(0.08, 0.2), rng.uniform(0.9, 1.8), draw_seed(rng), rng.uniform(0.15, 0.5)
    turned = rng.random() < 0.4

    def texture(u: Array, v: Array, foot: Array) -> Array:
        if turned:
            u, v = v, u
        row = np.floor(u / width)
        shift = v / length + _hash(row, row, seed) * 5
        board = np.floor(shift)
        tone = 1 + spread * (_hash(row, board, seed + 1) - 0.5)
        fade = np.clip(0.012 / foot, 0.15, 1)
        grain = 1 + 0.45 * fade * (noise(u * 70, v * 3 + 17 * tone, seed + 2, 2) - 0.5)
        gap = line((u / width - row - 0.5) * width - width / 2, 0.004, foot) + line((shift - board) * length, 0.004, foot)
        gap += line((u / width - row - 0.5) * width + width / 2, 0.004, foot)
        return tint(colour, tone * grain * (1 - 0.6 * np.minimum(gap, 1)))

    return texture


def tiles(rng: Rng, colour: ArrayLike, size: float, second: ArrayLike | None = None, stagger: float = 0.0) -> Texture:
    """Square tiles, or bricks twice as long when staggered; `second` makes a chequerboard."""
    seed, grout, aspect = draw_seed(rng), rng.uniform(0.45, 0.8), 2.0 if stagger else 1.0
    diagonal = not stagger and rng.random() < 0.3
    joint = 0.012 if stagger else 0.008

    def texture(u: Array, v: Array, foot: Array) -> Array:
        if diagonal:
            u, v = (u + v) * 0.7071, (u - v) * 0.7071
        b = v / size
        row = np.floor(b)
        a = u / (size * aspect) + stagger * row
        col = np.floor(a)
        tone = 0.9 + 0.2 * _hash(col, row, seed)
        vein = 1 + 0.25 * (noise(u * 7, v * 7, seed + 1, 3) - 0.5)
        base = np.asarray(colour, np.float32)[:, None]
        if second is not None:
            base = np.where(((col + row) % 2 > 0), np.asarray(second, np.float32)[:, None], base)
        edge_a = (np.abs(a - col - 0.5) - 0.5) * size * aspect
        edge_b = (np.abs(b - row - 0.5) - 0.5) * size
        seam = np.minimum(line(edge_a, joint, foot) + line(edge_b, joint, foot), 1)
        return base * (tone * vein * (1 - (1 - grout) * seam))

    return texture


def carpet(rng: Rng, colour: ArrayLike) -> Texture:
    seed = draw_seed(rng)

    def texture(u: Array, v: Array, foot: Array) -> Array:
        fine = (noise(u * 110, v * 110, seed) - 0.5) * np.clip(0.01 / foot, 0.15, 1)
        return tint(colour, 1 + 0.7 * fine + 0.22 * (noise(u * 2.5, v * 2.5, seed + 1, 3) - 0.5))

    return texture


def wallpaper(rng: Rng, colour: Array) -> Texture:
    kind, pitch, seed = rng.integers(3), rng.uniform(0.18, 0.4), draw_seed(rng)
    other = np.clip(colour * rng.uniform(0.72, 0.9) * rng.uniform(0.9, 1.1, 3), 0, 0.85)

    def texture(u: Array, v: Array, foot: Array) -> Array:
        a, b = u / pitch, v / pitch
        if kind == 0:
            pattern = np.clip((np.abs(a % 1 - 0.5) - 0.25) * pitch / foot + 0.5, 0, 1)
        elif kind == 1:
            wave = np.cos(2 * np.pi * a) + np.cos(2 * np.pi * (b + 0.5 * (np.floor(a) % 2)))
            pattern = np.clip((wave - 0.8) * 3, 0, 1)
        else:
            pattern = np.clip((np.abs((a + b) % 1 - 0.5) * np.abs((a - b) % 1 - 0.5) - 0.05) * 20, 0, 1)
        return mix(colour, other, pattern) * (1 + 0.05 * (noise(u * 30, v * 30, seed) - 0.5))

    return texture


def boards(colour: ArrayLike, pitch: float) -> Texture:
    """Painted panelling or beadboard: vertical grooves."""
    return lambda u, v, foot: tint(colour, 1 - 0.35 * line((u / pitch % 1 - 0.5) * pitch, 0.012, foot))


def rug(rng: Rng, half_u: float, half_v: float, palette: list[Array]) -> Texture:
    seed, medallion, fold = draw_seed(rng), rng.random() < 0.6, rng.uniform(4, 9)
    a, b, c = (palette[k] for k in rng.permutation(len(palette))[:3])

    def texture(u: Array, v: Array, foot: Array) -> Array:
        margin = np.minimum(half_u - np.abs(u), half_v - np.abs(v))
        if medallion:
            r = np.hypot(u / half_u, v / half_v)
            figure = np.cos(fold * np.arctan2(np.abs(v), np.abs(u))) * 0.12 + r
            field_ = np.clip(np.cos(figure * 14) * 4 * np.clip(0.06 / foot, 0, 1) + 0.3, 0, 1)
        else:
            field_ = np.clip(np.cos((np.abs(u) + np.abs(v)) * fold * 4) * 4 * np.clip(0.06 / foot, 0, 1) + 0.5, 0, 1)
        out = mix(mix(a, b, field_), c, ((margin > 0.08) & (margin < 0.16)).astype(np.float32))
        out = mix(out, a, (margin < 0.04).astype(np.float32))
        return out * (1 + 0.5 * np.clip(0.012 / foot, 0.1, 1) * (noise(u * 90, v * 90, seed) - 0.5))

    return texture


def art(rng: Rng, half_u: float, half_v: float) -> Texture:
    """A framed picture: mount, then a landscape or an abstract of flat noise-shaped areas."""
    seed, landscape, mount = draw_seed(rng), rng.random() < 0.5, rng.uniform(0.0, 0.09)
    colours = (rng.uniform(0.05, 0.7, (4, 1)) * rng.uniform(0.5, 1.1, (4, 3))).astype(np.float32)

    def texture(u: Array, v: Array, foot: Array) -> Array:
        x, y = u / half_u, v / half_v
        n = noise(x * 2 + 9, y * 2 + 9, seed, 3)
        if landscape:
            height = y + 0.8 * (noise(x * 2, x * 0, seed + 3, 3) - 0.5)
            out = mix(mix(colours[0], [0.6, 0.7, 0.85], np.clip(y + n, 0, 1)), colours[1], (height < 0.1).astype(np.float32))
            out = mix(out, colours[2] * 0.6, (height < -0.35).astype(np.float32)) * (0.7 + 0.6 * n)
        else:
            out = mix(mix(colours[0], colours[1], (n > 0.45).astype(np.float32)), colours[2], (n > 0.58).astype(np.float32))
            out = mix(out, colours[3], (noise(x + 3, y * 3, seed + 5) > 0.7).astype(np.float32))
        inside = np.minimum(half_u - np.abs(u), half_v - np.abs(v)) > mount
        return mix([0.8, 0.79, 0.76], out, inside.astype(np.float32))

    return texture


def book_spines(rng: Rng, width: float, height: float) -> Texture:
    count = max(4, int(width / 0.035))
    edges = np.cumsum(rng.uniform(0.5, 1.5, count))
    edges = (edges / edges[-1] * width - width / 2).astype(np.float32)
    colours = (rng.uniform(0.03, 0.5, (count, 1)) * rng.uniform(0.4, 1.4, (count, 3))).astype(np.float32).clip(0.02, 0.75)
    tops = (rng.uniform(0.62, 0.98, count) - 0.5).astype(np.float32) * height

    def texture(u: Array, v: Array, foot: Array) -> Array:
        k = np.minimum(np.searchsorted(edges, u), count - 1)
        shade = (v < tops[k]) * (1 - 0.5 * line(u - edges[k], 0.006, foot)) + 0.04
        band = 1 + 0.6 * ((v / height + 0.5 > 0.55) & (v / height + 0.5 < 0.6))
        return colours[k].T * (shade * band)

    return texture
