"""What becomes of a photo of every format: the tables of docs/formats.md.

    python benchmarks/formats.py

Writes a file of each kind: on its side by its orientation, of colours that are not sRGB, with EXIF, a place, XMP, IPTC, a text
and a density, the metadata by ExifTool. Takes each through read_photo, converted and write_photo, into its own format and each
other. Reads the results by ImageMagick and ExifTool, both of which must be installed. What is neither there nor told ends it with
status 1. Takes two minutes.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import imagecodecs
import numpy as np
import pillow_heif
import tifffile
from PIL import Image, ImageCms
from run import put
from tables import table

from autohdr.data.conversion import FORMATS, converted, result_name
from autohdr.data.images import Photo, read_photo, write_photo

PAGE = Path(__file__).resolve().parent.parent / "docs" / "formats.md"
HEIGHT, WIDTH = 96, 64  # upright
D65 = [0.3127, 0.329, 1.0]
PRIMARIES = [0.64, 0.33, 1.0, 0.21, 0.71, 1.0, 0.15, 0.06, 1.0]  # Adobe RGB's
LINEAR = {"colorspace": "rgb", "outcolorspace": "rgb", "outdtype": np.float32, "intent": 1}
SRGB_TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
LOSSLESS = (".png", ".tif")
SAID = {"EXIF": "Maker", "place": "48", "XMP": "Kitchen", "IPTC": "room", "text": "a remark", "density": "300"}
METADATA = ["Make=Maker", "ExposureTime=0.004", "GPSLatitude=48.137", "GPSLatitudeRef=N", "XMP-dc:Title=Kitchen"]
DENSITY = ["XResolution=300", "YResolution=300", "ResolutionUnit=2"]
TOLD = {
    "depth": "bits a channel become",
    "alpha": "transparency",
    "colour": "converted to sRGB",
    "XMP": "XMP",
    "IPTC": "IPTC",
    "text": "texts",
}


@dataclass
class Kind:
    """A kind of file. make: writes it, given the upright picture in float; what it says and holds beside."""

    name: str
    suffix: str
    make: Callable[[Path], None]
    depth: int = 8
    alpha: bool = False
    says: tuple[str, ...] = ("EXIF", "place", "XMP", "IPTC", "text", "density")
    tags: tuple[str, ...] = ()
    srgb: bool = False  # nothing says what the colours are
    developed: bool = False  # the pixels are not the picture's numbers


def picture() -> np.ndarray:
    """(H, W, 3) float: ramps, and a corner that tells how it is turned."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    ramps = np.stack([x / WIDTH, y / HEIGHT, (x * HEIGHT + y) / (WIDTH * HEIGHT)], 2)
    ramps[:24, :16] = (0.9, 0.2, 0.1)
    return ramps


def stored(depth: int, turned: bool = True, alpha: bool = False) -> np.ndarray:
    pixels = np.rot90(picture(), 1) if turned else picture()  # EXIF's orientation 6 turns it back
    samples = np.rint(pixels * (2**depth - 1)).astype(np.uint8 if depth == 8 else np.uint16)
    samples = np.dstack([samples, np.full_like(samples[..., :1], 200 << (depth - 8))]) if alpha else samples
    return np.ascontiguousarray(samples)


PROFILE = imagecodecs.cms_profile("rgb", whitepoint=D65, primaries=PRIMARIES, gamma=563 / 256)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def by_pillow(depth: int = 8, alpha: bool = False, **options) -> Callable[[Path], None]:
    return lambda path: Image.fromarray(stored(depth, alpha=alpha)).save(path, icc_profile=PROFILE, **options)


def upright_box(path: Path) -> None:
    """A HEIC or an AVIF, whose orientation is a box of its own."""
    exif = Image.Exif()
    exif[274] = 6
    image = Image.fromarray(stored(8))
    if path.suffix == ".avif":
        image.save(path, quality=95, subsampling="4:4:4", icc_profile=PROFILE, exif=exif)
    else:
        file = pillow_heif.from_pillow(image)
        file.info["icc_profile"] = PROFILE
        file.save(path, quality=95, chroma=444, exif=exif.tobytes())


def deep_png(path: Path) -> None:
    path.write_bytes(imagecodecs.png_encode(stored(16, alpha=True)))
    exiftool(f"-icc_profile<={profile_beside(path)}", str(path))


def linear_png(path: Path) -> None:
    """Its colours are told by gAMA and cHRM alone."""
    Image.fromarray(stored(8)).save(path)
    exiftool("-PNG:Gamma=1", str(path))


def tiff(depth: int, **options) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        samples = np.rot90(picture(), 1).astype(np.float32) if depth == 32 else stored(depth, alpha="extrasamples" in options)
        tifffile.imwrite(path, samples, photometric="rgb", iccprofile=PROFILE, metadata=None, **options)

    return make


def coded_heic(path: Path) -> None:
    """10 bits, whose colours are named by numbers alone: Display P3."""
    deep = stored(16, turned=False)
    file = pillow_heif.from_bytes("RGB;16", deep.shape[1::-1], deep.astype("<u2").tobytes())
    file.save(path, quality=-1, chroma=444, color_primaries=12, transfer_characteristics=13, matrix_coefficients=0)


def deep_avif(path: Path) -> None:
    path.write_bytes(imagecodecs.avif_encode(stored(10, turned=False), level=100, bitspersample=10, pixelformat="444"))


def jxl(path: Path) -> None:
    """Upright already: what EXIF says of that is a remark alone."""
    path.write_bytes(imagecodecs.jpegxl_encode(stored(8, turned=False), lossless=True, usecontainer=True))


def jxl_of_jpeg(path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    by_pillow(quality=92, exif=exif)(path.with_suffix(".jpg"))
    path.write_bytes(imagecodecs.jpegxl_encode_jpeg(path.with_suffix(".jpg").read_bytes()))


def write_dng(file, mosaic: np.ndarray, white: Sequence[int], more: Sequence[tuple] = (), **options) -> None:
    """A raw file of a sensor with sRGB's primaries. mosaic: uint16, from 512 for black to 16512. white: of the light, as three
    fractions of whole numbers. more: tags, as tifffile takes them."""
    matrix = [part for value in np.linalg.inv(SRGB_TO_XYZ).ravel() for part in (round(10_000 * value), 10_000)]
    tags = [
        (50706, "B", 4, (1, 4, 0, 0)),  # DNGVersion
        (50708, "s", 0, "Camera"),
        (33421, "H", 2, (2, 2)),  # CFARepeatPatternDim
        (33422, "B", 4, (0, 1, 1, 2)),  # CFAPattern
        (50714, "H", 1, 512),  # BlackLevel
        (50717, "H", 1, 16512),  # WhiteLevel
        (50721, "2i", 9, matrix),  # ColorMatrix1
        (50778, "H", 1, 21),  # CalibrationIlluminant1: D65
        (50728, "2I", 3, white),  # AsShotNeutral
        *more,
    ]
    tifffile.imwrite(file, mosaic, photometric="cfa", extratags=tags, metadata=None, **options)


def dng(path: Path) -> None:
    """A sensor's mosaic of the picture's light."""
    light = np.rot90(picture(), 1) ** 2.2
    mosaic = np.empty(light.shape[:2], np.uint16)
    for row, column, channel in ((0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 2)):
        mosaic[row::2, column::2] = 512 + 16000 * light[row::2, column::2, channel]
    white = [part for value in np.linalg.inv(SRGB_TO_XYZ) @ [0.9505, 1, 1.089] for part in (round(10_000 * value), 10_000)]
    write_dng(path, mosaic, white)


COMMENT, DESCRIPTION, TURNED, IPTC = "Comment=a remark", "ImageDescription=a remark", "Orientation=6", "IPTC:Keywords=room"
KINDS = (
    Kind("JPEG", ".jpg", by_pillow(quality=92, dpi=(300, 300)), tags=(COMMENT, TURNED, IPTC)),
    Kind("PNG", ".png", by_pillow(dpi=(300, 300)), tags=(COMMENT, TURNED, IPTC)),
    Kind("PNG, 16 bits, alpha", ".png", deep_png, 16, True, tags=(COMMENT, TURNED, IPTC, *DENSITY)),
    Kind("PNG, gAMA", ".png", linear_png, tags=(COMMENT, TURNED, IPTC, *DENSITY)),
    Kind("TIFF", ".tif", tiff(8, compression="lzw", predictor=True), tags=(DESCRIPTION, TURNED, IPTC, *DENSITY)),
    Kind(
        "TIFF, 16 bits, alpha",
        ".tif",
        tiff(16, extrasamples=["unassalpha"]),
        16,
        True,
        tags=(DESCRIPTION, TURNED, IPTC, *DENSITY),
    ),
    Kind("TIFF, float32", ".tif", tiff(32), 32, tags=(DESCRIPTION, TURNED, IPTC, *DENSITY)),
    Kind("WebP", ".webp", by_pillow(quality=95), says=("EXIF", "place", "XMP", "density"), tags=(TURNED, *DENSITY)),
    Kind("WebP, lossless", ".webp", by_pillow(lossless=True), says=("EXIF", "place", "XMP", "density"), tags=(TURNED, *DENSITY)),
    Kind("AVIF", ".avif", upright_box, says=("EXIF", "place", "XMP", "density"), tags=tuple(DENSITY)),
    Kind("AVIF, 10 bits", ".avif", deep_avif, 16, says=(), srgb=True),
    Kind("HEIC", ".heic", upright_box, says=("EXIF", "place", "XMP", "density"), tags=tuple(DENSITY)),
    Kind("HEIC, 10 bits, nclx P3", ".heic", coded_heic, 16, says=()),
    Kind("JPEG XL", ".jxl", jxl, says=("EXIF", "place", "XMP", "density"), tags=(TURNED, *DENSITY), srgb=True),
    Kind("JPEG XL of a JPEG", ".jxl", jxl_of_jpeg, says=()),
    Kind("DNG", ".dng", dng, 16, tags=(DESCRIPTION, TURNED, IPTC, *DENSITY), srgb=True, developed=True),
)


def tool(*names: str) -> str:
    for name in names:
        found = shutil.which(name)
        if found and "ImageMagick" in subprocess.run([found, "-version"], capture_output=True, text=True).stdout[:40]:
            return found
    sys.exit("ImageMagick is needed: apt-get install imagemagick")


def exiftool(*arguments: str) -> str:
    return subprocess.run(
        ["exiftool", "-q", "-m", "-overwrite_original", "-n", *arguments], capture_output=True, text=True
    ).stdout


def profile_beside(path: Path) -> Path:
    beside = path.with_suffix(".icc")
    beside.write_bytes(PROFILE)
    return beside


def decoded(path: Path, convert: str) -> np.ndarray:
    """(H, W, 3) float, as ImageMagick has the pixels, not turned."""
    size = subprocess.run([convert, str(path), "-format", "%w %h", "info:"], capture_output=True, text=True, check=True).stdout
    width, height = map(int, size.split())
    raw = subprocess.run([convert, str(path), "-alpha", "off", "-depth", "16", "rgb:-"], capture_output=True, check=True).stdout
    return np.frombuffer(raw, "<u2").reshape(height, width, 3) / 65535


def facts(path: Path) -> dict[str, str]:
    """What ExifTool finds, by group and name."""
    (found,) = json.loads(exiftool("-j", "-G", "-a", str(path)))
    return {key: str(value) for key, value in found.items()}


def says(found: dict[str, str], what: str) -> bool:
    groups = {"EXIF": ("EXIF:Make",), "place": ("EXIF:GPSLatitude",), "XMP": ("XMP:Title",), "IPTC": ("IPTC:Keywords",)}
    groups |= {"text": ("File:Comment", "PNG:Comment", "EXIF:ImageDescription", "EXIF:UserComment")}
    groups |= {"density": ("JFIF:XResolution", "EXIF:XResolution", "PNG:PixelsPerUnitX")}
    values = [found[name] for name in groups[what] if name in found]
    values = [str(round(float(value) * 0.0254)) if what == "density" and float(value) > 10_000 else value for value in values]
    return any(value.startswith(SAID[what]) for value in values) and (what != "EXIF" or found.get("EXIF:ExposureTime") == "0.004")


def in_srgb(pixels: np.ndarray, kind: Kind) -> np.ndarray:
    """The picture as it looks, by lcms, or by what its kind says in numbers."""
    if kind.name == "PNG, gAMA":
        light = pixels
    elif "P3" in kind.name:
        light = linear(pixels) @ np.array([[1.2249, -0.2247, 0], [-0.0420, 1.0419, 0], [-0.0197, -0.0786, 1.0979]]).T
    elif kind.name == "DNG":
        light = pixels**2.2
    elif kind.srgb:
        return pixels
    else:
        return imagecodecs.cms_transform(pixels.astype(np.float32), PROFILE, SRGB, **LINEAR).clip(0, 1)
    light = light.clip(0, 1)
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def linear(pixels: np.ndarray) -> np.ndarray:
    return np.where(pixels <= 0.04045, pixels / 12.92, ((pixels + 0.055) / 1.055) ** 2.4)


def aspects(kind: Kind, result: Path, photo: Photo, convert: str) -> dict[str, bool | None]:
    """What of a file is in its result: True, False, or None where the file has none."""
    found = facts(result)
    pixels = decoded(result, convert)
    profile = subprocess.run(["exiftool", "-b", "-icc_profile", str(result)], capture_output=True).stdout
    told = any(TOLD["colour"] in note for note in photo.notes)
    gamma = kind.name == "PNG, gAMA"  # ImageMagick obeys it
    looks = in_srgb(picture(), kind) if told or gamma or kind.developed else picture()
    error = np.abs(pixels - looks) if pixels.shape == looks.shape else np.ones(1)
    exact = kind.suffix in LOSSLESS and result.suffix in LOSSLESS and not told and not gamma
    limit = 1.01 / (65535 if photo.depth >= 16 and kind.depth >= 16 else 255)
    right = error.max() < limit if exact else error.mean() < (0.012 if kind.developed else 0.008)
    levels = result.suffix != ".avif" and len(np.unique(np.rint(pixels * 65535))) > 400
    depth = {8: True, 16: levels, 32: levels and "32" in found.get("EXIF:BitsPerSample", "")}[kind.depth]
    alpha = str(found.get("PNG:ColorType", "")) == "6" or "EXIF:ExtraSamples" in found
    same = "PNG:Gamma" in found if gamma else profile == PROFILE
    if kind.srgb:
        same = bool(right) and not profile
    turned = found.get("EXIF:Orientation", "1") == "1" and found.get("QuickTime:Rotation", "0") == "0"
    kept: dict[str, bool | None] = {
        "pixels": bool(right),
        "depth": depth,
        "alpha": alpha or _has_alpha(result) if kind.alpha else None,
        "orientation": turned and pixels.shape[:2] == (HEIGHT, WIDTH),
        "colour": same,
    }
    for what in SAID:
        kept[what] = says(found, what) if what in kind.says else None
    return kept


def _has_alpha(path: Path) -> bool:
    with Image.open(path) as image:
        return image.mode == "RGBA"


def cell(kept: bool | None, told: bool) -> str:
    return "–" if kept is None else "yes" if kept else "told" if told else "LOST"


def main() -> int:
    convert = tool("magick", "convert", "convert-im6", "convert-im6.q16")
    if not shutil.which("exiftool"):
        sys.exit("ExifTool is needed: apt-get install libimage-exiftool-perl")
    own: list[list[str]] = []
    others: list[list[str]] = []
    lost: list[str] = []
    names: list[str] = []
    with TemporaryDirectory() as place:
        for number, kind in enumerate(KINDS):
            folder = Path(place, str(number))
            folder.mkdir()
            source = folder / f"a{kind.suffix}"
            kind.make(source)
            if kind.says:
                exiftool(*(f"-{tag}" for tag in (*METADATA, *kind.tags)), str(source))
                if missing := [what for what in kind.says if not says(facts(source), what)]:
                    sys.exit(f"{kind.name}: ExifTool has not written {', '.join(missing)}")
            row = [kind.name]
            for format in ("same", *FORMATS[:-1]):
                photo = converted(read_photo(source), format)
                result = folder / format / result_name(Path(source.name), format)
                result.parent.mkdir()
                write_photo(result, photo)
                kept = aspects(kind, result, photo, convert)
                cells = {
                    name: cell(value, any(TOLD.get(name, "?") in note for note in photo.notes)) for name, value in kept.items()
                }
                lost += [f"{kind.name} as {result.suffix}: {name}" for name, value in cells.items() if value == "LOST"]
                if format == "same":
                    names = list(cells)
                    own.append([kind.name, *cells.values()])
                    continue
                row.append(", ".join(f"{name} {value}" for name, value in cells.items() if value in ("told", "LOST")) or "–")
            others.append(row)
    version = subprocess.run([convert, "-version"], capture_output=True, text=True).stdout.split()[2]
    text = "\n\n".join(
        [
            table(["", *names], own),
            "In another, all but:",
            table(["", *(format.upper() for format in FORMATS[:-1])], others),
            f"Read by ImageMagick {version} and ExifTool {exiftool('-ver').strip()}.",
        ]
    )
    print(text)
    put(text, PAGE, "formats")
    for fault in lost:
        print(f"lost and not told: {fault}", file=sys.stderr)
    return int(bool(lost))


if __name__ == "__main__":
    sys.exit(main())
