"""Camera raw, developed by LibRaw through rawpy, which is an extra: as the camera would have, without a look."""

import contextlib
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from autohdr.data.libraries import written
from autohdr.errors import UserError

SUFFIXES = frozenset(
    ".3fr .arw .cr2 .cr3 .crw .dcr .dng .erf .fff .iiq .kdc .mef .mos .mrw .nef .nrw .orf .pef .raf .raw .rw2 .rwl .sr2 .srf .srw"
    " .x3f".split()
)
_TIFF = (b"II*\0", b"MM\0*")
_MAGICS = (b"FUJIFILMCCD-RAW", b"IIRO", b"IIRS", b"MMOR", b"IIU\0", b"\0MRM", b"FOVb", b"II\x1a\0\0\0HEAPCCDR")
_DNG_VERSION, _SUBFILE, _SUB_DIRECTORIES, _PHOTOMETRIC, _SENSOR = 50706, 254, 330, 262, (32803, 34892)


class RawFile(ImageFile):
    """A camera's raw file, upright. tag_v2: its first directory, where it is a TIFF; else info is that of the preview."""

    format = "RAW"

    def _open(self) -> None:
        import rawpy

        assert self.fp
        try:
            self._raw: Any = rawpy.imread(os.fsdecode(self.filename))
        except rawpy.LibRawError as error:
            raise UserError("its kind of camera raw is not known to LibRaw, or its header is damaged") from error
        sizes = self._raw.sizes
        self._size = (sizes.iheight, sizes.iwidth) if sizes.flip & 4 else (sizes.iwidth, sizes.iheight)
        self._mode = "L" if self._raw.num_colors == 1 else "RGB"
        self._half = False
        head = self.fp.read(8)
        if head.startswith(_TIFF):
            self.tag_v2 = ImageFileDirectory_v2(head)
            self.fp.seek(self.tag_v2.next)
            self.tag_v2.load(self.fp)
        else:
            with contextlib.suppress(rawpy.LibRawError, OSError):
                preview = self._raw.extract_thumb()
                if preview.format == rawpy.ThumbFormat.JPEG:
                    with Image.open(io.BytesIO(preview.data), formats=("JPEG",)) as image:
                        self.info = {key: image.info[key] for key in ("exif", "xmp") if key in image.info}
        self.info["bit_depth"] = 16

    def getexif(self) -> Image.Exif:
        """What the first directory says, and those that it points to."""
        assert self.fp
        tags = Image.Exif()
        self.fp.seek(0)
        tags.load_from_fp(self.fp)
        return tags

    def draft(self, mode: str | None, size: tuple[int, int] | None) -> None:
        """Half the size, without interpolation, where that is enough."""
        self._half = size is not None and min(self.size) >= 2 * max(size)

    def samples(self, notes: list[str]) -> np.ndarray:
        """(H, W, 3) or, of a monochrome sensor, (H, W, 1) uint16, upright, in sRGB: the camera's white balance, its own exposure.

        notes: get LibRaw's complaints.
        """
        import rawpy

        settings = {"use_camera_wb": True, "no_auto_bright": True, "output_bps": 16, "half_size": self._half}
        said: list[str] = []
        with written(os.fsdecode(self.filename), said):
            developed = self._raw.postprocess(gamma=(2.4, 12.92), output_color=rawpy.ColorSpace.sRGB, **settings)
        notes += [f"parts of it may be wrong: its decoder says: {words}" for words in said[:1]]
        return developed


def is_raw(path: str | Path, head: bytes) -> bool:
    """Whether a file, of these first bytes, is a camera's raw one: as a TIFF is whose first directory is a sensor's."""
    if head.startswith(_MAGICS) or head[4:12] == b"ftypcrx ":
        return True
    if Path(path).suffix.lower() in SUFFIXES:
        return not head.startswith((b"\xff\xd8", b"\x89PNG", b"RIFF")) and head[4:8] != b"ftyp"
    if not head.startswith(_TIFF):
        return False
    tags = Image.Exif()
    with contextlib.suppress(Exception), open(path, "rb") as file:  # what is wrong is said by whoever reads it
        tags.load_from_fp(file)
    sensor = tags.get(_PHOTOMETRIC) in _SENSOR or tags.get(_SUBFILE) == 1 and _SUB_DIRECTORIES in tags
    return _DNG_VERSION in tags or head[8:10] == b"CR" or sensor
