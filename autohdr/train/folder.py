"""The run folder: its configuration, logs, states and weights. The first process alone writes there, but for a state's shards."""

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import autohdr
from autohdr.errors import UserError
from autohdr.files import leftovers, replacing
from autohdr.models import read_metadata, save_weights
from autohdr.models.network import Network
from autohdr.train import record
from autohdr.train.checkpoint import Background, load_newest, previous, save_state
from autohdr.train.config import TrainConfig, dump_config
from autohdr.train.distributed import Ranks, writers
from autohdr.train.trackers import Trackers

CURVE_EVERY = 30
"""Seconds between two drawings of the curve, which take longer than some epochs."""

STATE, LAST = "checkpoint_last.state.pt", "checkpoint_last.safetensors"


class RunFolder:
    """Writes a run's files. All processes call each method at the same point; the first one alone has what is to be written, and
    the others their parts of a sharded state.

    What cannot be written, on a full disk for instance, is kept, and written with what comes next; failure() tells.
    """

    def __init__(self, config: TrainConfig, ranks: Ranks):
        assert config.out  # check_config refuses None
        self.out = config.out
        self._config, self._ranks = config, ranks
        self._writes = ranks.rank == 0
        self._group = writers() if config.sharded_states and ranks.count > 1 else None
        self._background, self._pictures = Background(), Background()
        self._undrawn: list[dict[str, Any]] = []
        self._draw_at = 0.0
        self._unwritten: dict[str, Callable[[], None]] = {}
        self._lines: list[dict[str, Any]] = []
        self._failure: OSError | None = None
        self._saved_step = -1
        self._trackers: Trackers | None = None

    def begin(self) -> None:
        """Make the folder of a new run, and write what made it into config.toml. That comes first: --resume needs no more."""
        if not self._writes:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        for part in leftovers(self.out):
            part.unlink()
        self._write_config(self._made_by())
        (self.out / "samples").mkdir(exist_ok=True)

    def read(self, like: Mapping[str, DTensor]) -> tuple[dict[str, Any], list[str]]:
        """The newest state, on all processes, and the digests of the photos that its weights were trained on.

        like: as of load_state. Raises UserError as load_newest does, and for weights of another run.
        """
        # The first sets damaged states aside: the others need not look for damage.
        state = self._ranks.each(load_newest, self.out / STATE, like, self._writes)
        weights, trained_on = self.out / LAST, []
        # The weights are older than the state after a kill between the two, and newer where the newest state is damaged.
        if weights.exists():
            metadata = read_metadata(weights)
            if metadata.get("run") != state["run_id"]:
                raise UserError(f"--resume: {weights} and {STATE} are not of one run")
            trained_on = metadata.get("trained_on", [])
        return state, trained_on

    def go_on(self, step: int) -> None:
        """Drop what came after so many steps from the log, and half-written files, and write the settings that the run goes on
        with into config.toml. Raises UserError as record.rewind does."""
        self._saved_step = step
        self._ranks.first(record.rewind, self.out / "log.jsonl", step)
        if not self._writes:
            return
        for part in leftovers(self.out):
            part.unlink()
        lines = (self.out / "config.toml").read_text(encoding="utf-8").splitlines()
        made_by = [line.removeprefix("# ") for line in lines if line.startswith("# ")]
        self._write_config("\n".join([*made_by, f"from step {step} on: {self._made_by()}"]))

    def _write_config(self, header: str) -> None:
        with replacing(self.out / "config.toml") as part:
            part.write_text(dump_config(self._config, header, inside=True), encoding="utf-8")

    def _made_by(self) -> str:
        versions = f"autohdr {autohdr.__version__}, {_commit()}, torch {torch.__version__}, Python {platform.python_version()}"
        return f"{versions}, {platform.platform()}, {self._ranks.device}, processes: {self._ranks.count}"

    def open_trackers(self, run_id: str, step: int) -> None:
        """Log to those too that the configuration names. The run goes on after `step` steps."""
        if self._writes:
            self._trackers = Trackers(self._config, run_id, step)

    def log(self, entry: dict[str, Any]) -> None:
        """Add a line to log.jsonl."""
        if self._writes:
            self._lines.append(entry)
            with self._noting_failures():
                record.append_lines(self.out / "log.jsonl", self._lines)
                self._lines.clear()
            if self._trackers:
                self._trackers.log(entry)

    def note(self, entry: dict[str, Any]) -> None:
        """Add a line to log.jsonl with the next one: it tells of a failure, and to write it now might be another."""
        if self._writes:
            self._lines.append(entry)

    def show(self, history: list[dict[str, Any]], triptychs: list[record.Triptych]) -> None:
        """Write log.csv of all epochs; in the background the last one's samples, and every CURVE_EVERY seconds curve.png."""
        if not self._writes:
            return
        with self._noting_failures():
            record.write_csv(self.out / "log.csv", history)
        self._undrawn = list(history)
        self._pictures(self._draw, triptychs, len(history))

    def _draw(self, triptychs: list[record.Triptych], epoch: int) -> None:
        with self._noting_failures():
            if triptychs:
                record.write_sheet(self.out / "samples" / f"epoch_{epoch:03d}.jpg", triptychs)
            if self._undrawn and time.monotonic() >= self._draw_at:
                history, self._undrawn = self._undrawn, []
                record.draw_curve(self.out / "curve.png", history)
                self._draw_at = time.monotonic() + CURVE_EVERY

    def save_best(self, model: Network, metadata: dict[str, Any], weights: dict[str, Tensor]) -> None:
        """Write checkpoint_best in the background. weights: a copy, which no step changes."""
        job = partial(save_weights, self.out / "checkpoint_best.safetensors", model, metadata, weights)
        self._write({"best": job} if self._writes else {})

    def set_aside(self) -> bool:
        """Take the newest state out of the way of the one before it; False where there is none before it."""
        found = previous(self.out / STATE).is_file()
        if self._writes and found:
            os.replace(self.out / STATE, self.out / f"{STATE}.damaged")
        return found

    def save_last(self, model: Network, metadata: dict[str, Any], state: dict[str, Any], weights: dict[str, Tensor]) -> None:
        """Write a state in the background, and then the weights that its validation measures. Both are copies."""
        # A state of the same step, from before validation, is replaced: the states kept are to be of different steps.
        keep = self._config.keep if self._saved_step != state["step"] else 1
        self._saved_step = state["step"]

        def write() -> None:
            save_state(self.out / STATE, state, keep, self._group)
            if self._writes:  # where they fail, they are tried again without the state, which all processes write
                self._unwritten["weights"] = partial(save_weights, self.out / LAST, model, metadata, weights)

        self._write({"state": write} if self._writes or self._group else {})

    def _write(self, jobs: dict[str, Callable[[], None]]) -> None:
        self._background.wait()
        self._unwritten |= jobs
        self._background(self._write_all)

    def _write_all(self) -> None:
        for what in ("state", "weights", "best"):
            with self._noting_failures():
                if job := self._unwritten.get(what):
                    job()
                    del self._unwritten[what]

    @contextmanager
    def _noting_failures(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._failure = self._failure or error

    def failure(self) -> OSError | None:
        """Why something could not be written since the last call: the first reason."""
        failure, self._failure = self._failure, None
        return failure

    def wait(self) -> None:
        """Wait until everything is written or has failed, all processes together: an exchange of gradients waits rank_timeout
        seconds only."""
        self._background.wait()
        self._ranks.gather(None)

    def finish(self) -> None:
        """Wait, and try once more to write what failed. Raises OSError where that fails too."""
        self.wait()
        self._pictures.wait()
        self._failure, self._draw_at = None, 0.0
        self._draw([], 0)
        self._write_all()
        if self._lines:
            record.append_lines(self.out / "log.jsonl", self._lines)
        if failure := self.failure():
            raise failure

    def close(self) -> None:
        """Wait for this process's own writing; for use after a failure too."""
        self._background.wait()
        self._pictures.wait()
        if self._trackers:
            self._trackers.close()

    def remove_cache(self) -> None:
        """Give back the disk that decoded photos take."""
        if self._writes:
            shutil.rmtree(self.out / "cache", ignore_errors=True)


def _commit() -> str:
    """The commit of this package's sources, where they are a checkout's."""
    git = partial(subprocess.run, cwd=Path(autohdr.__file__).parent, check=True, capture_output=True, text=True)
    try:
        git(["git", "ls-files", "--error-unmatch", "__init__.py"])  # not a checkout that only surrounds an installed package
        return "commit " + git(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "commit unknown"
