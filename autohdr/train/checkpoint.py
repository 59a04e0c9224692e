"""The training state on disk: everything a run needs to go on as if it had never stopped.

It holds the weights too, so that one atomic rename is the whole checkpoint: no crash can leave half of one. After the
archive that torch.save writes come the 32 bytes of its SHA-256. The state before the newest is kept beside it.
"""

import hashlib
import os
import pickle
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from autohdr.errors import UserError
from autohdr.files import replacing

PROGRESS = ("run_id", "epoch", "epoch_steps", "epoch_losses", "epoch_seconds", "history")
"""The plain values of a state: the trainer's attributes of these names."""
_KEYS = {*PROGRESS, "step", "rng", "model", "optimizer", "scaler"}


def previous(path: Path) -> Path:
    """Where save_state keeps the state that stood at `path` before."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a run's state: tensors and plain values; the one before it goes to previous(path).

    The file appears whole or not at all; a failure leaves the old one at `path`.
    """
    with replacing(path) as part:
        with open(part, "wb") as file:
            torch.save(state, file)
        digest = _digest(part, part.stat().st_size)
        with open(part, "ab") as file:
            file.write(digest)
        if path.exists():
            with replacing(previous(path)) as older:
                try:
                    os.link(path, older)  # a second name, and `path` is never absent
                except OSError:  # a file system without hard links
                    shutil.copyfile(path, older)


def load_newest(path: Path) -> dict[str, Any]:
    """load_state(path), or of previous(path) where that fails, after a warning that names the damaged file.

    The damaged file is renamed to NAME.damaged, so that the next save cannot put it in the place of the good one.
    Raises UserError where neither is a training state.
    """
    older = previous(path)
    if not older.is_file():
        return load_state(path)
    try:
        return load_state(path)
    except UserError as error:
        state = load_state(older)
        warnings.warn(f"{error}; going on from {older}, step {state['step']}", stacklevel=2)
        if path.is_file():
            os.replace(path, path.with_name(f"{path.name}.damaged"))
        return state


def load_state(path: Path) -> dict[str, Any]:
    """Read what save_state wrote, onto the CPU; runs no code from it. Raises UserError if missing, damaged or foreign."""
    if not path.is_file():
        raise UserError(f"--resume: nothing to resume: no training state at {path}")
    size = path.stat().st_size - hashlib.sha256().digest_size
    with open(path, "rb") as file:
        file.seek(max(size, 0))
        if size <= 0 or file.read() != _digest(path, size):
            raise UserError(f"{path}: expected a training state, got a damaged or foreign file (its SHA-256 does not match)")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: expected a training state, got a damaged or foreign file ({error})") from None
    missing = _KEYS - (state.keys() if isinstance(state, dict) else set())
    if missing:
        raise UserError(f"{path}: expected a training state, got a file without {', '.join(sorted(missing))}")
    return state


def _digest(path: Path, size: int) -> bytes:
    """SHA-256 of the file's first `size` bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while size > 0 and (block := file.read(min(size, 1 << 20))):
            digest.update(block)
            size -= len(block)
    return digest.digest()


def rng_state() -> dict[str, Any]:
    """State of torch's global generators; Python's and NumPy's take no part in training."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def restore_rng(state: dict[str, Any]) -> None:
    """Undo every draw since rng_state(). A GPU that the saving machine did not have keeps its own state."""
    torch.set_rng_state(state["cpu"])
    for index, generator in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(generator, index)
