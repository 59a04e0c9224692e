"""Photos in and out: JPEG, PNG, WebP, AVIF and TIFF of 8 or 16 bits a channel, TIFF in floating point. HEIC, JPEG XL and raw in.

Pixels are RGB in the file's own colour space (its profile travels along) and upright (the orientation is applied on reading).
Transparency is carried along, never blended in.
"""

import contextlib
import importlib.util
import io
import itertools
import os
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from PIL import ExifTags, Image, ImageCms, TiffImagePlugin, UnidentifiedImageError, features
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from autohdr.data import heif, jxl, raw
from autohdr.data.colour import ICC_SPACE, ColourSpace, coded_name, colour_space, is_damaged
from autohdr.data.encoding import ENCODERS, WRITTEN, compressible, jpeg_options
from autohdr.data.jpeg import decode_jpeg
from autohdr.data.libraries import heard
from autohdr.data.metadata import ACROSS, Parts, check_sums, orientation_of, parts_of, png_chunks
from autohdr.errors import UserError
from autohdr.files import replacing

KINDS = "JPEG, PNG, WebP, TIFF, AVIF, HEIC, JPEG XL or camera raw"
SUFFIXES = frozenset().union(*WRITTEN.values(), heif.SUFFIXES, jxl.SUFFIXES, raw.SUFFIXES)
_OTHER_PHOTOS = frozenset(".bmp .exr .gif .hdr .insp .j2k .jp2 .jpf .jpx .jxr .pgm .ppm .psb .psd .tga".split())
_HEAD = 64  # bytes that tell what a file is
_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"})
_GREY_MODES = ("1", "L", "LA", "La", "I;16", "I;16B", "I", "F")
_PNG_DEPTH = 24  # where the IHDR chunk holds the bit depth
_MEGAPIXELS = 300

# Pillow warns above this and refuses above twice this. 100-megapixel cameras are real; 300 megapixels are an accident.
Image.MAX_IMAGE_PIXELS = _MEGAPIXELS * 500_000


def _know_more_tiffs() -> None:
    """Kinds of TIFF that Pillow does not know: with this it reads their tags; their pixels are tifffile's."""
    pixels, samples = ((2, 3, ()), (2, 4, (2,)), (1, 1, ()), (1, 2, (2,))), ((3, 16), (3, 32), (3, 64), (1, 32), (2, 32))
    kinds = itertools.product((b"II", b"MM"), pixels, samples)
    for order, (photometric, channels, alpha), (sample, bits) in kinds:
        for formats in {(sample,), (sample,) * channels}:
            key = (order, photometric, formats, 1, (bits,) * channels, alpha)
            TiffImagePlugin.OPEN_INFO.setdefault(key, ("RGB", "RGB"))


_know_more_tiffs()


@dataclass
class Photo:
    """A photo, and what it takes beside the pixels to write it again as it was.

    pixels: (H, W, 3), upright, float32 in [0, 1], or the samples themselves, uint8 or uint16 after depth; uint16 also of depth 8
    for conversion.converted to 16. format: JPEG, PNG, WEBP, TIFF or AVIF; HEIF, JXL and RAW are read but not written. depth: 8 or
    16 bits a channel, or 32.
    alpha: (H, W) uint8 or uint16 after depth, or None. exif: an EXIF block (a TIFF without pixels) of orientation 1 and
    without a thumbnail, or empty. icc_profile: an RGB or a grey profile or None.
    extra: what else the file says, as its format has it: (marker, data) of JPEG segments, (kind, data) of PNG chunks,
    (name, data) of WebP, AVIF, HEIC and JPEG XL, (tag, data) of TIFF and raw. grey: the file has grey alone, and is written so
    where the pixels are grey.
    options: how it was compressed, as encoding.encode_jpeg and the others take it. notes: what was not as it should be, in words.
    """

    pixels: np.ndarray
    format: str
    depth: int = 8
    alpha: np.ndarray | None = None
    exif: bytes = b""
    icc_profile: bytes | None = None
    extra: tuple[tuple[Any, bytes], ...] = ()
    grey: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def colour_space(self) -> ColourSpace | None:
        """What the pixels' numbers mean; None for sRGB, and where nothing tells."""
        return colour_space(self.icc_profile, dict(self.extra) if self.format == "PNG" else None)


def read_photo(path: str | Path, as_stored: bool = False, keep_damaged: bool = False) -> Photo:
    """Reads a photo. UserError if the file is missing, empty, damaged, larger than 300 megapixels or no photo.

    as_stored: leave its pixels the uint8 or uint16 samples that they are in the file, a quarter or half of the memory.
    keep_damaged: read what there is of a JPEG whose data are damaged, with a note.
    A TIFF in floating point (float16, float32) is linear light or encoded as its profile says, and taken as sRGB without one,
    with a note; 0 is black and 1 white, and what lies beyond is cut off, with another. A raw photo comes with 16 bits, in sRGB,
    developed without a look. Colours that an AVIF or a HEIC names by numbers alone are converted to sRGB, with a note.
    """
    notes: list[str] = []
    with _opened(path, notes) as image:
        samples, orientation = _decode(image, notes, keep_damaged)
        samples = _turned(samples, orientation)
        if space := _coded_space(image):
            srgb = from_float(space.to_srgb(samples[..., :3]), 8 * samples.itemsize)
            samples = np.concatenate([srgb, samples[..., 3:]], 2)
            notes.append(f"its colours, {coded_name(*image.info['nclx'])}, are converted to sRGB, and cut off beyond it")
        parts = parts_of(image, orientation, *samples.shape[:2])
        pixels = samples[..., :3]
        photo = Photo(
            pixels=np.require(pixels, requirements=["C", "W"]) if as_stored and pixels.dtype.kind == "u" else to_float(pixels),
            format=str(image.format).replace("MPO", "JPEG"),
            depth=32 if samples.dtype.kind == "f" else 8 * samples.itemsize,
            alpha=samples[..., 3].copy() if samples.shape[2] == 4 else None,
            exif=parts.exif,
            icc_profile=_profile(image, notes),
            extra=parts.extra,
            grey=_is_grey(image),
            options=_options(image, samples, parts, notes),
        )
    photo.notes = [*notes, *parts.notes]
    return photo


def read_samples(path: str | Path, at_least: int = 0) -> np.ndarray:
    """The pixels alone, in sRGB: (H, W, 3) uint8 or uint16, upright, without alpha. UserError as read_photo.

    at_least: where this many pixels a side are enough, a JPEG comes at a half, a quarter or an eighth of its size, and a raw
    photo at a half, several times as fast. Of such a glance no note is warned of: they are for those who read the photo.
    """
    notes: list[str] = []
    with _opened(path, notes) as image:
        if at_least:
            image.draft(image.mode, (at_least, at_least))
        samples = _turned(*_decode(image, notes))[..., :3]
        chunks = dict(png_chunks(image)) if image.format == "PNG" else None
        space = _coded_space(image) or colour_space(_profile(image, notes), chunks)
        if space or samples.dtype.kind == "f":
            pixels = space.to_srgb(samples) if space else samples
            samples = from_float(pixels, 8 if samples.dtype == np.uint8 else 16)
    if not at_least:
        _warn(path, notes)
    return samples


def read_rgb(path: str | Path) -> np.ndarray:
    """The pixels alone, in sRGB: (H, W, 3) float32 in [0, 1], upright, without alpha. UserError as read_photo."""
    return to_float(read_samples(path))


def photo_layout(path: str | Path) -> tuple[int, int, int]:
    """Upright height, width and bits a sample, 8 or 16, by the header alone. UserError as read_photo, but for the pixels."""
    with _opened(path) as image:
        return *_upright(image), 16 if _is_deep(image) else 8


def read_exif(path: str | Path) -> Image.Exif:
    """A photo's EXIF tags, by the header alone. UserError as read_photo, but for the pixels."""
    with _opened(path) as image:
        exif = image.getexif()
        exif.get_ifd(ExifTags.IFD.Exif)  # while the file is open
        return exif


def check_photo(path: str | Path) -> tuple[int, int]:
    """Decodes all of a photo and returns its upright (height, width). UserError as read_photo."""
    notes: list[str] = []
    with _opened(path, notes) as image:
        size = _upright(image)
        if image.format in ("JPEG", "MPO", "RAW"):
            image.draft(image.mode, (1, 1))  # reads all, without transforming every coefficient or interpolating: twice as fast
        _decode(image, notes)
        _profile(image, notes)
    _warn(path, notes)
    return size


def write_photo(path: str | Path, photo: Photo, quality: int | None = None, subsampling: str = "") -> None:
    """Writes what encode_photo makes of a photo; the file appears whole or not at all. OSError if it can't be written."""
    encoded = encode_photo(photo, quality, subsampling)
    with replacing(path) as part:
        part.write_bytes(encoded)


def encode_photo(photo: Photo, quality: int | None = None, subsampling: str = "") -> bytes:
    """The bytes of a photo's file, in its own format and depth, with all that its file said.

    JPEG is written as the photo's file was, with quality 90 at least; WebP lossless where it was, TIFF with its compression.
    A photo that comes from no file of the format has quality 95 (AVIF 90; JPEG and AVIF without chroma subsampling), or no
    compression in a TIFF. quality: 1 to 100, for JPEG, AVIF and lossy WebP. subsampling: of JPEG and AVIF, 444, 422 or 420.
    UserError if a pixel is not finite or the format can't hold the photo.
    """
    if photo.format not in ENCODERS:
        raise UserError(f"{photo.format} is not written, only {', '.join(ENCODERS)}")
    samples, options = as_samples(photo), photo.options
    grey = photo.grey and photo.format != "WEBP" and bool((samples == samples[..., :1]).all())
    if has_grey_profile(photo) and not grey:
        raise UserError("expected grey pixels for a grey profile, got colours")
    if quality is not None:
        options = {key: value for key, value in options.items() if key != "qtables"} | {"quality": quality}
    if subsampling:
        options = options | {"subsampling": ":".join(subsampling)}
    if "float" in options:
        samples = samples.astype(np.dtype(str(options["float"])))
    if grey:
        samples = samples[..., :1]
    if photo.alpha is not None:
        samples = np.dstack([samples, photo.alpha])
    try:
        samples = np.ascontiguousarray(samples[..., 0] if samples.shape[2] == 1 else samples)
        samples = samples.reshape(-1).reshape(samples.shape)  # an axis of one element has any stride, which PNG's encoder minds
        return ENCODERS[photo.format](samples, photo.exif, photo.icc_profile, photo.extra, options)
    except (ValueError, TypeError, struct.error, OSError) as error:  # a size or metadata that the format does not hold
        raise UserError(f"cannot be written as {photo.format}: {error}") from error


def as_samples(photo: Photo) -> np.ndarray:
    """A photo's pixels as they are stored, (H, W, 3) uint8 or uint16 (depth 32: float32). UserError if one is not finite."""
    return photo.pixels if photo.pixels.dtype.kind == "u" else from_float(photo.pixels, photo.depth)


def has_grey_profile(photo: Photo) -> bool:
    """Whether a photo's profile can't hold colours."""
    return photo.icc_profile is not None and photo.icc_profile[ICC_SPACE] == b"GRAY"


def to_float(samples: np.ndarray) -> np.ndarray:
    """uint8, uint16 or floating point samples as contiguous float32 in [0, 1]."""
    if samples.dtype.kind == "f":
        return np.ascontiguousarray(samples.clip(0, 1), np.float32)
    return np.divide(samples, np.float32(np.iinfo(samples.dtype).max), dtype=np.float32, order="C")


def sample_dtype(depth: int) -> np.dtype:
    """Of so many bits, 8, 16 or 32: uint8, uint16 or float32."""
    return np.dtype({8: "u1", 16: "u2", 32: "f4"}[depth])


def from_float(pixels: np.ndarray, depth: int = 8) -> np.ndarray:
    """Float pixels clipped to [0, 1], as uint8 (depth 8) or uint16 (depth 16), rounded, or float32 (depth 32).

    UserError if one is not finite.
    """
    samples = np.empty(pixels.shape, sample_dtype(depth))
    for row in range(0, len(pixels), 64):  # in bands, so that a large photo needs no second copy in floating point
        band = pixels[row : row + 64]
        if not np.isfinite(band).all():
            raise UserError("expected finite pixels, got NaN or infinity")
        band = np.clip(band, 0, 1)
        samples[row : row + 64] = band if depth == 32 else np.rint(band * np.float32(np.iinfo(samples.dtype).max))
    return samples


def photos_in(folder: Path, but: Path) -> tuple[list[Path], list[tuple[Path, str]]]:
    """The files of SUFFIXES in a folder and all below it, sorted, and what may be a photo but is passed over, with the reason.

    Without hidden ones and those in `but`, the results' folder.
    """
    root, results = folder.resolve(), but.resolve()
    found: list[Path] = []
    skipped: list[tuple[Path, str]] = []

    def unreadable(error: OSError) -> None:
        skipped.append((Path(error.filename), f"the folder cannot be read: {error.strerror}"))

    for place, folders, files in os.walk(folder, onerror=unreadable):
        here = Path(place)
        inside = [here / name for name in sorted(folders) if not name.startswith(".")]
        inside = [path for path in inside if results == root or path.resolve() != results]
        skipped += [(path, "a link to a folder, which is not followed") for path in inside if path.is_symlink()]
        folders[:] = [path.name for path in inside if not path.is_symlink()]
        for path in (here / name for name in files if not name.startswith(".")):
            suffix = path.suffix.lower()
            if suffix in SUFFIXES and path.is_file():
                if lacking := _lacking(_kind(suffix)):
                    skipped.append((path, lacking))
                else:
                    found.append(path)
            elif suffix in SUFFIXES:
                skipped.append((path, "a link to nothing" if path.is_symlink() else "not a file"))
            elif suffix in _OTHER_PHOTOS:
                skipped.append((path, f"photos of the kind {suffix} are not read, only {KINDS}"))
            elif path.is_file() and _looks_like_a_photo(path):
                skipped.append((path, f"a photo whose name does not end as one of {KINDS} does"))
    return sorted(found), sorted(skipped)


def _kind(suffix: str) -> str:
    suffixes = {"RAW": raw.SUFFIXES, "HEIF": heif.SUFFIXES, "JXL": jxl.SUFFIXES, "AVIF": WRITTEN["AVIF"]}
    return next((kind for kind, own in suffixes.items() if suffix in own), "")


def _lacking(kind: str) -> str:
    """What to install for a kind of photo; empty where it can be read."""
    if kind == "RAW" and not importlib.util.find_spec("rawpy"):
        return 'camera raw needs rawpy: pip install "autohdr[raw]"'
    if kind == "HEIF" and not importlib.util.find_spec("pillow_heif"):
        return 'HEIC needs pillow-heif: pip install "autohdr[heif]"'
    if kind == "JXL" and not importlib.util.find_spec("pillow_jxl"):
        return 'JPEG XL needs pillow-jxl-plugin: pip install "autohdr[jxl]"'
    if kind == "AVIF" and not features.check("avif"):
        return "AVIF needs a Pillow that has it: pip install --force-reinstall pillow"
    return ""


def _looks_like_a_photo(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            start = file.read(_HEAD)
    except OSError:
        return False
    if heif.container(start) or jxl.is_jxl(start):
        return True
    return start[:4] == b"RIFF" and start[8:12] == b"WEBP" or start.startswith((b"\xff\xd8\xff", b"\x89PNG", b"II*\0", b"MM\0*"))


@contextlib.contextmanager
def _opened(path: str | Path, notes: list[str] | None = None) -> Iterator[ImageFile]:
    """A file as a Pillow image, not yet decoded. What goes wrong in the block becomes a UserError naming the file.

    notes: to which goes what libraries say.
    """
    try:
        if os.path.getsize(path) == 0:
            raise UserError("the file is empty")
        with heard([] if notes is None else notes), _image(path) as image:
            if image.width * image.height > _MEGAPIXELS * 1_000_000:
                raise UserError(f"{image.width * image.height} pixels are more than {_MEGAPIXELS} megapixels")
            yield image
    except MemoryError:
        raise
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{path}: not a {KINDS} photo, or its header is damaged") from error
    except Image.DecompressionBombError as error:
        size = str(error).partition("(")[2].partition(" ")[0]
        raise UserError(f"{path}: {size} pixels are more than {_MEGAPIXELS} megapixels") from error
    except Exception as error:  # decoders meet damaged files with anything from OSError to struct.error
        reason = getattr(error, "strerror", None)
        if not reason:
            reason = "it is truncated" if "truncated" in str(error).lower() else "its data are damaged"
        raise UserError(f"{path}: cannot be read: {reason}") from error


def _image(path: str | Path) -> ImageFile:
    """A file as an image, by what is in it, not by its name. UserError where a library is missing; whatever libraries raise."""
    with open(path, "rb") as file:
        head = file.read(_HEAD)
    kind = "RAW" if raw.is_raw(path, head) else "JXL" if jxl.is_jxl(head) else heif.container(head)
    if lacking := _lacking(kind):
        raise UserError(lacking)
    if kind == "RAW":
        return raw.RawFile(path)
    if kind == "HEIF":
        return heif.HeifFile(path)
    if kind == "JXL":
        image = jxl.JxlFile(path)
        if not (jpeg := image.jpeg()):
            return image
        image.close()
        return Image.open(io.BytesIO(jpeg), formats=("JPEG",))
    image = Image.open(path, formats=tuple(ENCODERS))
    if kind == "AVIF":
        image.info |= heif.avif_info(path) | {"gain_map": b"tmap" in heif.brands_of(head)}
    return image


def _warn(path: str | Path, notes: list[str]) -> None:
    for note in notes:
        warnings.warn(f"{path}: {note}", stacklevel=3)


def _decode(image: ImageFile, notes: list[str], keep_damaged: bool = False) -> tuple[np.ndarray, int]:
    """The samples, (H, W, 3) or with alpha (H, W, 4), uint8, uint16 or float, and the orientation still to be applied."""
    if not _is_single(image):
        raise UserError("expected a single photo, got several frames or pages")
    orientation = orientation_of(image)
    deep = _is_deep(image)
    if deep and isinstance(image, TiffImageFile):
        return _deep_tiff(os.fsdecode(image.filename), notes), orientation
    if isinstance(image, raw.RawFile | jxl.JxlFile):
        return _rgb(image.samples(notes)), orientation
    if isinstance(image, heif.HeifFile):
        return _rgb(image.samples()), orientation
    if deep and image.format == "AVIF":
        samples = imagecodecs.avif_decode(Path(os.fsdecode(image.filename)).read_bytes())
        return _rgb(heif.sixteen_bits(samples, image.info["bit_depth"])), orientation
    icc = image.info.get("icc_profile") or b""
    pixels: Image.Image = image
    if image.format in ("JPEG", "MPO"):
        samples, problems = decode_jpeg(image, keep_damaged)
        notes += problems
        if samples.shape[2] == 3:
            return samples, orientation
        pixels = Image.frombuffer("CMYK", image.size, samples, "raw", "CMYK", 0, 1)
    elif isinstance(image, TiffImageFile):
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)  # Pillow turns it itself
        image.load()
        orientation = 1 if turned else orientation
    else:
        if image.format == "PNG":
            check_sums(image)
        image.load()
    if deep:  # Pillow has read the PNG too, but as 8 bits
        return _rgb(imagecodecs.png_decode(Path(os.fsdecode(image.filename)).read_bytes())), orientation
    if image.mode not in _MODES:
        raise UserError(f"expected grey, palette, RGB or CMYK of 8 or 16 bits a channel, got Pillow mode {image.mode}")
    if image.mode == "CMYK" and icc[ICC_SPACE] == b"CMYK":
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
            rgb = ImageCms.profileToProfile(pixels, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (OSError, ImageCms.PyCMSError) as error:
            raise UserError("its CMYK profile is damaged") from error
    else:
        rgb = pixels.convert("RGBA" if image.has_transparency_data else "RGB")
    return np.asarray(rgb), orientation


def _profile(image: ImageFile, notes: list[str]) -> bytes | None:
    """A profile of RGB or of grey that fits the pixels; of CMYK they were converted already."""
    icc = image.info.get("icc_profile")
    if icc is None and "icc_profile" in image.info:
        notes.append("its colour profile is damaged and is not kept")
    if not icc or icc[ICC_SPACE] not in (b"RGB ", b"GRAY") or icc[ICC_SPACE] == b"GRAY" and not _is_grey(image):
        return None
    if is_damaged(icc):
        notes.append("its colour profile is damaged: the photo is taken as sRGB")
    return icc


def _coded_space(image: ImageFile) -> ColourSpace | None:
    """What numbers in a HEIC's, an AVIF's or a JPEG XL's header say of its colours, where no profile does; None for sRGB."""
    if "nclx" not in image.info or image.info.get("icc_profile"):
        return None
    return colour_space(None, {b"cICP": bytes([*(min(number, 255) for number in image.info["nclx"]), 0, 1])})


def _is_grey(image: ImageFile) -> bool:
    if isinstance(image, TiffImageFile):
        return image.tag_v2.get(ExifTags.Base.PhotometricInterpretation) in (0, 1)
    return image.mode in _GREY_MODES


def _options(image: Any, samples: np.ndarray, parts: Parts, notes: list[str]) -> dict[str, Any]:
    """How the file is compressed, as the encoder of its format takes it."""
    if isinstance(image, TiffImageFile):
        compression = image.tag_v2.get(ExifTags.Base.Compression, 1)
        if not compressible(compression):
            name = TiffImagePlugin.COMPRESSION_INFO.get(compression, compression)
            notes.append(f"its compression, {name}, is not written: deflate is in its place")
            compression = 8
        return {"compression": compression} | ({"float": samples.dtype.str[1:]} if samples.dtype.kind == "f" else {})
    if image.format in ("JPEG", "MPO"):
        return jpeg_options(image.quantization, image.layer, "progressive" in image.info) | parts.options
    return parts.options


def _is_deep(image: ImageFile) -> bool:
    """Whether a photo has more than 8 bits a channel."""
    if image.format == "PNG":
        with open(image.filename, "rb") as file:
            return file.read(_PNG_DEPTH + 1)[_PNG_DEPTH] == 16
    if image.info.get("bit_depth", 8) > 8:
        return True
    return isinstance(image, TiffImageFile) and max(image.tag_v2.get(ExifTags.Base.BitsPerSample, (1,))) > 8


def _upright(image: ImageFile) -> tuple[int, int]:
    """(height, width) once turned."""
    width, height = image.size
    if isinstance(image, TiffImageFile):  # Pillow has swapped those of some
        width, height = (image.tag_v2[tag] for tag in (ExifTags.Base.ImageWidth, ExifTags.Base.ImageLength))
    return (width, height) if orientation_of(image) in ACROSS else (height, width)


def _is_single(image: ImageFile) -> bool:
    """Whether a file holds one photo, not an animation or a stack.

    Small copies do not count: a TIFF may have them as pages, and an MPO (from a camera) is a JPEG with previews. Of a HEIC's
    pictures one is the first.
    """
    if not isinstance(image, TiffImageFile):
        return image.format in ("MPO", "HEIF") or getattr(image, "n_frames", 1) == 1
    reduced = []
    for page in range(image.n_frames):
        image.seek(page)
        reduced.append(bool(image.tag_v2.get(ExifTags.Base.NewSubfileType, 0) & 1))
    image.seek(0)
    return not reduced[0] and all(reduced[1:])


def _deep_tiff(path: str, notes: list[str]) -> np.ndarray:
    """A TIFF of more than 8 bits, which Pillow would cut down to 8."""
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        kind = tifffile.PHOTOMETRIC(page.photometric).name
        right = page.dtype in (np.uint16, np.float16, np.float32) and page.bitspersample == 8 * page.dtype.itemsize
        if not right or kind not in ("RGB", "MINISBLACK", "MINISWHITE"):
            got = f"{page.bitspersample} bits of {kind} ({page.dtype})"
            raise UserError(f"expected 8 or 16 bits, float16 or float32, of grey or RGB, got {got}")
        samples = page.asarray()
        if samples.dtype.kind == "f":
            if not np.isfinite(samples).all():
                raise UserError("expected finite pixels, got NaN or infinity")
            if samples.min() < 0 or samples.max() > 1:
                notes.append("what lies below 0 or above 1 is cut off")
            if ExifTags.Base.InterColorProfile not in page.tags:
                notes.append("no profile says whether its numbers are linear light: they are taken as sRGB's")
            samples = samples.clip(0, 1)
        if page.axes == "SYX":
            samples = np.moveaxis(samples, 0, 2)
        colours = 3 if kind == "RGB" else 1
        if colours == 1:
            samples = samples.reshape(page.imagelength, page.imagewidth, -1)
        if kind == "MINISWHITE":
            samples[..., 0] = (1 if samples.dtype.kind == "f" else 65535) - samples[..., 0]
        alpha = page.extrasamples[:1]
        if alpha == (tifffile.EXTRASAMPLE.ASSOCALPHA,):
            raise UserError("expected unassociated alpha, got a TIFF of more than 8 bits with premultiplied alpha")
        return _rgb(samples[..., : colours + (alpha == (tifffile.EXTRASAMPLE.UNASSALPHA,))])


def _rgb(samples: np.ndarray) -> np.ndarray:
    """(H, W), or (H, W, 1 to 4) in the order grey, grey + alpha, RGB, RGB + alpha, as (H, W, 3 or 4)."""
    if samples.ndim == 2:
        samples = samples[..., None]
    return samples if samples.shape[2] >= 3 else samples[..., [0, 0, 0, 1][: samples.shape[2] + 2]]


def _turned(samples: np.ndarray, orientation: int) -> np.ndarray:
    """A view of stored samples with EXIF orientation 1 to 8 applied."""
    if orientation in ACROSS:
        samples = samples.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        samples = samples[::-1]
    if orientation in (2, 3, 6, 7):
        samples = samples[:, ::-1]
    return samples
