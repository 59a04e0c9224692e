"""Photos through real files: every format, depth and orientation, metadata, and each refusal."""

import contextlib
import io
import os
import resource
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageCms, ImageOps

from autohdr.data import images
from autohdr.data.images import (
    Photo,
    check_photo,
    from_float,
    read_photo,
    read_rgb,
    read_samples,
    to_float,
    write_photo,
)
from autohdr.errors import UserError

ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
LOSSLESS = [("PNG", 8), ("PNG", 16), ("TIFF", 8), ("TIFF", 16)]
SUFFIX = {"JPEG": ".jpg", "PNG": ".png", "TIFF": ".tif", "WEBP": ".webp"}
ORIENT = ExifTags.Base.Orientation


def noise(height, width, channels=3, depth=8, seed=0):
    dtype = np.uint8 if depth == 8 else np.uint16
    return np.random.default_rng(seed).integers(0, 2**depth, (height, width, channels), dtype=dtype)


def smooth(height, width):
    """A colour gradient that lossy formats keep to a few levels and that no orientation maps onto itself."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([255 * x // width, 255 * y // height, 100 + 80 * x * y // (width * height)], 2).astype(np.uint8)


def exif_block(orientation=1, order="<"):
    exif = Image.Exif()
    exif.endian = order
    exif[ORIENT] = orientation
    exif[ExifTags.Base.Make] = "Maker"
    exif[ExifTags.Base.Artist] = "Someone"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ExposureTime] = 0.004
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.MakerNote] = bytes(range(200))
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] = "N"
    return exif


def assert_exif_kept(path):
    with Image.open(path) as image:
        exif = image.getexif()
        details = exif.get_ifd(ExifTags.IFD.Exif)
        assert exif.get(ORIENT, 1) == 1
        assert exif[ExifTags.Base.Make] == "Maker" and exif[ExifTags.Base.Artist] == "Someone"
        assert float(details[ExifTags.Base.ExposureTime]) == pytest.approx(1 / 250)
        assert details[ExifTags.Base.MakerNote] == bytes(range(200))
        assert exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] == "N"


@pytest.mark.parametrize("alpha", [False, True], ids=["opaque", "alpha"])
@pytest.mark.parametrize("format, depth", LOSSLESS)
def test_lossless_round_trip(tmp_path, format, depth, alpha):
    samples = noise(37, 53, 4, depth)
    photo = Photo(to_float(samples[..., :3]), format, depth, samples[..., 3] if alpha else None, b"", ICC)
    path, again = tmp_path / f"a{SUFFIX[format]}", tmp_path / f"b{SUFFIX[format]}"
    write_photo(path, photo)
    read = read_photo(path)
    write_photo(again, read)
    assert (read.format, read.depth, read.icc_profile) == (format, depth, ICC)
    for file in (path, again):
        np.testing.assert_array_equal(read_samples(file), samples[..., :3])
    if alpha:
        np.testing.assert_array_equal(read_photo(again).alpha, samples[..., 3])
    else:
        assert read.alpha is None
    assert check_photo(path) == (37, 53)
    assert sorted(tmp_path.iterdir()) == [path, again]  # no temporary file is left


@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_lossy_round_trip(tmp_path, format):
    path, again = tmp_path / f"a{SUFFIX[format]}", tmp_path / f"b{SUFFIX[format]}"
    Image.fromarray(smooth(64, 96)).save(path, quality=90, icc_profile=ICC, exif=exif_block())
    photo = read_photo(path)
    write_photo(again, photo)
    assert (photo.format, photo.depth, photo.icc_profile) == (format, 8, ICC)
    assert np.abs(read_rgb(again) - photo.pixels).mean() < 1.5 / 255
    with Image.open(again) as image:
        assert image.format == format and image.info["icc_profile"] == ICC
    assert_exif_kept(again)


def test_jpeg_is_written_at_95_without_subsampling(tmp_path):
    write_photo(tmp_path / "a.jpg", Photo(to_float(smooth(16, 16)), "JPEG"))
    reference = io.BytesIO()
    Image.new("RGB", (16, 16)).save(reference, "JPEG", quality=95)
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.quantization == Image.open(reference).quantization
        assert all(sampling[1:3] == (1, 1) for sampling in image.layer)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", SUFFIX)
def test_orientation_is_applied_and_reset(tmp_path, format, orientation):
    path, again = tmp_path / f"a{SUFFIX[format]}", tmp_path / f"b{SUFFIX[format]}"
    transposes = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM"}
    transposes |= {5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}
    stored = Image.fromarray(smooth(40, 64))
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format, {})
    stored.save(path, exif=exif_block(orientation).tobytes(), **options)
    upright = stored.transpose(Image.Transpose[transposes[orientation]]) if orientation > 1 else stored
    photo = read_photo(path)
    assert np.abs(photo.pixels - to_float(np.asarray(upright))).max() < 6 / 255
    assert photo.pixels.flags.c_contiguous
    assert check_photo(path) == photo.pixels.shape[:2]
    write_photo(again, photo)
    assert read_photo(again).pixels.shape == photo.pixels.shape
    assert np.abs(read_rgb(again) - photo.pixels).mean() < 3 / 255
    assert_exif_kept(again)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_orientation_of_16_bits(tmp_path, format, orientation):
    samples = noise(5, 7, 3, 16)
    path = tmp_path / f"a{SUFFIX[format]}"
    if format == "TIFF":
        tifffile.imwrite(path, samples, photometric="rgb", extratags=[(274, 3, 1, orientation)])
    else:
        exif = exif_block(orientation).tobytes().removeprefix(b"Exif\0\0")
        write_photo(path, Photo(to_float(samples), "PNG", 16, exif=exif))
    with Image.open(path) as image:  # Pillow keeps 8 of the 16 bits, enough to see how it turns them
        image.load()
        turned = np.asarray(image if format == "TIFF" else ImageOps.exif_transpose(image)).astype(int)
    read = read_samples(path)
    assert read.dtype == np.uint16
    np.testing.assert_array_equal(read >> 8, turned)


@pytest.mark.parametrize("order", ["<", ">"], ids=["II", "MM"])
def test_exif_is_kept_byte_for_byte_but_for_orientation_and_thumbnail(tmp_path, order):
    block = bytearray(exif_block(6, order).tobytes().removeprefix(b"Exif\0\0"))
    (count,) = struct.unpack_from(order + "H", block, 8)
    struct.pack_into(order + "I", block, 10 + 12 * count, len(block))  # a second directory: the thumbnail's
    block += struct.pack(order + "HHHIII", 1, ExifTags.Base.Compression, 4, 1, 6, 0)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=b"Exif\0\0" + bytes(block))
    kept = read_photo(tmp_path / "a.jpg").exif
    changed = [i for i, (old, new) in enumerate(zip(block, kept, strict=True)) if old != new]
    assert 1 <= len(changed) <= 4
    exif = Image.Exif()
    exif.load(kept)
    assert exif[ORIENT] == 1 and not exif.get_ifd(ExifTags.IFD.IFD1)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("block", [b"", b"II", b"II*\0\xff\xff\xff\xff", b"garbage of no use", b"MM\0*\0\0\0\x08\xff\xff"])
def test_damaged_exif_is_dropped(tmp_path, block):
    Image.fromarray(smooth(8, 9)).save(tmp_path / "a.jpg", exif=b"Exif\0\0" + block)
    photo = read_photo(tmp_path / "a.jpg")
    assert photo.exif == b"" and photo.pixels.shape == (8, 9, 3)
    write_photo(tmp_path / "b.jpg", photo)


def test_png_exif_behind_the_pixels(tmp_path):
    write_photo(tmp_path / "a.png", Photo(to_float(noise(4, 6, 3, 16)), "PNG", 16))
    data = (tmp_path / "a.png").read_bytes()
    exif = exif_block(6).tobytes().removeprefix(b"Exif\0\0")
    (tmp_path / "a.png").write_bytes(data[:-12] + png_chunk(b"eXIf", exif) + data[-12:])
    assert read_photo(tmp_path / "a.png").pixels.shape == (6, 4, 3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_other_modes_become_rgb(tmp_path, mode):
    suffix = ".tif" if mode == "CMYK" else ".png"
    colour = Image.fromarray(smooth(20, 30))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(colour.convert("L")).astype(np.uint16) * 257)
    else:
        image = colour.convert(mode)
    image.save(tmp_path / f"a{suffix}")
    photo = read_photo(tmp_path / f"a{suffix}")
    expected = np.asarray(colour.convert("L").convert("RGB") if mode == "I;16" else image.convert("RGB"))
    np.testing.assert_array_equal(from_float(photo.pixels), expected)
    assert (photo.alpha is not None) == (mode in ("LA", "RGBA"))
    assert photo.depth == (16 if mode == "I;16" else 8)
    write_photo(tmp_path / f"b{suffix}", photo)
    np.testing.assert_array_equal(read_rgb(tmp_path / f"b{suffix}"), photo.pixels)


def test_profiles_of_other_colour_spaces_are_not_kept(tmp_path):
    cmyk = bytearray(ICC)
    cmyk[16:20] = b"CMYK"
    Image.new("L", (4, 4), 90).save(tmp_path / "a.jpg", icc_profile=bytes(cmyk))
    assert read_photo(tmp_path / "a.jpg").icc_profile is None


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "lzw", "predictor": True},
        {"compression": "zlib", "tile": (16, 16)},
        {"planarconfig": "separate"},
        {"byteorder": ">"},
        {"bigtiff": True},
    ],
    ids=str,
)
def test_deep_tiff_variants(tmp_path, options):
    samples = noise(33, 47, 3, 16)
    stored = np.moveaxis(samples, 2, 0) if "planarconfig" in options else samples
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb", iccprofile=ICC, **options)
    photo = read_photo(tmp_path / "a.tif")
    np.testing.assert_array_equal(from_float(photo.pixels, 16), samples)
    write_photo(tmp_path / "b.tif", photo)
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "b.tif"), samples)
    assert read_photo(tmp_path / "b.tif").icc_profile == ICC


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_deep_grey_tiff(tmp_path, photometric):
    grey = noise(6, 5, 1, 16)[..., 0]
    tifffile.imwrite(tmp_path / "a.tif", grey, photometric=photometric)
    expected = grey if photometric == "minisblack" else 65535 - grey
    np.testing.assert_array_equal(read_samples(tmp_path / "a.tif"), np.repeat(expected[..., None], 3, 2))


def test_tiff_thumbnail_page_is_ignored_but_a_second_photo_is_refused(tmp_path):
    samples = noise(30, 40)
    for name, kind in (("thumbnail", 1), ("pages", 0)):
        with tifffile.TiffWriter(tmp_path / f"{name}.tif") as file:
            file.write(samples, photometric="rgb")
            file.write(samples[::4, ::4], photometric="rgb", subfiletype=kind)
    np.testing.assert_array_equal(read_samples(tmp_path / "thumbnail.tif"), samples)
    with pytest.raises(UserError, match="pages.tif: expected a single photo"):
        read_samples(tmp_path / "pages.tif")


def test_multi_picture_jpeg_is_a_jpeg(tmp_path):
    photo, preview = Image.fromarray(smooth(40, 60)), Image.new("RGB", (6, 4))
    photo.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[preview])
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.format == "MPO" and image.n_frames == 2
    read = read_photo(tmp_path / "a.jpg")
    assert read.format == "JPEG" and read.pixels.shape == (40, 60, 3)
    assert check_photo(tmp_path / "a.jpg") == (40, 60)


@pytest.mark.parametrize("format, depth", [("JPEG", 8), ("WEBP", 8), *LOSSLESS])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
def test_truncated_file_is_refused(tmp_path, format, depth, share):
    path = tmp_path / f"cut{SUFFIX[format]}"
    write_photo(path, Photo(to_float(noise(64, 64, depth=depth)), format, depth))
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    for read in (read_photo, read_rgb, check_photo):
        with pytest.raises(UserError, match=f"cut{SUFFIX[format]}: "):
            read(path)


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bomb(width, height):
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(bytes(1000)))


@pytest.mark.parametrize(
    "content, reason",
    [
        (None, "No such file"),
        (b"", "empty"),
        (b"not a photo at all", "not a JPEG, PNG, WebP, TIFF, AVIF, HEIC, JPEG XL or camera raw photo"),
        (b"GIF89a" + bytes(40), "not a JPEG"),
        (b"\xff\xd8\xff\xe0" + bytes(100), ""),
        (png_bomb(30_000, 20_000), "600000000 pixels"),
    ],
    ids=["missing", "empty", "text", "gif", "jpeg-header", "bomb"],
)
def test_no_photo_is_refused(tmp_path, content, reason):
    path = tmp_path / "bad.jpg"
    if content is not None:
        path.write_bytes(content)
    for read in (read_photo, check_photo):
        with pytest.raises(UserError, match=f"bad.jpg: .*{reason}"):
            read(path)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="directory"):
        read_photo(tmp_path)


@pytest.mark.filterwarnings("error")
def test_100_megapixels_are_not_refused(tmp_path):
    Image.new("1", (12_000, 9_000)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="truncated"):  # the size passes, the missing rows do not
        (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
        check_photo(tmp_path / "b.png")


def test_animations_are_refused(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for suffix in (".webp", ".png"):
        frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:])
        with pytest.raises(UserError, match="single photo"):
            read_photo(tmp_path / f"a{suffix}")


@pytest.mark.parametrize(
    "array, options",
    [
        (np.full((4, 4), np.nan, np.float32), {}),
        (np.zeros((4, 4, 4), np.uint16), {"photometric": "separated"}),
        (np.zeros((4, 4, 4), np.uint16), {"photometric": "rgb", "extrasamples": ["assocalpha"]}),
        (np.zeros((4, 4, 3), np.float64), {"photometric": "rgb"}),
    ],
    ids=["not-finite", "cmyk16", "premultiplied16", "float64"],
)
def test_tiffs_beyond_us_are_refused(tmp_path, array, options):
    tifffile.imwrite(tmp_path / "a.tif", array, **options)
    with pytest.raises(UserError, match="a.tif: "):
        read_photo(tmp_path / "a.tif")


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_tiff_in_floating_point_is_linear_or_encoded_as_its_profile_says(tmp_path, dtype):
    """And comes back as it was, in its own dtype; without a profile it is taken as encoded, with a word."""
    primaries = [0.64, 0.33, 1.0, 0.3, 0.6, 1.0, 0.15, 0.06, 1.0]
    linear = imagecodecs.cms_profile("rgb", whitepoint=[0.3127, 0.329, 1.0], primaries=primaries, gamma=1.0)
    encoded = np.linspace(0, 1, 60, dtype=np.float32).reshape(4, 5, 3)
    light = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    word = ["no profile says whether its numbers are linear light: they are taken as sRGB's"]
    for name, samples, icc, notes in (
        ("linear", light, linear, []),
        ("encoded", encoded, ICC, []),
        ("unsaid", encoded, None, word),
    ):
        path = tmp_path / f"{name}.tif"
        tifffile.imwrite(path, samples.astype(dtype), photometric="rgb", iccprofile=icc, metadata=None)
        photo = read_photo(path)
        space = photo.colour_space()
        assert (photo.depth, photo.notes, space is None) == (32, notes, name != "linear")
        np.testing.assert_allclose(space.to_srgb(photo.pixels) if space else photo.pixels, encoded, atol=2e-3)
        with contextlib.nullcontext() if icc else pytest.warns(UserWarning, match=word[0]):
            np.testing.assert_allclose(read_rgb(path), encoded, atol=2e-3)
        write_photo(path, photo)
        with tifffile.TiffFile(path) as tiff:
            assert tiff.pages.first.iccprofile == icc
            np.testing.assert_array_equal(tiff.asarray(), samples.astype(dtype))


@given(st.lists(st.floats(-0.5, 1.5, width=32), min_size=3, max_size=30), st.sampled_from([8, 16]))
def test_from_float_rounds_and_clips(values, depth):
    pixels = np.array(values, np.float32).reshape(-1, 1, 1)
    top = 2**depth - 1
    expected = np.rint(np.clip(pixels, 0, 1) * np.float32(top))
    np.testing.assert_array_equal(from_float(pixels, depth), expected)


@pytest.mark.parametrize("depth", [8, 16])
def test_every_level_survives(depth):
    levels = np.arange(2**depth, dtype=np.uint8 if depth == 8 else np.uint16).reshape(-1, 1, 1)
    pixels = to_float(levels)
    assert pixels.dtype == np.float32 and pixels.min() == 0 and pixels.max() == 1
    np.testing.assert_array_equal(from_float(pixels, depth), levels)


def test_not_finite_is_refused_and_leaves_no_file(tmp_path):
    with pytest.raises(UserError, match="finite"):
        write_photo(tmp_path / "a.png", Photo(np.full((2, 2, 3), np.nan, np.float32), "PNG"))
    assert not list(tmp_path.iterdir())


def test_a_failed_write_keeps_the_old_file(tmp_path):
    (tmp_path / "a.webp").write_bytes(b"old")
    with pytest.raises(ValueError):  # WebP ends at 16383 pixels
        write_photo(tmp_path / "a.webp", Photo(np.zeros((1, 20_000, 3), np.float32), "WEBP"))
    assert [p.name for p in tmp_path.iterdir()] == ["a.webp"] and (tmp_path / "a.webp").read_bytes() == b"old"


@pytest.mark.parametrize("format", SUFFIX)
def test_a_full_disk_keeps_the_old_file(tmp_path, format):
    """The last hundred bytes have no place."""
    path, photo = tmp_path / "a", Photo(to_float(noise(200, 300)), format)
    write_photo(path, photo)
    whole = path.read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) - 100, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_photo(path, photo)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and path.read_bytes() == whole


def test_a_damaged_profile_of_a_cmyk_photo_is_found_by_the_check(tmp_path):
    path = tmp_path / "a.jpg"
    Image.new("CMYK", (64, 48)).save(path, icc_profile=bytes(16) + b"CMYK" + bytes(100))
    for read in (check_photo, read_photo):
        with pytest.raises(UserError):
            read(path)


def test_what_others_warn_of_meanwhile_is_passed_on(tmp_path, monkeypatch):
    """Warnings are the whole process's: those that the trainer gives while a photo is read are not the photo's."""
    path = tmp_path / "a.jpg"
    Image.new("RGB", (8, 8)).save(path)
    load = images.decode_jpeg

    def while_reading(warn):
        monkeypatch.setattr(images, "decode_jpeg", lambda *arguments: warn() or load(*arguments))

    while_reading(lambda: warnings.warn("another's", stacklevel=1))
    for read in (read_photo, read_rgb):
        with pytest.warns(UserWarning, match="another's"):
            read(path)
    while_reading(lambda: warnings.warn_explicit("odd", UserWarning, Image.__file__, 1))
    assert read_photo(path).notes == ["its file has oddities: odd"]


def test_threads_that_read_photos_leave_standard_error_and_warnings_as_they_were(tmp_path):
    path = tmp_path / "a.tif"
    Image.new("RGB", (300, 300)).save(path)
    before, filters = os.fstat(2), list(warnings.filters)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read_photo, [path] * 40))
    assert os.path.samestat(os.fstat(2), before) and warnings.filters == filters
