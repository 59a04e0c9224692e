"""What the tests of whole training runs share."""

import signal

import pytest
import torch

from autohdr.train import loop

STATE = "checkpoint_last.state.pt"


def same(a, b):
    """Bitwise equality of two trees of tensors and plain values."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def interrupt_at_step(monkeypatch, step):
    """Ctrl-C in the midst of that optimiser step, counted from 1."""
    original = loop._Trainer._train_step

    def train_step(self, *args):
        if self.step + 1 == step:
            signal.raise_signal(signal.SIGINT)
        return original(self, *args)

    monkeypatch.setattr(loop._Trainer, "_train_step", train_step)


@pytest.fixture(autouse=True)
def blank_curve(monkeypatch):
    """Drawing takes longer than these epochs; test_record draws."""
    monkeypatch.setattr(loop.record, "draw_curve", lambda path, history: path.touch())
