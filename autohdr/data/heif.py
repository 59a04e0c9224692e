"""HEIC by pillow-heif, which is an extra, and what an AVIF's boxes say and Pillow does not: depth and coded colours."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL.ImageFile import ImageFile

from autohdr.errors import UserError

SUFFIXES = frozenset({".heic", ".heif", ".hif"})
NO_GAIN_MAP = "its gain map is not in the result, which is the picture for usual screens"
_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})


class HeifFile(ImageFile):
    """A HEIC's first picture, upright. info: as Pillow's for others; bit_depth; nclx, the H.273 primaries and transfer."""

    format = "HEIF"

    def _open(self) -> None:
        import pillow_heif

        file = pillow_heif.open_heif(self.fp, convert_hdr_to_8bit=False, hdr_to_16bit=False)
        self._heif: Any = file
        self._size, self._mode = file.size, file.mode.partition(";")[0]
        self.n_frames = len(file)
        self.info = {key: value for key, value in file.info.items() if value}
        if coded := self.info.get("nclx_profile"):
            self.info["nclx"] = coded["color_primaries"], coded["transfer_characteristics"]

    def samples(self) -> np.ndarray:
        """(H, W) or (H, W, 2 to 4), upright, uint8 or uint16."""
        decoded = np.asarray(self._heif)
        if self._mode.endswith("a"):
            raise UserError("expected unassociated alpha, got premultiplied alpha")
        bits = self.info["bit_depth"]
        return sixteen_bits(decoded, bits) if bits > 8 else decoded

    def left_out(self) -> list[str]:
        """What the file holds beside its first picture and what describes that, in words."""
        parts = []
        if self.n_frames > 1:
            parts.append(f"of its {self.n_frames} pictures the first is in the result")
        kinds = list(self.info.get("aux", ()))
        if any("gainmap" in kind.lower() for kind in kinds):
            parts.append(NO_GAIN_MAP)
        if self.info.get("depth_images") or any("gainmap" not in kind.lower() for kind in kinds):
            parts.append("its depth map and masks are not in the result")
        if self.info.get("metadata"):
            parts.append("what it says beside EXIF and XMP is not kept")
        return parts


def container(head: bytes) -> str:
    """HEIF or AVIF by a file's first bytes, 32 or more; empty for anything else."""
    brands = brands_of(head)
    return "AVIF" if brands & {b"avif", b"avis"} else "HEIF" if brands & _BRANDS else ""


def brands_of(head: bytes) -> set[bytes]:
    """What kinds of file a HEIC or an AVIF says that it is; `tmap` has a gain map."""
    if head[4:8] != b"ftyp":
        return set()
    return {head[8:12]} | {head[at : at + 4] for at in range(16, min(len(head), int.from_bytes(head[:4])), 4)}


def avif_info(path: str | Path) -> dict[str, Any]:
    """bit_depth and nclx of an AVIF, as HeifFile.info has them."""
    properties = _properties(path)
    codec, depths = properties.get(b"av1C", b"\0\0\0"), properties.get(b"pixi", b"")[5:]
    info: dict[str, Any] = {"bit_depth": max(depths, default=12 if codec[2] & 0x20 else 10 if codec[2] & 0x40 else 8)}
    if coded := properties.get(b"nclx"):
        info["nclx"] = struct.unpack_from(">HH", coded)
    return info


def boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The boxes that data are made of, kind and content. UserError where they are damaged."""
    at = 0
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        start = at + 8
        if length == 1:
            length, start = int.from_bytes(data[start : start + 8]), start + 8
        end = at + length if length else len(data)
        if end < start or end > len(data):
            raise UserError("its boxes are damaged")
        yield kind, data[start:end]
        at = end


def sixteen_bits(samples: np.ndarray, bits: int) -> np.ndarray:
    """Samples of 9 to 16 bits as uint16 of all its range."""
    white = (1 << bits) - 1
    return ((samples.astype(np.uint32) * 65535 + white // 2) // white).astype(np.uint16)


def _properties(path: str | Path) -> dict[bytes, bytes]:
    """What describes the picture that a HEIC or an AVIF shows, by its kind; a colr box by what it holds: nclx, prof, rICC."""
    top = dict(boxes(_meta(path)[4:]))
    parts = list(boxes(top[b"iprp"]))
    shared = list(boxes(dict(parts)[b"ipco"]))
    shown = int.from_bytes(top[b"pitm"][4:])
    found = {}
    for data in (data for kind, data in parts if kind == b"ipma"):
        item, index = ("I" if data[0] else "H"), ("H" if data[3] & 1 else "B")
        at = 8
        for _ in range(int.from_bytes(data[4:8])):
            number, count = struct.unpack_from(f">{item}B", data, at)
            at += struct.calcsize(f">{item}B")
            places = struct.unpack_from(f">{count}{index}", data, at)
            at += struct.calcsize(f">{count}{index}")
            if number == shown:
                for place in places:
                    kind, content = shared[(place & (0x7FFF if index == "H" else 0x7F)) - 1]
                    found[content[:4] if kind == b"colr" else kind] = content[4:] if kind == b"colr" else content
    return found


def _meta(path: str | Path) -> bytes:
    """The box that holds everything but the pixels."""
    with open(path, "rb") as file:
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if length == 1:
                length = int.from_bytes(file.read(8)) - 8
            if kind == b"meta":
                return file.read(length - 8)
            file.seek(length - 8, 1)
    raise UserError("it has no pictures")
