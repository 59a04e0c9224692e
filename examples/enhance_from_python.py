"""Enhance photos from Python: whole files with their metadata, and single images as tensors.

    python examples/enhance_from_python.py photo.jpg --checkpoint runs/mine/checkpoint_best.safetensors

Without photos it renders one; without a checkpoint the model that ships edits.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from autohdr.data.images import Photo, read_photo, to_float, write_photo
from autohdr.data.synthetic import render_pair
from autohdr.edits import SHIPPED
from autohdr.enhance import enhance
from autohdr.errors import UserError
from autohdr.models import load_checkpoint


def render(path: Path, height: int, width: int) -> Path:
    photograph, _ = render_pair(seed=7, height=height, width=width)
    write_photo(path, Photo(to_float(photograph), "PNG"))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", nargs="*", type=Path)
    parser.add_argument("--checkpoint", type=Path, default=SHIPPED)
    parser.add_argument("--out", type=Path, help="folder for the enhanced photos; by default a new temporary one")
    parser.add_argument("--height", type=int, default=240, help="of the room that is rendered where there are no photos")
    parser.add_argument("--width", type=int, default=320)
    args = parser.parse_args()

    out = args.out or Path(tempfile.mkdtemp())
    out.mkdir(parents=True, exist_ok=True)
    photos = args.photos or [render(out / "rendered_room.png", args.height, args.width)]
    model = load_checkpoint(args.checkpoint)

    # Whole files: size, format, bit depth, EXIF and colour profile stay; what can't be done is listed, never half written.
    result = enhance(photos, out / "enhanced", model, on_exists="overwrite", progress=False)
    for path, reason in result.skipped + result.failed:
        print(f"not enhanced: {path}: {reason}")
    for path in result.written:
        photo = read_photo(path)
        height, width, _ = photo.pixels.shape
        print(f"{path}: {width} x {height}, {photo.format} of {photo.depth} bits, mean {photo.pixels.mean():.3f}")

    # One image: a tensor [1, 3, H, W] in [0, 1].
    before = read_photo(photos[0]).pixels
    with torch.inference_mode():
        after = model(torch.from_numpy(before).permute(2, 0, 1)[None])[0].clamp(0, 1).permute(1, 2, 0).numpy()
    print(f"{photos[0].name}: mean {before.mean():.3f} before, {after.mean():.3f} after")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:  # bad input, in words for whoever gave it
        raise SystemExit(f"enhance_from_python: {error}") from None
