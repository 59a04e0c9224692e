"""Damaged photos, one by one, and a drill: 200 damaged or strange ones among the pairs. The
bad ones are named before training, with their lines; the strange
but readable ones are trained on; none ends the process.
"""

import io
import json
import os
import struct
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageCms

from autohdr.cli import main
from autohdr.data.images import check_photo, read_photo, read_samples
from autohdr.data.libraries import written
from autohdr.data.pairs import PairDataset, check_pairs, read_pairs, write_pairs
from autohdr.errors import UserError
from autohdr.train.config import TrainConfig
from autohdr.train.loop import train

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from formats import write_dng  # noqa: E402

COUNT, WIDTH, HEIGHT = 200, 64, 48
FORMATS = {"jpg": {"quality": 90}, "png": {}, "webp": {"quality": 90}, "tif": {"compression": "tiff_lzw"}}
FORMAT_NAMES = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "tif": "TIFF"}
BAD, USED, EITHER = "bad", "used", "either"

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8))
PICTURE = PICTURE.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


def encoded(suffix, image=PICTURE, **options):
    buffer = io.BytesIO()
    image.save(buffer, FORMAT_NAMES[suffix], **(FORMATS[suffix] | options))
    return buffer.getvalue()


def deep(suffix, mode="RGB"):
    samples = np.asarray(PICTURE.convert(mode)).astype(np.uint16) * 257
    return imagecodecs.png_encode(samples) if suffix == "png" else tiff(samples)


def png_header(width, height):
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


def jpeg_of_size(width, height):
    """The picture's JPEG with another size in its header."""
    photo = bytearray(encoded("jpg"))
    struct.pack_into(">HH", photo, photo.index(b"\xff\xc0") + 5, height, width)
    return bytes(photo)


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return PICTURE.transpose(Image.Transpose.TRANSPOSE) if orientation in (5, 6, 7, 8) else PICTURE, exif


def tiff(array, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def tiff_of_width(width):
    photo = bytearray(tiff(np.zeros((1, 1, 3), np.uint8), photometric="rgb"))
    struct.pack_into("<I", photo, photo.index(struct.pack("<HHI", 256, 4, 1)) + 8, width)
    return bytes(photo)


def bad_photos():
    """(name, bytes) of what must be named."""
    yield "empty.jpg", b""
    yield "zeros.jpg", bytes(1 << 20)
    yield "text.jpg", b"not a photo"
    yield "page.png", b"<!doctype html><title>404</title>"
    yield "text.tif", b"II*\0 and no more"
    yield "riff.webp", b"RIFF\xff\xff\xff\xffWEBP"
    for suffix, content in (("png", png_header(60_000, 60_000)), ("jpg", jpeg_of_size(65_000, 65_000))):
        yield f"bomb.{suffix}", content
    yield (
        "bomb.tif",
        tiff(np.zeros((1, 1, 3), np.uint8), photometric="rgb").replace(
            *(struct.pack("<HHII", 256, t, 1, v) for t, v in ((4, 1), (4, 900_000_000)))
        ),
    )
    yield "no rows.png", png_header(12_000, 9_000)
    for name, format_ in (("animated.gif.jpg", "GIF"), ("icon.png", "ICO"), ("bitmap.jpg", "BMP")):
        buffer = io.BytesIO()
        PICTURE.save(buffer, format_)
        yield name, buffer.getvalue()
    for suffix in ("png", "webp", "tif"):
        yield f"animated.{suffix}", encoded(suffix, save_all=True, append_images=[PICTURE.rotate(180)])
    yield "not finite.tif", tiff(np.full((HEIGHT, WIDTH), np.nan, np.float32))
    yield "uint32.tif", tiff(np.zeros((HEIGHT, WIDTH, 3), np.uint32), photometric="rgb")
    yield "cmyk16.tif", tiff(np.zeros((HEIGHT, WIDTH, 4), np.uint16), photometric="separated")
    yield "smaller.png", encoded("png", PICTURE.resize((WIDTH - 1, HEIGHT)))
    yield "other header.jpg", jpeg_of_size(WIDTH + 16, HEIGHT)
    for suffix in FORMATS:
        whole = encoded(suffix)
        for tenths in range(1, 10):
            yield f"cut at {tenths} tenths.{suffix}", whole[: len(whole) * tenths // 10]
    for suffix in ("png", "tif"):
        yield f"deep and cut.{suffix}", deep(suffix)[:2000]


def strange_photos():
    """(name, bytes) of what must be used."""
    yield "a jpeg.png", encoded("jpg")
    yield "a png.jpg", encoded("png")
    yield "a tiff.webp", encoded("tif")
    yield "SHOUTED.JPEG", encoded("jpg")
    yield "no suffix", encoded("webp")
    yield "räume und übel 房间 📷.jpg", encoded("jpg")
    for mode in ("CMYK", "L", "YCbCr"):
        yield f"{mode}.jpg", encoded("jpg", PICTURE.convert(mode))
    for mode in ("1", "L", "LA", "P", "RGBA"):
        yield f"{mode}.png", encoded("png", PICTURE.convert(mode))
    yield "transparent palette.png", encoded("png", PICTURE.convert("P"), transparency=0)
    yield "alpha.webp", encoded("webp", PICTURE.convert("RGBA"))
    yield "alpha.tif", encoded("tif", PICTURE.convert("RGBA"))
    yield "float.tif", tiff(np.zeros((HEIGHT, WIDTH), np.float32))
    yield "cmyk.tif", encoded("tif", PICTURE.convert("CMYK"))
    for suffix in ("png", "tif"):
        yield f"deep.{suffix}", deep(suffix)
        yield f"deep and grey.{suffix}", deep(suffix, "L")
    for orientation in range(1, 9):
        image, exif = turned(orientation)
        yield f"turned {orientation}.jpg", encoded("jpg", image, exif=exif)
    for suffix in ("png", "webp", "tif"):
        image, exif = turned(6)
        yield f"turned.{suffix}", encoded(suffix, image, exif=exif)
    yield "turned by nonsense.jpg", encoded("jpg", exif=turned(200)[1])
    yield "broken exif.jpg", encoded("jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    yield "progressive.jpg", encoded("jpg", progressive=True)
    yield "trailing.jpg", encoded("jpg") + bytes(5000)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    yield "profile.png", encoded("png", icc_profile=profile)
    yield "broken profile.jpg", encoded("jpg", icc_profile=profile[:100])
    yield "pixel.png", encoded("png", PICTURE.resize((1, 1)))
    yield "line.jpg", encoded("jpg", PICTURE.resize((WIDTH, 1)))


def fill(folder):
    """(photo, expectation) of COUNT photos in a folder."""
    rng = np.random.default_rng(1)
    made = []
    for expected, photos in ((BAD, bad_photos()), (USED, strange_photos())):
        for name, content in photos:
            (folder / name).write_bytes(content)
            made.append((folder / name, expected))
    (folder / "folder.jpg").mkdir()
    (folder / "dangling.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "circle.jpg").symlink_to(folder / "circle.jpg")
    (folder / "null.jpg").symlink_to(os.devnull)
    os.mkfifo(folder / "pipe.jpg")
    made += [(folder / f"{name}.jpg", BAD) for name in ("folder", "dangling", "circle", "null", "pipe", "missing")]
    (folder / "link.jpg").symlink_to(folder / "progressive.jpg")
    (folder / "locked.jpg").write_bytes(encoded("jpg"))
    (folder / "locked.jpg").chmod(0)
    made += [(folder / "link.jpg", USED), (folder / "locked.jpg", USED if os.access(folder / "locked.jpg", os.R_OK) else BAD)]
    whole = [(suffix, encoded(suffix)) for suffix in FORMATS] + [("tif", deep("tif")), ("png", deep("png"))]
    while len(made) < COUNT:
        suffix, content = whole[len(made) % len(whole)]
        photo = folder / f"{len(made)}.{suffix}"
        damaged = bytearray(content)
        if len(made) % 4 == 0:
            del damaged[rng.integers(1, len(damaged)) :]
        for at in rng.integers(0, len(damaged), rng.integers(1, 6)):
            damaged[at] ^= rng.integers(1, 256)
        photo.write_bytes(damaged)
        made.append((photo, EITHER))
    return made


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}, {"restart_marker_blocks": 2}], ids=str)
def test_a_jpeg_cut_short_is_refused_or_kept_with_a_word(tmp_path, mode, options):
    path, whole = tmp_path / "a.jpg", encoded("jpg", PICTURE.convert(mode), **options)
    for content in (whole, whole + bytes(5000)):
        path.write_bytes(content)
        assert read_photo(path).notes == []
    for content in (whole[:-300], whole[:-300] + b"\xff\xd9"):
        path.write_bytes(content)
        for read in (read_photo, check_photo, read_samples):
            with pytest.raises(UserError, match="a.jpg: the JPEG is damaged: "):
                read(path)
        photo = read_photo(path, keep_damaged=True)
        assert photo.pixels.shape == (HEIGHT, WIDTH, 3) and len(photo.notes) == 1


JPEGS = [
    ("RGB", {}),
    ("RGB", {"subsampling": 0}),
    ("RGB", {"optimize": True}),
    ("RGB", {"progressive": True}),
    ("RGB", {"restart_marker_blocks": 2}),
    ("L", {}),
    ("CMYK", {}),
]


def refused(path, content):
    """Whether a JPEG is refused, by all that read photos alike; one that can be kept has a note then."""
    path.write_bytes(content)
    outcomes = []
    for read in (read_photo, check_photo, read_samples):
        try:
            read(path)
            outcomes.append("")
        except UserError as error:
            outcomes.append(str(error))
    assert len(set(outcomes)) == 1
    try:
        photo = read_photo(path, keep_damaged=True)
        assert [f"{path}: the JPEG is damaged: {note}" for note in photo.notes] == [outcomes[0]] * bool(outcomes[0])
    except UserError as error:
        assert str(error) == outcomes[0]
    return bool(outcomes[0])


def test_damage_within_a_scan_is_refused_or_kept_with_a_word(tmp_path):
    """One byte is changed, or a part is missing. Some other bytes make another JPEG that is as good as the first."""
    rng = np.random.default_rng(2)
    changed = missing = 0
    for mode, options in JPEGS:
        whole = encoded("jpg", PICTURE.convert(mode), **options)
        assert not refused(tmp_path / "a.jpg", whole)
        for at in rng.integers(whole.index(b"\xff\xda") + 14, len(whole) - 40, 20):
            part = int(rng.integers(1, 256))
            changed += refused(tmp_path / "a.jpg", whole[:at] + bytes([whole[at] ^ part]) + whole[at + 1 :])
            missing += refused(tmp_path / "a.jpg", whole[:at] + whole[at + part :])
    assert changed > 40 and missing > 120  # of 140; 24 and 100 where libjpeg is not heard


@pytest.mark.parametrize("number", range(1, 10))
def test_a_progressive_jpeg_without_one_of_its_scans_is_refused(tmp_path, number):
    first, *scans = encoded("jpg", progressive=True)[:-2].split(b"\xff\xda")
    assert len(scans) == 10
    del scans[number]
    assert refused(tmp_path / "a.jpg", b"\xff\xda".join([first, *scans]) + b"\xff\xd9")


def test_a_jpeg_of_a_scan_for_each_colour_needs_them_all(tmp_path):
    header = encoded("jpg", Image.new("RGB", (8, 8)), subsampling=0).partition(b"\xff\xda")[0]
    scans = [b"\xff\xda\0\x08\1%c\0\0\x3f\0\x2b" % 1] + [b"\xff\xda\0\x08\1%c\x11\0\x3f\0\x0f" % i for i in (2, 3)]
    assert not refused(tmp_path / "a.jpg", header + b"".join(scans) + b"\xff\xd9")
    assert np.all(read_samples(tmp_path / "a.jpg") == 128)
    for number in range(3):
        assert refused(tmp_path / "a.jpg", header + b"".join(scans[:number] + scans[number + 1 :]) + b"\xff\xd9")


def test_a_jpeg_whose_data_are_too_many_is_refused(tmp_path):
    whole = encoded("jpg")
    (tmp_path / "a.jpg").write_bytes(whole[:-2] + bytes(range(1, 201)) + whole[-2:])
    with pytest.raises(UserError, match="the JPEG is damaged: it has data that belong to no pixel"):
        read_photo(tmp_path / "a.jpg")


def test_what_does_not_bear_on_the_pixels_is_no_damage(tmp_path):
    """A scan's header that speaks of progression where there is none, as of some phones, and a profile's parts out of order."""
    whole = encoded("jpg")
    at = whole.index(b"\xff\xda") + 12
    profile = encoded("jpg", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for content in (whole[:at] + b"\1" + whole[at + 1 :], profile.replace(b"ICC_PROFILE\0\1\1", b"ICC_PROFILE\0\7\1")):
        (tmp_path / "a.jpg").write_bytes(content)
        np.testing.assert_array_equal(read_samples(tmp_path / "a.jpg"), np.asarray(Image.open(io.BytesIO(whole))))


@pytest.mark.filterwarnings("ignore:.*sampled in a rare way")
def test_a_jpeg_of_a_rare_sampling_is_read_with_a_word(tmp_path):
    path, whole = tmp_path / "a.jpg", encoded("jpg", PICTURE.convert("CMYK"), subsampling=2)
    path.write_bytes(whole)
    np.testing.assert_array_equal(read_samples(path), np.asarray(Image.open(path).convert("RGB")))
    assert read_photo(path).notes == ["its colours are sampled in a rare way, in which damage is not found"]
    assert refused(path, whole[:-300])


@pytest.mark.parametrize("at_least", [0, 8, 15, 16, 30])
@pytest.mark.parametrize("mode, options", [*JPEGS, ("RGB", {"subsampling": 1}), ("RGB", {"keep_rgb": True})])
def test_the_pixels_of_jpegs_are_pillows(tmp_path, mode, options, at_least):
    for size in ((WIDTH, HEIGHT), (61, 47), (8, 9)):
        (tmp_path / "a.jpg").write_bytes(encoded("jpg", PICTURE.resize(size).convert(mode), **options))
        with Image.open(tmp_path / "a.jpg") as image:
            if at_least:
                image.draft(image.mode, (at_least, at_least))
            np.testing.assert_array_equal(read_samples(tmp_path / "a.jpg", at_least), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("side", [1, 8, 9, 16, 17])
@pytest.mark.parametrize("level", [0, 1, 127, 128, 129, 255])
def test_a_plain_jpeg_is_not_taken_for_a_damaged_one(tmp_path, side, level):
    for mode, options in (("RGB", {}), ("L", {}), ("RGB", {"subsampling": 0, "quality": 100})):
        image = Image.new("L", (side, side), level).convert(mode)
        (tmp_path / "a.jpg").write_bytes(encoded("jpg", image, **options))
        assert read_photo(tmp_path / "a.jpg").notes == []


def test_no_library_speaks_for_itself(tmp_path, capfd):
    data = bytearray(encoded("tif"))
    data[300:600] = bytes(byte ^ 0x55 for byte in data[300:600])
    (tmp_path / "a.tif").write_bytes(data)
    odd = bytearray(tiff(np.zeros((HEIGHT, WIDTH, 3), np.uint8), photometric="rgb"))
    struct.pack_into("<H", odd, odd.index(struct.pack("<HHI", 277, 3, 1)) + 8, 60_000)  # samples a pixel: Pillow logs it
    (tmp_path / "b.tif").write_bytes(odd)
    raw = io.BytesIO()
    write_dng(raw, np.full((HEIGHT, WIDTH), 600, np.uint16), (1, 1, 1, 1, 1, 1))
    (tmp_path / "c.dng").write_bytes(raw.getvalue()[:-1000])
    for name, reason in (("a.tif", "cannot be read: its data are damaged"), ("b.tif", "not a "), ("c.dng", "cannot be read: ")):
        for read in (read_photo, check_photo, read_samples):
            with pytest.raises(UserError) as caught:
                read(tmp_path / name)
            assert str(caught.value).startswith(f"{tmp_path / name}: {reason}")
    assert capfd.readouterr() == ("", "")


def test_what_a_library_warns_of_is_noted_on_its_photo(tmp_path, recwarn):
    """Not on one that another thread reads, and each time; what is none of its business is passed on."""
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\2" + struct.pack(">HHII", 271, 2, 90, 26)
    for number in range(12):
        (tmp_path / f"{number}.jpg").write_bytes(encoded("jpg", exif=exif if number % 2 else b""))

    def notes(number):
        warnings.warn("of others", stacklevel=1)
        return read_photo(tmp_path / f"{number}.jpg").notes

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(notes, range(12)))
    assert found[::2] == [[]] * 6 and found[1] and found[1::2] == [found[1]] * 6
    assert {str(warning.message) for warning in recwarn} == {"of others"}


def test_what_is_written_of_a_photo_is_taken_out_of_standard_error(capfd):
    said = []
    with written("/a/b.nef", said):
        os.write(2, b"50 %/a/b.nef: data corrupted at 80\nother words\n")
    assert said == ["data corrupted at 80"] and capfd.readouterr().err == "50 %other words\n"


def test_a_png_whose_sums_are_wrong_is_refused(tmp_path):
    """Pillow passes over zeros in many places."""
    whole = encoded("png")
    for at in range(len(whole) - 420, len(whole) - 40, 8):
        (tmp_path / "a.png").write_bytes(whole[:at] + bytes(20) + whole[at + 20 :])
        for read in (read_photo, check_photo, read_samples):
            with pytest.raises(UserError, match="a.png: cannot be read: its data are damaged"):
                read(tmp_path / "a.png")


def test_a_kind_of_tiff_is_refused_by_its_name(tmp_path):
    (tmp_path / "a.tif").write_bytes(tiff(np.zeros((HEIGHT, WIDTH, 3), np.uint32), photometric="rgb"))
    with pytest.raises(UserError, match="got 32 bits of RGB \\(uint32\\)"):
        read_photo(tmp_path / "a.tif")


@pytest.mark.filterwarnings("ignore")  # decoders say in many ways that a file is strange
def test_200_damaged_or_strange_photos(tmp_path, capsys):
    photos = fill(tmp_path)
    assert len(photos) == COUNT
    sound = {size: tmp_path / f"sound {size[0]}x{size[1]}.png" for size in ((WIDTH, HEIGHT), (1, 1), (WIDTH, 1))}
    for size, file in sound.items():
        PICTURE.resize(size).save(file)
    partners = {"pixel.png": sound[1, 1], "line.jpg": sound[WIDTH, 1]}
    rows = []
    for number, (photo, _) in enumerate(photos):
        partner = partners.get(photo.name, sound[WIDTH, HEIGHT])
        src, tar = (photo, partner) if number % 2 else (partner, photo)
        rows.append(json.dumps({"src": src.name, "tar": tar.name}))
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(rows), "utf-8")
    pairs = read_pairs(file)

    with pytest.raises(UserError) as caught:
        check_pairs(pairs)
    title, *problems = str(caught.value).splitlines()
    named = {}
    for problem in problems:
        number = int(problem.strip().removeprefix(f"{file}:").partition(":")[0])
        named[number - 1] = problem
        assert str(photos[number - 1][0]) in problem or "expected photos of one size" in problem
    assert title == f"{len(problems)} problems in the pairs:" and len(named) == len(problems)
    for number, (photo, expected) in enumerate(photos):
        assert expected == EITHER or (number in named) == (expected == BAD), (photo.name, named.get(number))
    damaged = [number for number, (_, expected) in enumerate(photos) if expected == EITHER]
    assert 10 < sum(number in named for number in damaged) < len(damaged)

    # Training names the very same, and has written nothing.
    tiny = {"dim": 8, "num_blocks": [1, 1, 1, 1], "num_refinement_blocks": 0}
    settings = {"model": "restormer_nano", "model_args": tiny, "size": 16, "batch_size": 8, "epochs": 1, "device": "cpu"}
    PICTURE.rotate(180).save(tmp_path / "val.png")
    (tmp_path / "val.jsonl").write_text('{"src": "val.png", "tar": "val.png"}')
    config = TrainConfig(**settings, workers=0, train_pairs=file, val_pairs=tmp_path / "val.jsonl", out=tmp_path / "run")
    with pytest.raises(UserError) as caught_again:
        train(config)
    assert str(caught_again.value) == str(caught.value) and not config.out.exists()
    call = ["train", "demo", "--train-pairs", file, "--val-pairs", tmp_path / "val.jsonl", "--out", config.out]
    assert main([str(argument) for argument in call]) == 2
    assert str(caught.value) in capsys.readouterr().err and not config.out.exists()

    # The others are trained on, every one.
    rest = [pair for number, pair in enumerate(pairs) if number not in named]
    for index in range(len(rest)):
        sample = PairDataset(rest, 16)[index]
        assert sample["src"].shape == sample["tar"].shape == (3, 16, 16)
        assert torch.isfinite(sample["src"]).all() and torch.isfinite(sample["tar"]).all()
    write_pairs(tmp_path / "rest.jsonl", rest)
    summary = train(TrainConfig(**(vars(config) | {"train_pairs": tmp_path / "rest.jsonl"})))
    assert summary.epochs == 1 and len(rest) > 60


def test_what_libjpeg_minds_and_no_pixel_does(tmp_path):
    """Zeros before the end, as drones write them, and a version of JFIF that there is not yet; other bytes there are damage."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "sound.jpg", quality=95)
    sound = (tmp_path / "sound.jpg").read_bytes()
    version = sound.index(b"JFIF\0") + 5
    for name, data in (
        ("zeros", sound[:-2] + bytes(16) + sound[-2:]),
        ("filled", sound[:-2] + bytes(16) + b"\xff\xff" + sound[-2:]),
        ("version", sound[:version] + b"\2" + sound[version + 1 :]),
    ):
        (tmp_path / f"{name}.jpg").write_bytes(data)
        photo = read_photo(tmp_path / f"{name}.jpg")
        assert np.array_equal(photo.pixels, read_photo(tmp_path / "sound.jpg").pixels) and not photo.notes, name
    (tmp_path / "more.jpg").write_bytes(sound[:-2] + b"more" * 4 + sound[-2:])
    with pytest.raises(UserError, match="data that belong to no pixel"):
        read_photo(tmp_path / "more.jpg")
