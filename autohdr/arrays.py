"""NumPy's arrays and PyTorch's tensors by one name each where theirs differ: what is written once for both needs no PyTorch."""

import importlib
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from autohdr.measure import cores

Array = Any
"""An ndarray or a Tensor: what a function is given, it returns."""

SAMPLES = 1 << 16  # of an image, that a thread is worth starting for

try:
    _kernels = importlib.import_module("autohdr._C_arrays")
except ImportError:  # without compiled kernels, or with damaged ones: autohdr.kernels says so
    _kernels = None


def library(x: Array) -> Any:
    """The module whose functions take x: numpy or torch."""
    if isinstance(x, np.ndarray):
        return np
    import torch

    return torch


def constant(values: Any, like: Array) -> Array:
    """Values as an array of the dtype, and on the device, of another one."""
    return np.asarray(values, like.dtype) if isinstance(like, np.ndarray) else like.new_tensor(values)


def counted_up(count: int, like: Array) -> Array:
    """The whole numbers below count."""
    return np.arange(count) if isinstance(like, np.ndarray) else library(like).arange(count, device=like.device)


def single(x: Array) -> Array:
    """x in float32, contiguous."""
    return np.ascontiguousarray(x, np.float32) if isinstance(x, np.ndarray) else x.float().contiguous()


def ordered(x: Array, axis: int) -> Array:
    """Sorted."""
    return np.sort(x, axis) if isinstance(x, np.ndarray) else x.sort(axis).values


def as_array(x: Array) -> np.ndarray:
    """NumPy's, of either."""
    return x if isinstance(x, np.ndarray) else x.detach().cpu().numpy()


def as_bytes(x: Array) -> np.ndarray:
    """What x has in memory, in its order, of any dtype."""
    if isinstance(x, np.ndarray):
        return np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    return as_array(x.detach().contiguous().view(-1).view(library(x).uint8))


def as_in_float32(x: Array) -> AbstractContextManager[Any]:
    """A context in which operations are not cast down, as autocast does."""
    if isinstance(x, np.ndarray):
        return nullcontext()
    from autohdr.kernels.common import autocast_off

    return autocast_off(x.device)


def apply_edit(x: Array, curves: Array, matrix: Array) -> Array:
    """kernels.apply_edit without a grid, of tensors or of arrays; x as an array is float32, uint8 or uint16, best [B, H, W, 3] in
    memory. Arrays go through the kernels compiled for them or, where there are none, as tensors."""
    if not isinstance(x, np.ndarray):
        from autohdr import kernels

        return kernels.apply_edit(x, curves, matrix)
    if not _kernels:
        import torch

        return as_array(apply_edit(*(torch.from_numpy(np.ascontiguousarray(array)) for array in (x, curves, matrix))))
    pixels = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    threads = min(threads_wanted(), -(-pixels.size // SAMPLES))
    return _kernels.apply_edit(pixels, single(curves), single(matrix), threads).transpose(0, 3, 1, 2)


def threads_wanted() -> int:
    """As PyTorch has it, whether it is loaded or not."""
    if torch := sys.modules.get("torch"):
        return torch.get_num_threads()
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(wanted) if wanted.isdecimal() and int(wanted) else cores()
