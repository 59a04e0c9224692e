"""A training loop of one's own: a small Restormer learns to edit synthetic rooms, and is saved and loaded again.

    python examples/own_training_loop.py

`autohdr train` does the same with validation, checkpoints and resuming; here is what is left when none of that is wanted.
"""

import argparse
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

from autohdr.data.synthetic import render_pair
from autohdr.metrics import psnr
from autohdr.models import create_model, load_checkpoint, save_weights


def rooms(first_seed: int, count: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Photographs and edits of so many rooms, each [count, 3, side, side] in [0, 1]."""
    pairs = [render_pair(seed, side, side) for seed in range(first_seed, first_seed + count)]
    photos, edits = (torch.stack([torch.tensor(pair[i]) for pair in pairs]) for i in (0, 1))
    return tuple(images.permute(0, 3, 1, 2).float() / 255 for images in (photos, edits))


def mean_psnr(model: torch.nn.Module, photos: torch.Tensor, edits: torch.Tensor) -> float:
    model.eval()
    with torch.inference_mode():
        return float(psnr(model(photos).clamp(0, 1), edits).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rooms", type=int, default=32, help="to train on")
    parser.add_argument("--side", type=int, default=64, help="of a room's square picture, in pixels, at least 32")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument(
        "--out", type=Path, default=Path(tempfile.gettempdir(), "own.safetensors"), help="where to save the weights"
    )
    args = parser.parse_args()

    torch.manual_seed(0)
    photos, edits = rooms(1, args.rooms, args.side)
    held_out = rooms(10_001, 6, args.side)

    model = create_model("restormer_nano").to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=args.steps)

    losses = []
    for step in range(1, args.steps + 1):
        model.train()
        batch = torch.randint(args.rooms, (4,))
        source, target = photos[batch], edits[batch]
        if step % 2:  # mirror every other batch
            source, target = source.flip(-1), target.flip(-1)
        loss = F.l1_loss(model(source), target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % max(1, args.steps // 5) == 0:
            print(f"step {step:4d}  L1 {sum(losses[-10:]) / len(losses[-10:]):.4f}", flush=True)

    unedited, edited = float(psnr(*held_out).mean()), mean_psnr(model, *held_out)
    print(f"rooms held out, PSNR: unedited {unedited:.2f} dB, edited {edited:.2f} dB")

    save_weights(args.out, model, {"psnr": edited})
    again = load_checkpoint(args.out)
    print(
        f"saved to {args.out}; loaded again: {again.config.name}, {again.metadata['psnr']:.2f} dB, "
        f"measured {mean_psnr(again, *held_out):.2f} dB"
    )


if __name__ == "__main__":
    main()
