"""Pairs of rooms: one in memory, many in a folder."""

import json
import os
import re
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from autohdr.data.synthetic.camera import photograph
from autohdr.data.synthetic.editor import edit
from autohdr.data.synthetic.scene import check_seed, check_size, render_scene
from autohdr.data.synthetic.textures import Array
from autohdr.errors import UserError
from autohdr.files import replacing
from autohdr.measure import check_workers

_MARKER = "synth.json"


def render_pair(seed: int, height: int, width: int) -> tuple[Array, Array]:
    """Photograph and edit of the room that `seed` makes, each uint8 (height, width, 3), sRGB, pixel-aligned.

    The same arguments give the same bits on the same machine. Raises UserError for a side under 32 pixels or a negative seed.
    """
    scene = render_scene(seed, height, width)
    return photograph(np.random.default_rng([seed, 1]), scene), edit(np.random.default_rng([seed, 2]), scene)


def synthesize(
    out_dir: str | Path, count: int, height: int, width: int, seed: int = 0, workers: int | None = None, progress: bool = True
) -> Path:
    """Write `count` pairs as images/NNNN_src.jpg, images/NNNN_tar.jpg and, last of all, pairs.jsonl, whose path it returns.

    `workers` processes render (default: one a core); the files don't depend on how many. A folder that an earlier call made is
    made anew. Raises UserError for a count under 1, a side under 32 pixels, or a folder with anything else in it.
    """
    if count < 1:
        raise UserError(f"synthetic pairs: count must be at least 1, got {count}")
    check_size(height, width)
    check_seed(seed)
    if workers is not None:
        check_workers(workers)
    if workers is not None and workers < 1:
        raise UserError(f"synthetic pairs: workers must be at least 1, got {workers}")
    out = Path(out_dir)
    images = _claim(out)
    (out / _MARKER).write_text(json.dumps({"count": count, "height": height, "width": width, "seed": seed}) + "\n")
    seeds = [int(s) for s in np.random.SeedSequence(seed).generate_state(count, np.uint32)]
    job = partial(_write_pair, images=images, height=height, width=width, digits=max(4, len(str(count - 1))))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(workers or cores or 1, count)
    start = "fork" if "fork" in get_all_start_methods() else "spawn"  # a fork needn't import torch again, and only runs numpy
    with tqdm(total=count, desc="rooms", unit="pair", disable=None if progress else True) as bar:
        if workers == 1:
            for number, scene in enumerate(seeds):
                job(number, scene)
                bar.update()
        else:
            with ProcessPoolExecutor(workers, mp_context=get_context(start)) as pool:
                for _ in pool.map(job, range(count), seeds):
                    bar.update()
    pairs = out / "pairs.jsonl"
    names = sorted(path.name for path in images.glob("*_src.jpg"))
    lines = [json.dumps({"src": f"images/{name}", "tar": f"images/{name.replace('_src', '_tar')}"}) + "\n" for name in names]
    with replacing(pairs) as part:
        part.write_text("".join(lines))
    return pairs


def _claim(out: Path) -> Path:
    """Make or empty the output folder; refuse one that holds what `synthesize` didn't write."""
    if out.exists() and not out.is_dir():
        raise UserError(f"synthetic pairs: expected a folder to write to, got a file: {out}")
    if out.is_dir() and any(out.iterdir()) and not (out / _MARKER).is_file():
        raise UserError(
            f"synthetic pairs: expected an empty folder or one made by an earlier call, got {out} with other files in it"
        )
    images = out / "images"
    images.mkdir(parents=True, exist_ok=True)
    (out / "pairs.jsonl").unlink(missing_ok=True)
    for path in images.iterdir():
        if re.fullmatch(r"\d{4,}_(src|tar)\.jpg", path.name):
            path.unlink()
    return images


def _write_pair(number: int, seed: int, images: Path, height: int, width: int, digits: int) -> None:
    for picture, kind in zip(render_pair(seed, height, width), ("src", "tar"), strict=True):
        Image.fromarray(picture).save(images / f"{number:0{digits}}_{kind}.jpg", quality=95)
