"""The enhancer on real files: what is written, skipped and failed, what is refused before any work."""

import json
import os
import pickle
import subprocess
import sys

import imagecodecs
import numpy as np
import pillow_heif
import pytest
import torch
from PIL import ExifTags, Image, ImageCms
from recorded_graphs import recorded  # noqa: F401  a fixture
from torch import nn

from autohdr import measure as measuring
from autohdr.autotone import auto_tone
from autohdr.data.colour import decode_srgb
from autohdr.data.images import Photo, from_float, photo_layout, read_photo, read_rgb, read_samples, to_float, write_photo
from autohdr.edits import SHIPPED, Edit, edited_by, shipped
from autohdr.enhance import Enhancer, enhance, enhancer, networks
from autohdr.errors import UserError
from autohdr.kernels import apply_edit, backends
from autohdr.measure import resident_bytes
from autohdr.metrics import srgb_to_lab
from autohdr.models import Bridge, Sampler, combine, create_model, load_checkpoint, save_weights
from autohdr.models.graphs import REPEATS
from autohdr.models.tiling import in_strips, rows_in_strips
from autohdr.plan import plan


def room(height=40, width=60):
    """Dim walls and furniture, uint8 (height, width, 3)."""
    walls = np.linspace(0.4, 0.55, width)[:, None] * (1, 0.93, 0.8) + np.random.default_rng(0).normal(0, 0.01, (height, width, 1))
    walls[height // 2 :] *= np.random.default_rng(1).uniform(0.3, 0.9, (height - height // 2, width, 1))
    return from_float(walls.astype(np.float32))


class Invert(nn.Module):
    """1 - x; remembers what it was given."""

    def forward(self, x):
        self.shape, self.dtype, self.seen_grad = x.shape, x.dtype, torch.is_grad_enabled()
        self.channels_last = x.is_contiguous(memory_format=torch.channels_last)
        return 1 - x


class Matmul(nn.Module):
    """Something that autocast runs in its own precision."""

    def forward(self, x):
        y = torch.einsum("bchw,cd->bdhw", x, torch.eye(3))
        self.dtype = y.dtype
        return y


class Fails(nn.Module):
    """Raises for photos of more than 100 pixels, whatever `error` makes."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        if x.shape[2] * x.shape[3] > 100:
            self.error()
        return x


def save(path, height=9, width=13, format="PNG", depth=8, **fields):
    path.parent.mkdir(parents=True, exist_ok=True)
    dtype = np.uint8 if depth == 8 else np.uint16
    samples = np.random.default_rng(height * width).integers(0, 2**depth, (height, width, 3), dtype=dtype)
    write_photo(path, Photo(to_float(samples), format, depth, **fields))
    return samples


def run(paths, out, model=None, **options):
    return enhance(paths, out, model, progress=False, **options)


def written(folder):
    """The names in a folder of results, but for the manifest's."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".jsonl")


@pytest.mark.parametrize("format, depth", [("PNG", 8), ("PNG", 16), ("TIFF", 8), ("TIFF", 16)])
def test_model_enhances_at_full_resolution_in_the_original_format(tmp_path, format, depth):
    samples = save(tmp_path / "a.img", 11, 17, format, depth)
    model = Invert().train()
    result = run([tmp_path / "a.img"], tmp_path / "out", model)
    assert result.written == [tmp_path / "out/a.img"] and result.skipped == []
    photo = read_photo(tmp_path / "out/a.img")
    assert (photo.format, photo.depth) == (format, depth)
    np.testing.assert_array_equal(from_float(photo.pixels, depth), 2**depth - 1 - samples)
    assert model.shape == (1, 3, 11, 17) and model.dtype == torch.float32
    assert model.channels_last and not model.seen_grad and not model.training
    assert result.megapixels == pytest.approx(11 * 17 / 1e6) and result.seconds > 0


def test_auto_tone_without_a_model(tmp_path):
    samples = save(tmp_path / "a.png")
    run([tmp_path / "a.png"], tmp_path / "out")
    edited = read_samples(tmp_path / "out/a.png")
    np.testing.assert_array_equal(edited, auto_tone(samples))
    np.testing.assert_allclose(edited, from_float(auto_tone(to_float(samples))), atol=1)


@pytest.mark.parametrize("depth", [8, 16])
def test_a_model_that_takes_samples_gets_the_files_own(tmp_path, depth):
    samples = save(tmp_path / "a.png", depth=depth)
    model = create_model("lite", members=1)
    seen = []
    predict = model.predict
    model.predict = lambda image: seen.append(image.dtype) or predict(image)
    run([tmp_path / "a.png"], tmp_path / "out", model)
    assert seen == [torch.uint8 if depth == 8 else torch.uint16]
    np.testing.assert_array_equal(read_samples(tmp_path / "out/a.png"), auto_tone(samples))  # an untrained one is the auto-tone


@pytest.mark.parametrize("model", [None, Invert()], ids=["samples", "floats"])
def test_strength(tmp_path, model):
    samples = save(tmp_path / "a.png", 80, 9).astype(float)
    edits = {}
    for strength in (0, 0.25, 1, 1.5):
        run([tmp_path / "a.png"], tmp_path / f"{strength}", model, strength=strength)
        edits[strength] = read_samples(tmp_path / f"{strength}/a.png").astype(float)
    np.testing.assert_array_equal(edits[0], samples)
    for strength in (0.25, 1.5):
        np.testing.assert_allclose(edits[strength], (samples + strength * (edits[1] - samples)).clip(0, 255), atol=1)
    with pytest.raises(UserError, match="strength must be from 0 to 2, got 3"):
        run([tmp_path / "a.png"], tmp_path / "out", model, strength=3)


def test_the_edit_is_saved_beside_the_photo(tmp_path):
    """What is in JSON is what was done, and what is in the look-up table, between whose points nothing bends but the curves, is
    all of it but the tilt."""
    samples = room()
    Image.fromarray(samples).save(tmp_path / "a.png")
    result = run([tmp_path / "a.png"], tmp_path / "out", load_checkpoint(), save_edit=True, strength=0.8)
    assert not result.notes and read_samples(tmp_path / "out/a.png").mean() > samples.mean() + 20
    head, *rows = (tmp_path / "out/a.cube").read_text().splitlines()
    table = np.array([row.split() for row in rows], float)
    assert head == "LUT_3D_SIZE 33" and table.shape == (33**3, 3)
    edit = json.loads((tmp_path / "out/a.json").read_text())
    curves, matrix = (torch.tensor([edit[name]]) for name in ("curves", "matrix"))
    x = torch.from_numpy(samples / np.float32(255)).permute(2, 0, 1)[None]
    done = edited_by(x, Edit(curves, matrix, torch.tensor([[[edit["tilt"]]]])))
    assert edit["tilt"] > 0.1
    expected = (x + edit["strength"] * (done - x))[0].permute(1, 2, 0).clamp(0, 1).numpy() * 255
    np.testing.assert_allclose(read_samples(tmp_path / "out/a.png"), expected, atol=1.01)
    place = [round(32 * value) for value in (0.25, 0.5, 0.75)]  # red, green, blue
    colour = torch.tensor(place).view(1, 3, 1, 1) / 32
    done = (colour + 0.8 * (apply_edit(colour, curves, matrix) - colour)).flatten().clamp(0, 1)
    np.testing.assert_allclose(table[place[0] + 33 * place[1] + 33**2 * place[2]], done.numpy(), atol=2e-6)
    with pytest.raises(UserError, match="save_edit is for a model that predicts an edit, as lite does, got the auto-tone"):
        run([tmp_path / "a.png"], tmp_path / "out", save_edit=True)


def test_a_photo_unlike_what_lite_learnt_from_is_named(tmp_path):
    """It is written with a part of the edit, or none; a room gets all of it, and a white page has none to lose."""
    pictures = {"room": room(), "red": np.full((40, 60, 3), (180, 40, 50), np.uint8), "page": np.full((40, 60, 3), 250, np.uint8)}
    pictures["night"] = np.where(np.arange(60)[:, None] < 4, 255, room() // 12).astype(np.uint8)
    for name, samples in pictures.items():
        Image.fromarray(samples).save(tmp_path / f"{name}.png")
    result = run([tmp_path / f"{name}.png" for name in pictures], tmp_path / "out", load_checkpoint())
    assert len(result.written) == 4
    reasons = {path.stem: reason for path, reason in result.notes}
    assert set(reasons) == {"red", "night"} and reasons["red"].startswith("its colours are ")
    assert reasons["red"].endswith(" standard deviations from what lite learnt from: 0% of the edit is made")
    assert np.abs(read_samples(tmp_path / "out/red.png").astype(int) - pictures["red"]).max() <= 1


def test_metadata_is_kept_and_the_photo_upright(tmp_path):
    exif = Image.Exif()
    exif[271], exif[274] = "Maker", 6
    Image.new("RGB", (20, 10), (9, 99, 199)).save(tmp_path / "a.jpg", exif=exif, icc_profile=b"\0" * 16 + b"RGB " * 30)
    run([tmp_path / "a.jpg"], tmp_path / "out", nn.Identity())
    with Image.open(tmp_path / "out/a.jpg") as image:
        assert image.format == "JPEG" and image.size == (10, 20)
        assert dict(image.getexif()) == {271: "Maker", 274: 1}
        assert image.info["icc_profile"] == b"\0" * 16 + b"RGB " * 30


def test_a_photo_of_another_colour_space_is_edited_in_srgb(tmp_path):
    """The same picture in sRGB and in Adobe RGB has the same result, to the eye."""
    corners = [0.64, 0.33, 1.0, 0.21, 0.71, 1.0, 0.15, 0.06, 1.0]
    adobe = imagecodecs.cms_profile("rgb", whitepoint=[0.3127, 0.329, 1.0], primaries=corners, gamma=2.19921875)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels = np.random.default_rng(0).random((20, 30, 3)).astype(np.float32) * 0.8 + 0.1
    kinds = {"colorspace": "rgb", "outcolorspace": "rgb", "outdtype": np.float32, "intent": 1}
    for name, own, icc in (("a", pixels, srgb), ("b", imagecodecs.cms_transform(pixels, srgb, adobe, **kinds), adobe)):
        write_photo(tmp_path / f"{name}.png", Photo(own, "PNG", 16, icc_profile=icc))
    for model in (load_checkpoint(), None, Invert()):
        run([tmp_path / "a.png", tmp_path / "b.png"], tmp_path / "out", model, on_exists="overwrite")
        wanted, got = (read_photo(tmp_path / "out" / name) for name in ("a.png", "b.png"))
        assert got.icc_profile == adobe and wanted.icc_profile == srgb
        seen = imagecodecs.cms_transform(got.pixels, adobe, srgb, **kinds)
        lab = [srgb_to_lab(torch.from_numpy(x.clip(0, 1)).permute(2, 0, 1)[None]) for x in (seen, wanted.pixels)]
        assert (lab[0] - lab[1]).norm(dim=1).max() < 0.5
    run([tmp_path / "b.png"], tmp_path / "none", Invert(), strength=0)
    np.testing.assert_array_equal(read_photo(tmp_path / "none/b.png").pixels, read_photo(tmp_path / "b.png").pixels)


def test_a_photo_with_a_grey_profile_stays_so_where_its_edit_is_grey(tmp_path):
    icc = imagecodecs.cms_profile("gray", whitepoint=[0.3127, 0.329, 1.0], gamma=1.0)
    Image.fromarray(np.arange(200, dtype=np.uint8).reshape(10, 20)).save(tmp_path / "a.png", icc_profile=icc)
    assert run([tmp_path / "a.png"], tmp_path / "out", Invert()).notes == []
    with Image.open(tmp_path / "out/a.png") as image:
        assert image.mode == "L" and image.info["icc_profile"] == icc
    seen = np.rint(read_rgb(tmp_path / "a.png") * 255)
    assert np.abs(seen[0, 1] - 13).max() == 0  # 1 of 255 in linear light
    np.testing.assert_allclose(read_rgb(tmp_path / "out/a.png")[:3], 1 - read_rgb(tmp_path / "a.png")[:3], atol=0.01)
    red = nn.Identity()
    red.forward = lambda x: x * torch.tensor([1.0, 0.5, 0.5]).view(1, 3, 1, 1)
    result = run([tmp_path / "a.png"], tmp_path / "red", red)
    assert "the result is in sRGB" in result.notes[0][1]
    with Image.open(tmp_path / "red/a.png") as image:
        assert image.mode == "RGB" and "icc_profile" not in image.info


def test_what_may_be_a_photo_in_a_folder_is_never_passed_over(tmp_path):
    save(tmp_path / "in/a.png")
    for name in ("b.HEIC", "c.cr2", "d.jp2", "e.gif"):
        (tmp_path / "in" / name).write_bytes(b"what is in it")
    (tmp_path / "in/f.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "in/g").symlink_to(tmp_path)
    (tmp_path / "in/h.bak").write_bytes((tmp_path / "in/a.png").read_bytes())
    for name in ("notes.txt", ".hidden.heic"):
        (tmp_path / "in" / name).write_text("none")
    for suffix in ("jpe", "jfif"):
        Image.new("RGB", (9, 9)).save(tmp_path / f"in/i.{suffix}", "JPEG")
    result = run([tmp_path / "in"], tmp_path / "out", nn.Identity())
    assert [path.name for path in result.written] == ["a.png", "i.jfif", "i.jpe"]
    assert [path.name for path, _ in result.skipped] == ["d.jp2", "e.gif", "f.jpg", "g", "h.bak"]
    assert [path.name for path, _ in result.failed] == ["b.HEIC", "c.cr2"]
    assert "of the kind .jp2" in result.skipped[0][1] and "a link to nothing" in result.skipped[2][1]
    (tmp_path / "in/a.png").unlink()
    (tmp_path / "only").mkdir()
    (tmp_path / "only/b.psd").write_text("none")
    assert len(run([tmp_path / "only"], tmp_path / "out", nn.Identity()).skipped) == 1


def test_a_heic_becomes_a_jpeg_and_each_format_that_is_asked_for(tmp_path):
    (tmp_path / "in").mkdir()
    pillow_heif.from_pillow(Image.fromarray(room())).save(tmp_path / "in/a.heic", quality=95)
    for options, suffix, kind, depth in (
        ({}, ".jpg", "JPEG", 8),
        ({"format": "tiff"}, ".tif", "TIFF", 8),
        ({"format": "png", "depth": 16}, ".png", "PNG", 16),
        ({"format": "avif", "subsampling": "420", "quality": 80}, ".avif", "AVIF", 8),
        ({"format": "webp", "strip": "all"}, ".webp", "WEBP", 8),
    ):
        result = run([tmp_path / "in"], tmp_path / f"out{suffix}", **options)
        assert result.written == [tmp_path / f"out{suffix}/a{suffix}"] and result.skipped == result.notes == []
        photo = read_photo(result.written[0])
        assert (photo.format, photo.depth) == (kind, depth)
        assert np.abs(photo.pixels - auto_tone(read_rgb(tmp_path / "in/a.heic"))).mean() < 0.03
    assert len(np.unique(read_samples(tmp_path / "out.png/a.png"))) > 300  # the edit has 16 bits, not what 8 of them give


def test_what_a_format_does_not_hold_is_noted(tmp_path):
    save(tmp_path / "a.png", 8, 9, "PNG", 16)
    result = run([tmp_path / "a.png"], tmp_path / "out", Invert(), format="jpeg")
    assert result.notes == [(tmp_path / "a.png", "16 bits a channel become 8: a JPEG holds no more")]


def test_results_that_would_have_one_name_keep_their_photos_suffixes(tmp_path):
    """As of a camera that writes raw files and JPEGs."""
    for name in ("a.png", "a.tif", "a.jpg", "b.tif"):
        save(tmp_path / "in" / name, 8, 9)
    result = run([tmp_path / "in", tmp_path / "in/a.tif"], tmp_path / "out", Invert(), format="jpeg")
    assert [path.name for path in result.written] == ["a.jpg", "a.png.jpg", "a.tif.jpg", "b.jpg"]
    save(tmp_path / "in/a.png.tif", 8, 9)
    save(tmp_path / "in/a.png.jpg", 8, 9)
    with pytest.raises(UserError, match="would both become"):
        run([tmp_path / "in"], tmp_path / "refused", Invert(), format="jpeg")
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"format": "heic"}, "format must be one of jpeg, png"),
        ({"format": "jpeg", "depth": 16}, "a JPEG holds 8 bits"),
        ({"depth": 12}, "depth must be one of 8, 16"),
        ({"subsampling": "411"}, "subsampling must be one of 444"),
        ({"strip": "name"}, "strip must be one of gps, all"),
    ],
)
def test_formats_that_there_are_not_are_refused(tmp_path, options, reason):
    save(tmp_path / "a.png", 8, 9)
    with pytest.raises(UserError, match=reason):
        run([tmp_path / "a.png"], tmp_path / "out", Invert(), **options)
    assert not (tmp_path / "out").exists()


def test_a_damaged_jpeg_fails_or_is_kept_with_a_note(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(tmp_path / "a.jpg", quality=95)
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[: len(data) // 2] + b"\xff\xd9")
    result = run([tmp_path / "a.jpg"], tmp_path / "out")
    assert not result.written and "its data end before the last pixel" in result.failed[0][1]
    result = run([tmp_path / "a.jpg"], tmp_path / "out", keep_damaged=True)
    assert result.written and result.notes == [(tmp_path / "a.jpg", "its data end before the last pixel")]


def test_alpha_is_kept(tmp_path):
    alpha = np.arange(9 * 13, dtype=np.uint8).reshape(9, 13)
    save(tmp_path / "a.png", alpha=alpha)
    run([tmp_path / "a.png"], tmp_path / "out", Invert())
    np.testing.assert_array_equal(read_photo(tmp_path / "out/a.png").alpha, alpha)


def test_bfloat16_runs_under_autocast(tmp_path):
    save(tmp_path / "a.png")
    model = Matmul()
    run([tmp_path / "a.png"], tmp_path / "out", model, precision="bfloat16")
    assert model.dtype == torch.bfloat16
    assert np.abs(read_rgb(tmp_path / "out/a.png") - read_rgb(tmp_path / "a.png")).max() < 0.01


@pytest.mark.parametrize("name", ["restormer_nano", "nafnet_nano", "swinir_nano", "mamba_diffusion_nano"])
def test_every_family_is_nearer_to_float32_in_float16_than_in_bfloat16(tmp_path, monkeypatch, name):
    """Whole and, where it works in strips, in these."""
    torch.manual_seed(0)
    model, pixels = create_model(name).eval(), np.random.default_rng(0).integers(0, 65536, (34, 45, 3), np.uint16)
    with torch.no_grad():  # some of these begin as the identity
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    write_photo(tmp_path / "a.png", Photo(pixels, "PNG", 16))

    def edited(precision):
        result = run([tmp_path / "a.png"], tmp_path / precision, model, precision=precision, on_exists="overwrite")
        assert not result.failed
        return read_rgb(tmp_path / precision / "a.png")

    exact, rough = edited("float32"), edited("bfloat16")
    assert np.abs(exact - to_float(pixels)).max() > 0.01
    for _ in range(2):
        assert 0 < np.abs(edited("float16") - exact).mean() < 0.4 * np.abs(rough - exact).mean()
        monkeypatch.setattr(networks.Networks, "_fits", lambda *arguments: False)


def test_what_overflows_in_float16_is_refused(tmp_path, monkeypatch):
    save(tmp_path / "a.png")
    torch.manual_seed(0)
    model = create_model("restormer_nano", dim=8).eval()
    with torch.no_grad():
        model.output.weight.mul_(1e8)
    assert run([tmp_path / "a.png"], tmp_path / "out", model, precision="bfloat16").written
    for fits in (True, False):
        monkeypatch.setattr(networks.Networks, "_fits", lambda *arguments, fits=fits: fits)
        result = run([tmp_path / "a.png"], tmp_path / "half", model, precision="float16")
        assert not result.written and not list((tmp_path / "half").glob("*.png"))
        assert "not finite in float16; its largest number is 65504: take bfloat16 or float32" in result.failed[0][1]


def test_folders_are_searched_and_keep_their_structure(tmp_path):
    for name in ("b.png", "a.PNG", "sub/deep/c.png", "._b.png", ".cache/d.png"):
        save(tmp_path / "in" / name)
    (tmp_path / "in/notes.txt").write_text("no photo")
    save(tmp_path / "single.img")
    result = run([tmp_path / "in", tmp_path / "single.img"], tmp_path / "out", nn.Identity())
    names = [path.relative_to(tmp_path / "out").as_posix() for path in result.written]
    assert names == ["a.PNG", "b.png", "single.img", "sub/deep/c.png"]
    files = {path for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files == {*result.written, result.manifest} and result.manifest == tmp_path / "out/autohdr.jsonl"


def test_an_output_folder_inside_the_input_is_not_searched(tmp_path):
    save(tmp_path / "in/a.png")
    for _ in range(2):
        result = run([tmp_path / "in"], tmp_path / "in/out", nn.Identity(), on_exists="overwrite")
        assert result.written == [tmp_path / "in/out/a.png"]


def test_unreadable_photos_fail_with_the_reason(tmp_path):
    save(tmp_path / "in/c.png")
    (tmp_path / "in/a.jpg").write_text("no photo")
    (tmp_path / "in/b.png").write_bytes((tmp_path / "in/c.png").read_bytes()[:-60])
    result = run([tmp_path / "in"], tmp_path / "out", nn.Identity())
    assert result.written == [tmp_path / "out/c.png"]
    assert [path.name for path, _ in result.failed] == ["a.jpg", "b.png"] and not result.skipped
    assert result.failed[0][1].startswith("not a JPEG") and result.failed[1][1].startswith("cannot be read")
    assert written(tmp_path / "out") == ["c.png"]


def raises(error):
    def fail():
        raise error

    return fail


@pytest.mark.parametrize(
    "error, wanted",
    [
        (lambda: torch.empty(2**48), "1,073,741,824 MiB"),
        (lambda: np.empty(2**58), "2.00 EiB"),
        (raises(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has")), "20.00 GiB"),
        (raises(RuntimeError("gdfn: cannot allocate 123 bytes for y")), ": 1 MiB"),
        (raises(RuntimeError("std::bad_alloc")), "out of memory"),
        (raises(MemoryError()), "out of memory"),
    ],
    ids=["torch", "numpy", "cuda", "kernel", "c++", "bare"],
)
def test_out_of_memory_fails_that_photo_alone(tmp_path, error, wanted):
    save(tmp_path / "in/a.png", 20, 30)
    save(tmp_path / "in/b.png", 5, 5)
    result = run([tmp_path / "in"], tmp_path / "out", Fails(error))
    assert [path.name for path in result.written] == ["b.png"]
    ((path, reason),) = result.failed
    assert path.name == "a.png" and reason.startswith("out of memory") and wanted in reason


STARVED = """
import resource, sys
from pathlib import Path
import torch
from autohdr.enhance import enhance
from autohdr.kernels import gdfn

def starved(x):  # the op may take half of what its output needs
    weights = [torch.ones(shape) for shape in ((3,), (16, 3, 1, 1), (16, 1, 3, 3), (3, 8, 1, 1))]
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    if x.numel() > 1e6:
        resource.setrlimit(resource.RLIMIT_AS, (used + x.nbytes // 2, limits[1]))
    try:
        return gdfn(x, weights[0], None, *weights[1:], backend="cpu")
    except RuntimeError as error:
        print(error)
        raise
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)

model = torch.nn.Identity()
model.forward = starved
result = enhance([sys.argv[1]], sys.argv[2], model, progress=False)
print([path.name for path in result.written], [(path.name, reason) for path, reason in result.failed])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits its memory as Linux does")
@pytest.mark.skipif(backends("gdfn")["cpu"] != "available", reason="no compiled kernels")
def test_a_compiled_op_without_memory_fails_that_photo_alone(tmp_path):
    save(tmp_path / "in/b.png", 5, 5)
    Image.new("RGB", (3000, 3000)).save(tmp_path / "in/a.png")  # 108 MB in float: too large for a piece of freed memory
    command = [sys.executable, "-c", STARVED, str(tmp_path / "in"), str(tmp_path / "out")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # a thread that cannot be started would end the process
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    error, outcome = done.stdout.strip().rsplit("\n", 1)
    assert "gdfn: cannot allocate 108000000 bytes" in error
    assert outcome == "['b.png'] [('a.png', 'out of memory: 103 MiB more was wanted')]"


def test_a_memory_limit_is_kept_to_and_changes_no_pixel(tmp_path, monkeypatch):
    save(tmp_path / "in/small.png", 9, 13, depth=16)
    save(tmp_path / "in/tall.png", 99, 13, depth=16)
    torch.manual_seed(0)
    model = create_model("restormer_nano", dim=8)
    result = run([tmp_path / "in"], tmp_path / "whole", model)
    assert len(result.written) == 2
    limit = resident_bytes() + 10**9
    monkeypatch.setattr(networks.Networks, "_fits", lambda *arguments: False)
    run([tmp_path / "in"], tmp_path / "limited", model, max_memory=limit)
    monkeypatch.undo()
    for name in ("small.png", "tall.png"):
        whole, limited = (read_samples(tmp_path / folder / name).astype(int) for folder in ("whole", "limited"))
        assert np.abs(whole - limited).max() <= 1 < np.ptp(whole)
    for amount, reason in ((0, "a photo of 13×9 pixels takes"), (10**6, "an image of 13×9 pixels in float32 takes")):
        too_little = run([tmp_path / "in"], tmp_path / "none", model, max_memory=amount and amount + resident_bytes())
        assert not too_little.written and reason in too_little.failed[0][1]
    for other in (None, nn.Identity()):
        with pytest.raises(
            UserError, match="max_memory is for networks that work in strips, as a Restormer does, got (Identity|the auto-tone)"
        ):
            run([tmp_path / "in"], tmp_path / "other", other, max_memory=limit)


def test_each_view_of_a_photo_goes_in_strips_where_it_must(tmp_path, monkeypatch):
    save(tmp_path / "in/photo.png", 21, 13, depth=16)
    torch.manual_seed(0)
    model, limit, made = combine([create_model("restormer_nano", dim=8)], flips=8), resident_bytes() + 10**9, []
    run([tmp_path / "in"], tmp_path / "whole", model)
    monkeypatch.setattr(networks.Networks, "_fits", lambda *arguments: False)
    monkeypatch.setattr(networks, "in_strips", lambda *arguments: made.append(arguments[1].shape) or in_strips(*arguments))
    run([tmp_path / "in"], tmp_path / "limited", model, max_memory=limit)
    assert made == [(1, 3, 21, 13)] * 4 + [(1, 3, 13, 21)] * 4
    whole, limited = (read_samples(tmp_path / folder / "photo.png").astype(int) for folder in ("whole", "limited"))
    assert np.abs(whole - limited).max() <= 1 < np.ptp(whole)
    with pytest.raises(UserError, match="max_memory is for networks that work in strips, as a Restormer does, got SelfEnsemble"):
        Enhancer(combine([create_model("lite")], flips=2), max_memory=limit)


@pytest.mark.parametrize("settings", [{}, {"fast": True}, {"flips": 2}])
def test_photos_of_one_size_replay_a_graph(tmp_path, recorded, settings):  # noqa: F811
    side = 64 if settings.get("fast") else 13
    for number in range(REPEATS + 3):
        save(tmp_path / f"in/{number}.png", side, side, depth=16)
    save(tmp_path / "in/other.png", side + 3, side, depth=16)
    torch.manual_seed(0)
    network = create_model("restormer_nano", dim=8)
    model, calls = combine([network], **settings), settings.get("flips", 1)
    run([tmp_path / "in"], tmp_path / "plain", model)
    run([tmp_path / "in"], tmp_path / "graphs", model, cuda_graphs=True)
    assert [graph.replays for graph in recorded] == [2 + calls * (REPEATS + 3) - REPEATS]
    for name in written(tmp_path / "plain"):
        plain, replayed = (read_samples(tmp_path / folder / name).astype(int) for folder in ("plain", "graphs"))
        assert np.abs(plain - replayed).max() <= 1 < np.ptp(plain)


def test_a_graphs_memory_is_free_for_strips(recorded):  # noqa: F811
    model = create_model("restormer_nano", dim=8)
    found, image = Enhancer(model, cuda_graphs=True).networks, torch.rand(1, 3, 13, 13)
    with found.inference():
        for _ in range(REPEATS + 1):
            found._pass(model, image)
    assert found._fits(model, image, 1, resident_bytes() + 10**9) and found._graphed._graph
    assert not found._fits(model, image, 1, resident_bytes()) and not found._graphed._graph


def test_graphs_of_what_has_none_are_refused():
    network, time = create_model("restormer_nano", dim=8), {"time_embedding": True}
    sampler = Sampler(create_model("mamba_diffusion_nano", **time), Bridge())
    for model, reason in [
        (None, "networks that make photos, got the auto-tone"),
        (create_model("lite"), "networks that make photos, got Lite"),
        (combine([network, network]), "expected one network, got 2"),
        (sampler, "expected a model that makes a photo in one pass, got a diffusion bridge"),
        (network, "expected a GPU, got device 'cpu'"),
    ]:
        with pytest.raises(UserError, match=f"cuda_graphs.* {reason}"):
            Enhancer(model, cuda_graphs=True)


class Plain(nn.Module):
    """Another model, of which an Enhancer knows nothing: it gets the whole photo in floating point."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


@pytest.mark.parametrize("settings", [{}, {"strength": 0.5}, {"depth": 16}, {"precision": "bfloat16"}], ids=str)
def test_an_edit_is_carried_up_by_rows_as_to_the_whole_photo(tmp_path, monkeypatch, settings):
    """Of whatever depth and colour space, and however little memory the network has."""
    deep = np.random.default_rng(0).integers(0, 65536, (130, 75, 3), np.uint16)
    write_photo(tmp_path / "deep.png", Photo(deep, "PNG", 16))
    write_photo(tmp_path / "p3.jpg", Photo((deep >> 8).astype(np.uint8), "PNG", icc_profile=p3_profile()))
    write_photo(tmp_path / "float.tif", Photo(to_float(deep), "TIFF", 32, options={"float": "f4"}))
    torch.manual_seed(0)
    model = combine([create_model("restormer_nano", dim=8)], fast=True)
    by_rows, whole, made = Enhancer(model, **settings), Enhancer(Plain(model), **settings), []
    limited = Enhancer(model, max_memory=resident_bytes() + 10**9, **settings)
    monkeypatch.setattr(networks, "in_strips", lambda *arguments: made.append(arguments[1].shape) or in_strips(*arguments))
    for photo in sorted(tmp_path.iterdir()):
        files = [by_rows.file(photo), whole.file(photo)]
        with monkeypatch.context() as without:
            without.setattr(networks.Networks, "_fits", lambda *arguments: False)
            files.append(limited.file(photo))
        pixels = []
        for name, (file, notes, reason) in zip("abc", files, strict=True):
            assert not reason and notes == files[0][1]
            (tmp_path.parent / name).write_bytes(file)
            pixels.append(read_photo(tmp_path.parent / name, as_stored=True).pixels)
        unit = 1e-5 if pixels[0].dtype.kind == "f" else 1
        for others in pixels[1:]:
            assert others.dtype == pixels[0].dtype
            assert np.abs(pixels[0].astype(float) - others).max() <= unit < np.ptp(pixels[0].astype(float)), photo
    assert made == [(1, 3, 44, 25)] * 3


def test_a_small_photo_is_edited_whole_and_fast_is_another_edit(tmp_path):
    save(tmp_path / "in/small.png", 63, 90)
    save(tmp_path / "in/large.png", 64, 90)
    torch.manual_seed(0)
    model = create_model("restormer_nano", dim=8)
    first = run([tmp_path / "in"], tmp_path / "out", model)
    exact = [read_samples(tmp_path / "out" / name) for name in ("small.png", "large.png")]
    assert len(first.written) == 2 and not first.notes
    again = run([tmp_path / "in"], tmp_path / "out", combine([model], fast=True))
    assert len(again.written) == 2  # not done before
    assert [(path.name, note) for path, note in again.notes if "fast" in note] == [
        ("small.png", "with a side of less than 64 pixels it is too small for fast: it was edited whole")
    ]
    small, large = (read_samples(tmp_path / "out" / name) for name in ("small.png", "large.png"))
    np.testing.assert_array_equal(small, exact[0])
    assert (large != exact[1]).any()
    with pytest.raises(UserError, match="save_edit is for a model that predicts an edit, as lite does, got Reduced"):
        Enhancer(combine([model], fast=True), save_edit=True)


@pytest.mark.parametrize("kind", ["restormer_nano", "lite", "auto-tone"])
@pytest.mark.parametrize(
    "settings", [{}, {"strength": 0.5}, {"depth": 16}, {"depth": 8}, {"format": "tiff"}, {"format": "webp"}], ids=str
)
def test_a_photo_in_strips_has_the_same_file(tmp_path, monkeypatch, settings, kind):
    """Of whatever depth and colour space, and to whatever others: up to rounding."""
    deep = np.random.default_rng(0).integers(0, 65536, (21, 30, 3), np.uint16)
    white, curve = [0.3127, 0.329, 1.0], decode_srgb(torch.linspace(0, 1, 4096)).numpy()
    grey = imagecodecs.cms_profile("gray", whitepoint=white, gamma=1.0)
    srgb = imagecodecs.cms_profile("gray", whitepoint=white, transferfunction=curve)
    gamma = ((b"gAMA", (100_000).to_bytes(4)),)
    write_photo(tmp_path / "srgb.png", Photo((deep >> 8).astype(np.uint8), "PNG"))
    write_photo(tmp_path / "p3.png", Photo(deep, "PNG", 16, icc_profile=p3_profile()))
    write_photo(tmp_path / "linear.png", Photo((deep >> 8).astype(np.uint8), "PNG", extra=gamma))
    for name, icc in (("grey", grey), ("grey_srgb", srgb)):
        Image.fromarray((deep[..., 0] >> 8).astype(np.uint8)).save(tmp_path / f"{name}.png", icc_profile=icc)
    write_photo(tmp_path / "float.tif", Photo(to_float(deep), "TIFF", 32, options={"float": "f4"}))
    torch.manual_seed(0)
    models = {"restormer_nano": create_model("restormer_nano", dim=8), "lite": load_checkpoint(SHIPPED)}
    worker = Enhancer(models.get(kind), **settings)
    photos = sorted(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(worker, "by_rows", kind == "restormer_nano")
        whole = [worker.file(photo) for photo in photos]
    monkeypatch.setattr(networks.Networks, "_fits", lambda *arguments: False)
    for photo, (expected, *said) in zip(photos, whole, strict=True):
        got, *others = worker.file(photo)
        assert others == said and not said[1]
        pixels = []
        for name, file in (("expected", expected), ("got", got)):
            (tmp_path / name).write_bytes(file)
            pixels.append(read_photo(tmp_path / name, as_stored=True).pixels)
        assert pixels[0].dtype == pixels[1].dtype
        unit = 1 if pixels[0].dtype.kind == "u" else 1e-5
        assert np.abs(pixels[0].astype(float) - pixels[1]).max() <= (16 if settings.get("format") == "webp" else 1) * unit, photo


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("model", [SHIPPED, None], ids=["lite", "auto-tone"])
def test_an_edit_by_pixels_makes_no_copy_in_floating_point(tmp_path, monkeypatch, model, depth):
    save(tmp_path / "photo.png", 30, 1100, depth=depth)
    samples = read_samples(tmp_path / "photo.png")
    write_photo(tmp_path / "photo.png", Photo(samples, "PNG", depth, icc_profile=p3_profile()))
    monkeypatch.setattr(enhancer.Work, "see", None)
    worker = Enhancer(model)
    work = worker.read(tmp_path / "photo.png")
    worker.run(work)
    assert worker.encode(work) and work.photo.pixels is not samples and work.photo.pixels.dtype == samples.dtype
    assert (work.photo.pixels != samples).any()


@pytest.mark.parametrize("grey", [False, True], ids=["colour", "grey"])
@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1)], ids=lambda size: f"{size[1]}x{size[0]}")
@pytest.mark.parametrize("model", [shipped(), None], ids=["lite", "auto-tone"])
def test_photos_of_one_row_or_column(tmp_path, model, size, depth, grey):
    """Whose axes of one element have any stride."""
    samples = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(samples[..., 0] if grey else samples).save(tmp_path / "photo.png")
    for format in ("png", "tiff") if depth == 16 else ("png", "jpeg", "tiff", "webp", "avif"):
        enhanced, _, reason = Enhancer(model, format=format, depth=depth).file(tmp_path / "photo.png")
        assert not reason, format
        (tmp_path / f"enhanced.{format}").write_bytes(enhanced)
        assert photo_layout(tmp_path / f"enhanced.{format}") == (*size, depth)


def p3_profile():
    corners = [0.68, 0.32, 1.0, 0.265, 0.69, 1.0, 0.15, 0.06, 1.0]
    return imagecodecs.cms_profile("rgb", whitepoint=[0.3127, 0.329, 1.0], primaries=corners, gamma=2.2)


def smooth(path, width, height, **options):
    """A photo of a size, as a JPEG of about a byte a pixel."""
    rng = np.random.default_rng(0)
    blurred = Image.fromarray(rng.integers(0, 256, (9, 13, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.array(blurred)
    for row in range(0, height, 256):
        band = pixels[row : row + 256]
        band[:] = (band + rng.integers(-12, 13, band.shape, np.int16)).clip(0, 255)
    Image.fromarray(pixels).save(path, quality=92, **options)


HELD = """
import sys
from autohdr.enhance import Enhancer
from autohdr.measure import give_back, measure, resident_bytes
from autohdr.models import combine, create_model
model = create_model("restormer_nano", dim=8, num_blocks=(1, 1, 1, 1), num_refinement_blocks=0)
model = combine([model], fast=sys.argv[2] == "fast")
once, *photos = sys.argv[3:]
for photo in (once, *photos):  # the first has what is there once: threads, scratch memory, tables, what planning imports
    give_back()
    worker = Enhancer(model, max_memory=resident_bytes() + int(sys.argv[1]))
    with measure() as measured:
        work = worker.read(photo)
        worker.run(work)
        assert worker.encode(work)
    if photo != once:
        print(worker.max_memory - measured.peak_bytes)
"""


@pytest.mark.skipif(not measuring._reset_high_water_mark(), reason="/proc/self/clear_refs cannot be written here")
@pytest.mark.skipif(backends("mdta")["cpu"] != "available", reason="no compiled kernels")
@pytest.mark.parametrize("fast", ["whole", "fast"])
def test_a_photo_in_strips_has_no_floating_point_copy(tmp_path, fast):
    """From reading to encoding: 2.4 megapixels in 88 MB, of which strips want 70 (67 are tiling.FIXED_BYTES) and samples 7; in
    floating point these would take 29."""
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    smooth(tmp_path / "once.jpg", 600, 400, icc_profile=p3_profile())  # too large to go whole without a plan
    smooth(tmp_path / "turned.jpg", 1200, 2000, exif=turned)
    smooth(tmp_path / "p3.jpg", 2000, 1200, icc_profile=p3_profile())
    photos = [str(tmp_path / f"{name}.jpg") for name in ("once", "turned", "p3")]
    done = subprocess.run([sys.executable, "-c", HELD, str(88 * 10**6), fast, *photos], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(left := done.stdout.split()) == 2 and all(int(size) >= 0 for size in left), left


LIMITED = """
import sys
from autohdr.cli import main
from autohdr.measure import _high_water_mark
status = main(sys.argv[1:])
print(_high_water_mark())
sys.exit(status)
"""


@pytest.mark.drill
@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured as Linux does")
@pytest.mark.parametrize("fast", [(), ("--fast",)], ids=["whole", "fast"])
@pytest.mark.parametrize(("width", "height", "orientation"), [(8192, 5464, 1), (8192, 5464, 6), (20000, 2000, 1)], ids=str)
def test_large_photos_in_one_gigabyte(tmp_path, width, height, orientation, fast):
    """The whole process, from its start to the written file."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    smooth(tmp_path / "a.jpg", width, height, exif=exif)
    torch.manual_seed(0)
    save_weights(tmp_path / "nano.safetensors", create_model("restormer_nano"), {})
    options = ["--checkpoint", tmp_path / "nano.safetensors", "--max-memory", "1GB", "--device", "cpu", *fast]
    command = [sys.executable, "-c", LIMITED, "enhance", tmp_path / "a.jpg", "--out", tmp_path / "out", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) <= 10**9
    assert photo_layout(tmp_path / "out/a.jpg")[:2] == ((height, width) if orientation == 1 else (width, height))


def test_a_failing_model_is_not_hidden(tmp_path):
    save(tmp_path / "a.png", 20, 30)
    with pytest.raises(RuntimeError, match="a bug"):
        run([tmp_path / "a.png"], tmp_path / "out", Fails(raises(RuntimeError("a bug"))))
    assert not written(tmp_path / "out")


def test_a_model_that_returns_nan_writes_nothing(tmp_path):
    save(tmp_path / "a.png")
    model = nn.Identity()
    model.forward = lambda x: x * torch.nan
    result = run([tmp_path / "a.png"], tmp_path / "out", model)
    assert "finite" in result.failed[0][1] and not written(tmp_path / "out")


def test_refusals_come_before_any_work(tmp_path):
    save(tmp_path / "x/a.png")
    save(tmp_path / "y/a.png")
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    for paths, folder, reason in [
        ([tmp_path / "x/a.png", tmp_path / "y"], out, "would both become"),
        ([tmp_path / "x"], tmp_path / "x", "would be overwritten"),
        ([tmp_path / "x/a.png"], tmp_path / "y/../x", "would be overwritten"),
        ([tmp_path / "empty"], out, "expected photos .*got none"),
        ([], out, "got none in no paths"),
        ([tmp_path / "x", tmp_path / "none.png"], out, "none.png: .*does not exist"),
        ([tmp_path / "x"], tmp_path / "x/a.png/out", "cannot be created"),
    ]:
        with pytest.raises(UserError, match=reason):
            run(paths, folder)
    with pytest.raises(UserError, match="float32, bfloat16, float16, got 'int8'"):
        run([tmp_path / "x"], out, precision="int8")
    assert not out.exists()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_an_unwritable_folder_is_refused(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "out").mkdir(mode=0o500)
    with pytest.raises(UserError, match="cannot be written"):
        run([tmp_path / "a.png"], tmp_path / "out")


def test_the_same_photo_twice_is_done_once(tmp_path):
    save(tmp_path / "in/a.png")
    assert len(run([tmp_path / "in", tmp_path / "in/a.png"], tmp_path / "out").written) == 1


def test_a_write_that_fails(tmp_path):
    save(tmp_path / "in/sub/a.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/sub").write_text("a file where a folder must be")
    result = run([tmp_path / "in"], tmp_path / "out")
    assert not result.written and "cannot write" in result.failed[0][1]


def test_an_enhancer_can_be_pickled_and_takes_batches(tmp_path):
    """Of files or of paths, with the results of `enhance`, errors beside."""
    Image.fromarray(room()).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no photo")
    run([tmp_path / "a.png"], tmp_path / "out", load_checkpoint(), strength=0.5)
    unpickled = pickle.loads(pickle.dumps(Enhancer(SHIPPED, strength=0.5)))
    paths = np.array([str(tmp_path / name) for name in ("a.png", "b.png", "c.png")], object)
    files = [(tmp_path / name).read_bytes() for name in ("a.png", "b.png")]
    for batch in ({"path": paths}, {"bytes": files, "path": paths[:2], "id": [7, 8]}):
        done = unpickled(batch)
        assert done["enhanced"][0] == (tmp_path / "out/a.png").read_bytes() and not any(done["enhanced"][1:])
        assert [reason.partition(" ")[0] for reason in done["reason"]] == ["", "not", "cannot"][: len(done["path"])]
        assert done.keys() == batch.keys() | {"enhanced", "notes", "reason"} and list(done["notes"]) == [""] * len(done["path"])
    with pytest.raises(UserError, match="expected a column bytes or path, got image"):
        unpickled({"image": files})


def test_a_restormer_works_in_strips_only_where_a_photo_does_not_fit(tmp_path, monkeypatch):
    """By a rough bound where memory is plenty, by the plan where it is not; and after all where the whole ran out of memory."""
    save(tmp_path / "a.png", 64, 96)
    torch.manual_seed(0)
    model = create_model("restormer_nano", dim=8)
    calls = []
    monkeypatch.setattr(networks, "rows_in_strips", lambda *args: calls.append("strips") or rows_in_strips(*args))
    monkeypatch.setattr(networks, "plan", lambda *args, **options: calls.append("plan") or plan(*args, **options))

    def samples(worker):
        work = worker.read(tmp_path / "a.png")
        worker.run(work)
        return from_float(work.after) if work.after is not None else work.photo.pixels.copy()

    worker = Enhancer(model)
    whole = samples(worker)
    assert not calls
    monkeypatch.setattr(networks, "most_bytes", lambda model, image: 2**60)
    for _ in range(2):
        np.testing.assert_array_equal(samples(worker), whole)
    assert calls == ["plan"]
    monkeypatch.setattr(networks, "PLANNED_TOO_LITTLE", 10**9)
    worker = Enhancer(model)
    np.testing.assert_allclose(samples(worker), whole.astype(int), atol=1)
    assert calls == ["plan", "plan", "strips"]
    monkeypatch.setattr(networks, "most_bytes", lambda model, image: 0)
    monkeypatch.setattr(type(model), "forward", lambda self, image: raises(MemoryError())())
    np.testing.assert_allclose(samples(worker), whole.astype(int), atol=1)
    assert calls == ["plan", "plan", "strips", "strips"]


def test_photos_of_a_property_share_an_edit_that_another_photo_changes(tmp_path):
    """Each folder has its own; a rerun knows, with shards too."""
    for index, cast in enumerate(((1.1, 1, 0.8), (1, 1, 1), (0.9, 1, 1.1), (0.9, 0.8, 0.6))):
        samples = (room() * np.array(cast)).clip(0, 255).astype(np.uint8)
        (tmp_path / f"in/{index // 3}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(samples).save(tmp_path / f"in/{index // 3}/{index}.png")

    model = load_checkpoint()

    def results(out, **options):
        result = run([tmp_path / "in"], tmp_path / out, model, **options)
        return result, [read_samples(path).astype(int) for path in sorted((tmp_path / out).rglob("*.png"))]

    _, own = results("own")
    result, together = results("together", property=True)
    assert len(result.written) == 4
    changes = [np.abs(a - b).max() for a, b in zip(own, together, strict=True)]
    assert min(changes[0], changes[2]) > 3 and changes[3] == 0  # the last is alone in its folder
    results("parts", property=True, shard=(1, 2))
    np.testing.assert_array_equal(results("parts", property=True, shard=(2, 2))[1], together)
    assert len(results("together", property=True)[0].done_before) == 4
    Image.fromarray((room() * np.array((0.5, 0.3, 0.3))).astype(np.uint8)).save(tmp_path / "in/0/9.png")
    again = results("together", property=True)[0]
    assert len(again.written) == 4 and len(again.done_before) == 1
    assert {note for _, note in again.notes} == {"made anew: since its result was made, changed: the options"}
    with pytest.raises(UserError, match="property is for a model that predicts an edit, as lite does, got the auto-tone"):
        run([tmp_path / "in"], tmp_path / "auto", property=True)


def test_photos_of_a_property_may_lie_on_their_side(tmp_path):
    (tmp_path / "in").mkdir()
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[274] = orientation
        Image.fromarray(room().astype(np.uint8)).save(tmp_path / f"in/{orientation}.jpg", exif=exif)
    assert len(run([tmp_path / "in"], tmp_path / "out", load_checkpoint(), property=True).written) == 8


def test_the_white_balance_can_be_kept(tmp_path):
    """A grey wall under warm light becomes lighter, and as warm; by itself the edit takes out most of the warmth."""
    pixels = (np.linspace(30, 130, 60)[None, :, None] * np.array([1.2, 1, 0.7]) * np.ones((40, 1, 1))).astype(np.uint8)
    pixels[:4, :8] = 90  # a patch that is grey
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for name, keep in (("kept", True), ("balanced", False)):
        run([tmp_path / "a.png"], tmp_path / name, load_checkpoint(), keep_white_balance=keep)
    kept, balanced = (read_samples(tmp_path / name / "a.png").astype(int) for name in ("kept", "balanced"))
    assert np.ptp(kept[1, 1]) <= 1 and np.ptp(balanced[1, 1]) > 10
    assert kept[1, 1].mean() > 100 and np.ptp(kept[20, 40]) > 2 * np.ptp(balanced[20, 40])
    with pytest.raises(
        UserError, match="keep_white_balance is for a model that predicts an edit, as lite does, got the auto-tone"
    ):
        run([tmp_path / "a.png"], tmp_path / "auto", keep_white_balance=True)
