"""JPEG XL: its header read here, its pixels by imagecodecs, of all their bits; its profile by pillow-jxl-plugin, an extra."""

from collections.abc import Callable

import imagecodecs
import numpy as np
from PIL.ImageFile import ImageFile

from autohdr.data.heif import NO_GAIN_MAP, boxes, sixteen_bits
from autohdr.errors import UserError

SUFFIXES = frozenset({".jxl"})
_BARE, _CONTAINER = b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"
_TIFF = (b"II*\0", b"MM\0*")
_HEADER = 4096  # bytes, of which a header has some tens
_MOST = 1 << 26  # bytes of metadata once unpacked
_ALPHA, _SPOT, _BLACK, _FILTER = 0, 2, 4, 5  # kinds of extra channels
_RGB, _GREY, _XYB = 0, 1, 2
_CUSTOM, _D65, _SRGB_PRIMARIES, _SRGB_TRANSFER, _HDR = 2, 1, 1, 13, (16, 18)
_H273 = {1: 1, 9: 9, 11: 12}  # primaries with the white D65
_LINEAR = (1, 8)
_RATIOS = {1: (1, 1), 2: (12, 10), 3: (4, 3), 4: (3, 2), 5: (16, 9), 6: (5, 4), 7: (2, 1)}


class JxlFile(ImageFile):
    """A JPEG XL's first picture, upright. info: as Pillow's for others, icc_profile once the pixels are read; bit_depth; nclx, as
    HeifFile.info has it, of colours that become sRGB."""

    format = "JXL"

    def _open(self) -> None:
        assert self.fp
        self._data = self.fp.read()
        found = [] if self._data.startswith(_BARE) else list(boxes(self._data))
        kinds = {kind for kind, _ in found}
        self._has_jpeg = b"jbrd" in kinds
        self._gain_map, self._more = b"jhgm" in kinds, b"jumb" in kinds
        for kind, data in found:
            if kind == b"brob":
                kind, data = data[:4], data[4:]
                data = bytes(imagecodecs.brotli_decode(data, out=_MOST)) if kind in (b"Exif", b"xml ") else b""
            if kind == b"Exif":
                start = 0 if data.startswith(_TIFF) else 4 + int.from_bytes(data[:4])  # some writers leave the offset out
                self.info.setdefault("exif", data[start:])
            elif kind == b"xml ":
                self.info.setdefault("xmp", data)
        parts = [data[4:] if kind == b"jxlp" else data for kind, data in found if kind in (b"jxlc", b"jxlp")]
        self._stream = bytearray(b"".join(parts) if found else self._data)
        self._read_header(_Bits(self._stream[:_HEADER]))

    def jpeg(self) -> bytes | None:
        """The JPEG that it was made of, to the bit; None where it was made of none, or what that said has been changed since."""
        try:
            return bytes(imagecodecs.jpegxl_decode_jpeg(self._data, numthreads=1)) if self._has_jpeg else None
        except imagecodecs.JpegxlError:
            return None

    def samples(self, notes: list[str]) -> np.ndarray:
        """(H, W) or (H, W, 2 to 4), upright, uint8 or uint16."""
        decoded = imagecodecs.jpegxl_decode(bytes(self._stream), index=0)
        if decoded.shape[:2] != self.size[::-1]:
            raise UserError("its data are damaged")
        if self.info.get("nclx") == _LINEAR:
            notes.append("its profile is not kept: its pixels, which are lossy, are not of it")
        elif not self._is_srgb and "nclx" not in self.info:
            self._read_profile(notes)
        bits = self.info["bit_depth"]
        return sixteen_bits(decoded, bits) if bits > 8 else decoded

    def left_out(self) -> list[str]:
        """What the file holds beside its first picture and what describes that, in words."""
        parts = ["it is animated: its first picture is in the result"] if self._animated else []
        parts += [NO_GAIN_MAP] if self._gain_map else []
        return parts + (["what it says beside EXIF and XMP is not kept"] if self._more else [])

    def _read_profile(self, notes: list[str]) -> None:
        from pillow_jxl import Decoder

        profile = Decoder(num_threads=0)(self._data)[3]
        if profile:
            self.info["icc_profile"] = profile
        else:
            notes.append("it has no colour profile, and its colours are taken as sRGB's")

    def _read_header(self, bits: "_Bits") -> None:
        """SizeHeader and ImageMetadata of ISO/IEC 18181-1."""
        if bits.read(16) != int.from_bytes(_BARE, "little"):
            raise UserError("its header is damaged")
        width, height = _size(bits)
        orientation, self._animated, depth, extras, self._is_srgb, mode = 1, False, 8, [], True, "RGB"
        if not bits.read(1):
            if bits.read(1):
                orientation = 1 + bits.read(3)
                if bits.read(1):
                    _size(bits)
                if bits.read(1):
                    _preview(bits)
                self._animated = bool(bits.read(1))
                if self._animated:
                    bits.number((100, 0), (1000, 0), (1, 10), (1, 30))
                    bits.number((1, 0), (1001, 0), (1, 8), (1, 10))
                    bits.number((0, 0), (0, 3), (0, 16), (0, 32))
                    bits.read(1)
            place = bits.at + 1
            depth = _depth(bits)
            bits.read(1)
            extras = [_extra_channel(bits) for _ in range(bits.number((0, 0), (1, 0), (2, 4), (1, 12)))]
            is_lossy = bool(bits.read(1))
            mode = self._read_colours(bits, is_lossy)
            # Too few bits for light: the decoder is asked for 12, which the header names in as many bits as 8 and 10.
            if self.info.get("nclx") == _LINEAR and depth in (8, 10):
                self._set_bit(place, 0)
                self._set_bit(place + 1, 1)
                depth = 12
        if _BLACK in extras:
            raise UserError("expected grey or RGB, got CMYK")
        if len(extras) > 1 or extras and extras[0] != _ALPHA:
            raise UserError("expected grey or RGB, with or without alpha, got further channels")
        self._size = (height, width) if orientation > 4 else (width, height)
        self._mode = mode + "A" * len(extras)
        self.info["bit_depth"] = depth

    def _read_colours(self, bits: "_Bits", is_lossy: bool) -> str:
        """Pillow's mode."""
        if bits.read(1):
            return "RGB"
        has_profile, space = bits.read(1), bits.enum()
        self._is_srgb = False
        if space == _XYB:
            raise UserError("expected grey or RGB, got XYB")
        if has_profile and is_lossy:  # its pixels are of libjxl's own space, and come as linear light
            self.info["nclx"] = _LINEAR
        elif not has_profile:
            white = bits.enum()
            if white == _CUSTOM:
                bits.place()
            primaries = _SRGB_PRIMARIES if space == _GREY else bits.enum()
            if primaries == _CUSTOM:
                for _ in range(3):
                    bits.place()
            has_gamma = bits.read(1)
            transfer = 0 * bits.read(24) if has_gamma else bits.enum()
            self._is_srgb = (white, primaries, transfer) == (_D65, _SRGB_PRIMARIES, _SRGB_TRANSFER)
            if transfer in _HDR:
                if white != _D65 or primaries not in _H273:
                    raise UserError("expected PQ or HLG with the primaries of BT.709, BT.2020 or Display P3, got others")
                self.info["nclx"] = _H273[primaries], transfer
        return "L" if space == _GREY else "RGB"

    def _set_bit(self, place: int, value: int) -> None:
        self._stream[place // 8] = self._stream[place // 8] & ~(1 << place % 8) | value << place % 8


def is_jxl(head: bytes) -> bool:
    """By a file's first bytes, 12 or more."""
    return head.startswith((_BARE, _CONTAINER))


class _Bits:
    """A codestream's first bytes, read from the lowest bit on."""

    def __init__(self, data: bytes | bytearray):
        self._bits, self._end, self.at = int.from_bytes(data, "little"), 8 * len(data), 0

    def read(self, count: int) -> int:
        self.at += count
        if self.at > self._end:
            raise UserError("it is truncated")
        return self._bits >> (self.at - count) & ((1 << count) - 1)

    def number(self, *ways: tuple[int, int]) -> int:
        """U32 of the standard: one of four ways, each an offset and a number of bits."""
        offset, count = ways[self.read(2)]
        return offset + self.read(count)

    def enum(self) -> int:
        return self.number((0, 0), (1, 0), (2, 4), (18, 6))

    def place(self) -> None:
        """x and y of a colour."""
        for _ in range(2):
            self.number((0, 19), (1 << 19, 19), (1 << 20, 20), (1 << 21, 21))


def _sides(bits: _Bits, side: Callable[[], int]) -> tuple[int, int]:
    """Width and height."""
    height, ratio = side(), bits.read(3)
    if not ratio:
        return side(), height
    return height * _RATIOS[ratio][0] // _RATIOS[ratio][1], height


def _size(bits: _Bits) -> tuple[int, int]:
    eighths = bits.read(1)

    def side() -> int:
        return 8 * (1 + bits.read(5)) if eighths else bits.number((1, 9), (1, 13), (1, 18), (1, 30))

    return _sides(bits, side)


def _preview(bits: _Bits) -> None:
    ways = ((16, 0), (32, 0), (1, 5), (33, 9)) if bits.read(1) else ((1, 6), (65, 8), (321, 10), (1345, 12))
    _sides(bits, lambda: bits.number(*ways))


def _depth(bits: _Bits) -> int:
    if bits.read(1):
        raise UserError("expected whole numbers, got floating point")
    depth = bits.number((8, 0), (10, 0), (12, 0), (1, 6))
    if not 8 <= depth <= 16:
        raise UserError(f"expected 8 to 16 bits a channel, got {depth}")
    return depth


def _extra_channel(bits: _Bits) -> int:
    """Its kind."""
    if bits.read(1):
        return _ALPHA
    kind = bits.enum()
    _depth(bits)
    bits.number((0, 0), (3, 0), (4, 0), (1, 3))
    for _ in range(bits.number((0, 0), (0, 4), (16, 5), (48, 10))):
        bits.read(8)
    if kind == _ALPHA and bits.read(1):
        raise UserError("expected unassociated alpha, got premultiplied alpha")
    if kind == _SPOT:
        bits.read(64)
    if kind == _FILTER:
        bits.number((1, 0), (0, 2), (3, 4), (19, 8))
    return kind
