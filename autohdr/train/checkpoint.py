"""The training state on disk: everything that a run needs to go on as if it had never stopped.

One file holds all of it, weights included, and takes its name by one atomic rename: a crash leaves the old state or the new one,
never half of one. The file is what torch.save writes, and after it the 32 bytes of its SHA-256. Older states lie beside it.

Where each process has a part of the tensors, all write theirs into a folder in shards/ first; then the file, which names it and
has the digests of what is in it.
"""

import hashlib
import os
import pickle
import shutil
import uuid
import warnings
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from autohdr.errors import UserError
from autohdr.files import replacing
from autohdr.train import shards
from autohdr.train.distributed import together
from autohdr.train.progress import Progress

_KEYS = {*Progress.keys(), "step_pairs", "train_pairs", "val_pairs", "rng", "model", "ema", "optimizer", "scaler", "guard"}
"""What a state holds: Progress's plain values, checks.identity's, rng_state() and Learner's."""

SHARDS = "shards"
"""The folder, beside the states, of the folders that hold the tensors of those that are sharded."""


def previous(path: Path, age: int = 1) -> Path:
    """The file of the state that stood at `path` so many saves ago."""
    return path.with_name(f"{path.stem}.previous{age if age > 1 else ''}{path.suffix}")


def save_state(path: Path, state: dict[str, Any], keep: int = 2, group: Any = None) -> None:
    """Write a run's state, tensors and plain values, to `path`; the keep - 1 states before it go to previous(path, 1) and so on.

    The file appears whole or not at all. A failure leaves the old state at `path`; a full disk raises OSError.

    group: of the processes that call this together, each with its own parts of the tensors, on the CPU; the first writes the
    file, and a full disk of one raises OSError in all. None: this process has all of the state.
    """
    if group is None:
        _replace(path, state, keep)
        _clear_shards(path)
        return
    name, first = [uuid.uuid4().hex], dist.get_rank(group) == 0
    dist.broadcast_object_list(name, group=group, group_src=0)
    rest, sharded = shards.split(state)
    try:
        files = shards.write(path.parent / SHARDS / name[0], sharded, group)
        rest["shards"] = {"folder": name[0], "files": files}
        together(lambda: _replace(path, rest, keep) if first else None, group)
    finally:
        if first:
            _clear_shards(path)


def _replace(path: Path, state: dict[str, Any], keep: int) -> None:
    with replacing(path) as part:
        with open(part, "wb") as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:  # torch does not say why a write failed; the OSError behind it does
                raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
        digest = _digest(part, part.stat().st_size)
        with open(part, "ab") as file:
            file.write(digest)
        for age in range(keep - 1, 1, -1):
            if previous(path, age - 1).exists():
                os.replace(previous(path, age - 1), previous(path, age))
        if path.exists() and keep > 1:
            with replacing(previous(path)) as older:
                try:
                    os.link(path, older)  # a second name for it: `path` is never absent
                except OSError:  # a file system without hard links
                    shutil.copyfile(path, older)


def _clear_shards(path: Path) -> None:
    """Remove the shards that no state's file at or beside `path` names: of states that are gone, or that were not finished."""
    folder, used = path.parent / SHARDS, set()
    for file in path.parent.glob(f"{path.stem}*") if folder.is_dir() else ():
        try:
            used.add(_read(file).get("shards", {}).get("folder"))
        except UserError:
            pass
        except OSError:  # it may be whole
            return
    for unused in folder.glob("*"):
        if unused.name not in used:
            shutil.rmtree(unused, ignore_errors=True)
    with suppress(OSError):  # once it is empty no save need read the states for what they name
        folder.rmdir()


def load_newest(path: Path, like: Mapping[str, DTensor] | None = None, check: bool = True) -> dict[str, Any]:
    """load_state(path, like, check), or the newest older state that is whole; then a warning names each damaged file.

    A damaged file is renamed to NAME.damaged: the next save would else move it to where a good older state is. Raises UserError,
    and renames nothing, where no file is a training state.
    """
    older = sorted(path.parent.glob(f"{path.stem}.previous*{path.suffix}"), key=lambda file: (len(file.name), file.name))
    damaged = []
    for file in [file for file in (path, *older) if file.is_file()] or [path]:
        try:
            state = load_state(file, like, check)
        except UserError as error:
            damaged.append((file, error))
            continue
        for bad, error in damaged:
            warnings.warn(f"{error}; going on from {file}, step {state['step']}", stacklevel=2)
            os.replace(bad, bad.with_name(f"{bad.name}.damaged"))
        return state
    raise damaged[0][1]


def load_state(path: Path, like: Mapping[str, DTensor] | None = None, check: bool = True) -> dict[str, Any]:
    """Read what save_state wrote, onto the CPU; runs no code from it. Raises UserError if missing, damaged or foreign.

    like: {name: parameter}, for a process that wants, where the state is sharded, its own parts alone: as the parameters', and
    where they are. check: whether the shards' digests are compared too.
    """
    state = _read(path)
    if part := state.pop("shards", None):
        shards.merge(state, shards.read(path.parent / SHARDS / part["folder"], part["files"], like or {}, check))
    return state


def _read(path: Path) -> dict[str, Any]:
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


def to_cpu(tree: Any) -> Any:
    """A copy, on the CPU, of a tree of tensors and plain values; no step changes it. In page-locked memory if from a GPU."""
    if isinstance(tree, DTensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, torch.Tensor):
        return torch.empty_like(tree, device="cpu", pin_memory=tree.is_cuda).copy_(tree)
    if isinstance(tree, dict):
        return {key: to_cpu(value) for key, value in tree.items()}
    return [to_cpu(value) for value in tree] if isinstance(tree, list | tuple) else tree


class Background:
    """Runs functions that write in a thread, one after the other, while training goes on.

    A call waits for the one before it, and raises what that one raised. So does wait().
    """

    def __init__(self):
        self._pool, self._pending = ThreadPoolExecutor(1), Future()
        self._pending.set_result(None)

    def __call__(self, function: Callable[..., None], *args: Any) -> None:
        self.wait()
        self._pending = self._pool.submit(function, *args)

    def wait(self) -> None:
        self._pending.result()


def rng_state() -> dict[str, Any]:
    """State of torch's global generators. Training draws nothing from Python's and NumPy's."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def restore_rng(state: dict[str, Any]) -> None:
    """Set torch's global generators to a rng_state(). A GPU that the saving machine did not have keeps its own state."""
    torch.set_rng_state(state["cpu"])
    for index, generator in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(generator, index)
