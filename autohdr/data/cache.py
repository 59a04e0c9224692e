"""Photos as they are once decoded and resized, kept on disk: epochs after the first read pixels instead of decoding them.

Files, not memory of our own: mapped, they are in the system's page cache once for all workers and ranks, which gives them
up where the memory is needed; a copy in each worker would be lost at the end of every epoch, and with an interrupted run.
"""

import hashlib
import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch

from autohdr.files import replacing

_SPARE = 10e9  # bytes that stay free (of a disk below 100 GB, a tenth): the checkpoints go to the same disk


class DecodedCache:
    """Arrays by name in a folder, one .npy file each, written whole or not at all; any number of processes may share it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._storing = torch.ones((), dtype=torch.bool).share_memory_()  # shared: a worker that stops storing stops them all

    def files(self, photos: Sequence[Path], *settings: Any) -> list[Path]:
        """A file for each photo as `settings` decode it, with a new name once a photo is replaced or Pillow has another version.

        No files where a photo is missing.
        """
        try:
            made_of = [(os.path.realpath(photo), (stat := os.stat(photo)).st_size, stat.st_mtime_ns) for photo in photos]
        except OSError:
            return []
        key = hashlib.sha256(repr((made_of, settings, PIL.__version__)).encode()).hexdigest()
        return [self.folder / f"{key}_{number}.npy" for number in range(len(photos))]

    def load(self, files: Sequence[Path]) -> list[np.ndarray] | None:
        """The arrays, mapped read-only; None where one is absent or damaged, and of no files."""
        try:
            return [np.load(file, mmap_mode="r") for file in files] or None
        except (OSError, ValueError, EOFError):
            return None

    def store(self, files: Sequence[Path], arrays: Sequence[np.ndarray]) -> None:
        """Keeps the arrays; where the disk is full or fails, warns once and keeps no more."""
        if not self._storing:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            disk = shutil.disk_usage(self.folder)
            if disk.free - sum(array.nbytes for array in arrays) < min(_SPARE, disk.total / 10):
                raise OSError(f"{disk.free / 1e9:.1f} GB are left, which the checkpoints may need")
            for file, array in zip(files, arrays, strict=True):
                with replacing(file) as part, open(part, "wb") as written:
                    np.save(written, array)
        except OSError as error:
            self._storing.fill_(False)
            warnings.warn(f"{self.folder}: keeps no more decoded photos, later epochs decode them again: {error}", stacklevel=2)
