"""Windows, lamps and patches of wall as sources: what light would arrive if nothing stood in between."""

from dataclasses import dataclass

import numpy as np

from autohdr.data.synthetic.geometry import dot
from autohdr.data.synthetic.textures import Array


@dataclass
class Window:
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
class Lamp:
    position: Array
    intensity: Array  # radiant intensity, (3,)
    radius: float
    down: bool = False  # a recessed spot: shines downwards only
    beyond: bool = False  # in the next room, whose light this room's walls keep out


def form_factors(p: Array, n: Array, q: Array, m: Array, area: Array) -> Array:
    """(N, M): the fraction of the hemisphere over a diffuse receiver at p that patch q fills."""
    d = q[:, None, :] - p[:, :, None]
    square = dot(d, d) + np.float32(1e-6)
    facing = np.maximum(dot(d, n[:, :, None]), 0) * np.maximum(-dot(d, m[:, None, :]), 0)
    return facing * area / (np.pi * square * np.maximum(square, area))


def unshadowed(light: Window | Lamp, p: Array, n: Array) -> Array:
    """Unshadowed irradiance (N,) per unit of the light's radiance (window) or intensity (lamp)."""
    if isinstance(light, Lamp):
        d = light.position[:, None] - p
        square = dot(d, d)
        cosine = np.maximum(dot(d, n), 0) / np.sqrt(square)
        if light.down:
            cosine = cosine * np.maximum(d[2], 0) / np.sqrt(square)
        return cosine / np.maximum(square, 0.02)
    total = np.zeros(p.shape[1], np.float32)
    across = (0.17, 0.5, 0.83)
    for a in across:
        for b in (0.25, 0.75):
            d = light.point(a, b) - p
            square = dot(d, d)
            facing = np.maximum(dot(d, n), 0) * np.maximum(-dot(d, light.normal), 0)
            total += facing / (square * np.maximum(square, 0.12 * light.area))
    return total * np.float32(light.area / 6)


def sun_strength(windows: list[Window], p: Array, n: Array, towards: Array) -> Array:
    """Cosine of the sun at points that see it through one of the windows, else 0. Furniture isn't asked."""
    out = np.zeros(p.shape[1], np.float32)
    for window in windows:
        falling = -dot(towards, window.normal)
        q = p - window.corner[:, None]
        t = dot(q, window.normal) / np.where(falling > 1e-3, falling, np.float32(np.inf))
        q = q + t * towards
        inside = (t > 0) & (falling > 1e-3)
        for edge in (window.edge_u, window.edge_v):
            s = dot(q, edge) / dot(edge, edge)
            inside &= (s > 0) & (s < 1)
        out = np.where(inside, np.maximum(dot(n, towards), 0), out)
    return out
