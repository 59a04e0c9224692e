"""One process at a time on a run folder."""

import fcntl
import os
import socket
import struct
import threading
import time
import uuid
from pathlib import Path
from typing import NoReturn

from autohdr.errors import UserError

NAME = ".lock"
BEAT, STALE = 5.0, 30.0
"""Seconds between two signs of life, and seconds without one after which the other process is taken for dead."""


def held(folder: Path) -> bool | None:
    """Whether a process holds the folder's lock, found without touching it; None: there is no lock."""
    try:
        with open(folder / NAME, "rb") as file:
            sign = os.fstat(file.fileno()).st_mtime
            try:
                asked = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)  # Linux's struct flock: all of the file
                if struct.unpack("hhqqi", fcntl.fcntl(file, fcntl.F_GETLK, asked))[0] != fcntl.F_UNLCK:
                    return True
            except OSError:  # a file system without locks
                pass
            return time.time() - sign < STALE
    except FileNotFoundError:
        return None


class Lock:
    """A folder's lock. The system gives it back when its process dies, also where a network's file system has locks.

    Where the file system has none, the process that holds it writes a new sign of life into the file every BEAT seconds. Another
    one looks for STALE seconds whether it changes; so no two clocks are compared.
    """

    def __init__(self, folder: Path):
        self._path, self._file, self._ended = folder / NAME, None, threading.Event()

    def take(self) -> None:
        """Make the folder if it is absent, and lock it. Raises UserError where another process has the lock."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            # Until release. Not for appending, which would put a sign behind the last one.
            self._file = open(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)  # noqa: SIM115
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                self._refuse()
            except OSError:  # a file system without locks
                self._wait_for_a_sign()
                threading.Thread(target=self._live, args=(self._sign(),), daemon=True).start()
                return
            if os.fstat(self._file.fileno()).st_nlink:  # else its last holder has just removed it
                self._sign()
                return
            self._file.close()

    def release(self) -> None:
        """Give the lock back, and remove the folder if nothing is in it."""
        self._ended.set()
        if self._file:
            self._path.unlink(missing_ok=True)
            self._file.close()
            try:
                self._path.parent.rmdir()
            except OSError:  # it holds a run
                pass

    def _read(self) -> bytes:
        return self._path.read_bytes() if self._path.exists() else b""

    def _sign(self) -> bytes:
        """Write who holds the lock, and what no one has written before."""
        assert self._file
        text = f"process {os.getpid()} on {socket.gethostname()} {uuid.uuid4().hex}".encode()
        os.pwrite(self._file.fileno(), text, 0)  # over the last one: at no moment is there none, as of a lock that is free
        self._file.truncate(len(text))
        return text

    def _refuse(self) -> NoReturn:
        assert self._file
        self._file.seek(0)
        who = self._file.read().decode(errors="replace").rpartition(" ")[0] or "another process"
        self._file.close()
        self._file = None
        raise UserError(f"out: {self._path.parent} is in use by {who}: two processes would write over each other's files")

    def _wait_for_a_sign(self) -> None:
        before, until = self._read(), time.monotonic() + STALE
        while before and time.monotonic() < until:
            time.sleep(BEAT / 5)
            if self._read() != before:
                self._refuse()

    def _live(self, text: bytes) -> None:
        while not self._ended.wait(BEAT):
            if self._read() == text:  # else another process has taken this one for dead
                text = self._sign()
