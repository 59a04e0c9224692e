"""The figures of docs/lite.md that `make model` and `autohdr eval` don't print, on scenes that the weights were not fitted to.

    python benchmarks/lite.py [--rooms 60] [--exteriors 20] [--pairs PAIRS.jsonl]

How far finished photos are changed (mean ΔE2000); how far photographs are from what the model was fitted to; how often `adapt`
takes for a look: edits that a known change made warmer, edits as they are, and edits with another change each. With --pairs, the
first figure alone, of these pairs' targets. Takes minutes, most of them to render the rooms and for `adapt`.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from autohdr.data.pairs import PairDataset, read_pairs
from autohdr.metrics import delta_e2000, mean_interval
from autohdr.models import load_checkpoint
from autohdr.models.lite import Lite
from autohdr.train import adapt, lite

SEED = 31_000_000  # of the first room: `make model` begins at another
SIZE = 512  # of pairs
DRAWS, PICTURES = 30, 12  # of the looks, and pairs of each
WARMER = torch.tensor([1.05, 1, 0.88])[:, None, None]


def identity(model: Lite, finished: list[Tensor]) -> str:
    """How far images [3, H, W] are changed that need no change."""
    with torch.inference_mode():
        changes = [delta_e2000(model(image[None]).clamp(0, 1), image[None]).item() for image in finished]
    mean, half = mean_interval(changes)
    return f"{len(changes)} finished photos change by ΔE2000 {mean:.2f} ± {half:.2f}, the most by {max(changes):.2f}"


def looks(model: Lite, sources: Tensor, targets: Tensor) -> None:
    """sources, targets: [rooms · takes, 3, H, W], room by room."""
    rooms = len(sources) // lite.RECIPE.takes
    for name in ("warmer", "as they are", "each another"):
        found = []
        for draw in range(DRAWS):
            g = torch.Generator().manual_seed(draw)
            chosen = lite.RECIPE.takes * torch.randperm(rooms, generator=g)[:PICTURES] + torch.randint(
                lite.RECIPE.takes, (PICTURES,), generator=g
            )
            edits = targets[chosen]
            if name == "warmer":
                edits = edits * WARMER
            elif name == "each another":
                powers, gains = torch.randn(PICTURES, 1, 1, 1, generator=g), torch.randn(PICTURES, 3, 1, 1, generator=g)
                edits = edits ** (0.3 * powers).exp() * (0.15 * gains).exp()
            found.append(adapt.fit(model, sources[chosen], edits.clamp(0, 1), [[index] for index in range(PICTURES)])[0])
        helps, gain = sum(result.helps for result in found), sum(result.gain for result in found) / DRAWS
        print(
            f"edits {name}: {helps} of {DRAWS} looks of {PICTURES} rooms help, gain {gain:+.2f} dB in the mean of all", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rooms", type=int, default=60)
    parser.add_argument("--exteriors", type=int, default=20)
    parser.add_argument("--pairs", type=Path)
    options = parser.parse_args()
    model = load_checkpoint()
    assert isinstance(model, Lite)
    if options.pairs:
        dataset = PairDataset(read_pairs(options.pairs), SIZE)
        print(identity(model, [dataset[index]["tar"] for index in range(len(dataset))]))
        return
    exteriors, rooms = (
        lite.scenes(count, SEED, outdoors) for count, outdoors in ((options.exteriors, True), (options.rooms, False))
    )
    for name, (sources, targets) in (("exteriors", exteriors), ("rooms", rooms)):
        print(f"{name}: {identity(model, list(targets))}")
        with torch.inference_mode():
            prediction = model.predict(sources)
        farthest, full = prediction.distances.max(), (prediction.share == 1).sum()
        print(f"{len(sources)} photographs: {farthest:.2f} standard deviations at most, {full} get all of the edit", flush=True)
    looks(model, *rooms)


if __name__ == "__main__":
    main()
