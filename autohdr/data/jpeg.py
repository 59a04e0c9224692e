"""What libjpeg notices about a damaged JPEG and Pillow keeps to itself: data that end too early, or go on for too long.

libjpeg goes on with grey where data are missing and passes over data too many, and damage within a scan mostly ends in one or the
other: after it, codes are read at wrong places, and not as many pixels come out as there should be. Of several scans (as of a
progressive JPEG) it is seen that one is missing, not what is wrong within.
"""

import io
import math
import re
import struct
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from autohdr.errors import UserError

_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # one that ends a scan
_RESTART = re.compile(rb"\xff([\xd0-\xd7])")
_END = b"\xff\xd9"


def load_jpeg(image: Any, keep_damaged: bool = False) -> list[str]:
    """Decodes a JPEG that Pillow has opened. What is wrong with its data raises UserError, or is returned if such are kept."""
    image.fp.seek(0)
    data = image.fp.read()
    layout = _layout(data)
    single = layout is not None and layout.single
    # The decoder must not be done with a single scan before it has had the last bytes; and no file needs more than there is.
    parts = [data[: layout.end - 2], data[layout.end - 2 :], _END] if layout and single else [data, _END]
    fed = iter(parts)
    count = 0

    def read(size: int) -> bytes:
        nonlocal count
        count += 1
        return next(fed, b"")

    image.load_read = read
    try:
        image.load()
    except OSError as error:
        raise UserError("the JPEG is damaged: its data cannot be decoded") from error
    problems = ["it is truncated"] if count == len(parts) else layout.problems if layout else []
    if not problems and layout and single:
        if count == 1:
            problems = ["its data go on behind the last pixel"]
        elif _ends_grey(image) and _is_short(data, layout.end):
            problems = ["its data end before the last pixel"]
    if problems and not keep_damaged:
        raise UserError(f"the JPEG is damaged: {problems[0]}")
    return problems


class _Layout(NamedTuple):
    end: int  # of the last scan's data
    single: bool  # there is one scan
    problems: list[str]


def _layout(data: bytes) -> _Layout | None:
    """What the markers of a JPEG say; None where they end before a scan does."""
    at, end, interval, frame = 2, 0, 0, b""
    scans, problems = [], []
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xD9:
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        (length,) = struct.unpack_from(">H", data, at + 2)
        segment = data[at + 4 : at + 2 + length]
        at += 2 + length
        if marker in (0xC0, 0xC1, 0xC2):
            frame, progressive = segment, marker == 0xC2
        elif marker == 0xDD:
            (interval,) = struct.unpack_from(">H", segment)
        elif marker == 0xDA:
            found = _MARKER.search(data, at)
            if not found or not frame:
                return None
            start, at = at, found.start()
            end = at
            while data[end - 1] == 0xFF:  # filling before a marker
                end -= 1
            scans.append(segment)
            if interval:
                problems += _wrong_restarts(data[start:end], interval, frame, segment)
    if not scans:
        return None
    if progressive and not _complete(frame, scans):
        problems.append("a scan is missing")
    single = len(scans) == 1 and scans[0][0] == frame[5]
    return _Layout(end, single, problems)


def _wrong_restarts(scan: bytes, interval: int, frame: bytes, header: bytes) -> list[str]:
    """Whether the restart markers of a scan are not those that its size asks for."""
    height, width = struct.unpack_from(">HH", frame, 1)
    factors = {frame[i]: (frame[i + 1] >> 4, frame[i + 1] & 15) for i in range(6, 6 + 3 * frame[5], 3)}
    across, down = (max(sampling[i] for sampling in factors.values()) for i in (0, 1))
    if header[0] == 1:  # the blocks of the component alone
        own = factors[header[1]]
        units = math.ceil(math.ceil(width * own[0] / across) / 8) * math.ceil(math.ceil(height * own[1] / down) / 8)
    else:
        units = math.ceil(width / (8 * across)) * math.ceil(height / (8 * down))
    found = [code[0] & 7 for code in _RESTART.findall(scan)]
    expected = [i % 8 for i in range(math.ceil(units / interval) - 1)]
    return [] if found == expected else [f"{len(expected)} restart markers were expected, {len(found)} are there"]


def _complete(frame: bytes, scans: list[bytes]) -> bool:
    """Whether the scans of a progressive JPEG bring every coefficient of every component to its last bit."""
    done = {component: np.zeros(64, bool) for component in frame[6 : 6 + 3 * frame[5] : 3]}
    for header in scans:
        first, last, bits = header[-3:]
        for component in header[1 : 1 + 2 * header[0] : 2]:
            if bits & 15 == 0 and component in done:
                done[component][first : last + 1] = True
    return all(coefficients.all() for coefficients in done.values())


def _ends_grey(image: Image.Image) -> bool:
    """Whether the last pixel is what libjpeg makes of missing data."""
    return bool(
        np.all(np.abs(np.asarray(image.crop((image.width - 1, image.height - 1, image.width, image.height)), np.int16) - 128) < 2)
    )


def _is_short(data: bytes, end: int) -> bool:
    """Whether more data would have made other pixels."""
    pictures = []
    for more in (b"", b"\x55\xaa" * 256):
        with Image.open(io.BytesIO(data[:end] + more + _END), formats=("JPEG",)) as image:
            image.draft(None, (1, 1))
            pictures.append(np.asarray(image))
    return not np.array_equal(*pictures)
