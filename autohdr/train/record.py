"""Files for people to read: the CSV and JSONL logs, the curve and the sample pictures."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from autohdr.errors import UserError
from autohdr.files import append, finite, replacing

Triptych = tuple[Tensor, Tensor, Tensor]
"""Source, output and target of a pair, (3, H, W) in [0, 1]."""


def append_lines(path: Path, entries: list[dict[str, Any]]) -> None:
    """Add JSON objects to a JSONL log, all or none: where the disk is full, OSError, and the log is as it was.

    A number that is not finite, which JSON lacks, becomes null.
    """
    lines = "".join(json.dumps(finite(entry)) + "\n" for entry in entries).encode()
    append(path, lines)


def rewind(path: Path, step: int) -> None:
    """Drop the lines after `step`, which a resumed run writes again, and a last line that a crash cut short.

    Raises UserError, and changes nothing, where any other line is not one of a run's log.
    """
    kept, lines = [], path.read_bytes().split(b"\n") if path.exists() else [b""]
    for number, line in enumerate(lines, 1):
        try:
            if line.strip() and json.loads(line)["step"] <= step:
                kept.append(line + b"\n")
        except (ValueError, LookupError, TypeError) as error:
            if number < len(lines):  # the last has no line feed after it
                raise UserError(
                    f"{path}:{number}: expected a run's log, objects with a step, got {line[:80]!r} ({error!r})"
                ) from None
    with replacing(path) as part:  # a crash while writing leaves the old log
        part.write_bytes(b"".join(kept))


def write_csv(path: Path, history: list[dict[str, Any]]) -> None:
    """One row for each epoch."""
    with replacing(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, history[0].keys())
        writer.writeheader()
        writer.writerows(history)


def draw_curve(path: Path, history: list[dict[str, Any]]) -> None:
    """PNG of L1, PSNR and SSIM over the epochs, and of the loss and its components where it has others than L1."""
    from matplotlib.figure import Figure  # slow to import. Not pyplot, which wants a display and has global state

    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(12, 3.6))
    figure.subplots_adjust(left=0.05, right=0.98, bottom=0.15, top=0.9, wspace=0.2)
    panels = {
        "L1": {"train": "train_l1", "validation": "val_l1"},
        "PSNR (dB)": {"validation": "val_psnr"},
        "SSIM": {"validation": "val_ssim"},
    }
    components = {key.removeprefix("train_"): key for key in history[0] if key.startswith("train_")}
    if len(components) > 2:  # more than the loss and L1
        panels["Training losses, unweighted"] = components
        figure.set_figwidth(16)
    for axes, (title, lines) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        colours = {"train": "tab:grey", "validation": "tab:blue", "loss": "black"}
        for label, key in lines.items():
            values = [row[key] for row in history]
            axes.plot(epochs, values, label=label, color=colours.get(label), marker="." * (len(epochs) < 40))
        by_powers = lines is components and not any(row[key] <= 0 for row in history for key in lines.values())
        axes.set(title=title, xlabel="epoch", yscale="log" if by_powers else "linear")
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in figure.axes[::3]:
        axes.legend()
    figure.savefig(path, dpi=110)


def write_sheet(path: Path, rows: Sequence[Sequence[Tensor]], gap: int = 8) -> None:
    """JPEG with the pictures of each row, (3, H, W) in [0, 1], side by side, `gap` pixels between."""
    pictures = [[(image.permute(1, 2, 0) * 255).round().byte().cpu().numpy() for image in row] for row in rows]
    width = max(sum(image.shape[1] + gap for image in row) - gap for row in pictures)
    heights = [max(image.shape[0] for image in row) for row in pictures]
    sheet = np.full((sum(heights) + gap * (len(rows) - 1), width, 3), 255, np.uint8)
    top = 0
    for row, height in zip(pictures, heights, strict=True):
        left = 0
        for image in row:
            sheet[top : top + image.shape[0], left : left + image.shape[1]] = image
            left += image.shape[1] + gap
        top += height + gap
    Image.fromarray(sheet).save(path, quality=92)
