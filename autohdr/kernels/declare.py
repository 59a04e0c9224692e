"""One declaration an op: from the signature of its reference follow schemas, fake kernels, derivatives, vmap and FLOPs.

``declare`` defines autohdr::<op> and autohdr::<op>_backward, whose kernels C++ registers, and without gradients
``declare_pass`` a part of an op and ``declare_inference`` an op. Each is defined once more with _triton behind its name: its
kernel is then a function of <op>/triton_impl.py, called forward, backward, or as the pass. The reference's tensors come first
among its arguments.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, library
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import Function, _SingleLevelFunction
from torch.utils.flop_counter import register_flop_formula

from autohdr.kernels.backends import OPS, resolve
from autohdr.kernels.common import autocast_off, parameter

TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)  # of every op
_LIBRARY = library.Library("autohdr", "FRAGMENT")
KERNELS: dict[str, tuple[str, str]] = {}
"""All that is defined, but for Triton's twins: the op that it belongs to, and its function's name in that op's triton_impl.py."""


@dataclass(frozen=True)
class Op:
    """A declared op, or a pass of one: called with the reference's arguments, it runs them on a backend.

    op: whose backends run it. returned: how many of the compiled op's outputs a caller gets; the others are kept for the backward
    pass. more: what the compiled op takes behind the reference's arguments.
    """

    name: str
    op: str
    reference: Callable
    prepare: Callable
    returned: int
    more: tuple[bool, ...] = ()

    def __call__(self, *arguments: Any, backend: str) -> Any:
        backend = resolve(self.op, backend, arguments[0])
        if backend == "reference":
            with autocast_off(arguments[0].device):
                return self.reference(*arguments)
        compiled = getattr(torch.ops.autohdr, self.name + "_triton" * (backend == "triton"))
        outputs = compiled(*self.prepare(*arguments, *self.more))
        if isinstance(outputs, Tensor):
            return outputs
        return outputs[0] if self.returned == 1 else outputs[: self.returned]


def declare(
    reference: Callable,
    *,
    dtypes: dict[str, tuple[torch.dtype, ...]],
    fake: Callable,
    flops: Callable,
    layout: Callable[[Tensor], Tensor],
    prepare: Callable | None = None,
    outputs: tuple[str, ...] = ("y",),
    differentiable: int = 1,
    forward_only: int = 0,
    keep: str | None = None,
    like: Callable[[Tensor], Tensor] = torch.empty_like,
) -> Op:
    """Defines the op that has the name and the arguments of `reference`.

    The backward op takes the gradients of the differentiable outputs, the tensors, the outputs that are kept, and the other
    arguments but the last `forward_only`; it returns a gradient for each tensor, empty where that is None. The forward pass saves
    what the backward op takes, nothing else.

    Args:
        dtypes: of the first tensor, for each backend that the op has beside the reference.
        fake: the op on fake tensors, as the compiled kernels lay their outputs out.
        flops: of shapes in place of the tensors. The backward op counts twice as many: the gradient's own products; what is
            recomputed does not count.
        layout: how the kernels want the first tensor and its output's gradient.
        prepare: the arguments as the kernels want them; by default the first tensor in `layout`, the others as parameters.
        outputs: the first `differentiable` ones have gradients, the others are kept for the backward pass.
        keep: the name of one more argument, the last, of the op, `fake`, `flops` and `prepare`: whether there will be a backward
            pass. Autograd says so; where there is none, what is kept for it may be empty.
        like: a gradient's memory, for the tensor that it is of.
    """
    op = reference.__name__
    OPS[op] = dtypes
    arguments = _arguments(reference)
    if keep:
        arguments, forward_only = [*arguments, f"bool {keep}"], forward_only + 1
    count = sum(a.startswith("Tensor") for a in arguments)
    kept = outputs[differentiable:]
    flags = arguments[count : len(arguments) - forward_only]
    gradients = [f"Tensor{'?' if i else ''} {_gradient(name)}" for i, name in enumerate(outputs[:differentiable])]
    backward = [*gradients, *arguments[:count], *(f"Tensor {name}" for name in kept), *flags]
    prepare = prepare or partial(_first_and_parameters, layout)

    def prepare_gradients(first, *others):
        return None if first is None else layout(first), *(None if d is None else d.contiguous() for d in others)

    def prepare_backward(*inputs):
        grads, tensors, rest = inputs[:differentiable], inputs[differentiable:][:count], inputs[differentiable + count :]
        prepared = prepare(*tensors, *rest[len(kept) :], *(None,) * forward_only)
        return *prepare_gradients(*grads), *prepared[:count], *(t.contiguous() for t in rest[: len(kept)]), *rest[len(kept) :]

    def fake_backward(*inputs):
        tensors = inputs[differentiable:][:count]
        return tuple(tensors[0].new_empty(0, dtype=torch.float32) if t is None else like(t) for t in tensors)

    def save(ctx, inputs, output):
        extra = () if isinstance(output, Tensor) else output[differentiable:]
        ctx.save_for_backward(*inputs[:count], *extra)
        ctx.mark_non_differentiable(*extra)
        ctx.set_materialize_grads(False)
        ctx.flags = inputs[count : len(inputs) - forward_only]

    def differentiate(ctx, *grads, backward_op):
        grads = list(prepare_gradients(*grads[:differentiable]))
        if all(d is None for d in grads):
            return (None,) * len(arguments)
        saved = ctx.saved_tensors  # once: a checkpoint computes again what it hands out, and does not do so twice
        tensors = saved[:count]
        if grads[0] is None:
            grads[0] = torch.zeros_like(tensors[0], memory_format=torch.contiguous_format)
        found = backward_op(*grads, *saved, *ctx.flags)
        return *(None if t is None else d for t, d in zip(tensors, found, strict=True)), *(None,) * (len(arguments) - count)

    def flops_backward(*shapes):
        return 2 * flops(*shapes[differentiable:][:count], *shapes[differentiable + count + len(kept) :])

    for suffix in _suffixes(op):
        backward_op = _define(
            f"{op}_backward{suffix}",
            _schema(backward, ("",) * count),
            fake_backward,
            prepare_backward,
            f"{op}: a second derivative",
        )
        forward_op = _define(
            op + suffix,
            _schema(arguments, outputs),
            fake,
            prepare,
            f"{op}: a forward-mode derivative",
            save,
            partial(differentiate, backward_op=backward_op),
            bool(keep),
        )
        for packet, count_flops in ((forward_op, flops), (backward_op, flops_backward)):
            register_flop_formula(packet)(lambda *shapes, count_flops=count_flops, out_shape=None, **_: count_flops(*shapes))
    _add_kernel(op, op, "forward")
    _add_kernel(f"{op}_backward", op, "backward")
    return Op(op, op, reference, prepare, differentiable, (False,) if keep else ())


def declare_pass(op: Op, reference: Callable, *, outputs: tuple[str, ...] = ("y",), fake: Callable) -> Op:
    """Defines a part of an op, named <op>_<pass>, with the name and the arguments of `reference`; its backends are the op's, and
    its function in triton_impl.py is called <pass>. It has no derivative of any kind."""
    name = reference.__name__
    _without_derivatives(reference, op.op, name.removeprefix(f"{op.op}_"), outputs, fake, op.prepare)
    return Op(name, op.op, reference, op.prepare, len(outputs))


def declare_inference(
    reference: Callable,
    *,
    dtypes: dict[str, tuple[torch.dtype, ...]],
    fake: Callable,
    flops: Callable,
    layout: Callable[[Tensor], Tensor],
) -> Op:
    """Defines the op that has the name and the arguments of `reference`, and one output. It has no derivative of any kind. The
    others as for declare."""
    name = reference.__name__
    OPS[name] = dtypes
    prepare = partial(_first_and_parameters, layout)
    for packet in _without_derivatives(reference, name, "forward", ("y",), fake, prepare):
        register_flop_formula(packet)(lambda *shapes, out_shape=None, **_: flops(*shapes))
    return Op(name, name, reference, prepare, 1)


def _without_derivatives(
    reference: Callable, op: str, function: str, outputs: tuple[str, ...], fake: Callable, prepare: Callable
) -> list[Callable]:
    """Defines autohdr::<name of the reference> and its twin; their kernels belong to `op`. function: in its triton_impl.py."""
    name, schema = reference.__name__, _schema(_arguments(reference), outputs)
    packets = [_define(name + suffix, schema, fake, prepare, f"{name}: a derivative") for suffix in _suffixes(op)]
    _add_kernel(name, op, function)
    return packets


def _arguments(reference: Callable) -> list[str]:
    """As a schema has them, such as "Tensor? bias"."""
    schema = library.infer_schema(reference, mutates_args=()).replace("SymInt", "int")
    return schema[1 : schema.index(") -> ")].split(", ")


def _schema(arguments: list[str], outputs: tuple[str, ...]) -> str:
    returned = "Tensor" if len(outputs) == 1 else f"({', '.join(f'Tensor {name}'.strip() for name in outputs)})"
    return f"({', '.join(arguments)}) -> {returned}"


def _gradient(name: str) -> str:
    return f"d{name}" if len(name) == 1 else f"d_{name}"


def _first_and_parameters(layout: Callable, first: Tensor, *others: Any) -> tuple:
    return layout(first), *(parameter(t) if isinstance(t, Tensor) else t for t in others)


def _define(
    name: str,
    schema: str,
    fake: Callable,
    prepare: Callable,
    refused: str,
    save: Callable = lambda ctx, inputs, output: None,
    differentiate: Callable | None = None,
    keeps: bool = False,
) -> Callable:
    """Defines autohdr::<name> and returns it.

    Derivatives are not left to library.register_autograd: under torch.func it raises, and its forward-mode derivatives are zero.

    Args:
        refused: the derivative that there is none of, in the error's words: PyTorch would hand out zeros for it.
        save, differentiate: called as ``save(ctx, inputs, output)`` and ``differentiate(ctx, *grads)``.
        keeps: whether the last argument says if there will be a backward pass.
    """
    _LIBRARY.define(name + schema, tags=TAGS)
    packet = getattr(torch.ops.autohdr, name)
    op = packet.default
    library.register_fake(op, fake, lib=_LIBRARY)

    def forward(ctx, keys, *inputs):
        # A Function's forward turns derivatives off; the outer levels of torch.func's transforms run within it.
        with torch.enable_grad(), _set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
            output = op.redispatch(keys & torch._C._after_autograd_keyset, *inputs)
        save(ctx, inputs, output)
        return output

    def refuse(ctx, *grads):
        raise RuntimeError(f"{refused} is not implemented; use backend='reference' for it")

    def backward(ctx, *grads):
        return None, *(differentiate or refuse)(ctx, *grads)  # none of the keys

    # Of one level of torch.func's transforms, which the dispatcher has taken apart; Function itself would begin with all of them.
    methods = {
        "forward": forward,
        "backward": backward,
        "jvp": refuse,
        "_compiled_autograd_key": Function._compiled_autograd_key,
    }
    function: Any = type(name, (_SingleLevelFunction,), {key: staticmethod(method) for key, method in methods.items()})

    def autograd(keys, *inputs):
        if keeps:  # each level of torch.func's transforms that takes derivatives comes here
            needed = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs)
            inputs = *inputs[:-1], inputs[-1] or needed
        with enable_single_level_autograd_function():
            return function.apply(keys, *inputs)

    def vmap(info, in_dims, *inputs):
        """One call an entry."""
        if info.batch_size == 0:
            raise ValueError(f"{name}: torch.vmap must have at least one entry")
        outputs = []
        for i in range(info.batch_size):
            entry = (t if dim is None else t.select(dim, i) for t, dim in zip(inputs, in_dims, strict=True))
            outputs.append(op(*prepare(*entry)))
        if isinstance(outputs[0], Tensor):
            return torch.stack(outputs), 0
        return tuple(map(torch.stack, zip(*outputs, strict=True))), (0,) * len(outputs[0])

    _LIBRARY.impl(op, autograd, "Autograd", with_keyset=True)
    library.register_vmap(op, vmap, lib=_LIBRARY)
    return packet


def _suffixes(op: str) -> tuple[str, ...]:
    return ("", "_triton") if "triton" in OPS[op] else ("",)


def _add_kernel(name: str, op: str, function: str) -> None:
    KERNELS[name] = op, function
    if "triton" in OPS[op]:
        register_triton(name, "cuda")


def register_triton(name: str, device_type: str) -> None:
    """Makes the function that KERNELS says, which takes the op's arguments, the kernel of autohdr::<name>_triton. It runs on its
    first argument's device; its module is imported by the first call: Triton is optional."""
    op, function = KERNELS[name]

    def run(*arguments):
        with torch.cuda.device_of(arguments[0]):
            return getattr(importlib.import_module(f"autohdr.kernels.{op}.triton_impl"), function)(*arguments)

    library.impl(f"autohdr::{name}_triton", device_type, run, lib=_LIBRARY)


def check_signatures(signatures: list[tuple[str, str, str]]) -> None:
    """Compares what compiled kernels take and return with the ops' schemas, as the dispatcher does not: they would read garbage.

    Args:
        signatures: of each kernel (dispatch key, op, signature), as autohdr._C lists them.

    Raises:
        ImportError: one differs, or is not there.
    """
    compiled = {(key, name): signature for key, name, signature in signatures}
    for key in {"CPU", *(key for key, _ in compiled)}:
        for name in [name for name, (op, _) in KERNELS.items() if key.lower() in OPS[op]]:
            schema = getattr(torch.ops.autohdr, name).default._schema
            arguments, returns = (", ".join(str(value.type) for value in values) for values in (schema.arguments, schema.returns))
            declared, found = f"({arguments}) -> ({returns})", compiled.get((key, name), "missing")
            if found != declared:
                raise ImportError(
                    f"autohdr's compiled kernels are of other sources: {name} for {key} is declared {declared}, compiled {found}."
                    " Install autohdr again."
                )
