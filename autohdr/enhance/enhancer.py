"""One photo through a model, or through the auto-tone: read, edit, encode."""

import hashlib
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autohdr.autotone import counted, pinning, thumbnail
from autohdr.data.bracket_sets import glimpse, read_set
from autohdr.data.colour import ColourSpace
from autohdr.data.conversion import check_conversion, converted, outcome, stripped
from autohdr.data.images import (
    Photo,
    as_samples,
    encode_photo,
    from_float,
    has_grey_profile,
    photo_layout,
    read_photo,
    sample_dtype,
    to_float,
)
from autohdr.errors import UserError
from autohdr.kernels import apply_edit
from autohdr.measure import format_bytes, free_bytes, is_out_of_memory, resident_bytes
from autohdr.models import load_checkpoint
from autohdr.models.combined import LEAST, Combined, Reduced
from autohdr.models.lite import Edit, Lite, Prediction, neutral, shared
from autohdr.models.network import Network
from autohdr.models.tiling import Rows, in_strips, most_bytes, rows_in_strips, works_in_strips
from autohdr.plan import IMAGES, PARAMETERS, plan

PRECISIONS = ("float32", "bfloat16")
CUBE_SIDE = 33
EDIT_SUFFIXES = (".json", ".cube")
BAND = 256  # rows of a photo that are edited at once where it is not whole
GLIMPSE = 512  # pixels a side that a thumbnail is made of
PLANNED_TOO_LITTLE = 1.5  # times what is planned, a pass of a small photo takes on a CPU at most

log = logging.getLogger(__name__)


@dataclass
class Work:
    """A photo on its way. seen: see(). after: what the model made. look: its property's."""

    photo: Photo
    space: ColourSpace | None
    seen: np.ndarray | None = None
    after: np.ndarray | None = None
    edit: Edit | None = None
    look: Tensor | None = None

    def see(self) -> np.ndarray:
        """Its pixels in sRGB, not cut off; they stay in memory."""
        if self.seen is None:
            self.seen = self.space.to_srgb(self.photo.pixels) if self.space else self.photo.pixels
        return self.seen


class Enhancer:
    """A model and how it is to edit. `read`, `run` and `encode` are a photo's three stages, each for a thread of its own.

    model: maps (1, 3, H, W) float32 in [0, 1], channels-last, to the same; it is moved to device and set to eval mode. A path is
    that of a checkpoint; None is the auto-tone. It sees sRGB, and the result goes back to the photo's own colour space. One that
    takes samples gets an sRGB photo's own, uint8 or uint16, in place of float32.
    precision: float32, or bfloat16 under autocast.
    strength: how much of the edit is made, from 0, none of it, to 1; above 1, up to 2, it is exaggerated.
    quality: of JPEG, AVIF and lossy WebP, 1 to 100; by default that of the file, 90 at least.
    format: jpeg, png, tiff, webp or avif; same, of HEIC, JPEG XL and raw, is jpeg. depth: 8 or 16 bits a channel, by default
    the photo's. subsampling: of a JPEG or an AVIF, 444, 422 or 420. strip: gps takes the place out of what a photo says, all
    everything but its colour and density. What a format does not hold is in the notes.
    keep_damaged: write what there is of a JPEG whose data are damaged, with a note.
    max_memory: bytes that the process may hold (on a GPU: its tensors there), for a network that works in strips, as a Restormer
    does, with the same pixels as a result. By default nine tenths of what is free. Strips, which cost more time, are for photos
    that would not fit whole. What an encoder takes by itself is not counted.
    save_edit: keep what a model predicts, as `lite` does, in Work.edit.
    keep_white_balance: of what a model predicts, make what leaves a neutral grey neutral: lite.neutral.
    reserved: bytes of what is free that are left to others; 0 at first.

    An Enhancer can be pickled, its model with it, for processes that each have their own; called, it takes batches of photos.
    UserError: a strength, quality or precision out of range; a format, a depth in it, a subsampling or what to strip that there
    is not; save_edit and a model that predicts no edit; max_memory and another one than a network that works in strips.
    """

    def __init__(
        self,
        model: nn.Module | str | Path | None = None,
        *,
        device: str | torch.device = "cpu",
        precision: str = "float32",
        strength: float = 1.0,
        save_edit: bool = False,
        keep_white_balance: bool = False,
        quality: int | None = None,
        format: str = "same",
        depth: int | None = None,
        subsampling: str = "",
        strip: str = "",
        keep_damaged: bool = False,
        max_memory: int | None = None,
    ):
        if isinstance(model, str | Path):
            model = load_checkpoint(model)
        if precision not in PRECISIONS:
            raise UserError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        parts = model.parts() if isinstance(model, Combined) else [model]
        if max_memory is not None and not all(map(works_in_strips, parts)):
            raise UserError(f"max_memory is for networks that work in strips, as a Restormer does, got {_kind(model)}")
        if not 0 <= strength <= 2:
            raise UserError(f"strength must be from 0 to 2, got {strength}")
        if quality is not None and not 1 <= quality <= 100:
            raise UserError(f"quality must be from 1 to 100, got {quality}")
        check_conversion(format, depth, subsampling, strip)
        self.device, self.precision, self.strength, self.save_edit = torch.device(device), precision, strength, save_edit
        self.keep_white_balance = keep_white_balance
        self.quality, self.keep_damaged, self.max_memory, self.reserved = quality, keep_damaged, max_memory, 0
        self.format, self.depth, self.subsampling, self.strip = format, depth, subsampling, strip
        self.model = model.eval().to(self.device) if model is not None else None
        for name, wanted in (("save_edit", save_edit), ("keep_white_balance", keep_white_balance)):
            if wanted:
                self.must_predict_edits(name)
        self._plans: dict[tuple[int, int], int] = {}
        # Not for 16 bits: an edit of 8 bits has no more.
        self.as_stored = depth != 16 and (model is None or bool(getattr(model, "takes_samples", False)))
        # On a CPU a photo has no floating-point copy before it is known to fit whole, and none for an edit that is made by rows.
        edits_rows = model is None or isinstance(model, Lite | Reduced)
        self.by_rows = self.device.type == "cpu" and (edits_rows or works_in_strips(self.model))

    def must_predict_edits(self, option: str) -> None:
        """UserError where the model does not, for an option that needs it."""
        if not isinstance(self.model, Lite):
            raise UserError(f"{option} is for a model that predicts an edit, as lite does, got {_kind(self.model)}")

    def read(self, *paths: str | Path) -> Work:
        """A photo or, of several paths, what these exposures make, as read_set has them.

        UserError as read_photo and read_set, and where the samples alone are more than max_memory has room for.
        """
        one = len(paths) == 1
        if self.by_rows and self.max_memory is not None:
            for path in paths:
                _check_room(path, self.max_memory)
        as_stored = self.as_stored or self.by_rows
        photo = read_photo(paths[0], as_stored, self.keep_damaged) if one else read_set(paths, self.keep_damaged)
        work = Work(photo, photo.colour_space())
        if not self.by_rows:
            work.see()
        return work

    def run(self, work: Work) -> None:
        """Sets `after`, and `edit` with save_edit. UserError where there is too little memory for the smallest plan."""
        if not (self.strength or self.save_edit):
            return
        if works_in_strips(self.model):
            with self._inference():
                self._within_memory(self.model, work)
        elif isinstance(self.model, Reduced):
            with self._inference():
                self._carried_up(self.model, work)
        elif self.by_rows and not (self.as_stored and work.space is None):
            self._edit_rows(work)
        else:
            self._whole(work)

    def encode(self, work: Work) -> bytes:
        """The result's file. UserError as encode_photo."""
        photo = work.photo
        if work.after is not None:
            photo.pixels = work.space.edited(photo.pixels, work.see(), work.after) if work.space else work.after
            if has_grey_profile(photo):
                _check_grey(photo, work.after)
        work.photo = converted(stripped(photo, self.strip), self.format, self.depth)
        return encode_photo(work.photo, self.quality, self.subsampling)

    def file(self, photo: bytes | str | Path) -> tuple[bytes, list[str], str]:
        """From a photo's file, or its path, to its result's file: (result, notes, ""), or (b"", [], why there is none)."""
        if isinstance(photo, bytes):
            with TemporaryDirectory() as folder:
                path = Path(folder, "photo.jpg")  # the format is told by what is in it
                path.write_bytes(photo)
                return self.file(path)
        try:
            work = self.read(photo)
            self.run(work)
            return self.encode(work), work.photo.notes, ""
        except (UserError, MemoryError, RuntimeError) as error:
            return b"", [], failure(error, Path(photo))

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """A batch of columns to one, as Ray Data's map_batches has them.

        batch: photos' files in the column `bytes`, or else their paths in `path`. The result has all columns of batch, and
        `enhanced`, the results' files, empty where there is none; `notes`, what is not as it was; `reason`, why there is none.
        UserError where neither column is there.
        """
        if not batch.keys() & {"bytes", "path"}:
            raise UserError(f"expected a column bytes or path, got {', '.join(batch) or 'none'}")
        done = [self.file(photo) for photo in batch.get("bytes", batch.get("path", ()))]
        enhanced = np.empty(len(done), object)
        enhanced[:] = [result for result, _, _ in done]
        notes = np.array(["; ".join(notes) for _, notes, _ in done], object)
        return {**batch, "enhanced": enhanced, "notes": notes, "reason": np.array([reason for *_, reason in done], object)}

    def identity(self) -> dict[str, Any]:
        """What a result depends on beside its photo, as JSON holds it: the model, by its name and weights, and the options."""
        model = {"name": "auto-tone"}
        if self.model is not None:
            name = getattr(getattr(self.model, "config", None), "name", type(self.model).__name__)
            model = {"name": name, "sha256": _digest(self.model)}
        options = {"precision": self.precision, "strength": self.strength, "steps": getattr(self.model, "steps", None)}
        options |= {"save_edit": self.save_edit, "quality": self.quality, "keep_damaged": self.keep_damaged}
        options |= {"keep_white_balance": self.keep_white_balance}
        options |= {"format": self.format, "depth": self.depth, "subsampling": self.subsampling, "strip": self.strip}
        return {"model": model, "options": options}

    def glimpse(self, paths: Sequence[Path]) -> Prediction | None:
        """What a Lite predicts of a photo, or of a bracket, by a reduced copy; None where it can't be read."""
        try:
            pixels = np.require(glimpse(paths, GLIMPSE), requirements=["C", "W"])
        except UserError:  # it will fail
            return None
        with torch.inference_mode():
            image = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(self.device)
            return self.model.predict(image) if isinstance(self.model, Lite) else None

    def _whole(self, work: Work) -> None:
        shown = work.see().clip(0, 1) if work.space else work.see()
        image = self._image(shown)
        with self._inference():
            output = apply_edit(image, *edit) if (edit := self._edit(image, work)) else self._output(image)
        output = output[0].permute(1, 2, 0)
        work.after = (output.float() if output.is_floating_point() else output).cpu().numpy()
        if self.strength != 1:
            _blend(shown, work.after, self.strength)

    def _edit_rows(self, work: Work) -> None:
        """The same as _whole for an edit by pixels: it is predicted from the few rows and columns that make a thumbnail, and made
        band by band, so that there is no copy of the photo in floating point."""
        rows = _Rows(work, self)
        few = counted(self._image(rows.pixels))[0].permute(1, 2, 0).numpy()
        with self._inference():
            edit = self._edit(self._image(rows.seen(few).clip(0, 1)), work)
            assert edit
            for first in range(0, rows.shape[2], BAND):
                seen = rows.seen(rows.pixels[first : first + BAND])
                rows.put(first, seen, apply_edit(self._image(seen.clip(0, 1)), *edit))
        rows.finish(work)

    def _image(self, pixels: np.ndarray) -> Tensor:
        """(H, W, 3) in memory as (1, 3, H, W) channels-last: no copy is made on the CPU."""
        return torch.from_numpy(pixels).permute(2, 0, 1)[None].to(self.device)

    def _output(self, image: Tensor) -> Tensor:
        assert self.model is not None
        return self.model.over(image, self._part) if isinstance(self.model, Combined) else self.model(image)

    def _edit(self, image: Tensor, work: Work) -> Edit | None:
        """The edit of an image by the auto-tone or by a Lite; None where another model makes more than one."""
        if self.model is None:
            return Edit(*pinning(thumbnail(image))[:2])
        if not isinstance(self.model, Lite):
            return None
        prediction = self.model.predict(image)
        edit = prediction.edit if work.look is None else shared(prediction, work.look)
        edit = neutral(edit) if self.keep_white_balance else edit
        work.edit = edit if self.save_edit else None
        work.photo.notes += _doubts(prediction)
        return edit

    def _within_memory(self, model: Network, work: Work) -> None:
        """The whole photo at once where that fits, else in strips."""
        limit, rows = self._limit(), _Rows(work, self)
        images = 3 if work.space and self.by_rows else 1  # in floating point: as in the file, in sRGB, cut off
        if self._fits(model, rows, images, limit):
            samples = work.photo.pixels
            try:
                work.photo.pixels = to_float(samples) if self.by_rows else samples
                return self._whole(work)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            work.photo.pixels, work.seen, work.after = samples, None, None
            log.info("%d×%d: out of memory: going on in strips", *rows.shape[:1:-1])
        rows_in_strips(model, rows, limit)
        rows.finish(work)

    def _carried_up(self, model: Reduced, work: Work) -> None:
        rows = _Rows(work, self)
        if not model.reduces(rows):
            work.photo.notes.append(f"with a side of less than {LEAST} pixels it is too small for fast: it was edited whole")
        model.over_rows(rows, partial(self._part, others=rows.result_bytes))
        rows.finish(work)

    def _part(self, model: Network, view: Tensor, others: int = 0) -> Tensor:
        """One network of several, or one view of a photo: whole where that fits, else in strips. others: bytes left to them."""
        limit = self._limit() - others
        if not works_in_strips(model) or self._fits(model, view, 2, limit):  # its result, and the sum of all
            return model(view)
        return in_strips(model, view, limit)

    def _limit(self) -> int:
        if self.max_memory is not None:
            return self.max_memory
        return resident_bytes(self.device) + max(free_bytes(self.device) - self.reserved, 0) * 9 // 10

    def _fits(self, model: Network, image: Tensor | Rows, images: int, limit: int) -> bool:
        """images: of its size, in floating point, that are held besides."""
        height, width = image.shape[-2:]
        left = limit - resident_bytes(self.device) - images * 12 * height * width
        if most_bytes(model, image) <= left:
            return True
        if (height, width) not in self._plans:
            parts = plan(model, (height, width), 1, self.precision, device=self.device).parts
            needed = sum(size for part, size in parts.items() if part not in (PARAMETERS, IMAGES))
            self._plans[height, width] = math.ceil(PLANNED_TOO_LITTLE * needed)
        return self._plans[height, width] <= left

    @contextmanager
    def _inference(self) -> Iterator[None]:
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            yield


class _Rows:
    """tiling.Rows of a photo: its samples, which the result's take the place of where they are of one kind.

    late: the result is what the model made, as Work.after has it: only all of it tells in what colour space the file is to be, or
    it is converted once more.
    """

    dtype = torch.float32

    def __init__(self, work: Work, enhancer: Enhancer):
        photo, self.space = work.photo, work.space
        _, held, becomes_srgb = outcome(photo, enhancer.format, enhancer.depth)
        self.late = becomes_srgb or has_grey_profile(photo)
        self.depth = 32 if self.late else max(photo.depth, held)
        self.strength, self.device, self.pixels = enhancer.strength, enhancer.device, photo.pixels
        self.shape: tuple[int, ...] = (1, 3, *self.pixels.shape[:2])
        kind = sample_dtype(self.depth)
        self.result = self.pixels if self.pixels.dtype == kind and not self.late else np.empty(self.pixels.shape, kind)
        copies = 3 if self.late else int(self.result is not self.pixels)  # late: with the photo in sRGB, and in its own space
        self.result_bytes = copies * self.result.nbytes if self.device.type == "cpu" else 0

    def read(self, first: int, end: int) -> Tensor:
        seen = self.seen(self.pixels[first:end])
        return torch.from_numpy(seen.clip(0, 1) if self.space else seen).permute(2, 0, 1)[None].to(self.device)

    def write(self, first: int, rows: Tensor) -> None:
        self.put(first, self.seen(self.pixels[first : first + rows.shape[2]]), rows)

    @torch.autocast("cpu", enabled=False)  # colours are converted in float32
    def seen(self, own: np.ndarray) -> np.ndarray:
        """These pixels of the photo in sRGB, not cut off."""
        return self.space.to_srgb(own) if self.space else to_float(own)

    @torch.autocast("cpu", enabled=False)
    def put(self, first: int, seen: np.ndarray, rows: Tensor) -> None:
        """write, of rows that were seen so."""
        after = rows[0].permute(1, 2, 0).float().cpu().numpy()
        own = self.pixels[first : first + len(after)]
        if self.strength != 1:
            _blend(seen.clip(0, 1), after, self.strength)
        if not self.late:
            after = from_float(self.space.edited(own, seen, after) if self.space else after, self.depth)
        self.result[first : first + len(after)] = after

    def finish(self, work: Work) -> None:
        """Gives the result to its photo, once all rows are written."""
        if self.late:
            work.after = self.result
        else:
            work.photo.pixels = self.result


def _check_room(path: str | Path, max_memory: int) -> None:
    """UserError where a photo's samples take too much, once as they are and once in a decoder or an encoder."""
    height, width, bits = photo_layout(path)
    needed = resident_bytes() + 2 * 3 * bits // 8 * height * width
    if needed > max_memory:
        least, allowed = format_bytes(needed), format_bytes(max_memory)
        raise UserError(f"{path}: a photo of {width}×{height} pixels takes {least} of memory at least, {allowed} are allowed")


def _kind(model: nn.Module | None) -> str:
    return type(model).__name__ if model else "the auto-tone"


def failure(error: Exception, path: Path) -> str:
    """Why a photo can't be enhanced. Raises an error that does not mean just that."""
    if isinstance(error, UserError):
        return str(error).removeprefix(f"{path}: ")
    if not is_out_of_memory(error):
        raise error
    wanted = re.search(r"allocate (\d+(?:\.\d+)?)\.? ?(bytes|[KMGTPE]iB)", str(error))
    if not wanted:
        return "out of memory"
    amount, unit = wanted.groups()
    if unit == "bytes":
        amount, unit = f"{math.ceil(int(amount) / 2**20):,}", "MiB"
    return f"out of memory: {amount} {unit} more was wanted"


def edit_files(edit: Edit, strength: float) -> dict[str, str]:
    """An edit as the texts of two files, by EDIT_SUFFIXES: JSON, and a look-up table that editors take."""
    with torch.inference_mode():
        steps = torch.linspace(0, 1, CUBE_SIDE)
        blue, green, red = torch.meshgrid(steps, steps, steps, indexing="ij")  # red runs fastest
        colours = torch.stack([red, green, blue]).view(1, 3, -1, CUBE_SIDE)
        edited = apply_edit(colours, edit.curves.cpu(), edit.matrix.cpu())
        table = (colours + strength * (edited - colours)).clamp(0, 1).flatten(2)[0].T.tolist()
    parts = {"curves": edit.curves[0].tolist(), "matrix": edit.matrix[0].tolist(), "strength": strength}
    lines = [f"LUT_3D_SIZE {CUBE_SIDE}", *(" ".join(f"{value:.6f}" for value in colour) for colour in table)]
    return dict(zip(EDIT_SUFFIXES, (json.dumps(parts) + "\n", "\n".join(lines) + "\n"), strict=True))


def _digest(model: nn.Module) -> str:
    """SHA-256 of a model's weights, their names, shapes and dtypes."""
    sha = hashlib.sha256()
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            sha.update(f"{name} {list(value.shape)} {value.dtype}\n".encode())
            sha.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _check_grey(photo: Photo, edited: np.ndarray) -> None:
    """A photo with a grey profile whose edit is not grey becomes an sRGB photo."""
    samples = as_samples(photo)
    if (samples != samples[..., :1]).any():
        photo.pixels, photo.icc_profile, photo.grey = edited, None, False
        photo.notes.append("its profile is for grey alone and the edit has colours: the result is in sRGB")
    elif photo.pixels.dtype.kind == "f":  # of more bits than are compared too
        photo.pixels = np.repeat(photo.pixels[..., :1], 3, 2)


def _doubts(prediction: Prediction) -> list[str]:
    """Why less than all of the edit is made; empty where all is."""
    if prediction.share == 1:
        return []
    light, colour = prediction.distances[0].tolist()
    what = "light is" if light > colour else "colours are"
    far = f"its {what} {max(light, colour):.0f} standard deviations from what lite learnt from"
    return [f"{far}: {prediction.share.item():.0%} of the edit is made"]


def _blend(before: np.ndarray, after: np.ndarray, strength: float) -> None:
    """Makes `after` what is `strength` of the way from before to it, in bands, so that no copy of a large photo is made."""
    for row in range(0, len(after), 64):
        a, b = (pixels[row : row + 64].astype(np.float32) for pixels in (before, after))
        mixed = a + np.float32(strength) * (b - a)
        white = np.iinfo(after.dtype).max if after.dtype.kind == "u" else 0
        after[row : row + 64] = np.rint(mixed.clip(0, white)) if white else mixed
