"""What keeps one bad step from costing a run: the verdict on a loss, the state to go back to, the signals that end a run."""

import math
import signal
import statistics
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import is_torchelastic_launched
from tqdm import tqdm

from autohdr.train.distributed import local

DEVIATIONS = 10
"""How far above the median a spike is, in standard deviations estimated as 1.4826 times the median absolute deviation."""

ENDING = (signal.SIGINT, signal.SIGTERM)
"""Signals by which a terminal or a batch system ends a run."""

GRACE = 3600
"""Seconds that a loader's worker outlives a SIGTERM: the step or the validation under way may take them."""


class TrainingError(RuntimeError):
    """Training cannot go on. The message names the step and the files of its batch; the last checkpoint is good."""


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
    """Judges each step's loss by those of the last good steps, and keeps a state from before them on the CPU.

    A spike is a loss above `factor` times the median of the last `window` good losses and more than DEVIATIONS robust
    standard deviations above it; there is no verdict before half a window. The state kept is one whose loss was good: it
    is taken after the loss is known and before the step that follows from it, every `interval` steps.
    """

    def __init__(self, factor: float, window: int, interval: int, tensors: Callable[[], list[Tensor]]):
        """tensors: all that a step changes, in place, in a fixed order. factor 0: nothing is a spike and no state is kept."""
        self.factor, self.window, self.interval, self.tensors = factor, window, interval, tensors
        self.losses: deque[float] = deque(maxlen=window)
        self.in_a_row = 0  # bad steps
        self.kept: list[Tensor] = []
        self.kept_at = 0

    def limit(self) -> float:
        """The loss above which the next one is a spike."""
        if not self.factor or len(self.losses) < self.window / 2:
            return math.inf
        median = statistics.median(self.losses)
        deviation = 1.4826 * statistics.median(abs(loss - median) for loss in self.losses)
        return max(self.factor * median, median + DEVIATIONS * deviation)

    def passed(self, step: int, loss: float) -> None:
        """A step from good weights is about to change them."""
        self.losses.append(loss)
        self.in_a_row = 0
        if not self.kept or step - self.kept_at >= self.interval:
            self.keep(step)

    def keep(self, step: int) -> None:
        """Copy the state that stands after `step` steps."""
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
def deferred_signals() -> Iterator[Callable[[], int]]:
    """SIGINT (Ctrl-C) and SIGTERM end nothing but make the function it gives return their number; a second one does what
    it always does, except under torchrun, which hands on the one that a batch system has sent to every process already."""
    seen = []
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield lambda: 0
        return

    def handle(number: int, frame: Any) -> None:
        seen.append(number)
        if not is_torchelastic_launched():
            signal.signal(number, before[number])
        tqdm.write("stopping after this step ...")

    before = {number: signal.signal(number, handle) for number in ENDING}
    try:
        yield lambda: seen[0] if seen else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held_signals() -> Iterator[None]:
    """SIGINT and SIGTERM wait: here for the block's end, in a loader's worker started within for `survive_signals`. Between
    a worker's start and that call PyTorch gives it handlers that end it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def survive_signals(worker: int) -> None:
    """Of a loader's worker: Ctrl-C and SIGTERM reach it too, and the step under way still needs it for a while."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
