"""Synthetic rooms beside their statistics, and those beside ten real pairs': a page to look at, and the rate of rendering.

    python benchmarks/synthetic_rooms.py --out rooms [--count 24] [--height 256] [--width 384] [--seed 0] [--exterior]

Writes OUT/index.html. Prints the seconds of processor time that a scene, and a photo and an edit of it, took.
"""

import argparse
import html
import json
import time
from pathlib import Path

import numpy as np
from PIL import Image

from autohdr.data.synthetic import edit, photograph, render_scene, statistics

REAL = Path(__file__).parents[1] / "tests" / "data" / "real_pairs.json"
SIDE = 128  # pixels that statistics are taken at, as those of the real pairs were
SHOWN = ("source_luma_5", "source_luma_75", "source_walls_b", "target_luma_5", "target_luma_75", "target_walls_b", "psnr")


def reduced(picture: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) as float32, SIDE pixels on the long side."""
    image = Image.fromarray(picture)
    scale = SIDE / max(image.size)
    size = round(image.width * scale), round(image.height * scale)
    return np.asarray(image.resize(size, Image.Resampling.BOX), np.float32) / 255


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    for name, value in (("count", 24), ("height", 256), ("width", 384), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--exterior", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    real, found, figures, seconds = json.loads(REAL.read_text("utf-8")), [], [], np.zeros(2)
    for seed in range(options.seed, options.seed + options.count):
        begun = time.process_time()
        scene = render_scene(seed, options.height, options.width, exterior=options.exterior)
        rendered = time.process_time()
        pair = photograph(np.random.default_rng([seed, 1]), scene), edit(np.random.default_rng([seed, 2]), scene)
        seconds += rendered - begun, time.process_time() - rendered
        found.append(statistics(*(reduced(picture) for picture in pair)))
        Image.fromarray(np.concatenate(pair, 1)).save(options.out / f"{seed:06}.jpg", quality=90)
        caption = ", ".join(f"{name} {found[-1].get(name, float('nan')):.3g}" for name in SHOWN)
        figures.append(f'<figure><img src="{seed:06}.jpg"><figcaption>{seed}: {html.escape(caption)}</figcaption></figure>')
    rows = []
    for name, (mean, spread) in real.items():
        column = np.array([each.get(name, np.nan) for each in found])
        numbers = f"<td>{mean:.3f} ± {spread:.3f}<td>{np.nanmean(column):.3f} ± {np.nanstd(column):.3f}"
        rows.append(f"<tr><td>{name}{numbers}<td>{(np.nanmean(column) - mean) / max(spread, 1e-3):+.2f}")
    heads = f"<tr><th>statistic<th>ten real pairs<th>{len(found)} rooms<th>difference in real deviations"
    style = (
        "<meta charset=utf-8><style>body{font:14px sans-serif}figure{display:inline-block}img{width:600px;display:block}</style>"
    )
    page = f"{style}<h1>Synthetic rooms</h1><table>{heads}{''.join(rows)}</table>{''.join(figures)}"
    (options.out / "index.html").write_text(page, "utf-8")
    print(
        f"{options.out / 'index.html'}: {seconds[0] / len(found):.2f} s a scene, {seconds[1] / len(found):.2f} s a photo and edit"
    )


if __name__ == "__main__":
    main()
