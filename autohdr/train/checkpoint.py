"""The training state on disk: everything a run needs to go on as if it had never stopped.

It holds the weights too, so that one atomic rename is the whole checkpoint: no crash can leave half of one.
"""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from autohdr.errors import UserError
from autohdr.files import replacing

PROGRESS = ("run_id", "epoch", "epoch_steps", "epoch_loss", "epoch_seconds", "history")
"""The plain values of a state: the trainer's attributes of these names."""
_KEYS = {*PROGRESS, "step", "rng", "model", "optimizer", "scaler"}


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a run's state: tensors and plain values. The file appears whole or not at all; a failure leaves the old one."""
    with replacing(path) as part, open(part, "wb") as file:
        torch.save(state, file)


def load_state(path: Path) -> dict[str, Any]:
    """Read what save_state wrote, onto the CPU; runs no code from it. Raises UserError if missing, damaged or foreign."""
    if not path.is_file():
        raise UserError(f"--resume: nothing to resume: no training state at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: expected a training state, got a damaged or foreign file ({error})") from None
    missing = _KEYS - (state.keys() if isinstance(state, dict) else set())
    if missing:
        raise UserError(f"{path}: expected a training state, got a file without {', '.join(sorted(missing))}")
    return state


def rng_state() -> dict[str, Any]:
    """State of torch's global generators; Python's and NumPy's take no part in training."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def restore_rng(state: dict[str, Any]) -> None:
    """Undo every draw since rng_state(). A GPU that the saving machine did not have keeps its own state."""
    torch.set_rng_state(state["cpu"])
    for index, generator in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(generator, index)
