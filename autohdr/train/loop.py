"""The training loop: orders a run's steps, validations and saves, reports on them, and resumes it at any step."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from autohdr.data.pairs import photo_digests
from autohdr.train.batches import Group
from autohdr.train.checkpoint import restore_rng, rng_state
from autohdr.train.checks import check_state, identity
from autohdr.train.config import TrainConfig
from autohdr.train.folder import RunFolder
from autohdr.train.guards import Fault, TrainingError, deferred_signals
from autohdr.train.progress import Progress
from autohdr.train.run import Run, prepare


@dataclass(frozen=True)
class RunSummary:
    """How a call of train ended."""

    out: Path
    """The run folder."""
    epochs: int
    """Whole epochs behind the run."""
    best: dict[str, float]
    """Log row of the epoch that is best by `best_metric`, the one in checkpoint_best; {} before the first."""
    interrupted: int
    """The signal that stopped the run before its last epoch's end, SIGINT (Ctrl-C) or SIGTERM; 0: none did."""
    data_wait: float = field(default=0.0, compare=False)
    """Share of the steps' time that they waited for data, in the epochs that this call finished."""


def train(config: TrainConfig, *, resume: bool = False) -> RunSummary:
    """Train as `config` says. resume: go on with the run in `config.out` from its newest state.

    The run folder then holds config.toml, log.jsonl, log.csv, curve.png, samples/, the weights checkpoint_best and
    checkpoint_last (.safetensors, for load_checkpoint), and for `resume` checkpoint_last.state.pt with those before it,
    checkpoint_last.state.previous.pt and so on. Under torchrun every process calls this, and the first one alone writes.
    SIGINT (Ctrl-C) and SIGTERM finish the step, save and return. Raises UserError for bad settings or data, before
    anything is written, and TrainingError after `max_bad_steps` bad steps in a row.
    """
    run = prepare(config, resume=resume)
    loop = Loop(run)
    loop.resume() if run.resumes else loop.start()
    return loop.train()


def lr_factor(step: int, total: int, warmup: int) -> float:
    """Share of the peak rate at step 0 .. total - 1: linear up to 1 in `warmup` steps, then a cosine towards 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


class Loop:
    """Orders the parts of a run: which step is next, when to validate and to save, when to stop."""

    def __init__(self, run: Run):
        self._run, self._config, self._ranks, self._learner = run, run.config, run.ranks, run.learner
        self._folder = RunFolder(run.config, run.ranks)
        self._progress = Progress(run.batches.steps_per_epoch)
        pairs, others = run.batches.dataset.pairs, run.validation.dataset.pairs
        digests = self._ranks.first(photo_digests, [*pairs, *others])
        self._identity = identity(pairs, others, digests, run.batches.step_pairs)
        self._trained_on = run.learner.trained_on | {digests[photo] for pair in pairs for photo in (pair.src, pair.tar)}
        self._stopped = 0  # the number of a signal that any process has received
        self._seconds = self._waited = 0.0  # that the steps of the epochs finished here took, and that they waited for data

    def start(self) -> None:
        """Make the run folder with a first state. Training waits for it: without a state, --resume begins the run anew."""
        self._folder.begin()
        self._save_last()
        self._folder.wait()

    def resume(self) -> None:
        """Load the newest state in the run folder. Raises UserError where it is of another run."""
        state, trained_on = self._folder.read()
        self._ranks.first(check_state, state, self._identity, self._config, self._ranks.count)
        self._trained_on |= set(trained_on)  # a photo may have been replaced since the run began
        self._progress.load_state_dict(state)
        self._learner.load_state_dict(state, self._progress.step)
        restore_rng(state["rng"])
        self._folder.go_on(self._progress.step)

    def train(self) -> RunSummary:
        """Train to the end of the last epoch, or until a signal comes."""
        config, progress, folder = self._config, self._progress, self._folder
        self._say(self._run.describe(progress.step))
        hidden = None if self._ranks.rank == 0 else True  # None: hide it where there is no terminal
        bar = tqdm(total=self._run.steps, initial=progress.step, unit="step", desc="train", disable=hidden, dynamic_ncols=True)
        with bar, deferred_signals() as signalled:
            try:
                folder.open_tensorboard(progress.step)
                with self._run.batches.workers():
                    while progress.epoch < config.epochs and not self._stopped:
                        if self._train_epoch(bar, signalled):
                            self._save_last()  # validation takes long, and a kill during it must not cost the epoch
                            self._finish_epoch()
                            self._heed(signalled)
                        self._save_last()
                folder.wait()  # torchrun ends the first process, which writes, once another has ended
            finally:
                folder.close()
        ended = progress.epoch == config.epochs
        if ended:
            folder.remove_cache()
        wait = self._waited / self._seconds if self._seconds else 0.0
        if self._seconds:
            self._say(f"{wait:.1%} of the time of training was spent waiting for data")
        best = progress.best(config.best_metric)
        return RunSummary(folder.out, progress.epoch, best, 0 if ended else self._stopped, wait)

    def _train_epoch(self, bar: tqdm, signalled: Callable[[], int]) -> bool:
        """Train from where this epoch stands to its end; False where a signal came first."""
        config, progress, run, mark = self._config, self._progress, self._run, time.perf_counter()
        groups = run.batches.groups(progress.epoch)[progress.epoch_steps :]
        batches = run.batches.read(groups, progress.epoch)
        warmup = round(config.warmup_epochs * progress.steps_per_epoch)
        self._learner.model.train()
        for group in groups:
            lr = config.lr * lr_factor(progress.step, run.steps, warmup)
            result = run.step(group, batches, epoch=progress.epoch, step=progress.step, lr=lr)
            if result.fault:
                self._report(result.fault, group)
            progress.end_step(result.losses, 0 if result.fault else sum(map(len, group)))
            bar.update()
            shown = f"epoch {progress.epoch + 1}/{config.epochs}, loss {result.losses['loss']:.4f}, lr {lr:.1e}"
            bar.set_postfix_str(shown, refresh=False)
            if not result.fault and progress.step % config.log_every == 0:
                entry = {"kind": "step", "step": progress.step, "epoch": progress.epoch + 1} | result.losses | {"lr": lr}
                entry["grad_norm"] = result.norm if math.isfinite(result.norm) else None  # None: it overflowed in float16
                self._folder.log(entry)
            progress.epoch_wait += result.waited
            progress.epoch_seconds += time.perf_counter() - mark
            mark = time.perf_counter()
            self._heed(signalled)
            if self._stopped:
                break
            if config.save_every and progress.step % config.save_every == 0 and progress.epoch_steps < progress.steps_per_epoch:
                self._save_last()
        return progress.epoch_steps == progress.steps_per_epoch

    def _report(self, fault: Fault, group: Group) -> None:
        """Log and print the bad step that was just left out. Raises TrainingError after max_bad_steps in a row."""
        in_a_row, most = self._learner.guard.in_a_row, self._config.max_bad_steps
        step, epoch, sources = self._progress.step + 1, self._progress.epoch + 1, self._run.batches.sources(group)
        self._folder.log(fault.entry() | {"step": step, "epoch": epoch, "in_a_row": in_a_row, "sources": sources})
        said, files = f"step {step} (epoch {epoch}): {fault.cause}", ", ".join(sources)
        if in_a_row >= most:
            raise TrainingError(
                f"{said}. Its sources: {files}. It is bad step {in_a_row} in a row (max_bad_steps). The checkpoints in "
                f"{self._folder.out} are from before it; start another run from one of them (--init-weights) with a lower lr, "
                "a smaller clip or precision float32"
            )
        done = "step skipped" if fault.back_to is None else f"back to the state after step {fault.back_to}"
        self._say(f"{said}: {done} ({in_a_row} of {most} in a row); sources: {files}")

    def _finish_epoch(self) -> None:
        """Validate, log and draw; save the weights if the epoch is the best so far."""
        progress, metric, started = self._progress, self._config.best_metric, time.perf_counter()
        scores, triptychs = self._run.validation()
        if any(math.isnan(value) for value in scores.values()):
            raise TrainingError(f"epoch {progress.epoch + 1}: the model's output on the validation pairs is not a number")
        trained, waited = progress.epoch_seconds, progress.epoch_wait
        row = {"epoch": progress.epoch + 1, "step": progress.step, "lr": self._learner.optimizer.param_groups[0]["lr"]}
        row |= progress.train_means() | scores
        row |= {"seconds": round(trained + time.perf_counter() - started, 3), "data_wait": round(waited / trained, 4)}
        self._seconds, self._waited = self._seconds + trained, self._waited + waited
        progress.end_epoch(row)
        self._folder.log({"kind": "epoch"} | row)
        self._folder.show(progress.history, triptychs)
        is_best = progress.best(metric) is row
        if is_best:
            self._folder.wait()
            self._folder.save_best(self._learner.model, self._metadata(), self._learner.weights())
        self._say(
            f"epoch {progress.epoch:>3}/{self._config.epochs}  train L1 {row['train_l1']:.4f}  val L1 {row['val_l1']:.4f}  "
            f"PSNR {row['val_psnr']:.2f} dB  SSIM {row['val_ssim']:.3f}  {row['seconds']:.1f} s{'  best' * is_best}"
        )

    def _save_last(self) -> None:
        self._folder.wait()
        state = self._progress.state_dict() | self._identity | {"rng": rng_state()} | self._learner.state_dict()
        self._folder.save_last(self._learner.model, self._metadata(), state)

    def _metadata(self) -> dict[str, Any]:
        """What the weights' files say beside the weights."""
        progress = self._progress
        metadata = {"run": progress.run_id, "step": progress.step, "epoch": progress.epoch}
        metadata["metrics"] = progress.history[-1] if progress.history else {}
        return metadata | self._learner.objective.metadata() | {"trained_on": sorted(self._trained_on)}

    def _heed(self, signalled: Callable[[], int]) -> None:
        """Let all processes know whether one of them has received a signal."""
        self._stopped = int(max(self._ranks.gather_floats(signalled()))[0])

    def _say(self, text: str) -> None:
        if self._ranks.rank == 0:
            tqdm.write(text)
