"""AVIF, HEIC and camera raw through real files, and what is said where a library for them is missing."""

import importlib.util
import io
import struct
import sys
from pathlib import Path

import imagecodecs
import numpy as np
import pillow_heif
import pytest
import tifffile
from PIL import ExifTags, Image

from autohdr.data import images
from autohdr.data.conversion import converted
from autohdr.data.images import check_photo, photo_layout, photos_in, read_photo, read_rgb, read_samples, to_float, write_photo
from autohdr.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from formats import write_dng  # noqa: E402

HEIGHT, WIDTH = 64, 96
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def smooth(white=255, dtype=np.uint8):
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    return np.stack([white * x // WIDTH, white * y // HEIGHT, 0 * x + white // 3], 2).astype(dtype)


def exif_block():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Make] = "Maker"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ExposureTime] = 0.004
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] = "N"
    return exif.tobytes()


def coded(primaries, transfer, samples):
    """A HEIC whose colours are named by numbers alone, of 8 or 10 bits."""
    mode, dtype = ("RGB", "u1") if samples.dtype == np.uint8 else ("RGB;16", "<u2")
    file = pillow_heif.from_bytes(mode, samples.shape[1::-1], samples.astype(dtype).tobytes())
    buffer = io.BytesIO()
    file.save(buffer, quality=-1, chroma=444, color_primaries=primaries, transfer_characteristics=transfer, matrix_coefficients=0)
    return buffer.getvalue()


def dng(orientation=1, **options):
    """A raw file: a sensor's mosaic of light and what is needed to develop it, in the least colours."""
    light = np.array([0.5, 0.25, 0.125])
    mosaic = np.empty((HEIGHT, WIDTH), np.uint16)
    for row, column, channel in ((0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 2)):
        mosaic[row::2, column::2] = 512 + 16000 * light[channel] / (2, 1, 2)[channel]  # half as sensitive to red and blue
    mosaic[: HEIGHT // 2] = 512 + (mosaic[: HEIGHT // 2] - 512) // 4
    tags = (274, "H", 1, orientation), (271, "s", 0, "Maker"), (700, "B", len(XMP), XMP)
    buffer = io.BytesIO()
    write_dng(buffer, mosaic, (1, 2, 1, 1, 1, 2), tags, **options)
    return buffer.getvalue()


def profile():
    primaries = [0.64, 0.33, 1.0, 0.21, 0.71, 1.0, 0.15, 0.06, 1.0]
    return imagecodecs.cms_profile("rgb", whitepoint=[0.3127, 0.329, 1.0], primaries=primaries, gamma=2.2)


@pytest.mark.parametrize("suffix", [".avif", ".heic"])
def test_a_turned_photo_comes_upright_with_what_it_says(tmp_path, suffix):
    path, image = tmp_path / f"a{suffix}", Image.fromarray(smooth())
    options = {"quality": 95, "exif": exif_block(), "xmp": XMP}
    if suffix == ".avif":
        image.save(path, subsampling="4:4:4", **options)
    else:
        pillow_heif.from_pillow(image).save(path, chroma=444, **options)
    photo = read_photo(path, as_stored=True)
    assert (photo.format, photo.depth, photo.notes) == ({".avif": "AVIF", ".heic": "HEIF"}[suffix], 8, [])
    assert photo_layout(path) == (WIDTH, HEIGHT, 8) and check_photo(path) == photo.pixels.shape[:2] == (WIDTH, HEIGHT)
    upright = np.asarray(image.transpose(Image.Transpose.ROTATE_270)).astype(int)
    assert np.abs(photo.pixels - upright).mean() < 2
    np.testing.assert_array_equal(read_samples(path), photo.pixels)
    exif = Image.Exif()
    exif.load(photo.exif)
    assert exif[ExifTags.Base.Orientation] == 1 and exif[ExifTags.Base.Make] == "Maker"
    assert exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] == "N"
    assert photo.extra == (("xmp", XMP.replace(b"6", b"1")),)


def test_an_avif_is_written_as_one_with_what_it_says(tmp_path):
    icc = profile()
    Image.fromarray(smooth()).save(tmp_path / "a.avif", exif=exif_block(), xmp=XMP, icc_profile=icc)
    photo = read_photo(tmp_path / "a.avif")
    write_photo(tmp_path / "b.avif", photo)
    with Image.open(tmp_path / "b.avif") as image:
        assert image.format == "AVIF" and image.size == (HEIGHT, WIDTH) and image.info["icc_profile"] == icc
        assert image.getexif()[ExifTags.Base.Make] == "Maker" and image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        assert b'Orientation="1"' in image.info["xmp"]
    assert np.abs(read_photo(tmp_path / "b.avif").pixels - photo.pixels).mean() < 2 / 255


def test_more_than_8_bits_stay(tmp_path):
    samples = smooth(1023, np.uint16)
    samples[0, 0] = 1023
    (tmp_path / "a.avif").write_bytes(imagecodecs.avif_encode(samples, level=100, bitspersample=10, pixelformat="444"))
    (tmp_path / "a.heic").write_bytes(coded(1, 13, (samples << 6) | (samples >> 4)))
    for name in ("a.avif", "a.heic"):
        photo = read_photo(tmp_path / name, as_stored=True)
        assert photo.depth == photo_layout(tmp_path / name)[2] == 16
        assert photo.pixels[0, 0].tolist() == [65535] * 3  # white is white
        assert np.abs(photo.pixels - samples * (65535 / 1023)).max() < 66  # one of 1023 by the matrix of its YCbCr


@pytest.mark.parametrize("kind", ["P3", "PQ"])
def test_colours_that_numbers_alone_name_become_srgb_with_a_note(tmp_path, kind):
    """Display P3's (0.9, 0.5, 0.5) is sRGB's (0.966, 0.473, 0.483); 203 cd/m², 58 % of PQ, is white."""
    stored, expected, numbers, bits = {
        "P3": ((0.9, 0.5, 0.5), (0.966, 0.473, 0.483), (12, 13), 8),
        "PQ": ((0.5807,) * 3, (1, 1, 1), (9, 16), 16),
    }[kind]
    white = 255 if bits == 8 else 65535
    samples = np.broadcast_to(np.rint(np.array(stored) * white), (HEIGHT, WIDTH, 3)).astype(f"u{bits // 8}")
    (tmp_path / "a.heic").write_bytes(coded(*numbers, samples))
    photo = read_photo(tmp_path / "a.heic")
    assert len(photo.notes) == 1 and "are converted to sRGB" in photo.notes[0] and kind in photo.notes[0]
    np.testing.assert_allclose(photo.pixels[8, 8], expected, atol=0.012)
    np.testing.assert_array_equal(read_rgb(tmp_path / "a.heic"), photo.pixels)
    assert photo.colour_space() is None


def test_an_avifs_numbers_are_those_of_the_picture_shown(tmp_path):
    Image.new("RGB", (WIDTH, HEIGHT), (230, 128, 128)).save(tmp_path / "a.avif", quality=100, subsampling="4:4:4")
    data = (tmp_path / "a.avif").read_bytes()
    assert read_photo(tmp_path / "a.avif").notes == []
    at = data.index(b"colrnclx") + 8
    (tmp_path / "a.avif").write_bytes(data[:at] + struct.pack(">H", 12) + data[at + 2 :])
    photo = read_photo(tmp_path / "a.avif")
    assert photo.notes == ["its colours, Display P3 with sRGB's curve, are converted to sRGB, and cut off beyond it"]
    np.testing.assert_allclose(photo.pixels[8, 8], (0.966, 0.473, 0.483), atol=0.012)


def test_a_profile_goes_before_the_numbers(tmp_path):
    icc = profile()
    file = pillow_heif.from_pillow(Image.fromarray(smooth()))
    file.info["icc_profile"] = icc
    file.save(tmp_path / "a.heic", color_primaries=12)
    photo = read_photo(tmp_path / "a.heic")
    assert photo.icc_profile == icc and photo.notes == []


def test_of_several_pictures_in_a_heic_the_first_is_read(tmp_path):
    file = pillow_heif.from_pillow(Image.fromarray(smooth()))
    file.add_from_pillow(Image.new("RGB", (32, 32)))
    file.save(tmp_path / "a.heic")
    photo = read_photo(tmp_path / "a.heic")
    assert photo.pixels.shape == (HEIGHT, WIDTH, 3) and photo.notes == ["of its 2 pictures the first is in the result"]


@pytest.mark.parametrize("name", ["a.dng", "a.tif", "photo.jpg"])
def test_a_raw_photo_is_developed_upright_without_a_look(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(dng(6))
    photo = read_photo(path, as_stored=True)
    assert (photo.format, photo.depth, photo.pixels.dtype, photo.notes) == ("RAW", 16, np.uint16, [])
    assert photo_layout(path) == (WIDTH, HEIGHT, 16) and check_photo(path) == photo.pixels.shape[:2] == (WIDTH, HEIGHT)
    light = np.array([[0.5, 0.25, 0.125], [0.125, 0.0625, 0.03125]])
    expected = 1.055 * light ** (1 / 2.4) - 0.055  # light as it was, in sRGB; the upper half of the sensor is on the right
    np.testing.assert_allclose(to_float(photo.pixels)[WIDTH // 2, [4, -4]], expected, atol=0.01)
    assert read_samples(path, 16).shape == (WIDTH // 2, HEIGHT // 2, 3)
    exif = Image.Exif()
    exif.load(photo.exif)
    assert dict(exif) == {ExifTags.Base.Make: "Maker"} | {tag: exif[tag] for tag in (282, 283, 296, 305) if tag in exif}
    assert photo.extra == ((700, XMP.replace(b"6", b"1")),)
    with pytest.raises(UserError, match="RAW is not written, only JPEG"):
        write_photo(tmp_path / "b.jpg", photo)


def test_a_raw_photo_of_a_monochrome_sensor_is_grey(tmp_path):
    mosaic = np.full((HEIGHT, WIDTH), 512 + 8000, np.uint16)
    mosaic[:, : WIDTH // 2] = 512 + 2000
    tags = [(50706, "B", 4, (1, 4, 0, 0)), (50708, "s", 0, "Camera"), (50714, "H", 1, 512), (50717, "H", 1, 16512)]
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, mosaic, photometric="minisblack", extratags=tags, metadata=None)
    entry = struct.pack("<HHIH", 262, 3, 1, 1)
    (tmp_path / "a.dng").write_bytes(buffer.getvalue().replace(entry, entry[:-2] + struct.pack("<H", 34892)))  # linear raw
    photo = read_photo(tmp_path / "a.dng")
    assert (photo.format, photo.depth, photo.grey, photo.pixels.shape) == ("RAW", 16, True, (HEIGHT, WIDTH, 3))
    expected = 1.055 * np.array([[0.125] * 3, [0.5] * 3]) ** (1 / 2.4) - 0.055
    np.testing.assert_allclose(photo.pixels[8, [4, -4]], expected, atol=0.01)
    assert check_photo(tmp_path / "a.dng") == (HEIGHT, WIDTH)
    write_photo(tmp_path / "b.jpg", converted(photo))
    with Image.open(tmp_path / "b.jpg") as image:
        assert image.mode == "L"


def test_damaged_ones_are_refused(tmp_path):
    Image.fromarray(smooth()).save(tmp_path / "a.avif")
    pillow_heif.from_pillow(Image.fromarray(smooth())).save(tmp_path / "a.heic")
    (tmp_path / "a.dng").write_bytes(dng())
    for suffix in (".avif", ".heic", ".dng"):
        whole = (tmp_path / f"a{suffix}").read_bytes()
        for tenths in range(1, 10):
            path = tmp_path / f"cut at {tenths}{suffix}"
            path.write_bytes(whole[: len(whole) * tenths // 10])
            for read in (read_photo, check_photo):
                with pytest.raises(UserError, match=path.name):
                    read(path)
    (tmp_path / "b.dng").write_bytes(b"II*\0 is no camera's")
    with pytest.raises(UserError, match="b.dng: its kind of camera raw is not known"):
        read_photo(tmp_path / "b.dng")


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    Image.fromarray(smooth()).save(tmp_path / "a.avif")
    pillow_heif.from_pillow(Image.fromarray(smooth())).save(tmp_path / "b.heic")
    (tmp_path / "c.dng").write_bytes(dng())
    (tmp_path / "d.jxl").write_bytes(imagecodecs.jpegxl_encode(smooth()))
    names = ["a.avif", "b.heic", "c.dng", "d.jxl"]
    assert [path.name for path in photos_in(tmp_path, tmp_path / "out")[0]] == names
    for module in ("pillow_heif", "rawpy", "pillow_jxl"):
        monkeypatch.setitem(sys.modules, module, None)
        assert importlib.util.find_spec(module) is None
    monkeypatch.setattr(images.features, "check", lambda feature: False)
    found, skipped = photos_in(tmp_path, tmp_path / "out")
    assert found == [] and [path.name for path, _ in skipped] == names
    commands = ["--force-reinstall pillow", '"autohdr[heif]"', '"autohdr[raw]"', '"autohdr[jxl]"']
    for (path, reason), command in zip(skipped, commands, strict=True):
        assert reason.endswith(f"pip install {command}")
        with pytest.raises(UserError) as caught:
            read_photo(path)
        assert str(caught.value) == f"{path}: {reason}"
