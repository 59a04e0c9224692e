"""What protects a run: which loss is a spike, the state to go back to after one, and what signals do to its workers."""

import math
import signal
import statistics
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

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
    """Training cannot go on. The message names the step and its photos; the checkpoints on disk are from before."""


@dataclass(frozen=True)
class Fault:
    """What is wrong with a step that was left out."""

    cause: str
    tensors: list[str] | None = None
    """The parameters whose gradient is not finite, or "loss"; None after a spike."""
    back_to: int | None = None
    """After a spike: the state put back is that after so many steps."""

    def entry(self) -> dict[str, Any]:
        """The beginning of its line in log.jsonl."""
        if self.back_to is None:
            return {"kind": "skipped", "cause": self.cause, "tensors": self.tensors}
        return {"kind": "rolled back", "cause": self.cause, "to": self.back_to}


class Guard:
    """Judges each step's loss by the last good ones, and keeps a copy of a good state on the CPU.

    A loss is a spike if it is above `factor` times the median of the last `window` good losses, and more than DEVIATIONS robust
    standard deviations above that median. Before half a window is full, no loss is a spike. Every `interval` steps the state
    kept is a newer one: it is copied when its loss has been found good, before the step changes it.
    """

    def __init__(self, factor: float, window: int, interval: int, tensors: Callable[[], list[Tensor]]):
        """tensors(): all that a step changes in place, always in the same order. factor 0: no spikes, and no state is kept."""
        self.factor, self.window, self.interval, self.tensors = factor, window, interval, tensors
        self.losses: deque[float] = deque(maxlen=window)
        self.in_a_row = 0  # bad steps since the last good one
        self.kept: list[Tensor] = []
        self.kept_at = 0  # steps behind the run when the state was copied

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

    def keep(self, step: int) -> None:
        """Copy the present state, which is that after `step` steps."""
        tensors = self.tensors() if self.factor else []
        if len(self.kept) != len(tensors):  # the optimiser's are not there before its first step
            self.kept = [torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda) for tensor in tensors]
        _copy(tensors, self.kept)
        self.kept_at = step

    def failed(self, fault: Fault) -> None:
        """A step is left out; after a spike the state kept takes the place of the present one."""
        self.in_a_row += 1
        if fault.back_to is not None:
            _copy(self.kept, self.tensors())

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
    """Block SIGINT and SIGTERM: here until the block ends, and in a worker that starts within it until survive_signals.

    Between a worker's start and that call PyTorch sets handlers that would end it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def survive_signals(worker: int) -> None:
    """Called in a loader's worker: ignore Ctrl-C, and end GRACE seconds after a SIGTERM. Both reach the workers too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
