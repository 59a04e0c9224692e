"""Pairs of rooms and exteriors, one in memory or many in a folder, and pairs made from finished photos."""

import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from autohdr.data.images import KINDS, Photo, from_float, photos_in, read_rgb, to_float, write_photo
from autohdr.data.synthetic.camera import merge, photograph
from autohdr.data.synthetic.editor import edit
from autohdr.data.synthetic.look import tones_of_edit
from autohdr.data.synthetic.pixels import decode
from autohdr.data.synthetic.scene import MIN_SIDE, Scene, check_seed, check_size, render_scene, to_radiance
from autohdr.data.synthetic.textures import Array
from autohdr.errors import UserError
from autohdr.files import write_text
from autohdr.measure import check_workers, cores

_MARKER, _DEGRADED = "synth.json", "degrade.json"


def render_pair(seed: int, height: int, width: int, exterior: bool = False) -> tuple[Array, Array]:
    """Photograph and edit of the room that `seed` makes, or of the exterior, each uint8 (height, width, 3), sRGB, pixel-aligned.

    The same arguments give the same bits on the same machine. Raises UserError for a side under 32 pixels or a negative seed.
    """
    scene = render_scene(seed, height, width, exterior=exterior)
    return photograph(np.random.default_rng([seed, 1]), scene), edit(np.random.default_rng([seed, 2]), scene)


def synthesize(
    out_dir: str | Path,
    count: int,
    height: int,
    width: int,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = True,
    exteriors: int = 0,
) -> Path:
    """Write `count` pairs as images/NNNN_src.jpg, images/NNNN_tar.jpg and, last of all, pairs.jsonl, whose path it returns.

    `workers` processes render (default: one a core); the files don't depend on how many. The last `exteriors` of the pairs show
    houses from their street, the others rooms. A folder that an earlier call made is made anew. Raises UserError for a count
    under 1, fewer than 0 or more than `count` exteriors, a side under 32 pixels, or a folder with anything else in it.
    """
    if count < 1:
        raise UserError(f"synthetic pairs: count must be at least 1, got {count}")
    if not 0 <= exteriors <= count:
        raise UserError(f"synthetic pairs: exteriors must be from 0 to count, {count}, got {exteriors}")
    check_size(height, width)
    check_seed(seed)
    processes = _processes(workers, count)
    out = Path(out_dir)
    images = _claim(out, _MARKER)
    settings = {"count": count, "height": height, "width": width, "seed": seed, "exteriors": exteriors}
    (out / _MARKER).write_text(json.dumps(settings) + "\n")
    seeds = [int(s) for s in np.random.SeedSequence(seed).generate_state(count, np.uint32)]
    job = partial(_write_pair, images=images, height=height, width=width, digits=max(4, len(str(count - 1))))
    work = [(number, made, number >= count - exteriors) for number, made in enumerate(seeds)]
    for _ in _work(job, work, processes, "scenes", progress):
        pass
    return _list_pairs(out)


@dataclass(frozen=True)
class Degraded:
    """pairs: the list that was written. count: its pairs. skipped: photos that could not be used, each with the reason."""

    pairs: Path
    count: int
    skipped: list[tuple[Path, str]]


def degrade(
    finished: str | Path,
    out_dir: str | Path,
    size: int = 2048,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = True,
) -> Degraded:
    """Pairs from finished photos alone: each beside what the synthetic camera would have made of it, unedited.

    A finished photo is taken for a scene: decoded to linear light, the range of its large areas, which editing narrows, made
    wide again, then photographed (`photograph`) in other light, at another exposure, with the statistics of real sources.

    finished: folder, searched with all that is below it. out_dir: gets images/NNNN_NAME_src.jpg, images/NNNN_NAME_tar.jpg (the
    finished photo, upright) and, last of all, pairs.jsonl; a folder that an earlier call made is made anew. size: pixels of
    the longest side at most; larger photos are reduced. seed: of the camera's draws; the files don't depend on `workers`.
    Raises UserError if there is no photo that can be used, for a bad argument, or an out_dir with anything else in it.
    """
    folder, out = Path(finished), Path(out_dir)
    if not folder.is_dir():
        raise UserError(f"degrade: expected a folder of finished photos, got {folder}, which is none")
    if size < MIN_SIDE:
        raise UserError(f"degrade: size must be at least {MIN_SIDE}, got {size}")
    if seed < 0:
        raise UserError(f"degrade: seed must be 0 or more, got {seed}")
    photos, others = photos_in(folder, out)
    if not photos:
        raise UserError(f"degrade: expected photos ({KINDS}), got none in {folder}")
    processes = _processes(workers, len(photos))
    images = _claim(out, _DEGRADED)
    (out / _DEGRADED).write_text(json.dumps({"photos": len(photos), "size": size, "seed": seed}) + "\n")
    job = partial(_degrade_photo, images=images, size=size, seed=seed, digits=max(4, len(str(len(photos) - 1))))
    reasons = list(_work(job, list(enumerate(photos)), processes, "photos", progress))
    skipped = [(path, reason) for path, reason in zip(photos, reasons, strict=True) if reason]
    if len(skipped) == len(photos):
        raise UserError(f"degrade: none of {len(photos)} photos could be used; {skipped[0][0]}: {skipped[0][1]}")
    return Degraded(_list_pairs(out), len(photos) - len(skipped), [*skipped, *others])


def _processes(workers: int | None, jobs: int) -> int:
    if workers is not None:
        check_workers(workers)
        if workers < 1:
            raise UserError(f"synthetic pairs: workers must be at least 1, got {workers}")
    return min(workers or cores(), jobs)


def _work(job: Callable, arguments: list[tuple], processes: int, name: str, progress: bool) -> Iterator:
    """job(*arguments) for each of them, in order, in so many processes."""
    start = "fork" if "fork" in get_all_start_methods() else "spawn"  # a fork needn't import torch again, and only runs numpy
    with tqdm(total=len(arguments), desc=name, unit="pair", disable=None if progress else True) as bar:
        with ExitStack() as stack:
            run = map
            if processes > 1:
                run = stack.enter_context(ProcessPoolExecutor(processes, mp_context=get_context(start))).map
            for result in run(job, *zip(*arguments, strict=True)):
                bar.update()
                yield result


def _list_pairs(out: Path) -> Path:
    pairs = out / "pairs.jsonl"
    names = sorted(path.name for path in (out / "images").glob("*_src.jpg"))
    rows = [{"src": f"images/{name}", "tar": f"images/{name.removesuffix('_src.jpg')}_tar.jpg"} for name in names]
    write_text(pairs, "".join(json.dumps(row) + "\n" for row in rows))
    return pairs


def _claim(out: Path, marker: str) -> Path:
    """Make or empty the output folder; refuse one that holds what no call that leaves this marker wrote."""
    if out.exists() and not out.is_dir():
        raise UserError(f"synthetic pairs: expected a folder to write to, got a file: {out}")
    if out.is_dir() and any(out.iterdir()) and not (out / marker).is_file():
        raise UserError(
            f"synthetic pairs: expected an empty folder or one made by an earlier call, got {out} with other files in it"
        )
    images = out / "images"
    images.mkdir(parents=True, exist_ok=True)
    (out / "pairs.jsonl").unlink(missing_ok=True)
    for path in images.iterdir():
        if re.fullmatch(r"\d{4,}_(.*_)?(src|tar)\.jpg", path.name):
            path.unlink()
    return images


def _write_pair(number: int, seed: int, exterior: bool, images: Path, height: int, width: int, digits: int) -> None:
    for picture, kind in zip(render_pair(seed, height, width, exterior), ("src", "tar"), strict=True):
        Image.fromarray(picture).save(images / f"{number:0{digits}}_{kind}.jpg", quality=95)


def _degrade_photo(number: int, path: Path, images: Path, size: int, seed: int, digits: int) -> str:
    """Write the pair of one finished photo. Returns why there is none, or nothing."""
    try:
        pixels = Image.fromarray(from_float(read_rgb(path)))
        if max(pixels.size) > size:
            pixels.thumbnail((size, size), Image.Resampling.LANCZOS)
        check_size(pixels.height, pixels.width)
    except UserError as error:
        return str(error)
    target = np.asarray(pixels)
    rng = np.random.default_rng([seed, number])
    light = np.maximum(decode(to_float(target)), 1e-4)
    wide = merge(light, -rng.uniform(0.1, 0.5))
    tones = tones_of_edit(to_float(target))
    scene = Scene(to_radiance(wide), np.zeros(light.shape[:2], np.float16), np.ones(3, np.float32), tones)
    for picture, kind in ((photograph(rng, scene), "src"), (target, "tar")):
        write_photo(images / f"{number:0{digits}}_{path.stem[:40]}_{kind}.jpg", Photo(to_float(picture), "JPEG"))
    return ""
