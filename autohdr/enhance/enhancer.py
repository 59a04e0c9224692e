"""One photo through a model, or through the auto-tone: read, edit, encode."""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from autohdr.arrays import Array, apply_edit, as_array, as_bytes, constant
from autohdr.autotone import counted, pinning, thumbnail
from autohdr.data.bracket_sets import glimpse, read_set
from autohdr.data.conversion import check_conversion, converted, stripped
from autohdr.data.images import Photo, as_samples, encode_photo, has_grey_profile, photo_layout, read_photo
from autohdr.edits import ArrayLite, Edit, Prediction, Predictor, edited_by, neutral, shared
from autohdr.enhance.work import PhotoRows, Settings, Work
from autohdr.errors import UserError
from autohdr.measure import format_bytes, is_out_of_memory, resident_bytes

if TYPE_CHECKING:  # for networks alone
    import torch
    from torch import nn

PRECISIONS = ("float32", "bfloat16", "float16")
CUBE_SIDE = 33
EDIT_SUFFIXES = (".json", ".cube")
BAND = 256  # rows of a photo that are edited at once where it is not whole
GLIMPSE = 512  # pixels a side that a thumbnail is made of


class Enhancer(Settings):
    """A model and how it is to edit. `read`, `run` and `encode` are a photo's three stages, each for a thread of its own.

    model: maps (1, 3, H, W) float32 in [0, 1], channels-last, to the same; it is moved to device and set to eval mode. A path is
    that of a checkpoint; None is the auto-tone. It sees sRGB, and the result goes back to the photo's own colour space. One that
    takes samples gets an sRGB photo's own, uint8 or uint16, in place of float32. edits.shipped() is the model that ships, on the
    CPU in float32. It imports no PyTorch, and neither does the auto-tone there.
    precision: float32, or bfloat16 or float16 under autocast.
    strength: how much of the edit is made, from 0, none of it, to 1; above 1, up to 2, it is exaggerated.
    quality: of JPEG, AVIF and lossy WebP, 1 to 100; by default that of the file, 90 at least.
    format: jpeg, png, tiff, webp or avif; same, of HEIC, JPEG XL and raw, is jpeg. depth: 8 or 16 bits a channel, by default
    the photo's. subsampling: of a JPEG or an AVIF, 444, 422 or 420. strip: gps takes the place out of what a photo says, all
    everything but its colour and density. What a format does not hold is in the notes.
    keep_damaged: write what there is of a JPEG whose data are damaged, with a note.
    max_memory: bytes that the process may hold (on a GPU: its tensors there), for a network that works in strips, as a Restormer
    does, with the same pixels as a result. By default nine tenths of what is free. Strips, which cost more time, are for photos
    that would not fit whole. What an encoder takes by itself is not counted.
    cuda_graphs: replay CUDA graphs of networks where images of one size repeat, as models.graphs has it: for small images, in
    which the GPU would wait for launches. Not for strips, nor for a model that predicts an edit.
    save_edit: keep what a model predicts, as `lite` does, in Work.edit.
    keep_white_balance: of what a model predicts, make what leaves a neutral grey neutral: edits.neutral.
    reserved: bytes of what is free that are left to others; 0 at first.

    An Enhancer can be pickled, its model with it, for processes that each have their own; called, it takes batches of photos.
    UserError: a strength, quality or precision out of range; a format, a depth in it, a subsampling or what to strip that there
    is not; save_edit and a model that predicts no edit; max_memory and another one than a network that works in strips;
    cuda_graphs on a CPU, for several networks, for a bridge's sampler, and for a model that predicts an edit.
    """

    def __init__(
        self,
        model: "nn.Module | ArrayLite | str | Path | None" = None,
        *,
        device: "str | torch.device" = "cpu",
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
        cuda_graphs: bool = False,
    ):
        if isinstance(model, str | Path):
            from autohdr.models import load_checkpoint

            model = load_checkpoint(model)
        if precision not in PRECISIONS:
            raise UserError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        if not 0 <= strength <= 2:
            raise UserError(f"strength must be from 0 to 2, got {strength}")
        if quality is not None and not 1 <= quality <= 100:
            raise UserError(f"quality must be from 1 to 100, got {quality}")
        check_conversion(format, depth, subsampling, strip)
        super().__init__(str(device), precision, strength, format, depth, max_memory, cuda_graphs)
        self.save_edit, self.keep_white_balance, self.keep_damaged = save_edit, keep_white_balance, keep_damaged
        self.quality, self.subsampling, self.strip = quality, subsampling, strip
        if cuda_graphs and (model is None or isinstance(model, Predictor)):
            raise UserError(f"cuda_graphs is for networks that make photos, got {_kind(model)}")
        self.model, self.networks = model, None
        if not (isinstance(model, ArrayLite) or model is None and self.on_cpu and precision == "float32"):
            from autohdr.enhance.networks import Networks

            self.networks = Networks(self, model)
        if max_memory is not None and not (self.networks and self.networks.strips):
            raise UserError(f"max_memory is for networks that work in strips, as a Restormer does, got {_kind(model)}")
        for name, wanted in (("save_edit", save_edit), ("keep_white_balance", keep_white_balance)):
            if wanted:
                self.must_predict_edits(name)
        # Not for 16 bits: an edit of 8 bits has no more.
        self.as_stored = depth != 16 and (model is None or bool(getattr(model, "takes_samples", False)))
        # On a CPU a photo has no floating-point copy before it is known to fit whole, and none for an edit that is made by rows.
        self._edits = model is None or isinstance(model, Predictor)
        self.by_rows = self.on_cpu and bool(self._edits or self.networks and self.networks.by_rows)

    def must_predict_edits(self, option: str) -> None:
        """UserError where the model does not, for an option that needs it."""
        if not isinstance(self.model, Predictor):
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
        if self.networks and not self._edits:
            self.networks.run(work)
        elif self.by_rows and not (self.as_stored and work.space is None):
            self._edit_rows(work)
        else:
            with self._inference():
                work.edit_whole(lambda pixels: self._edited(self._image(pixels), work), self.strength)

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
        if isinstance(self.model, ArrayLite):
            model = {"name": "lite", "sha256": _digest(self.model.weights.items())}
        elif self.networks and self.model is not None:
            name = getattr(getattr(self.model, "config", None), "name", type(self.model).__name__)
            model = {"name": name, "sha256": _digest(self.networks.weights())}
        options = {"precision": self.precision, "strength": self.strength, "steps": getattr(self.model, "steps", None)}
        options |= {"save_edit": self.save_edit, "quality": self.quality, "keep_damaged": self.keep_damaged}
        options |= {"keep_white_balance": self.keep_white_balance}
        options |= {"format": self.format, "depth": self.depth, "subsampling": self.subsampling, "strip": self.strip}
        return {"model": model, "options": options}

    def glimpse(self, paths: Sequence[Path]) -> Prediction | None:
        """What a model predicts of a photo, or of a bracket, by a reduced copy; None where it can't be read."""
        assert isinstance(self.model, Predictor)
        try:
            pixels = np.require(glimpse(paths, GLIMPSE), requirements=["C", "W"])
        except UserError:  # it will fail
            return None
        with self._inference():
            return self.model.predict(self._image(pixels))

    def _edited(self, image: Array, work: Work) -> np.ndarray:
        return self._pixels(edited_by(image, self._edit(image, work)))

    def _edit_rows(self, work: Work) -> None:
        """Where the samples are not edited as they are: the edit is predicted from the rows and columns that make a thumbnail,
        and made band by band, so that there is no copy of the photo in floating point."""
        rows = PhotoRows(work, self)
        few = counted(rows.pixels.transpose(2, 0, 1)[None])[0].transpose(1, 2, 0)
        with self._inference():
            edit = self._edit(self._image(rows.seen(few).clip(0, 1)), work)
            for first in range(0, len(rows.pixels), BAND):
                seen = rows.seen(rows.pixels[first : first + BAND])
                after = edited_by(self._image(seen.clip(0, 1)), edit, first, len(rows.pixels))
                rows.put(first, seen, self._pixels(after))
        rows.finish(work)

    def _image(self, pixels: np.ndarray) -> Array:
        """(H, W, 3) in memory as (1, 3, H, W), an array or a tensor on the device: no copy is made on the CPU."""
        return self.networks.image(pixels) if self.networks else pixels.transpose(2, 0, 1)[None]

    def _pixels(self, image: Array) -> np.ndarray:
        """The way back."""
        return self.networks.pixels(image) if self.networks else image[0].transpose(1, 2, 0)

    def _inference(self) -> AbstractContextManager[Any]:
        return self.networks.inference() if self.networks else nullcontext()

    def _edit(self, image: Array, work: Work) -> Edit:
        """The edit of an image by the auto-tone or by a model that predicts one."""
        if self.model is None:
            recipe = pinning(thumbnail(image))
            return Edit(recipe.curves, recipe.matrix, constant([[[0]]], recipe.curves))
        assert isinstance(self.model, Predictor)
        prediction = self.model.predict(image)
        edit = prediction.edit if work.look is None else shared(prediction, work.look)
        edit = neutral(edit) if self.keep_white_balance else edit
        work.edit = edit if self.save_edit else None
        work.photo.notes += _doubts(prediction)
        return edit


def _check_room(path: str | Path, max_memory: int) -> None:
    """UserError where a photo's samples take too much, once as they are and once in a decoder or an encoder."""
    height, width, bits = photo_layout(path)
    needed = resident_bytes() + 2 * 3 * bits // 8 * height * width
    if needed > max_memory:
        least, allowed = format_bytes(needed), format_bytes(max_memory)
        raise UserError(f"{path}: a photo of {width}×{height} pixels takes {least} of memory at least, {allowed} are allowed")


def _kind(model: Any) -> str:
    return "Lite" if isinstance(model, Predictor) else type(model).__name__ if model else "the auto-tone"


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
    """An edit as the texts of two files, by EDIT_SUFFIXES: JSON, and a look-up table that editors take, which has no tilt."""
    curves, matrix, tilt = (as_array(part) for part in edit)
    steps = np.linspace(0, 1, CUBE_SIDE, dtype=np.float32)
    blue, green, red = np.meshgrid(steps, steps, steps, indexing="ij")  # red runs fastest
    colours = np.stack([red, green, blue]).reshape(1, 3, -1, CUBE_SIDE)
    edited = apply_edit(colours, curves, matrix)
    table = (colours + np.float32(strength) * (edited - colours)).clip(0, 1).reshape(3, -1).T.tolist()
    parts = {"curves": curves[0].tolist(), "matrix": matrix[0].tolist(), "tilt": tilt.item(), "strength": strength}
    lines = [f"LUT_3D_SIZE {CUBE_SIDE}", *(" ".join(f"{value:.6f}" for value in colour) for colour in table)]
    return dict(zip(EDIT_SUFFIXES, (json.dumps(parts) + "\n", "\n".join(lines) + "\n"), strict=True))


def _digest(weights: Iterable[tuple[str, Array]]) -> str:
    """SHA-256 of a model's weights, their names, shapes and dtypes."""
    sha = hashlib.sha256()
    for name, value in weights:
        sha.update(f"{name} {list(value.shape)} torch.{str(value.dtype).removeprefix('torch.')}\n".encode())
        sha.update(as_bytes(value).data)
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
