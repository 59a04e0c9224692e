"""Each op as a plain function of its tensors, for tests that are the same for all; its sizes are in its own test file."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from backend import BACKEND
from torch import Tensor

from autohdr.kernels import OPS, declare

DIFFERENTIABLE = [op for op in OPS if f"{op}_backward" in declare.KERNELS]


def call(op: str, size: str) -> tuple[Callable[..., Tensor], list[Tensor], Tensor]:
    """(function of the tensors and backend=, tensors, gradient of its result). size: SMALL, PLAIN (no optional tensor), LARGE."""
    tests = importlib.import_module(f"test_{op}")
    return tests.call(getattr(tests, size))


def image_call(tests, shape):
    """Of a subclass of ImageOpTests or Int8OpTests."""
    tensors, dy, keywords = tests.arguments(shape, torch.float32)
    given = [t for t in tensors if t is not None]

    def function(*leaves, backend=BACKEND):
        leaves = iter(leaves)
        return tests.op(*(t if t is None else next(leaves) for t in tensors), **keywords, backend=backend)

    return function, given, dy


def sequence_call(op, tensors, keywords, dy):
    def function(*leaves, backend=BACKEND):
        return op(**dict(zip(tensors, leaves, strict=True)), **keywords, backend=backend)

    return function, list(tensors.values()), dy


@contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch computes with so many of them, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
