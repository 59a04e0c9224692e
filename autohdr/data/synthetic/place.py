"""What the renderer asks of a place, a room or a house's front: shapes, lights, a view beyond them, and a camera."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from autohdr.data.synthetic.geometry import Plane, Shape, extent
from autohdr.data.synthetic.lights import Lamp, Window
from autohdr.data.synthetic.textures import Array, Rng

_WARM = np.array([1.25, 0.95, 0.55])  # a 3000 K lamp beside daylight


@dataclass(frozen=True)
class Group:
    """Shapes that block light together, behind one bounding box."""

    shapes: list[Shape]
    low: Array
    high: Array


class Place:
    """Shapes within planes, in the order in which they are added, and the lights among them."""

    planes: list[Plane]
    outside: Callable[[Array], Array]
    """The view beyond the planes: directions (3, N) -> radiance (3, N)."""
    eye: Array
    heading: float
    lens: float
    """Tangent of the half field of view, geometric mean of the two sides."""
    shift: float
    """Of the lens, upwards, in halves of the picture."""
    sun: Array
    """Towards the sun, where there is one: `sunlight` is 0 without."""
    sunlight: Array
    sun_reach: float
    """Metres within which something may stand before the sun."""
    illuminant: Array
    """The colour of the light that arrives, of green 1."""
    warmth: float
    """Of the lamps: 0 is daylight's colour, 1 about 3000 K."""

    def __init__(self, rng: Rng):
        self.rng = rng
        self.shapes: list[Shape] = []
        self.groups: list[Group] = []
        self.windows: list[Window] = []
        self.lamps: list[Lamp] = []

    def add(self, shapes: list[Shape], casts: bool = True) -> None:
        self.shapes += shapes
        blockers = [s for s in shapes if s.casts] if casts else []
        if blockers:
            low, high = extent(blockers)
            self.groups.append(Group(blockers, low, high))

    def bulb(self, power: float, spread: float = 0.12) -> Array:
        """Intensity of a lamp: the place's have one colour, more or less, from warmer than 3000 K to cooler than daylight."""
        return (_WARM ** (self.warmth + self.rng.normal(0, spread)) * power).astype(np.float32)

    def lights(self, beyond: bool = True) -> list[tuple]:
        lamps = [(lamp, lamp.intensity) for lamp in self.lamps if beyond or not lamp.beyond]
        return [(window, window.radiance) for window in self.windows] + lamps

    def contains(self, p: Array) -> Array:
        """Whether points are in this place, and not in what is seen beside it."""
        raise NotImplementedError

    def sunlit(self, p: Array, n: Array, towards: Array) -> Array:
        """Cosine of the sun at points that none of the planes keeps from it, else 0. Shapes aren't asked."""
        raise NotImplementedError

    def ambient(self, p: Array, n: Array) -> Array:
        """Bounced irradiance (3, N) at points with normals."""
        raise NotImplementedError
