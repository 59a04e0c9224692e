"""The renderer: a place as one linear picture of high dynamic range."""

from dataclasses import dataclass

import numpy as np

from autohdr.data.synthetic.geometry import MIRROR, Plane, Shape, dot, hit, surface, to_local
from autohdr.data.synthetic.lights import Lamp, unshadowed
from autohdr.data.synthetic.place import Place
from autohdr.data.synthetic.textures import Array


def _cast(place: Place, p: Array, d: Array) -> tuple[Array, Array]:
    """First blocking shape along p + t d for t in (0, 1): t (N,), 1 where there is none, and its number in `blockers`, -1."""
    t = np.ones(p.shape[1], np.float32)
    which = np.full(p.shape[1], -1, np.int32)
    inverse = 1 / (d + np.float32(1e-12))
    number = 0
    for group in place.groups:
        near, far = np.float32(0), np.float32(1)
        for k in range(3):
            a, b = (group.low[k] - p[k]) * inverse[k], (group.high[k] - p[k]) * inverse[k]
            near, far = np.maximum(near, np.minimum(a, b)), np.minimum(far, np.maximum(a, b))
        some = np.flatnonzero(near < far)
        if some.size:
            ps, ds, best, name = p[:, some], d[:, some], t[some], which[some]
            for k, shape in enumerate(group.shapes):
                new = hit(shape, to_local(shape, ps - shape.centre[:, None]), to_local(shape, ds))
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


def _room_exit(place: Place, o: Array, d: Array, doorways: bool = True) -> tuple[Array, Array]:
    """Where rays leave the room's shell: t and plane number; inf and -1 through an opening or for rays that never were inside."""
    t, which = np.full(d.shape[1:], np.inf, np.float32), np.full(d.shape[1:], -1, np.int32)
    for number, plane in enumerate(place.planes):
        n = plane.normal
        away = sum(d[k] * n[k] for k in range(3) if n[k])
        height = sum((o[k] - plane.origin[k]) * n[k] for k in range(3) if n[k])
        new = np.where((away < 0) & (height > 0), -height / np.minimum(away, -1e-9), np.float32(np.inf))
        closer = new < t
        t, which = np.where(closer, new, t), np.where(closer, number, which)
    for number, plane in enumerate(place.planes):
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


def _direct(place: Place, p: Array, n: Array, pattern: Array) -> tuple[list[tuple], Array]:
    """One shadow ray per light and one for ambient occlusion, chosen by `pattern` (N,) in 0..15.

    Returns (colour, unshadowed strength (N,)) per light and the visibilities (lights + 1, N), the ambient one last.
    """
    start = p + n * np.float32(2e-3)
    terms, visible = [], []
    indoors = place.contains(p)
    for number, (light, colour) in enumerate(place.lights()):
        strength = unshadowed(light, p, n)
        if isinstance(light, Lamp) and light.beyond:
            strength *= ~indoors
        choice = _SHUFFLE[(pattern * 5 + number * 7) % 16]
        if isinstance(light, Lamp):
            goal = light.position[:, None] + _SPHERE[:, choice * 2] * np.float32(light.radius)
        else:
            goal = light.point(((choice % 4 + 0.5) / 4).astype(np.float32), ((choice // 4 + 0.5) / 4).astype(np.float32))
        seen = np.ones(p.shape[1], np.float32)
        lit = np.flatnonzero(strength * colour[1] > 2e-3)  # less wouldn't show
        if lit.size:
            seen[lit] = _cast(place, start[:, lit], goal[:, lit] - start[:, lit])[1] < 0
        terms.append((colour, strength))
        visible.append(seen)
    if place.sunlight.any():
        towards = place.sun[:, None] + _SPHERE[:, _SHUFFLE[pattern] * 2] * np.float32(0.012)
        sun = (place.sunlit(p, n, towards) > 0).astype(np.float32)
        lit = np.flatnonzero(sun)
        if lit.size:
            sun[lit] = (
                _cast(place, start[:, lit], np.repeat(place.sun[:, None] * np.float32(place.sun_reach), lit.size, 1))[1] < 0
            )
        terms.append((place.sunlight, np.maximum(dot(n, place.sun), 0)))
        visible.append(sun)
    d = n * np.float32(1.001) + _SPHERE[:, _SHUFFLE[pattern] * 2]
    d *= np.float32(0.9) / np.sqrt(dot(d, d))
    t = np.minimum(_cast(place, start, d)[0], _room_exit(place, start, d)[0])
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


_STRIP = 1 << 17  # lighting points rendered at once: bounds the memory of large pictures


def render(place: Place, height: int, width: int) -> tuple[Array, Array]:
    """Linear radiance (H, W, 3) and the share of each pixel that looks outside (H, W)."""
    rows = max(8, _STRIP // width)
    parts = [_render_strip(place, height, width, top, min(top + rows, height)) for top in range(0, height, rows)]
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def _render_strip(place: Place, height: int, width: int, top: int, bottom: int) -> tuple[Array, Array]:
    """Rows top..bottom. Geometry and texture at 2 x 2 samples a pixel, lighting once a pixel."""
    first, last = max(top - 2, 0), min(bottom + 3, height)  # and the rows around that smoothing and interpolation read
    d, pitch = _camera_rays(place, height, width, first, last)
    t, which = _trace(place, d, pitch, height, width, first)
    shape = which.shape
    flat, t_flat, d_flat = which.ravel(), t.ravel(), d.reshape(3, -1)
    p = place.eye[:, None] + d_flat * np.where(np.isfinite(t_flat), t_flat, np.float32(0))
    foot = np.where(np.isfinite(t_flat), t_flat, np.float32(1)) * np.float32(pitch / 2)
    n, albedo, emit, gloss, code = _shade_surfaces(place, flat, p, foot, d_flat)
    sky = np.flatnonzero(flat < 0)
    emit[:, sky] = place.outside(d_flat[:, sky])

    at, normals, rays = (x.reshape(-1, *shape) for x in (p, n, d_flat))
    light = _light_grid(place, at, normals, rays, gloss.reshape(shape), code.reshape(shape), first)
    light = _spread(light, code.reshape(shape)).reshape(6, -1)
    lost = np.flatnonzero((light[0] < 0) & (flat >= 0))
    if lost.size:  # slivers without a lighting point: light each sample by itself
        terms, visible = _direct(place, p[:, lost], n[:, lost], lost % 16)
        light[:3, lost] = _irradiance(place, p[:, lost], n[:, lost], terms, visible)
        light[3:, lost] = 0
    radiance = albedo * np.maximum(light[:3], 0) * np.float32(1 / np.pi) + np.maximum(light[3:], 0) + emit
    crop = slice(2 * (top - first), 2 * (bottom - first))
    picture = radiance.reshape(3, *shape)[:, crop].reshape(3, bottom - top, 2, width, 2).mean((2, 4))
    outside = (which < 0)[crop].reshape(bottom - top, 2, width, 2).mean((1, 3), dtype=np.float32)
    return np.ascontiguousarray(picture.transpose(1, 2, 0)), outside


def _camera_rays(place: Place, height: int, width: int, first: int, last: int) -> tuple[Array, float]:
    """Directions (3, 2 rows, 2 W), one metre deep, and the angle a pixel covers. The lens is shifted, never tilted."""
    pitch = 2 * place.lens / (height * width) ** 0.5
    x = ((np.arange(2 * width) + 0.5) / 2 - width / 2) * pitch
    z = (height / 2 - (np.arange(2 * first, 2 * last) + 0.5) / 2) * pitch + place.shift * pitch * height / 2
    c, s = np.cos(place.heading), np.sin(place.heading)
    d = np.empty((3, z.size, x.size), np.float32)
    d[0], d[1], d[2] = (x * c - s)[None], (x * s + c)[None], z[:, None]
    return d, pitch


def _trace(place: Place, d: Array, pitch: float, height: int, width: int, first: int) -> tuple[Array, Array]:
    """Nearest surface along each ray: distance, and number: a plane's, then a shape's after the planes, -1 for outside."""
    t, which = _room_exit(place, place.eye, d)
    c, s = np.cos(place.heading), np.sin(place.heading)
    for number, shape in enumerate(place.shapes, len(place.planes)):
        corners = shape.corners() - place.eye
        depth = -corners[:, 0] * s + corners[:, 1] * c
        if depth.max() < 0.05:
            continue
        area = np.s_[:, :]
        if depth.min() > 0.05:
            x = (corners[:, 0] * c + corners[:, 1] * s) / depth / pitch + width / 2
            y = height / 2 + place.shift * height / 2 - corners[:, 2] / depth / pitch - first
            low = np.maximum(np.floor([2 * y.min() - 1, 2 * x.min() - 1]), 0).astype(int)
            high = np.minimum(np.ceil([2 * y.max() + 1, 2 * x.max() + 1]), t.shape).astype(int)
            if (high <= low).any():
                continue
            area = np.s_[low[0] : high[0], low[1] : high[1]]
        new = hit(shape, to_local(shape, place.eye - shape.centre), to_local(shape, d[(slice(None), *area)]))
        closer = new < t[area]
        np.copyto(t[area], new, where=closer)
        np.copyto(which[area], number, where=closer)
    return t, which


@dataclass
class _Stage:
    """As much of a room as `_shade_surfaces` asks for."""

    planes: list[Plane]
    shapes: list[Shape]


def _shade_surfaces(
    place: Place | _Stage, which: Array, p: Array, foot: Array, d: Array
) -> tuple[Array, Array, Array, Array, Array]:
    """Normals (3, N), albedo (3, N), emission (3, N), gloss (N,) and a code (N,) that changes where the light may jump."""
    n, albedo, emit = (np.zeros_like(p) for _ in range(3))
    gloss, code = np.zeros(p.shape[1], np.float32), np.full(p.shape[1], -1, np.int32)
    order = np.argsort(which, kind="stable")
    bounds = np.searchsorted(which[order], np.arange(len(place.planes) + len(place.shapes) + 1))
    for number in range(len(bounds) - 1):
        some = order[bounds[number] : bounds[number + 1]]
        if not some.size:
            continue
        face = 0
        if number < len(place.planes):
            thing = place.planes[number]
            u, v = thing.coords(p[:, some])
            n[:, some] = thing.normal[:, None]
        else:
            thing = place.shapes[number - len(place.planes)]
            n[:, some], u, v, face = surface(thing, p[:, some])
            if thing.emit is not None:
                emit[:, some] = thing.emit[:, None]
        seen = d[:, some]
        facing = -dot(seen, n[:, some]) / np.sqrt(dot(seen, seen))
        albedo[:, some] = np.clip(thing.texture(u, v, foot[some] / np.sqrt(np.clip(facing, 0.05, 1))), 0.004, 0.9)
        gloss[some] = thing.gloss
        code[some] = number * 8 + face
    return n, albedo, emit, gloss, code


def _irradiance(place: Place, p: Array, n: Array, terms: list[tuple], visible: Array) -> Array:
    total = place.ambient(p, n) * visible[-1]
    indoors = np.float32(0.6) + np.float32(0.4) * place.contains(p)
    total *= indoors  # the next room is darker, and its walls don't stand in the shadow rays' way
    for (colour, strength), seen in zip(terms, visible, strict=False):
        total += colour[:, None] * (strength * seen * (0.5 + 0.5 * visible[-1]) * indoors)
    return total


def _light_grid(place: Place, p: Array, n: Array, d: Array, gloss: Array, code: Array, first: int) -> Array:
    """Irradiance and mirrored radiance (6, H, W), from every other sample of (3, 2H, 2W) surfaces; -1 where there is none."""
    p, n, d = (np.ascontiguousarray(x[:, ::2, ::2]).reshape(3, -1) for x in (p, n, d))
    code = np.ascontiguousarray(code[::2, ::2])
    gloss = gloss[::2, ::2].ravel()
    i, j = np.indices(code.shape)
    pattern = (((i + first) % 4) * 4 + j % 4).ravel()
    inside = np.flatnonzero(code.ravel() >= 0)
    terms, found = _direct(place, p[:, inside], n[:, inside], pattern[inside])
    visible = np.zeros((len(found), code.size), np.float32)
    visible[:, inside] = found
    visible = _smooth(visible.reshape(-1, *code.shape), code).reshape(len(found), -1)[:, inside]
    light = np.full((6, code.size), -1, np.float32)
    light[:3, inside] = _irradiance(place, p[:, inside], n[:, inside], terms, visible)
    light[3:, inside] = 0
    shiny = np.flatnonzero(gloss > 0)
    if shiny.size:
        light[3:, shiny] = _mirrored(place, p[:, shiny], n[:, shiny], d[:, shiny], gloss[shiny], pattern[shiny])
        light[3:] = _smooth(light[3:].reshape(3, *code.shape), code).reshape(3, -1)
    return light.reshape(6, *code.shape)


def _mirrored(place: Place, p: Array, n: Array, d: Array, gloss: Array, pattern: Array) -> Array:
    """What a glossy surface reflects, slightly blurred, times its Fresnel reflectance."""
    d = d / np.sqrt(dot(d, d))
    cosine = -dot(d, n)
    rough = np.where(gloss == MIRROR, 0, np.clip(0.12 * (1 - gloss) + 0.03, 0, 1)).astype(np.float32)
    r = d + 2 * cosine * n + _SPHERE[:, _SHUFFLE[pattern] * 2] * rough
    start = p + n * np.float32(4e-3)
    far = np.float32(15)
    t, which = _cast(place, start, r * far)
    exit_t, plane = _room_exit(place, start, r, doorways=False)
    number = np.where(which >= 0, which + len(place.planes), plane)
    q = start + r * np.minimum(t * far, np.where(np.isfinite(exit_t), exit_t, far))
    blockers = [s for group in place.groups for s in group.shapes]
    stage = _Stage(place.planes, blockers)
    normal, albedo, emit, _, _ = _shade_surfaces(stage, number.astype(np.int32), q, np.full(q.shape[1], 0.02, np.float32), r)
    light = place.ambient(q, normal)
    for source, colour in place.lights(beyond=False):
        light += colour[:, None] * (unshadowed(source, q, normal) * np.float32(0.8))
    seen = albedo * light * np.float32(1 / np.pi) + emit
    sky = np.flatnonzero(number < 0)
    seen[:, sky] = place.outside(r[:, sky])
    fresnel = np.where(gloss == MIRROR, 0.9, gloss * (0.05 + 0.75 * (1 - np.clip(cosine, 0, 1)) ** 5))
    return seen * fresnel.astype(np.float32)


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
