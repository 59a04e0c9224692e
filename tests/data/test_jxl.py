"""JPEG XL through real files. Those of colours other than sRGB are by cjxl 0.7."""

import base64
import io
import struct

import imagecodecs
import numpy as np
import pillow_jxl
import pytest
from PIL import ExifTags, Image

from autohdr.data.conversion import converted
from autohdr.data.heif import boxes
from autohdr.data.images import check_photo, photo_layout, read_exif, read_photo, read_rgb, read_samples, write_photo
from autohdr.errors import UserError

HEIGHT, WIDTH = 64, 96
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
ADOBE = (  # its profile
    "66OKWR598<i|V{?Y0$?Pdx#nqTErGwg3PIpu=8Zl#f9Otkr3`|VRtr((X|ya8jUWk!D|Zxkae_mMu49<SIvyu%sFrgz<~b?ODle5"
    "G1PV9BA1ms6ao~jO=YFiOm%r@{Uz&_8^~oH-vCEnVRL0uPf_Wx0BdK<08M2}OIdTMy;jyYs?#*qPytT$_TPW!DNo~_K>LOC-+%WF"
    "_1}N{6~SIE6!<uoa}j)6f<yTblL!~`puTP(v<)ce`TWdVd6{pSnZKSLMU`#&vIBI~D@eIRYKPEThmVUU"
)
FILES = {
    "P3": "{|Z4sKqfZ=2m%2BU;s-Pixt92!(qNa1OR8=G6(<w00000000",
    "PQ": "0000CN?1%F4GM<}0000KW^{RQYItlQ00000YItlQ00009YItmH3IG5AGirEjWB&?41pENx(IE~80001h2m%2BSO7~HixonO0`US70E9{b0000000000",
    "HLG": (
        "0000CN?1%F4GM<}0000KW^{RQYItlQ00000YItlQ00009YItmH3IG5AG-`NkWB&?41pENx83^<k000000tf;D09XJ^7>gA`iURQh5defr0RR910000000"
    ),
    "Adobe RGB": "{|Z4s2yYDo" + ADOBE + "%;f+G0s#PE081E)6~ajaVZJ~F0EgV8000000000000",
    "Adobe RGB, lossy": (
        "{|Z4s3U3Vq" + ADOBE + "%;f+85{LlY0Kdv80RT{;GRnBY%ekH}KXh13+qllqR@)YqB#Mk<lXL=yB(V@|T!0yv0R}L0_VIQgSd}CI"
    ),
}
"""8 by 8 pixels of one colour: base 85."""


def smooth(white=255, dtype=np.uint8):
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    return np.stack([white * x // WIDTH, white * y // HEIGHT, 0 * x + white // 3], 2).astype(dtype)


def exif_block(orientation=6):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.Make] = orientation, "Maker"
    return exif.tobytes()


def boxed(*parts):
    return b"".join(struct.pack(">I4s", 8 + len(data), kind) + data for kind, data in parts)


def header(*fields):
    """A codestream's first bits, each field a value and how many bits, and zeros behind them."""
    bits, at = 0x0AFF, 16
    for value, count in fields:
        bits, at = bits | value << at, at + count
    return bits.to_bytes(at // 8 + 64, "little")


SIZE = ((1, 1), (7, 5), (0, 3), (11, 5))  # 64 by 96
PLAIN = ((0, 1), (0, 1))  # not all as usual, but no orientation
EIGHT = ((0, 1), (0, 2), (1, 1))


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
@pytest.mark.parametrize("container", [False, True])
def test_all_bits_stay(tmp_path, bits, container):
    white = 2**bits - 1
    samples = smooth(white, np.uint8 if bits == 8 else np.uint16)
    samples[0, 0] = white
    options = {"bitspersample": bits, "usecontainer": container, "lossless": True}
    (tmp_path / "photo.jpg").write_bytes(imagecodecs.jpegxl_encode(samples, **options))  # by what is in it, not by its name
    photo = read_photo(tmp_path / "photo.jpg", as_stored=True)
    depth = 8 if bits == 8 else 16
    assert (photo.format, photo.depth, photo.pixels.dtype, photo.notes) == ("JXL", depth, f"u{depth // 8}", [])
    assert photo_layout(tmp_path / "photo.jpg") == (HEIGHT, WIDTH, depth)
    np.testing.assert_array_equal(photo.pixels, np.rint(samples * ((2**depth - 1) / white)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_it_is_turned_once(tmp_path, orientation):
    image = Image.fromarray(smooth())
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, subsampling=0, exif=exif_block(orientation))
    whole = bytes(imagecodecs.jpegxl_encode_jpeg(buffer.getvalue()))
    (tmp_path / "jpeg.jxl").write_bytes(whole)
    (tmp_path / "pixels.jxl").write_bytes(boxed(*(part for part in boxes(whole) if part[0] != b"jbrd")))
    buffer.seek(0)
    upright = np.asarray(image).swapaxes(0, 1) if orientation > 4 else np.asarray(image)
    upright = upright[::-1] if orientation in (3, 4, 7, 8) else upright
    upright = upright[:, ::-1] if orientation in (2, 3, 6, 7) else upright
    for name, format in (("jpeg", "JPEG"), ("pixels", "JXL")):
        path = tmp_path / f"{name}.jxl"
        photo = read_photo(path, as_stored=True)
        assert photo.format == format and photo.notes == []
        assert check_photo(path) == photo_layout(path)[:2] == photo.pixels.shape[:2] == upright.shape[:2]
        assert np.abs(photo.pixels - upright.astype(int)).mean() < 2
        exif = Image.Exif()
        exif.load(photo.exif)
        assert exif[ExifTags.Base.Orientation] == 1 and exif[ExifTags.Base.Make] == "Maker"


def test_what_was_a_jpeg_is_that_jpeg(tmp_path):
    primaries = [0.64, 0.33, 1, 0.21, 0.71, 1, 0.15, 0.06, 1]
    icc = imagecodecs.cms_profile("rgb", whitepoint=[0.3127, 0.329, 1.0], primaries=primaries, gamma=2.2)
    options = {"exif": exif_block(), "xmp": XMP, "comment": b"a remark", "icc_profile": icc, "dpi": (300, 300)}
    Image.fromarray(smooth()).save(tmp_path / "a.jpg", quality=93, **options)
    (tmp_path / "a.jxl").write_bytes(imagecodecs.jpegxl_encode_jpeg((tmp_path / "a.jpg").read_bytes()))
    found, expected = (vars(read_photo(tmp_path / name, as_stored=True)) for name in ("a.jxl", "a.jpg"))
    np.testing.assert_array_equal(found.pop("pixels"), expected.pop("pixels"))
    assert found == expected


def test_what_was_a_jpeg_whose_exif_was_changed_since_has_its_pixels(tmp_path):
    Image.fromarray(smooth()).save(tmp_path / "a.jpg", quality=93, exif=exif_block(1))
    whole = boxes(bytes(imagecodecs.jpegxl_encode_jpeg((tmp_path / "a.jpg").read_bytes())))
    new = bytes(4) + exif_block(1).removeprefix(b"Exif\0\0").replace(b"Maker", b"Other") + bytes(9)
    parts = ((b"Exif", new) if data.startswith(b"Exif") else (kind, data) for kind, data in whole)
    (tmp_path / "a.jxl").write_bytes(boxed(*parts))
    photo = read_photo(tmp_path / "a.jxl", as_stored=True)
    assert photo.format == "JXL" and b"Other" in photo.exif
    assert np.abs(photo.pixels - read_photo(tmp_path / "a.jpg", as_stored=True).pixels.astype(int)).max() < 8


@pytest.mark.parametrize("packed", [False, True])
def test_what_it_says_goes_into_a_jpeg(tmp_path, packed):
    said = [(b"Exif", bytes(4) + exif_block().removeprefix(b"Exif\0\0")), (b"xml ", XMP), (b"jumb", b"who made it")]
    if packed:
        said = [(b"brob", kind + bytes(imagecodecs.brotli_encode(data))) for kind, data in said[:2]] + said[2:]
    whole = bytes(imagecodecs.jpegxl_encode(smooth(), lossless=True, usecontainer=True))
    (tmp_path / "a.jxl").write_bytes(boxed(*boxes(whole), *said))
    assert read_exif(tmp_path / "a.jxl")[ExifTags.Base.Make] == "Maker"
    photo = converted(read_photo(tmp_path / "a.jxl", as_stored=True))
    assert photo.notes == ["what it says beside EXIF and XMP is not kept"]
    np.testing.assert_array_equal(photo.pixels, smooth())  # EXIF's orientation is not applied again
    write_photo(tmp_path / "a.jpg", photo)
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.getexif()[ExifTags.Base.Make] == "Maker" and image.getexif()[ExifTags.Base.Orientation] == 1
        assert image.info["xmp"] == XMP.replace(b"6", b"1")


@pytest.mark.parametrize(
    "name, srgb, depth, notes",
    [
        ("P3", (0.965, 0.475, 0.490), 8, []),  # of (230, 128, 128), by lcms
        ("Adobe RGB", (0.870, 0.506, 0.388), 8, []),
        ("Adobe RGB, lossy", (0.870, 0.506, 0.388), 16, ["its profile is not kept", "are converted to sRGB"]),
        ("PQ", (1, 1, 1), 16, ["BT.2020 with PQ, are converted to sRGB"]),  # 203 cd/m²
        ("HLG", (0.696, 0.696, 0.696), 16, ["BT.2020 with HLG, are converted to sRGB"]),
    ],
)
def test_colours_are_what_the_file_says(tmp_path, name, srgb, depth, notes):
    (tmp_path / "a.jxl").write_bytes(base64.b85decode(FILES[name]))
    photo = read_photo(tmp_path / "a.jxl")
    assert photo.depth == depth and (photo.icc_profile is None) == bool(notes)
    assert len(photo.notes) == len(notes) and all(part in note for part, note in zip(notes, photo.notes, strict=True))
    np.testing.assert_allclose(read_rgb(tmp_path / "a.jxl")[4, 4], srgb, atol=0.006)
    write_photo(tmp_path / "a.jpg", converted(photo))
    np.testing.assert_allclose(read_rgb(tmp_path / "a.jpg")[4, 4], srgb, atol=0.012)


def test_without_a_profile_it_is_taken_as_srgb(tmp_path, monkeypatch):
    (tmp_path / "a.jxl").write_bytes(base64.b85decode(FILES["P3"]))
    monkeypatch.setattr(pillow_jxl, "Decoder", lambda num_threads: lambda data: (False, None, b"", None, []))
    photo = read_photo(tmp_path / "a.jxl")
    assert photo.colour_space() is None and photo.notes == ["it has no colour profile, and its colours are taken as sRGB's"]


def test_grey_and_alpha(tmp_path):
    grey, alpha = smooth()[..., 0], smooth()[..., 1]
    (tmp_path / "a.jxl").write_bytes(imagecodecs.jpegxl_encode(grey, lossless=True))
    photo = read_photo(tmp_path / "a.jxl", as_stored=True)
    assert photo.grey and photo.alpha is None and (photo.pixels == grey[..., None]).all()
    (tmp_path / "b.jxl").write_bytes(imagecodecs.jpegxl_encode(np.dstack([smooth(), alpha]), lossless=True))
    photo = read_photo(tmp_path / "b.jxl", as_stored=True)
    assert not photo.grey and (photo.alpha == alpha).all() and (photo.pixels == smooth()).all()
    assert converted(photo).notes == ["its transparency is not kept: a JPEG holds none"]


def test_of_an_animation_the_first_picture_is_read(tmp_path):
    frames = np.stack([smooth(), smooth()[::-1], smooth()[:, ::-1]])
    (tmp_path / "a.jxl").write_bytes(imagecodecs.jpegxl_encode(frames, lossless=True))
    photo = read_photo(tmp_path / "a.jxl", as_stored=True)
    assert photo.notes == ["it is animated: its first picture is in the result"]
    np.testing.assert_array_equal(photo.pixels, frames[0])
    np.testing.assert_array_equal(read_samples(tmp_path / "a.jxl"), frames[0])


def test_a_header_is_read_whole(tmp_path):
    """All that may stand before the colours: each part wrong by a bit would be another size, depth or refusal."""
    said = [(0, 1), (1, 1), (5, 3)]  # orientation 6
    said += [(1, 1), (0, 1), (0, 2), (99, 9), (1, 3)]  # an intrinsic size, square
    said += [(1, 1), (0, 1), (1, 2), (3, 8), (0, 3), (2, 2), (9, 10)]  # a preview
    said += [(1, 1), (2, 2), (23, 10), (1, 2), (1, 2), (5, 3), (0, 1)]  # an animation
    said += [(0, 1), (2, 2), (0, 1), (1, 2)]  # 12 bits, an extra channel
    said += [(0, 1), (0, 2), (0, 1), (0, 2), (1, 2), (1, 2), (3, 4), *((ord(letter), 8) for letter in "abc"), (0, 1)]  # alpha
    said += [(0, 1), (0, 1), (0, 1), (0, 2), (2, 2), (0, 4), (0, 2), (5, 19), (1, 2), (6, 19)]  # RGB of another white
    said += [(2, 2), (7, 4), (0, 1), (2, 2), (14, 4)]  # primaries of BT.2100, PQ
    (tmp_path / "a.jxl").write_bytes(header(*SIZE, *said))
    with pytest.raises(UserError, match="expected PQ or HLG with the primaries of"):
        photo_layout(tmp_path / "a.jxl")
    said[-1] = (15, 4)
    (tmp_path / "a.jxl").write_bytes(header(*SIZE, *said))
    assert photo_layout(tmp_path / "a.jxl") == (WIDTH, HEIGHT, 16)


@pytest.mark.parametrize(
    "fields, reason",
    [
        ((*PLAIN, (1, 1)), "expected whole numbers, got floating point"),
        ((*PLAIN, (0, 1), (3, 2), (23, 6)), "expected 8 to 16 bits a channel, got 24"),
        ((*PLAIN, *EIGHT, (2, 2), (0, 4), (1, 1), (1, 1)), "with or without alpha, got further channels"),
        ((*PLAIN, *EIGHT, (1, 2), (0, 1), (0, 2), (0, 1), (0, 2), (0, 2), (0, 2), (1, 1)), "got premultiplied alpha"),
        ((*PLAIN, *EIGHT, (1, 2), (0, 1), (2, 2), (2, 4), (0, 1), (0, 2), (0, 2), (0, 2), (1, 1), (1, 1)), "got CMYK"),
        ((*PLAIN, *EIGHT, (0, 2), (0, 1), (0, 1), (0, 1), (2, 2), (0, 4)), "expected grey or RGB, got XYB"),
    ],
)
def test_what_is_not_read_is_named(tmp_path, fields, reason):
    (tmp_path / "a.jxl").write_bytes(header(*SIZE, *fields))
    for read in (read_photo, check_photo, photo_layout):
        with pytest.raises(UserError, match=f"a.jxl: .*{reason}"):
            read(tmp_path / "a.jxl")


def test_one_too_large_is_refused_before_it_is_decoded(tmp_path):
    (tmp_path / "a.jxl").write_bytes(header((0, 1), (3, 2), (2**20 - 1, 30), (1, 3), (1, 1)))
    with pytest.raises(UserError, match="1099511627776 pixels are more than 300 megapixels"):
        read_photo(tmp_path / "a.jxl")


@pytest.mark.parametrize("container", [False, True])
def test_damaged_ones_are_refused(tmp_path, container):
    whole = bytes(imagecodecs.jpegxl_encode(smooth(), usecontainer=container))
    for length in (2, *(len(whole) * tenths // 10 for tenths in range(1, 10))):
        path = tmp_path / f"cut at {length}.jxl"
        path.write_bytes(whole[:length])
        for read in (read_photo, check_photo):
            with pytest.raises(UserError, match=path.name):
                read(path)
    (tmp_path / "a.jxl").write_bytes(b"what is in it")
    with pytest.raises(UserError, match="a.jxl: not a JPEG, .*JPEG XL"):
        read_photo(tmp_path / "a.jxl")
