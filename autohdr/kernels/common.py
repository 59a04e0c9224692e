"""What the ops share: autocast, the refusal of second derivatives, and the image ops' argument checks and layer norm."""

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_arguments(op: str, x: Tensor, expected: dict[str, tuple[Tensor | None, tuple[int, ...]]]) -> None:
    """Raises ValueError unless x is a floating [batch, channels, height, width] and each argument has its expected shape.
    norm_bias alone may be None."""
    if x.dim() != 4 or x.dtype not in DTYPES or 0 in x.shape[1:]:
        raise ValueError(
            f"{op}: x must be a floating [batch, channels, height, width] with no empty image, got {x.dtype} {list(x.shape)}"
        )
    for name, (tensor, shape) in expected.items():
        if tensor is None and name == "norm_bias":
            continue
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{op}: {name} must be a tensor {list(shape)}, got {type(tensor).__name__}")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{op}: {name} must be {list(shape)}, got {list(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name} must be on {x.device} as x is, got {tensor.device}")
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{op}: {name} must be floating, got {tensor.dtype}")


def autocast(x: Tensor) -> Tensor:
    """x in autocast's dtype where autocast is on for its device; float64 stays, as PyTorch's own ops leave it. Nothing else is
    cast: the parameters stay as they are."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def float_parameters(*tensors: Tensor | None) -> list[Tensor | None]:
    """The parameters as the compiled kernels take them: contiguous float32."""
    return [None if t is None else t.float().contiguous() for t in tensors]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm over the channels of x [batch, channels, height, width], both official kinds, computed in at least float32.

    With a bias: ``(x - mean) / sqrt(var + eps) * weight + bias``. Without: ``x / sqrt(var + eps) * weight``, where the mean is
    left in x although var is the variance about it.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    values, weight = x.movedim(1, -1).to(wide), weight.to(wide)
    if bias is not None:
        out = F.layer_norm(values, weight.shape, weight, bias.to(wide), eps)
    else:
        out = values * torch.rsqrt(values.var(-1, unbiased=False, keepdim=True) + eps) * weight
    return out.movedim(-1, 1).to(x.dtype)


def refuse_double_backward(op: str) -> None:
    """Without a formula PyTorch would hand out zeros as the gradient of a gradient."""

    def backward(ctx, *grads):
        raise RuntimeError(f"{op}: a second derivative is not implemented; use backend='reference' for it")

    torch.library.register_autograd(f"autohdr::{op}_backward", backward)
