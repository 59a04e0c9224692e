"""What the networks share below the level of a block: padding, convolutions, and modules that are used without being called."""

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.grad import conv2d_weight

from autohdr.errors import UserError
from autohdr.kernels.backends import is_as_on_a_gpu
from autohdr.kernels.common import any_count

Module = TypeVar("Module", bound=nn.Module)


class Uncalled(UserError):
    """A module that is used without being called would do something else if it were called."""

    def __init__(self, module: object, reason: str):
        super().__init__(
            f"{reason}. It is not called for the whole image: a kernel takes its weight, or others call its parts. "
            "Parametrise the weight (torch.nn.utils.parametrize) or merge the adapter into it: docs/fine_tuning.md"
        )
        self.module = module


def reach(module: object, kind: type[Module], **expected: Any) -> Module:
    """The module, for who takes its weights or its parts without calling it.

    Raises Uncalled where a call would do anything else than `kind` does: hooks, a wrapper in its place (an adapter), a forward of
    its own, attributes that are not as expected. A parametrised weight is the weight that it computes.
    """
    if not isinstance(module, kind) or type(module).forward is not kind.forward or "forward" in vars(module):
        raise Uncalled(module, f"expected {kind.__name__}, got {type(module).__name__} with a forward of its own")
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        raise Uncalled(module, "has a hook")
    for name, value in expected.items():
        if (actual := getattr(module, name)) is not value and (value is None or actual != value):
            found = "a bias" if name == "bias" else f"{name} {actual}"
            raise Uncalled(module, f"expected {name} {value}, got {found}")
    return module


def pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """image (B, C, H, W) reflected at the bottom and the right until both sides are multiples.

    Reflection reads as many rows and columns as it adds, beside the last ones; an image that has too few repeats its edges.
    """
    height, width = image.shape[-2:]
    bottom, right = -height % multiple, -width % multiple
    if torch.compiler.is_compiling():  # one program for all sizes: no branch may depend on them
        least = torch.sym_min(height - bottom, width - right)
        reflects: int = torch.sym_min(torch.sym_max(least, 0), 1)  # pyright: ignore[reportAssignmentType]  1 or 0, no float
        rows, columns = _places(image, height, multiple, reflects), _places(image, width, multiple, reflects)
        return image.permute(0, 2, 3, 1).index_select(1, rows).index_select(2, columns).permute(0, 3, 1, 2)
    if not (bottom or right):
        return image
    mode = "reflect" if bottom < height and right < width else "replicate"
    return F.pad(image, (0, right, 0, bottom), mode=mode)


def _places(image: Tensor, size: int, multiple: int, reflects: int) -> Tensor:
    """Where each row (or column) of the padded image is in the image: 0 ... size - 1, then back, or size - 1 again and again."""
    count = any_count((size + multiple - 1) // multiple)
    places = torch.arange(multiple * count, device=image.device)
    beyond = (places - (size - 1)).clamp(min=0)
    return places - beyond - reflects * beyond


def crop(image: Tensor, height: int, width: int) -> Tensor:
    """The first rows and columns of image (B, C, H, W)."""
    if torch.compiler.is_compiling():  # whether a slice is the whole image, and so contiguous, would be a branch
        rows, columns = (torch.arange(size, device=image.device) for size in (height, width))
        return image.permute(0, 2, 3, 1).index_select(1, rows).index_select(2, columns).permute(0, 3, 1, 2)
    return image[..., :height, :width]


def to_windows(x: Tensor, size: int) -> Tensor:
    """x (B, rows · size, columns · size, C) as (B, rows, columns, size², C)."""
    return x.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3).flatten(3, 4)


def from_windows(windows: Tensor, size: int) -> Tensor:
    """The inverse of to_windows."""
    return windows.unflatten(3, (size, size)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def relative_positions(size: int) -> Tensor:
    """For each pair of pixels of a window the row of a table with (2 · size - 1)² rows, one for each relative position:
    (size², size²) of int64 (Liu et al., Swin, 2021)."""
    row, column = (axis.flatten() for axis in torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij"))
    down, right = (axis[:, None] - axis + size - 1 for axis in (row, column))
    return down * (2 * size - 1) + right


STRIP_BYTES = 2 << 20
"""Of a strip of a half-precision convolution on a CPU in float32, input or output, unless the weights are larger, which oneDNN
reorders in each call."""


class Conv2d(nn.Conv2d):
    """nn.Conv2d with padding by a number of zeros, which computes in float32 on a CPU where x or autocast says half precision.

    PyTorch's own needs instructions that many processors don't have: without them it is ten to a hundred times slower and takes
    nine times its input's memory, with AVX512-BF16 half as fast as float32. Here strips of rows are widened one after the other.
    """

    padding: tuple[int, int]

    def forward(self, x: Tensor) -> Tensor:
        if (dtype := _half_on_cpu(x)) is None:
            return super().forward(x)
        return _convolve(x, self.weight, self.bias, dtype, self.stride[0], self.padding[0], self.groups, False)


class ConvTranspose2d(nn.ConvTranspose2d):
    """nn.ConvTranspose2d without output padding, in half precision as Conv2d."""

    padding: tuple[int, int]

    def forward(self, x: Tensor) -> Tensor:
        if (dtype := _half_on_cpu(x)) is None:
            return super().forward(x)
        return _convolve(x, self.weight, self.bias, dtype, self.stride[0], self.padding[0], self.groups, True)


class Mean(nn.Module):
    """Of each channel over all pixels, (B, C, H, W) to (B, C, 1, 1). AdaptiveAvgPool2d(1) can't be exported for all sizes."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The 1x1 convolution of x (B, C, H, W) by weight (D, C, 1, 1), in half precision as Conv2d."""
    if (dtype := _half_on_cpu(x)) is None:
        return F.conv2d(x, weight, bias)
    return _convolve(x, weight, bias, dtype, 1, 0, 1, False)


def add_pointwise(x: Tensor, skip: Tensor, weight: Tensor) -> Tensor:
    """x + pointwise(skip, weight), in x's memory; on a GPU one product, which reads and writes x once."""
    pixels = x.permute(0, 2, 3, 1)
    if (x.device.type == "cpu" and not is_as_on_a_gpu()) or not pixels.is_contiguous():
        return x.add_(pointwise(skip, weight))
    rows = skip.permute(0, 2, 3, 1).reshape(-1, skip.shape[1])
    pixels.view(-1, x.shape[1]).addmm_(rows.to(x.dtype), weight[:, :, 0, 0].mT.to(x.dtype))
    return x


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, in half precision as Conv2d."""
    if (dtype := _half_on_cpu(x)) is None:
        return F.linear(x, weight, bias)
    column = x.reshape(-1, x.shape[-1]).mT[None, :, :, None]
    y = _convolve(column, weight[:, :, None, None], bias, dtype, 1, 0, 1, False)
    return y[0, :, :, 0].mT.reshape(*x.shape[:-1], len(weight))


class Linear(nn.Linear):
    """nn.Linear, in half precision as Conv2d."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def _half_on_cpu(x: Tensor) -> torch.dtype | None:
    """The half-precision dtype that a convolution of x is to return, where it is to compute in float32; None elsewhere."""
    if x.device.type != "cpu" or is_as_on_a_gpu():
        return None
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64 else x.dtype
    return dtype if dtype.itemsize == 2 else None


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, stride: int, padding: int, groups: int, transposed: bool
) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        if torch.compiler.is_compiling():  # how many strips there are would be a branch
            function = F.conv_transpose2d if transposed else F.conv2d
            wide_bias = None if bias is None else bias.float()
            return function(x.float(), weight.float(), wide_bias, stride=stride, padding=padding, groups=groups).to(dtype)
        return _HalfConvolution.apply(x, weight, bias, dtype, stride, padding, groups, transposed)


class _HalfConvolution(torch.autograd.Function):
    """A convolution, or a transposed one, whose float32 copies are of a strip of rows alone, on the way back too."""

    @staticmethod
    def forward(x, weight, bias, dtype, stride, padding, groups, transposed):
        size, wide = weight.shape[-1], weight.float()
        bias = None if bias is None else bias.float()
        if transposed:
            shape = [(n - 1) * stride - 2 * padding + size for n in x.shape[-2:]]
            channels, of_strip = weight.shape[1] * groups, _transposed_rows
        else:
            shape = [(n + 2 * padding - size) // stride + 1 for n in x.shape[-2:]]
            channels, of_strip = weight.shape[0], _rows
        out = _new_image(x, channels, shape, dtype)
        for first, end in _strips(out, x, weight):
            out[:, :, first:end] = of_strip(x, wide, bias, first, end, stride, padding, groups)
        return out

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, _, *ctx.geometry, ctx.transposed = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight)

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def backward(ctx, d_out):
        (x, weight), (stride, padding, groups) = ctx.saved_tensors, ctx.geometry
        d_x = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            wide, of_strip = weight.float(), _rows if ctx.transposed else _transposed_rows
            d_x = _new_image(x, x.shape[1], x.shape[-2:], x.dtype)
            for first, end in _strips(d_x, d_out, weight):
                d_x[:, :, first:end] = of_strip(d_out, wide, None, first, end, stride, padding, groups)
        if ctx.needs_input_grad[1]:
            # Of a transposed convolution x and d_out change places.
            large, small = (d_out, x) if ctx.transposed else (x, d_out)
            d_weight = torch.zeros_like(weight, dtype=torch.float32)
            for first, end in _strips(small, large, weight):
                rows = _rows_under(large, weight, first, end, stride, padding)
                if _is_pointwise(weight, stride, padding, groups):
                    of_small, of_large = (t.permute(0, 2, 3, 1).flatten(0, 2) for t in (small[:, :, first:end].float(), rows))
                    d_weight += (of_small.mT @ of_large)[:, :, None, None]
                    continue
                d_weight += conv2d_weight(
                    rows,
                    weight.shape,
                    small[:, :, first:end].float(),
                    stride,
                    (0, padding),  # pyright: ignore[reportArgumentType]  torch declares no pair
                    1,
                    groups,
                )
            d_weight = d_weight.to(weight.dtype)
        if ctx.needs_input_grad[2]:
            d_bias = d_out.sum((0, 2, 3), dtype=torch.float32).to(ctx.bias_dtype)
        return d_x, d_weight, d_bias, None, None, None, None, None


def _is_pointwise(weight: Tensor, stride: int, padding: int, groups: int) -> bool:
    """A product of matrices, of which PyTorch makes a slow convolution where there is one thread."""
    return weight.shape[2:] == (1, 1) and stride == groups == 1 and padding == 0


def _new_image(like: Tensor, channels: int, shape, dtype: torch.dtype) -> Tensor:
    size = (len(like), channels, *shape)
    return torch.empty(size, dtype=dtype, device=like.device, memory_format=torch.channels_last)


def _strips(a: Tensor, b: Tensor, weight: Tensor):
    """[first, end) of the rows of a, where b is the convolution's other image."""
    height = a.shape[2]
    bytes_a_row = 4 * max(a.numel(), b.numel(), 1) / max(height, 1)
    rows = max(int(max(STRIP_BYTES, 4 * weight.numel()) / bytes_a_row), 1)
    if isinstance(a, FakeTensor):  # while planning: one strip takes what each of them takes
        height = min(height, rows)
    return [(first, min(first + rows, height)) for first in range(0, height, rows)]


def _rows_under(x: Tensor, weight: Tensor, first: int, end: int, stride: int, padding: int) -> Tensor:
    """The rows of x, in float32 and with the zeros beyond it, that rows [first, end) of its convolution read."""
    above, below = first * stride - padding, (end - 1) * stride - padding + weight.shape[-1]
    rows = x[:, :, max(above, 0) : below].float()
    zeros = max(-above, 0), max(below - x.shape[2], 0)
    return F.pad(rows, (0, 0, *zeros)) if any(zeros) else rows


def _rows(x: Tensor, weight: Tensor, bias, first: int, end: int, stride: int, padding: int, groups: int) -> Tensor:
    """Rows [first, end) of the convolution of x."""
    rows = _rows_under(x, weight, first, end, stride, padding)
    if _is_pointwise(weight, stride, padding, groups):
        return F.linear(rows.permute(0, 2, 3, 1), weight[:, :, 0, 0], bias).permute(0, 3, 1, 2)
    return F.conv2d(rows, weight, bias, stride, (0, padding), 1, groups)


def _transposed_rows(x: Tensor, weight: Tensor, bias, first: int, end: int, stride: int, padding: int, groups: int) -> Tensor:
    """Rows [first, end) of the transposed convolution of x."""
    top = max(-(-(first + padding - weight.shape[-1] + 1) // stride), 0)
    rows = x[:, :, top : (end - 1 + padding) // stride + 1].float()
    if _is_pointwise(weight, stride, padding, groups):
        return F.linear(rows.permute(0, 2, 3, 1), weight[:, :, 0, 0].mT, bias).permute(0, 3, 1, 2)
    begins = top * stride - padding
    return F.conv_transpose2d(rows, weight, bias, stride, (0, padding), 0, groups)[:, :, first - begins : end - begins]
