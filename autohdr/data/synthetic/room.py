"""The room: shell, openings, furniture, lamps, sun, and the light that its surfaces throw on one another."""

from dataclasses import replace

import numpy as np

from autohdr.data.synthetic import furniture, textures
from autohdr.data.synthetic.geometry import ALONG_X, Plane, Shape, ball, box, cone, dot, extent, shift, yaw
from autohdr.data.synthetic.lights import Lamp, Window, form_factors, sun_strength, unshadowed
from autohdr.data.synthetic.outside import outside
from autohdr.data.synthetic.place import Place
from autohdr.data.synthetic.textures import Array, Texture, draw_seed

# fmt: off
_PAINTS = [(.72, .71, .68), (.7, .66, .58), (.64, .6, .54), (.7, .61, .43), (.55, .61, .54), (.52, .58, .63), (.64, .53, .41),
           (.42, .5, .46), (.75, .74, .72), (.3, .31, .32), (.42, .18, .13), (.5, .4, .3)]
_PAINT_ODDS = [.22, .19, .14, .11, .04, .06, .06, .03, .09, .02, .01, .03]
_FLOOR_WOODS = [[.37, .19, .12], [.51, .31, .21], [.22, .11, .078], [.42, .36, .28], [.34, .13, .078], [.16, .074, .05],
                [.29, .1, .056], [.24, .13, .09], [.31, .14, .078], [.11, .064, .056], [.37, .16, .09]]
_FLOOR_STONES = [[.5, .42, .33], [.6, .58, .55], [.35, .33, .31], [.53, .35, .29], [.2, .17, .15], [.31, .19, .17],
                 [.1, .1, .11], [.41, .24, .18]]
_CARPETS = [[.42, .36, .28], [.24, .23, .22], [.55, .5, .42], [.1, .13, .1], [.22, .23, .26], [.3, .24, .18], [.26, .09, .07]]
_FLOOR_ODDS = {"bathroom": [.1, .9, 0], "kitchen": [.5, .5, 0], "bedroom": [.4, 0, .6], "office": [.4, 0, .6],
               "living": [.6, .15, .25], "empty": [.5, .1, .4]}  # wood, tiles, carpet
# fmt: on


class Room(Place):
    """A furnished room with its lights, its view outside and the camera in it."""

    sun_reach = 12.0

    def __init__(self, seed: int):
        super().__init__(np.random.default_rng(seed))
        rng = self.rng
        self.style = furniture.Style(rng)
        self.kind = str(rng.choice(list(_FLOOR_ODDS), p=[0.12, 0.18, 0.2, 0.1, 0.32, 0.08]))
        small = self.kind in ("bathroom", "office")
        self.width = rng.uniform(2.8, 3.8) if small else rng.uniform(3.6, 5.4)
        self.depth = rng.uniform(3.0, 4.0) if small else rng.uniform(4.2, 6.0)
        self.height = self.top = rng.uniform(2.4, 2.9)
        self.footprints: list[tuple] = []  # (x0, x1, y0, y1) on the floor
        self.warmth = rng.choice([rng.uniform(0.7, 1.3), rng.uniform(0.1, 0.7), rng.uniform(-0.3, 0.1)], p=[0.65, 0.25, 0.1])
        self.evening = rng.random() < 0.1
        self.outside = outside(rng, self.evening)
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
            self.floor, gloss = textures.planks(rng, wood), rng.uniform(0.15, 0.6)
        elif covering == 1:
            dark = stone * 0.35 if rng.random() < 0.2 else None
            self.floor, gloss = textures.tiles(rng, stone, rng.uniform(0.25, 0.6), dark), rng.uniform(0.15, 0.6)
        else:
            self.floor, gloss = textures.carpet(rng, _CARPETS[rng.choice(7, p=[0.26, 0.2, 0.15, 0.03, 0.08, 0.2, 0.08])]), 0.0
        x, y, z = np.eye(3, dtype=np.float32)
        ceiling = textures.grained([0.78, 0.775, 0.76], draw_seed(rng), 25, 0.04)
        self.planes = [Plane(np.zeros(3, np.float32), z, x, y, self.floor, gloss)]
        if rng.random() < 0.22 and self.kind in ("living", "bedroom", "empty"):  # a vault
            ridge, slope = rng.uniform(0.3, 0.7) * w, rng.uniform(0.25, 0.5)
            boards = textures.planks(rng, wood * 1.2) if rng.random() < 0.25 else ceiling
            self.top = h + slope * max(ridge, w - ridge) * 0.8
            for side in (-slope, slope):
                n = np.array([side, 0, -1], np.float32) / np.float32(np.hypot(1, slope))
                run = np.array([n[2], 0, -n[0]], np.float32)
                self.planes.append(Plane(np.array([ridge, 0, self.top], np.float32), n, y, run, boards))
        else:
            self.planes.append(Plane(np.array([0, 0, h], np.float32), -z, x, y, ceiling))
        corners = [(0, 0), (w, 0), (w, d), (0, d)]
        cut = rng.uniform(1.0, 1.7)
        if rng.random() < 0.18 and self.kind != "bathroom":  # a bay: a far corner cut off at 45 degrees
            bays = [[(w, d - cut), (w - cut, d), (0, d)], [(w, d), (cut, d), (0, d - cut)]]
            corners = corners[:2] + bays[rng.integers(2)]
        main = textures.wallpaper(rng, paint) if rng.random() < 0.12 else textures.grained(paint, draw_seed(rng), 2.0, 0.04)
        accents = [textures.tiles(rng, np.array([0.42, 0.2, 0.13]), 0.08, stagger=0.5), textures.boards(self.style.white, 0.14)]
        accents += [textures.grained(self.style.accent * 0.7 + 0.1, draw_seed(rng), 2.0, 0.04)] + [main] * 5
        special, accent = int(rng.integers(1, len(corners))), accents[rng.integers(len(accents))]
        self.walls: list[Plane] = []
        for k, (start, end) in enumerate(zip(corners, corners[1:] + corners[:1], strict=True)):
            length = float(np.hypot(end[0] - start[0], end[1] - start[1]))
            run = np.array([(end[0] - start[0]) / length, (end[1] - start[1]) / length, 0], np.float32)
            inward = np.array([-run[1], run[0], 0], np.float32)
            texture = accent if k == special else main
            self.walls.append(Plane(np.array([*start, 0], np.float32), inward, run, z, texture, length=length))
        self.planes += self.walls
        if len(corners) == 4 and rng.random() < 0.12 and self.kind not in ("bathroom", "office"):  # an L-shaped room
            a, b, right = rng.uniform(0.5, 1.3), rng.uniform(0.5, 1.3), rng.random() < 0.5
            x0 = w - a if right else 0
            self.add(
                [
                    box(x0, x0 + a, d - b, d, 0, self.top, main),
                    box(x0 - 0.016, x0 + a + 0.016, d - b - 0.016, d, 0, 0.1, self.style.paint()),
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
            trim = [box(a, b, 0, 0.016, 0, 0.1, paint) for a, b in zip(ends[::2], ends[1::2], strict=True) if b > a]
            if crown:
                trim += [box(0, wall.length, 0, s, self.height - 0.1 + s, self.height, paint) for s in (0.02, 0.06)]
            self.attach(wall, 0, trim, casts=False)

    def clear(self, wall: Plane, u0: float, u1: float, z0: float, z1: float) -> bool:
        inside = u0 > 0.12 and u1 < wall.length - 0.12
        return inside and not any(u0 < b and u1 > a and z0 < d and z1 > c for a, b, c, d in wall.used)

    def attach(self, wall: Plane, u: float, shapes: list[Shape], casts: bool = True) -> None:
        self.add([s.moved(wall.frame(), wall.origin + wall.u_axis * np.float32(u)) for s in shapes], casts)

    def add_window(self, wall: Plane, centre: float, width: float) -> bool:
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
        self.attach(wall, centre, [box(*part, frame) for part in parts], casts=False)
        dress = rng.random()
        if dress < 0.4 and self.kind != "bathroom":
            self.hang_curtains(wall, centre, h, low, high)
        elif dress < 0.55:  # a blind, part way down
            slats, paint = np.arange(high - 0.03, high - rng.uniform(0.15, 0.6) * (high - low), -0.05), style.paint()
            self.attach(
                wall, centre, [box(0.01 - h, h - 0.01, -0.06, -0.03, z - 0.006, z + 0.006, paint) for z in slats], casts=False
            )
        corner = wall.origin + wall.u_axis * (centre - h) + wall.v_axis * low - wall.normal * 0.1
        across, up = wall.u_axis * np.float32(width), wall.v_axis * np.float32(high - low)
        self.windows.append(Window(corner.astype(np.float32), across, up, wall.normal, self.mean_outside(wall.normal)))
        return True

    def hang_curtains(self, wall: Plane, centre: float, h: float, low: float, high: float) -> None:
        rng, style = self.rng, self.style
        cloth = style.fabric([style.white, style.fabric_colour, style.accent][rng.integers(3)])
        bottom, width = (0.03 if rng.random() < 0.7 else low - 0.15), rng.uniform(0.28, 0.5)
        rod = cone(0, 0, -h - 0.4, h + 0.4, 0.015, 0.015, style.metal, casts=False)
        parts = [rod.moved(ALONG_X, np.array([0, 0.09, high + 0.14], np.float32))]
        for u in (-h - 0.1, h + 0.1):
            parts += shift(furniture.drape(rng, width, bottom, high + 0.12, cloth), u, 0.09)
            wall.used.append((centre + u - width / 2, centre + u + width / 2, 0, high + 0.1))
        self.attach(wall, centre, parts)

    def mean_outside(self, normal: Array) -> Array:
        """Radiance of the view, averaged over what a window with this normal lets in."""
        a, e = (g.ravel() for g in np.meshgrid(np.linspace(-1.3, 1.3, 12), np.linspace(-1.2, 1.3, 12)))
        a = a + np.arctan2(-normal[1], -normal[0])
        d = np.stack([np.cos(a) * np.cos(e), np.sin(a) * np.cos(e), np.sin(e)]).astype(np.float32)
        weight = np.maximum(-dot(d, normal), 0) * np.cos(e)
        return ((self.outside(d) * weight).sum(1) / weight.sum()).astype(np.float32)

    def add_door(self, wall: Plane) -> bool:
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
        parts = [box(*part, texture=paint) for part in casing]
        if opened:
            wall.doorways.append((u - h, u + h, 0, top))
            parts += self.next_room(h, top, paint)
            bulb = wall.origin + wall.u_axis * u - wall.normal * 1.2 + np.array([0, 0, 2.2])
            self.lamps.append(Lamp(bulb.astype(np.float32), self.bulb(rng.uniform(0.1, 0.7), 0.6), 0.1, beyond=True))
        else:
            leaf = paint if rng.random() < 0.7 else style.wood(along_u=False)
            parts += [
                box(-h, h, -0.05, 0.006, 0, top, leaf),
                ball(h - 0.07, 0.06, 0.98, 0.03, 0.03, 0.03, style.metal, gloss=0.3),
            ]
            for x0, x1 in ((0.1 - h, -0.04), (0.04, h - 0.1)):
                for z0, z1 in ((0.2, 0.95), (1.1, 1.9)):
                    parts.append(box(x0, x1, 0, 0.016, z0, z1, leaf))
                    parts.append(box(x0 + 0.04, x1 - 0.04, 0, 0.022, z0 + 0.04, z1 - 0.04, leaf, bevel=0.02))
        self.attach(wall, u, parts, casts=False)
        return True

    def next_room(self, h: float, top: float, paint: Texture) -> list[Shape]:
        """What a doorway of half width h shows, in the wall's frame: jambs, then a bare room of boxes behind the wall."""
        rng = self.rng
        left, right, far, thick, high = (
            -h - rng.uniform(0.6, 1.6),
            h + rng.uniform(0.6, 1.6),
            -rng.uniform(1.6, 3.2),
            -0.12,
            2.45,
        )
        plaster = textures.grained(np.array([0.7, 0.67, 0.61]) * rng.uniform(0.85, 1.05), draw_seed(rng), 2, 0.04)
        out = [box(-h - 0.02, -h, thick, 0, 0, top, paint), box(h, h + 0.02, thick, 0, 0, top, paint)]
        out += [box(-h, h, thick, 0, top, top + 0.02, paint), box(left, right, far, far + 0.015, 0, 0.1, paint)]
        out += [box(left, right, far - 1, 0, -0.1, 0, self.floor), box(left, right, far - 1, thick, high, high + 0.1, paint)]
        out += [box(left - 0.1, left, far, thick, 0, high, plaster), box(right, right + 0.1, far, thick, 0, high, plaster)]
        out += [box(left, right, far - 0.1, far, 0, high, plaster)]
        if rng.random() < 0.6:
            w, x = rng.uniform(0.3, 0.5), rng.uniform(-0.3, 0.3)
            out.append(box(x - w, x + w, far, far + 0.03, 1.2, 1.8, textures.art(rng, w, 0.3)))
        if rng.random() < 0.5:
            out += shift(furniture.cabinet(rng, self.style, 0.9, 0.35, 0.08, 0.8), rng.uniform(-h, h), far + 0.03)
        return out

    # -- furniture

    def put(self, shapes: list[Shape], axes: Array, offset: Array, margin: float = 0.02) -> bool:
        """Add the shapes, turned and moved, if they stand inside the room and on nothing else."""
        moved = [s.moved(axes.astype(np.float32), np.asarray(offset, np.float32)) for s in shapes]
        (x0, y0, _), (x1, y1, _) = extent(moved)
        corners = np.array([[x, y, 0] for x in (x0, x1) for y in (y0, y1)])
        inside = all(((corners - wall.origin) @ wall.normal > -1e-3).all() for wall in self.walls)
        if not inside or any(x0 < b and x1 > a and y0 < d and y1 > c for a, b, c, d in self.footprints):
            return False
        self.footprints.append((x0 - margin, x1 + margin, y0 - margin, y1 + margin))
        self.add(moved)
        return True

    def stand(self, shapes: list[Shape], tries: int = 15) -> tuple[Array, Array] | None:
        """Stand a piece against a wall where there is room. Returns its frame and position, None if it fits nowhere."""
        low, high = extent(shapes)
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
            power = self.bulb(self.rng.uniform(0.04, 0.16))
            self.lamps.append(Lamp(np.asarray(position, np.float32), power, 0.12))
            self.shapes[-1] = replace(self.shapes[-1], emit=power * 8)

    def stand_lamp(self) -> None:
        parts, bulb = furniture.lamp(self.rng, self.style, 0)
        placed = self.stand(parts)
        if placed:
            self.light(placed[0] @ bulb + placed[1])

    def lay_rug(self, at: Array, along: Array, long: float, short: float) -> None:
        half = np.minimum((long, short) if abs(along[0]) > 0.7 else (short, long), (self.width / 2 - 0.4, self.depth / 2 - 0.5))
        x, y = np.clip(at[:2], half + 0.2, np.array([self.width, self.depth]) - half - 0.2)
        rug = textures.rug(
            self.rng,
            half[0],
            half[1],
            [self.style.accent, self.style.accent2, np.array([0.6, 0.55, 0.47]), np.array([0.1, 0.1, 0.13])],
        )
        self.add([box(x - half[0], x + half[0], y - half[1], y + half[1], 0, 0.012, rug)], casts=False)

    def pendant(self, x: float, y: float) -> None:
        r = self.rng.uniform(0.12, 0.22)
        shade = cone(x, y, 1.6, 1.82, r, r * 0.35, textures.plain([0.75, 0.72, 0.66]))
        self.add([cone(x, y, 1.8, self.top, 0.008, 0.008, self.style.metal), shade], casts=False)
        self.light(np.array([x, y, 1.62]))

    def fill(self) -> None:
        """A few of the things that stand about in any room."""
        rng, style = self.rng, self.style
        things = [
            furniture.plant(rng, style),
            furniture.sideboard(rng, style, rng.uniform(0.6, 1.3), 0.4, rng.uniform(0.7, 1.1)),
        ]
        if self.kind not in ("bathroom", "kitchen"):
            things += [
                furniture.plant(rng, style),
                furniture.bookshelf(rng, style),
                furniture.sofa(rng, style, 1),
                furniture.chair(rng, style),
            ]
        for k in rng.permutation(len(things))[: 1 if self.kind == "bathroom" else 4]:
            self.stand(things[k])
        for _ in range(rng.integers(0, 4)):
            at = np.array([rng.uniform(0.3, self.width - 0.3), rng.uniform(1.2, self.depth - 0.5), 0], np.float32)
            self.put(furniture.pouf(rng, style), yaw(rng.uniform(0, np.pi)), at)

    def furnish_living(self) -> None:
        rng, style = self.rng, self.style
        if rng.random() < 0.4:
            self.stand(furniture.fireplace(rng, style, self.height))
        sofa = furniture.sofa(rng, style, int(rng.integers(2, 4)))
        placed = None
        if rng.random() < 0.4:  # in the middle of the room, its back to the camera
            at = np.array([rng.uniform(0.3, 0.7) * self.width, self.eye[1] + rng.uniform(1.2, 1.8), 0], np.float32)
            frame = yaw(rng.choice([-1, 1]) * rng.uniform(0, 0.5))
            placed = (frame, at) if self.put(sofa, frame, at) else None
        placed = placed or self.stand(sofa, tries=25)
        if placed:
            frame, at = placed
            if rng.random() < 0.75:
                self.lay_rug(at + frame[:, 1] * 1.7, frame[:, 0], 1.5, 1.0)
            table = furniture.table(rng, style, rng.uniform(0.8, 1.2), rng.uniform(0.5, 0.65), rng.uniform(0.38, 0.46))
            self.put(table, frame, at + frame[:, 1] * 1.35)
            for side in (-1, 1):
                turn = frame @ yaw(side * rng.uniform(1.0, 1.57))
                self.put(furniture.sofa(rng, style, 1), turn, at + frame[:, 1] * 1.9 + frame[:, 0] * side * 2.0)
        self.stand(furniture.television(rng, style))
        self.stand_lamp()
        self.stand(furniture.bookshelf(rng, style))
        if rng.random() < 0.5:
            self.dine()

    def dine(self) -> None:
        """A table with chairs on its long sides and a lamp above."""
        rng, style = self.rng, self.style
        width, depth = rng.uniform(1.2, 1.7), rng.uniform(0.8, 0.95)
        chair = furniture.chair(rng, style)
        parts = furniture.table(rng, style, width, depth, 0.75)
        for x in (-0.32, 0.32):
            parts += shift(chair, x, -0.32) + [s.moved(yaw(np.pi), np.array([x, depth + 0.32, 0], np.float32)) for s in chair]
        parts.append(cone(0, depth / 2, 0.75, 0.95, 0.05, 0.07, style.ornament(), gloss=0.3))
        for _ in range(10):
            at = np.array([rng.uniform(1.0, self.width - 1.0), rng.uniform(1.8, self.depth - 1.2), 0], np.float32)
            turn = yaw(rng.integers(2) * np.pi / 2)
            if self.put(parts, turn, at):
                self.pendant(*(at + turn @ np.array([0, depth / 2, 0], np.float32))[:2])
                return

    def furnish_bedroom(self) -> None:
        rng, style = self.rng, self.style
        bed = self.stand(furniture.bed(rng, style), tries=40)
        if bed:
            frame, at = bed
            if rng.random() < 0.5:
                self.lay_rug(at + frame[:, 1] * 1.7, frame[:, 0], 1.5, 0.9)
            table = furniture.cabinet(rng, style, 0.46, 0.4, 0.08, 0.55, drawers=True)
            for side in (-1, 1):
                parts, bulb = furniture.lamp(rng, style, 0.55)
                offset = at + frame[:, 0] * np.float32(side * 1.3)
                if self.put(table + parts, frame, offset):
                    self.light(frame @ bulb + offset)
        self.stand(furniture.sideboard(rng, style, rng.uniform(1.0, 1.5), 0.48, rng.uniform(0.8, 1.0)))
        if rng.random() < 0.6:
            self.stand(furniture.cabinet(rng, style, rng.uniform(1.0, 1.6), 0.6, 0.08, 2.1))
        if rng.random() < 0.5:
            self.stand(furniture.sofa(rng, style, 1))

    def furnish_kitchen(self) -> None:
        rng, style = self.rng, self.style
        any(self.stand(furniture.kitchen(rng, style, length, self.height), tries=20) for length in (3.8, 3.4, 3.0))
        middle = np.array([self.width / 2, self.depth * 0.5, 0], np.float32)
        if rng.random() < 0.7 and self.put(furniture.island(rng, style), yaw(np.pi * rng.integers(2)), middle):
            for dx in (-0.5, 0.1, 0.7):
                self.put(furniture.stool(rng, style), np.eye(3), middle + np.array([dx, -0.75, 0]), margin=-0.1)
            for dx in (-0.4, 0.4):
                self.pendant(middle[0] + dx, middle[1])
        else:
            self.dine()
        self.stand(furniture.sideboard(rng, style, 1.2, 0.45, 0.9))

    def furnish_office(self) -> None:
        rng, style = self.rng, self.style
        desk = self.stand(furniture.desk(rng, style), tries=25)
        if desk:
            frame, at = desk
            self.put(
                furniture.office_chair(rng, style),
                frame @ yaw(np.pi + rng.uniform(-0.7, 0.7)),
                at + frame[:, 1] * 1.45,
                margin=-0.2,
            )
        self.stand(furniture.bookshelf(rng, style))
        self.stand_lamp()
        if rng.random() < 0.5:
            self.lay_rug(np.array([self.width, self.depth]) / 2, np.array([1, 0]), 1.1, 0.8)

    def furnish_bathroom(self) -> None:
        rng, style = self.rng, self.style
        vanity = self.stand(furniture.vanity(rng, style), tries=25)
        self.stand(furniture.bathtub(rng, style, self.height), tries=25)
        self.stand(furniture.toilet(rng, style), tries=25)
        if vanity:
            frame, at = vanity
            power = self.bulb(rng.uniform(0.06, 0.14))
            globes = [ball(x, 0.1, 2.05, 0.06, 0.06, 0.06, furniture.CHINA, emit=power * 9) for x in (-0.25, 0.0, 0.25)]
            self.add([s.moved(frame, at) for s in globes], casts=False)
            bar = at + frame @ np.array([0, 0.2, 2.05], np.float32)
            self.lamps.append(Lamp(bar, power, 0.2))
        if rng.random() < 0.6:
            self.lay_rug(np.array([self.width, self.depth]) / 2, np.array([1, 0]), 0.5, 0.35)

    def furnish_empty(self) -> None:
        if self.rng.random() < 0.4:
            self.stand(furniture.fireplace(self.rng, self.style, self.height))

    def hang_pictures(self, count: int) -> None:
        rng = self.rng
        for _ in range(count * 3):
            wall = self.walls[rng.integers(1, len(self.walls))]
            h, v = rng.uniform(0.18, 0.5), rng.uniform(0.2, 0.42)
            u, z = rng.uniform(0.2, wall.length - 0.2), rng.uniform(1.45, 1.7)
            if self.clear(wall, u - h - 0.1, u + h + 0.1, z - v - 0.12, z + v + 0.08) and count:
                wall.used.append((u - h, u + h, z - v, z + v))
                frame = self.style.wood() if rng.random() < 0.5 else self.style.metal
                mount = box(-h - 0.025, h + 0.025, 0, 0.028, z - v - 0.025, z + v + 0.025, frame)
                self.attach(wall, u, [mount, box(-h, h, 0, 0.032, z - v, z + v, textures.art(rng, h, v), gloss=0.1)], casts=False)
                count -= 1

    # -- light

    def hang_lamps(self) -> None:
        rng, style, kind, flat = self.rng, self.style, self.rng.random(), self.top == self.height
        x, y, z, power = self.width / 2, self.depth * 0.55, self.top, self.bulb(rng.uniform(0.05, 0.25))
        glow = textures.plain([0.75, 0.73, 0.68])
        if flat and kind < 0.4:  # recessed spots
            for px in self.width * np.array([0.33, 0.67]):
                for py in self.depth * np.array([0.33, 0.67]) + 0.4:
                    rim = cone(px, py, z - 0.012, z + 0.01, 0.085, 0.085, style.paint())
                    self.add([rim, cone(px, py, z - 0.014, z, 0.06, 0.06, glow, emit=power * 15)], casts=False)
                    self.lamps.append(Lamp(np.array([px, py, z - 0.03], np.float32), power * np.float32(0.6), 0.06, down=True))
        elif kind < 0.7:  # a globe on a rod, often with a fan
            hub = min(z - 0.32, 2.5)
            parts = [cone(x, y, hub, z, 0.015, 0.015, style.metal), cone(x, y, hub - 0.05, hub + 0.1, 0.11, 0.13, style.metal)]
            blade = box(0.12, 0.68, -0.07, 0.07, 0, 0.012, style.wood())
            if rng.random() < 0.6:
                parts += [blade.moved(yaw(k * 1.2566 + 0.3), np.array([x, y, hub + 0.03], np.float32)) for k in range(5)]
            self.add([*parts, ball(x, y, hub - 0.08, 0.13, 0.13, 0.09, glow, emit=power * 10)], casts=False)
            self.lamps.append(Lamp(np.array([x, y, hub - 0.25], np.float32), power, 0.12))
        elif flat:  # a flush dome
            dome = [ball(x, y, z, 0.19, 0.19, 0.09, glow, emit=power * 7), cone(x, y, z - 0.015, z, 0.2, 0.2, style.metal)]
            self.add(dome, casts=False)
            self.lamps.append(Lamp(np.array([x, y, z - 0.25], np.float32), power, 0.15))

    def set_sun(self) -> None:
        azimuth, elevation = self.rng.uniform(-np.pi, np.pi), self.rng.uniform(0.35, 0.95)
        sun = (np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation))
        self.sun = np.array(sun, np.float32)
        strength = self.rng.uniform(0.6, 2.0) * (self.rng.random() < 0.5) * (not self.evening)
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
            albedo = plane.texture(spots[0], spots[1], fine).mean(1) * 0.9  # furniture swallows some
            patches.append(
                (p, n, np.full((1, a.size), size[j] * size[k] / a.size, np.float32), np.repeat(albedo[:, None], a.size, 1))
            )
        p, n, (area,), albedo = (np.concatenate(x, 1) for x in zip(*patches, strict=True))
        direct = sum((colour[:, None] * unshadowed(light, p, n) for light, colour in self.lights(False)), np.zeros_like(p))
        direct += self.sunlight[:, None] * self.sunlit(p, n, self.sun[:, None])
        form = form_factors(p, n, p, n, area)
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
            probes[:, face] = np.einsum("ij,cj->ic", form_factors(at, direction, p, n, area), total)
        self.probes = probes.reshape(-1, 3)

    def contains(self, p: Array) -> Array:
        """Whether points are in this room, reveals included, and not in the next one."""
        return (p[0] > -0.2) & (p[0] < self.width + 0.2) & (p[1] > -0.2) & (p[1] < self.depth + 0.2)

    def sunlit(self, p: Array, n: Array, towards: Array) -> Array:
        return sun_strength(self.windows, p, n, towards)

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
