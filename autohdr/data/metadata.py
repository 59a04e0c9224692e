"""What a photo's file says beside its pixels: EXIF, XMP, Photoshop's blocks; patched to hold for the upright photo."""

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from PIL import ExifTags
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile

from autohdr.data.encoding import EXIF_NAME, SEGMENT
from autohdr.data.heif import NO_GAIN_MAP, HeifFile
from autohdr.data.jxl import JxlFile
from autohdr.data.raw import RawFile
from autohdr.errors import UserError

ACROSS = (5, 6, 7, 8)  # the EXIF orientations that swap height and width
XMP_NAME = b"http://ns.adobe.com/xap/1.0/\0"
XMP_KEYWORD = b"XML:com.adobe.xmp"
PHOTOSHOP_NAME = b"Photoshop 3.0\0"
_XMP_MORE = b"http://ns.adobe.com/xmp/extension/\0"
_GAIN_MAP = b"urn:iso:std:iso:ts:21496:-1\0"
TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")
_RAW_PROFILES = tuple(b"Raw profile type %s\0" % name for name in (b"exif", b"APP1", b"xmp", b"icc", b"icm"))
COLOUR_CHUNKS = (b"gAMA", b"cHRM", b"sRGB", b"cICP", b"mDCV", b"cLLI")
XMP_TAG, IPTC_TAG, PHOTOSHOP_TAG = 700, 33723, 34377
IPTC = 0x0404  # among Photoshop's resources

_BASE, _IFD = ExifTags.Base, ExifTags.IFD
_TYPES = {1: "B", 2: "s", 3: "H", 4: "I", 5: "II", 6: "b", 7: "s", 8: "h", 9: "i", 10: "ii", 11: "f", 12: "d", 13: "I"}
_NUMBERS = frozenset(_TYPES) - {2, 7}
_WIDTHS, _HEIGHTS = (_BASE.ImageWidth, _BASE.ExifImageWidth), (_BASE.ImageLength, _BASE.ExifImageHeight)
_SIZES = {"tiff": ("ImageWidth", "ImageLength"), "exif": ("PixelXDimension", "PixelYDimension")}
_NAMESPACES = {"tiff": b"http://ns.adobe.com/tiff/1.0/", "exif": b"http://ns.adobe.com/exif/1.0/"}
_DESCRIBING = (
    "DocumentName ImageDescription Make Model XResolution YResolution ResolutionUnit Software DateTime Artist HostComputer Rating"
    " RatingPercent XPTitle XPComment XPAuthor XPKeywords XPSubject Copyright"
)
_DESCRIBING_TAGS = {_BASE[name] for name in _DESCRIBING.split()} | {_IFD.Exif, _IFD.GPSInfo}
_OUTDATED_RESOURCES = {0x0409, 0x040C, 0x0422, 0x0423, 0x0424}  # thumbnails, and copies of the EXIF and XMP


class _Entry(NamedTuple):
    tag: int
    type: int
    count: int
    value: bytes  # four bytes: the value, or where it is


def exif_orientation(block: bytes) -> int | None:
    """The orientation that an EXIF block names, 1 to 8; 1 where it names another, None where it names none."""
    found = None
    if (order := _order(block)) and (directory := _directory(block, struct.unpack_from(order + "I", block, 4)[0], order)):
        for entry in directory[0]:
            if entry.tag == _BASE.Orientation:
                found = _number(block, entry, order)
    return None if found is None else int(found) if found in range(1, 9) else 1


def upright_exif(block: bytes, orientation: int, height: int, width: int) -> bytes:
    """An EXIF block for the photo once it is upright: of orientation 1 and this size, without a thumbnail.

    The block is patched, not written anew: maker notes refer to positions in it. Of a damaged directory the entries that can be
    read are kept, in a new directory behind the block. Empty where there is none.
    """
    if not (order := _order(block)):
        return b""
    patched = bytearray(block)
    (start,) = struct.unpack_from(order + "I", block, 4)
    if (found := _directory(block, start, order)) is None:
        return b""
    _drop_thumbnail(patched, found[1], order)
    at = _patch(patched, start, order, (_IFD.Exif, _IFD.GPSInfo), orientation in ACROSS, (height, width))
    struct.pack_into(order + "I", patched, 4, at)
    return bytes(patched)


def xmp_orientation(xmp: bytes) -> int | None:
    """The orientation that an XMP packet names, as an attribute or an element."""
    found = _property(xmp, "tiff", "Orientation").search(xmp)
    return int(found[2]) if found and found[2] in b"12345678" else None


def upright_xmp(xmp: bytes, height: int, width: int) -> bytes:
    """An XMP packet for the upright photo: of orientation 1 and this size, without thumbnails, gain maps and films."""
    xmp = _property(xmp, "tiff", "Orientation").sub(rb"\g<1>1", xmp)
    for prefix, names in _SIZES.items():
        for name, size in zip(names, (width, height), strict=True):
            xmp = _property(xmp, prefix, name).sub(rb"\g<1>%d" % size, xmp)
    for element in (rb"\w+:Thumbnails", rb"Container:Directory"):
        xmp = re.sub(rb"<(%s)\b.*?</\1\s*>" % element, b"", xmp, flags=re.DOTALL)
    xmp = re.sub(rb"""\s(hdrgm|GCamera):\w+\s*=\s*("[^"]*"|'[^']*')""", b"", xmp)
    return re.sub(rb"<((hdrgm|GCamera):\w+)\b.*?</\1\s*>", b"", xmp, flags=re.DOTALL)


def without_gps(block: bytes) -> bytes:
    """An EXIF block without its GPS directory: the entry is gone, and what it said is zeros. Nothing else moves."""
    if not (order := _order(block)):
        return block
    patched = bytearray(block)
    (start,) = struct.unpack_from(order + "I", block, 4)
    if not (found := _directory(block, start, order)):
        return block
    kept = [entry for entry in found[0] if entry.tag != _IFD.GPSInfo]
    for (at,) in (struct.unpack(order + "I", entry.value) for entry in found[0] if entry.tag == _IFD.GPSInfo):
        said = (_directory(block, at, order) or ([],))[0]
        places = [(place, _length(entry)) for entry in said if (place := _place(entry, order)) is not None]
        for place, length in (*places, (at, 2 + 12 * len(said))) if said else ():
            patched[place : place + length] = bytes(len(patched[place : place + length]))
    data = struct.pack(order + "H", len(kept)) + b"".join(struct.pack(order + "HHI4s", *entry) for entry in kept)
    patched[start : start + 2 + 12 * len(found[0])] = data.ljust(2 + 12 * len(found[0]), b"\0")
    return bytes(patched)


def without_gps_in_xmp(xmp: bytes) -> bytes:
    """An XMP packet without properties whose name begins with GPS, in any namespace (EXIF's, a drone's)."""
    xmp = re.sub(rb"""\s(?!xmlns:)[\w.-]+:GPS\w*\s*=\s*("[^"]*"|'[^']*')""", b"", xmp, flags=re.IGNORECASE)
    element = rb"<([\w.-]+:GPS\w*)\b(?:[^>]*/>|.*?</\1\s*>)"
    return re.sub(element, b"", xmp, flags=re.IGNORECASE | re.DOTALL)


def exif_density(block: bytes) -> tuple[int, float, float] | None:
    """The density that an EXIF block names, in JFIF's units: 1 for pixels an inch, 2 a centimetre; None where there is none."""
    if not (order := _order(block)) or not (found := _directory(block, struct.unpack_from(order + "I", block, 4)[0], order)):
        return None
    values = {entry.tag: _number(block, entry, order) for entry in found[0]}
    x, y, unit = (values.get(tag) for tag in (_BASE.XResolution, _BASE.YResolution, _BASE.ResolutionUnit))
    return (1 if unit is None else int(unit) - 1, x, y) if x and y and unit in (None, 2, 3) else None


def with_entries(block: bytes, values: dict[int, str | int | tuple[int, int]]) -> bytes:
    """An EXIF block, or an empty one, that says these, by tag: small numbers and fractions, and texts where it has none.

    The directory is written anew behind the block: nothing else moves.
    """
    block = block or b"II*\0" + struct.pack("<IHI", 8, 0, 0)
    order = _order(block)
    found = _directory(block, struct.unpack_from(order + "I", block, 4)[0], order)
    entries = {entry.tag: entry for entry in (found[0] if found else ())}
    patched = bytearray(block)
    for tag, value in values.items():
        if isinstance(value, str):
            if tag in entries:
                continue
            kind, data = 2, value.encode() + b"\0"
        elif isinstance(value, int):
            kind, data = 3, struct.pack(order + "H", value)
        else:
            kind, data = 5, struct.pack(order + "II", *value)
        count = len(data) if kind == 2 else 1
        if len(data) > 4:
            patched += bytes(len(patched) % 2)
            data, place = struct.pack(order + "I", len(patched)), data
            patched += place
        entries[tag] = _Entry(tag, kind, count, data.ljust(4, b"\0"))
    patched += bytes(len(patched) % 2)
    struct.pack_into(order + "I", patched, 4, len(patched))
    listed = b"".join(struct.pack(order + "HHI4s", *entries[tag]) for tag in sorted(entries))
    return bytes(patched) + struct.pack(order + "H", len(entries)) + listed + bytes(4)


def resources(blocks: bytes) -> dict[int, bytes]:
    """The data of Photoshop's image resources by their numbers, as far as they are whole."""
    return {number: data for number, _, data in _resources(blocks)}


def resource(number: int, data: bytes) -> bytes:
    """An image resource of Photoshop's without a name."""
    return struct.pack(">4sHHI", b"8BIM", number, 0, len(data)) + data + bytes(len(data) % 2)


def upright_resources(blocks: bytes) -> bytes:
    """Photoshop's image resources, IPTC among them, without thumbnails and copies of EXIF and XMP. Empty where none is left."""
    return b"".join(whole for number, whole, _ in _resources(blocks) if number not in _OUTDATED_RESOURCES)


def _resources(blocks: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    at = 0
    while blocks[at : at + 4] == b"8BIM" and at + 7 <= len(blocks):
        name_end = at + 7 + blocks[at + 6]
        name_end += (name_end - at) % 2
        if name_end + 4 > len(blocks):
            break
        start, end = name_end + 4, name_end + 4 + struct.unpack_from(">I", blocks, name_end)[0]
        if end > len(blocks):
            break
        yield struct.unpack_from(">H", blocks, at + 4)[0], blocks[at:end] + bytes((end - at) % 2), blocks[start:end]
        at = end + (end - at) % 2


def photoshop_segments(blocks: bytes) -> Iterator[bytes]:
    """Image resources as JPEG's segments hold them."""
    for start in range(0, len(blocks), SEGMENT - len(PHOTOSHOP_NAME)):
        yield PHOTOSHOP_NAME + blocks[start : start + SEGMENT - len(PHOTOSHOP_NAME)]


def xmp_chunk(xmp: bytes) -> tuple[bytes, bytes]:
    """An XMP packet as a PNG's chunk, kind and data."""
    return b"iTXt", XMP_KEYWORD + b"\0\0\0\0\0" + xmp


def raw_profile(text: bytes) -> bytes:
    """The bytes in the text of a PNG's `Raw profile type ...`: a name, a length, hexadecimal. Empty where they are damaged."""
    lines = text.split(b"\n", 3)
    digits = re.sub(rb"\s", b"", lines[3]) if len(lines) == 4 else b""
    try:
        return bytes.fromhex(digits.decode("ascii"))
    except ValueError:
        return b""


@dataclass
class Parts:
    """What a file says beside its pixels, as it holds for the upright photo: fields of images.Photo."""

    exif: bytes = b""
    extra: tuple[tuple[Any, bytes], ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def orientation_of(image: ImageFile) -> int:
    """The EXIF orientation, 1 to 8, that is still to be applied: in a file's EXIF or, where that names none, in its XMP."""
    if isinstance(image, HeifFile | JxlFile | RawFile):
        return 1
    if isinstance(image, TiffImageFile):
        value = image.tag_v2.get(_BASE.Orientation)
        if isinstance(value, (bytes, tuple)):
            value = value[0] if value else None
        if value is not None:
            return int(value) if value in range(1, 9) else 1
    return exif_orientation(_exif(image)) or xmp_orientation(_xmp(image)) or 1


def parts_of(image: ImageFile, orientation: int, height: int, width: int) -> Parts:
    """The parts of a file. height and width are those of the upright photo."""
    if (tags := getattr(image, "tag_v2", None)) is not None:
        return _tiff_parts(image, tags, orientation, height, width)
    block = _exif(image)
    parts = Parts(upright_exif(block, orientation, height, width))
    if block and not parts.exif:
        parts.notes.append("its EXIF is damaged and is not kept")
    if image.format == "PNG":
        parts.extra = tuple(_png_extra(image, orientation in ACROSS, height, width))
    elif image.format in ("WEBP", "AVIF", "HEIF", "JXL", "RAW"):
        parts.extra = (("xmp", upright_xmp(xmp, height, width)),) if (xmp := _xmp(image)) else ()
        parts.options = {"lossless": True} if image.format == "WEBP" and _is_lossless(image) else {}
        parts.notes += (
            image.left_out() if isinstance(image, HeifFile | JxlFile) else [NO_GAIN_MAP] * image.info.get("gain_map", False)
        )
    else:
        parts.extra = tuple(_jpeg_extra(image, height, width, parts.notes))
        if "jfif_unit" in image.info and image.info["jfif_unit"] in (0, 1, 2):
            density = image.info["jfif_density"][:: -1 if orientation in ACROSS else 1]
            parts.options = {"jfif": struct.pack(">BHH", image.info["jfif_unit"], *density)}
    return parts


def png_chunks(image: ImageFile) -> Iterator[tuple[bytes, bytes]]:
    """The chunks of a PNG that Pillow has opened, kind and data, as far as they are whole and without the pixels."""
    with open(image.filename, "rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind in (b"IDAT", b"fdAT", b"IEND"):
                file.seek(length + 4, 1)
                continue
            data = file.read(length)
            if len(data) < length or len(file.read(4)) < 4:
                return
            yield kind, data


def check_sums(image: ImageFile) -> None:
    """UserError where a chunk of a PNG's pixels is not what its sum says; Pillow does not look."""
    with open(image.filename, "rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            left, found = int.from_bytes(head[:4]), zlib.crc32(head[4:])
            if head[4:] != b"IDAT":
                file.seek(left + 4, 1)
                continue
            while left and (part := file.read(min(left, 1 << 20))):
                left, found = left - len(part), zlib.crc32(part, found)
            if len(expected := file.read(4)) == 4 and int.from_bytes(expected) != found:
                raise UserError("cannot be read: its data are damaged")


def png_text(kind: bytes, data: bytes) -> tuple[bytes, bytes]:
    """Keyword and text of a PNG's text chunk; a compressed one is no longer than 64 MB."""
    keyword, _, rest = data.partition(b"\0")
    packed = kind == b"zTXt"
    if kind == b"zTXt":
        rest = rest[1:]
    elif kind == b"iTXt":
        packed = rest[:1] == b"\1"
        rest = rest[2:].split(b"\0", 2)[-1]
    try:
        return keyword, zlib.decompressobj().decompress(rest, 1 << 26) if packed else rest
    except zlib.error:
        return keyword, b""


def _exif(image: ImageFile) -> bytes:
    """A file's EXIF block, from the first byte of its TIFF header."""
    block = image.info.get("exif", b"")
    if image.format == "PNG":
        chunks = list(png_chunks(image))
        block = dict(chunks).get(b"eXIf", b"")
        for kind, data in chunks:
            if not block and kind in TEXT_CHUNKS and data.startswith((b"Raw profile type exif\0", b"Raw profile type APP1\0")):
                found = raw_profile(png_text(kind, data)[1])
                block = found if found.startswith((EXIF_NAME, b"II*\0", b"MM\0*")) else b""
    while block.startswith(EXIF_NAME):
        block = block[len(EXIF_NAME) :]
    return block


def _xmp(image: ImageFile) -> bytes:
    if isinstance(image, TiffImageFile):
        return _bytes(image.tag_v2, XMP_TAG)
    if image.format != "PNG":
        return image.info.get("xmp", b"")
    for kind, data in png_chunks(image):
        if kind in TEXT_CHUNKS and data.startswith((XMP_KEYWORD + b"\0", b"Raw profile type xmp\0", b"Raw profile type APP1\0")):
            text = png_text(kind, data)[1]
            if not data.startswith(XMP_KEYWORD):
                text = raw_profile(text).removeprefix(XMP_NAME)
            if b"<" in text[:100]:
                return text
    return b""


def _png_extra(image: ImageFile, across: bool, height: int, width: int) -> Iterator[tuple[bytes, bytes]]:
    """The chunks that hold for the result: colour, density, texts."""
    for kind, data in png_chunks(image):
        if kind in TEXT_CHUNKS:
            if not data.startswith((XMP_KEYWORD + b"\0", *_RAW_PROFILES)):
                yield kind, data
        elif kind == b"pHYs" and len(data) == 9 and across:
            yield kind, data[4:8] + data[:4] + data[8:]
        elif kind in (*COLOUR_CHUNKS, b"pHYs"):
            yield kind, data
    if xmp := _xmp(image):
        yield xmp_chunk(upright_xmp(xmp, height, width))


def _jpeg_extra(image: Any, height: int, width: int, notes: list[str]) -> Iterator[tuple[int, bytes]]:
    """The segments that hold for the result: XMP, Photoshop's and comments."""
    blocks = b""
    gain_map = False
    for name, data in image.applist:
        if name == "APP1" and data.startswith(XMP_NAME):
            gain_map |= b"hdrgm:Version" in data
            if re.search(rb"GCamera:(MotionPhoto|MicroVideo)\b\s*(=\s*['\"]|>)\s*1", data):
                notes.append("its film is not in the result")
            if len(packet := XMP_NAME + upright_xmp(data[len(XMP_NAME) :], height, width)) > SEGMENT:
                notes.append("its XMP is too long and is not kept")
            else:
                yield 0xE1, packet
        elif name == "APP1" and data.startswith(_XMP_MORE):
            yield 0xE1, data
        elif name == "APP13" and data.startswith(PHOTOSHOP_NAME):
            blocks += data[len(PHOTOSHOP_NAME) :]
        elif name == "APP2" and data.startswith(_GAIN_MAP):
            gain_map = True
        elif name == "COM":
            yield 0xFE, data
    yield from ((0xED, segment) for segment in photoshop_segments(upright_resources(blocks)))
    if gain_map:
        notes.append(NO_GAIN_MAP)
    elif image.format == "MPO":
        notes.append(f"of its {image.n_frames} pictures the first is in the result")


def _tiff_parts(image: ImageFile, directory: ImageFileDirectory_v2, orientation: int, height: int, width: int) -> Parts:
    """What the tags of a TIFF say about the photo, not about how its pixels are stored."""
    tags = image.getexif()
    for tag in set(tags) - _DESCRIBING_TAGS:
        del tags[tag]
    tags.bigtiff = False
    details = tags.get_ifd(_IFD.Exif) if _IFD.Exif in tags else {}
    for tag, size in ((_BASE.ExifImageWidth, width), (_BASE.ExifImageHeight, height)):
        if tag in details:
            details[tag] = size
    if orientation in ACROSS and {_BASE.XResolution, _BASE.YResolution} <= set(tags):
        tags[_BASE.XResolution], tags[_BASE.YResolution] = tags[_BASE.YResolution], tags[_BASE.XResolution]
    extra = [(XMP_TAG, xmp)] if (xmp := upright_xmp(_bytes(directory, XMP_TAG), height, width)) else []
    extra += [(IPTC_TAG, iptc)] if (iptc := _bytes(directory, IPTC_TAG)) else []
    extra += [(PHOTOSHOP_TAG, kept)] if (kept := upright_resources(_bytes(directory, PHOTOSHOP_TAG))) else []
    return Parts(tags.tobytes().removeprefix(EXIF_NAME), tuple(extra))


def _bytes(directory: ImageFileDirectory_v2, tag: int) -> bytes:
    """The bytes of a tag as they are in the file, of whatever type: of several whole numbers Pillow gives the first alone."""
    return directory._tagdata.get(tag, b"")


def _is_lossless(image: ImageFile) -> bool:
    """Whether a WebP holds a lossless picture."""
    with open(image.filename, "rb") as file:
        file.seek(12)
        while len(head := file.read(8)) == 8:
            kind, length = struct.unpack("<4sI", head)
            if kind in (b"VP8 ", b"VP8L"):
                return kind == b"VP8L"
            file.seek(length + length % 2, 1)
    return False


def _order(block: bytes) -> str:
    """struct's sign for the byte order of an EXIF block, empty if it is none."""
    if len(block) < 8:
        return ""
    return {b"II*\0": "<", b"MM\0*": ">"}.get(bytes(block[:4]), "")


def _directory(block: bytes | bytearray, start: int, order: str) -> tuple[list[_Entry], int, bool] | None:
    """The readable entries of a directory, where the next one is (or 0), and whether it is whole; None if nothing is there."""
    if start < 8 or start + 2 > len(block):
        return None
    (count,) = struct.unpack_from(order + "H", block, start)
    entries = []
    there = min(count, (len(block) - start - 2) // 12)
    for at in range(start + 2, start + 2 + 12 * there, 12):
        entry = _Entry(*struct.unpack_from(order + "HHI4s", block, at))
        if entry.type in _TYPES and ((_place(entry, order) or 0) + _length(entry) <= len(block) or _length(entry) <= 4):
            entries.append(entry)
    end = start + 2 + 12 * count
    beyond = [place for entry in entries if (place := _place(entry, order)) is not None and start < place < end + 4]
    whole = len(entries) == count and end + 4 <= len(block) and not beyond
    if not whole and not entries:
        return None
    return entries, struct.unpack_from(order + "I", block, end)[0] if whole else 0, whole


def _length(entry: _Entry) -> int:
    return entry.count * struct.calcsize("<" + _TYPES[entry.type])


def _place(entry: _Entry, order: str) -> int | None:
    """Where the value of an entry is, None if in the entry itself."""
    return struct.unpack(order + "I", entry.value)[0] if _length(entry) > 4 else None


def _number(block: bytes | bytearray, entry: _Entry, order: str) -> float | None:
    """The first number of an entry, of whatever type; None if it has none."""
    if entry.type not in _NUMBERS or entry.count == 0:
        return None
    place = _place(entry, order)
    data = entry.value if place is None else block[place : place + 8].ljust(8, b"\0")
    number, *rest = struct.unpack_from(order + _TYPES[entry.type], data)
    return (number / rest[0] if rest[0] else None) if rest else number


def _patch(block: bytearray, start: int, order: str, below: tuple[int, ...], across: bool, size: tuple[int, int]) -> int:
    """Patches a directory and those that its tags `below` point to; returns where it is now. size: height and width."""
    found = _directory(block, start, order)
    if found is None:
        return start
    entries, _, whole = found
    patched = []
    by_tag = {entry.tag: entry for entry in entries}
    for entry in entries:
        tag, kind, count, value = entry
        if tag == _BASE.Orientation:
            kind, count, value = 3, 1, struct.pack(order + "HH", 1, 0)
        elif tag in _WIDTHS or tag in _HEIGHTS:
            side = size[tag in _WIDTHS]
            kind, count = 3 if kind == 3 and side < 1 << 16 else 4, 1
            value = struct.pack(order + _TYPES[kind], side).ljust(4, b"\0")
        elif tag in below and count == 1 and kind in (4, 13):
            inner = (_IFD.Interop,) if tag == _IFD.Exif else ()
            (at,) = struct.unpack(order + "I", value)
            value = struct.pack(order + "I", _patch(block, at, order, inner, across, size))
        elif across and tag in (_BASE.XResolution, _BASE.YResolution):
            other = _BASE.YResolution if tag == _BASE.XResolution else _BASE.XResolution
            value = by_tag[other].value if other in by_tag and by_tag[other].type == kind else value
        patched.append(_Entry(tag, kind, count, value))
    data = struct.pack(order + "H", len(patched)) + b"".join(struct.pack(order + "HHI4s", *entry) for entry in patched)
    if whole:
        block[start : start + len(data) + 4] = data + bytes(4)
        return start
    block += bytes(len(block) % 2)
    block += data + bytes(4)
    return len(block) - len(data) - 4


def _drop_thumbnail(block: bytearray, start: int, order: str) -> None:
    """Takes the picture of a thumbnail's directory out: cut off where it is the end of the block, overwritten otherwise."""
    found = _directory(block, start, order)
    if not found:
        return
    values = {entry.tag: _number(block, entry, order) for entry in found[0]}
    at, length = (int(values.get(tag) or 0) for tag in (_BASE.JpegIFOffset, _BASE.JpegIFByteCount))
    if 8 < at and 0 < length and at + length <= len(block) and bytes(block[at : at + 2]) == b"\xff\xd8":
        if at + length == len(block):
            del block[at:]
        else:
            block[at : at + length] = bytes(length)


def _property(xmp: bytes, namespace: str, name: str) -> re.Pattern[bytes]:
    """Matches what stands before a whole number (group 1) and the number (group 2)."""
    bound = re.findall(rb"""xmlns:([\w.-]+)\s*=\s*["']%s["']""" % re.escape(_NAMESPACES[namespace]), xmp)
    prefixes = b"|".join(re.escape(prefix) for prefix in {namespace.encode(), *bound})
    return re.compile(rb"""((?:%s):%s(?:\s*=\s*["']|\s*>)\s*)(\d+)""" % (prefixes, name.encode()))
