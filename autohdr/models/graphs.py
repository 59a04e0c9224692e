"""CUDA graphs of a network: what its passes launch is recorded once for a shape, and launched again as one."""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from autohdr.errors import UserError

REPEATS = 5
"""Calls of one kind in a row before the next is captured: that costs about as many passes."""
WARM_UP = 3
"""Passes on the stream of the capture before it: what is done once, as a library's start, must not come into a graph."""
ROUNDING = 2**-7
"""By how much of its length a result may differ from the plain pass's, whose sums may have another order; twice what one number's
rounding to bfloat16 is."""


def require_gpu(device: torch.device) -> None:
    """UserError for another device than a GPU."""
    if device.type != "cuda":
        raise UserError(f"cuda_graphs: expected a GPU, got device {str(device)!r}")


class Graphed(nn.Module):
    """A network on a GPU that replays CUDA graphs of its forward and backward pass where the same kind of call repeats.

    forward(image, ...): as the network's, which takes tensors alone, changes nothing, and returns an image of the first one's
    shape. A kind of call is the tensors' shapes and dtypes, the autocast, the modes, and whether there will be gradients. What
    has come REPEATS times in a row is captured, and the graph's results are compared with the plain pass's, twice, by ROUNDING;
    where they differ, or the capture fails, a warning says so, and all calls are plain from then on. There is one graph, which
    keeps the memory of its passes. The next one takes its place; a call of another kind without gradients lets it go.

    Gradients reach the parameters alone, and come from one backward pass of the last forward pass. Hooks do not run in a replay.
    device: the network's. UserError where that is no GPU.

    Source: "Whole-network capture" in PyTorch's notes on CUDA semantics; torch.cuda.make_graphed_callables does the same, but
    forbids other threads (the loader's, which locks pages) what is unsafe while it captures, and hands out gradients in memory
    that the next replay overwrites (PyTorch's issue 181723).
    """

    def __init__(self, network: nn.Module, device: torch.device):
        super().__init__()
        require_gpu(device)
        self.network = network
        self._graph: _Graph | None = None
        self._last: _Kind | None = None
        self._times = 0
        self._fails = False

    def forward(self, *tensors: Tensor) -> Tensor:
        if self._fails or any(tensor.requires_grad for tensor in tensors):
            return self.network(*tensors)
        kind = _Kind.of(self.network, tensors)
        self._times = self._times + 1 if kind == self._last else 1
        self._last = kind
        graph = self._graph if self._graph and self._graph.kind == kind else None
        if graph is None and (self._times > REPEATS or not kind.differentiable):
            self._graph = None  # so that its memory is free for this call
        if graph is None and self._times > REPEATS:
            with torch.autocast(tensors[0].device.type, enabled=False):  # a backward pass is outside of the call's
                graph = self._graph = self._captured(kind, tensors)
        return (graph or self.network)(*tensors)

    def release(self) -> None:
        """Lets the graph go, and its memory."""
        self._graph = None

    def _captured(self, kind: "_Kind", tensors: Sequence[Tensor]) -> "_Graph | None":
        """A graph whose results are right; None where the plain pass's are not finite, and say nothing of a graph's, or where no
        graph is to be had."""
        weights = {name: w for name, w in self.network.named_parameters() if w.requires_grad and kind.differentiable}
        try:
            expected = _results(partial(_under, kind, self.network), tensors, list(weights.values()))
            if not all(result.isfinite().all() for result in expected):
                self._times = 0
                return None
            graph = _Graph(self.network, kind, tensors, list(weights.values()))
            for _ in range(2):  # the second time over what the first one left
                _compare(_results(graph, tensors, graph.weights), expected, tensors[0], [*weights])
            return graph
        except RuntimeError as error:
            self._fails, reason = True, str(error).partition("\n")[0]
            warnings.warn(f"cuda_graphs: going on without, as at {kind.describe()}: {reason}", stacklevel=4)


class _Kind(NamedTuple):
    """What two calls have to have in common."""

    tensors: tuple[tuple[torch.Size, torch.dtype], ...]
    autocast: torch.dtype | None
    training: bool
    inference: bool
    """Outside of inference mode nothing is copied into the inputs of a graph that was captured in it."""
    differentiable: bool

    @staticmethod
    def of(network: nn.Module, tensors: Sequence[Tensor]) -> "_Kind":
        device = tensors[0].device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        return _Kind(shapes, autocast, network.training, torch.is_inference_mode_enabled(), torch.is_grad_enabled())

    def describe(self) -> str:
        return f"{list(self.tensors[0][0])} in {str(self.autocast or self.tensors[0][1]).removeprefix('torch.')}"


class _Graph:
    """A kind of call, captured: called with tensors, it returns a copy of the output."""

    def __init__(self, network: nn.Module, kind: _Kind, tensors: Sequence[Tensor], weights: list[Tensor]):
        self.kind, self.weights, self.passes = kind, weights, 0
        self.inputs = [torch.zeros_like(tensor) for tensor in tensors]  # other values than those it is tried with
        with torch.cuda.device(tensors[0].device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    _results(partial(_under, kind, network), self.inputs, weights)
            torch.cuda.current_stream().wait_stream(side)
            capture = partial(torch.cuda.graph, stream=side, capture_error_mode="thread_local")
            self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            with capture(self.forward):
                output = _under(kind, network, *self.inputs)
            self.output = output.detach()
            if weights:
                self.d_output = torch.zeros_like(self.output)
                with capture(self.backward, pool=self.forward.pool()):
                    self.gradients = torch.autograd.grad(output, weights, self.d_output)

    def __call__(self, *tensors: Tensor) -> Tensor:
        for static, tensor in zip(self.inputs, tensors, strict=True):
            static.copy_(tensor)
        self.passes += 1
        return _Replay.apply(self, *self.weights)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: _Graph, *weights: Tensor) -> Tensor:
        graph.forward.replay()
        ctx.graph, ctx.number = graph, graph.passes
        return graph.output.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        graph = ctx.graph
        if ctx.number != graph.passes:
            raise RuntimeError("cuda_graphs: a later pass has overwritten what this backward pass needs")
        graph.passes += 1
        graph.d_output.copy_(d_output)
        graph.backward.replay()
        copies = [torch.empty_like(gradient) for gradient in graph.gradients]  # autograd keeps what it gets
        torch._foreach_copy_(copies, graph.gradients)  # pyright: ignore[reportPrivateImportUsage]  it has no other name
        return None, *copies


def _under(kind: _Kind, network: nn.Module, *tensors: Tensor) -> Tensor:
    """The network's output in the call's autocast; without its cache, whose casts a graph would not make again."""
    with torch.autocast(tensors[0].device.type, kind.autocast, kind.autocast is not None, cache_enabled=False):
        return network(*tensors)


def _results(run: Callable[..., Tensor], tensors: Sequence[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """What the network adds to the image, and the weights' gradients, by a gradient of the output that is the output, scaled."""
    output = run(*tensors)
    gradients = torch.autograd.grad(output, weights, output.detach() / output.numel() ** 0.5) if weights else ()
    return [output.detach() - tensors[0], *gradients]


def _compare(actual: list[Tensor], expected: list[Tensor], image: Tensor, names: list[str]) -> None:
    """RuntimeError where one of _results differs by more than rounding. names: the weights'.

    What is but ROUNDING of the image, or of all gradients together, may be wrong by as much as what is as large as that.
    """
    lengths = torch.stack([result.float().norm() for result in expected])
    least = ROUNDING * torch.stack([image.float().norm(), *[lengths[1:].norm()] * len(names)])
    errors = torch.stack([(a.float() - e.float()).norm() for a, e in zip(actual, expected, strict=True)])
    wrong = ~(errors <= ROUNDING * torch.maximum(lengths, least))  # a nan is wrong
    if wrong.any():
        first = int(wrong.nonzero()[0])
        what = ["what the network adds to the image", *(f"the gradient of {name}" for name in names)][first]
        raise RuntimeError(f"{what} differs from the plain pass's by {errors[first] / lengths[first]:.2g} of its length")
