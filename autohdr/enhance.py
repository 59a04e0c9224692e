"""Enhances photo files at their own resolution, with a model or with the auto-tone."""

import json
import math
import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from autohdr.autotone import auto_tone
from autohdr.data.conversion import check_conversion, converted, result_name, stripped
from autohdr.data.images import KINDS, Photo, as_samples, has_grey_profile, photos_in, read_photo, write_photo
from autohdr.errors import UserError
from autohdr.files import clear_abandoned, write_text
from autohdr.kernels import apply_edit
from autohdr.measure import free_bytes, is_out_of_memory, resident_bytes
from autohdr.models.lite import Edit, Lite, Prediction
from autohdr.models.tiling import in_strips, works_in_strips

PRECISIONS = ("float32", "bfloat16")
CUBE_SIDE = 33


@dataclass
class EnhanceResult:
    """What became of the photos. megapixels and seconds (reading, enhancing, writing) count the written ones."""

    written: list[Path] = field(default_factory=list)
    skipped: list[tuple[Path, str]] = field(default_factory=list)  # (input, reason)
    notes: list[tuple[Path, str]] = field(default_factory=list)  # (input, what is not as it was in a result)
    megapixels: float = 0.0
    seconds: float = 0.0


def enhance(
    paths: Iterable[str | Path],
    out_dir: str | Path,
    model: nn.Module | None = None,
    *,
    device: str | torch.device = "cpu",
    precision: str = "float32",
    strength: float = 1.0,
    save_edit: bool = False,
    overwrite: bool = False,
    quality: int | None = None,
    format: str = "same",
    depth: int | None = None,
    subsampling: str = "",
    strip: str = "",
    keep_damaged: bool = False,
    progress: bool = True,
    max_memory: int | None = None,
) -> EnhanceResult:
    """Enhances files, and the photos in folders and their subfolders, into out_dir, keeping names and subfolders.

    Each keeps its resolution, format, bit depth, colour space and what its file says, and appears whole or not at all. A photo
    that can't be read or written, that needs more memory than there is, or whose output exists already (unless overwrite)
    is skipped and listed with the reason; the others go on. So is what may be a photo in a folder but is none of those read.

    model: maps (1, 3, H, W) float32 in [0, 1], channels-last, to the same; it is moved to device and set to eval mode.
    None is the auto-tone. It sees sRGB, and the result goes back to the photo's own colour space. One that takes samples gets
    an sRGB photo's own, uint8 or uint16, in place of float32.
    quality: of JPEG, AVIF and lossy WebP, 1 to 100; by default that of the file, 90 at least.
    format: jpeg, png, tiff, webp or avif; same, of HEIC and raw, is jpeg. depth: 8 or 16 bits a channel, by default the photo's.
    subsampling: of a JPEG or an AVIF, 444, 422 or 420. strip: gps takes the place out of what a photo says, all everything but
    its colour and density. What a format does not hold is in the notes.
    keep_damaged: write what there is of a JPEG whose data are damaged, with a note; by default it is skipped.
    precision: float32, or bfloat16 under autocast.
    strength: how much of the edit is made, from 0, none of it, to 1; above 1, up to 2, it is exaggerated.
    max_memory: bytes that the process may hold (on a GPU: its tensors there), for a network that works in strips, as a Restormer
    does, with the same pixels as a result; a photo that needs more even so is skipped. By default nine tenths of what is free.
    save_edit: write each photo's edit beside its result, for a model that predicts one, as `lite` does: NAME.json, its curves and
    matrix as apply_edit takes them, and NAME.cube, all of it as a look-up table of 33 x 33 x 33 that editors take; both in sRGB.
    UserError before any work: a strength outside 0 to 2, a quality outside 1 to 100, a format, a depth in it, a subsampling or
    what to strip that there is not; save_edit and a model that predicts no edit;
    max_memory and another one than a network that works in strips; a path that does not exist, no photos, two photos of one
    output name, an output that is one of the photos, an out_dir that can't be made, an unknown precision.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if max_memory is not None and not works_in_strips(model):
        got = type(model).__name__ if model else "the auto-tone"
        raise UserError(f"max_memory is for networks that work in strips, as a Restormer does, got {got}")
    if not 0 <= strength <= 2:
        raise UserError(f"strength must be from 0 to 2, got {strength}")
    if save_edit and not isinstance(model, Lite):
        got = type(model).__name__ if model else "the auto-tone"
        raise UserError(f"save_edit is for a model that predicts an edit, as lite does, got {got}")
    if quality is not None and not 1 <= quality <= 100:
        raise UserError(f"quality must be from 1 to 100, got {quality}")
    check_conversion(format, depth, subsampling, strip)
    device = torch.device(device)
    as_stored = depth != 16 and (model is None or getattr(model, "takes_samples", False))  # an edit of 8 bits has no more
    if model is not None:
        model = model.eval().to(device)
    result = EnhanceResult()
    jobs = _jobs([Path(path) for path in paths], Path(out_dir), result.skipped, format)
    for folder in {target.parent for target in jobs}:
        clear_abandoned(folder)
    for target, source in tqdm(jobs.items(), desc="enhance", unit="photo", disable=None if progress else True):
        try:
            if target.exists() and not overwrite:
                raise UserError(f"{target} exists already and is not to be overwritten")
            started = time.perf_counter()
            photo = read_photo(source, as_stored, keep_damaged)
            space = photo.colour_space()
            before = photo.pixels
            seen = space.to_srgb(before) if space else before
            shown = seen.clip(0, 1) if space else before
            prediction = None
            if strength or save_edit:
                if model is None:
                    after = auto_tone(shown)
                else:
                    after, prediction = _run(model, shown, device, precision, max_memory)
                if strength != 1:
                    _blend(shown, after, strength)
                photo.pixels = space.edited(before, seen, after) if space else after
                if has_grey_profile(photo):
                    _check_grey(photo, after)
            target.parent.mkdir(parents=True, exist_ok=True)
            photo = converted(stripped(photo, strip), format, depth)
            write_photo(target, photo, quality, subsampling)
            if save_edit and prediction:
                _write_edit(target, prediction.edit, strength)
            if prediction and (reason := _doubt(prediction)):
                photo.notes.append(reason)
            result.seconds += time.perf_counter() - started
            result.megapixels += photo.pixels.shape[0] * photo.pixels.shape[1] / 1e6
            result.written.append(target)
            result.notes += [(source, note) for note in photo.notes]
        except UserError as error:
            result.skipped.append((source, str(error).removeprefix(f"{source}: ")))
        except OSError as error:
            result.skipped.append((source, f"cannot write {target}: {error.strerror or error}"))
        except (MemoryError, RuntimeError) as error:
            if (reason := _out_of_memory(error)) is None:
                raise
            result.skipped.append((source, reason))
    return result


def _jobs(paths: list[Path], out_dir: Path, skipped: list[tuple[Path, str]], format: str) -> dict[Path, Path]:
    """Output of each photo -> the photo. Creates out_dir once everything else is known to be right. Adds to skipped."""
    jobs: dict[Path, Path] = {}
    for path in paths:
        for source, relative in _photos(path, out_dir, skipped):
            target = out_dir / result_name(relative, format)
            other = jobs.setdefault(target, source)
            if other.resolve() != source.resolve():
                raise UserError(f"{other} and {source} would both become {target}: enhance them into different folders")
    if not jobs and not skipped:
        raise UserError(f"expected photos ({KINDS}), got none in {', '.join(map(str, paths)) or 'no paths'}")
    sources = {source.resolve() for source in jobs.values()}
    for target in jobs:
        if target.resolve() in sources:
            raise UserError(f"{target} is one of the photos to enhance and would be overwritten: choose another folder")
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out_dir}: the output folder cannot be created: {error.strerror}") from error
    if not os.access(out_dir, os.W_OK):
        raise UserError(f"{out_dir}: the output folder cannot be written to")
    return jobs


def _photos(path: Path, out_dir: Path, skipped: list[tuple[Path, str]]) -> list[tuple[Path, Path]]:
    """The photos that a path stands for, each with its place below out_dir, which is not searched itself."""
    if not path.exists():
        raise UserError(f"{path}: expected a photo or a folder, got a path that does not exist")
    if not path.is_dir():
        return [(path, Path(path.name))]
    photos, others = photos_in(path, out_dir)
    skipped += [other for other in others if other not in skipped]
    return [(photo, photo.relative_to(path)) for photo in photos]


def _check_grey(photo: Photo, edited: np.ndarray) -> None:
    """A photo with a grey profile whose edit is not grey becomes an sRGB photo."""
    samples = as_samples(photo)
    if (samples != samples[..., :1]).any():
        photo.pixels, photo.icc_profile, photo.grey = edited, None, False
        photo.notes.append("its profile is for grey alone and the edit has colours: the result is in sRGB")


def _run(
    model: nn.Module, pixels: np.ndarray, device: torch.device, precision: str, max_memory: int | None
) -> tuple[np.ndarray, Prediction | None]:
    """The model on one photo, and what a Lite predicted of it.

    (H, W, 3) in memory is (1, 3, H, W) channels-last: no copy is made on the CPU.
    """
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(device)
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        prediction = model.predict(image) if isinstance(model, Lite) else None
        if prediction:
            output = apply_edit(image, *prediction.edit)
        elif works_in_strips(model):
            free = resident_bytes(device) + free_bytes(device) * 9 // 10
            output = in_strips(model, image, free if max_memory is None else max_memory)
        else:
            output = model(image)
    output = output[0].permute(1, 2, 0)
    return (output.float() if output.is_floating_point() else output).cpu().numpy(), prediction


def _doubt(prediction: Prediction) -> str:
    """Why less than all of the edit is made; empty where all is."""
    if prediction.share == 1:
        return ""
    light, colour = prediction.distances[0].tolist()
    what = "light is" if light > colour else "colours are"
    far = f"its {what} {max(light, colour):.0f} standard deviations from what lite learnt from"
    return f"{far}: {prediction.share.item():.0%} of the edit is made"


def _write_edit(target: Path, edit: Edit, strength: float) -> None:
    """Writes the edit predicted for a photo beside the photo's result, as JSON and as a look-up table."""
    with torch.inference_mode():
        steps = torch.linspace(0, 1, CUBE_SIDE)
        blue, green, red = torch.meshgrid(steps, steps, steps, indexing="ij")  # red runs fastest
        colours = torch.stack([red, green, blue]).view(1, 3, -1, CUBE_SIDE)
        edited = apply_edit(colours, edit.curves.cpu(), edit.matrix.cpu())
        table = (colours + strength * (edited - colours)).clamp(0, 1).flatten(2)[0].T.tolist()
    parts = {"curves": edit.curves[0].tolist(), "matrix": edit.matrix[0].tolist(), "strength": strength}
    write_text(target.with_suffix(".json"), json.dumps(parts) + "\n")
    lines = [f"LUT_3D_SIZE {CUBE_SIDE}", *(" ".join(f"{value:.6f}" for value in colour) for colour in table)]
    write_text(target.with_suffix(".cube"), "\n".join(lines) + "\n")


def _blend(before: np.ndarray, after: np.ndarray, strength: float) -> None:
    """Makes `after` what is `strength` of the way from before to it, in bands, so that no copy of a large photo is made."""
    for row in range(0, len(after), 64):
        a, b = (pixels[row : row + 64].astype(np.float32) for pixels in (before, after))
        mixed = a + np.float32(strength) * (b - a)
        white = np.iinfo(after.dtype).max if after.dtype.kind == "u" else 0
        after[row : row + 64] = np.rint(mixed.clip(0, white)) if white else mixed


def _out_of_memory(error: BaseException) -> str | None:
    """What an allocation failure wanted, in words; None for any other error."""
    if not is_out_of_memory(error):
        return None
    wanted = re.search(r"allocate (\d+(?:\.\d+)?)\.? ?(bytes|[KMGTPE]iB)", str(error))
    if not wanted:
        return "out of memory"
    amount, unit = wanted.groups()
    if unit == "bytes":
        amount, unit = f"{math.ceil(int(amount) / 2**20):,}", "MiB"
    return f"out of memory: {amount} {unit} more was wanted"
