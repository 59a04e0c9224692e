"""A photo for another format or depth, with what its file says in the other's way, and without what is not to be passed on."""

import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from autohdr.data import heif, jxl, raw
from autohdr.data.encoding import ENCODERS, SEGMENT, WRITTEN
from autohdr.data.images import SUFFIXES, Photo, from_float, has_grey_profile, to_float
from autohdr.data.metadata import (
    COLOUR_CHUNKS,
    IPTC,
    IPTC_TAG,
    PHOTOSHOP_NAME,
    PHOTOSHOP_TAG,
    TEXT_CHUNKS,
    XMP_KEYWORD,
    XMP_NAME,
    XMP_TAG,
    exif_density,
    photoshop_segments,
    png_text,
    raw_profile,
    resource,
    resources,
    with_entries,
    without_gps,
    without_gps_in_xmp,
    xmp_chunk,
)
from autohdr.errors import UserError

FORMATS = ("jpeg", "png", "tiff", "webp", "avif", "same")
_CHOICES = {"format": FORMATS, "depth": (None, 8, 16), "subsampling": ("", "444", "422", "420"), "strip": ("", "gps", "all")}
_DEPTHS = {"JPEG": (8,), "PNG": (8, 16), "TIFF": (8, 16, 32), "WEBP": (8,), "AVIF": (8,)}
_WITHOUT_GREY = ("WEBP", "AVIF")  # pixels there always have three channels
_EXIF_TEXTS = {"Comment": 270, "Description": 270, "Software": 305, "Author": 315, "Copyright": 33432}
_X, _Y, _UNIT = 282, 283, 296  # EXIF's density
_MARKER_XMP, _MARKER_PHOTOSHOP, _MARKER_COMMENT = 0xE1, 0xED, 0xFE
_STEPS = tuple(np.uint32(round(step * 2**32)) for step in (0.7548776662466927, 0.5698402909980532))  # R2, by M. Roberts, 2018
_ROWS = 128

Density = tuple[int, float, float]  # as JFIF has it: the unit (0 none, 1 inch, 2 cm), and pixels in it across and down


def check_conversion(format: str, depth: int | None, subsampling: str, strip: str) -> None:
    """UserError for an argument of converted, write_photo or stripped that there is not, or a depth that the format lacks."""
    got = {"format": format, "depth": depth, "subsampling": subsampling, "strip": strip}
    for name, choices in _CHOICES.items():
        if got[name] not in choices:
            raise UserError(f"{name} must be one of {', '.join(str(choice) for choice in choices if choice)}, got {got[name]!r}")
    if format != "same" and depth and depth not in _DEPTHS[format.upper()]:
        raise UserError(f"a {format.upper()} holds 8 bits a channel, not {depth}: choose png or tiff")


def result_name(path: Path, format: str = "same") -> Path:
    """The name of a photo's result in a format. A suffix that is the format's stays; what is not written becomes .jpg."""
    suffix = path.suffix.lower()
    if format == "same":
        return path.with_suffix(".jpg") if suffix in heif.SUFFIXES | jxl.SUFFIXES | raw.SUFFIXES else path
    if suffix in (own := WRITTEN[format.upper()]):
        return path
    return path.with_suffix(own[0]) if suffix in SUFFIXES else path.with_name(path.name + own[0])


def converted(photo: Photo, format: str = "same", depth: int | None = None) -> Photo:
    """A photo as one of a format and a depth, for write_photo; what it cannot hold is in its notes.

    format: one of FORMATS; same makes a JPEG of what is not written. depth: 8 or 16; by default the photo's, where the format has
    it. 8 bits are made of more by an ordered dither.
    """
    target, held, becomes_srgb = outcome(photo, format, depth)
    result = replace(photo, notes=[*photo.notes], options={**photo.options})
    if becomes_srgb:
        _to_srgb(result, target)
    if has_grey_profile(result) and target in _WITHOUT_GREY:  # of sRGB's own curve
        result.icc_profile = None
    wanted = depth or photo.depth
    if held < wanted:
        result.notes.append(f"{wanted} bits a channel become {held}: {_a(target)} holds no more")
    _to_depth(result, held)
    if target == photo.format:
        return result
    said = _said(photo)
    result.format, result.options = target, {}
    if target == "JPEG" and photo.alpha is not None:
        result.alpha = None
        result.notes.append("its transparency is not kept: a JPEG holds none")
    _SAY[target](result, said)
    result.notes += [f"{what} not kept: {_a(target)} holds none" for what in said.lost]
    return result


def outcome(photo: Photo, format: str = "same", depth: int | None = None) -> tuple[str, int, bool]:
    """What `converted` makes: a photo of a format, of so many bits a channel, and whether in sRGB, since what names the photo's
    colours does not go along."""
    target = format.upper() if format != "same" else photo.format if photo.format in ENCODERS else "JPEG"
    held = max(bits for bits in _DEPTHS[target] if bits <= (depth or photo.depth))
    chunks = photo.format == "PNG" != target and (photo.icc_profile is None or b"cICP" in dict(photo.extra))
    unfit = has_grey_profile(photo) and target in _WITHOUT_GREY
    return target, held, (chunks or unfit) and photo.colour_space() is not None


def stripped(photo: Photo, what: str) -> Photo:
    """A photo without what is not to be passed on. what: gps; all that is said beside colour and density; empty for nothing."""
    if not what:
        return photo
    if what == "gps":
        parts = [(key, without_gps_in_xmp(data) if _is_xmp(key, data) else data) for key, data in photo.extra]
        kept = [(key, data) for key, data in parts if key != _MARKER_XMP or data.startswith(XMP_NAME)]
        notes = ["its extended XMP, where a place may be, is not kept"] if len(kept) < len(parts) else []
        return replace(photo, exif=without_gps(photo.exif), extra=tuple(kept), notes=photo.notes + notes)
    extra = tuple((key, data) for key, data in photo.extra if key in (*COLOUR_CHUNKS, b"pHYs"))
    told = None if _own_density(photo) else exif_density(photo.exif)
    return replace(photo, exif=with_entries(b"", _entries(told)) if told else b"", extra=extra)


def dithered(pixels: np.ndarray, alike: bool = False) -> np.ndarray:
    """(H, W, 3) uint16, or float in [0, 1], as uint8. What 8 bits hold stays; between two levels both come, on average the same.

    alike: one pattern for the three channels, so that grey stays grey.
    """
    result = np.empty(pixels.shape, np.uint8)
    columns = np.arange(pixels.shape[1], dtype=np.uint32) * _STEPS[0]
    shifts = (np.arange(3, dtype=np.uint64) * (0 if alike else 2**32 // 3)).astype(np.uint32)
    for row in range(0, len(pixels), _ROWS):
        band = pixels[row : row + _ROWS]
        samples = (from_float(band, 16) if band.dtype.kind == "f" else band).astype(np.uint32)
        rows = np.arange(row, row + len(band), dtype=np.uint32) * _STEPS[1]
        pattern = rows[:, None, None] + columns[:, None] + shifts  # modulo 2**32
        result[row : row + _ROWS] = (samples + (((pattern >> 16) * 257) >> 16)) // 257
    return result


@dataclass
class _Said:
    """What a file says, in no format's way. resources: Photoshop's, IPTC among them. texts: by keyword."""

    xmp: bytes = b""
    resources: bytes = b""
    texts: dict[str, str] = field(default_factory=dict)
    density: Density | None = None
    lost: list[str] = field(default_factory=list)

    def add_text(self, keyword: str, text: str) -> None:
        self.texts[keyword] = f"{self.texts[keyword]}\n{text}" if keyword in self.texts else text


def _a(format: str) -> str:
    return f"an {format}" if format == "AVIF" else f"a {format}"


def _to_srgb(photo: Photo, target: str) -> None:
    if space := photo.colour_space():
        photo.pixels, photo.icc_profile = space.to_srgb(photo.pixels).clip(0, 1), None
        photo.notes.append(f"its colours are converted to sRGB: {_a(target)} does not hold what names them")


def _to_depth(photo: Photo, depth: int) -> None:
    if depth == photo.depth:
        return
    if depth == 8:
        photo.pixels = dithered(photo.pixels, photo.grey)
    elif photo.pixels.dtype == np.uint8:
        photo.pixels = from_float(to_float(photo.pixels), depth)
    if photo.alpha is not None:
        photo.alpha = from_float(to_float(photo.alpha), depth)
    photo.depth = depth
    photo.options.pop("float", None)


def _is_xmp(key: object, data: bytes) -> bool:
    if key in (_MARKER_XMP, b"iTXt"):
        return data.startswith((XMP_NAME, XMP_KEYWORD + b"\0"))
    return key in ("xmp", XMP_TAG)


def _said(photo: Photo) -> _Said:
    said, iptc = _Said(), b""
    for key, data in photo.extra:
        if _is_xmp(key, data):
            said.xmp = png_text(key, data)[1] if key == b"iTXt" else data.removeprefix(XMP_NAME)
        elif key == _MARKER_XMP:
            said.lost[:] = ["its extended XMP is"]
        elif key in (_MARKER_PHOTOSHOP, PHOTOSHOP_TAG):
            said.resources += data.removeprefix(PHOTOSHOP_NAME)
        elif key == IPTC_TAG:
            iptc = data
        elif key == _MARKER_COMMENT:
            said.add_text("Comment", data.rstrip(b"\0").decode("utf-8", "replace"))
        elif key in TEXT_CHUNKS:
            keyword, text = png_text(key, data)
            if keyword in (b"Raw profile type iptc", b"Raw profile type 8bim"):
                said.resources += raw_profile(text)
            else:
                said.add_text(keyword.decode("latin-1"), text.decode("utf-8" if key == b"iTXt" else "latin-1", "replace"))
    if iptc and IPTC not in resources(said.resources):
        said.resources += resource(IPTC, iptc)
    said.density = _own_density(photo) or exif_density(photo.exif)
    return said


def _own_density(photo: Photo) -> Density | None:
    """What a JPEG says in its JFIF segment, or a PNG in pHYs."""
    density = None
    if "jfif" in photo.options:
        density = struct.unpack(">BHH", photo.options["jfif"])
    elif len(chunk := dict(photo.extra).get(b"pHYs", b"")) == 9:
        x, y, metre = struct.unpack(">IIB", chunk)
        density = (1, 0.0254 * x, 0.0254 * y) if metre else (0, x, y)
    return density if density and min(density[1:]) > 0 and (density[0] or density[1] != density[2]) else None


def _say_jpeg(photo: Photo, said: _Said) -> None:
    extra = []
    if len(said.xmp) + len(XMP_NAME) > SEGMENT:
        photo.notes.append("its XMP is too long for a JPEG and is not kept")
    elif said.xmp:
        extra.append((_MARKER_XMP, XMP_NAME + said.xmp))
    extra += [(_MARKER_PHOTOSHOP, segment) for segment in photoshop_segments(said.resources)]
    for keyword, text in said.texts.items():
        comment = (text if keyword == "Comment" else f"{keyword}: {text}").encode()
        if len(comment) > SEGMENT:
            photo.notes.append(f"its text {keyword!r} is too long for a JPEG and is not kept")
        else:
            extra.append((_MARKER_COMMENT, comment))
    photo.extra = tuple(extra)
    if said.density and max(said.density) < 65535.5:
        photo.options["jfif"] = struct.pack(">BHH", *(round(part) for part in said.density))


def _say_png(photo: Photo, said: _Said) -> None:
    extra = [xmp_chunk(said.xmp)] if said.xmp else []
    if said.density:
        unit, *sides = said.density
        metre = {0: 1, 1: 1 / 0.0254, 2: 100}[unit]
        extra.append((b"pHYs", struct.pack(">IIB", *(round(side * metre) for side in sides), unit > 0)))
    if said.resources:  # as ImageMagick and ExifTool write and read it
        text = b"\niptc\n%8d\n%s\n" % (len(said.resources), said.resources.hex().encode())
        extra.append((b"tEXt", b"Raw profile type iptc\0" + text))
    for keyword, text in said.texts.items():
        try:
            extra.append((b"tEXt", f"{keyword}\0{text}".encode("latin-1")))
        except UnicodeEncodeError:
            extra.append((b"iTXt", keyword.encode("latin-1") + b"\0\0\0\0\0" + text.encode()))
    photo.extra = tuple(extra)


def _say_tiff(photo: Photo, said: _Said) -> None:
    iptc = resources(said.resources).get(IPTC)
    parts = ((XMP_TAG, said.xmp), (IPTC_TAG, iptc), (PHOTOSHOP_TAG, said.resources))
    photo.extra = tuple((tag, data) for tag, data in parts if data)
    _say_in_exif(photo, said)


def _say_xmp_alone(photo: Photo, said: _Said) -> None:
    photo.extra = (("xmp", said.xmp),) if said.xmp else ()
    if said.resources:
        said.lost.append("its IPTC is" if IPTC in resources(said.resources) else "Photoshop's parts are")
    _say_in_exif(photo, said)


def _say_in_exif(photo: Photo, said: _Said) -> None:
    """Texts and density, where there is no place but EXIF for them."""
    entries = _entries(said.density) if said.density else {}
    lost = []
    for keyword, text in said.texts.items():
        if (tag := _EXIF_TEXTS.get(keyword)) and tag not in entries:
            entries[tag] = text
        else:
            lost.append(keyword)
    if entries:
        photo.exif = with_entries(photo.exif, entries)
    if lost:
        said.lost.append(f"of its texts {', '.join(lost)} are")


def _entries(density: Density) -> dict[int, str | int | tuple[int, int]]:
    unit, x, y = density
    return {_X: (round(100 * x), 100), _Y: (round(100 * y), 100), _UNIT: unit + 1}


_SAY: dict[str, Callable[[Photo, _Said], None]] = {
    "JPEG": _say_jpeg,
    "PNG": _say_png,
    "TIFF": _say_tiff,
    "WEBP": _say_xmp_alone,
    "AVIF": _say_xmp_alone,
}
