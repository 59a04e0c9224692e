"""Samples into the bytes of a JPEG, PNG, WebP, AVIF or TIFF, with what the file says beside them."""

import functools
import io
import struct
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import imagecodecs
import numpy as np
from PIL import ExifTags, Image

Extra = Iterable[tuple[Any, bytes]]
QUALITY = 95
AVIF_QUALITY = 90
LEAST_QUALITY = 90
SEGMENT = 65533  # bytes that one of a JPEG holds
EXIF_NAME = b"Exif\0\0"
_PNG_HEADER = 33  # the end of the signature and the IHDR chunk
_STRIP = 1 << 20  # bytes before compression
_DEFLATE, _PREDICTED = 8, (5, 8, 32946, 34925, 50000)
_CODECS: dict[int, Callable[[bytes], Any]] = {
    1: bytes,
    5: imagecodecs.lzw_encode,
    8: imagecodecs.zlib_encode,
    32773: imagecodecs.packbits_encode,
    32946: imagecodecs.zlib_encode,
    34925: imagecodecs.lzma_encode,
    50000: imagecodecs.zstd_encode,
}


def encode_jpeg(samples: np.ndarray, exif: bytes, icc: bytes | None, extra: Extra, options: dict[str, Any]) -> bytes:
    """options: qtables or quality, subsampling, progressive, as Pillow takes them; jfif: unit and densities. extra: segments."""
    head = b""
    for start in range(0, len(exif), SEGMENT - len(EXIF_NAME)):  # one of 64 KB after the other, as cameras do
        head += _segment(0xE1, EXIF_NAME + exif[start : start + SEGMENT - len(EXIF_NAME)])
    head += b"".join(_segment(marker, data) for marker, data in extra)
    encoded = io.BytesIO()
    settings = {key: value for key, value in options.items() if key != "jfif"}
    if not settings.keys() & {"quality", "qtables"}:
        settings = {"quality": QUALITY, "subsampling": 0} | settings
    Image.fromarray(samples).save(encoded, "JPEG", extra=head, icc_profile=icc, **settings)
    data = bytearray(encoded.getbuffer())
    if "jfif" in options and data[2:4] == b"\xff\xe0":
        data[13:18] = options["jfif"]
    return bytes(data)


def encode_webp(samples: np.ndarray, exif: bytes, icc: bytes | None, extra: Extra, options: dict[str, Any]) -> bytes:
    """options: lossless, or quality. extra: xmp, by its name in Pillow."""
    encoded = io.BytesIO()  # exact: transparent pixels keep their colour
    settings: dict[str, Any] = {"quality": QUALITY, "exact": True} | options | dict(extra)
    if settings.get("lossless"):
        settings["quality"] = 75  # the effort, not the quality
    Image.fromarray(samples).save(encoded, "WEBP", exif=exif, icc_profile=icc, **settings)
    return encoded.getvalue()


def encode_avif(samples: np.ndarray, exif: bytes, icc: bytes | None, extra: Extra, options: dict[str, Any]) -> bytes:
    """options: quality, subsampling. extra: xmp, by its name in Pillow."""
    encoded = io.BytesIO()
    settings: dict[str, Any] = {"quality": AVIF_QUALITY, "subsampling": "4:4:4"} | options | dict(extra)
    if samples.ndim == 2:
        del settings["subsampling"]
    Image.fromarray(samples).save(encoded, "AVIF", exif=exif, icc_profile=icc or b"", **settings)
    return encoded.getvalue()


def encode_png(samples: np.ndarray, exif: bytes, icc: bytes | None, extra: Extra, options: dict[str, Any]) -> bytes:
    """Pillow writes no 16-bit RGB; the encoder that does writes no metadata, so that goes in behind its header. extra: chunks."""
    png = imagecodecs.png_encode(samples)
    chunks = [(kind, data) for kind, data in extra]
    if icc:
        chunks.insert(0, (b"iCCP", b"ICC\0\0" + zlib.compress(icc)))
    if exif:
        chunks.append((b"eXIf", exif))
    written = (struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks)
    return b"".join([png[:_PNG_HEADER], *written, png[_PNG_HEADER:]])


def encode_tiff(samples: np.ndarray, exif: bytes, icc: bytes | None, extra: Extra, options: dict[str, Any]) -> bytes:
    """An EXIF block is a TIFF without pixels: add the tags that describe them, then append them in strips.

    options: compression, by its number. extra: tags.
    """
    height, width, channels = samples.shape if samples.ndim == 3 else (*samples.shape, 1)
    samples = samples.reshape(height, width, channels)
    compression = options.get("compression", 1)
    predicted = compression in _PREDICTED and samples.dtype.kind == "u"
    rows = max(1, min(height, _STRIP // (width * channels * samples.itemsize)))
    strips = []
    for row in range(0, height, rows):
        band = samples[row : row + rows]
        if predicted:
            band = np.diff(band, axis=1, prepend=band.dtype.type(0))
        strips.append(_CODECS[compression](np.ascontiguousarray(band, band.dtype.newbyteorder("<")).tobytes()))
    tags = Image.Exif()
    tags.load(exif)
    tags.endian = "<"
    base = ExifTags.Base
    tags[base.ImageWidth], tags[base.ImageLength] = width, height
    tags[base.BitsPerSample], tags[base.SamplesPerPixel] = (8 * samples.itemsize,) * channels, channels
    tags[base.Compression], tags[base.PlanarConfiguration] = compression, 1
    tags[base.PhotometricInterpretation] = 1 if channels < 3 else 2
    tags[base.SampleFormat] = (3 if samples.dtype.kind == "f" else 1,) * channels
    tags[base.RowsPerStrip], tags[base.StripByteCounts] = rows, tuple(len(strip) for strip in strips)
    tags[base.Orientation] = 1
    if predicted:
        tags[base.Predictor] = 2
    if channels in (2, 4):
        tags[base.ExtraSamples] = 2  # unassociated alpha
    if icc:
        tags[base.InterColorProfile] = icc
    for tag, data in extra:
        tags[tag] = data
    starts = np.cumsum([0, *(len(strip) for strip in strips)])[:-1]
    tags[base.StripOffsets] = tuple(starts.tolist())  # counted from the end of the tags: Pillow adds their length
    return b"".join([tags.tobytes().removeprefix(EXIF_NAME), *strips])


ENCODERS = {"JPEG": encode_jpeg, "PNG": encode_png, "TIFF": encode_tiff, "WEBP": encode_webp, "AVIF": encode_avif}
WRITTEN = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "AVIF": (".avif",),
}
"""How the names of each format's files end; the first is for results."""


def compressible(compression: int) -> bool:
    """Whether encode_tiff knows a compression, by its number."""
    return compression in _CODECS


def jpeg_options(quantization: dict[int, list[int]], layer: list[tuple], progressive: bool) -> dict[str, Any]:
    """How a JPEG is compressed, for encode_jpeg, from what Pillow says of it; finer where it is coarser than quality 90."""
    tables = [list(quantization[component[3]]) for component in layer[:2] if component[3] in quantization]
    sampling = [tuple(component[1:3]) for component in layer]
    subsampling = {((1, 1),) * 3: 0, ((2, 1), (1, 1), (1, 1)): 1, ((2, 2), (1, 1), (1, 1)): 2}.get(tuple(sampling), 0)
    options: dict[str, Any] = {"subsampling": subsampling, "progressive": progressive}
    coarse = not tables or any(sum(table) > sum(_least_tables()[min(number, 1)]) for number, table in enumerate(tables))
    return options | ({"quality": LEAST_QUALITY} if coarse else {"qtables": tables})


@functools.cache
def _least_tables() -> dict[int, list[int]]:
    """Of LEAST_QUALITY."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG", quality=LEAST_QUALITY)
    with Image.open(file) as least:
        return least.quantization  # pyright: ignore[reportAttributeAccessIssue]


def _segment(marker: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data
