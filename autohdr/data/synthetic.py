"""Procedural before/after pairs: rooms ray-cast in linear light, photographed by a camera, finished by an editor.

A seed makes a room (walls, openings, furniture, lamps, a view outside), the room makes one linear picture of high dynamic
range, and two hands develop that picture: `_photograph` as a camera would, `_edit` as a retoucher would. No file is read.

Coordinates are metres, x to the right, y away from the camera, z up. Points and directions are (3, N) float32 arrays. All
work on pixels is elementwise, without BLAS, so that the bits don't depend on the number of threads or workers.
"""

import io
import json
import os
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from autohdr.errors import UserError

Array = np.ndarray
Texture = Callable[[Array, Array, Array], Array]  # (u, v, footprint), each (N,) in metres -> albedo (3, N)
Rng = np.random.Generator

_WARM = np.array([1.25, 0.95, 0.55], np.float32)  # a 3000 K lamp beside daylight
_MIN_SIDE = 32
_EVEN = np.float32(0.4)  # how much of the unevenness of the light the editor takes out
_MIRROR = 2.0  # the gloss of one
_MARKER = "synth.json"


# ---------------------------------------------------------------------------------------------------------------- textures


def _hash(i: Array, j: Array, seed: int) -> Array:
    """Lattice coordinates (any float integers) to uniform [0, 1)."""
    h = i.astype(np.int32).view(np.uint32) * np.uint32(374761393) + np.uint32(seed * 2654435761 & 0xFFFFFFFF)
    h = h + j.astype(np.int32).view(np.uint32) * np.uint32(668265263)
    h = (h ^ (h >> np.uint32(13))) * np.uint32(1274126177)
    return ((h ^ (h >> np.uint32(16))) >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


def _noise(x: Array, y: Array, seed: int, octaves: int = 1) -> Array:
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


def _line(distance: Array, width: float, foot: Array) -> Array:
    """Coverage of a line of that width, filtered over the pixel's footprint so that distant lines fade and don't alias."""
    return np.clip((0.5 * (width + foot) - np.abs(distance)) / foot, 0, np.minimum(1, width / foot))


def _tint(colour: Array, value: Array) -> Array:
    return np.asarray(colour, np.float32)[:, None] * value


def _mix(a: Array, b: Array, weight: Array) -> Array:
    """Blend two albedos, each (3,) or (3, N), by a weight (N,)."""
    a, b = (np.asarray(c, np.float32).reshape(3, -1) for c in (a, b))
    return a + (b - a) * weight


def _step(x: Array, sharpness: float = 150.0) -> Array:
    """0 below zero to 1 above, over about 1 / sharpness."""
    return np.clip(x * np.float32(sharpness) + np.float32(0.5), 0, 1)


def _seed(rng: Rng) -> int:
    return int(rng.integers(1 << 30))


def _plain(colour: Array) -> Texture:
    return lambda u, v, foot: _tint(colour, np.ones_like(u))


def _grained(colour: Array, seed: int, scale: float = 3.0, depth: float = 0.12) -> Texture:
    """Paint, plaster, fabric, stone: one colour, mottled at one scale (cells per metre)."""

    def texture(u: Array, v: Array, foot: Array) -> Array:
        fade = np.clip(1 / (foot * scale * 2), 0, 1)
        return _tint(colour, 1 + depth * fade * (2 * _noise(u * scale, v * scale, seed, 2) - 1))

    return texture


def _wood(colour: Array, seed: int, along_u: bool = True) -> Texture:
    def texture(u: Array, v: Array, foot: Array) -> Array:
        a, b = (u, v) if along_u else (v, u)
        warp = _noise(a * 1.5, b * 6, seed)
        rings = _noise(a * 1.2, b * 40 + warp * 8, seed + 1, 2)
        return _tint(colour, 0.78 + 0.44 * rings)

    return texture


def _planks(rng: Rng, colour: Array) -> Texture:
    width, length, seed, spread = rng.uniform(0.08, 0.2), rng.uniform(0.9, 1.8), _seed(rng), rng.uniform(0.15, 0.5)
    turned = rng.random() < 0.4

    def texture(u: Array, v: Array, foot: Array) -> Array:
        if turned:
            u, v = v, u
        row = np.floor(u / width)
        shift = v / length + _hash(row, row, seed) * 5
        board = np.floor(shift)
        tone = 1 + spread * (_hash(row, board, seed + 1) - 0.5)
        fade = np.clip(0.012 / foot, 0.15, 1)
        grain = 1 + 0.45 * fade * (_noise(u * 70, v * 3 + 17 * tone, seed + 2, 2) - 0.5)
        gap = _line((u / width - row - 0.5) * width - width / 2, 0.004, foot) + _line((shift - board) * length, 0.004, foot)
        gap += _line((u / width - row - 0.5) * width + width / 2, 0.004, foot)
        return _tint(colour, tone * grain * (1 - 0.6 * np.minimum(gap, 1)))

    return texture


def _tiles(rng: Rng, colour: Array, size: float, second: Array | None = None, stagger: float = 0.0) -> Texture:
    """Square tiles, or bricks twice as long when staggered; `second` makes a chequerboard."""
    seed, grout, aspect = _seed(rng), rng.uniform(0.45, 0.8), 2.0 if stagger else 1.0
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
        vein = 1 + 0.25 * (_noise(u * 7, v * 7, seed + 1, 3) - 0.5)
        base = np.asarray(colour, np.float32)[:, None]
        if second is not None:
            base = np.where(((col + row) % 2 > 0), np.asarray(second, np.float32)[:, None], base)
        edge_a = (np.abs(a - col - 0.5) - 0.5) * size * aspect
        edge_b = (np.abs(b - row - 0.5) - 0.5) * size
        seam = np.minimum(_line(edge_a, joint, foot) + _line(edge_b, joint, foot), 1)
        return base * (tone * vein * (1 - (1 - grout) * seam))

    return texture


def _carpet(rng: Rng, colour: Array) -> Texture:
    seed = _seed(rng)

    def texture(u: Array, v: Array, foot: Array) -> Array:
        fine = (_noise(u * 110, v * 110, seed) - 0.5) * np.clip(0.01 / foot, 0.15, 1)
        return _tint(colour, 1 + 0.7 * fine + 0.22 * (_noise(u * 2.5, v * 2.5, seed + 1, 3) - 0.5))

    return texture


def _wallpaper(rng: Rng, colour: Array) -> Texture:
    kind, pitch, seed = rng.integers(3), rng.uniform(0.18, 0.4), _seed(rng)
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
        return _mix(colour, other, pattern) * (1 + 0.05 * (_noise(u * 30, v * 30, seed) - 0.5))

    return texture


def _boards(colour: Array, pitch: float) -> Texture:
    """Painted panelling or beadboard: vertical grooves."""
    return lambda u, v, foot: _tint(colour, 1 - 0.35 * _line((u / pitch % 1 - 0.5) * pitch, 0.012, foot))


def _rug(rng: Rng, half_u: float, half_v: float, palette: list[Array]) -> Texture:
    seed, medallion, fold = _seed(rng), rng.random() < 0.6, rng.uniform(4, 9)
    a, b, c = (palette[k] for k in rng.permutation(len(palette))[:3])

    def texture(u: Array, v: Array, foot: Array) -> Array:
        margin = np.minimum(half_u - np.abs(u), half_v - np.abs(v))
        if medallion:
            r = np.hypot(u / half_u, v / half_v)
            figure = np.cos(fold * np.arctan2(np.abs(v), np.abs(u))) * 0.12 + r
            field_ = np.clip(np.cos(figure * 14) * 4 * np.clip(0.06 / foot, 0, 1) + 0.3, 0, 1)
        else:
            field_ = np.clip(np.cos((np.abs(u) + np.abs(v)) * fold * 4) * 4 * np.clip(0.06 / foot, 0, 1) + 0.5, 0, 1)
        out = _mix(_mix(a, b, field_), c, ((margin > 0.08) & (margin < 0.16)).astype(np.float32))
        out = _mix(out, a, (margin < 0.04).astype(np.float32))
        return out * (1 + 0.5 * np.clip(0.012 / foot, 0.1, 1) * (_noise(u * 90, v * 90, seed) - 0.5))

    return texture


def _art(rng: Rng, half_u: float, half_v: float) -> Texture:
    """A framed picture: mount, then a landscape or an abstract of flat noise-shaped areas."""
    seed, landscape, mount = _seed(rng), rng.random() < 0.5, rng.uniform(0.0, 0.09)
    colours = (rng.uniform(0.05, 0.7, (4, 1)) * rng.uniform(0.5, 1.1, (4, 3))).astype(np.float32)

    def texture(u: Array, v: Array, foot: Array) -> Array:
        x, y = u / half_u, v / half_v
        n = _noise(x * 2 + 9, y * 2 + 9, seed, 3)
        if landscape:
            height = y + 0.8 * (_noise(x * 2, x * 0, seed + 3, 3) - 0.5)
            out = _mix(_mix(colours[0], [0.6, 0.7, 0.85], np.clip(y + n, 0, 1)), colours[1], (height < 0.1).astype(np.float32))
            out = _mix(out, colours[2] * 0.6, (height < -0.35).astype(np.float32)) * (0.7 + 0.6 * n)
        else:
            out = _mix(_mix(colours[0], colours[1], (n > 0.45).astype(np.float32)), colours[2], (n > 0.58).astype(np.float32))
            out = _mix(out, colours[3], (_noise(x + 3, y * 3, seed + 5) > 0.7).astype(np.float32))
        inside = np.minimum(half_u - np.abs(u), half_v - np.abs(v)) > mount
        return _mix([0.8, 0.79, 0.76], out, inside.astype(np.float32))

    return texture


def _books(rng: Rng, width: float, height: float) -> Texture:
    count = max(4, int(width / 0.035))
    edges = np.cumsum(rng.uniform(0.5, 1.5, count))
    edges = (edges / edges[-1] * width - width / 2).astype(np.float32)
    colours = (rng.uniform(0.03, 0.5, (count, 1)) * rng.uniform(0.4, 1.4, (count, 3))).astype(np.float32).clip(0.02, 0.75)
    tops = (rng.uniform(0.62, 0.98, count) - 0.5).astype(np.float32) * height

    def texture(u: Array, v: Array, foot: Array) -> Array:
        k = np.minimum(np.searchsorted(edges, u), count - 1)
        shade = (v < tops[k]) * (1 - 0.5 * _line(u - edges[k], 0.006, foot)) + 0.04
        band = 1 + 0.6 * ((v / height + 0.5 > 0.55) & (v / height + 0.5 < 0.6))
        return colours[k].T * (shade * band)

    return texture


# ---------------------------------------------------------------------------------------------------------------- geometry


@dataclass(frozen=True)
class _Shape:
    """A unit cube, upright unit cone frustum or unit ball, stretched by `half` and turned by `axes` (columns: local axes)."""

    kind: str
    centre: Array
    half: Array
    texture: Texture
    axes: Array = field(default_factory=lambda: np.eye(3, dtype=np.float32))
    taper: float = 1.0  # frustum: top radius over bottom radius
    bevel: float = 0.0  # box: radius in metres over which the shading normal turns at an edge
    gloss: float = 0.0
    emit: Array | None = None
    casts: bool = True

    def moved(self, axes: Array, offset: Array) -> "_Shape":
        return replace(self, centre=axes @ self.centre + offset, axes=axes @ self.axes)

    def corners(self) -> Array:
        signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], np.float32)
        return self.centre + (signs * self.half) @ self.axes.T


def _box(x0: float, x1: float, y0: float, y1: float, z0: float, z1: float, texture: Texture, **options) -> _Shape:
    low, high = np.array([x0, y0, z0], np.float32), np.array([x1, y1, z1], np.float32)
    return _Shape("box", (low + high) / 2, np.maximum((high - low) / 2, 1e-3), texture, **options)


def _cone(x: float, y: float, z0: float, z1: float, r0: float, r1: float, texture: Texture, **options) -> _Shape:
    centre, half = np.array([x, y, (z0 + z1) / 2], np.float32), np.array([r0, r0, (z1 - z0) / 2], np.float32)
    return _Shape("cone", centre, half, texture, taper=r1 / r0, **options)


def _ball(x: float, y: float, z: float, rx: float, ry: float, rz: float, texture: Texture, **options) -> _Shape:
    return _Shape("ball", np.array([x, y, z], np.float32), np.array([rx, ry, rz], np.float32), texture, **options)


def _yaw(angle: float) -> Array:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]], np.float32)


def _extent(shapes: list[_Shape]) -> tuple[Array, Array]:
    points = np.concatenate([s.corners() for s in shapes])
    return points.min(0), points.max(0)


def _rotate(matrix: Array, x: Array) -> list[Array]:
    """matrix @ x, row by row, skipping the zeros that most matrices here are full of."""
    rows = []
    for row in matrix:
        terms = [x[k] * row[k] for k in range(3) if abs(row[k]) > 1e-7]
        rows.append(sum(terms[1:], terms[0]))
    return rows


def _dot(a: Array, b: Array) -> Array:
    """Products of (3, N) or (3,) vectors, several times faster than a sum over the short axis."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _to_local(shape: _Shape, vectors: Array) -> list[Array]:
    """Directions, or points less the centre, in the unit shape's frame."""
    return _rotate((shape.axes / shape.half).T, vectors)


def _hit(shape: _Shape, o: list[Array], d: list[Array]) -> Array:
    """Distance along the local rays (o + t d) to the entry into the unit shape, inf without one."""
    if shape.kind == "box":
        near, far = np.float32(1e-4), np.float32(np.inf)
        for k in range(3):
            inverse = 1 / (d[k] + np.float32(1e-12))
            middle, reach = -o[k] * inverse, np.abs(inverse)
            near, far = np.maximum(near, middle - reach), np.minimum(far, middle + reach)
        return np.where((near < far) & (near > 1e-4), near, np.float32(np.inf))
    if shape.kind == "ball":
        a = d[0] * d[0] + d[1] * d[1] + d[2] * d[2]
        b = o[0] * d[0] + o[1] * d[1] + o[2] * d[2]
        disc = b * b - a * (o[0] * o[0] + o[1] * o[1] + o[2] * o[2] - 1)
        t = (-b - np.sqrt(np.maximum(disc, 0))) / a
        return np.where((disc > 0) & (t > 1e-4), t, np.float32(np.inf))
    slope = np.float32((shape.taper - 1) / 2)
    radius = (1 + shape.taper) / 2 + slope * o[2]
    a = d[0] * d[0] + d[1] * d[1] - slope * slope * d[2] * d[2]
    b = o[0] * d[0] + o[1] * d[1] - slope * d[2] * radius
    disc = b * b - a * (o[0] * o[0] + o[1] * o[1] - radius * radius)
    t = (-b - np.sqrt(np.maximum(disc, 0))) / a
    best = np.where((disc > 0) & (t > 1e-4) & (np.abs(o[2] + t * d[2]) <= 1), t, np.float32(np.inf))
    side = -np.sign(d[2])  # the only cap that can be entered
    cap = (side - o[2]) / (d[2] + np.float32(1e-12))
    x, y = o[0] + cap * d[0], o[1] + cap * d[1]
    limit = np.where(side > 0, np.float32(shape.taper), np.float32(1))
    return np.where((x * x + y * y < limit * limit) & (cap > 1e-4) & (cap < best), cap, best)


def _surface(shape: _Shape, p: Array) -> tuple[Array, Array, Array, Array]:
    """Points on the shape -> world normal (3, N), texture coordinates u, v and face number, each (N,)."""
    q = np.stack(_to_local(shape, p - shape.centre[:, None]))
    face = np.zeros(p.shape[1], np.int32)
    if shape.kind == "box":
        metres = q * shape.half[:, None]
        axis = np.argmax(np.abs(q), axis=0)
        u = np.where(axis == 0, metres[1], metres[0])
        v = np.where(axis == 2, metres[1], metres[2])
        sign = np.sign(np.take_along_axis(q, axis[None], 0)[0])
        face = axis.astype(np.int32) * 2 + (sign > 0)
        local = (np.arange(3)[:, None] == axis) * sign
        if shape.bevel:
            face[:] = 0
            inset = np.maximum(shape.half - shape.bevel, 0)[:, None]
            local = np.sign(q) * np.maximum(np.abs(metres) - inset, 0) + local * (0.15 * shape.bevel)
    elif shape.kind == "ball":
        local = q / shape.half[:, None]
        u, v = q[0] * shape.half[0], q[2] * shape.half[2] + q[1] * shape.half[1]
    else:
        cap = np.abs(q[2]) > 0.9995
        face = cap.astype(np.int32)
        lean = np.full_like(q[2], shape.half[0] * (1 - shape.taper) / (2 * shape.half[2]))
        length = np.hypot(q[0], q[1]) + np.float32(1e-6)
        side = np.stack([q[0] / length / shape.half[0], q[1] / length / shape.half[1], lean / shape.half[0]])
        local = np.where(cap, np.stack([q[0] * 0, q[0] * 0, np.sign(q[2])]), side)
        u = np.where(cap, q[0] * shape.half[0], np.arctan2(q[1], q[0]) * shape.half[0])
        v = np.where(cap, q[1] * shape.half[1], q[2] * shape.half[2])
    normal = np.stack(_rotate(shape.axes, local.astype(np.float32)))
    return normal / np.sqrt(_dot(normal, normal) + np.float32(1e-12)), u, v, face


@dataclass
class _Plane:
    """One face of the room's convex shell, seen from inside. `u_axis`, `v_axis` are its texture axes."""

    origin: Array
    normal: Array
    u_axis: Array
    v_axis: Array
    texture: Texture
    gloss: float = 0.0
    length: float = 0.0
    openings: list[tuple] = field(default_factory=list)  # windows: (u0, u1, v0, v1)
    doorways: list[tuple] = field(default_factory=list)
    gaps: list[tuple] = field(default_factory=list)  # (u0, u1) without skirting
    used: list[tuple] = field(default_factory=list)  # the same, of whatever hangs or stands there

    def frame(self) -> Array:
        """Local axes of things on this wall: x along it, y into the room, z up."""
        return np.stack([self.u_axis, self.normal, self.v_axis], axis=1).astype(np.float32)

    def coords(self, p: Array) -> tuple[Array, Array]:
        q = p - self.origin[:, None]
        return _dot(q, self.u_axis), _dot(q, self.v_axis)


@dataclass
class _Window:
    """An area light: corner, edge vectors, normal into the room, radiance."""

    corner: Array
    edge_u: Array
    edge_v: Array
    normal: Array
    radiance: Array

    @property
    def area(self) -> float:
        return float(np.linalg.norm(self.edge_u) * np.linalg.norm(self.edge_v))

    def point(self, a: Array | float, b: Array | float) -> Array:
        return self.corner[:, None] + self.edge_u[:, None] * a + self.edge_v[:, None] * b


@dataclass
class _Lamp:
    position: Array
    intensity: Array  # radiant intensity, (3,)
    radius: float
    down: bool = False  # a recessed spot: shines downwards only
    beyond: bool = False  # in the next room, whose light this room's walls keep out


# --------------------------------------------------------------------------------------------------------------- furniture
# Each builder returns shapes in a local frame: x along the wall, y from the wall (0) into the room, z up from the floor (0).


class _Style:
    """The room's palette: every piece draws its materials from here, so that a room holds together."""

    def __init__(self, rng: Rng):
        self.rng = rng
        self.wood_colour = rng.choice(_WOODS) * rng.uniform(0.85, 1.15)
        self.fabric_colour = rng.choice(_FABRICS) * rng.uniform(0.8, 1.15)
        self.accent, self.accent2 = (rng.choice(_ACCENTS) * rng.uniform(0.8, 1.2) for _ in range(2))
        self.white = np.array([0.8, 0.79, 0.76]) * rng.uniform(0.92, 1.05)
        self.metal = _plain(rng.choice([[0.05, 0.05, 0.05], [0.45, 0.44, 0.42], [0.45, 0.33, 0.15]]))
        self.painted = rng.random() < 0.55

    def wood(self, along_u: bool = True) -> Texture:
        return _wood(self.wood_colour, _seed(self.rng), along_u)

    def fabric(self, colour: Array | None = None) -> Texture:
        return _grained(self.fabric_colour if colour is None else colour, _seed(self.rng), 90.0, 0.22)

    def paint(self, colour: Array | None = None) -> Texture:
        return _grained(self.white if colour is None else colour, _seed(self.rng), 2.0, 0.03)

    def ornament(self) -> Texture:
        return self.paint([self.white, self.accent, self.accent2][self.rng.integers(3)])

    def joinery(self) -> Texture:
        return self.paint() if self.painted else self.wood(along_u=False)

    def stone(self) -> Texture:
        return _grained(self.rng.choice([[0.06, 0.06, 0.065], [0.68, 0.67, 0.64], [0.35, 0.28, 0.22]]), _seed(self.rng), 45, 0.6)


# fmt: off
_WOODS = [(.42, .25, .13), (.26, .13, .06), (.52, .36, .21), (.12, .07, .045), (.5, .44, .36), (.33, .16, .08)]
_FABRICS = [(.5, .47, .42), (.22, .23, .25), (.3, .15, .08), (.12, .18, .28), (.55, .45, .33), (.2, .27, .2), (.68, .65, .6)]
_ACCENTS = [(.1, .2, .34), (.42, .16, .08), (.5, .33, .08), (.16, .26, .14), (.12, .3, .3), (.45, .32, .3), (.3, .06, .06),
            (.55, .5, .42), (.06, .07, .09), (.36, .4, .46)]
_BLACK, _CHINA = _plain([.015, .015, .016]), _plain([.82, .82, .8])
_ALONG_X = np.array([[0, 0, 1], [0, 1, 0], [-1, 0, 0]], np.float32)  # lays an upright frustum along x
_ALONG_Y = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]], np.float32)


def _legs(x0: float, x1: float, y0: float, y1: float, top: float, r: float, texture: Texture) -> list[_Shape]:
    return [_cone(x, y, 0, top, r * .7, r, texture) for x in (x0 + r, x1 - r) for y in (y0 + r, y1 - r)]


def _sofa(rng: Rng, style: _Style, seats: int) -> list[_Shape]:
    cloth = style.fabric()
    seat, arm, depth, back = rng.uniform(.6, .72), rng.uniform(.14, .24), rng.uniform(.85, 1), rng.uniform(.78, .95)
    h, top, rolled = seats * seat / 2, rng.uniform(.56, .66), arm > .19
    out = [_box(-h, h, .05, depth - .02, .1, .3, cloth, bevel=.02), _box(-h, h, 0, .22, .1, back - .06, cloth, bevel=.07),
           *_legs(-h - arm, h + arm, .02, depth, .12, .03, style.wood())]
    for x in (-h - arm / 2, h + arm / 2):
        out.append(_box(x - arm / 2, x + arm / 2, .02, depth, .1, top, cloth, bevel=.07))
        if rolled:
            roll = _cone(0, 0, -depth / 2, depth / 2, arm * .55, arm * .55, cloth)
            out.append(roll.moved(_ALONG_Y, np.array([x, depth / 2, top], np.float32)))
    for k in range(seats):
        x = -h + k * seat
        out += [_box(x + .01, x + seat - .01, .2, depth + .02, .29, .46, cloth, bevel=.07),
                _box(x + .015, x + seat - .015, .14, .34, .44, back, cloth, bevel=.1)]
    for _ in range(rng.integers(0, 4)):
        cushion = _box(-.22, .22, -.07, .07, -.2, .2, style.fabric([style.accent, style.accent2][rng.integers(2)]), bevel=.09)
        out.append(cushion.moved(_yaw(rng.uniform(-.4, .4)), np.array([rng.uniform(.2 - h, h - .2), .42, .66], np.float32)))
    return out


def _table(rng: Rng, style: _Style, width: float, depth: float, height: float) -> list[_Shape]:
    w, top = width / 2, style.wood() if rng.random() < .7 else style.stone()
    if rng.random() < .3:
        r = min(width, depth) / 2
        return [_cone(0, depth / 2, height - .035, height, r, r, top, gloss=.4),
                _cone(0, depth / 2, 0, .03, r * .55, r * .5, style.metal),
                _cone(0, depth / 2, .03, height - .03, .05, .04, style.metal)]
    out = [_box(-w, w, 0, depth, height - .04, height, top, gloss=.5)]
    out += _legs(.02 - w, w - .02, .02, depth - .02, height - .04, .03, style.wood(along_u=False))
    shelf = _box(.04 - w, w - .04, .04, depth - .04, height * .3, height * .3 + .02, top)
    return out + [shelf] * (height < .6 and rng.random() < .5)


def _chair(rng: Rng, style: _Style) -> list[_Shape]:
    wood, cloth = style.wood(along_u=False), style.fabric([style.fabric_colour, style.accent][rng.integers(2)])
    out = [_box(-.22, .22, 0, .44, .42, .48, cloth, bevel=.03), *_legs(-.22, .22, 0, .44, .42, .022, wood)]
    if rng.random() < .5:
        return [*out, _box(-.21, .21, 0, .05, .48, .95, cloth, bevel=.04)]
    out += [_box(x, x + .035, 0, .035, .45, .98, wood) for x in (-.22, .185)]
    return out + [_box(-.2, .2, .005, .03, z, z + .07, wood) for z in (.6, .74, .88)]


def _office_chair(rng: Rng, style: _Style) -> list[_Shape]:
    cloth = _grained([.04, .04, .045], _seed(rng), 60, .3)
    out = [_box(-.25, .25, 0, .5, .44, .54, cloth, bevel=.06), _box(-.23, .23, -.06, .04, .6, 1.15, cloth, bevel=.08),
           _cone(0, .25, .08, .44, .03, .03, style.metal), _box(-.03, .03, -.05, 0, .45, .7, cloth)]
    for x in (-.28, .28):
        out += [_box(x - .025, x + .025, .08, .4, .68, .71, cloth), _box(x - .015, x + .015, .2, .25, .48, .68, cloth)]
    for angle in np.arange(5) * 2 * np.pi / 5:
        parts = [_box(0, .3, -.02, .02, .05, .08, _BLACK), _ball(.29, 0, .03, .03, .03, .03, _BLACK)]
        out += [s.moved(_yaw(angle), np.array([0, .25, 0], np.float32)) for s in parts]
    return out


def _panel(x0: float, x1: float, z0: float, z1: float, y: float, face: Texture, knob: Texture, at: tuple) -> list[_Shape]:
    """A shaker front: a slab, a raised border and a knob."""
    x0, x1, z0, z1 = x0 + .006, x1 - .006, z0 + .006, z1 - .006
    b = min(.06, (z1 - z0) * .25)
    parts = [(x0, x1, y, y + .008, z0, z1), (x0, x1, y, y + .022, z0, z0 + b), (x0, x1, y, y + .022, z1 - b, z1),
             (x0, x0 + b, y, y + .022, z0, z1), (x1 - b, x1, y, y + .022, z0, z1)]
    return [*(_box(*p, face, casts=False) for p in parts), _ball(at[0], y + .035, at[1], .016, .016, .016, knob, casts=False)]


def _cabinet(rng: Rng, style: _Style, width: float, depth: float, z0: float, z1: float, drawers: bool = False) -> list[_Shape]:
    face, h = style.joinery(), width / 2
    rows = max(2, round((z1 - z0) / .24)) if drawers else 1
    cols = max(1, round(width / (.8 if drawers else .48)))
    out = [_box(-h, h, 0, depth - .02, z0, z1, face)] + [_box(.03 - h, h - .03, 0, depth - .08, 0, z0, _BLACK)] * (z0 < .2)
    for i in range(rows):
        for j in range(cols):
            x, z = -h + np.array([j, j + 1]) * width / cols, z0 + np.array([i, i + 1]) * (z1 - z0) / rows
            side = x[1] - .05 if j % 2 == 0 else x[0] + .05
            knob = (x.mean(), z.mean()) if drawers else (side, z0 + .1 if z0 > 1 else min(z1 - .08, 1))
            out += _panel(*x, *z, depth - .02, face, style.metal, knob)
    return out


def _bookshelf(rng: Rng, style: _Style) -> list[_Shape]:
    width, height, depth, wood = rng.uniform(.8, 1.4), rng.uniform(1.5, 2.1), .3, style.joinery()
    h, rows = width / 2, int(height / .36)
    step = (height - .09) / rows
    out = [_box(-h, .03 - h, 0, depth, 0, height, wood), _box(h - .03, h, 0, depth, 0, height, wood),
           _box(-h, h, 0, .02, 0, height, wood)]
    for k in range(rows + 1):
        z, w = .06 + k * step, rng.uniform(.4, .94) * (width - .08)
        out.append(_box(-h, h, 0, depth, z, z + .03, wood))
        x = rng.uniform(.04 - h + w / 2, h - .04 - w / 2)
        if k < rows and rng.random() < .75:
            books = _books(rng, w, step - .05)
            out.append(_box(x - w / 2, x + w / 2, .03, depth - .06, z + .03, z + step - .02, books, casts=False))
        elif k < rows:
            out.append(_ball(x, depth / 2, z + .1, .07, .07, .08, style.ornament(), gloss=.3, casts=False))
    return out


def _bed(rng: Rng, style: _Style) -> list[_Shape]:
    h, long, top, head, wood = rng.uniform(.7, .98), 2.1, rng.uniform(.52, .66), rng.uniform(1, 1.35), style.wood()
    sheet, cover = style.fabric(style.white), style.fabric([style.white, style.accent, style.fabric_colour][rng.integers(3)])
    board = (style.fabric(), .05) if rng.random() < .5 else (wood, .01)
    out = [_box(-h - .04, h + .04, 0, .09, 0, head, board[0], bevel=board[1]), _box(-h, h, .06, long, .1, .3, wood),
           _box(.02 - h, h - .02, .09, long - .03, .28, top, sheet, bevel=.07),
           _box(-h - .03, h + .03, .75, long + .02, .24, top + .05, cover, bevel=.1), *_legs(-h, h, .1, long, .12, .035, wood)]
    if rng.random() < .6:
        out.append(_box(-h - .045, h + .045, long - .75, long - .25, .3, top + .065, style.fabric(style.accent), bevel=.1))
    for x in (-h / 2, h / 2):
        out += [_ball(x, .34, top + .1, h * .44, .24, .13, sheet),
                _ball(x, .2, top + .2, h * .42, .12, .22, style.fabric([style.white, style.accent2][rng.integers(2)]))]
    return out + [_box(-.25, .25, .42, .56, top + .02, top + .3, style.fabric(style.accent), bevel=.09)] * (rng.random() < .6)


def _lamp(rng: Rng, style: _Style, z: float) -> tuple[list[_Shape], Array]:
    """A table lamp on a top at height z, or a floor lamp at 0: its shapes, the shade last, and where its bulb is."""
    metal, (foot, top, r) = style.metal, (.2, .33, rng.uniform(.12, .17)) if z else (.25, 1.36, rng.uniform(.17, .24))
    if z:
        parts = [_ball(0, foot, z + .13, .09, .09, .13, style.ornament(), gloss=.3),
                 _cone(0, foot, z + .24, z + .34, .012, .012, metal)]
    else:
        parts = [_cone(0, foot, 0, .03, .15, .14, metal), _cone(0, foot, .03, 1.4, .014, .014, metal)]
    shade = _cone(0, foot, z + top, z + top + r * 1.5, r, r * rng.uniform(.6, .95), _plain([.7, .66, .58]), casts=False)
    return [*parts, shade], np.array([0, foot, z + top + .12])


def _plant(rng: Rng, style: _Style) -> list[_Shape]:
    size, broad = rng.uniform(.7, 1.1), rng.choice([.025, .075])
    green = np.array([.06, .14, .035]) * rng.uniform(.8, 1.6) * np.array([rng.uniform(.8, 1.4), 1, 1])
    r = .16 * size + .04
    out = [_cone(0, .25, 0, .3 * size + .05, r * .75, r, style.ornament())]
    for _ in range(22):
        lift, reach = rng.uniform(.2, 1.4), rng.uniform(.35, .8) * size
        c, s = np.cos(lift), np.sin(lift)
        colour = _grained(green * rng.uniform(.6, 1.5), _seed(rng), 40, .3)
        leaf = _ball(reach / 2, 0, 0, reach / 2, broad * size, .012, colour, gloss=.1)
        turn = _yaw(rng.uniform(0, 2 * np.pi)) @ np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]], np.float32)
        out.append(leaf.moved(turn, np.array([0, .25, .3 * size + rng.uniform(0, .35) * size], np.float32)))
    return out


def _television(rng: Rng, style: _Style) -> list[_Shape]:
    w, h = rng.uniform(.5, .62), rng.uniform(.62, .75)
    return [*_cabinet(rng, style, rng.uniform(1.3, 1.9), .42, .1, .5, drawers=rng.random() < .5),
            _box(-.2, .2, .12, .3, .5, .515, _BLACK), _box(-.03, .03, .17, .2, .5, .6, _BLACK),
            _box(-w, w, .18, .21, .58, .58 + h, _BLACK, gloss=.9)]


def _fireplace(rng: Rng, style: _Style, ceiling: float) -> list[_Shape]:
    h, brick = rng.uniform(.75, .95), rng.choice([[.35, .16, .1], [.45, .42, .38], [.75, .74, .7]])
    face, mantel = _tiles(rng, brick, .075, stagger=.5), style.wood() if rng.random() < .5 else style.paint()
    out = [_box(-h, -.42, 0, .3, 0, 1.25, face), _box(.42, h, 0, .3, 0, 1.25, face), _box(-.42, .42, 0, .3, .75, 1.25, face),
           _box(-.42, .42, 0, .05, .05, .75, _BLACK), _box(-h, h, 0, .65, 0, .06, style.stone()),
           _box(-h - .1, h + .1, 0, .38, 1.25, 1.33, mantel)]
    if rng.random() < .6:
        out.append(_box(-h, h, 0, .22, 1.33, ceiling, face if rng.random() < .5 else style.paint()))
    return out + [_ball(x, .3, 1.43, .06, .06, .1, style.ornament(), gloss=.3) for x in rng.uniform(-h, h, 3)]


def _kitchen(rng: Rng, style: _Style, width: float, ceiling: float) -> list[_Shape]:
    """Base units, worktop, splashback, wall units, a cooker with its hood; a fridge at one end."""
    steel, stone, h, top = _grained([.42, .42, .43], _seed(rng), 60, .06), style.stone(), width / 2, min(2.2, ceiling - .1)
    end, x = h - .84, rng.uniform(.7 - h, h - 1.9)
    tile = _tiles(rng, [style.white, style.accent * .6 + .3, np.array([.5, .42, .34])][rng.integers(3)], .075, stagger=.5)
    out = [_box(h - .8, h, 0, .72, .02, 1.78, steel, gloss=.35), _box(h - .8, h, .72, .725, 1.2, 1.21, _BLACK),
           _box(h - .75, h - .72, .72, .77, .5, 1.1, style.metal), _box(h - .75, h - .72, .72, .77, 1.3, 1.6, style.metal),
           _box(x, x + .7, 0, .63, 0, .91, steel, gloss=.2), _box(x + .06, x + .64, .63, .635, .25, .68, _BLACK, gloss=.6),
           _box(x + .06, x + .64, .65, .68, .72, .745, style.metal), _box(x + .03, x + .67, .05, .6, .91, .92, _BLACK, gloss=.5),
           _box(x, x + .7, 0, .4, 1.6, 1.8, steel, gloss=.2), _box(x + .2, x + .5, 0, .25, 1.8, top, steel, gloss=.2),
           _box(-h, end, 0, .012, .91, 1.45, tile, gloss=.25, casts=False)]
    for x0, x1 in ((-h, x), (x + .7, end)):
        units = _cabinet(rng, style, x1 - x0, .62, .08, .87) + _cabinet(rng, style, x1 - x0, .36, 1.42, top)
        out += [_box(x0, x1, 0, .65, .87, .91, stone, gloss=.5), *_shift(units, (x0 + x1) / 2)]
    for x, r in zip(rng.uniform(.1 - h, end - .1, 3), rng.uniform(.05, .09, 3), strict=True):
        out.append(_cone(x, .25, .91, .91 + r * 3, r, r * rng.uniform(.5, 1), style.ornament(), gloss=.3))
    return out


def _island(rng: Rng, style: _Style) -> list[_Shape]:
    h, x = rng.uniform(.7, 1), rng.uniform(-.4, .4)
    fruit = [(-.05, 0, [.6, .25, .03]), (.05, .03, [.5, .05, .03]), (0, -.05, [.3, .45, .06])]
    return [*_cabinet(rng, style, 2 * h, .7, .08, .88), _box(-h - .04, h + .04, -.3, .74, .88, .92, style.stone(), gloss=.5),
            _ball(x, .3, .97, .15, .15, .06, style.ornament()),
            *(_ball(x + a, .3 + b, 1.03, .045, .045, .045, _plain(c)) for a, b, c in fruit)]


def _stool(rng: Rng, style: _Style) -> list[_Shape]:
    return [_cone(0, .2, .64, .7, .17, .18, style.fabric()), _box(-.14, .14, .06, .08, .22, .24, style.metal),
            *_legs(-.17, .17, .03, .37, .64, .02, style.metal)]


def _desk(rng: Rng, style: _Style) -> list[_Shape]:
    w, wood, keys = rng.uniform(.6, .8), style.wood(), _grained([.3, .3, .3], _seed(rng), 60, .5)
    return [_box(-w, w, 0, .68, .71, .75, wood, gloss=.2), _box(-w, .04 - w, .03, .65, 0, .71, wood),
            _box(-.3, .3, .2, .22, .85, 1.2, _BLACK, gloss=.8), _box(-.03, .03, .16, .19, .75, .95, _BLACK),
            _box(-.12, .12, .1, .26, .75, .76, _BLACK), _box(-.2, .2, .42, .55, .75, .77, keys),
            *_shift(_cabinet(rng, style, .42, .6, .03, .7, drawers=True), w - .22, .03)]


def _vanity(rng: Rng, style: _Style) -> list[_Shape]:
    """Cabinet, basin and tap under a framed mirror."""
    h, marble = rng.uniform(.45, .75), _grained([.72, .71, .68], _seed(rng), 6, .12)
    m = h * .85
    return [*_cabinet(rng, style, 2 * h, .52, .08, .8), _box(-h - .02, h + .02, 0, .55, .8, .84, marble, gloss=.5),
            _box(-h - .02, h + .02, 0, .02, .84, .94, marble, gloss=.4), _ball(0, .28, .85, .24, .18, .035, _CHINA, gloss=.6),
            _ball(0, .28, .87, .19, .13, .03, _plain([.6, .6, .59])), _cone(0, .09, .84, .98, .015, .012, style.metal),
            _box(-.012, .012, .09, .22, .97, .99, style.metal), _box(-m, m, 0, .03, 1.05, 1.85, style.wood()),
            _box(.04 - m, m - .04, .03, .032, 1.09, 1.81, _BLACK, gloss=_MIRROR),
            *(_cone(x, .12, .84, .98, .03, .03, style.ornament()) for x in (-h * .7, h * .6))]


def _toilet(rng: Rng, style: _Style) -> list[_Shape]:
    return [_box(-.22, .22, .02, .2, .38, .78, _CHINA, bevel=.03, gloss=.4),
            _box(-.23, .23, .01, .22, .78, .81, _CHINA, bevel=.01),
            _cone(0, .4, 0, .3, .12, .17, _CHINA, gloss=.3), _ball(0, .46, .3, .2, .27, .13, _CHINA, gloss=.4),
            _ball(0, .46, .41, .2, .26, .03, _CHINA, gloss=.4), _box(-.12, .12, .1, .4, 0, .35, _CHINA, bevel=.04)]


def _bathtub(rng: Rng, style: _Style, ceiling: float) -> list[_Shape]:
    h, top = .85, min(2.1, ceiling - .1)
    out = [_box(-h, h, 0, .75, 0, .5, _CHINA, bevel=.04, gloss=.4), _box(.06 - h, h - .06, .07, .67, .5, .502, _plain([.5] * 3)),
           _box(-h, h, 0, .012, .5, top, _tiles(rng, style.white, .15), gloss=.3, casts=False)]
    if rng.random() < .7:
        width, rod = rng.uniform(.5, 1.2), _cone(0, 0, -h, h, .012, .012, style.metal, casts=False)
        cloth = style.fabric([style.white, style.accent][rng.integers(2)])
        out.append(rod.moved(_ALONG_X, np.array([0, .78, 1.97], np.float32)))
        out += _shift(_drape(rng, width, .15, 1.95, cloth), width / 2 - h, .78)
    return out
# fmt: on


def _drape(rng: Rng, width: float, z0: float, z1: float, cloth: Texture) -> list[_Shape]:
    """A curtain: a row of overlapping upright elliptic cylinders for its folds."""
    folds = max(3, int(width / 0.075))
    out = []
    for k in range(folds):
        fold = _cone(-width / 2 + (k + 0.5) * width / folds, 0.02 * (k % 2), z0, z1, 1, 1, cloth, casts=k % 2 == 0)
        half = (width / folds * rng.uniform(0.55, 0.75), rng.uniform(0.03, 0.05), (z1 - z0) / 2)
        out.append(replace(fold, half=np.array(half, np.float32)))
    return out


def _shift(shapes: list[_Shape], x: float, y: float = 0.0, z: float = 0.0) -> list[_Shape]:
    return [s.moved(np.eye(3, dtype=np.float32), np.array([x, y, z], np.float32)) for s in shapes]


# -------------------------------------------------------------------------------------------------------------------- room


@dataclass(frozen=True)
class _Group:
    """Shapes that block light together, behind one bounding box."""

    shapes: list[_Shape]
    low: Array
    high: Array


# fmt: off
_PAINTS = [(.72, .71, .68), (.7, .66, .58), (.64, .6, .54), (.7, .61, .43), (.55, .61, .54), (.52, .58, .63), (.64, .53, .41),
           (.42, .58, .53), (.75, .74, .72)]
_PAINT_ODDS = [.22, .2, .14, .12, .06, .06, .06, .04, .1]
_FLOOR_WOODS = [[.36, .21, .11], [.5, .34, .19], [.22, .12, .07], [.42, .36, .28], [.33, .14, .07]]
_FLOOR_STONES = [[.5, .42, .33], [.6, .58, .55], [.35, .33, .31], [.52, .38, .26]]
_CARPETS = [[.5, .44, .36], [.4, .39, .38], [.58, .53, .45], [.06, .2, .11], [.25, .29, .36]]
_FLOOR_ODDS = {"bathroom": [.1, .9, 0], "kitchen": [.5, .5, 0], "bedroom": [.4, 0, .6], "office": [.4, 0, .6],
               "living": [.6, .15, .25], "empty": [.5, .1, .4]}  # wood, tiles, carpet
# fmt: on


class _Room:
    """A furnished room with its lights, its view outside and the camera in it."""

    def __init__(self, seed: int):
        self.rng = rng = np.random.default_rng(seed)
        self.style = _Style(rng)
        self.kind = str(rng.choice(list(_FLOOR_ODDS), p=[0.12, 0.18, 0.2, 0.1, 0.32, 0.08]))
        small = self.kind in ("bathroom", "office")
        self.width = rng.uniform(2.8, 3.8) if small else rng.uniform(3.6, 5.4)
        self.depth = rng.uniform(3.0, 4.0) if small else rng.uniform(4.2, 6.0)
        self.height = self.top = rng.uniform(2.4, 2.9)
        self.shapes: list[_Shape] = []
        self.groups: list[_Group] = []
        self.windows: list[_Window] = []
        self.lamps: list[_Lamp] = []
        self.footprints: list[tuple] = []  # (x0, x1, y0, y1) on the floor
        self.outside = _outside(rng)
        self.place_camera()
        self.build_shell()
        self.cut_openings()
        getattr(self, f"furnish_{self.kind}")()
        if self.kind != "empty":
            self.fill()
            self.hang_pictures(int(rng.integers(1, 5)))
        self.hang_lamps()
        self.set_sun()
        self.bake_ambient()

    # -- shell

    def place_camera(self) -> None:
        rng = self.rng
        x, y = rng.uniform(0.12, 0.88) * self.width, rng.uniform(0.05, 0.16) * self.depth
        aim = rng.uniform(0.3, 0.7) * self.width
        self.eye = np.array([x, y, rng.uniform(1.25, 1.6)], np.float32)
        self.heading = float(np.arctan2(x - aim, self.depth * 0.85 - y))
        self.lens = rng.uniform(0.64, 0.84)  # tangent of the half field of view, geometric mean of the two sides
        self.shift = rng.uniform(-0.16, 0.0)
        self.footprints.append((x - 0.6, x + 0.6, -1.0, y + 0.8))

    def build_shell(self) -> None:
        rng, w, d, h = self.rng, self.width, self.depth, self.height
        paint = _PAINTS[rng.choice(len(_PAINTS), p=_PAINT_ODDS)] * rng.uniform(0.92, 1.06, 1)
        covering = rng.choice(3, p=_FLOOR_ODDS[self.kind])
        wood, stone = rng.choice(_FLOOR_WOODS), rng.choice(_FLOOR_STONES)
        if covering == 0:
            self.floor, gloss = _planks(rng, wood), rng.uniform(0.15, 0.6)
        elif covering == 1:
            dark = stone * 0.35 if rng.random() < 0.2 else None
            self.floor, gloss = _tiles(rng, stone, rng.uniform(0.25, 0.6), dark), rng.uniform(0.15, 0.6)
        else:
            self.floor, gloss = _carpet(rng, _CARPETS[rng.choice(5, p=[0.35, 0.25, 0.25, 0.07, 0.08])]), 0.0
        x, y, z = np.eye(3, dtype=np.float32)
        ceiling = _grained([0.78, 0.775, 0.76], _seed(rng), 25, 0.04)
        self.planes = [_Plane(np.zeros(3, np.float32), z, x, y, self.floor, gloss)]
        if rng.random() < 0.22 and self.kind in ("living", "bedroom", "empty"):  # a vault
            ridge, slope = rng.uniform(0.3, 0.7) * w, rng.uniform(0.25, 0.5)
            boards = _planks(rng, wood * 1.2) if rng.random() < 0.25 else ceiling
            self.top = h + slope * max(ridge, w - ridge) * 0.8
            for side in (-slope, slope):
                n = np.array([side, 0, -1], np.float32) / np.float32(np.hypot(1, slope))
                run = np.array([n[2], 0, -n[0]], np.float32)
                self.planes.append(_Plane(np.array([ridge, 0, self.top], np.float32), n, y, run, boards))
        else:
            self.planes.append(_Plane(np.array([0, 0, h], np.float32), -z, x, y, ceiling))
        corners = [(0, 0), (w, 0), (w, d), (0, d)]
        cut = rng.uniform(1.0, 1.7)
        if rng.random() < 0.18 and self.kind != "bathroom":  # a bay: a far corner cut off at 45 degrees
            bays = [[(w, d - cut), (w - cut, d), (0, d)], [(w, d), (cut, d), (0, d - cut)]]
            corners = corners[:2] + bays[rng.integers(2)]
        main = _wallpaper(rng, paint) if rng.random() < 0.12 else _grained(paint, _seed(rng), 2.0, 0.04)
        accents = [_tiles(rng, np.array([0.42, 0.2, 0.13]), 0.08, stagger=0.5), _boards(self.style.white, 0.14)]
        accents += [_grained(self.style.accent * 0.7 + 0.1, _seed(rng), 2.0, 0.04)] + [main] * 5
        special, accent = int(rng.integers(1, len(corners))), accents[rng.integers(len(accents))]
        self.walls: list[_Plane] = []
        for k, (start, end) in enumerate(zip(corners, corners[1:] + corners[:1], strict=True)):
            length = float(np.hypot(end[0] - start[0], end[1] - start[1]))
            run = np.array([(end[0] - start[0]) / length, (end[1] - start[1]) / length, 0], np.float32)
            inward = np.array([-run[1], run[0], 0], np.float32)
            texture = accent if k == special else main
            self.walls.append(_Plane(np.array([*start, 0], np.float32), inward, run, z, texture, length=length))
        self.planes += self.walls
        if len(corners) == 4 and rng.random() < 0.12 and self.kind not in ("bathroom", "office"):  # an L-shaped room
            a, b, right = rng.uniform(0.5, 1.3), rng.uniform(0.5, 1.3), rng.random() < 0.5
            x0 = w - a if right else 0
            self.add(
                [
                    _box(x0, x0 + a, d - b, d, 0, self.top, main),
                    _box(x0 - 0.016, x0 + a + 0.016, d - b - 0.016, d, 0, 0.1, self.style.paint()),
                ]
            )
            self.footprints.append((x0, x0 + a, d - b, d))
            back, side = self.walls[2], self.walls[1 if right else 3]
            back.used.append((0, a, 0, 9) if right else (w - a, w, 0, 9))
            side.used.append((d - b, d, 0, 9) if right else (0, b, 0, 9))

    def cut_openings(self) -> None:
        rng = self.rng
        walls = self.walls[1:]
        bays = [w for w in walls if min(abs(w.normal[:2])) > 0.1]
        rest = [walls[k] for k in rng.permutation(len(walls)) if min(abs(walls[k].normal[:2])) < 0.1]
        if not bays and rng.random() < 0.7:
            rest.sort(key=lambda w: w.normal[1])  # the far wall first
        for wall in bays:
            self.add_window(wall, wall.length / 2, wall.length - 0.3)
        for wall in rest[: 1 if self.kind == "bathroom" else int(rng.integers(1, 4))]:
            width = min(rng.uniform(0.8, 2.6), wall.length * 0.6)
            any(self.add_window(wall, rng.uniform(0.25, 0.75) * wall.length, width) for _ in range(4))
        if rng.random() < 0.7:  # the light behind the photographer
            self.add_window(self.walls[0], self.walls[0].length / 2, rng.uniform(1.0, 2.0))
        for k in rng.permutation(len(rest))[: rng.integers(1, 3)]:
            any(self.add_door(rest[k]) for _ in range(6))
        crown, paint = rng.random() < 0.35 and self.top == self.height, self.style.paint()
        for wall in self.walls:
            ends = [0.0, *(u for gap in sorted(wall.gaps) for u in gap), wall.length]
            trim = [_box(a, b, 0, 0.016, 0, 0.1, paint) for a, b in zip(ends[::2], ends[1::2], strict=True) if b > a]
            if crown:
                trim += [_box(0, wall.length, 0, s, self.height - 0.1 + s, self.height, paint) for s in (0.02, 0.06)]
            self.attach(wall, 0, trim, casts=False)

    def clear(self, wall: _Plane, u0: float, u1: float, z0: float, z1: float) -> bool:
        inside = u0 > 0.12 and u1 < wall.length - 0.12
        return inside and not any(u0 < b and u1 > a and z0 < d and z1 > c for a, b, c, d in wall.used)

    def attach(self, wall: _Plane, u: float, shapes: list[_Shape], casts: bool = True) -> None:
        self.add([s.moved(wall.frame(), wall.origin + wall.u_axis * np.float32(u)) for s in shapes], casts)

    def add(self, shapes: list[_Shape], casts: bool = True) -> None:
        self.shapes += shapes
        blockers = [s for s in shapes if s.casts] if casts else []
        if blockers:
            low, high = _extent(blockers)
            self.groups.append(_Group(blockers, low, high))

    def add_window(self, wall: _Plane, centre: float, width: float) -> bool:
        rng, style, h, top = self.rng, self.style, width / 2, self.height - 0.22
        french = rng.random() < 0.22 and self.kind in ("living", "bedroom", "kitchen") and width > 1.2
        low = 0.08 if french else rng.uniform(1.1, 1.4) if self.kind in ("bathroom", "kitchen") else rng.uniform(0.5, 0.95)
        high = min(top, rng.uniform(2.0, 2.35))
        if not self.clear(wall, centre - h - 0.1, centre + h + 0.1, low, high):
            return False
        wall.openings.append((centre - h, centre + h, low, high))
        wall.used.append((centre - h - 0.12, centre + h + 0.12, low - 0.1, high + 0.15))
        deep, c, frame = (-0.14, rng.uniform(0.05, 0.1), style.paint() if rng.random() < 0.8 else style.wood(along_u=False))
        parts = [(-h, h, deep, 0, low - 0.02, low), (-h, h, deep, 0, high, high + 0.02)]  # reveal, casing, sill
        parts += [
            (-h - 0.02, -h, deep, 0, low, high),
            (h, h + 0.02, deep, 0, low, high),
            (-h - c, h + c, 0, 0.025, high, high + c),
        ]
        parts += [(-h - c, -h, 0, 0.02, low - c, high), (h, h + c, 0, 0.02, low - c, high), (-h, h, 0, 0.02, low - c, low - 0.04)]
        parts += [(-h - c - 0.03, h + c + 0.03, 0, 0.07, low - 0.04, low)]
        cols, rows = max(1, round(width / rng.uniform(0.45, 1.1))), 1 if french else int(rng.integers(1, 4))
        parts += [(x - 0.022, x + 0.022, deep, deep + 0.05, low, high) for x in np.linspace(-h, h, cols + 1)]
        parts += [(-h, h, deep, deep + 0.045, z - 0.022, z + 0.022) for z in np.linspace(low, high, rows + 1)]
        self.attach(wall, centre, [_box(*part, frame) for part in parts], casts=False)
        dress = rng.random()
        if dress < 0.4 and self.kind != "bathroom":
            self.hang_curtains(wall, centre, h, low, high)
        elif dress < 0.55:  # a blind, part way down
            slats, paint = np.arange(high - 0.03, high - rng.uniform(0.15, 0.6) * (high - low), -0.05), style.paint()
            self.attach(
                wall, centre, [_box(0.01 - h, h - 0.01, -0.06, -0.03, z - 0.006, z + 0.006, paint) for z in slats], casts=False
            )
        corner = wall.origin + wall.u_axis * (centre - h) + wall.v_axis * low - wall.normal * 0.1
        edges = (wall.u_axis * np.float32(width), wall.v_axis * np.float32(high - low))
        self.windows.append(_Window(corner.astype(np.float32), *edges, wall.normal, self.mean_outside(wall.normal)))
        return True

    def hang_curtains(self, wall: _Plane, centre: float, h: float, low: float, high: float) -> None:
        rng, style = self.rng, self.style
        cloth = style.fabric([style.white, style.fabric_colour, style.accent][rng.integers(3)])
        bottom, width = (0.03 if rng.random() < 0.7 else low - 0.15), rng.uniform(0.28, 0.5)
        rod = _cone(0, 0, -h - 0.4, h + 0.4, 0.015, 0.015, style.metal, casts=False)
        parts = [rod.moved(_ALONG_X, np.array([0, 0.09, high + 0.14], np.float32))]
        for u in (-h - 0.1, h + 0.1):
            parts += _shift(_drape(rng, width, bottom, high + 0.12, cloth), u, 0.09)
            wall.used.append((centre + u - width / 2, centre + u + width / 2, 0, high + 0.1))
        self.attach(wall, centre, parts)

    def mean_outside(self, normal: Array) -> Array:
        """Radiance of the view, averaged over what a window with this normal lets in."""
        a, e = (g.ravel() for g in np.meshgrid(np.linspace(-1.3, 1.3, 12), np.linspace(-1.2, 1.3, 12)))
        a = a + np.arctan2(-normal[1], -normal[0])
        d = np.stack([np.cos(a) * np.cos(e), np.sin(a) * np.cos(e), np.sin(e)]).astype(np.float32)
        weight = np.maximum(-_dot(d, normal), 0) * np.cos(e)
        return ((self.outside(d) * weight).sum(1) / weight.sum()).astype(np.float32)

    def add_door(self, wall: _Plane) -> bool:
        rng, style, top = self.rng, self.style, 2.05
        opened = rng.random() < 0.5
        h, c, paint = rng.uniform(0.4, 0.47) * (1.8 if opened and rng.random() < 0.4 else 1), 0.08, style.paint()
        u = rng.uniform(0.3 + h, max(wall.length - 0.3 - h, 0.31 + h))
        if not self.clear(wall, u - h - 0.15, u + h + 0.15, 0, top + 0.1):
            return False
        wall.used.append((u - h - 0.15, u + h + 0.15, 0, top + 0.1))
        wall.gaps.append((u - h - c, u + h + c))
        foot = np.stack([wall.origin + wall.u_axis * (u + s) + wall.normal * t for s in (-h, h) for t in (0, 0.8)])
        self.footprints.append((foot[:, 0].min(), foot[:, 0].max(), foot[:, 1].min(), foot[:, 1].max()))
        casing = [(-h - c, -h, 0, 0.025, 0, top), (h, h + c, 0, 0.025, 0, top), (-h - c, h + c, 0, 0.03, top, top + c)]
        parts = [_box(*part, paint) for part in casing]
        if opened:
            wall.doorways.append((u - h, u + h, 0, top))
            parts += self.next_room(h, top, paint)
            bulb = wall.origin + wall.u_axis * u - wall.normal * 1.2 + np.array([0, 0, 2.2])
            self.lamps.append(_Lamp(bulb.astype(np.float32), _WARM * np.float32(rng.uniform(0.2, 0.6)), 0.1, beyond=True))
        else:
            leaf = paint if rng.random() < 0.7 else style.wood(along_u=False)
            parts += [
                _box(-h, h, -0.05, 0.006, 0, top, leaf),
                _ball(h - 0.07, 0.06, 0.98, 0.03, 0.03, 0.03, style.metal, gloss=0.3),
            ]
            for x0, x1 in ((0.1 - h, -0.04), (0.04, h - 0.1)):
                for z0, z1 in ((0.2, 0.95), (1.1, 1.9)):
                    parts.append(_box(x0, x1, 0, 0.016, z0, z1, leaf))
                    parts.append(_box(x0 + 0.04, x1 - 0.04, 0, 0.022, z0 + 0.04, z1 - 0.04, leaf, bevel=0.02))
        self.attach(wall, u, parts, casts=False)
        return True

    def next_room(self, h: float, top: float, paint: Texture) -> list[_Shape]:
        """What a doorway of half width h shows, in the wall's frame: jambs, then a bare room of boxes behind the wall."""
        rng = self.rng
        left, right, far, thick, high = (
            -h - rng.uniform(0.6, 1.6),
            h + rng.uniform(0.6, 1.6),
            -rng.uniform(1.6, 3.2),
            -0.12,
            2.45,
        )
        plaster = _grained(np.array([0.7, 0.67, 0.61]) * rng.uniform(0.85, 1.05), _seed(rng), 2, 0.04)
        out = [_box(-h - 0.02, -h, thick, 0, 0, top, paint), _box(h, h + 0.02, thick, 0, 0, top, paint)]
        out += [_box(-h, h, thick, 0, top, top + 0.02, paint), _box(left, right, far, far + 0.015, 0, 0.1, paint)]
        out += [_box(left, right, far - 1, 0, -0.1, 0, self.floor), _box(left, right, far - 1, thick, high, high + 0.1, paint)]
        out += [_box(left - 0.1, left, far, thick, 0, high, plaster), _box(right, right + 0.1, far, thick, 0, high, plaster)]
        out += [_box(left, right, far - 0.1, far, 0, high, plaster)]
        if rng.random() < 0.6:
            w, x = rng.uniform(0.3, 0.5), rng.uniform(-0.3, 0.3)
            out.append(_box(x - w, x + w, far, far + 0.03, 1.2, 1.8, _art(rng, w, 0.3)))
        if rng.random() < 0.5:
            out += _shift(_cabinet(rng, self.style, 0.9, 0.35, 0.08, 0.8), rng.uniform(-h, h), far + 0.03)
        return out

    # -- furniture

    def put(self, shapes: list[_Shape], axes: Array, offset: Array, margin: float = 0.02) -> bool:
        """Add the shapes, turned and moved, if they stand inside the room and on nothing else."""
        moved = [s.moved(axes.astype(np.float32), np.asarray(offset, np.float32)) for s in shapes]
        (x0, y0, _), (x1, y1, _) = _extent(moved)
        corners = np.array([[x, y, 0] for x in (x0, x1) for y in (y0, y1)])
        inside = all(((corners - wall.origin) @ wall.normal > -1e-3).all() for wall in self.walls)
        if not inside or any(x0 < b and x1 > a and y0 < d and y1 > c for a, b, c, d in self.footprints):
            return False
        self.footprints.append((x0 - margin, x1 + margin, y0 - margin, y1 + margin))
        self.add(moved)
        return True

    def stand(self, shapes: list[_Shape], tries: int = 15) -> tuple[Array, Array] | None:
        """Stand a piece against a wall where there is room. Returns its frame and position, None if it fits nowhere."""
        low, high = _extent(shapes)
        for _ in range(tries):
            wall = self.walls[self.rng.integers(1, len(self.walls))]
            if wall.length < high[0] - low[0] + 0.3:
                continue
            u = self.rng.uniform(0.14 - low[0], wall.length - 0.14 - high[0])
            offset = wall.origin + wall.u_axis * np.float32(u) + wall.normal * np.float32(0.03)
            if self.clear(wall, u + low[0], u + high[0], 0, high[2]) and self.put(shapes, wall.frame(), offset):
                wall.used.append((u + low[0], u + high[0], 0, high[2]))
                return wall.frame(), offset
        return None

    def light(self, position: Array) -> None:
        """Switch on, mostly, the lamp whose shade is the last shape added."""
        if self.rng.random() < 0.75:
            power = np.float32(self.rng.uniform(0.04, 0.14))
            self.lamps.append(_Lamp(np.asarray(position, np.float32), _WARM * power, 0.12))
            self.shapes[-1] = replace(self.shapes[-1], emit=_WARM * power * 8)

    def stand_lamp(self) -> None:
        parts, bulb = _lamp(self.rng, self.style, 0)
        placed = self.stand(parts)
        if placed:
            self.light(placed[0] @ bulb + placed[1])

    def lay_rug(self, at: Array, along: Array, long: float, short: float) -> None:
        half = np.minimum((long, short) if abs(along[0]) > 0.7 else (short, long), (self.width / 2 - 0.4, self.depth / 2 - 0.5))
        x, y = np.clip(at[:2], half + 0.2, np.array([self.width, self.depth]) - half - 0.2)
        rug = _rug(
            self.rng, *half, [self.style.accent, self.style.accent2, np.array([0.6, 0.55, 0.47]), np.array([0.1, 0.1, 0.13])]
        )
        self.add([_box(x - half[0], x + half[0], y - half[1], y + half[1], 0, 0.012, rug)], casts=False)

    def pendant(self, x: float, y: float) -> None:
        r = self.rng.uniform(0.12, 0.22)
        shade = _cone(x, y, 1.6, 1.82, r, r * 0.35, _plain([0.75, 0.72, 0.66]))
        self.add([_cone(x, y, 1.8, self.top, 0.008, 0.008, self.style.metal), shade], casts=False)
        self.light(np.array([x, y, 1.62]))

    def fill(self) -> None:
        """A few of the things that stand about in any room."""
        rng, style = self.rng, self.style
        things = [_plant(rng, style), _cabinet(rng, style, rng.uniform(0.6, 1.3), 0.4, 0.08, rng.uniform(0.7, 1.1), drawers=True)]
        if self.kind not in ("bathroom", "kitchen"):
            things += [_plant(rng, style), _bookshelf(rng, style), _sofa(rng, style, 1), _chair(rng, style)]
        for k in rng.permutation(len(things))[: 1 if self.kind == "bathroom" else 3]:
            self.stand(things[k])

    def furnish_living(self) -> None:
        rng, style = self.rng, self.style
        if rng.random() < 0.4:
            self.stand(_fireplace(rng, style, self.height))
        sofa = _sofa(rng, style, int(rng.integers(2, 4)))
        placed = None
        if rng.random() < 0.4:  # in the middle of the room, its back to the camera
            at = np.array([rng.uniform(0.3, 0.7) * self.width, self.eye[1] + rng.uniform(1.2, 1.8), 0], np.float32)
            frame = _yaw(rng.choice([-1, 1]) * rng.uniform(0, 0.5))
            placed = (frame, at) if self.put(sofa, frame, at) else None
        placed = placed or self.stand(sofa, tries=25)
        if placed:
            frame, at = placed
            if rng.random() < 0.75:
                self.lay_rug(at + frame[:, 1] * 1.7, frame[:, 0], 1.5, 1.0)
            table = _table(rng, style, rng.uniform(0.8, 1.2), rng.uniform(0.5, 0.65), rng.uniform(0.38, 0.46))
            self.put(table, frame, at + frame[:, 1] * 1.35)
            for side in (-1, 1):
                turn = frame @ _yaw(side * rng.uniform(1.0, 1.57))
                self.put(_sofa(rng, style, 1), turn, at + frame[:, 1] * 1.9 + frame[:, 0] * side * 2.0)
        self.stand(_television(rng, style))
        self.stand_lamp()
        self.stand(_bookshelf(rng, style))
        if rng.random() < 0.5:
            self.dine()

    def dine(self) -> None:
        """A table with chairs on its long sides and a lamp above."""
        rng, style = self.rng, self.style
        width, depth = rng.uniform(1.2, 1.7), rng.uniform(0.8, 0.95)
        chair = _chair(rng, style)
        parts = _table(rng, style, width, depth, 0.75)
        for x in (-0.32, 0.32):
            parts += _shift(chair, x, -0.32) + [s.moved(_yaw(np.pi), np.array([x, depth + 0.32, 0], np.float32)) for s in chair]
        parts.append(_cone(0, depth / 2, 0.75, 0.95, 0.05, 0.07, style.ornament(), gloss=0.3))
        for _ in range(10):
            at = np.array([rng.uniform(1.0, self.width - 1.0), rng.uniform(1.8, self.depth - 1.2), 0], np.float32)
            turn = _yaw(rng.integers(2) * np.pi / 2)
            if self.put(parts, turn, at):
                self.pendant(*(at + turn @ np.array([0, depth / 2, 0], np.float32))[:2])
                return

    def furnish_bedroom(self) -> None:
        rng, style = self.rng, self.style
        bed = self.stand(_bed(rng, style), tries=40)
        if bed:
            frame, at = bed
            if rng.random() < 0.5:
                self.lay_rug(at + frame[:, 1] * 1.7, frame[:, 0], 1.5, 0.9)
            table = _cabinet(rng, style, 0.46, 0.4, 0.08, 0.55, drawers=True)
            for side in (-1, 1):
                parts, bulb = _lamp(rng, style, 0.55)
                offset = at + frame[:, 0] * np.float32(side * 1.3)
                if self.put(table + parts, frame, offset):
                    self.light(frame @ bulb + offset)
        self.stand(_cabinet(rng, style, rng.uniform(1.0, 1.5), 0.48, 0.08, rng.uniform(0.8, 1.0), drawers=True))
        if rng.random() < 0.6:
            self.stand(_cabinet(rng, style, rng.uniform(1.0, 1.6), 0.6, 0.08, 2.1))
        if rng.random() < 0.5:
            self.stand(_sofa(rng, style, 1))

    def furnish_kitchen(self) -> None:
        rng, style = self.rng, self.style
        any(self.stand(_kitchen(rng, style, length, self.height), tries=20) for length in (3.8, 3.4, 3.0))
        middle = np.array([self.width / 2, self.depth * 0.5, 0], np.float32)
        if rng.random() < 0.7 and self.put(_island(rng, style), _yaw(np.pi * rng.integers(2)), middle):
            for dx in (-0.5, 0.1, 0.7):
                self.put(_stool(rng, style), np.eye(3), middle + np.array([dx, -0.75, 0]), margin=-0.1)
            for dx in (-0.4, 0.4):
                self.pendant(middle[0] + dx, middle[1])
        else:
            self.dine()
        self.stand(_cabinet(rng, style, 1.2, 0.45, 0.08, 0.9))

    def furnish_office(self) -> None:
        rng, style = self.rng, self.style
        desk = self.stand(_desk(rng, style), tries=25)
        if desk:
            frame, at = desk
            self.put(
                _office_chair(rng, style), frame @ _yaw(np.pi + rng.uniform(-0.7, 0.7)), at + frame[:, 1] * 1.45, margin=-0.2
            )
        self.stand(_bookshelf(rng, style))
        self.stand_lamp()
        if rng.random() < 0.5:
            self.lay_rug(np.array([self.width, self.depth]) / 2, np.array([1, 0]), 1.1, 0.8)

    def furnish_bathroom(self) -> None:
        rng, style = self.rng, self.style
        vanity = self.stand(_vanity(rng, style), tries=25)
        self.stand(_bathtub(rng, style, self.height), tries=25)
        self.stand(_toilet(rng, style), tries=25)
        if vanity:
            frame, at = vanity
            globes = [_ball(x, 0.1, 2.05, 0.06, 0.06, 0.06, _CHINA, emit=_WARM * 0.9) for x in (-0.25, 0.0, 0.25)]
            self.add([s.moved(frame, at) for s in globes], casts=False)
            bar = at + frame @ np.array([0, 0.2, 2.05], np.float32)
            self.lamps.append(_Lamp(bar, _WARM * np.float32(rng.uniform(0.06, 0.14)), 0.2))
        if rng.random() < 0.6:
            self.lay_rug(np.array([self.width, self.depth]) / 2, np.array([1, 0]), 0.5, 0.35)

    def furnish_empty(self) -> None:
        if self.rng.random() < 0.4:
            self.stand(_fireplace(self.rng, self.style, self.height))

    def hang_pictures(self, count: int) -> None:
        rng = self.rng
        for _ in range(count * 3):
            wall = self.walls[rng.integers(1, len(self.walls))]
            h, v = rng.uniform(0.18, 0.5), rng.uniform(0.2, 0.42)
            u, z = rng.uniform(0.2, wall.length - 0.2), rng.uniform(1.45, 1.7)
            if self.clear(wall, u - h - 0.1, u + h + 0.1, z - v - 0.12, z + v + 0.08) and count:
                wall.used.append((u - h, u + h, z - v, z + v))
                frame = self.style.wood() if rng.random() < 0.5 else self.style.metal
                mount = _box(-h - 0.025, h + 0.025, 0, 0.028, z - v - 0.025, z + v + 0.025, frame)
                self.attach(wall, u, [mount, _box(-h, h, 0, 0.032, z - v, z + v, _art(rng, h, v), gloss=0.1)], casts=False)
                count -= 1

    # -- light

    def hang_lamps(self) -> None:
        rng, style, kind, flat = self.rng, self.style, self.rng.random(), self.top == self.height
        x, y, z, power = self.width / 2, self.depth * 0.55, self.top, _WARM * np.float32(rng.uniform(0.05, 0.22))
        glow = _plain([0.75, 0.73, 0.68])
        if flat and kind < 0.4:  # recessed spots
            for px in self.width * np.array([0.33, 0.67]):
                for py in self.depth * np.array([0.33, 0.67]) + 0.4:
                    rim = _cone(px, py, z - 0.012, z + 0.01, 0.085, 0.085, style.paint())
                    self.add([rim, _cone(px, py, z - 0.014, z, 0.06, 0.06, glow, emit=power * 15)], casts=False)
                    self.lamps.append(_Lamp(np.array([px, py, z - 0.03], np.float32), power * np.float32(0.6), 0.06, down=True))
        elif kind < 0.7:  # a globe on a rod, often with a fan
            hub = min(z - 0.32, 2.5)
            parts = [_cone(x, y, hub, z, 0.015, 0.015, style.metal), _cone(x, y, hub - 0.05, hub + 0.1, 0.11, 0.13, style.metal)]
            blade = _box(0.12, 0.68, -0.07, 0.07, 0, 0.012, style.wood())
            if rng.random() < 0.6:
                parts += [blade.moved(_yaw(k * 1.2566 + 0.3), np.array([x, y, hub + 0.03], np.float32)) for k in range(5)]
            self.add([*parts, _ball(x, y, hub - 0.08, 0.13, 0.13, 0.09, glow, emit=power * 10)], casts=False)
            self.lamps.append(_Lamp(np.array([x, y, hub - 0.25], np.float32), power, 0.12))
        elif flat:  # a flush dome
            dome = [_ball(x, y, z, 0.19, 0.19, 0.09, glow, emit=power * 7), _cone(x, y, z - 0.015, z, 0.2, 0.2, style.metal)]
            self.add(dome, casts=False)
            self.lamps.append(_Lamp(np.array([x, y, z - 0.25], np.float32), power, 0.15))

    def set_sun(self) -> None:
        azimuth, elevation = self.rng.uniform(-np.pi, np.pi), self.rng.uniform(0.35, 0.95)
        sun = (np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation))
        self.sun = np.array(sun, np.float32)
        strength = self.rng.uniform(0.6, 2.0) * (self.rng.random() < 0.5)
        self.sunlight = np.array([1.15, 1.0, 0.8], np.float32) * np.float32(strength)

    def bake_ambient(self) -> None:
        """Bounced light: radiosity of the bare box, gathered into a coarse grid of six-direction irradiance probes."""
        size = np.array([self.width, self.depth, self.height], np.float32)
        a, b = (g.ravel() for g in np.meshgrid(*[(np.arange(6, dtype=np.float32) + 0.5) / 6] * 2))
        spots, fine = np.random.default_rng(0).uniform(0, 2, (2, 64)).astype(np.float32), np.full(64, 0.01, np.float32)
        patches = []
        faces = [self.walls[-1], self.walls[1], self.walls[0], self.walls[-2], self.planes[0], self.planes[1]]
        for face, plane in enumerate(faces):
            axis, side = divmod(face, 2)
            j, k = (axis + 1) % 3, (axis + 2) % 3
            p, n = np.zeros((2, 3, a.size), np.float32)
            p[axis], p[j], p[k], n[axis] = side * size[axis], a * size[j], b * size[k], 1 - 2 * side
            albedo = plane.texture(*spots, fine).mean(1) * 0.9  # furniture swallows some
            patches.append(
                (p, n, np.full((1, a.size), size[j] * size[k] / a.size, np.float32), np.repeat(albedo[:, None], a.size, 1))
            )
        p, n, (area,), albedo = (np.concatenate(x, 1) for x in zip(*patches, strict=True))
        direct = sum((colour[:, None] * _strength(light, p, n) for light, colour in self.lights(False)), np.zeros_like(p))
        direct += self.sunlight[:, None] * _sun_strength(self, p, n, self.sun[:, None])
        form = _form_factors(p, n, p, n, area)
        radiosity = total = albedo * direct
        for _ in range(5):
            radiosity = albedo * np.einsum("ij,cj->ci", form, radiosity)
            total = total + radiosity
        received = (total / albedo * area).sum(1)
        self.illuminant = received / received[1]
        self.probe_counts = (5, 5, 4)
        axes = [np.linspace(0.12, 0.88, k, dtype=np.float32) * s for k, s in zip(self.probe_counts, size, strict=True)]
        at = np.stack([g.ravel() for g in np.meshgrid(*axes, indexing="ij")])
        probes = np.zeros((at.shape[1], 6, 3), np.float32)
        for face in range(6):
            direction = np.zeros_like(at)
            direction[face // 2] = 1 - 2 * (face % 2)
            probes[:, face] = np.einsum("ij,cj->ic", _form_factors(at, direction, p, n, area), total)
        self.probes = probes.reshape(-1, 3)

    def contains(self, p: Array) -> Array:
        """Whether points are in this room, reveals included, and not in the next one."""
        return (p[0] > -0.2) & (p[0] < self.width + 0.2) & (p[1] > -0.2) & (p[1] < self.depth + 0.2)

    def lights(self, beyond: bool = True) -> list[tuple]:
        lamps = [(lamp, lamp.intensity) for lamp in self.lamps if beyond or not lamp.beyond]
        return [(window, window.radiance) for window in self.windows] + lamps

    def ambient(self, p: Array, n: Array) -> Array:
        """Bounced irradiance (3, N) at points with normals."""
        size, (_, ny, nz) = (self.width, self.depth, self.height), self.probe_counts
        cell, part = np.zeros(p.shape[1], np.int64), []
        for k, (count, stride) in enumerate(zip(self.probe_counts, (ny * nz * 6, nz * 6, 6), strict=True)):
            x = np.clip((p[k] / size[k] - 0.12) / 0.76, 0, 1) * (count - 1)
            i = np.minimum(x.astype(np.int64), count - 2)
            cell += i * stride
            part.append(x - i)
        out = np.zeros((p.shape[1], 3), np.float32)
        for k in range(3):
            some = np.flatnonzero(np.abs(n[k]) > 0.03)  # most normals are along one axis
            if not some.size:
                continue
            at, (x, y, z), total = cell[some] + 2 * k + (n[k, some] < 0), (f[some] for f in part), np.float32(0)
            for i, wx in ((0, 1 - x), (ny * nz * 6, x)):
                for j, wy in ((0, 1 - y), (nz * 6, y)):
                    for m, wz in ((0, 1 - z), (6, z)):
                        total = total + (wx * wy * wz)[:, None] * self.probes[at + (i + j + m)]
            out[some] += total * (n[k, some] ** 2)[:, None]
        return out.T


def _outside(rng: Rng) -> Callable[[Array], Array]:
    """The view: sky with clouds over hills, trees, houses and a lawn, as a function of direction (3, N) -> radiance (3, N)."""
    seed, haze, cover, trees = _seed(rng), rng.uniform(0.3, 0.8), rng.uniform(0.2, 0.7), rng.uniform(0.02, 0.22)
    blue = np.array([0.28, 0.5, 0.95]) * rng.uniform(0.9, 1.3)
    leaf = np.array([0.15, 0.22, 0.075]) * rng.uniform(0.8, 1.5)
    grass = np.array([0.15, 0.23, 0.07]) * rng.uniform(0.8, 1.5)
    houses = []
    for a in np.linspace(-np.pi, np.pi, 9)[:-1]:
        colour = rng.uniform(0.4, 0.8) * rng.uniform(0.85, 1.0, 3)
        houses.append((a + rng.uniform(-0.2, 0.2), rng.uniform(0.14, 0.26), rng.uniform(0.05, 0.12), colour))

    def foliage(around: Array, rise: Array, scale: float) -> Array:
        clumps, leaves = (_noise(around * scale, rise * scale, seed + 40, 2), _noise(around * 70, rise * 70, seed + 45, 3))
        return _tint(leaf, 0.3 + 0.7 * clumps + 1.2 * leaves * leaves) * _mix([1, 1, 1], [1.5, 1.1, 0.7], clumps)

    def radiance(d: Array) -> Array:
        around, flat = np.arctan2(d[1], d[0]), np.hypot(d[0], d[1]) + np.float32(1e-6)
        rise = d[2] / flat
        foot = np.full_like(rise, 0.004)
        up = np.clip(rise, 0, 3)
        clouds = np.clip((_noise(around * 3, up * 9, seed, 4) - 1 + cover) * 3, 0, 1)
        out = _mix(_mix([0.95, 1.0, 1.08], blue, np.clip(up * 1.6, 0, 1) * haze), [1.25, 1.25, 1.28], clouds)
        hills = 0.02 + 0.06 * _noise(around * 2, around * 0, seed + 9, 3)
        out = _mix(out, [0.3, 0.38, 0.42], _step(hills - rise))
        crowns = 0.65 * _noise(around * 5, around * 0, seed + 20, 2) + 0.35 * _noise(around * 45, rise * 45, seed + 30, 2)
        out = _mix(out, foliage(around, rise, 14), _step(trees * (crowns * 2.6 - 0.7) - rise))
        for centre, half, height, colour in houses:
            x = (around - centre + np.pi) % (2 * np.pi) - np.pi
            if not (np.abs(x) < half * 1.1).any():
                continue
            across, storey = x / half, rise / height
            siding = 1 - 0.2 * _line((rise * 120 % 1 - 0.5) / 120, 0.002, foot)
            pane = np.maximum(np.abs(across * 2 % 1 - 0.5) / 0.16, np.abs(storey - 0.35) / 0.35)
            wall = _mix(
                _mix(_tint(colour * 0.9, siding), [0.85] * 3, _step(1.25 - pane, 8)), [0.1, 0.12, 0.15], _step(1 - pane, 8)
            )
            out = _mix(out, wall, _step(np.minimum(half - np.abs(x), height - rise)))
            slope = height + 0.07 * np.clip(1.6 * (1.1 - np.abs(across)), 0, 1)
            roof = np.minimum(np.minimum(rise - height, slope - rise), 1.1 * half - np.abs(x))
            out = _mix(out, _tint(colour * [0.3, 0.24, 0.22], 0.8 + 0.4 * _noise(around * 90, rise * 200, seed)), _step(roof))
        far = 1.5 / np.maximum(-rise, 0.02)
        x, y = far * np.cos(around), far * np.sin(around)
        lawn = _tint(
            grass, 0.65 + 0.4 * _noise(x * 0.6, y * 0.6, seed + 50, 2) + 0.3 * _noise(around * 60, rise * 150, seed + 51, 2)
        )
        path = (x * np.cos(seed) + y * np.sin(seed) + _noise(y * 0.3, x * 0.3, seed)) % 9 - 4.5
        out = _mix(out, _mix(lawn, [0.5, 0.48, 0.45], _step(0.7 - np.abs(path), 8)), _step(-0.03 - rise))
        hedge = -0.11 + 0.16 * _noise(around * 6, around * 0, seed + 60, 4)
        shade = np.clip(1.1 - 4 * (hedge - rise), 0.3, 1)
        return _mix(out, foliage(around, rise, 22) * shade, _step(np.minimum(hedge - rise, rise + 0.25))).astype(np.float32)

    return radiance


# ------------------------------------------------------------------------------------------------------------------- light


def _form_factors(p: Array, n: Array, q: Array, m: Array, area: Array) -> Array:
    """(N, M): what fraction of a diffuse receiver's hemisphere at p patch q fills."""
    d = q[:, None, :] - p[:, :, None]
    square = _dot(d, d) + np.float32(1e-6)
    facing = np.maximum(_dot(d, n[:, :, None]), 0) * np.maximum(-_dot(d, m[:, None, :]), 0)
    return facing * area / (np.pi * square * np.maximum(square, area))


def _strength(light: _Window | _Lamp, p: Array, n: Array) -> Array:
    """Unshadowed irradiance (N,) per unit of the light's radiance (window) or intensity (lamp)."""
    if isinstance(light, _Lamp):
        d = light.position[:, None] - p
        square = _dot(d, d)
        cosine = np.maximum(_dot(d, n), 0) / np.sqrt(square)
        if light.down:
            cosine = cosine * np.maximum(d[2], 0) / np.sqrt(square)
        return cosine / np.maximum(square, 0.02)
    total = np.zeros(p.shape[1], np.float32)
    across = (0.17, 0.5, 0.83)
    for a in across:
        for b in (0.25, 0.75):
            d = light.point(a, b) - p
            square = _dot(d, d)
            facing = np.maximum(_dot(d, n), 0) * np.maximum(-_dot(d, light.normal), 0)
            total += facing / (square * np.maximum(square, 0.12 * light.area))
    return total * np.float32(light.area / 6)


def _sun_strength(room: _Room, p: Array, n: Array, towards: Array) -> Array:
    """Cosine of the sun at points that see it through a window, else 0. Furniture isn't asked."""
    out = np.zeros(p.shape[1], np.float32)
    if not room.sunlight.any():
        return out
    for window in room.windows:
        falling = -_dot(towards, window.normal)
        q = p - window.corner[:, None]
        t = _dot(q, window.normal) / np.where(falling > 1e-3, falling, np.float32(np.inf))
        q = q + t * towards
        inside = (t > 0) & (falling > 1e-3)
        for edge in (window.edge_u, window.edge_v):
            s = _dot(q, edge) / _dot(edge, edge)
            inside &= (s > 0) & (s < 1)
        out = np.where(inside, np.maximum(_dot(n, towards), 0), out)
    return out


def _cast(room: _Room, p: Array, d: Array) -> tuple[Array, Array]:
    """First blocking shape along p + t d for t in (0, 1): t (N,), 1 where there is none, and its number in `blockers`, -1."""
    t = np.ones(p.shape[1], np.float32)
    which = np.full(p.shape[1], -1, np.int32)
    inverse = 1 / (d + np.float32(1e-12))
    number = 0
    for group in room.groups:
        near, far = np.float32(0), np.float32(1)
        for k in range(3):
            a, b = (group.low[k] - p[k]) * inverse[k], (group.high[k] - p[k]) * inverse[k]
            near, far = np.maximum(near, np.minimum(a, b)), np.minimum(far, np.maximum(a, b))
        some = np.flatnonzero(near < far)
        if some.size:
            ps, ds, best, name = p[:, some], d[:, some], t[some], which[some]
            for k, shape in enumerate(group.shapes):
                new = _hit(shape, _to_local(shape, ps - shape.centre[:, None]), _to_local(shape, ds))
                closer = new < best
                best = np.where(closer, new, best)
                name[closer] = number + k
            t[some], which[some] = best, name
        number += len(group.shapes)
    return t, which


_SPHERE = np.stack([  # 32 directions, evenly spread
    np.sqrt(1 - ((np.arange(32) + 0.5) / 16 - 1) ** 2) * np.cos(np.arange(32) * 2.399963),
    np.sqrt(1 - ((np.arange(32) + 0.5) / 16 - 1) ** 2) * np.sin(np.arange(32) * 2.399963),
    (np.arange(32) + 0.5) / 16 - 1,
]).astype(np.float32)  # fmt: skip
_SHUFFLE = np.array([0, 8, 2, 10, 12, 4, 14, 6, 3, 11, 1, 9, 15, 7, 13, 5])  # ordered dither: neighbours differ most


def _room_exit(room: _Room, o: Array, d: Array, doorways: bool = True) -> tuple[Array, Array]:
    """Where rays leave the room's shell: t and plane number; inf and -1 through an opening or for rays that never were inside."""
    t, which = np.full(d.shape[1:], np.inf, np.float32), np.full(d.shape[1:], -1, np.int32)
    for number, plane in enumerate(room.planes):
        n = plane.normal
        away = sum(d[k] * n[k] for k in range(3) if n[k])
        height = sum((o[k] - plane.origin[k]) * n[k] for k in range(3) if n[k])
        new = np.where((away < 0) & (height > 0), -height / np.minimum(away, -1e-9), np.float32(np.inf))
        closer = new < t
        t, which = np.where(closer, new, t), np.where(closer, number, which)
    for number, plane in enumerate(room.planes):
        openings = plane.openings + plane.doorways * doorways
        if openings:
            here = np.nonzero(which == number)
            p = np.stack(
                [o[k] + t[here] * d[k][here] if np.ndim(o[k]) == 0 else o[k][here] + t[here] * d[k][here] for k in range(3)]
            )
            u, v = plane.coords(p)
            gone = np.zeros(u.shape, bool)
            for u0, u1, v0, v1 in openings:
                gone |= (u > u0) & (u < u1) & (v > v0) & (v < v1)
            t[here], which[here] = np.where(gone, np.float32(np.inf), t[here]), np.where(gone, -1, which[here])
    return t, which


def _direct(room: _Room, p: Array, n: Array, pattern: Array) -> tuple[list[tuple], Array]:
    """One shadow ray per light and one for ambient occlusion, chosen by `pattern` (N,) in 0..15.

    Returns (colour, unshadowed strength (N,)) per light and the visibilities (lights + 1, N), the ambient one last.
    """
    start = p + n * np.float32(2e-3)
    terms, visible = [], []
    indoors = room.contains(p)
    for number, (light, colour) in enumerate(room.lights()):
        strength = _strength(light, p, n)
        if isinstance(light, _Lamp) and light.beyond:
            strength *= ~indoors
        choice = _SHUFFLE[(pattern * 5 + number * 7) % 16]
        if isinstance(light, _Lamp):
            goal = light.position[:, None] + _SPHERE[:, choice * 2] * np.float32(light.radius)
        else:
            goal = light.point(((choice % 4 + 0.5) / 4).astype(np.float32), ((choice // 4 + 0.5) / 4).astype(np.float32))
        seen = np.ones(p.shape[1], np.float32)
        lit = np.flatnonzero(strength * colour[1] > 2e-3)  # less wouldn't show
        if lit.size:
            seen[lit] = _cast(room, start[:, lit], goal[:, lit] - start[:, lit])[1] < 0
        terms.append((colour, strength))
        visible.append(seen)
    if room.sunlight.any():
        towards = room.sun[:, None] + _SPHERE[:, _SHUFFLE[pattern] * 2] * np.float32(0.012)
        sun = (_sun_strength(room, p, n, towards) > 0).astype(np.float32)
        lit = np.flatnonzero(sun)
        if lit.size:
            sun[lit] = _cast(room, start[:, lit], np.repeat(room.sun[:, None] * 12, lit.size, 1))[1] < 0
        terms.append((room.sunlight, np.maximum(_dot(n, room.sun), 0)))
        visible.append(sun)
    d = n * np.float32(1.001) + _SPHERE[:, _SHUFFLE[pattern] * 2]
    d *= np.float32(0.9) / np.sqrt(_dot(d, d))
    t = np.minimum(_cast(room, start, d)[0], _room_exit(room, start, d)[0])
    visible.append(1 - np.float32(0.64) * (1 - t) ** 2)
    return terms, np.stack(visible)


def _smooth(visible: Array, code: Array) -> Array:
    """Average over the 4 x 4 blocks the shadow pattern repeats in, never across an edge of `code` (H, W)."""
    for axis in (0, 1):
        total, count = np.zeros_like(visible), np.zeros(code.shape, np.float32)
        size = code.shape[axis]
        for shift in (-1, 0, 1, 2):
            at = np.clip(np.arange(size) + shift, 0, size - 1)
            same = (np.take(code, at, axis) == code).astype(np.float32)
            total += np.take(visible, at, axis + 1) * same
            count += same
        visible = total / count
    return visible


# ---------------------------------------------------------------------------------------------------------------- renderer

_STRIP = 1 << 17  # lighting points rendered at once: bounds the memory of large pictures


def _render(room: _Room, height: int, width: int) -> tuple[Array, Array]:
    """Linear radiance (H, W, 3) and the share of each pixel that looks outside (H, W)."""
    rows = max(8, _STRIP // width)
    parts = [_render_strip(room, height, width, top, min(top + rows, height)) for top in range(0, height, rows)]
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def _render_strip(room: _Room, height: int, width: int, top: int, bottom: int) -> tuple[Array, Array]:
    """Rows top..bottom. Geometry and texture at 2 x 2 samples a pixel, lighting once a pixel."""
    first, last = max(top - 2, 0), min(bottom + 3, height)  # what smoothing and interpolating the light reach for
    d, pitch = _camera_rays(room, height, width, first, last)
    t, which = _trace(room, d, pitch, height, width, first)
    shape = which.shape
    flat, t_flat, d_flat = which.ravel(), t.ravel(), d.reshape(3, -1)
    p = room.eye[:, None] + d_flat * np.where(np.isfinite(t_flat), t_flat, np.float32(0))
    foot = np.where(np.isfinite(t_flat), t_flat, np.float32(1)) * np.float32(pitch / 2)
    n, albedo, emit, gloss, code = _shade_surfaces(room, flat, p, foot, d_flat)
    sky = np.flatnonzero(flat < 0)
    emit[:, sky] = room.outside(d_flat[:, sky])

    light = _light_grid(room, *(x.reshape(-1, *shape) for x in (p, n, d_flat)), gloss.reshape(shape), code.reshape(shape), first)
    light = _spread(light, code.reshape(shape)).reshape(6, -1)
    lost = np.flatnonzero((light[0] < 0) & (flat >= 0))
    if lost.size:  # slivers no lighting point fell on: light them one by one
        terms, visible = _direct(room, p[:, lost], n[:, lost], lost % 16)
        light[:3, lost] = _irradiance(room, p[:, lost], n[:, lost], terms, visible)
        light[3:, lost] = 0
    radiance = albedo * np.maximum(light[:3], 0) * np.float32(1 / np.pi) + np.maximum(light[3:], 0) + emit
    crop = slice(2 * (top - first), 2 * (bottom - first))
    picture = radiance.reshape(3, *shape)[:, crop].reshape(3, bottom - top, 2, width, 2).mean((2, 4))
    outside = (which < 0)[crop].reshape(bottom - top, 2, width, 2).mean((1, 3), dtype=np.float32)
    return np.ascontiguousarray(picture.transpose(1, 2, 0)), outside


def _camera_rays(room: _Room, height: int, width: int, first: int, last: int) -> tuple[Array, float]:
    """Directions (3, 2 rows, 2 W), one metre deep, and the angle a pixel covers. The lens is shifted, never tilted."""
    pitch = 2 * room.lens / (height * width) ** 0.5
    x = ((np.arange(2 * width) + 0.5) / 2 - width / 2) * pitch
    z = (height / 2 - (np.arange(2 * first, 2 * last) + 0.5) / 2) * pitch + room.shift * pitch * height / 2
    c, s = np.cos(room.heading), np.sin(room.heading)
    d = np.empty((3, z.size, x.size), np.float32)
    d[0], d[1], d[2] = (x * c - s)[None], (x * s + c)[None], z[:, None]
    return d, pitch


def _trace(room: _Room, d: Array, pitch: float, height: int, width: int, first: int) -> tuple[Array, Array]:
    """Nearest surface along each ray: distance, and number: a plane's, then a shape's after the planes, -1 for outside."""
    t, which = _room_exit(room, room.eye, d)
    c, s = np.cos(room.heading), np.sin(room.heading)
    for number, shape in enumerate(room.shapes, len(room.planes)):
        corners = shape.corners() - room.eye
        depth = -corners[:, 0] * s + corners[:, 1] * c
        if depth.max() < 0.05:
            continue
        area = np.s_[:, :]
        if depth.min() > 0.05:
            x = (corners[:, 0] * c + corners[:, 1] * s) / depth / pitch + width / 2
            y = height / 2 + room.shift * height / 2 - corners[:, 2] / depth / pitch - first
            low = np.maximum(np.floor([2 * y.min() - 1, 2 * x.min() - 1]), 0).astype(int)
            high = np.minimum(np.ceil([2 * y.max() + 1, 2 * x.max() + 1]), t.shape).astype(int)
            if (high <= low).any():
                continue
            area = np.s_[low[0] : high[0], low[1] : high[1]]
        new = _hit(shape, _to_local(shape, room.eye - shape.centre), _to_local(shape, d[(slice(None), *area)]))
        closer = new < t[area]
        np.copyto(t[area], new, where=closer)
        np.copyto(which[area], number, where=closer)
    return t, which


def _shade_surfaces(room: _Room, which: Array, p: Array, foot: Array, d: Array) -> tuple[Array, Array, Array, Array, Array]:
    """Normals (3, N), albedo (3, N), emission (3, N), gloss (N,) and a code (N,) that changes where the light may jump."""
    n, albedo, emit = (np.zeros_like(p) for _ in range(3))
    gloss, code = np.zeros(p.shape[1], np.float32), np.full(p.shape[1], -1, np.int32)
    order = np.argsort(which, kind="stable")
    bounds = np.searchsorted(which[order], np.arange(len(room.planes) + len(room.shapes) + 1))
    for number in range(len(bounds) - 1):
        some = order[bounds[number] : bounds[number + 1]]
        if not some.size:
            continue
        face = 0
        if number < len(room.planes):
            thing = room.planes[number]
            u, v = thing.coords(p[:, some])
            n[:, some] = thing.normal[:, None]
        else:
            thing = room.shapes[number - len(room.planes)]
            n[:, some], u, v, face = _surface(thing, p[:, some])
            if thing.emit is not None:
                emit[:, some] = thing.emit[:, None]
        seen = d[:, some]
        facing = -_dot(seen, n[:, some]) / np.sqrt(_dot(seen, seen))
        albedo[:, some] = np.clip(thing.texture(u, v, foot[some] / np.sqrt(np.clip(facing, 0.05, 1))), 0.004, 0.9)
        gloss[some] = thing.gloss
        code[some] = number * 8 + face
    return n, albedo, emit, gloss, code


def _irradiance(room: _Room, p: Array, n: Array, terms: list[tuple], visible: Array) -> Array:
    total = room.ambient(p, n) * visible[-1]
    indoors = np.float32(0.6) + np.float32(0.4) * room.contains(p)
    total *= indoors  # the next room is darker, and its walls don't stand in the shadow rays' way
    for (colour, strength), seen in zip(terms, visible, strict=False):
        total += colour[:, None] * (strength * seen * (0.5 + 0.5 * visible[-1]) * indoors)
    return total


def _light_grid(room: _Room, p: Array, n: Array, d: Array, gloss: Array, code: Array, first: int) -> Array:
    """Irradiance and mirrored radiance (6, H, W), from every other sample of (3, 2H, 2W) surfaces; -1 where there is none."""
    p, n, d = (np.ascontiguousarray(x[:, ::2, ::2]).reshape(3, -1) for x in (p, n, d))
    code = np.ascontiguousarray(code[::2, ::2])
    gloss = gloss[::2, ::2].ravel()
    i, j = np.indices(code.shape)
    pattern = (((i + first) % 4) * 4 + j % 4).ravel()
    inside = np.flatnonzero(code.ravel() >= 0)
    terms, found = _direct(room, p[:, inside], n[:, inside], pattern[inside])
    visible = np.zeros((len(found), code.size), np.float32)
    visible[:, inside] = found
    visible = _smooth(visible.reshape(-1, *code.shape), code).reshape(len(found), -1)[:, inside]
    light = np.full((6, code.size), -1, np.float32)
    light[:3, inside] = _irradiance(room, p[:, inside], n[:, inside], terms, visible)
    light[3:, inside] = 0
    shiny = np.flatnonzero(gloss > 0)
    if shiny.size:
        light[3:, shiny] = _mirrored(room, p[:, shiny], n[:, shiny], d[:, shiny], gloss[shiny], pattern[shiny])
        light[3:] = _smooth(light[3:].reshape(3, *code.shape), code).reshape(3, -1)
    return light.reshape(6, *code.shape)


def _mirrored(room: _Room, p: Array, n: Array, d: Array, gloss: Array, pattern: Array) -> Array:
    """What a glossy surface reflects, slightly blurred, times its Fresnel reflectance."""
    d = d / np.sqrt(_dot(d, d))
    cosine = -_dot(d, n)
    rough = np.where(gloss == _MIRROR, 0, np.clip(0.12 * (1 - gloss) + 0.03, 0, 1)).astype(np.float32)
    r = d + 2 * cosine * n + _SPHERE[:, _SHUFFLE[pattern] * 2] * rough
    start = p + n * np.float32(4e-3)
    far = np.float32(15)
    t, which = _cast(room, start, r * far)
    exit_t, plane = _room_exit(room, start, r, doorways=False)
    number = np.where(which >= 0, which + len(room.planes), plane)
    q = start + r * np.minimum(t * far, np.where(np.isfinite(exit_t), exit_t, far))
    blockers = [s for group in room.groups for s in group.shapes]
    stage = _Stage(room.planes, blockers)
    normal, albedo, emit, _, _ = _shade_surfaces(stage, number.astype(np.int32), q, np.full(q.shape[1], 0.02, np.float32), r)
    light = room.ambient(q, normal)
    for source, colour in room.lights(beyond=False):
        light += colour[:, None] * (_strength(source, q, normal) * np.float32(0.8))
    seen = albedo * light * np.float32(1 / np.pi) + emit
    sky = np.flatnonzero(number < 0)
    seen[:, sky] = room.outside(r[:, sky])
    fresnel = np.where(gloss == _MIRROR, 0.9, gloss * (0.05 + 0.75 * (1 - np.clip(cosine, 0, 1)) ** 5))
    return seen * fresnel.astype(np.float32)


@dataclass
class _Stage:
    """As much of a room as `_shade_surfaces` asks for."""

    planes: list[_Plane]
    shapes: list[_Shape]


def _spread(light: Array, code: Array) -> Array:
    """(C, H, W) on every other sample -> (C, 2H, 2W), interpolated between points of one code; -1 where none is near."""
    h, w = light.shape[1:]
    out = np.empty((light.shape[0], 2 * h, 2 * w), np.float32)
    known = code[::2, ::2]
    down, right = np.minimum(np.arange(h) + 1, h - 1), np.minimum(np.arange(w) + 1, w - 1)
    for a in (0, 1):
        for b in (0, 1):
            mine = code[a::2, b::2]
            total, count = np.zeros_like(light), np.zeros((h, w), np.float32)
            for i in range(a + 1):
                for j in range(b + 1):
                    other, lit = known, light
                    if i:
                        other, lit = other[down], lit[:, down]
                    if j:
                        other, lit = other[:, right], lit[:, :, right]
                    same = (other == mine).astype(np.float32)
                    total += lit * same
                    count += same
            out[:, a::2, b::2] = np.where(count > 0, total / np.maximum(count, 1), -1)
    return out


# ------------------------------------------------------------------------------------------------------- camera and editor


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


def _photograph(rng: Rng, scene: Array, neutral: Array) -> Array:
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


def _edit(scene: Array, outside: Array, neutral: Array) -> Array:
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
    bands = None
    for frame, weight in zip(frames, weights, strict=True):
        steps = _gaussian_pyramid(frame, levels)
        masks = _gaussian_pyramid(weight / total, levels)
        laplace = [a - _expand(b, a.shape) for a, b in zip(steps, steps[1:], strict=False)] + [steps[-1]]
        mine = [a * b for a, b in zip(laplace, masks, strict=True)]
        bands = mine if bands is None else [a + b for a, b in zip(bands, mine, strict=True)]
    out = bands[-1]
    for band in reversed(bands[:-1]):
        out = _expand(out, band.shape) + band
    return out


def _to_image(x: Array) -> Image.Image:
    return Image.fromarray(np.round(np.clip(x, 0, 1) * 255).astype(np.uint8))


# --------------------------------------------------------------------------------------------------------------------- API


def render_pair(seed: int, height: int, width: int) -> tuple[Array, Array]:
    """Photograph and edit of the room that `seed` makes, each uint8 (height, width, 3), sRGB, pixel-aligned.

    The same arguments give the same bits on the same machine. Raises UserError for a side under 32 pixels or a negative seed.
    """
    if min(height, width) < _MIN_SIDE:
        raise UserError(f"synthetic pair: height and width must be at least {_MIN_SIDE}, got {height} x {width}")
    if seed < 0:
        raise UserError(f"synthetic pair: seed must be 0 or more, got {seed}")
    with np.errstate(all="ignore"):  # rays that miss divide by zero, and are masked
        room = _Room(seed)
        scene, outside = _render(room, height, width)
        neutral = room.illuminant**0.9
        source = _photograph(np.random.default_rng([seed, 1]), scene, neutral)
        return source, _edit(scene, outside, neutral)


def synthesize(
    out_dir: str | Path, count: int, height: int, width: int, seed: int = 0, workers: int | None = None, progress: bool = True
) -> Path:
    """Write `count` pairs as images/NNNN_src.jpg, images/NNNN_tar.jpg and, last of all, pairs.jsonl, whose path it returns.

    `workers` processes render (default: one a core); the files don't depend on how many. A folder that an earlier call made is
    made anew. Raises UserError for a count under 1, a side under 32 pixels, or a folder with anything else in it.
    """
    if count < 1:
        raise UserError(f"synthetic pairs: count must be at least 1, got {count}")
    if min(height, width) < _MIN_SIDE:
        raise UserError(f"synthetic pairs: height and width must be at least {_MIN_SIDE}, got {height} x {width}")
    if seed < 0:
        raise UserError(f"synthetic pairs: seed must be 0 or more, got {seed}")
    if workers is not None and workers < 1:
        raise UserError(f"synthetic pairs: workers must be at least 1, got {workers}")
    out = Path(out_dir)
    images = _claim(out)
    (out / _MARKER).write_text(json.dumps({"count": count, "height": height, "width": width, "seed": seed}) + "\n")
    seeds = [int(s) for s in np.random.SeedSequence(seed).generate_state(count, np.uint32)]
    job = partial(_write_pair, images=images, height=height, width=width, digits=max(4, len(str(count - 1))))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(workers or cores or 1, count)
    start = "fork" if "fork" in get_all_start_methods() else "spawn"  # a fork needn't import torch again, and only runs numpy
    with tqdm(total=count, desc="rooms", unit="pair", disable=None if progress else True) as bar:
        if workers == 1:
            for number, scene in enumerate(seeds):
                job(number, scene)
                bar.update()
        else:
            with ProcessPoolExecutor(workers, mp_context=get_context(start)) as pool:
                for _ in pool.map(job, range(count), seeds):
                    bar.update()
    pairs = out / "pairs.jsonl"
    partial_file = out / "pairs.jsonl.part"
    names = sorted(path.name for path in images.glob("*_src.jpg"))
    lines = [json.dumps({"src": f"images/{name}", "tar": f"images/{name.replace('_src', '_tar')}"}) + "\n" for name in names]
    partial_file.write_text("".join(lines))
    partial_file.replace(pairs)
    return pairs


def _claim(out: Path) -> Path:
    """Make or empty the output folder; refuse one that holds what `synthesize` didn't write."""
    if out.exists() and not out.is_dir():
        raise UserError(f"synthetic pairs: expected a folder to write to, got a file: {out}")
    if out.is_dir() and any(out.iterdir()) and not (out / _MARKER).is_file():
        raise UserError(
            f"synthetic pairs: expected an empty folder or one made by an earlier call, got {out} with other files in it"
        )
    images = out / "images"
    images.mkdir(parents=True, exist_ok=True)
    (out / "pairs.jsonl").unlink(missing_ok=True)
    for path in images.iterdir():
        if re.fullmatch(r"\d{4,}_(src|tar)\.jpg", path.name):
            path.unlink()
    return images


def _write_pair(number: int, seed: int, images: Path, height: int, width: int, digits: int) -> None:
    for picture, kind in zip(render_pair(seed, height, width), ("src", "tar"), strict=True):
        Image.fromarray(picture).save(images / f"{number:0{digits}}_{kind}.jpg", quality=95)
