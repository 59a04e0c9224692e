"""Checkpoints in 8 bits for the CPU: calibrated on photos, and written only where pairs say that little is lost."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import torch
import torch.nn.functional as F
from torch import Tensor

from autohdr.data.images import photos_in, read_rgb
from autohdr.data.pairs import Pair
from autohdr.errors import UserError
from autohdr.evaluate import check_settings, measured
from autohdr.metrics import mean_interval, psnr
from autohdr.models import load_checkpoint, save_weights
from autohdr.models.int8 import quantized
from autohdr.report.tables import with_interval

SIDE = 512
"""Pixels of the longer side of a photo, at most, that scales are taken from: all layers of a network are seen at once."""


@dataclass(frozen=True)
class Quantized:
    """What `quantize` measured, in float32 and in 8 bits: mean PSNR of the pairs in dB, median of their seconds, bytes of the
    file; and the mean loss in dB with half the width of its interval."""

    psnr: tuple[float, float]
    seconds: tuple[float, float]
    size: tuple[int, int]
    loss: tuple[float, float]

    def __str__(self) -> str:
        before, after = (
            f"{psnr:.3f} dB PSNR, {seconds:.3f} s a pair, {size / 1e6:.2f} MB"
            for psnr, seconds, size in zip(self.psnr, self.seconds, self.size, strict=True)
        )
        return f"float32: {before}\n8 bits:  {after}\nloses {with_interval(self.loss, 3)} dB"


def quantize(checkpoint: Path, photos: Path, pairs: Sequence[Pair], out: Path, most_loss: float = 0.05) -> Quantized:
    """Writes a Restormer's checkpoint with its products in 8 bits (models.int8), which load_checkpoint reads, for a CPU.

    photos: a folder of photos that scales are taken from. pairs: what the loss is measured on.
    Raises UserError, and writes nothing, where the mean loss of PSNR is above most_loss dB, for no photos or no pairs, and for
    another checkpoint than a Restormer's in floats.
    """
    check_settings(pairs, "float32")
    if out.suffix != ".safetensors" or not out.parent.is_dir():
        raise UserError(f"--out: expected a file that ends in .safetensors, in a folder that exists, got {out}")
    model = load_checkpoint(checkpoint)
    models = {"float32": model, "int8": quantized(model, _thumbnails(photos))}
    runs, device = {name: (network, "float32") for name, network in models.items()}, torch.device("cpu")
    found = [image for image, _ in measured(pairs, runs, {"psnr": psnr}, size=None, resize="squash", device=device)]
    before, after = ([image["figures"][name]["psnr"] for image in found] for name in models)
    first, second = ([image["costs"][name]["seconds"] for image in found] for name in models)
    loss = mean_interval([b - a for b, a in zip(before, after, strict=True)])
    if not loss[0] <= most_loss:
        lost = f"8 bits lose {with_interval(loss, 3)} dB on {len(pairs)} pairs, {most_loss:g} are allowed"
        raise UserError(f"{out}: not written: {lost}: {mean(before):.3f} dB PSNR become {mean(after):.3f}")
    size = checkpoint.stat().st_size  # before its place may be taken
    save_weights(out, models["int8"], model.metadata)
    return Quantized((mean(before), mean(after)), (median(first), median(second)), (size, out.stat().st_size), loss)


def _thumbnails(folder: Path) -> Iterator[Tensor]:
    """The photos of a folder, reduced to SIDE."""
    for path in photos_in(folder, folder)[0]:
        photo = torch.from_numpy(read_rgb(path)).permute(2, 0, 1)[None]
        share = min(1.0, SIDE / max(photo.shape[2:]))
        size = [max(1, round(share * side)) for side in photo.shape[2:]]
        yield F.interpolate(photo, size, mode="bilinear", antialias=True)
