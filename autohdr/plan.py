"""How much memory and time a model takes, before it takes them.

Memory is counted, not guessed: the pass runs on tensors without data (PyTorch's FakeTensor), through the shapes and dtypes that
each op and its backward pass declare, while every allocation and release is written down. That takes seconds and no memory,
whatever the model and the image.
"""

import math
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autohdr.errors import UserError
from autohdr.kernels.backends import as_on_a_gpu
from autohdr.measure import expected_seconds, format_bytes, format_seconds, free_bytes, measure, resident_bytes
from autohdr.models import create_model, tiling
from autohdr.models.network import Network, in_8_bits, only_on_a_cpu
from autohdr.models.registry import build, check_tensors

MODES = ("inference", "training")
PRECISIONS = ("float32", "bfloat16", "float16")
PARAMETERS, IMAGES, SAVED, GRADIENTS, WORKING = "parameters", "images", "saved for backward", "gradients", "working set"
FEATURES, OPTIMIZER, AVERAGE, SCRATCH, STRIPS = "feature maps", "AdamW", "weight average", "kernel scratch", "maps and strips"
RUNTIME_BYTES = 4 << 20  # on a CPU: code that oneDNN compiles, thread stacks


@dataclass(frozen=True)
class Plan:
    """What a pass takes.

    peak_bytes: at its highest point, beyond what the process holds without the model: on a CPU beyond the interpreter and
        PyTorch, on a GPU all tensors.
    parts: what the peak is made of, in bytes; they add up to it.
    seconds: of one pass, at least and at most, or None where no time was asked for or what is measured for it does not fit.
    """

    peak_bytes: int
    parts: dict[str, int]
    seconds: tuple[float, float] | None = None

    def made_of(self) -> str:
        return ", ".join(f"{name} {format_bytes(size)}" for name, size in self.parts.items() if size >= 5e5)

    def __str__(self) -> str:
        seconds = "" if self.seconds is None else f", {format_seconds(self.seconds)}"
        return f"{format_bytes(self.peak_bytes)} ({self.made_of()}){seconds}"


def table(
    model: str,
    size: tuple[int, int],
    batch: int,
    device: torch.device | str,
    max_memory: int | None = None,
    recompute: bool = False,
) -> str:
    """What `autohdr plan` prints: inference and training (with max_memory inference in strips) in float32 and bfloat16."""
    modes = MODES if max_memory is None else MODES[:1]
    lines = [f"{'mode':<10} {'precision':<9} {'time':>14} {'peak':>9}  made of"]
    for mode in modes:
        for precision in PRECISIONS[:2]:
            p = plan(model, size, batch, precision, mode, device, max_memory=max_memory, recompute=recompute, timed=True)
            time = "-" if p.seconds is None else format_seconds(p.seconds)
            lines.append(f"{mode:<10} {precision:<9} {time:>14} {format_bytes(p.peak_bytes):>9}  {p.made_of()}")
    there = f"{format_bytes(free_bytes(device))} are free on {device}. " if _is_here(device) else f"There is no {device} here. "
    return "\n".join(
        (
            f"{model}, {batch} × {size[1]}×{size[0]} pixels, {device}",
            "",
            *lines,
            "",
            f"{there}Memory: counted, without running anything, beyond what Python and PyTorch hold themselves; of tensors below",
            "32 MiB glibc's malloc keeps some after use, so that small images on a CPU take up to a half more.",
            "Time: of one pass or step, at least and at most, from small ones on this machine as it is now.",
        )
    )


def plan(
    model: Network | str,
    size: int | tuple[int, int],
    batch: int = 1,
    precision: str = "float32",
    mode: str = "inference",
    device: torch.device | str = "cpu",
    *,
    max_memory: int | None = None,
    accumulate: int = 1,
    averaged: bool = False,
    recompute: bool = False,
    timed: bool = False,
) -> Plan:
    """The memory, and where timed the time, of one forward pass (inference) or one training step.

    A training step is the trainer's: forward pass under autocast, L1 loss, backward pass, AdamW. Tests hold the memory to 15 % of
    what is measured on a CPU. On a GPU it is not measured: the same tensors, and the budget of the compiled kernels' scratch
    memory; cuDNN's and what the allocator loses to fragments are not in it. Where there is no GPU, one is planned for with the
    CPU's ops, which declare the same tensors, and so is the meta device, of tensors alone; their time is then None.

    Args:
        model: a name that create_model takes, or a network, whose weights are left alone, on any device; what of it requires no
            gradient takes none of the training's memory.
        size: of the images, a side of a square or (height, width).
        precision: float32, or bfloat16 or float16 under autocast.
        mode: "inference" or "training".
        max_memory: as for tiling.in_strips, inference alone: bytes that the whole process may hold.
        accumulate: backward passes in a step; with more than one the gradients are there from the beginning.
        averaged: whether an average of the weights is kept beside them.
        recompute: whether blocks keep their input alone for the backward pass, in a network that has the choice.
        timed: whether to measure: small passes on this device, on real memory (see measure.expected_seconds).

    Raises:
        UserError: no such model, mode, precision or size; max_memory or recompute where it has no meaning, or too little memory;
            a model in 8 bits for another device than the CPU; as check_tensors.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if mode not in MODES or precision not in PRECISIONS or min(height, width, batch, accumulate) < 1:
        raise UserError(
            f"plan: expected a mode of {', '.join(MODES)}, a precision of {', '.join(PRECISIONS)} and numbers above 0, "
            f"got {mode}, {precision}, {width}×{height}, batch {batch}, accumulate {accumulate}"
        )
    with torch.device("meta"):
        network = create_model(model) if isinstance(model, str) else build(model.config)
    if max_memory is not None and (mode != "inference" or not tiling.works_in_strips(network)):
        raise UserError(
            "plan: max_memory is for the inference of networks that work in strips, as a Restormer does, "
            f"got {network.config.name}, {mode}"
        )
    if not isinstance(model, str):
        check_tensors(model, "plan")
        for own, given in zip(network.parameters(), model.parameters(), strict=True):
            own.requires_grad_(given.requires_grad)
    network.train(mode == "training").recompute = recompute
    if str(device).split(":")[0] not in ("cpu", "cuda", "meta"):
        raise UserError(f"device: expected cpu, cuda or meta, got {str(device)!r}")
    device = here = torch.device(device)
    if device.type != "cpu" and in_8_bits(network):
        raise only_on_a_cpu(f"the plan is for {device}")
    if not _is_here(device):
        here, timed = torch.device("cpu"), False
        precision = "bfloat16" if precision == "float16" else precision  # of the same size, and the CPU's ops take it
    shape = (batch, 3, height, width)
    if max_memory is not None:
        held = resident_bytes(here) if here == device else 0
        return _plan_strips(network, shape, precision, here, max_memory, held, timed)
    with FakeTensorMode(allow_non_fake_inputs=True), nullcontext() if device.type == "cpu" else as_on_a_gpu():
        network.to_empty(device=here)
        parts = _trace(network, shape, precision, mode == "training", here, accumulate > 1, device.type == "cpu")
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    if mode == "training":
        parts[OPTIMIZER] = 2 * sum(p.numel() * p.element_size() for p in network.parameters() if p.requires_grad)
        parts[AVERAGE] = weights if averaged else 0
    parts[SCRATCH] = _scratch_bytes(network, mode == "training", device)
    # The measurement needs the weights four times, gradients and AdamW's two moments included, and next to nothing else.
    fits = timed and 5 * weights < free_bytes(here)
    seconds = _seconds(network, shape, precision, mode == "training", here) if fits else None
    return Plan(sum(parts.values()), dict(parts), seconds)


def _is_here(device: torch.device | str) -> bool:
    kind = torch.device(device).type
    return kind == "cpu" or kind == "cuda" and torch.cuda.is_available()


def _plan_strips(network: Network, shape, precision: str, device, max_memory: int, held: int, timed: bool) -> Plan:
    """held: what the process holds without the model."""
    weights = sum(t.numel() * t.element_size() for t in (*network.parameters(), *network.buffers()))
    image = torch.empty(shape, device=device)  # nobody touches it: it takes no memory on a CPU
    pixels = image.numel() * image.element_size()
    with _autocast(device, precision):
        strips = tiling.make_plan(network, image, max_memory, held + weights + pixels)
    peak = strips.peak_bytes - held
    parts = {PARAMETERS: weights, IMAGES: pixels, STRIPS: peak - weights - pixels}
    seconds = None
    if timed:
        real = build(network.config).to(device).eval()
        with torch.inference_mode(), _autocast(device, precision):
            seconds = tiling.seconds_of(real, image, strips)
    return Plan(peak, parts, seconds)


def _autocast(device: torch.device, precision: str):
    return torch.autocast(device.type, getattr(torch, precision)) if precision != "float32" else nullcontext()


class _Ledger(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, by the stage that allocated them, and keeps the highest total's."""

    def __init__(self, on_cpu: bool):
        super().__init__()
        self.on_cpu, self.stage, self.alive, self.peak = on_cpu, PARAMETERS, Counter(), Counter()
        self.stages: weakref.WeakKeyDictionary[torch.UntypedStorage, list[str]] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        if self.on_cpu and function is torch.ops.aten.convolution_backward.default:
            self.note(args[1].numel() * args[1].element_size())  # oneDNN's copy of the image
        if function in (torch.ops.autohdr.nafblock_backward.default, torch.ops.autohdr.nafblock_backward_triton.default):
            self.note(args[0].numel() * args[0].element_size())  # the gradient between the block's halves
        return result

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self.stages:
            return
        self.stages[storage] = stage = [self.stage]
        self.alive[self.stage] += storage.nbytes()
        weakref.finalize(storage, self._free, stage, storage.nbytes())
        self.note()

    def note(self, inside: int = 0) -> None:
        """The peak, if it is now; inside: what an op takes beside its tensors."""
        if self.alive.total() + inside > self.peak.total():
            self.peak = self.alive + Counter({WORKING: inside})

    def _free(self, stage: list[str], size: int) -> None:
        self.alive[stage[0]] -= size

    def move(self, tensor: Tensor, stage: str) -> None:
        """What turned out to be of another kind."""
        storage = tensor.untyped_storage()
        self.alive[self.stages[storage][0]] -= storage.nbytes()
        self.alive[stage] += storage.nbytes()
        self.stages[storage][0] = stage


def _trace(network, shape, precision, training, here, accumulates, on_cpu) -> Counter:
    """The parts of the peak, in bytes, of a network of fake tensors."""
    ledger = _Ledger(on_cpu)
    for tensor in (*network.parameters(), *network.buffers()):
        ledger.add(tensor)
    with ledger:
        ledger.stage = IMAGES
        source = torch.empty(shape, device=here).contiguous(memory_format=torch.channels_last)
        if not training:
            ledger.stage = FEATURES
            with torch.inference_mode(), _autocast(here, precision):
                network(source)
            return ledger.peak
        target = torch.empty_like(source)
        for parameter in filter(lambda p: p.requires_grad, network.parameters()):
            if accumulates:
                ledger.stage, parameter.grad = GRADIENTS, torch.empty_like(parameter)
            parameter.register_post_accumulate_grad_hook(lambda p: ledger.move(p.grad, GRADIENTS))
        ledger.stage = SAVED
        _step(network, source, target, precision, lambda: setattr(ledger, "stage", WORKING))
    return ledger.peak


def _step(network, source, target, precision, between: Callable[[], None] = lambda: None) -> None:
    with _autocast(source.device, precision):
        output = network(source)
    between()
    (output.float() - target).abs().mean().backward()


def _scratch_bytes(network: Network, training: bool, device: torch.device) -> int:
    """What the ops take inside, the fused kernels' scratch memory above all, and what code is compiled for them."""
    if device.type == "meta":
        return 0
    if device.type == "cuda":
        return (192 if training else 64) << 20  # the budgets in csrc/common/cuda_steps.cuh
    return RUNTIME_BYTES + torch.get_num_threads() * network.scratch_bytes() // (1 if training else 2)


def _seconds(planned: Network, shape, precision, training, device) -> tuple[float, float]:
    """From small images of growing size, the last one above a third of a second, on a network of its own."""
    network = build(planned.config)
    network.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  torch declares no memory_format
    network.train(training).recompute = planned.recompute
    optimizer = torch.optim.AdamW(network.parameters()) if training else None

    def run(side: int) -> None:
        source = torch.rand(1, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)
        if optimizer is not None:
            optimizer.zero_grad()
            _step(network, source, source, precision)
            optimizer.step()
        else:
            with torch.inference_mode(), _autocast(device, precision):
                network(source)

    batch, _, height, width = shape
    run(32)  # what happens once
    side, seconds = 32, 0.0
    while 2 * side <= min(512, math.isqrt(height * width)) and seconds < 1 / 3:
        side *= 2
        with measure(device) as measured:
            run(side)
        seconds = measured.seconds
    return expected_seconds(run, side, batch * height * width, device)
