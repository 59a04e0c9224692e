"""What the numbers of a photo mean: its profile, or a PNG's colour chunks, to sRGB and back."""

import functools
import struct
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import imagecodecs
import numpy as np

from autohdr.arrays import Array, library, threads_wanted
from autohdr.errors import UserError

STEPS = 65536
LUMA = (0.2126, 0.7152, 0.0722)  # of red, green and blue, Rec. 709
ICC_SPACE = slice(16, 20)  # where a profile names the colour space it is for
_D65 = (0.3127, 0.329)
_SRGB = (*_D65, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)  # white, red, green, blue
_PRIMARIES = {  # ITU-T H.273, table 2
    4: (0.31, 0.316, 0.67, 0.33, 0.21, 0.71, 0.14, 0.08),
    5: (*_D65, 0.64, 0.33, 0.29, 0.6, 0.15, 0.06),
    6: (*_D65, 0.63, 0.34, 0.31, 0.595, 0.155, 0.07),
    7: (*_D65, 0.63, 0.34, 0.31, 0.595, 0.155, 0.07),
    9: (*_D65, 0.708, 0.292, 0.17, 0.797, 0.131, 0.046),
    11: (0.314, 0.351, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06),
    12: (*_D65, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06),
    22: (*_D65, 0.63, 0.34, 0.295, 0.605, 0.155, 0.077),
}
_NAMES = ({1: "BT.709", 9: "BT.2020", 11: "DCI-P3", 12: "Display P3"}, {8: "linear", 13: "sRGB's curve", 16: "PQ", 18: "HLG"})
_GAMMAS = {4: 2.2, 5: 2.8, 8: 1.0}
_BT709 = (1, 6, 14, 15)
_SRGB_TRANSFER, _PQ, _HLG = 13, 16, 18
_PAPER = 203 / 10_000  # of PQ's most light: the white of a page, ITU-R BT.2408
_ROWS = 32  # so few that what a step makes of them is still in the cache for the next


class ColourSpace:
    """A colour space other than sRGB: of a curve for each channel and a matrix, as most are. grey: of a profile of grey alone."""

    grey = False

    def __init__(self, curves: list[np.ndarray], matrix: np.ndarray, white: float = 1.0):
        """curves: three tables of STEPS values, even steps of what is stored, to light in [0, 1]. matrix: (3, 3), from that light
        to linear sRGB's. white: what light of the most that can be stored is the white of sRGB."""
        rising = [np.maximum.accumulate(curve) for curve in curves]
        stored = np.linspace(0, 1, STEPS)
        self._decode = np.stack(rising).astype(np.float32)
        self._encode = np.stack([np.interp(stored**2, curve, stored) for curve in rising]).astype(np.float32)
        self._matrix = (matrix / white).astype(np.float32)
        self._inverse = (np.linalg.inv(matrix) * white).astype(np.float32)

    def to_srgb(self, pixels: np.ndarray) -> np.ndarray:
        """(H, W, 3) float in [0, 1], uint8 or uint16, as sRGB-encoded float32; below 0 or above 1 where sRGB lacks the colour."""
        return _in_bands(self._decoded, pixels)

    def edited(self, pixels: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """The photo in its own space, (H, W, 3) float32, after an edit in sRGB.

        pixels: as to_srgb takes them; before: what that gave; after: the edit of before.clip(0, 1), float32 in [0, 1]. What lies
        beyond sRGB is added to the edit as it was. Where nothing was edited, the pixels are the same.
        """

        def band(own: np.ndarray, old: np.ndarray, new: np.ndarray) -> np.ndarray:
            shown = old.clip(0, 1)
            untouched = (new == shown).all(2, keepdims=True)
            return np.where(untouched, _unit(own), self._encoded(new.clip(0, 1) + (old - shown), own, old))

        return _in_bands(band, pixels, before, after)

    def _decoded(self, pixels: np.ndarray) -> np.ndarray:
        step = {np.uint8: (STEPS - 1) // 255, np.uint16: 1}.get(pixels.dtype.type)
        planes = []
        for channel, table in enumerate(self._decode):
            stored = pixels[..., channel].reshape(-1)
            planes.append(table[::step][stored] if step else _between(table, stored.astype(np.float32)))
        return encode_srgb(_mixed(self._matrix, planes)).T.reshape(pixels.shape)

    def _encoded(self, pixels: np.ndarray, own: np.ndarray, old: np.ndarray) -> np.ndarray:
        """sRGB, also beyond [0, 1], in this space. own, old: the pixels before the edit, for spaces whose way back is rough."""
        light = _mixed(self._inverse, decode_srgb(np.ascontiguousarray(pixels.reshape(-1, 3).T)))
        roots = np.sqrt(light.clip(0, 1))
        stored = np.stack([_between(table, roots[i]) for i, table in enumerate(self._encode)])
        return stored.T.reshape(pixels.shape)


class _TableSpace(ColourSpace):
    """Of a profile with tables of colours, by lcms."""

    def __init__(self, profile: bytes):
        self._profile = profile

    def _decoded(self, pixels: np.ndarray) -> np.ndarray:
        return encode_srgb(_transform(_unit(pixels), self._profile, _linear_srgb()))

    def _encoded(self, pixels: np.ndarray, own: np.ndarray, old: np.ndarray) -> np.ndarray:
        new, was = (self._back(srgb) for srgb in (pixels, old))
        return _unit(own) + new - was  # the tables to and fro are no inverses: the difference is much nearer

    def _back(self, pixels: np.ndarray) -> np.ndarray:
        return _transform(decode_srgb(pixels), _linear_srgb(), self._profile)


def colour_space(icc_profile: bytes | None, chunks: Mapping[bytes, bytes] | None = None) -> ColourSpace | None:
    """The colour space that a profile, or a PNG's chunks cICP, sRGB, gAMA and cHRM name; None for sRGB, or where nothing does.

    cICP goes before the profile, and the profile before the others. A gAMA of 1 / 2.2 is how files say sRGB. A damaged profile
    says nothing.
    """
    chunks = chunks or {}
    if len(chunks.get(b"cICP", b"")) == 4:
        return _coded(*chunks[b"cICP"][:2])
    if icc_profile:
        return None if is_damaged(icc_profile) else _of_profile(icc_profile)
    if b"sRGB" in chunks:
        return None
    gamma, corners = chunks.get(b"gAMA", b""), chunks.get(b"cHRM", b"")
    return _of_gamma(int.from_bytes(gamma[:4]), struct.unpack(">8I", corners) if len(corners) == 32 else ())


def coded_name(primaries: int, transfer: int) -> str:
    """What two numbers of H.273 mean, in words."""
    return " with ".join(
        names.get(number, f"H.273's {number}") for names, number in zip(_NAMES, (primaries, transfer), strict=True)
    )


def is_damaged(icc_profile: bytes) -> bool:
    """Whether an RGB or grey profile can't be used."""
    try:
        _of_profile(icc_profile)
    except UserError:
        return True
    return False


@functools.lru_cache(8)
def _of_profile(icc_profile: bytes) -> ColourSpace | None:
    if (kind := icc_profile[ICC_SPACE]) not in (b"RGB ", b"GRAY"):
        return None
    try:
        with np.errstate(over="raise", divide="raise", invalid="raise"):
            space = _of_tags(icc_profile, kind == b"GRAY")
        colours = np.stack(np.meshgrid(*[np.linspace(0, 1, 18, dtype=np.float32)] * 3), -1).reshape(18, -1, 3)
        colours = colours[:, :18] if space.grey else colours
        near = np.abs(space.to_srgb(colours) - colours).max() < 1 / 255
    except Exception as error:  # what struct and lcms say is of no use to anyone
        raise UserError("its colour profile is damaged") from error
    return None if near else space


def _of_tags(icc: bytes, grey: bool) -> ColourSpace:
    (count,) = struct.unpack_from(">I", icc, 128)
    places = (struct.unpack_from(">4sII", icc, 132 + 12 * i) for i in range(count))
    tags = {name: icc[at : at + length] for name, at, length in places}
    if grey:
        space = ColourSpace([_icc_curve(tags[b"kTRC"])] * 3, np.eye(3))
        space.grey = True
        return space
    if b"A2B0" in tags or b"A2B1" in tags:
        return _TableSpace(icc)
    columns = [np.array(struct.unpack_from(">3i", tags[name], 8)) / 65536 for name in (b"rXYZ", b"gXYZ", b"bXYZ")]
    curves = [_icc_curve(tags[name]) for name in (b"rTRC", b"gTRC", b"bTRC")]
    return ColourSpace(curves, np.linalg.inv(_to_xyz(_SRGB)) @ np.stack(columns, 1))


def _icc_curve(tag: bytes) -> np.ndarray:
    stored = np.linspace(0, 1, STEPS)
    if tag[:4] == b"curv":
        (count,) = struct.unpack_from(">I", tag, 8)
        table = np.frombuffer(tag, ">u2", count, 12)
        if count < 2:
            return stored ** (table[0] / 256 if count else 1)
        return np.interp(stored, np.linspace(0, 1, count), table / 65535)
    (kind,) = struct.unpack_from(">H", tag, 8)
    g, *rest = np.frombuffer(tag, ">i4", (1, 3, 4, 5, 7)[kind], 12) / 65536
    a, b, *rest = *rest, *((1, 0) if kind == 0 else ())
    c, d, e, f = {0: (0, -1, 0, 0), 1: (0, -b / a, 0, 0), 2: (0, -b / a, *rest, *rest), 3: (*rest, 0, 0), 4: rest}[kind]
    power = np.maximum(a * stored + b, 0) ** g + e
    return np.clip(np.where(stored >= d, power, c * stored + f), 0, 1)


def _to_xyz(corners: tuple[float, ...]) -> np.ndarray:
    """The matrix from linear RGB of a white and three primaries, x and y each, to XYZ, its white adapted to D50 (Bradford)."""
    white, *columns = (np.array([x / y, 1, (1 - x - y) / y]) for x, y in zip(corners[::2], corners[1::2], strict=True))
    matrix = np.stack(columns, 1)
    matrix *= np.linalg.solve(matrix, white)
    cones = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    adapted = np.diag(cones @ np.array([0.9642, 1, 0.8249]) / (cones @ white))
    return np.linalg.inv(cones) @ adapted @ cones @ matrix


@functools.lru_cache(8)
def _of_gamma(gamma: int, corners: tuple[int, ...]) -> ColourSpace | None:
    """Of gAMA and cHRM, in their units of 1 / 100000; 0 and () where they are absent."""
    exponent = 100_000 / gamma if gamma else 2.2
    named = tuple(value / 100_000 for value in corners) if corners and all(corners[1::2]) else _SRGB
    usual = abs(exponent - 2.2) < 0.03
    if usual and np.allclose(named, _SRGB, atol=0.002):
        return None
    return _of_primaries(named, _curve(_SRGB_TRANSFER) if usual else np.linspace(0, 1, STEPS) ** exponent)


@functools.lru_cache(8)
def _coded(primaries: int, transfer: int) -> ColourSpace | None:
    named = _PRIMARIES.get(primaries, _SRGB)
    known = transfer in (*_GAMMAS, *_BT709, _PQ, _HLG)
    if not known and named is _SRGB:
        return None
    white = {_PQ: _PAPER, _HLG: float(_hlg(np.array(0.75)))}.get(transfer, 1.0)
    return _of_primaries(named, _curve(transfer if known else _SRGB_TRANSFER), white)


def _of_primaries(corners: tuple[float, ...], curve: np.ndarray, white: float = 1.0) -> ColourSpace:
    return ColourSpace([curve] * 3, np.linalg.inv(_to_xyz(_SRGB)) @ _to_xyz(corners), white)


def _curve(transfer: int) -> np.ndarray:
    """A transfer function of H.273 as a table: values in [0, 1] to light."""
    value = np.linspace(0, 1, STEPS)
    if transfer in _GAMMAS:
        return value ** _GAMMAS[transfer]
    if transfer == _PQ:
        root = value ** (32 / 2523)
        return (np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)) ** (8192 / 1305)
    if transfer == _HLG:
        return _hlg(value)
    if transfer in _BT709:
        return np.where(value < 0.081, value / 4.5, ((value + 0.099) / 1.099) ** (1 / 0.45))
    return decode_srgb(value)


def _hlg(value: np.ndarray) -> np.ndarray:
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(value <= 0.5, value**2 / 3, (np.exp((value - c) / a) + b) / 12)


@functools.cache
def _linear_srgb() -> bytes:
    primaries = [part for x, y in zip(_SRGB[2::2], _SRGB[3::2], strict=True) for part in (x, y, 1.0)]
    return imagecodecs.cms_profile("rgb", whitepoint=[*_D65, 1.0], primaries=primaries, gamma=1.0)


def _transform(pixels: np.ndarray, profile: bytes, to: bytes) -> np.ndarray:
    intent = imagecodecs.CMS.INTENT.RELATIVE_COLORIMETRIC
    options = {"colorspace": "rgb", "outcolorspace": "rgb", "outdtype": np.float32, "intent": intent}
    return imagecodecs.cms_transform(np.ascontiguousarray(pixels), profile, to, **options)


def _mixed(matrix: np.ndarray, planes: Sequence[np.ndarray]) -> np.ndarray:
    """matrix @ planes, [3, N], without the threads of a library for matrices: _in_bands has its own."""
    red, green, blue = planes
    return np.stack([row[0] * red + row[1] * green + row[2] * blue for row in matrix])


def _in_bands(function: Callable[..., np.ndarray], *images: np.ndarray) -> np.ndarray:
    """function(*images) in bands of rows, in threads: a large photo needs no more copies in floating point than it must."""
    result = np.empty(images[0].shape, np.float32)

    def band(row: int) -> None:
        result[row : row + _ROWS] = function(*(image[row : row + _ROWS] for image in images))

    with ThreadPoolExecutor(threads_wanted()) as pool:
        list(pool.map(band, range(0, len(result), _ROWS)))
    return result


def _unit(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.float32, copy=False) if pixels.dtype.kind == "f" else pixels / np.float32(np.iinfo(pixels.dtype).max)


def _between(table: np.ndarray, x: np.ndarray) -> np.ndarray:
    """A table's values at x in [0, 1], one-dimensional, linear between its steps."""
    at = x * np.float32(STEPS - 1)
    below = at.astype(np.int32).clip(0, STEPS - 2)
    low, part = table[below], at - below.astype(np.float32)
    return low + part * (table[below + 1] - low)


def decode_srgb(encoded: Array) -> Array:
    """sRGB's curve to light, of arrays or tensors; below 0 it is mirrored, above 1 it goes on."""
    xp, size = library(encoded), abs(encoded)
    return xp.copysign(xp.where(size <= 0.04045, size / 12.92, ((size + 0.055) / 1.055) ** 2.4), encoded)


def encode_srgb(light: Array) -> Array:
    xp, size = library(light), abs(light)
    return xp.copysign(xp.where(size <= 0.0031308, size * 12.92, 1.055 * size ** (1 / 2.4) - 0.055), light)
