"""Ctrl-C, SIGTERM and their like, put off to where a program can stop with everything whole."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Signals with which a terminal or a batch system ends a run. Slurm's --signal=USR1@60 is its warning a minute before."""


class Abandoned(BaseException):
    """A signal came within `Deferred.abandoning`. Not an Exception: nothing takes it for a failure of what it interrupts."""


class Deferred:
    """A signal that has come, or not yet; called, it returns the signal's number, else 0."""

    def __init__(self) -> None:
        self._number, self._abandoning = 0, False

    def __call__(self) -> int:
        return self._number

    @contextmanager
    def abandoning(self) -> Iterator[None]:
        """Within the block, in the main thread, a signal raises Abandoned at once: what it does can be thrown away."""
        try:
            self._abandoning = True
            if self._number:
                raise Abandoned
            yield
        finally:
            self._abandoning = False

    def _note(self, number: int) -> None:
        self._number = self._number or number
        if self._abandoning:
            raise Abandoned


@contextmanager
def deferred_signals(notice: str) -> Iterator[Deferred]:
    """Within the block the ENDING signals end nothing: `notice` is printed, and the object that it gives tells.

    What is ignored already stays so, as SIGHUP is under nohup. A second signal does what it always does, but not under torchrun:
    a batch system sends a signal to every process, and torchrun passes its own on to them as a second one.
    """
    deferred = Deferred()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set a handler
        yield deferred
        return

    def handle(number: int, frame: Any) -> None:
        if "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun's sign
            signal.signal(number, before[number])
        tqdm.write(notice, file=sys.stderr)
        deferred._note(number)

    heeded = [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]
    before: dict[int, Any] = {number: signal.signal(number, handle) for number in heeded}
    try:
        yield deferred
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
