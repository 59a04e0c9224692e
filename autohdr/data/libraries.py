"""What libraries say of a photo while they read it, as notes on that photo; by themselves they write to standard error."""

import contextlib
import ctypes
import logging
import os
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from PIL import Image

_PILLOW = Path(Image.__file__).parent


class _Reading(threading.local):
    """notes: on the photo that this thread reads; None between photos."""

    notes: list[str] | None = None


class _Readers:
    """Python's warnings are the whole process's: from the first thread that reads a photo to the last, this shows them."""

    def __init__(self) -> None:
        self._lock, self._count = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            self._count += 1
            if self._count == 1:
                self._before = warnings.catch_warnings()
                self._before.__enter__()
                self._passed_on = warnings.showwarning
                warnings.filterwarnings("always", module=r"PIL\.")
                warnings.showwarning = self._show

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._count -= 1
            if self._count == 0:
                self._before.__exit__(None, None, None)

    def _show(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if _reading.notes is None or not Path(filename).is_relative_to(_PILLOW):
            self._passed_on(message, category, filename, lineno, file, line)
        elif issubclass(category, UserWarning):
            _reading.notes.append(_in_words(str(message)))


_reading, _readers = _Reading(), _Readers()
_STANDARD_ERROR = threading.Lock()


@contextlib.contextmanager
def heard(notes: list[str]) -> Iterator[None]:
    """What Pillow warns of and tifffile logs in this thread within the block, as notes, once each."""
    with _readers:
        _reading.notes = notes
        try:
            yield
        finally:
            _reading.notes = None
            notes[:] = dict.fromkeys(notes)


@contextlib.contextmanager
def written(path: str, said: list[str]) -> Iterator[None]:
    """What C code writes to standard error within the block in lines that begin with a photo's path, without that.

    Standard error is the whole process's: such blocks take turns, and what others write meanwhile is written after them.
    """
    with _STANDARD_ERROR, tempfile.TemporaryFile() as file:
        try:
            kept = os.dup(2)
        except OSError:  # there is none
            yield
            return
        try:
            os.dup2(file.fileno(), 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            for line in file:
                before, found, text = line.partition(os.fsencode(path) + b": ")
                said += [text.decode(errors="replace").strip()] * bool(found)
                os.write(2, before if found else line)


def _note_log(record: logging.LogRecord) -> bool:
    if _reading.notes is None or record.levelno < logging.WARNING:
        return True
    _reading.notes.append("its tags are damaged in places")
    return False


def _in_words(message: str) -> str:
    if "exif" in message.lower():
        return "its EXIF is damaged: what could be read is kept"
    return "its file has oddities: " + message.strip().splitlines()[0].rstrip(".")


for _name in ("tifffile", "PIL.TiffImagePlugin"):
    logging.getLogger(_name).addFilter(_note_log)
with contextlib.suppress(AttributeError):  # a Pillow without libtiff, whose errors Pillow raises as well
    ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)
