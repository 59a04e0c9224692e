"""Exteriors: a house from its street, by day and at dusk."""

from dataclasses import replace

import numpy as np

from autohdr.data.synthetic import furniture, textures
from autohdr.data.synthetic.geometry import Plane, Shape, ball, box, cone, dot, shift
from autohdr.data.synthetic.lights import Lamp
from autohdr.data.synthetic.outside import outside
from autohdr.data.synthetic.place import Place
from autohdr.data.synthetic.textures import Array, Texture, draw_seed, line, mix, noise, step, tint

# fmt: off
_SIDINGS = [(.74, .73, .7), (.62, .58, .5), (.42, .44, .46), (.3, .35, .42), (.55, .5, .38), (.24, .26, .27), (.45, .5, .42)]
_BRICKS = [(.34, .15, .1), (.42, .24, .17), (.48, .42, .36), (.26, .12, .09)]
_ROOFS = [(.1, .1, .11), (.17, .14, .12), (.2, .19, .19), (.24, .12, .085), (.13, .15, .17)]
_DRIVES = [(.5, .48, .45), (.13, .13, .13), (.36, .33, .3)]
# fmt: on


class House(Place):
    """A house with its roof, its windows, a garage or none, lawn, drive, shrubs and trees; the camera stands before it."""

    sun_reach = 40.0

    def __init__(self, seed: int):
        super().__init__(np.random.default_rng(seed))
        rng = self.rng
        self.style = furniture.Style(rng)
        self.warmth = rng.uniform(0.7, 1.3)
        self.evening = rng.random() < 0.3
        self.outside = outside(rng, self.evening)
        self.width, self.front, self.storeys = rng.uniform(9, 15), rng.uniform(10, 15), int(rng.integers(1, 3))
        self.eaves = 2.8 * self.storeys + rng.uniform(0, 0.3)
        self.paint, trim = rng.choice(_SIDINGS) * rng.uniform(0.9, 1.1), self.style.white
        brick = textures.tiles(rng, rng.choice(_BRICKS), 0.09, stagger=0.5)
        self.siding = brick if rng.random() < 0.3 else self.clapboard(self.paint)
        self.trim = textures.grained(trim, draw_seed(rng), 2.0, 0.03)
        self.glow = self.bulb(rng.uniform(0.4, 1.5))  # of a lit window
        self.set_light()
        self.build_house(brick)
        self.lay_ground()
        self.plant()
        side = rng.choice([-1, 1]) * rng.uniform(0, 0.4) * self.width
        self.eye = np.array([side, 0, rng.uniform(1.4, 2.2)], np.float32)
        self.heading = float(np.arctan2(side - rng.uniform(-0.1, 0.1) * self.width, self.front))
        self.lens, self.shift = rng.uniform(0.55, 0.8), rng.uniform(0.05, 0.35)

    def clapboard(self, colour: Array) -> Texture:
        pitch, seed = self.rng.uniform(0.1, 0.2), draw_seed(self.rng)
        return lambda u, v, foot: tint(
            colour, (1 - 0.4 * line((v / pitch % 1 - 0.5) * pitch, 0.02, foot)) * (0.95 + 0.1 * noise(u, v * 3, seed))
        )

    def set_light(self) -> None:
        """Sky, and by day the sun too, mostly, from behind the camera or from a side."""
        rng, a = self.rng, self.rng.uniform(-np.pi, 0.0)
        height = rng.uniform(0.3, 1.1)
        sun = (np.cos(a) * np.cos(height), np.sin(a) * np.cos(height), np.sin(height))
        self.sun = np.array(sun, np.float32)
        strength = rng.uniform(2, 7) * (rng.random() < 0.65) * (not self.evening)
        self.sunlight = np.array([1.12, 1.0, 0.84], np.float32) * np.float32(strength)
        around, up = (g.ravel() for g in np.meshgrid(np.linspace(-3.1, 3.1, 24), np.linspace(0.05, 1.5, 10)))
        d = np.stack([np.cos(around) * np.cos(up), np.sin(around) * np.cos(up), np.sin(up)]).astype(np.float32)
        weight = np.sin(up) * np.cos(up)
        self.sky = (self.outside(d) * weight).sum(1) / weight.sum()
        down = np.pi * self.sky + self.sunlight * np.sin(height)
        self.ground = np.array([0.16, 0.17, 0.11]) * down / np.pi
        front = np.pi / 2 * (self.sky + self.ground) + self.sunlight * max(0.3, -sun[1])
        self.illuminant = front / front[1]

    # -- the house

    def build_house(self, brick: Texture) -> None:
        rng, h, y, top = self.rng, self.width / 2, self.front, self.eaves
        deep, shingles = rng.uniform(7, 9), textures.tiles(rng, rng.choice(_ROOFS), 0.16, stagger=0.5)
        self.add([box(-h, h, y, y + deep, 0, top, self.siding), box(-h - 0.02, h + 0.02, y - 0.02, y + 1, 0, 0.35, brick)])
        self.roof(0, y + deep / 2, deep / 2, h, top, rng.uniform(0.35, 0.7), shingles, along_x=True)
        if rng.random() < 0.5:  # a chimney
            x = rng.uniform(-0.8, 0.8) * h
            self.add([box(x - 0.4, x + 0.4, y + 2.5, y + 3.4, top, top + rng.uniform(2, 3.2), brick)])
        side = rng.choice([-1, 1])
        wing = rng.uniform(2.7, 3.4)  # half of the wing that comes forward, with the garage
        self.garage = (side * (h - wing), y - rng.uniform(1.5, 3.5)) if rng.random() < 0.75 else None
        if self.garage:
            x, face = self.garage
            wall = min(top, 3.0) if rng.random() < 0.6 else top
            self.add([box(x - wing, x + wing, face, y + 1, 0, wall, brick if rng.random() < 0.4 else self.siding)])
            self.roof(x, (face + y) / 2 + 1.5, wing, (y - face) / 2 + 1.5, wall, rng.uniform(0.45, 0.8), shingles, along_x=False)
            gate = textures.boards(self.style.white if rng.random() < 0.7 else self.style.wood_colour, 0.55)
            self.add([box(x - 2.5, x + 2.5, face - 0.02, face, 0, 2.4, self.trim)], casts=False)
            self.add([box(x - 2.35, x + 2.35, face - 0.03, face, 0, 2.25, gate)], casts=False)
            if wall > 4:
                self.window(x, face, 4.2, 1.2, 1.3)
            self.lantern(x + 2.7, face, 2.0)
            left, right = (-h, x - wing) if side > 0 else (x + wing, h)
        else:
            left, right = -h, h
        columns = max(2, int((right - left) / rng.uniform(2.2, 3.0)))
        entrance = int(rng.integers(columns))
        for column in range(columns):
            x = left + (column + 0.5) * (right - left) / columns
            for storey in range(self.storeys):
                if storey == 0 and column == entrance:
                    self.entrance(x)
                else:
                    self.window(x, y, 1.55 + 2.8 * storey, rng.uniform(0.9, 1.1), 1.4)

    def roof(self, x: float, y: float, half: float, long: float, z: float, slope: float, cover: Texture, along_x: bool) -> None:
        """A gable roof over walls of height z around (x, y): `half` across the ridge, `long` along it; `slope` is its tangent."""
        parts, steps = [], 24
        for k in range(steps):  # what fills the gable, a little below the roof
            inner, low, high = half * (1 - (k + 1) / steps), z + half * slope * k / steps, z + half * slope * (k + 1) / steps
            parts.append(box(-long, long, -inner, inner, low, high, self.siding))
        run = np.hypot(half + 0.4, (half + 0.4) * slope)
        c, s = 1 / np.hypot(1, slope), slope / np.hypot(1, slope)
        for side in (-1, 1):
            slab = box(-long - 0.35, long + 0.35, -run / 2, run / 2, -0.08, 0.08, cover)
            axes = np.array([[1, 0, 0], [0, c, side * s], [0, -side * s, c]], np.float32)
            middle = np.array([0, side * (half + 0.4) / 2, z + half * slope - (half + 0.4) * slope / 2 + 0.08], np.float32)
            parts.append(slab.moved(axes, middle))
        turn = np.eye(3, dtype=np.float32) if along_x else np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]], np.float32)
        self.add([part.moved(turn, np.array([x, y, 0], np.float32)) for part in parts])

    def window(self, x: float, y: float, z: float, wide: float, high: float) -> None:
        """Sashes in a casing, with shutters or without; lit at dusk, mostly."""
        rng, h, v = self.rng, wide / 2, high / 2
        lit = self.glow * np.float32(rng.uniform(0.5, 1.3)) if self.evening and rng.random() < 0.75 else None
        blind = textures.plain([0.03, 0.035, 0.04] if rng.random() < 0.7 else [0.3, 0.29, 0.27])
        pane = box(x - h, x + h, y - 0.03, y, z - v, z + v, blind, gloss=0.8, emit=lit)
        bars = [(x - h - 0.1, x + h + 0.1, z + v, z + v + 0.12), (x - h - 0.12, x + h + 0.12, z - v - 0.1, z - v)]
        bars += [(x - h - 0.1, x - h, z - v, z + v), (x + h, x + h + 0.1, z - v, z + v), (x - h, x + h, z - 0.03, z + 0.03)]
        bars += [(a - 0.015, a + 0.015, z - v, z + v) for a in np.linspace(x - h, x + h, int(rng.integers(2, 5)))[1:-1]]
        self.add([pane, *(box(a, b, y - 0.07, y, c, d, self.trim) for a, b, c, d in bars)], casts=False)
        if self.style.painted:
            shutter = textures.boards(self.style.accent * 0.6, 0.08)
            sides = [(x - h - 0.5, x - h - 0.12), (x + h + 0.12, x + h + 0.5)]
            self.add([box(a, b, y - 0.05, y, z - v, z + v, shutter) for a, b in sides], casts=False)

    def entrance(self, x: float) -> None:
        rng, y, step_ = self.rng, self.front, textures.grained([0.42, 0.4, 0.37], draw_seed(self.rng), 8, 0.2)
        leaf = self.style.paint(self.style.accent) if rng.random() < 0.6 else self.style.wood(along_u=False)
        self.door = x
        parts = [box(x - 0.62, x + 0.62, y - 0.05, y, 0.3, 2.55, self.trim), box(x - 0.48, x + 0.48, y - 0.07, y, 0.3, 2.4, leaf)]
        self.add([*parts, box(x - 0.3, x + 0.3, y - 0.08, y, 1.5, 2.2, textures.plain([0.04] * 3), gloss=0.8)], casts=False)
        out = rng.uniform(1.2, 2.2)
        self.add([box(x - 1.2, x + 1.2, y - out, y, 0, 0.3, step_), box(x - 1.0, x + 1.0, y - out - 0.4, y, 0, 0.15, step_)])
        if rng.random() < 0.6:  # a porch
            posts = [box(x + a - 0.09, x + a + 0.09, y - out + 0.05, y - out + 0.23, 0.3, 2.7, self.trim) for a in (-1.05, 1.05)]
            self.add([*posts, box(x - 1.3, x + 1.3, y - out - 0.1, y, 2.7, 2.95, self.trim)])
        self.lantern(x + 0.85, y, 2.0)

    def lantern(self, x: float, y: float, z: float) -> None:
        power = self.bulb(self.rng.uniform(0.03, 0.12)) * np.float32(self.evening)
        glass = ball(x, y - 0.12, z, 0.07, 0.07, 0.11, furniture.CHINA, emit=power * 25)
        self.add([glass, box(x - 0.03, x + 0.03, y - 0.1, y, z + 0.08, z + 0.14, self.style.metal)], casts=False)
        if self.evening:
            self.lamps.append(Lamp(np.array([x, y - 0.3, z], np.float32), power, 0.08))

    # -- what lies and grows around it

    def lay_ground(self) -> None:
        rng, seed = self.rng, draw_seed(self.rng)
        grass = np.array([0.11, 0.16, 0.045]) * rng.uniform(0.7, 1.4) * np.array([rng.uniform(0.8, 1.5), 1, 1])
        paved, door, edge = rng.choice(_DRIVES), self.door, self.front - 1.0
        drive = self.garage[0] if self.garage else np.inf
        bend = rng.uniform(-3, 3)

        def texture(u: Array, v: Array, foot: Array) -> Array:
            fine = (noise(u * 30, v * 30, seed, 2) - 0.5) * np.clip(0.03 / foot, 0.1, 1)
            lawn = tint(grass, 0.75 + 0.5 * noise(u * 0.5, v * 0.5, seed + 3, 3) + 0.7 * fine)
            stone = tint(paved, 0.85 + 0.3 * noise(u * 2, v * 2, seed + 5, 3))
            way = np.abs(u - door - bend * np.clip((edge - v) / edge, 0, 1) ** 2)
            path = np.maximum(2.6 - np.abs(u - drive), 0.6 - way)
            out = mix(lawn, stone, step(np.where(v < self.front, path, -1), 20))
            bed = np.minimum(v - self.front + 1.1, self.width / 2 + 0.8 - np.abs(u))
            return np.where(
                (bed > 0) & (path < 0), tint([0.13, 0.085, 0.06], 0.7 + 0.6 * noise(u * 12, v * 12, seed + 9, 2)), out
            )

        x, y, z = np.eye(3, dtype=np.float32)
        self.planes = [Plane(np.zeros(3, np.float32), z, x, y, texture)]

    def plant(self) -> None:
        rng, h = self.rng, self.width / 2
        for _ in range(rng.integers(3, 12)):
            x, r = rng.uniform(-h, h), rng.uniform(0.25, 0.6)
            if abs(x - self.door) > 1.3 + r and not (self.garage and abs(x - self.garage[0]) < 3.4 + r):
                self.add([ball(x, self.front - 0.6, r * 0.8, r, r, r, self.leaves())])
        for _ in range(rng.integers(0, 4)):
            x, y = rng.choice([-1, 1]) * rng.uniform(0.55, 1.5) * self.width, self.front + rng.uniform(-5, 14)
            self.add(shift(self.tree(rng.uniform(4, 9)), x, y))

    def leaves(self) -> Texture:
        green = np.array([0.075, 0.11, 0.035]) * self.rng.uniform(0.6, 1.5) * np.array([self.rng.uniform(0.8, 1.6), 1, 1])
        seed = draw_seed(self.rng)
        return lambda u, v, foot: tint(green, 0.3 + 1.4 * noise(u * 9, v * 9, seed, 3))

    def tree(self, height: float) -> list[Shape]:
        rng, bark = self.rng, textures.grained([0.12, 0.09, 0.07], draw_seed(self.rng), 20, 0.5)
        trunk, crown = cone(0, 0, 0, height * 0.6, height * 0.03, height * 0.015, bark), self.leaves()
        blob = ball(0, 0, 0, 1, 1, 1, crown)
        out = [trunk]
        for _ in range(9):
            at = rng.normal(0, 0.13, 3) * height + np.array([0, 0, height * 0.7])
            half = rng.uniform(0.12, 0.22, 3) * height
            out.append(replace(blob, centre=at.astype(np.float32), half=half.astype(np.float32)))
        return out

    # -- light

    def contains(self, p: Array) -> Array:
        return np.ones(p.shape[1], bool)

    def sunlit(self, p: Array, n: Array, towards: Array) -> Array:
        return np.maximum(dot(n, towards), 0)

    def ambient(self, p: Array, n: Array) -> Array:
        up = (1 + n[2]) / 2
        return (np.pi * (self.sky[:, None] * up + self.ground[:, None] * (1 - up))).astype(np.float32)
