"""Shapes and planes: where rays meet them, and which way they face there."""

from dataclasses import dataclass, field, replace

import numpy as np

from autohdr.data.synthetic.textures import Array, Texture

MIRROR = 2.0  # the gloss of a mirror
ALONG_X = np.array([[0, 0, 1], [0, 1, 0], [-1, 0, 0]], np.float32)  # lays an upright frustum along x
ALONG_Y = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]], np.float32)


@dataclass(frozen=True)
class Shape:
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

    def moved(self, axes: Array, offset: Array) -> "Shape":
        return replace(self, centre=axes @ self.centre + offset, axes=axes @ self.axes)

    def corners(self) -> Array:
        signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], np.float32)
        return self.centre + (signs * self.half) @ self.axes.T


def box(x0: float, x1: float, y0: float, y1: float, z0: float, z1: float, texture: Texture, **options) -> Shape:
    low, high = np.array([x0, y0, z0], np.float32), np.array([x1, y1, z1], np.float32)
    return Shape("box", (low + high) / 2, np.maximum((high - low) / 2, 1e-3), texture, **options)


def cone(x: float, y: float, z0: float, z1: float, r0: float, r1: float, texture: Texture, **options) -> Shape:
    centre, half = np.array([x, y, (z0 + z1) / 2], np.float32), np.array([r0, r0, (z1 - z0) / 2], np.float32)
    return Shape("cone", centre, half, texture, taper=r1 / r0, **options)


def ball(x: float, y: float, z: float, rx: float, ry: float, rz: float, texture: Texture, **options) -> Shape:
    return Shape("ball", np.array([x, y, z], np.float32), np.array([rx, ry, rz], np.float32), texture, **options)


def yaw(angle: float) -> Array:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]], np.float32)


def shift(shapes: list[Shape], x: float, y: float = 0.0, z: float = 0.0) -> list[Shape]:
    return [s.moved(np.eye(3, dtype=np.float32), np.array([x, y, z], np.float32)) for s in shapes]


def extent(shapes: list[Shape]) -> tuple[Array, Array]:
    points = np.concatenate([s.corners() for s in shapes])
    return points.min(0), points.max(0)


def _rotate(matrix: Array, x: Array) -> list[Array]:
    """matrix @ x, row by row, skipping the zeros that most matrices here are full of."""
    rows = []
    for row in matrix:
        terms = [x[k] * row[k] for k in range(3) if abs(row[k]) > 1e-7]
        rows.append(sum(terms[1:], terms[0]))
    return rows


def dot(a: Array, b: Array) -> Array:
    """Products of (3, N) or (3,) vectors, several times faster than a sum over the short axis."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def to_local(shape: Shape, vectors: Array) -> list[Array]:
    """Directions, or points less the centre, in the unit shape's frame."""
    return _rotate((shape.axes / shape.half).T, vectors)


def hit(shape: Shape, o: list[Array], d: list[Array]) -> Array:
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


def surface(shape: Shape, p: Array) -> tuple[Array, Array, Array, Array]:
    """Points on the shape -> world normal (3, N), texture coordinates u, v and face number, each (N,)."""
    q = np.stack(to_local(shape, p - shape.centre[:, None]))
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
    return normal / np.sqrt(dot(normal, normal) + np.float32(1e-12)), u, v, face


@dataclass
class Plane:
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
    used: list[tuple] = field(default_factory=list)  # (u0, u1, v0, v1) of whatever hangs or stands there

    def frame(self) -> Array:
        """Local axes of things on this wall: x along it, y into the room, z up."""
        return np.stack([self.u_axis, self.normal, self.v_axis], axis=1).astype(np.float32)

    def coords(self, p: Array) -> tuple[Array, Array]:
        q = p - self.origin[:, None]
        return dot(q, self.u_axis), dot(q, self.v_axis)
