"""What the ops share: dtypes, autocast, layouts, checks of arguments, and the image ops' layer norm."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from autohdr.kernels.backends import is_as_on_a_gpu

HALVES = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*HALVES, torch.float64)
MOST_CODE = 127
"""The largest number of a product in 8 bits; kMostCode in cpu_codes.h."""
WIDE = 256
"""Channels of x from which on hidden ones are kept on a CPU for the backward pass; kWide in kept.h."""


Expected = Mapping[str, tuple[Tensor | None, tuple[int, ...]]]
"""Arguments by name: each with the shape that it must have."""


def channels_of(x: Tensor) -> int:
    """Of an image that has not been checked: 0 if it is none."""
    return x.shape[1] if isinstance(x, Tensor) and x.dim() == 4 else 0


def check_image(
    op: str, x: Tensor, expected: Expected, optional: tuple[str, ...] = ("norm_bias",), int8: tuple[str, ...] = ()
) -> None:
    """Raises ValueError unless x is a floating [batch, channels, height, width] and check_tensors finds nothing."""
    if not isinstance(x, Tensor) or x.dim() != 4 or x.dtype not in DTYPES or 0 in x.shape[1:]:
        got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{op}: x must be a floating [batch, channels, height, width] with no empty image, got {got}")
    check_tensors(op, "x", x, expected, optional, int8)


def check_tensors(
    op: str, first: str, x: Tensor, expected: Expected, optional: tuple[str, ...] = (), int8: tuple[str, ...] = ()
) -> None:
    """Raises ValueError unless each argument has its shape, is floating, or int8 where it is named there, and is where x is, the
    op's first argument. The optional ones may be None."""
    for name, (tensor, shape) in expected.items():
        if tensor is None and name in optional:
            continue
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{op}: {name} must be a tensor {list(shape)}, got {type(tensor).__name__}")
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{op}: {name} must be {list(shape)}, got {list(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name} must be on {x.device} as {first} is, got {tensor.device}")
        fits = tensor.dtype == torch.int8 if name in int8 else tensor.dtype.is_floating_point
        if not fits:
            raise ValueError(f"{op}: {name} must be {'int8' if name in int8 else 'floating'}, got {tensor.dtype}")


def keeps(x: Tensor) -> bool:
    """Whether the compiled kernels keep hidden channels for the backward pass, where there will be one."""
    return x.shape[1] >= WIDE and x.device.type == "cpu" and not is_as_on_a_gpu()


def fake_kept(x: Tensor, channels: int, keep: bool) -> Tensor:
    """`channels` numbers a pixel of x, or none; new_kept in kept.h."""
    return x.new_empty((x.shape[0] * x.shape[2] * x.shape[3] * channels if keep and keeps(x) else 0,))


def autocast(x: Tensor) -> Tensor:
    """x in autocast's dtype where autocast is on for its device; float64 stays, as PyTorch's own ops leave it. Nothing else is
    cast: the parameters stay as they are."""
    device = x.device.type
    if _has_autocast(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


def autocast_off(device: torch.device) -> AbstractContextManager:
    return torch.autocast(device.type, enabled=False) if _has_autocast(device.type) else nullcontext()


def _has_autocast(device: str) -> bool:
    """Meta and some more have none. As torch.compile traces it: no errors, and is_autocast_available from torch 2.12 on alone."""
    if device == "meta":
        return False
    try:
        torch.is_autocast_enabled(device)
    except RuntimeError:
        return False
    return True


_above_one = False


@contextmanager
def counts_above_one() -> Iterator[None]:
    """What is exported meanwhile, with prefer_deferred_runtime_asserts_over_guards, requires any_count's numbers to be above 1.

    For AOTInductor, which takes a convolution's output for contiguous where a side is not to be followed back, although it is
    channels-last, and reads the wrong pixels (torch 2.13 and 2.14: conv in torch/_subclasses/fake_impls.py).
    """
    global _above_one
    _above_one = True
    try:
        yield
    finally:
        _above_one = False


def any_count(count: int) -> int:
    """A number above 0 that follows from an image's sides, of which an exported program assumes no more.

    PyTorch takes a number out of a tensor for any number. Of one that it can follow back to the sides it would ask whether it is
    1, as the height of a network's deepest level, and the program would be for images like the example alone; under
    counts_above_one it asks as it runs, and stops where it is.
    """
    if torch.compiler.is_exporting():
        if _above_one:
            torch._check(count > 1)
            return count
        count = torch.tensor(count).item()  # pyright: ignore[reportAssignmentType]
        torch._check(count >= 1)
    return count


def parameter(t: Tensor | None) -> Tensor | None:
    """As the compiled kernels take parameters: contiguous, float32 or int8."""
    return None if t is None else (t if t.dtype == torch.int8 else t.float()).contiguous()


def channels_last(image: Tensor) -> Tensor:
    """image itself if it is contiguous in channels_last, else a copy that is; without a memory_format, which torch.vmap lacks."""
    return image.movedim(1, -1).contiguous().movedim(-1, 1)


def contiguous_like(t: Tensor) -> Tensor:
    return t.new_empty(t.shape)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm over the channels of x [batch, channels, height, width], both official kinds, computed in at least float32.

    With a bias: ``(x - mean) / sqrt(var + eps) * weight + bias``. Without: ``x / sqrt(var + eps) * weight``, where the mean is
    left in x although var is the variance about it.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    values, weight = x.permute(0, 2, 3, 1).to(wide), weight.to(wide)
    if bias is not None:
        out = F.layer_norm(values, weight.shape, weight, bias.to(wide), eps)
    else:
        out = values * torch.rsqrt(values.var(-1, unbiased=False, keepdim=True) + eps) * weight
    return out.permute(0, 3, 1, 2).to(x.dtype)


def as_codes(values: Tensor) -> Tensor:
    """The nearest integers up to MOST_CODE of either sign, in the dtype of the values; of two the even one."""
    return values.round().clamp(-MOST_CODE, MOST_CODE)


def scale_of_codes(largest: Tensor) -> Tensor:
    """What a code of 1 stands for where `largest` becomes MOST_CODE; 1 where there is nothing but zeros."""
    return torch.where(largest > 0, largest / MOST_CODE, 1.0)


def product_of_codes(codes: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The 1×1 convolution of codes [batch, channels, height, width] by weight, int8 [rows, channels, 1, 1], each row times its
    scale [rows]. The sums are exact."""
    return F.conv2d(codes.double(), weight.double()).to(codes.dtype) * scale.to(codes.dtype)[:, None, None]
