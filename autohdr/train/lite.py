"""Makes the weights that ship: `make model` renders rooms, photographs and edits each several times, and fits Lite to the pairs.

How many, and how it is fitted, is in configs/lite.toml. No real photo is in it. The members are fitted one after the other, each
by its own draw of batches; the recipe that Lite starts from and what its members see are computed once.
"""

import math
import time
import tomllib
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from autohdr.data.synthetic.camera import photograph
from autohdr.data.synthetic.editor import edit
from autohdr.data.synthetic.scene import render_scene
from autohdr.edits import SHIPPED, Inputs
from autohdr.kernels import apply_edit
from autohdr.models import create_model, save_weights
from autohdr.models.lite import Lite
from autohdr.train.config import RECIPES

RECIPE = SimpleNamespace(**tomllib.loads((RECIPES / "lite.toml").read_text("utf-8")))


def fit(model: Lite, sources: Tensor, targets: Tensor, steps: int = RECIPE.steps, seed: int = 0) -> None:
    """Fits each member to pairs [N, 3, H, W] in [0, 1] by the mean logarithm of their error, squared.

    H and W are multiples of the recipe's side. The same arguments give the same weights on the same machine.
    """
    inputs = _inputs(model, sources)
    model.centre.copy_(inputs.features.mean(0))
    model.spread.copy_(inputs.features.std(0) + 1e-3)
    noise = RECIPE.noise * model.spread
    small = [F.adaptive_avg_pool2d(images, RECIPE.side) for images in (sources, targets)]
    for number, member in enumerate(model.members):
        g = torch.Generator().manual_seed(seed * len(model.members) + number)
        optimizer = torch.optim.AdamW(member.parameters(), lr=RECIPE.rate, weight_decay=RECIPE.decay)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = RECIPE.rate * min(1, 10 * (step + 1) / steps) * 0.5 * (1 + math.cos(math.pi * step / steps))
            chosen = torch.randint(len(sources), (RECIPE.batch,), generator=g)
            some = Inputs(*(part[chosen] for part in inputs))
            some = some._replace(features=some.features + noise * torch.randn(some.features.shape, generator=g))
            source, target = (images[chosen] for images in small)
            error = (apply_edit(source, *model.edit(some, number)) - target).square().mean((1, 2, 3))
            optimizer.zero_grad()
            (error + RECIPE.nearly).log().mean().backward()
            torch.nn.utils.clip_grad_norm_(member.parameters(), 5.0)
            optimizer.step()


def _inputs(model: Lite, sources: Tensor) -> Inputs:
    with torch.no_grad():
        parts = [model.inputs(some) for some in sources.split(64)]
    return Inputs(*(torch.cat(part) for part in zip(*parts, strict=True)))


def psnr(model: Lite, sources: Tensor, targets: Tensor) -> float:
    """Mean over the pairs, dB."""
    with torch.no_grad():
        pairs = zip(sources.split(64), targets.split(64), strict=True)
        errors = [(model(source).clamp(0, 1) - target).square().mean((1, 2, 3)) for source, target in pairs]
    return float(-10 * torch.cat(errors).log10().mean())


def takes(
    seed: int, count: int = RECIPE.takes, height: int = RECIPE.height, width: int = RECIPE.width
) -> tuple[np.ndarray, np.ndarray]:
    """Photographs and edits of the room that `seed` makes, each uint8 [count, 128, 128, 3]: as many cameras and retouchers."""
    scene = render_scene(seed, height, width)
    sources = [photograph(np.random.default_rng([seed, 1, take]), scene) for take in range(count)]
    targets = [edit(np.random.default_rng([seed, 2, take]), scene) for take in range(count)]

    def small(picture: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(picture).resize((128, 128), Image.Resampling.BOX))

    return np.stack([*map(small, sources)]), np.stack([*map(small, targets)])


def rooms(count: int, first_seed: int, workers: int | None = None) -> tuple[Tensor, Tensor]:
    """Sources and targets [N, 3, 128, 128] in [0, 1], room by room."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        made = list(pool.map(takes, range(first_seed, first_seed + count), chunksize=4))
    sources, targets = (np.concatenate(pictures).transpose(0, 3, 1, 2) for pictures in zip(*made, strict=True))
    return torch.from_numpy(sources) / 255, torch.from_numpy(targets) / 255


def main(out: Path = SHIPPED) -> None:
    started = time.perf_counter()
    sources, targets = rooms(RECIPE.rooms + RECIPE.held_out, RECIPE.first_seed)
    print(f"{RECIPE.rooms + RECIPE.held_out} rooms, {len(sources)} pairs  ({time.perf_counter() - started:.0f} s)", flush=True)
    torch.manual_seed(0)
    model, count = create_model("lite"), RECIPE.rooms * RECIPE.takes
    assert isinstance(model, Lite)
    before = psnr(model, sources[count:], targets[count:])
    every = RECIPE.finished_every
    fit(model, torch.cat([sources[:count], targets[:count:every]]), torch.cat([targets[:count], targets[:count:every]]))
    halves = {name: tensor.half() for name, tensor in model.state_dict().items()}
    model.load_state_dict(halves)
    after = psnr(model, sources[count:], targets[count:])
    save_weights(out, model, {"trained_on": [], "rooms": RECIPE.rooms, "takes": RECIPE.takes, "psnr": round(after, 2)}, halves)
    took = time.perf_counter() - started
    print(f"{RECIPE.held_out} rooms held out: auto-tone {before:.2f} dB, lite {after:.2f} dB  ({took:.0f} s)")
    print(f"{out}: {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
