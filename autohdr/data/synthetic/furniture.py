"""The furniture, and the palette that keeps it together.

A builder returns shapes in a local frame: x along the wall, y from the wall (0) into the room, z up from the floor (0).
"""

from dataclasses import replace

import numpy as np

from autohdr.data.synthetic.geometry import ALONG_X, ALONG_Y, MIRROR, Shape, ball, box, cone, shift, yaw
from autohdr.data.synthetic.textures import Array, Rng, Texture, book_spines, draw_seed, grained, plain, tiles, wood_grain, woven


class Style:
    """The room's palette: every piece draws its materials from here, so that a room holds together."""

    def __init__(self, rng: Rng):
        self.rng = rng
        self.wood_colour = rng.choice(_WOODS) * rng.uniform(0.85, 1.15)
        self.fabric_colour = rng.choice(_FABRICS) * rng.uniform(0.8, 1.15)
        self.accent, self.accent2 = (rng.choice(_ACCENTS) * rng.uniform(0.8, 1.2) for _ in range(2))
        self.white = np.array([0.8, 0.79, 0.76]) * rng.uniform(0.92, 1.05)
        self.metal = plain(rng.choice([[0.05, 0.05, 0.05], [0.45, 0.44, 0.42], [0.45, 0.33, 0.15]]))
        self.painted = rng.random() < 0.4

    def wood(self, along_u: bool = True) -> Texture:
        return wood_grain(self.wood_colour, draw_seed(self.rng), along_u)

    def fabric(self, colour: Array | None = None) -> Texture:
        base = self.fabric_colour if colour is None else colour
        if self.rng.random() < 0.3:
            other = [base * self.rng.uniform(0.3, 0.7), self.white, self.accent, self.accent2][self.rng.integers(4)]
            return woven(self.rng, base, other)
        return grained(base, draw_seed(self.rng), 90.0, 0.3)

    def paint(self, colour: Array | None = None) -> Texture:
        return grained(self.white if colour is None else colour, draw_seed(self.rng), 2.0, 0.03)

    def ornament(self) -> Texture:
        return self.paint([self.white, self.accent, self.accent2][self.rng.integers(3)])

    def joinery(self) -> Texture:
        return self.paint() if self.painted else self.wood(along_u=False)

    def stone(self) -> Texture:
        return grained(self.rng.choice(_STONES), draw_seed(self.rng), 45, 0.6)


# fmt: off
_WOODS = [(.44, .21, .12), (.28, .11, .056), (.53, .32, .22), (.12, .06, .045), (.5, .43, .34), (.36, .14, .078),
          (.22, .078, .045), (.31, .092, .047), (.17, .064, .039), (.39, .17, .095), (.34, .12, .056)]
_STONES = [(.06, .06, .065), (.68, .67, .64), (.35, .28, .22), (.1, .08, .07), (.16, .13, .11)]
_FABRICS = [(.5, .47, .42), (.22, .23, .25), (.31, .14, .09), (.14, .18, .24), (.55, .45, .33), (.2, .27, .2), (.68, .65, .6),
            (.1, .1, .11), (.16, .083, .062), (.09, .11, .14), (.3, .27, .23), (.15, .046, .05), (.06, .055, .05),
            (.2, .11, .09)]
_ACCENTS = [(.12, .18, .27), (.42, .16, .08), (.5, .33, .1), (.17, .23, .15), (.14, .26, .27), (.45, .32, .3), (.3, .06, .06),
            (.55, .5, .42), (.06, .07, .09), (.36, .38, .42), (.38, .12, .07), (.25, .13, .09)]
_BLACK, CHINA = plain([.015, .015, .016]), plain([.82, .82, .8])


def _legs(x0: float, x1: float, y0: float, y1: float, top: float, r: float, texture: Texture) -> list[Shape]:
    return [cone(x, y, 0, top, r * .7, r, texture) for x in (x0 + r, x1 - r) for y in (y0 + r, y1 - r)]


def sofa(rng: Rng, style: Style, seats: int) -> list[Shape]:
    cloth = style.fabric()
    seat, arm, depth, back = rng.uniform(.6, .72), rng.uniform(.14, .24), rng.uniform(.85, 1), rng.uniform(.78, .95)
    h, top, rolled = seats * seat / 2, rng.uniform(.56, .66), arm > .19
    out = [box(-h, h, .05, depth - .02, .1, .3, cloth, bevel=.02), box(-h, h, 0, .22, .1, back - .06, cloth, bevel=.07),
           *_legs(-h - arm, h + arm, .02, depth, .12, .03, style.wood())]
    for x in (-h - arm / 2, h + arm / 2):
        out.append(box(x - arm / 2, x + arm / 2, .02, depth, .1, top, cloth, bevel=.07))
        if rolled:
            roll = cone(0, 0, -depth / 2, depth / 2, arm * .55, arm * .55, cloth)
            out.append(roll.moved(ALONG_Y, np.array([x, depth / 2, top], np.float32)))
    for k in range(seats):
        x = -h + k * seat
        out += [box(x + .01, x + seat - .01, .2, depth + .02, .29, .46, cloth, bevel=.07),
                box(x + .015, x + seat - .015, .14, .34, .44, back, cloth, bevel=.1)]
    for _ in range(rng.integers(0, 4)):
        cushion = box(-.22, .22, -.07, .07, -.2, .2, style.fabric([style.accent, style.accent2][rng.integers(2)]), bevel=.09)
        out.append(cushion.moved(yaw(rng.uniform(-.4, .4)), np.array([rng.uniform(.2 - h, h - .2), .42, .66], np.float32)))
    return out


def table(rng: Rng, style: Style, width: float, depth: float, height: float) -> list[Shape]:
    w, top = width / 2, style.wood() if rng.random() < .7 else style.stone()
    if rng.random() < .3:
        r = min(width, depth) / 2
        return [cone(0, depth / 2, height - .035, height, r, r, top, gloss=.4),
                cone(0, depth / 2, 0, .03, r * .55, r * .5, style.metal),
                cone(0, depth / 2, .03, height - .03, .05, .04, style.metal)]
    out = [box(-w, w, 0, depth, height - .04, height, top, gloss=.5)]
    out += _legs(.02 - w, w - .02, .02, depth - .02, height - .04, .03, style.wood(along_u=False))
    shelf = box(.04 - w, w - .04, .04, depth - .04, height * .3, height * .3 + .02, top)
    out += clutter(rng, style, width - .3, depth, height, 4)
    return out + [shelf] * (height < .6 and rng.random() < .5)


def chair(rng: Rng, style: Style) -> list[Shape]:
    wood, cloth = style.wood(along_u=False), style.fabric([style.fabric_colour, style.accent][rng.integers(2)])
    out = [box(-.22, .22, 0, .44, .42, .48, cloth, bevel=.03), *_legs(-.22, .22, 0, .44, .42, .022, wood)]
    if rng.random() < .5:
        return [*out, box(-.21, .21, 0, .05, .48, .95, cloth, bevel=.04)]
    out += [box(x, x + .035, 0, .035, .45, .98, wood) for x in (-.22, .185)]
    return out + [box(-.2, .2, .005, .03, z, z + .07, wood) for z in (.6, .74, .88)]


def office_chair(rng: Rng, style: Style) -> list[Shape]:
    cloth = grained([.04, .04, .045], draw_seed(rng), 60, .3)
    out = [box(-.25, .25, 0, .5, .44, .54, cloth, bevel=.06), box(-.23, .23, -.06, .04, .6, 1.15, cloth, bevel=.08),
           cone(0, .25, .08, .44, .03, .03, style.metal), box(-.03, .03, -.05, 0, .45, .7, cloth)]
    for x in (-.28, .28):
        out += [box(x - .025, x + .025, .08, .4, .68, .71, cloth), box(x - .015, x + .015, .2, .25, .48, .68, cloth)]
    for angle in np.arange(5) * 2 * np.pi / 5:
        parts = [box(0, .3, -.02, .02, .05, .08, _BLACK), ball(.29, 0, .03, .03, .03, .03, _BLACK)]
        out += [s.moved(yaw(angle), np.array([0, .25, 0], np.float32)) for s in parts]
    return out


def _panel(x0: float, x1: float, z0: float, z1: float, y: float, face: Texture, knob: Texture, at: tuple) -> list[Shape]:
    """A shaker front: a slab, a raised border and a knob."""
    x0, x1, z0, z1 = x0 + .006, x1 - .006, z0 + .006, z1 - .006
    b = min(.06, (z1 - z0) * .25)
    parts = [(x0, x1, y, y + .008, z0, z1), (x0, x1, y, y + .022, z0, z0 + b), (x0, x1, y, y + .022, z1 - b, z1),
             (x0, x0 + b, y, y + .022, z0, z1), (x1 - b, x1, y, y + .022, z0, z1)]
    return [*(box(*p, face, casts=False) for p in parts), ball(at[0], y + .035, at[1], .016, .016, .016, knob, casts=False)]


def cabinet(rng: Rng, style: Style, width: float, depth: float, z0: float, z1: float, drawers: bool = False) -> list[Shape]:
    face, h = style.joinery(), width / 2
    rows = max(2, round((z1 - z0) / .24)) if drawers else 1
    cols = max(1, round(width / (.8 if drawers else .48)))
    out = [box(-h, h, 0, depth - .02, z0, z1, face)] + [box(.03 - h, h - .03, 0, depth - .08, 0, z0, _BLACK)] * (z0 < .2)
    for i in range(rows):
        for j in range(cols):
            x, z = -h + np.array([j, j + 1]) * width / cols, z0 + np.array([i, i + 1]) * (z1 - z0) / rows
            side = x[1] - .05 if j % 2 == 0 else x[0] + .05
            knob = (x.mean(), z.mean()) if drawers else (side, z0 + .1 if z0 > 1 else min(z1 - .08, 1))
            out += _panel(x[0], x[1], z[0], z[1], depth - .02, face, style.metal, knob)
    return out


def sideboard(rng: Rng, style: Style, width: float, depth: float, height: float) -> list[Shape]:
    drawers = cabinet(rng, style, width, depth, .08, height, drawers=True)
    return drawers + clutter(rng, style, width - .25, depth - .05, height, 5)


def pouf(rng: Rng, style: Style) -> list[Shape]:
    """What stands about on a floor: a pouf, a basket or a box."""
    r, cloth = rng.uniform(.16, .3), style.fabric([style.fabric_colour, style.accent, style.accent2][rng.integers(3)])
    return [[box(-r, r, 0, 2 * r, 0, r * rng.uniform(.8, 1.6), cloth, bevel=.06)], [ball(0, r, r * .8, r, r, r * .8, cloth)],
            [cone(0, r, 0, r * 1.5, r * .7, r, woven(rng, style.wood_colour, style.wood_colour * .5))]][rng.integers(3)]


def bookshelf(rng: Rng, style: Style) -> list[Shape]:
    width, height, depth, wood = rng.uniform(.8, 1.4), rng.uniform(1.5, 2.1), .3, style.joinery()
    h, rows = width / 2, int(height / .36)
    step = (height - .09) / rows
    out = [box(-h, .03 - h, 0, depth, 0, height, wood), box(h - .03, h, 0, depth, 0, height, wood),
           box(-h, h, 0, .02, 0, height, wood)]
    for k in range(rows + 1):
        z, w = .06 + k * step, rng.uniform(.4, .94) * (width - .08)
        out.append(box(-h, h, 0, depth, z, z + .03, wood))
        x = rng.uniform(.04 - h + w / 2, h - .04 - w / 2)
        if k < rows and rng.random() < .75:
            books = book_spines(rng, w, step - .05)
            out.append(box(x - w / 2, x + w / 2, .03, depth - .06, z + .03, z + step - .02, books, casts=False))
        elif k < rows:
            out.append(ball(x, depth / 2, z + .1, .07, .07, .08, style.ornament(), gloss=.3, casts=False))
    return out


def bed(rng: Rng, style: Style) -> list[Shape]:
    h, long, top, head, wood = rng.uniform(.7, .98), 2.1, rng.uniform(.52, .66), rng.uniform(1, 1.35), style.wood()
    sheet, cover = style.fabric(style.white), style.fabric([style.white, style.accent, style.fabric_colour][rng.integers(3)])
    board = (style.fabric(), .05) if rng.random() < .5 else (wood, .01)
    out = [box(-h - .04, h + .04, 0, .09, 0, head, board[0], bevel=board[1]), box(-h, h, .06, long, .1, .3, wood),
           box(.02 - h, h - .02, .09, long - .03, .28, top, sheet, bevel=.07),
           box(-h - .03, h + .03, .75, long + .02, .24, top + .05, cover, bevel=.1), *_legs(-h, h, .1, long, .12, .035, wood)]
    if rng.random() < .6:
        out.append(box(-h - .045, h + .045, long - .75, long - .25, .3, top + .065, style.fabric(style.accent), bevel=.1))
    for x in (-h / 2, h / 2):
        out += [ball(x, .34, top + .1, h * .44, .24, .13, sheet),
                ball(x, .2, top + .2, h * .42, .12, .22, style.fabric([style.white, style.accent2][rng.integers(2)]))]
    return out + [box(-.25, .25, .42, .56, top + .02, top + .3, style.fabric(style.accent), bevel=.09)] * (rng.random() < .6)


def lamp(rng: Rng, style: Style, z: float) -> tuple[list[Shape], Array]:
    """A table lamp on a top at height z, or a floor lamp at 0: its shapes, the shade last, and where its bulb is."""
    metal, (foot, top, r) = style.metal, (.2, .33, rng.uniform(.12, .17)) if z else (.25, 1.36, rng.uniform(.17, .24))
    if z:
        parts = [ball(0, foot, z + .13, .09, .09, .13, style.ornament(), gloss=.3),
                 cone(0, foot, z + .24, z + .34, .012, .012, metal)]
    else:
        parts = [cone(0, foot, 0, .03, .15, .14, metal), cone(0, foot, .03, 1.4, .014, .014, metal)]
    shade = cone(0, foot, z + top, z + top + r * 1.5, r, r * rng.uniform(.6, .95), plain([.7, .66, .58]), casts=False)
    return [*parts, shade], np.array([0, foot, z + top + .12])


def clutter(rng: Rng, style: Style, width: float, depth: float, z: float, most: int) -> list[Shape]:
    """What lies and stands about on a top at height z: books, boxes, vases, bowls, baskets; small enough to block no light."""
    out, w = [], width / 2
    for _ in range(rng.integers(0, most + 1)):
        x, y, size, kind = rng.uniform(-w, w), rng.uniform(.1, .9) * depth, rng.uniform(.04, .11), rng.integers(4)
        if kind == 0:  # a pile of books
            for k in range(rng.integers(1, 5)):
                cover = plain(rng.choice(_ACCENTS) * rng.uniform(.4, 1.3))
                book = box(-size, size, -size * .7, size * .7, k * .03, k * .03 + .027, cover, casts=False)
                out.append(book.moved(yaw(rng.uniform(-.5, .5)), np.array([x, y, z], np.float32)))
        elif kind == 1:
            out.append(cone(x, y, z, z + size * rng.uniform(1, 3), size * .5, size * rng.uniform(.3, .8), style.ornament(),
                            gloss=.3, casts=False))
        elif kind == 2:
            things = [style.wood(), style.fabric(), plain(rng.choice(_ACCENTS) * rng.uniform(.4, 1.3)), _BLACK]
            out.append(box(x - size, x + size, y - size * .6, y + size * .6, z, z + size * rng.uniform(.6, 2),
                           things[rng.integers(4)], casts=False))
        else:
            out.append(ball(x, y, z + size * .4, size, size, size * .5, style.ornament(), gloss=.2, casts=False))
    return out


def plant(rng: Rng, style: Style) -> list[Shape]:
    size, broad = rng.uniform(.7, 1.1), rng.choice([.025, .075])
    green = np.array([.06, .14, .035]) * rng.uniform(.8, 1.6) * np.array([rng.uniform(.8, 1.4), 1, 1])
    r = .16 * size + .04
    out = [cone(0, .25, 0, .3 * size + .05, r * .75, r, style.ornament())]
    for _ in range(22):
        lift, reach = rng.uniform(.2, 1.4), rng.uniform(.35, .8) * size
        c, s = np.cos(lift), np.sin(lift)
        colour = grained(green * rng.uniform(.6, 1.5), draw_seed(rng), 40, .3)
        leaf = ball(reach / 2, 0, 0, reach / 2, broad * size, .012, colour, gloss=.1)
        turn = yaw(rng.uniform(0, 2 * np.pi)) @ np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]], np.float32)
        out.append(leaf.moved(turn, np.array([0, .25, .3 * size + rng.uniform(0, .35) * size], np.float32)))
    return out


def television(rng: Rng, style: Style) -> list[Shape]:
    w, h = rng.uniform(.5, .62), rng.uniform(.62, .75)
    return [*cabinet(rng, style, rng.uniform(1.3, 1.9), .42, .1, .5, drawers=rng.random() < .5),
            box(-.2, .2, .12, .3, .5, .515, _BLACK), box(-.03, .03, .17, .2, .5, .6, _BLACK),
            box(-w, w, .18, .21, .58, .58 + h, _BLACK, gloss=.9)]


def fireplace(rng: Rng, style: Style, ceiling: float) -> list[Shape]:
    h, brick = rng.uniform(.75, .95), rng.choice([[.35, .16, .1], [.45, .42, .38], [.75, .74, .7]])
    face, mantel = tiles(rng, brick, .075, stagger=.5), style.wood() if rng.random() < .5 else style.paint()
    out = [box(-h, -.42, 0, .3, 0, 1.25, face), box(.42, h, 0, .3, 0, 1.25, face), box(-.42, .42, 0, .3, .75, 1.25, face),
           box(-.42, .42, 0, .05, .05, .75, _BLACK), box(-h, h, 0, .65, 0, .06, style.stone()),
           box(-h - .1, h + .1, 0, .38, 1.25, 1.33, mantel)]
    if rng.random() < .6:
        out.append(box(-h, h, 0, .22, 1.33, ceiling, face if rng.random() < .5 else style.paint()))
    return out + [ball(x, .3, 1.43, .06, .06, .1, style.ornament(), gloss=.3) for x in rng.uniform(-h, h, 3)]


def kitchen(rng: Rng, style: Style, width: float, ceiling: float) -> list[Shape]:
    """Base units, worktop, splashback, wall units, a cooker with its hood; a fridge at one end."""
    steel, stone, h, top = grained([.42, .42, .43], draw_seed(rng), 60, .06), style.stone(), width / 2, min(2.2, ceiling - .1)
    end, x = h - .84, rng.uniform(.7 - h, h - 1.9)
    tile = tiles(rng, [style.white, style.accent * .6 + .3, np.array([.5, .42, .34])][rng.integers(3)], .075, stagger=.5)
    out = [box(h - .8, h, 0, .72, .02, 1.78, steel, gloss=.35), box(h - .8, h, .72, .725, 1.2, 1.21, _BLACK),
           box(h - .75, h - .72, .72, .77, .5, 1.1, style.metal), box(h - .75, h - .72, .72, .77, 1.3, 1.6, style.metal),
           box(x, x + .7, 0, .63, 0, .91, steel, gloss=.2), box(x + .06, x + .64, .63, .635, .25, .68, _BLACK, gloss=.6),
           box(x + .06, x + .64, .65, .68, .72, .745, style.metal), box(x + .03, x + .67, .05, .6, .91, .92, _BLACK, gloss=.5),
           box(x, x + .7, 0, .4, 1.6, 1.8, steel, gloss=.2), box(x + .2, x + .5, 0, .25, 1.8, top, steel, gloss=.2),
           box(-h, end, 0, .012, .91, 1.45, tile, gloss=.25, casts=False)]
    for x0, x1 in ((-h, x), (x + .7, end)):
        units = cabinet(rng, style, x1 - x0, .62, .08, .87) + cabinet(rng, style, x1 - x0, .36, 1.42, top)
        out += [box(x0, x1, 0, .65, .87, .91, stone, gloss=.5), *shift(units, (x0 + x1) / 2)]
    out += shift(clutter(rng, style, end + h - .3, .55, .91, 9), (end - h) / 2)
    return out


def island(rng: Rng, style: Style) -> list[Shape]:
    h, x = rng.uniform(.7, 1), rng.uniform(-.4, .4)
    fruit = [(-.05, 0, [.6, .25, .03]), (.05, .03, [.5, .05, .03]), (0, -.05, [.3, .45, .06])]
    return [*cabinet(rng, style, 2 * h, .7, .08, .88), box(-h - .04, h + .04, -.3, .74, .88, .92, style.stone(), gloss=.5),
            ball(x, .3, .97, .15, .15, .06, style.ornament()), *clutter(rng, style, 1.7 * h, .6, .92, 5),
            *(ball(x + a, .3 + b, 1.03, .045, .045, .045, plain(c)) for a, b, c in fruit)]


def stool(rng: Rng, style: Style) -> list[Shape]:
    return [cone(0, .2, .64, .7, .17, .18, style.fabric()), box(-.14, .14, .06, .08, .22, .24, style.metal),
            *_legs(-.17, .17, .03, .37, .64, .02, style.metal)]


def desk(rng: Rng, style: Style) -> list[Shape]:
    w, wood, keys = rng.uniform(.6, .8), style.wood(), grained([.3, .3, .3], draw_seed(rng), 60, .5)
    return [box(-w, w, 0, .68, .71, .75, wood, gloss=.2), box(-w, .04 - w, .03, .65, 0, .71, wood),
            box(-.3, .3, .2, .22, .85, 1.2, _BLACK, gloss=.8), box(-.03, .03, .16, .19, .75, .95, _BLACK),
            box(-.12, .12, .1, .26, .75, .76, _BLACK), box(-.2, .2, .42, .55, .75, .77, keys),
            *shift(cabinet(rng, style, .42, .6, .03, .7, drawers=True), w - .22, .03),
            *clutter(rng, style, 2 * w - .2, .6, .75, 6)]


def vanity(rng: Rng, style: Style) -> list[Shape]:
    """Cabinet, basin and tap under a framed mirror."""
    h, marble = rng.uniform(.45, .75), grained([.72, .71, .68], draw_seed(rng), 6, .12)
    m = h * .85
    return [*cabinet(rng, style, 2 * h, .52, .08, .8), box(-h - .02, h + .02, 0, .55, .8, .84, marble, gloss=.5),
            box(-h - .02, h + .02, 0, .02, .84, .94, marble, gloss=.4), ball(0, .28, .85, .24, .18, .035, CHINA, gloss=.6),
            ball(0, .28, .87, .19, .13, .03, plain([.6, .6, .59])), cone(0, .09, .84, .98, .015, .012, style.metal),
            box(-.012, .012, .09, .22, .97, .99, style.metal), box(-m, m, 0, .03, 1.05, 1.85, style.wood()),
            box(.04 - m, m - .04, .03, .032, 1.09, 1.81, _BLACK, gloss=MIRROR),
            *(cone(x, .12, .84, .98, .03, .03, style.ornament()) for x in (-h * .7, h * .6)),
            *clutter(rng, style, 1.8 * h, .5, .84, 3)]


def toilet(rng: Rng, style: Style) -> list[Shape]:
    return [box(-.22, .22, .02, .2, .38, .78, CHINA, bevel=.03, gloss=.4),
            box(-.23, .23, .01, .22, .78, .81, CHINA, bevel=.01),
            cone(0, .4, 0, .3, .12, .17, CHINA, gloss=.3), ball(0, .46, .3, .2, .27, .13, CHINA, gloss=.4),
            ball(0, .46, .41, .2, .26, .03, CHINA, gloss=.4), box(-.12, .12, .1, .4, 0, .35, CHINA, bevel=.04)]


def bathtub(rng: Rng, style: Style, ceiling: float) -> list[Shape]:
    h, top = .85, min(2.1, ceiling - .1)
    out = [box(-h, h, 0, .75, 0, .5, CHINA, bevel=.04, gloss=.4), box(.06 - h, h - .06, .07, .67, .5, .502, plain([.5] * 3)),
           box(-h, h, 0, .012, .5, top, tiles(rng, style.white, .15), gloss=.3, casts=False)]
    if rng.random() < .7:
        width, rod = rng.uniform(.5, 1.2), cone(0, 0, -h, h, .012, .012, style.metal, casts=False)
        cloth = style.fabric([style.white, style.accent][rng.integers(2)])
        out.append(rod.moved(ALONG_X, np.array([0, .78, 1.97], np.float32)))
        out += shift(drape(rng, width, .15, 1.95, cloth), width / 2 - h, .78)
    return out
# fmt: on


def drape(rng: Rng, width: float, z0: float, z1: float, cloth: Texture) -> list[Shape]:
    """A curtain: a row of overlapping upright elliptic cylinders for its folds."""
    folds = max(3, int(width / 0.075))
    out = []
    for k in range(folds):
        fold = cone(-width / 2 + (k + 0.5) * width / folds, 0.02 * (k % 2), z0, z1, 1, 1, cloth, casts=k % 2 == 0)
        half = (width / folds * rng.uniform(0.55, 0.75), rng.uniform(0.03, 0.05), (z1 - z0) / 2)
        out.append(replace(fold, half=np.array(half, np.float32)))
    return out
