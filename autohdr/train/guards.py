"""What protects a run: which loss is a spike, the state to go back to after one, and what signals do to its workers."""

import math
import signal
import statistics
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from autohdr.signals import ENDING
from autohdr.train.distributed import local

DEVIATIONS = 10
"""A spike is more than so many standard deviations above the median. One of them is estimated as 1.4826 times the median absolute
deviation."""

GRACE = 3600
"""A loader's worker lives on for so many seconds after a SIGTERM: the step or the validation under way still needs it."""


class TrainingError(RuntimeError):
    """Training cannot go on. The message names the step and its photos."""


@dataclass(frozen=True)
class Fault:
    """What is wrong with a step that was left out."""

    kind: Literal["a spike", "a loss that is not finite", "a gradient that is not finite"]
    cause: str
    tensors: list[str] | None = None
    """The parameters whose gradient is not finite, or "loss"; None for a spike."""


@dataclass(frozen=True)
class Return:
    """The guard has put back the state after `to` steps, and `undone` good steps are lost."""

    to: int
    undone: int


class Guard:
    """Judges each step's loss by the last good ones, and keeps a copy of a good state on the CPU.

    A loss is a spike if it is above `factor` times the median of the last `window` good losses, and more than DEVIATIONS robust
    standard deviations above that median. Before half a window is full, no loss is a spike. Every `interval` steps the state
    kept is a newer one: it is copied when its loss has been found good, before the step changes it.

    A bad step may be its data's fault or the weights'. So the first is left out, and nothing else; if the next one is bad too,
    the state kept takes the place of the present one.
    """

    def __init__(self, factor: float, window: int, interval: int, tensors: Callable[[], list[Tensor]]):
        """tensors(): all that a step changes in place, always in the same order. factor 0: no loss is a spike."""
        self.factor, self.window, self.interval, self.tensors = factor, window, interval, tensors
        self.losses: deque[float] = deque(maxlen=window)
        self.in_a_row = 0  # bad steps since the last good one
        self.kept: list[Tensor] = []
        self.kept_at = 0  # steps behind the run when the state was copied
        self.since = 0  # good steps since then

    def limit(self) -> float:
        """The next loss is a spike if it is above this."""
        if not self.factor or len(self.losses) < self.window / 2:
            return math.inf
        median = statistics.median(self.losses)
        deviation = 1.4826 * statistics.median(abs(loss - median) for loss in self.losses)
        return max(self.factor * median, median + DEVIATIONS * deviation)

    def passed(self, step: int, loss: float) -> None:
        """The loss is good, and the step that follows from it, after `step` others, is about to change the weights."""
        self.losses.append(loss)
        self.in_a_row = 0
        if not self.kept or step - self.kept_at >= self.interval:
            self.keep(step)
        self.since += 1

    def keep(self, step: int) -> None:
        """Copy the present state, which is that after `step` steps."""
        tensors = self.tensors()
        if len(self.kept) != len(tensors):  # the optimiser's are not there before its first step
            self.kept = [torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda) for tensor in tensors]
        _copy(tensors, self.kept)
        self.kept_at, self.since = step, 0

    def failed(self) -> Return | None:
        """A step is left out. The second in a row puts back the state kept, if there is one."""
        self.in_a_row += 1
        return self.put_back() if self.in_a_row == 2 else None

    def put_back(self) -> Return | None:
        """Go back to the state kept; None where there is none."""
        if not self.kept:  # before the optimiser's first step
            return None
        _copy(self.kept, self.tensors())
        undone, self.since = self.since, 0
        return Return(self.kept_at, undone)

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses.extend(state["losses"])
        self.in_a_row = state["in_a_row"]


@torch.no_grad()
def _copy(tensors: list[Tensor], others: list[Tensor]) -> None:
    for tensor, other in zip(tensors, others, strict=True):
        other.copy_(tensor, non_blocking=True)
    if any(tensor.is_cuda for tensor in (*tensors, *others)):
        torch.cuda.synchronize()


def not_finite(network: nn.Module) -> list[str]:
    """Names of the parameters whose gradient has a value that is not finite, on this process."""
    named = network.named_parameters()
    return [name for name, p in named if p.grad is not None and not local(p.grad).isfinite().all()]


@contextmanager
def held_signals() -> Iterator[None]:
    """Block the ENDING signals: here until the block ends, and in a worker that starts within it until survive_signals.

    Between a worker's start and that call PyTorch sets handlers that would end it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def survive_signals(worker: int) -> None:
    """Called in a loader's worker: end GRACE seconds after a SIGTERM, and ignore what else reaches the workers too."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
