"""Damaged at random: photos of every kind through the reader and the command line. None may crash, hang or end in a traceback, no
library may speak for itself, and no JPEG may come out damaged without a word.
"""

import io
import json
import subprocess
import sys
import warnings
from pathlib import Path

import imagecodecs
import numpy as np
import pillow_heif
import pytest
import tifffile
from PIL import Image, ImageCms

from autohdr.cli import main
from autohdr.data.images import read_photo

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from formats import write_dng  # noqa: E402

HEIGHT, WIDTH = 48, 64
SECONDS = 20  # of a processor, for a photo
READER = f"""
import json, signal, sys, warnings
from pathlib import Path
from autohdr.data.images import check_photo, photo_layout, read_exif, read_photo, read_samples
from autohdr.errors import UserError

warnings.simplefilter("ignore")  # what read_samples says
for path in sorted(Path(sys.argv[1]).iterdir()):
    print(json.dumps(path.name), flush=True)
    signal.setitimer(signal.ITIMER_PROF, {SECONDS})
    outcome = {{}}
    for read in (read_photo, check_photo, photo_layout, read_exif, read_samples):
        try:
            found = read(path)
            outcome[read.__name__] = found.notes if read is read_photo else None
        except UserError as error:
            outcome[read.__name__] = str(error)
    print(json.dumps(outcome), flush=True)
"""


def picture():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


def encoded(format, mode="RGB", **options):
    buffer = io.BytesIO()
    picture().convert(mode).save(buffer, format, **options)
    return buffer.getvalue()


def tiff(dtype, **options):
    samples = np.asarray(picture()).astype(dtype)
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, samples / dtype(255) if np.dtype(dtype).kind == "f" else samples, photometric="rgb", **options)
    return buffer.getvalue()


def heic(**options):
    buffer = io.BytesIO()
    pillow_heif.from_pillow(picture()).save(buffer, **options)
    return buffer.getvalue()


def dng():
    mosaic = np.random.default_rng(0).integers(512, 16512, (HEIGHT, WIDTH), dtype=np.uint16)
    buffer = io.BytesIO()
    write_dng(buffer, mosaic, (1, 2, 1, 1, 1, 2))
    return buffer.getvalue()


def kinds():
    """(suffix, file) of every kind."""
    exif = Image.Exif()
    exif[271], exif[274] = "Maker", 6
    said = {"exif": exif.tobytes(), "icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()}
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    jpegs = [{}, {"subsampling": 0}, {"progressive": True}, {"optimize": True}, {"restart_marker_blocks": 2}]
    yield from ((".jpg", encoded("JPEG", **options)) for options in jpegs)
    yield from ((".jpg", encoded("JPEG", mode)) for mode in ("L", "CMYK"))
    yield ".jpg", encoded("JPEG", xmp=xmp, comment=b"a remark", dpi=(300, 300), **said)
    yield ".jpg", encoded("MPO", save_all=True, append_images=[picture()])
    yield from ((".png", encoded("PNG", mode)) for mode in ("1", "L", "P", "RGB", "RGBA"))
    yield ".png", encoded("PNG", **said)
    yield ".png", imagecodecs.png_encode(np.asarray(picture()).astype(np.uint16) * 257)
    yield from ((".webp", encoded("WEBP", **options)) for options in ({}, {"lossless": True}, {"xmp": xmp, **said}))
    yield ".webp", encoded("WEBP", "RGBA")
    yield from ((".avif", encoded("AVIF", **options)) for options in ({}, {"xmp": xmp, **said}))
    yield ".avif", imagecodecs.avif_encode(np.asarray(picture()).astype(np.uint16) * 4, bitspersample=10)
    yield from ((".heic", heic(**options)) for options in ({}, {"exif": exif.tobytes(), "xmp": xmp}))
    yield from ((".jxl", imagecodecs.jpegxl_encode(np.asarray(picture()), usecontainer=boxed)) for boxed in (False, True))
    yield ".jxl", imagecodecs.jpegxl_encode(np.asarray(picture()).astype(np.uint16) * 257, lossless=True)  # with a profile
    yield ".jxl", imagecodecs.jpegxl_encode_jpeg(encoded("JPEG", xmp=xmp, **said))
    yield ".dng", dng()
    yield from ((".tif", encoded("TIFF", compression=name)) for name in (None, "tiff_lzw", "packbits", "tiff_adobe_deflate"))
    yield ".tif", encoded("TIFF", compression="jpeg", **said)
    yield ".tif", encoded("TIFF", "1", compression="group4")
    yield from ((".tif", tiff(dtype)) for dtype in (np.uint16, np.float16, np.float32))
    yield ".tif", tiff(np.uint16, compression="zlib", predictor=True, rowsperstrip=8)
    yield ".tif", tiff(np.float32, compression="zlib", tile=(16, 16))
    yield ".tif", tiff(np.uint16, compression="lzw", byteorder=">")
    yield ".tif", tiff(np.uint16, bigtiff=True)


def damaged(whole, rng):
    """A file with one kind of damage, and its name."""
    data = bytearray(whole)
    kind = str(rng.choice(["cut", "bytes", "bits", "header", "zeros", "swapped", "missing", "doubled"]))
    first, second = sorted(rng.integers(1, len(data), 2))
    length = int(rng.integers(1, max(2, len(data) // 4)))
    if kind == "cut":
        del data[first:]
    elif kind in ("bytes", "bits", "header"):
        for at in rng.integers(0, min(len(data), 600) if kind == "header" else len(data), rng.integers(1, 9)):
            data[at] ^= int(rng.integers(1, 256)) if kind != "bits" else 1 << int(rng.integers(8))
    elif kind == "zeros":
        data[first : first + length] = bytes(len(data[first : first + length]))
    elif kind == "swapped":
        middle = (first + second) // 2
        data[first:second] = data[middle:second] + data[first:middle]
    elif kind == "missing":
        del data[first : first + length]
    else:
        data[first:first] = data[first : first + length]
    return kind, bytes(data)


def fill(folder, count, seed):
    """Fills a folder with damaged photos, one in eight with the suffix of another kind."""
    rng, whole = np.random.default_rng(seed), list(kinds())
    suffixes = sorted({suffix for suffix, _ in whole})
    folder.mkdir()
    for number in range(count):
        suffix, content = whole[number % len(whole)]
        kind, content = damaged(content, rng)
        named = str(rng.choice(suffixes)) if rng.integers(8) == 0 else suffix
        (folder / f"{number:04} {suffix[1:]} {kind}{named}").write_bytes(content)


def read(folder):
    """{name: outcome} of the photos in a folder, read in a process of its own."""
    command = [sys.executable, "-c", READER, folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS * len(list(folder.iterdir())))
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and not done.stderr, (done.returncode, lines[-1:], done.stderr)
    return dict(zip(lines[::2], lines[1::2], strict=True))


def check_reading(folder):
    """Returns the names of those that can be read."""
    readable, unheard, torn = set(), 0, 0
    for name, outcome in read(folder).items():
        refused = {function for function, said in outcome.items() if isinstance(said, str)}
        assert all(outcome[function].startswith(f"{folder / name}: ") for function in refused)
        pixels = {"read_photo", "check_photo", "read_samples"}
        assert refused >= pixels or not refused & pixels, (name, outcome)
        readable |= set() if refused >= pixels else {name}
        _, suffix, kind = Path(name).stem.split()
        if suffix == "jpg" and kind in ("cut", "zeros", "swapped", "missing", "doubled"):
            torn, silent = torn + 1, outcome["read_photo"] == []
            unheard += silent
            assert not (silent and kind == "cut"), name
    assert torn > 10 and unheard < 0.1 * torn  # bytes that fit where they came to lie make another JPEG
    return readable


def check_batch(folder, out, capfd):
    """The same through the command line."""
    capfd.readouterr()
    with warnings.catch_warnings(record=True) as warned:
        assert main(["enhance", str(folder), "--out", str(out), "--json", "--property", "--brackets", "auto"]) == 1
    assert [str(warning.message) for warning in warned] == []
    printed, said = capfd.readouterr()
    result = json.loads(printed)
    photos = {str(path) for path in folder.iterdir()}
    failed, skipped, noted = ({entry["source"] for entry in result[kind]} for kind in ("failed", "skipped", "notes"))
    counts = {"done_before": 0, "written": len(photos - failed), "skipped": 0, "failed": len(failed)}
    assert result["counts"] == counts and failed | noted <= photos and not skipped and not failed & noted
    starts = ("enhance: ", *(f"{kind}{path}: " for kind in ("failed ", "") for path in photos))
    assert [line for line in said.splitlines() if not line.startswith(starts)] == []
    records = [json.loads(line) for line in (out / "autohdr.jsonl").read_text().splitlines()]
    assert {record["source"]: record["status"] for record in records} == {
        path: "failed" if path in failed else "written" for path in photos
    }
    results = {record["result"] for record in records if record["status"] == "written"}
    assert {path.name for path in out.iterdir()} == results | {"autohdr.jsonl"}
    return {Path(record["source"]).name for record in records if record["status"] == "written"}, results


@pytest.mark.parametrize("count, seed", [(48, 0), pytest.param(1000, 1, marks=pytest.mark.drill)])
def test_photos_damaged_at_random(tmp_path, capfd, count, seed):
    fill(tmp_path / "in", count, seed)
    readable = check_reading(tmp_path / "in")
    written, results = check_batch(tmp_path / "in", tmp_path / "out", capfd)
    assert written == readable and len(written) > count / 8
    for name in results:
        read_photo(tmp_path / "out" / name)
