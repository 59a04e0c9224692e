"""What the ops share: their definition, autocast, and the image ops' argument checks and layer norm."""

import importlib
from collections import defaultdict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, library
from torch.utils.flop_counter import register_flop_formula

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)  # of every op
_passes: dict[str, list[str]] = defaultdict(list)


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


def define_op(
    op: str,
    forward: str,
    backward: str,
    *,
    fake: Callable,
    fake_backward: Callable,
    setup_context: Callable,
    gradients: Callable,
    flops: Callable,
    flops_backward: Callable,
) -> None:
    """Defines autohdr::<op> and autohdr::<op>_backward, whose kernels C++ registers, and the same two again as
    autohdr::<op>_triton and autohdr::<op>_triton_backward.

    Args:
        forward, backward: schemas. The backward op is one of its own, and its derivative raises: without a formula PyTorch would
            hand out zeros as the gradient of a gradient.
        gradients: called as ``gradients(backward_op, ctx, *grads)``.
        fake, fake_backward, setup_context, flops, flops_backward: as PyTorch's custom ops and register_flop_formula want them.
    """

    def refuse(ctx, *grads):
        raise RuntimeError(f"{op}: a second derivative is not implemented; use backend='reference' for it")

    for name in (op, f"{op}_triton"):
        for suffix, schema, of_fakes, of_flops in (
            ("", forward, fake, flops),
            ("_backward", backward, fake_backward, flops_backward),
        ):
            library.define(f"autohdr::{name}{suffix}", schema, tags=TAGS)
            library.register_fake(f"autohdr::{name}{suffix}", of_fakes)
            register_flop_formula(getattr(torch.ops.autohdr, name + suffix))(of_flops)
        backward_op = getattr(torch.ops.autohdr, f"{name}_backward")
        library.register_autograd(
            f"autohdr::{name}",
            lambda ctx, *grads, backward_op=backward_op: gradients(backward_op, ctx, *grads),
            setup_context=setup_context,
        )
        library.register_autograd(f"autohdr::{name}_backward", refuse)
    register_triton(op, "cuda")


def define_pass(op: str, name: str, schema: str, fake: Callable) -> None:
    """Defines autohdr::<op>_<name> and autohdr::<op>_<name>_triton, a part of an op without gradients; before the op itself."""
    _passes[op].append(name)
    for full in (f"{op}_{name}", f"{op}_{name}_triton"):
        library.define(f"autohdr::{full}", schema, tags=TAGS)
        library.register_fake(f"autohdr::{full}", fake)


def register_triton(op: str, device_type: str) -> None:
    """Makes the functions ``forward`` and ``backward`` of autohdr/kernels/<op>/triton_impl.py, which take the ops' arguments, the
    kernels of autohdr::<op>_triton and its backward op; those that have a pass's name are the pass's. They run on their first
    argument's device. The module is imported by the first call: Triton is optional."""
    passes = [(f"{op}_{name}_triton", name) for name in _passes[op]]

    for name, function in ((f"{op}_triton", "forward"), (f"{op}_triton_backward", "backward"), *passes):

        def run(*args, function=function):
            with torch.cuda.device_of(args[0]):
                return getattr(importlib.import_module(f"autohdr.kernels.{op}.triton_impl"), function)(*args)

        library.impl(f"autohdr::{name}", device_type, run)


def compiled_op(op: str, backend: str) -> Callable:
    """The op that runs a backend's kernels; "cuda" and "cpu" are one op, told apart by where its tensors are."""
    return getattr(torch.ops.autohdr, f"{op}_triton" if backend == "triton" else op)
