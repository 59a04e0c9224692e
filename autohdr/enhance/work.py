"""A photo on its way through an Enhancer, whole or by rows, and what its parts ask of an Enhancer's settings."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from autohdr.arrays import Array
from autohdr.data.colour import ColourSpace
from autohdr.data.conversion import outcome
from autohdr.data.images import Photo, from_float, has_grey_profile, sample_dtype, to_float
from autohdr.edits import Edit


@dataclass(eq=False)
class Settings:
    """See Enhancer."""

    device: str
    precision: str
    strength: float
    format: str
    depth: int | None
    max_memory: int | None
    cuda_graphs: bool = False
    reserved: int = 0

    @property
    def on_cpu(self) -> bool:
        return self.device == "cpu"


@dataclass
class Work:
    """A photo on its way. seen: see(). after: what the model made. look: its property's."""

    photo: Photo
    space: ColourSpace | None
    seen: np.ndarray | None = None
    after: np.ndarray | None = None
    edit: Edit | None = None
    look: Array | None = None

    def see(self) -> np.ndarray:
        """Its pixels in sRGB, not cut off; they stay in memory."""
        if self.seen is None:
            self.seen = self.space.to_srgb(self.photo.pixels) if self.space else self.photo.pixels
        return self.seen

    def edit_whole(self, make: Callable[[np.ndarray], np.ndarray], strength: float) -> None:
        """Sets `after`: `strength` of the way to what `make` makes of all pixels, (H, W, 3)."""
        shown = self.see().clip(0, 1) if self.space else self.see()
        self.after = make(shown)
        if strength != 1:
            blend(shown, self.after, strength)


class PhotoRows:
    """A photo's samples by rows; the result's take their place where they are of one kind.

    late: the result is what the model made, as Work.after has it: only all of it tells in what colour space the file is to be, or
    it is converted once more.
    """

    def __init__(self, work: Work, settings: Settings):
        photo, self.space = work.photo, work.space
        _, held, becomes_srgb = outcome(photo, settings.format, settings.depth)
        self.late = becomes_srgb or has_grey_profile(photo)
        self.depth = 32 if self.late else max(photo.depth, held)
        self.strength, self.pixels = settings.strength, photo.pixels
        self.shape: tuple[int, ...] = (1, 3, *self.pixels.shape[:2])
        kind = sample_dtype(self.depth)
        self.result = self.pixels if self.pixels.dtype == kind and not self.late else np.empty(self.pixels.shape, kind)
        copies = 3 if self.late else int(self.result is not self.pixels)  # late: with the photo in sRGB, and in its own space
        self.result_bytes = copies * self.result.nbytes if settings.on_cpu else 0

    def seen(self, own: np.ndarray) -> np.ndarray:
        """These pixels of the photo in sRGB, not cut off."""
        return self.space.to_srgb(own) if self.space else to_float(own)

    def put(self, first: int, seen: np.ndarray, after: np.ndarray) -> None:
        """What became, float32 in sRGB, of rows that were seen so."""
        own = self.pixels[first : first + len(after)]
        if self.strength != 1:
            blend(seen.clip(0, 1), after, self.strength)
        if not self.late:
            after = from_float(self.space.edited(own, seen, after) if self.space else after, self.depth)
        self.result[first : first + len(after)] = after

    def finish(self, work: Work) -> None:
        """Gives the result to its photo, once all rows are written."""
        if self.late:
            work.after = self.result
        else:
            work.photo.pixels = self.result


def blend(before: np.ndarray, after: np.ndarray, strength: float) -> None:
    """Makes `after` what is `strength` of the way from before to it, in bands, so that no copy of a large photo is made."""
    for row in range(0, len(after), 64):
        a, b = (pixels[row : row + 64].astype(np.float32) for pixels in (before, after))
        mixed = a + np.float32(strength) * (b - a)
        white = np.iinfo(after.dtype).max if after.dtype.kind == "u" else 0
        after[row : row + 64] = np.rint(mixed.clip(0, white)) if white else mixed
