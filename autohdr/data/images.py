"""Photos in and out: JPEG, PNG, WebP and TIFF with 8 or 16 bits a channel.

Pixels are RGB in the file's own colour space (its ICC profile travels along) and upright (the EXIF orientation is
applied on reading). Transparency is carried along, never blended in.
"""

import contextlib
import io
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import imagecodecs
import numpy as np
import tifffile
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from autohdr.errors import UserError
from autohdr.files import replacing

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff"})
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF")
_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"})
_PNG_DEPTH, _PNG_HEADER = 24, 33  # where the signature and the IHDR chunk hold the bit depth, and where they end
_ICC_SPACE = slice(16, 20)  # where a profile names the colour space it is for
_ACROSS = (5, 6, 7, 8)  # the EXIF orientations that swap height and width
_DESCRIBING = "ImageDescription Make Model XResolution YResolution ResolutionUnit Software DateTime Artist Copyright"
_DESCRIBING_TAGS = {ExifTags.Base[name] for name in _DESCRIBING.split()} | {ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo}

# Pillow warns above this and refuses above twice this. 100-megapixel cameras are real; 300 megapixels are an accident.
Image.MAX_IMAGE_PIXELS = 150_000_000


@dataclass
class Photo:
    """A photo, and what it takes beside the pixels to write it again as it was.

    pixels: (H, W, 3), upright, float32 in [0, 1], or the samples themselves, uint8 or uint16 after depth. format: JPEG, PNG, WEBP
    or TIFF. depth: 8 or 16 bits a channel.
    alpha: (H, W) uint8 or uint16 after depth, or None. exif: an EXIF block (a TIFF without pixels) of orientation 1 and
    without a thumbnail, or empty. icc_profile: an RGB profile or None.
    """

    pixels: np.ndarray
    format: str
    depth: int = 8
    alpha: np.ndarray | None = None
    exif: bytes = b""
    icc_profile: bytes | None = None


def read_photo(path: str | Path, as_stored: bool = False) -> Photo:
    """Reads a photo. UserError if the file is missing, empty, damaged, larger than 300 megapixels or no photo.

    as_stored: leave its pixels the uint8 or uint16 samples that they are in the file, a quarter or half of the memory.
    """
    with _opened(path) as image:
        samples = _turned(*_decode(image))
        exif, icc = _exif(image)[0], image.info.get("icc_profile")
        return Photo(
            pixels=np.require(samples[..., :3], requirements=["C", "W"]) if as_stored else to_float(samples[..., :3]),
            format=str(image.format).replace("MPO", "JPEG"),
            depth=8 * samples.itemsize,
            alpha=samples[..., 3].copy() if samples.shape[2] == 4 else None,
            exif=exif,
            icc_profile=icc if icc and icc[_ICC_SPACE] == b"RGB " else None,
        )


def read_samples(path: str | Path, at_least: int = 0) -> np.ndarray:
    """The pixels alone, as stored: (H, W, 3) uint8 or uint16, upright, without alpha. UserError as read_photo.

    at_least: where this many pixels a side are enough, a JPEG comes at a half, a quarter or an eighth of its size, several
    times as fast.
    """
    with _opened(path) as image:
        if at_least:
            image.draft(image.mode, (at_least, at_least))
        return _turned(*_decode(image))[..., :3]


def read_rgb(path: str | Path) -> np.ndarray:
    """The pixels alone: (H, W, 3) float32 in [0, 1], upright, without alpha. UserError as read_photo."""
    return to_float(read_samples(path))


def photo_layout(path: str | Path) -> tuple[int, int, int]:
    """Upright height, width and bits a sample, 8 or 16, by the header alone. UserError as read_photo, but for the pixels."""
    with _opened(path) as image:
        return *_upright(image), 16 if _is_deep(image) else 8


def check_photo(path: str | Path) -> tuple[int, int]:
    """Decodes all of a photo and returns its upright (height, width). UserError as read_photo."""
    with _opened(path) as image:
        if image.format in ("JPEG", "MPO"):
            size = _upright(image)
            image.draft(image.mode, (1, 1))  # reads every coefficient without transforming them all: twice as fast
            _decode(image)
            return size
        return _turned(*_decode(image)).shape[:2]


def write_photo(path: str | Path, photo: Photo) -> None:
    """Writes a photo in its own format and depth, with its EXIF and ICC profile; the file appears whole or not at all.

    JPEG and WebP are written with quality 95 (JPEG without chroma subsampling), TIFF uncompressed. UserError if a pixel
    is not finite or the format can't hold the photo; OSError if the file can't be written.
    """
    samples = photo.pixels if photo.pixels.dtype.kind == "u" else from_float(photo.pixels, photo.depth)
    if photo.alpha is not None:
        samples = np.dstack([samples, photo.alpha])
    with replacing(path) as part, open(part, "wb") as file:
        try:
            _WRITERS[photo.format](file, samples, photo)
        except (ValueError, TypeError, struct.error) as error:  # metadata that was readable but cannot be written
            raise UserError(f"cannot be written as {photo.format}: {error}") from error


def to_float(samples: np.ndarray) -> np.ndarray:
    """uint8 or uint16 samples as contiguous float32 in [0, 1]."""
    return np.divide(samples, np.float32(np.iinfo(samples.dtype).max), dtype=np.float32, order="C")


def from_float(pixels: np.ndarray, depth: int = 8) -> np.ndarray:
    """Float pixels as uint8 (depth 8) or uint16 (depth 16), clipped to [0, 1] and rounded.

    UserError if one is not finite.
    """
    samples = np.empty(pixels.shape, np.uint8 if depth == 8 else np.uint16)
    for row in range(0, len(pixels), 64):  # in bands, so that a large photo needs no second copy in floating point
        band = pixels[row : row + 64]
        if not np.isfinite(band).all():
            raise UserError("expected finite pixels, got NaN or infinity")
        samples[row : row + 64] = np.rint(np.clip(band, 0, 1) * np.float32(np.iinfo(samples.dtype).max))
    return samples


def photos_in(folder: Path, but: Path) -> list[Path]:
    """The files of SUFFIXES in a folder and all below it, sorted, without hidden ones and those in `but`, the results' folder."""
    root, results = folder.resolve(), but.resolve()
    found = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES and path.is_file()]
    if results != root and results.is_relative_to(root):
        found = [path for path in found if not path.resolve().is_relative_to(results)]
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[ImageFile]:
    """A file as a Pillow image, not yet decoded. What goes wrong in the block becomes a UserError naming the file."""
    try:
        if os.path.getsize(path) == 0:
            raise UserError("the file is empty")
        with Image.open(path, formats=_FORMATS) as image:
            yield image
    except MemoryError:
        raise
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{path}: not a JPEG, PNG, WebP or TIFF photo, or its header is damaged") from error
    except Exception as error:  # decoders meet damaged files with anything from OSError to struct.error
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _decode(image: ImageFile) -> tuple[np.ndarray, int]:
    """The samples, (H, W, 3) or with alpha (H, W, 4), uint8 or uint16, and the orientation still to be applied."""
    if not _is_single(image):
        raise UserError("expected a single photo, got several frames or pages, or a camera's raw file")
    deep = _is_deep(image)
    if deep and isinstance(image, TiffImageFile):
        return _deep_tiff(os.fsdecode(image.filename)), image.tag_v2.get(ExifTags.Base.Orientation, 1)
    image.load()
    if deep:  # Pillow has read the PNG too, but as 8 bits; it finds an EXIF chunk wherever it is
        return _rgb(imagecodecs.png_decode(Path(os.fsdecode(image.filename)).read_bytes())), _exif(image)[1]
    if image.mode not in _MODES:
        raise UserError(f"expected grey, palette, RGB or CMYK of 8 or 16 bits a channel, got Pillow mode {image.mode}")
    icc = image.info.get("icc_profile") or b""
    if image.mode == "CMYK" and icc[_ICC_SPACE] == b"CMYK":
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        rgb = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    else:
        rgb = image.convert("RGBA" if image.has_transparency_data else "RGB")
    return np.asarray(rgb), 1 if isinstance(image, TiffImageFile) else _exif(image)[1]  # Pillow has turned a TIFF already


def _is_deep(image: ImageFile) -> bool:
    """Whether a photo has more than 8 bits a channel."""
    if image.format == "PNG":
        with open(image.filename, "rb") as file:
            return file.read(_PNG_DEPTH + 1)[_PNG_DEPTH] == 16
    return isinstance(image, TiffImageFile) and max(image.tag_v2.get(ExifTags.Base.BitsPerSample, (1,))) > 8


def _upright(image: ImageFile) -> tuple[int, int]:
    """(height, width) once turned; Pillow gives a TIFF's turned already."""
    width, height = image.size
    across = not isinstance(image, TiffImageFile) and _exif(image)[1] in _ACROSS
    return (width, height) if across else (height, width)


def _is_single(image: ImageFile) -> bool:
    """Whether a file holds one photo, not an animation or a stack.

    Small copies do not count: a TIFF may have them as pages, and an MPO (from a camera) is a JPEG with previews.
    """
    if not isinstance(image, TiffImageFile):
        return image.format == "MPO" or getattr(image, "n_frames", 1) == 1
    reduced = []
    for page in range(image.n_frames):
        image.seek(page)
        reduced.append(bool(image.tag_v2.get(ExifTags.Base.NewSubfileType, 0) & 1))
    image.seek(0)
    return not reduced[0] and all(reduced[1:])


def _deep_tiff(path: str) -> np.ndarray:
    """A TIFF of more than 8 bits, which Pillow would cut down to 8."""
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        kind = tifffile.PHOTOMETRIC(page.photometric).name
        if page.dtype != np.uint16 or page.bitspersample != 16 or kind not in ("RGB", "MINISBLACK", "MINISWHITE"):
            raise UserError(f"expected 8 or 16 bits of grey or RGB, got {page.bitspersample} bits of {kind} ({page.dtype})")
        samples = page.asarray()
        if page.axes == "SYX":
            samples = np.moveaxis(samples, 0, 2)
        colours = 3 if kind == "RGB" else 1
        if colours == 1:
            samples = samples.reshape(page.imagelength, page.imagewidth, -1)
        if kind == "MINISWHITE":
            samples[..., 0] = 65535 - samples[..., 0]
        alpha = page.extrasamples[:1]
        if alpha == (tifffile.EXTRASAMPLE.ASSOCALPHA,):
            raise UserError("expected unassociated alpha, got a 16-bit TIFF with premultiplied alpha")
        return _rgb(samples[..., : colours + (alpha == (tifffile.EXTRASAMPLE.UNASSALPHA,))])


def _rgb(samples: np.ndarray) -> np.ndarray:
    """(H, W), or (H, W, 1 to 4) in the order grey, grey + alpha, RGB, RGB + alpha, as (H, W, 3 or 4)."""
    if samples.ndim == 2:
        samples = samples[..., None]
    return samples if samples.shape[2] >= 3 else samples[..., [0, 0, 0, 1][: samples.shape[2] + 2]]


def _turned(samples: np.ndarray, orientation: int) -> np.ndarray:
    """A view of stored samples with EXIF orientation 1 to 8 applied."""
    if orientation in _ACROSS:
        samples = samples.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        samples = samples[::-1]
    if orientation in (2, 3, 6, 7):
        samples = samples[:, ::-1]
    return samples


def _exif(image: ImageFile) -> tuple[bytes, int]:
    """The EXIF block, changed to orientation 1 and to no thumbnail (it would be outdated), and the orientation it had.

    The block is patched, not written anew: maker notes refer to positions in it. One that can't be parsed is dropped.
    """
    if isinstance(image, TiffImageFile):
        return _tiff_exif(image), 1
    block = bytearray(image.info.get("exif", b"").removeprefix(b"Exif\0\0"))
    order = "<" if block.startswith(b"II") else ">"
    orientation = 1
    try:
        (start,) = struct.unpack_from(order + "I", block, 4)
        (count,) = struct.unpack_from(order + "H", block, start)
        end = start + 2 + 12 * count
        for entry in range(start + 2, end, 12):
            tag, _, _, value = struct.unpack_from(order + "HHIH", block, entry)
            if tag == ExifTags.Base.Orientation:
                orientation = value
                struct.pack_into(order + "HHIHH", block, entry, tag, 3, 1, 1, 0)
        struct.pack_into(order + "I", block, end, 0)  # the offset of the thumbnail's directory
    except struct.error:
        return b"", 1
    return bytes(block), orientation


def _tiff_exif(image: TiffImageFile) -> bytes:
    """What the tags of a TIFF say about the photo, not about how its pixels are stored, as an EXIF block."""
    tags = image.getexif()
    for tag in set(tags) - _DESCRIBING_TAGS:
        del tags[tag]
    tags.bigtiff = False
    return tags.tobytes().removeprefix(b"Exif\0\0")


def _write_jpeg(file: BinaryIO, samples: np.ndarray, photo: Photo) -> None:
    exif = photo.exif and b"Exif\0\0" + photo.exif
    image = Image.fromarray(samples)
    encoded = io.BytesIO()  # into a real file Pillow writes a JPEG itself, without noticing that a full disk took only a part
    image.save(encoded, "JPEG", quality=95, subsampling=0, exif=exif, icc_profile=photo.icc_profile)
    file.write(encoded.getbuffer())


def _write_webp(file: BinaryIO, samples: np.ndarray, photo: Photo) -> None:
    image = Image.fromarray(samples)  # exact: transparent pixels keep their colour
    image.save(file, "WEBP", quality=95, exact=True, exif=photo.exif, icc_profile=photo.icc_profile)


def _write_png(file: BinaryIO, samples: np.ndarray, photo: Photo) -> None:
    """Pillow writes no 16-bit RGB; the encoder that does writes no metadata, so that goes in behind its header."""
    png = memoryview(imagecodecs.png_encode(samples))
    file.write(png[:_PNG_HEADER])
    profile = photo.icc_profile and b"ICC\0\0" + zlib.compress(photo.icc_profile)
    for kind, data in ((b"iCCP", profile), (b"eXIf", photo.exif)):
        if data:
            file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))
    file.write(png[_PNG_HEADER:])


def _write_tiff(file: BinaryIO, samples: np.ndarray, photo: Photo) -> None:
    """An EXIF block is a TIFF without pixels: add the tags that describe them, then append them as one strip."""
    height, width, channels = samples.shape
    tags = Image.Exif()
    tags.load(photo.exif)
    tags.endian = "<"
    base = ExifTags.Base
    tags[base.ImageWidth], tags[base.ImageLength] = width, height
    tags[base.BitsPerSample], tags[base.SamplesPerPixel] = (8 * samples.itemsize,) * channels, channels
    tags[base.Compression], tags[base.PhotometricInterpretation], tags[base.PlanarConfiguration] = 1, 2, 1
    tags[base.RowsPerStrip], tags[base.StripByteCounts] = height, samples.nbytes
    tags[base.Orientation] = 1
    if channels == 4:
        tags[base.ExtraSamples] = 2  # unassociated alpha
    if photo.icc_profile:
        tags[base.InterColorProfile] = photo.icc_profile
    tags[base.StripOffsets] = 0  # counted from the end of the tags: Pillow adds their length
    file.write(tags.tobytes().removeprefix(b"Exif\0\0"))
    file.write(np.ascontiguousarray(samples, samples.dtype.newbyteorder("<")).data)


_WRITERS = {"JPEG": _write_jpeg, "PNG": _write_png, "TIFF": _write_tiff, "WEBP": _write_webp}
