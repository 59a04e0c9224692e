"""A stand-in for torch.cuda's graphs on a machine without a GPU: a capture records the calls, a replay makes them again into the
same memory. Unlike a GPU's, its capture runs what it records, though a GPU's results are not there before the first replay: so
the memory holds NaN after it."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def storages(tree):
    return {t.untyped_storage().data_ptr() for t in tree_leaves(tree) if isinstance(t, torch.Tensor)}


class RecordedGraph(TorchDispatchMode):
    """torch.cuda.CUDAGraph. broken: calls of this name are left out of a replay."""

    broken = ""
    captures = []

    def __init__(self):
        super().__init__()
        self.calls, self.replays = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "_local_scalar_dense" in function.name():
            raise RuntimeError("operation not permitted when stream is capturing\nmore about it")
        out = function(*args, **kwargs or {})
        inputs = storages((args, kwargs))
        made = [o if isinstance(o, torch.Tensor) and not storages(o) & inputs else None for o in tree_leaves(out)]
        self.calls.append((function, args, kwargs or {}, made))
        return out

    @contextmanager
    def capture(self, pool=None, stream=None, capture_error_mode="global"):
        assert capture_error_mode == "thread_local"  # else the loader's thread, which locks pages, would end it
        RecordedGraph.captures.append(self)
        with self:
            yield
        for *_, made in self.calls:
            for tensor in made:
                if tensor is not None and tensor.is_floating_point():
                    tensor.data.fill_(torch.nan)

    @torch.no_grad()
    @torch.autocast("cpu", enabled=False)  # the calls were recorded beneath both
    def replay(self):
        self.replays += 1
        for function, args, kwargs, made in self.calls:
            if function.name().endswith(f"::{self.broken}"):
                continue
            for new, old in zip(tree_leaves(function(*args, **kwargs)), made, strict=True):
                if old is not None:
                    old.data.copy_(new)

    def pool(self):
        return 0, 1


@pytest.fixture
def recorded(monkeypatch):
    """Every graph that is captured, in order."""
    stream = type("Stream", (), {"wait_stream": lambda self, other: None})
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", RecordedGraph.capture)
    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    for name in ("stream", "device"):
        monkeypatch.setattr(torch.cuda, name, nullcontext)
    monkeypatch.setattr("autohdr.models.graphs.require_gpu", lambda device: None)
    monkeypatch.setattr(RecordedGraph, "captures", [])
    return RecordedGraph.captures
