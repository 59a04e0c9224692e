"""Files that appear, or grow, whole or not at all; and what tells them apart."""

import hashlib
import math
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LONGEST_NAME = 255  # bytes, of every usual file system
SILENT = 3600  # seconds without a change after which what another machine's process writes is abandoned


def leftovers(folder: Path) -> list[Path]:
    """What `replacing` had not finished in a folder when its process was killed."""
    return list(folder.glob(".*.part"))


def clear_abandoned(folder: Path) -> None:
    """Removes what `replacing` left in a folder in processes that are gone. Another machine's, whose processes can't be seen from
    here, are taken for gone where they have not written for an hour."""
    for part in leftovers(folder):
        named = re.fullmatch(r"\..+\.(\d+)@(.+)\.part", part.name, re.DOTALL)
        if not named:
            continue
        try:
            here = named[2] == _machine()
            gone = not _is_alive(int(named[1])) if here else time.time() - part.stat().st_mtime > SILENT
        except FileNotFoundError:  # finished meanwhile
            continue
        if gone:
            part.unlink(missing_ok=True)


def _machine() -> str:
    return re.sub(r"[^\w.-]", "_", socket.gethostname())[:64]


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's; no number of a process
        pass
    return True


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A hidden temporary path beside `path`, which becomes `path` once the block has written it.

    It is on the disk before it takes the name: no crash or power cut leaves half a file. Where the block or the disk
    fails, what was at `path` before stays as it was, and the temporary file goes.
    """
    path = Path(path)
    ending = f".{os.getpid()}@{_machine()}.part"
    part = path.with_name(f".{path.name}{ending}")
    if len(os.fsencode(part.name)) > LONGEST_NAME:
        part = path.with_name(f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:32]}{ending}")
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the name too: else a power cut could bring the old file back
        finally:
            os.close(folder)
    except OSError as error:
        if error.errno and error.filename is None:
            error.filename = str(path)  # a write to a full disk does not say where it was
        raise
    finally:
        part.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes a text in UTF-8, as `replacing` does.

    A name of a file that is not UTF-8 has lone surrogates in Python. They become \\udcXX: JSON reads that as the same name.
    """
    with replacing(path) as part:
        part.write_text(text, "utf-8", errors="backslashreplace")


def append(path: str | Path, data: bytes, durable: bool = False) -> None:
    """Adds to a file's end all of the data or, with an OSError, as of a full disk, none. durable: on the disk on return."""
    with open(path, "ab", buffering=0) as file:
        size = file.tell()
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            file.truncate(size)
            raise
        if durable:
            os.fsync(file.fileno())


def sha256(path: str | Path) -> str:
    """Of what a file holds, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def finite(value: Any) -> Any:
    """A value for JSON, which has neither infinity nor NaN: they become None, in dicts and lists too."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
