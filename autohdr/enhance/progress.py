"""How far a run over many photos is: a bar on a terminal, elsewhere a line now and then."""

import sys
import threading
import time
from types import TracebackType

from tqdm import tqdm

EVERY = 10.0  # seconds between two lines


class Progress:
    """`with Progress(count) as progress: progress.step(megapixels)`. To standard error; nothing unless shown."""

    def __init__(self, count: int, shown: bool = True):
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=count, desc="enhance", unit="photo", disable=not (shown and terminal), dynamic_ncols=True)
        self._count, self._done, self._megapixels, self._started = count, 0, 0.0, time.monotonic()
        self._ended, self._lines = threading.Event(), threading.Thread(target=self._print_lines, daemon=True)
        if shown and not terminal:
            self._lines.start()

    def step(self, megapixels: float) -> None:
        """A photo is done."""
        self._done, self._megapixels = self._done + 1, self._megapixels + megapixels
        if not self._bar.disable:
            self._bar.set_postfix_str(self._rate(), refresh=False)
            self._bar.update()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._ended.set()
        if self._lines.is_alive():
            self._lines.join()
        self._bar.close()

    def _rate(self) -> str:
        return f"{self._megapixels / (time.monotonic() - self._started):.1f} MP/s"

    def _print_lines(self) -> None:
        while not self._ended.wait(EVERY):
            left = "-"
            if self._done:
                left = tqdm.format_interval((time.monotonic() - self._started) / self._done * (self._count - self._done))
            print(f"enhance: {self._done}/{self._count} photos, {self._rate()}, {left} left", file=sys.stderr, flush=True)
