"""The first stage: what stands before the camera, as linear light, rendered once and kept for many photographs."""

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from autohdr.data.synthetic import furniture, geometry, house, lights, look, outside, place, render, room, textures
from autohdr.data.synthetic.textures import Array
from autohdr.errors import UserError
from autohdr.files import replacing

MIN_SIDE = 32


@dataclass(frozen=True)
class Scene:
    """radiance: linear light (H, W, 3), float16. outside: share of each pixel that is seen through a window, or is sky, (H, W),
    float16. neutral: the colour (3,), float32, that a white balance takes out. tones: `look.tones_of_light` (3,). exterior:
    whether it is a house from its street, of which cameras and editors make something else than of a room."""

    radiance: Array
    outside: Array
    neutral: Array
    tones: Array
    exterior: bool = False


def render_scene(seed: int, height: int, width: int, cache_dir: str | Path | None = None, exterior: bool = False) -> Scene:
    """The room that `seed` makes, or the exterior. The same arguments give the same bits on the same machine.

    cache_dir: folder that keeps rendered scenes, 8 bytes a pixel; another version of the renderer renders them anew.
    Raises UserError for a side under 32 pixels, a negative seed, or a kept scene that is damaged.
    """
    check_size(height, width)
    check_seed(seed)
    name = f"{'exterior_' if exterior else ''}{seed}_{height}x{width}_{_renderer()}.npz"
    path = Path(cache_dir) / name if cache_dir is not None else None
    if path and path.is_file():
        try:
            with np.load(path) as kept:
                return Scene(**kept)
        except (EOFError, ValueError, TypeError, BadZipFile) as error:
            raise UserError(f"synthetic scenes: expected a scene in {path}, got a damaged file: delete it") from error
    with np.errstate(all="ignore"):  # rays that miss divide by zero, and are masked
        stage = house.House(seed) if exterior else room.Room(seed)
        radiance, share = render.render(stage, height, width)
    neutral = (stage.illuminant**0.9).astype(np.float32)
    scene = Scene(to_radiance(radiance), share.astype(np.float16), neutral, look.tones_of_light(radiance, exterior), exterior)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part, part.open("wb") as file:
            np.savez(file, **vars(scene))
    return scene


def to_radiance(light: Array) -> Array:
    """Linear light (H, W, 3) as a scene keeps it: float16, the median 1. A camera's black and white are well within its range."""
    return np.clip(light / max(float(np.median(light)), 1e-6), 0, 6e4).astype(np.float16)


def check_size(height: int, width: int) -> None:
    """Raise UserError for a side under 32 pixels."""
    if min(height, width) < MIN_SIDE:
        raise UserError(f"synthetic scenes: height and width must be at least {MIN_SIDE}, got {height} x {width}")


def check_seed(seed: int) -> None:
    """Raise UserError for a negative seed."""
    if seed < 0:
        raise UserError(f"synthetic scenes: seed must be 0 or more, got {seed}")


@cache
def _renderer() -> str:
    """Names the code that makes a scene, so that a kept scene of other code isn't taken for one of this."""
    files = [part.__file__ for part in (furniture, geometry, house, lights, look, outside, place, render, room, textures)]
    return hashlib.sha256(b"".join(Path(str(file)).read_bytes() for file in [*files, __file__])).hexdigest()[:12]
