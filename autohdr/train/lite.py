"""Makes the weights that ship: `make model` renders rooms and exteriors, photographs and edits each several times, and fits Lite.

How many, and how it is fitted, is in configs/lite.toml. No real photo is in it. The members are fitted one after the other, each
by its own draw of batches; the recipe that Lite starts from and what its members see are computed once.
"""

import math
import time
import tomllib
from concurrent.futures import ProcessPoolExecutor
from functools import partial
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
from autohdr.edits import SHIPPED, Inputs, edited_by
from autohdr.models import create_model, save_weights
from autohdr.models.lite import Lite
from autohdr.train.config import RECIPES

RECIPE = SimpleNamespace(**tomllib.loads((RECIPES / "lite.toml").read_text("utf-8")))


def fit(
    model: Lite, sources: Tensor, targets: Tensor, steps: int = RECIPE.steps, seed: int = 0, usual: int | None = None
) -> None:
    """Fits each member to pairs [N, 3, H, W] in [0, 1] by the mean logarithm of their error, squared.

    H and W are multiples of the recipe's side. The first `usual` pairs, all by default, are rooms: from them Lite.distances are
    counted, and they are tilted; others are not. The same arguments give the same weights on the same machine.
    """
    inputs = _inputs(model, sources)
    model.centre.copy_(inputs.features[:usual].mean(0))
    model.spread.copy_(inputs.features[:usual].std(0) + 1e-3)
    _fit_tilt(model, inputs, len(sources) if usual is None else usual)
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
            error = (edited_by(source, model.edit(some, number)) - target).square().mean((1, 2, 3))
            optimizer.zero_grad()
            (error + RECIPE.nearly).log().mean().backward()
            torch.nn.utils.clip_grad_norm_(member.parameters(), 5.0)
            optimizer.step()


@torch.no_grad()
def _fit_tilt(model: Lite, inputs: Inputs, rooms: int) -> None:
    """By least squares, 1 for the first `rooms` and 0 for the rest, of features with noise as members see it. Both kinds count
    the same, and of each the photos that need all of an edit."""
    features = F.pad(model.seen(inputs), (0, 1), value=1.0).double()
    is_room, counts = torch.arange(len(features)) < rooms, inputs.needed == 1
    kinds = torch.stack([is_room & counts, ~is_room & counts]).double()
    weights = (kinds / kinds.sum(1, keepdim=True).clamp(min=1)).sum(0)[:, None]
    noise = torch.full((features.shape[1],), 2 * RECIPE.noise**2, dtype=torch.float64)
    noise[-1] = 1e-9  # of the bias: none, but for photos of which none counts
    solved = torch.linalg.solve(features.T @ (weights * features) + noise.diag(), features.T @ (weights * is_room[:, None]))
    model.tilt.weight.copy_(solved[:-1].T)
    model.tilt.bias.copy_(solved[-1])


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
    seed: int, count: int = RECIPE.takes, height: int = RECIPE.height, width: int = RECIPE.width, exterior: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Photographs and edits of the room that `seed` makes, or of the exterior, each uint8 [count, 128, 128, 3]: as many cameras
    and retouchers."""
    scene = render_scene(seed, height, width, exterior=exterior)
    sources = [photograph(np.random.default_rng([seed, 1, take]), scene) for take in range(count)]
    targets = [edit(np.random.default_rng([seed, 2, take]), scene) for take in range(count)]

    def small(picture: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(picture).resize((128, 128), Image.Resampling.BOX))

    return np.stack([*map(small, sources)]), np.stack([*map(small, targets)])


def scenes(count: int, first_seed: int, exterior: bool = False, workers: int | None = None) -> tuple[Tensor, Tensor]:
    """Sources and targets [N, 3, 128, 128] in [0, 1] of so many rooms, or exteriors, one after the other."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        made = list(pool.map(partial(takes, exterior=exterior), range(first_seed, first_seed + count), chunksize=4))
    sources, targets = (np.concatenate(pictures).transpose(0, 3, 1, 2) for pictures in zip(*made, strict=True))
    return torch.from_numpy(sources) / 255, torch.from_numpy(targets) / 255


def main(out: Path = SHIPPED) -> None:
    started = time.perf_counter()
    learnt, held_out = [], {}
    for name, count, more, finished_every in (
        ("rooms", RECIPE.rooms, RECIPE.rooms_held_out, RECIPE.rooms_finished_every),
        ("exteriors", RECIPE.exteriors, RECIPE.exteriors_held_out, RECIPE.exteriors_finished_every),
    ):
        sources, targets = scenes(count + more, RECIPE.first_seed, exterior=name == "exteriors")
        print(f"{count + more} {name}, {len(sources)} pairs  ({time.perf_counter() - started:.0f} s)", flush=True)
        first = count * RECIPE.takes
        held_out[name] = sources[first:], targets[first:]
        sources, targets = sources[:first], targets[:first]
        finished = targets[::finished_every]
        learnt.append((torch.cat([sources, finished]), torch.cat([targets, finished])))
    torch.manual_seed(0)
    model = create_model("lite")
    assert isinstance(model, Lite)
    before = {name: psnr(model, *pairs) for name, pairs in held_out.items()}
    sources, targets = (torch.cat(side) for side in zip(*learnt, strict=True))
    # Exteriors are learnt, but don't count as usual: they would widen what does until nights are in it.
    fit(model, sources, targets, usual=len(learnt[0][0]))
    halves = {name: tensor.half() for name, tensor in model.state_dict().items()}
    model.load_state_dict(halves)
    after = {name: psnr(model, *pairs) for name, pairs in held_out.items()}
    metadata = {"trained_on": [], "rooms": RECIPE.rooms, "exteriors": RECIPE.exteriors, "takes": RECIPE.takes}
    save_weights(out, model, metadata | {"psnr": round(after["rooms"], 2)}, halves)
    for name, reached in after.items():
        print(f"{len(held_out[name][0])} pairs of {name} held out: auto-tone {before[name]:.2f} dB, lite {reached:.2f} dB")
    print(f"{out}: {out.stat().st_size:,} bytes  ({time.perf_counter() - started:.0f} s)")


if __name__ == "__main__":
    main()
