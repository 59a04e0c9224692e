"""Photos of one format as those of another, through real files: pixels, colour, what is said, and what is taken out."""

import functools
import io
import struct
from dataclasses import replace
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from autohdr.data.conversion import converted, dithered, result_name, stripped
from autohdr.data.images import Photo, as_samples, read_photo, read_rgb, to_float, write_photo
from autohdr.data.metadata import with_entries
from autohdr.errors import UserError

SUFFIX = {"jpeg": ".jpg", "png": ".png", "tiff": ".tif", "webp": ".webp", "avif": ".avif"}
PICTURE = Image.fromarray(np.add.outer(np.arange(32) * 3, np.arange(48) * 3)[..., None].repeat(3, 2).astype(np.uint8))
IPTC = b"8BIM\x04\x04\0\0\0\0\0\x05words\0"
XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description'
    b' xmlns:exif="http://ns.adobe.com/exif/1.0/" exif:GPSLatitude="48,8N" exif:ExposureTime="1/250" drone:GpsLongitude="11">'
    b"<exif:GPSAltitude>519/1</exif:GPSAltitude><exif:GPSTimeStamp/><dc:title>Kitchen</dc:title></rdf:Description></rdf:RDF>"
    b"</x:xmpmeta>"
)
NOTE = bytes(range(200))


@functools.cache  # it names the second that it was made in
def profile(kind="rgb", gamma=1.8):
    primaries = {"primaries": [0.64, 0.33, 1.0, 0.21, 0.71, 1.0, 0.15, 0.06, 1.0]} if kind == "rgb" else {}
    return imagecodecs.cms_profile(kind, whitepoint=[0.3127, 0.329, 1.0], gamma=gamma, **primaries)


def exif_block(tags=()):
    exif = Image.Exif()
    exif.update(tags)
    exif[ExifTags.Base.Make] = "Maker"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.MakerNote] = NOTE
    gps = exif.get_ifd(ExifTags.IFD.GPSInfo)
    gps[ExifTags.GPS.GPSLatitudeRef], gps[ExifTags.GPS.GPSLatitude] = "N", (48.0, 8.0, 25.75)
    return exif.tobytes()


def source(folder, format):
    """A file that says all that its format can: EXIF with a place, XMP, IPTC, a profile, a density, a text."""
    path = folder / f"in{SUFFIX[format]}"
    options = {"exif": exif_block(), "icc_profile": profile()}
    if format == "png":
        info = PngInfo()
        info.add_itxt("XML:com.adobe.xmp", XMP.decode())
        info.add_text("Comment", "a remark")
        PICTURE.save(path, pnginfo=info, dpi=(300, 300), **options)
    elif format == "tiff":
        tags = {34377: IPTC, 700: XMP, 270: "a remark", 282: 300.0, 283: 300.0, 296: 2}
        PICTURE.save(path, **options | {"exif": exif_block(tags)})
    else:
        PICTURE.save(path, xmp=XMP, quality=95, **options | ({"dpi": (300, 300)} if format == "jpeg" else {}))
    if format == "jpeg":
        data = path.read_bytes()
        parts = ((0xED, b"Photoshop 3.0\0" + IPTC), (0xFE, b"a remark"))
        segments = b"".join(struct.pack(">BBH", 255, kind, len(part) + 2) + part for kind, part in parts)
        path.write_bytes(data[:20] + segments + data[20:])  # behind JFIF
    return path


def written(path, photo, format):
    """A photo converted and written, and what was told."""
    photo = converted(photo, format)
    out = path.with_name(f"out{SUFFIX[format]}")
    write_photo(out, photo)
    return out, photo.notes


@pytest.mark.parametrize("target", SUFFIX)
@pytest.mark.parametrize("origin", SUFFIX)
def test_what_a_file_says_is_in_the_other_or_told(tmp_path, origin, target):
    path = source(tmp_path, origin)
    out, notes = written(path, read_photo(path), target)
    with Image.open(out) as image, Image.open(path) as before:
        assert image.format == target.upper() and image.size == before.size and image.info["icc_profile"] == profile()
        exif = image.getexif()
        assert exif[ExifTags.Base.Make] == "Maker"
        assert exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] == (48.0, 8.0, 25.75)
        assert exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.MakerNote] == NOTE
        if origin in ("jpeg", "png", "tiff"):
            assert round(float(image.info["dpi"][0] if "dpi" in image.info else exif[ExifTags.Base.XResolution])) == 300
    assert np.abs(read_rgb(out) - read_rgb(path)).mean() < 1.5 / 255
    data = out.read_bytes()
    assert XMP in data
    if origin in ("jpeg", "png", "tiff"):
        assert b"a remark" in data
    if origin in ("jpeg", "tiff"):
        held = (IPTC.hex().encode() if target == "png" else IPTC) in data
        assert held != (target in ("webp", "avif"))
        told = [f"its IPTC is not kept: {'an' if target == 'avif' else 'a'} {target.upper()} holds none"]
        assert notes == ([] if held else told)
    else:
        assert notes == []


@pytest.mark.parametrize("target", ["jpeg", "png", "tiff"])
def test_iptc_comes_back_from_every_format_that_holds_it(tmp_path, target):
    path = source(tmp_path, "jpeg")
    out, _ = written(path, read_photo(path), target)
    again, _ = written(path, read_photo(out), "jpeg")
    assert b"Photoshop 3.0\0" + IPTC in again.read_bytes()


def test_the_iptc_tag_of_a_tiff_becomes_a_resource_and_back(tmp_path):
    PICTURE.save(tmp_path / "a.tif", tiffinfo={33723: b"words"})
    photo = converted(read_photo(tmp_path / "a.tif"), "jpeg")
    assert photo.extra == ((0xED, b"Photoshop 3.0\0" + IPTC),)
    assert dict(converted(photo, "tiff").extra) == {33723: b"words", 34377: IPTC}


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", [1, 4, 7])
def test_iptc_of_any_type_is_kept(tmp_path, kind, order):
    """Many write it as whole numbers of 32 bits."""
    words = b"\x1c\x02\x19\0\x07kitchen"
    data = np.frombuffer(words, order + "u4") if kind == 4 else words
    tags = [(33723, {1: "B", 4: "I", 7: 7}[kind], len(data), data if kind == 4 else words, True)]
    tifffile.imwrite(tmp_path / "a.tif", np.asarray(PICTURE), photometric="rgb", byteorder=order, extratags=tags)
    photo = read_photo(tmp_path / "a.tif")
    assert photo.extra == ((33723, words),) and photo.notes == []
    assert words in converted(photo, "jpeg").extra[0][1]


def test_texts_go_where_there_is_a_place_for_them(tmp_path):
    chunks = ((b"tEXt", b"Author\0Ren\xe9"), (b"iTXt", b"Title\0\0\0\0\0\xe6\x88\xbf"), (b"tEXt", b"Comment\0good"))
    photo = Photo(to_float(np.asarray(PICTURE)), "PNG", extra=chunks)
    jpeg = converted(photo, "jpeg")
    assert [data.decode() for _, data in jpeg.extra] == ["Author: René", "Title: 房", "good"] and jpeg.notes == []
    for format in ("tiff", "webp", "avif"):
        other = converted(photo, format)
        exif = Image.Exif()
        exif.load(other.exif)
        assert exif[ExifTags.Base.ImageDescription] == "good" and len(exif) == 2
        assert len(other.notes) == 1 and other.notes[0].startswith("of its texts Title are not kept")
    back = converted(replace(jpeg, extra=((0xFE, "房".encode()),)), "png")
    assert back.extra == ((b"iTXt", b"Comment\0\0\0\0\0\xe6\x88\xbf"),)


def test_a_density_added_to_exif_moves_nothing_in_it(tmp_path):
    block = exif_block().removeprefix(b"Exif\0\0")
    photo = Photo(to_float(np.asarray(PICTURE)), "PNG", exif=block, extra=((b"pHYs", struct.pack(">IIB", 11811, 5906, 1)),))
    exif = converted(photo, "webp").exif
    assert exif[8 : len(block)] == block[8:]
    told = Image.Exif()
    told.load(exif)
    assert [round(float(told[tag]), 1) for tag in (282, 283, 296)] == [300.0, 150.0, 2] and told[ExifTags.Base.Make] == "Maker"
    told.load(with_entries(exif, {282: (7200, 100), 271: "Another"}))
    assert told[282] == 72.0 and round(float(told[283])) == 150 and told[ExifTags.Base.Make] == "Maker"


def test_what_a_jpeg_cannot_hold_is_told():
    pixels = np.random.default_rng(0).random((8, 9, 3)).astype(np.float32)
    xmp = (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + b"x" * 70_000)
    photo = Photo(pixels, "PNG", 16, np.full((8, 9), 40_000, np.uint16), extra=(xmp,))
    assert converted(photo, "jpeg").notes == [
        "16 bits a channel become 8: a JPEG holds no more",
        "its transparency is not kept: a JPEG holds none",
        "its XMP is too long for a JPEG and is not kept",
    ]
    assert photo.notes == [] and photo.format == "PNG"


def test_depth(tmp_path):
    samples = np.random.default_rng(0).integers(0, 65536, (8, 9, 3), dtype=np.uint16)
    photo = Photo(samples, "PNG", 16, samples[..., 0])
    low = converted(photo, depth=8)
    assert (low.depth, low.pixels.dtype, low.alpha.dtype, low.notes) == (8, np.uint8, np.uint8, [])
    assert np.abs(low.pixels - samples / 257).max() < 1
    np.testing.assert_array_equal(low.alpha, np.rint(samples[..., 0] / 257))
    high = converted(low, "tiff", 16)
    np.testing.assert_array_equal(high.pixels, low.pixels.astype(np.uint16) * 257)
    tifffile.imwrite(tmp_path / "a.tif", (samples / 65535).astype(np.float32), photometric="rgb", iccprofile=profile())
    for *asked, expected, notes in (("same", None, 32, 0), ("same", 16, 16, 0), ("png", None, 16, 1), ("jpeg", None, 8, 1)):
        result = converted(read_photo(tmp_path / "a.tif"), *asked)
        assert result.depth == expected and len(result.notes) == notes
        write_photo(tmp_path / "b", result)
        error = np.abs(as_samples(read_photo(tmp_path / "b")) - as_samples(result).astype(float)).max()
        assert error < (40 if expected == 8 else 1e-6)
    assert converted(replace(low, format="JPEG"), depth=16).notes == ["16 bits a channel become 8: a JPEG holds no more"]


def test_dither_keeps_the_mean_and_what_8_bits_hold():
    levels = np.arange(256, dtype=np.uint16).repeat(48).reshape(64, 64, 3) * 257
    np.testing.assert_array_equal(dithered(levels), levels // 257)
    np.testing.assert_array_equal(dithered(to_float(levels)), levels // 257)
    for value in (1, 100, 128, 129, 256, 30_000, 65_534):
        flat = dithered(np.full((128, 128, 3), value, np.uint16))
        assert np.ptp(flat) <= 1
        np.testing.assert_allclose(flat.mean((0, 1)), value / 257, atol=0.005)
        np.testing.assert_allclose(flat[40:56, 70:86].mean((0, 1)), value / 257, atol=0.05)  # small areas too
    flat = dithered(np.full((128, 128, 3), 30_000, np.uint16))
    assert (flat[..., 0] != flat[..., 1]).any()
    assert (dithered(np.full((64, 64, 3), 30_000, np.uint16), True).std(2) == 0).all()


def test_pixels_of_8_bits_are_not_dithered(tmp_path):
    pixels = np.full((64, 64, 3), 100.4 / 255, np.float32)  # an edit between two levels
    write_photo(tmp_path / "a.png", converted(Photo(pixels, "JPEG"), "png"))
    assert (np.asarray(Image.open(tmp_path / "a.png")) == 100).all()


@pytest.mark.parametrize("target", ["jpeg", "tiff", "webp", "avif"])
def test_colours_that_a_pngs_chunks_name_become_srgb(tmp_path, target):
    photo = Photo(np.full((16, 16, 3), 64 / 255, np.float32), "PNG", extra=((b"gAMA", struct.pack(">I", 100_000)),))
    out, notes = written(tmp_path / "in", photo, target)
    assert len(notes) == 1 and notes[0].startswith("its colours are converted to sRGB")
    np.testing.assert_allclose(read_rgb(out) * 255, 137.2, atol=1.5)
    out, notes = written(tmp_path / "in", replace(photo, extra=((b"sRGB", b"\0"),)), target)
    assert notes == []
    np.testing.assert_allclose(read_rgb(out) * 255, 64, atol=1.5)


@pytest.mark.parametrize("target", SUFFIX)
@pytest.mark.parametrize("depth", [8, 16])
def test_grey_with_a_grey_profile(tmp_path, target, depth):
    grey = np.full((16, 16, 3), 64 / 255, np.float32)
    photo = Photo(grey, "TIFF", depth, icc_profile=profile("gray", 1.0), grey=True)
    out, notes = written(tmp_path / "in", photo, target)
    np.testing.assert_allclose(read_rgb(out) * 255, 137.2, atol=1.5)
    with Image.open(out) as image:
        modes = {"webp": ("RGB",), "avif": ("L", "RGB"), "jpeg": ("L",)}  # an older Pillow writes a grey AVIF in colour
        assert image.mode in modes.get(target, ("L" if depth == 8 else "I;16",))
    assert any("its colours are converted" in note for note in notes) == (target in ("webp", "avif"))


@pytest.mark.parametrize("format", SUFFIX)
def test_the_place_is_taken_out_and_nothing_else(tmp_path, format):
    path = source(tmp_path, format)
    photo = stripped(read_photo(path), "gps")
    write_photo(tmp_path / f"out{SUFFIX[format]}", photo)
    data = (tmp_path / f"out{SUFFIX[format]}").read_bytes()
    assert photo.notes == [] and b"GPS" not in data and b"Gps" not in data and b"48,8N" not in data and b"519/1" not in data
    for order in "<>":
        assert struct.pack(order + "II", 103, 4) not in data  # 25.75
    with Image.open(tmp_path / f"out{SUFFIX[format]}") as image:
        exif = image.getexif()
        assert exif[ExifTags.Base.Make] == "Maker" and not exif.get_ifd(ExifTags.IFD.GPSInfo)
        assert exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.MakerNote] == NOTE
    assert b"exif:ExposureTime" in data and b"Kitchen" in data
    assert format not in ("jpeg", "tiff") or IPTC in data


def test_a_place_that_cannot_be_read_takes_nothing_with_it():
    entries = struct.pack("<HHHIIHHIII", 2, 0x10F, 2, 8, 38, 0x8825, 4, 1, 44, 0)  # the place is said to be in the maker's name
    photo = Photo(np.zeros((2, 2, 3), np.float32), "WEBP", exif=b"II*\0" + struct.pack("<I", 8) + entries + b"Maker 1\0")
    exif = Image.Exif()
    exif.load(stripped(photo, "gps").exif)
    assert dict(exif) == {0x10F: "Maker 1"}


@pytest.mark.parametrize("format", SUFFIX)
def test_all_is_taken_out_but_colour_and_density(tmp_path, format):
    path = source(tmp_path, format)
    write_photo(tmp_path / f"out{SUFFIX[format]}", stripped(read_photo(path), "all"))
    data = (tmp_path / f"out{SUFFIX[format]}").read_bytes()
    for said in (b"Maker", b"Kitchen", b"words", b"a remark", NOTE[20:]):
        assert said not in data
    with Image.open(tmp_path / f"out{SUFFIX[format]}") as image:
        assert image.info["icc_profile"] == profile()
        assert format in ("webp", "avif") or round(float(image.info["dpi"][0])) == 300
    gamma = ((b"gAMA", struct.pack(">I", 100_000)), (b"tEXt", b"Author\0Someone"))
    assert stripped(Photo(np.zeros((2, 2, 3), np.float32), "PNG", extra=gamma), "all").extra == gamma[:1]


def test_extended_xmp_is_told_where_it_goes():
    extra = ((0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP), (0xE1, b"http://ns.adobe.com/xmp/extension/\0" + bytes(80)))
    photo = Photo(np.zeros((2, 2, 3), np.float32), "JPEG", extra=extra)
    assert converted(photo).extra == extra
    assert "extended XMP" in converted(photo, "png").notes[0] and "extended XMP" in stripped(photo, "gps").notes[0]


def test_subsampling(tmp_path):
    photo = Photo(np.random.default_rng(0).random((32, 32, 3)).astype(np.float32), "JPEG")
    for subsampling, layout in (("444", (1, 1)), ("422", (2, 1)), ("420", (2, 2))):
        write_photo(tmp_path / "a.jpg", photo, subsampling=subsampling)
        with Image.open(tmp_path / "a.jpg") as image:
            assert tuple(image.layer[0][1:3]) == layout
    sizes = []
    for subsampling in ("444", "420"):
        write_photo(tmp_path / "a.avif", replace(photo, format="AVIF"), subsampling=subsampling)
        sizes.append((tmp_path / "a.avif").stat().st_size)
    assert sizes[1] < 0.8 * sizes[0]


def test_the_name_of_a_result_has_the_suffix_of_its_format():
    named = {
        ("same", "a.JPEG"): "a.JPEG",
        ("same", "a.HEIC"): "a.jpg",
        ("same", "b/a.b.dng"): "b/a.b.jpg",
        ("same", "a"): "a",
        ("jpeg", "a.JFIF"): "a.JFIF",
        ("jpeg", "a.png"): "a.jpg",
        ("png", "a.no photo's"): "a.no photo's.png",
        ("tiff", "a.tiff"): "a.tiff",
        ("tiff", "a.nef"): "a.tif",
    }
    for (format, name), expected in named.items():
        assert result_name(Path(name), format) == Path(expected)


def test_avif_of_more_than_8_bits_is_written_with_8(tmp_path):
    buffer = imagecodecs.avif_encode(np.full((16, 16, 3), 500, np.uint16), bitspersample=10)
    (tmp_path / "a.avif").write_bytes(buffer)
    photo = read_photo(tmp_path / "a.avif")
    with pytest.raises(UserError, match="cannot be written as AVIF"):
        write_photo(tmp_path / "b.avif", photo)
    write_photo(tmp_path / "b.avif", converted(photo))
    assert converted(photo).notes == ["16 bits a channel become 8: an AVIF holds no more"]
    with Image.open(io.BytesIO((tmp_path / "b.avif").read_bytes())) as image:
        assert np.abs(np.asarray(image) - 500 / 1023 * 255).max() < 2.5
