"""JPEGs, decoded so that what libjpeg complains of is heard; Pillow keeps it to itself.

libjpeg goes on with grey where data are missing and passes over data too many, and damage within a scan mostly ends in one or the
other: after it, codes are read at wrong places. Where they still fit, the result is another JPEG, as good as the first.
"""

import re
from contextlib import suppress
from typing import Any

import numpy as np
import simplejpeg

from autohdr.errors import UserError

_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # one that ends a scan
_FILLER = re.compile(rb"(?<!\xff)\x00+(?=\xff+\xd9)")  # before the end, as drones write it
_FRAMES = {0xC0: False, 0xC1: False, 0xC2: True, 0xC9: False, 0xCA: True}
"""Marker: whether it is progressive."""
_METADATA = {*range(0xE1, 0xEE), 0xEF, 0xFE}
_IN_WORDS = {
    "Premature end of JPEG file": "it is truncated",
    "premature end of data segment": "its data end before the last pixel",
    "extraneous bytes": "it has data that belong to no pixel",
    "bad Huffman code": "it has codes that mean nothing",
    "instead of RST": "its restart markers are out of order",
}


def decode_jpeg(image: Any, keep_damaged: bool = False) -> tuple[np.ndarray, list[str]]:
    """The pixels of a JPEG that Pillow has opened, at the size that `draft` has set, and in words what is wrong with them.

    (H, W, 3) uint8 RGB, or (H, W, 4) CMYK where 0 is no ink. UserError if it is damaged, unless what there is is to be kept.
    """
    image.fp.seek(0)
    data, lacks_scan = _pixel_data(image.fp.read())
    problems, notes = ["a scan is missing"] if lacks_scan else [], []
    try:
        samples = _strictly(image, data)
    except ValueError as complaint:
        try:
            samples = _by_libjpeg(image, data, strict=False)
            problems.insert(0, _in_words(str(complaint)))
        except ValueError:  # it gives up, or does not know how colours are sampled
            samples = _by_pillow(image, problems)
            notes.append("its colours are sampled in a rare way, in which damage is not found")
    if problems and not keep_damaged:
        raise UserError(f"the JPEG is damaged: {problems[0]}")
    return samples, problems[:1] or notes


def _pixel_data(data: bytes) -> tuple[bytes, bool]:
    """What of a JPEG bears on its pixels, and whether a scan is missing, which libjpeg does not mind.

    Metadata are left out: a damaged profile is no damaged pixel. So is what the header of a sequential scan says of progression:
    it means nothing there, and some phones have it wrong.
    """
    kept, lacking, progressive, at = [data[:2]], {}, False, 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xD9:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4])
        if marker == 0xFF:  # filling
            at += 1
            continue
        if length < 2:
            break
        segment, at = data[at : at + 2 + length], at + 2 + length
        if marker in _FRAMES:
            progressive = _FRAMES[marker]
            lacking = {component: np.ones(64, bool) for component in segment[10::3]}  # coefficients without their last bit yet
        elif marker == 0xDA:
            if not progressive:
                segment = segment[:-3] + bytes((0, 63, 0))
            first, last, bits = segment[-3:]
            for component in segment[5:-3:2]:
                if component in lacking and bits & 15 == 0:
                    lacking[component][first : last + 1] = False
            found = _MARKER.search(data, at)
            end = found.start() if found else len(data)
            segment, at = segment + data[at:end], end
        if marker == 0xE0 and segment[4:9] == b"JFIF\0":
            segment = segment[:9] + b"\1" + segment[10:]  # its version is no matter to pixels
        if marker not in _METADATA:
            kept.append(segment)
    return b"".join([*kept, data[at:]]), any(coefficients.any() for coefficients in lacking.values())


def _in_words(complaint: str) -> str:
    return next((words for key, words in _IN_WORDS.items() if key in complaint), f"its decoder says: {complaint}")


def _strictly(image: Any, data: bytes) -> np.ndarray:
    """ValueError where libjpeg complains, but for zeros before the end."""
    try:
        return _by_libjpeg(image, data, strict=True)
    except ValueError as complaint:
        if (trimmed := _FILLER.sub(b"", data)) != data:
            with suppress(ValueError):
                return _by_libjpeg(image, trimmed, strict=True)
        raise complaint


def _by_libjpeg(image: Any, data: bytes, strict: bool) -> np.ndarray:
    """ValueError where it cannot be decoded or, if strict, where libjpeg complains."""
    cmyk = image.mode == "CMYK"
    size = {"min_height": image.height, "min_width": image.width}
    samples = simplejpeg.decode_jpeg(data, "CMYK" if cmyk else "RGB", strict=strict, **size)
    return ~samples if cmyk else samples  # Adobe's convention


def _by_pillow(image: Any, problems: list[str]) -> np.ndarray:
    """Without libjpeg's complaints, but for the end of the data."""

    def read(size: int) -> bytes:
        part = image.fp.read(size)
        if not part:
            problems[:] = ["it is truncated"]
        return part or b"\xff\xd9"

    image.load_read = read
    try:
        image.load()
    except OSError as error:
        raise UserError("the JPEG is damaged: its data cannot be decoded") from error
    return np.asarray(image if image.mode == "CMYK" else image.convert("RGB"))
