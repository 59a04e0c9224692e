"""The training state on disk: everything a run needs to go on as if it had never stopped.

It holds the weights too, so that one atomic rename is the whole checkpoint: no crash can leave half of one.
"""

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from autohdr.errors import UserError


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a tree of tensors and plain values. The file appears whole or not at all; a failure leaves the old one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_state(path: Path) -> dict[str, Any]:
    """Read what save_state wrote, onto the CPU; runs no code from it. Raises UserError if missing or damaged."""
    if not path.is_file():
        raise UserError(f"--resume: nothing to resume: no training state at {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: expected a training state, got a damaged or foreign file ({error})") from None


def rng_state() -> dict[str, Any]:
    """State of torch's global generators; Python's and NumPy's take no part in training."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def restore_rng(state: dict[str, Any]) -> None:
    """Undo every draw since rng_state(). A GPU that the saving machine did not have keeps its own state."""
    torch.set_rng_state(state["cpu"])
    for index, generator in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(generator, index)
