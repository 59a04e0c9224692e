"""What the tests of whole training runs share."""

import signal

import numpy as np
import pytest
import torch
from PIL import Image

from autohdr.train import record
from autohdr.train.step import Step

STATE = "checkpoint_last.state.pt"
TINY = {"dim": 8, "num_blocks": [1, 1, 1, 1], "num_refinement_blocks": 0}


def write_pairs(folder, count, seed):
    """`count` pairs of 32 x 32 pictures: smooth colours, and the same brightened by a square root."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    lines = []
    for index in range(count):
        small = rng.integers(0, 160, (4, 4, 3), dtype=np.uint8)
        source = np.asarray(Image.fromarray(small).resize((32, 32), Image.Resampling.BICUBIC))
        target = (255 * np.sqrt(source / 255)).round().astype(np.uint8)
        for name, pixels in (("src", source), ("tar", target)):
            Image.fromarray(pixels).save(folder / f"{index}_{name}.png")
        lines.append(f'{{"src": "{index}_src.png", "tar": "{index}_tar.png"}}\n')
    (folder / "pairs.jsonl").write_text("".join(lines))
    return folder / "pairs.jsonl"


def same(a, b):
    """Bitwise equality of two trees of tensors and plain values."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def patch_steps(monkeypatch, patched):
    """An optimiser step becomes `patched(make, learner, number)`, where `make()` makes it and returns its result; from 1."""
    original = Step.__call__

    def call(self, *args, step, **others):
        return patched(lambda: original(self, *args, step=step, **others), self.learner, step + 1)

    monkeypatch.setattr(Step, "__call__", call)


def interrupt_at_step(monkeypatch, step):
    """Ctrl-C in the midst of that optimiser step, counted from 1."""

    def interrupt(make, learner, number):
        if number == step:
            signal.raise_signal(signal.SIGINT)
        return make()

    patch_steps(monkeypatch, interrupt)


@pytest.fixture(autouse=True)
def blank_curve(monkeypatch):
    """Drawing takes longer than these epochs; test_record draws."""
    monkeypatch.setattr(record, "draw_curve", lambda path, history: path.touch())
