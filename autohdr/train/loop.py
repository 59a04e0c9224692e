"""The training loop: orders a run's steps, validations and saves, reports on them, and resumes it at any step."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from autohdr.data.pairs import Replaced, photo_digests
from autohdr.signals import deferred_signals
from autohdr.train.batches import Group
from autohdr.train.branch import first_state, read_parent
from autohdr.train.checkpoint import restore_rng, rng_state
from autohdr.train.checks import check_state, check_teacher, identity
from autohdr.train.config import Resume, TrainConfig
from autohdr.train.folder import RunFolder
from autohdr.train.guards import Fault, Return, TrainingError
from autohdr.train.lock import Lock
from autohdr.train.progress import SPIKES, Progress
from autohdr.train.run import Run, prepare
from autohdr.train.step import StepResult

Copies = tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]
"""Metadata, state and weights."""

RETRY = 60
"""Seconds after which a save that failed is tried again."""


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
    """The signal that stopped the run before its last epoch's end, such as SIGTERM; 0: none did."""
    lost: dict[str, int] = field(default_factory=dict)
    """{cause: steps of the whole run that changed nothing in the end}."""
    data_wait: float = field(default=0.0, compare=False)
    """Share of the steps' time that they waited for data, in the epochs that this call finished."""
    early: bool = False
    """Whether `patience` has ended it before its last epoch."""


def train(config: TrainConfig, *, resume: Resume = False) -> RunSummary:
    """Train as `config` says. resume: go on with the run in `config.out` from its newest state; "auto": if there is one.

    The run folder then holds config.toml, log.jsonl, log.csv, curve.png, samples/, the weights checkpoint_best and
    checkpoint_last (.safetensors, for load_checkpoint), and for `resume` checkpoint_last.state.pt with those before it,
    checkpoint_last.state.previous.pt and so on. Under torchrun every process calls this, and the first one alone writes, but for
    `sharded_states`, whose tensors all write into shards/.
    SIGINT (Ctrl-C), SIGTERM, SIGHUP and SIGUSR1 finish the step, save and return. A save that fails is tried again, and training
    goes on. Raises UserError for bad settings or data, and where another process trains in the folder, before it writes anything;
    TrainingError after `max_bad_steps` bad steps in a row; OSError where the first or the last save fails.
    """
    run = prepare(config, resume=resume)
    assert config.out  # check_config refuses None
    lock = Lock(config.out)
    run.ranks.first(lock.take)
    try:
        loop = Loop(run)
        loop.resume() if run.resumes else loop.start()
        return loop.train()
    finally:
        lock.release()


class Loop:
    """Orders the parts of a run: which step is next, when to validate and to save, when to stop."""

    def __init__(self, run: Run):
        self._run, self._config, self._ranks, self._learner = run, run.config, run.ranks, run.learner
        self._folder = RunFolder(run.config, run.ranks)
        self._progress = Progress()
        pairs, others = run.batches.dataset.pairs, run.validation.dataset.pairs
        self._replaced = Replaced(pairs)
        digests = self._ranks.first(photo_digests, [*pairs, *others])
        self._teacher = {"teacher": run.learner.teacher.record} if run.learner.teacher else {}
        self._identity = identity(pairs, others, digests, run.schedule.step_pairs) | self._teacher
        self._trained_on = run.learner.trained_on | {digests[photo] for pair in pairs for photo in (pair.src, pair.tar)}
        self._stopped = 0  # the number of a signal that any process has received
        self._unproved: Copies | None = None  # to be written after a good loss
        self._copied: tuple[dict[str, Any], dict[str, Tensor]] | None = None  # _learned(), until the next step
        self._due = False  # a save is due after the next good step
        self._save_at = math.inf  # by the clock, on the first process
        self._suspects: Group = []  # the pairs of the last step, if it was a spike
        self._resumed = False  # from a state that no loss has found good since
        self._seconds = self._waited = 0.0  # that the steps of the epochs finished here took, and that they waited for data

    def start(self) -> None:
        """Make the run folder with a first state. Training waits for it: without a state, --resume begins the run anew.

        Raises UserError, and makes nothing, where the run is a branch and cannot go on from its parent.
        """
        parent = self._branch() if self._config.branch else None
        self._folder.begin()
        self._save(*self._copy())
        self._folder.finish()
        if parent:  # after the state: a log without one would be of a run that has lost its states
            self._folder.log(parent)

    def resume(self) -> None:
        """Load the newest state in the run folder. Raises UserError where it is of another run."""
        state, trained_on = self._folder.read(self._learner.shards())
        self._ranks.first(check_state, state, self._identity, self._config, self._ranks.count)
        self._ranks.first(check_teacher, state, self._identity, self._config)
        self._trained_on |= set(trained_on)  # a photo may have been replaced since the run began
        self._take(state)
        self._folder.go_on(self._progress.step)
        self._resumed = True

    def _branch(self) -> dict[str, Any]:
        """Begin where the parent stands. Returns what the log is to say about it."""
        parent, trained_on = self._ranks.each(
            read_parent, self._config, self._identity, self._ranks.count, self._learner.shards()
        )
        state = first_state(parent, self._config, self._learner)
        self._trained_on |= set(trained_on)
        self._take(state)
        entry = {"kind": "branch", "step": state["step"], "epoch": state["epoch"], "parent": parent["run_id"]}
        return entry | {"folder": str(self._config.branch)}

    def _take(self, state: dict[str, Any]) -> None:
        self._progress.load_state_dict(state)
        self._learner.load_state_dict(state, self._progress.step)
        restore_rng(state["rng"])

    def train(self) -> RunSummary:
        """Train to the end of the last epoch, or until a signal comes."""
        config, progress, folder = self._config, self._progress, self._folder
        self._say(self._run.describe(progress.step))
        hidden = None if self._ranks.rank == 0 else True  # None: hide it where there is no terminal
        bar = tqdm(
            total=self._run.schedule.steps, initial=progress.step, unit="step", desc="train", disable=hidden, dynamic_ncols=True
        )
        with bar, deferred_signals("stopping after this step ...") as signalled:
            try:
                folder.open_trackers(progress.run_id, progress.step)
                with self._run.batches.workers():
                    while not self._ended() and not self._may_stop():
                        if self._train_epoch(bar, signalled):
                            if progress.epoch + 1 == config.epochs and self._learner.guard.in_a_row == 1:
                                self._go_back("the last step is bad")  # no step comes that tells whether the weights are
                            self._save_now()  # validation takes long, and a kill during it must not cost the epoch
                            self._finish_epoch()
                            self._heed(signalled)
                        self._save_now()
                folder.finish()  # all together: torchrun ends the first process, which writes, once another has ended
            finally:
                folder.close()
        best, ended = progress.best(config.best_metric), self._ended()
        early = ended and progress.epoch < config.epochs
        if ended:
            folder.remove_cache()
        if early:
            self._say(
                f"stopped early: {config.patience} epochs without a better {config.best_metric} than epoch {best['epoch']}'s"
            )
        wait = self._waited / self._seconds if self._seconds else 0.0
        if self._seconds:
            self._say(f"{wait:.1%} of the time of training was spent waiting for data")
        if lost := progress.lost:
            causes = ", ".join(f"{count} by {cause}" for cause, count in lost.most_common())
            self._say(f"{lost.total()} of {progress.step} steps lost: {causes}")
        stopped = 0 if ended else self._stopped
        return RunSummary(folder.out, progress.epoch, best, stopped, dict(progress.lost), wait, early)

    def _ended(self) -> bool:
        """Whether all epochs are done, or patience is. It waits for a good step, as only that shows the weights to be sound."""
        progress, patience = self._progress, self._config.patience
        over = 0 < patience <= progress.waited(self._config.best_metric) and not self._learner.guard.in_a_row
        return progress.epoch >= self._config.epochs or over and not progress.epoch_steps

    def _train_epoch(self, bar: tqdm, signalled: Callable[[], int]) -> bool:
        """Train from where this epoch stands to its end; False where a signal came first. It ends after a good step."""
        config, progress, run, mark = self._config, self._progress, self._run, time.perf_counter()
        steps = run.schedule.epoch_steps(progress.epoch)
        if config.stages and progress.epoch == run.schedule.first(stage := run.schedule.stage(progress.epoch)):
            self._say(f"stage {stage + 1} of {len(config.stages)}: {run.schedule.describe(stage)}")
        groups = run.batches.groups(progress.epoch, progress.left_out)[progress.epoch_steps :]
        batches = run.batches.read(groups, progress.epoch, progress.left_out)
        self._learner.model.train()
        for group in groups:
            lr = run.schedule.lr(progress.epoch, progress.epoch_steps)
            self._copied = None
            result = run.step(group, batches, epoch=progress.epoch, step=progress.step, lr=lr)
            self._judge(result, group)
            progress.end_step(result.losses, 0 if result.fault else sum(map(len, group)))
            bar.update()
            shown = f"epoch {progress.epoch + 1}/{config.epochs}, loss {result.losses['loss']:.4f}, lr {lr:.1e}"
            bar.set_postfix_str(shown, refresh=False)
            if not result.fault and progress.step % config.log_every == 0:
                entry = {"kind": "step", "step": progress.step, "epoch": progress.epoch + 1} | result.losses | {"lr": lr}
                self._folder.log(entry | {"grad_norm": result.norm})
            progress.epoch_wait += result.waited
            progress.epoch_seconds += time.perf_counter() - mark
            mark = time.perf_counter()
            self._heed(signalled)
            if self._may_stop():
                break
            self._due |= config.save_every > 0 and progress.step % config.save_every == 0
            if self._due and not result.fault and progress.epoch_steps < steps:
                self._unproved, self._due = self._copy(), False
        return progress.epoch_steps == steps

    def _judge(self, result: StepResult, group: Group) -> None:
        """Write the state before a step that its loss has found good, and take note of one that was left out."""
        unproved, self._unproved = self._unproved, None
        if result.fault:
            self._due |= unproved is not None
            self._report(result.fault, result.returned, group)
            return
        self._resumed = False
        if result.adversary_fault:
            entry = {"kind": "discriminator skipped", "cause": result.adversary_fault, "step": self._progress.step + 1}
            self._folder.log(entry | {"epoch": self._progress.epoch + 1, "sources": self._run.batches.sources(group)})
            self._say(f"step {self._progress.step + 1}: {result.adversary_fault}: its step skipped")
        if unproved:
            self._save(*unproved)
        if not math.isfinite(result.norm):
            self._progress.lost["an overflow in float16"] += 1
        self._progress.spikes.update({index for batch in self._suspects for index in batch})
        self._suspects = []

    def _report(self, fault: Fault, returned: Return | None, group: Group) -> None:
        """Log and print the bad step that was just left out. Raises TrainingError after max_bad_steps in a row."""
        in_a_row, most = self._learner.guard.in_a_row, self._config.max_bad_steps
        self._suspects = group if fault.kind == "a spike" and in_a_row == 1 else []
        self._progress.lost[fault.kind] += 1
        step, epoch, sources = self._progress.step + 1, self._progress.epoch + 1, self._run.batches.sources(group)
        entry = {"kind": "skipped", "cause": fault.cause, "tensors": fault.tensors, "step": step, "epoch": epoch}
        self._folder.log(entry | {"in_a_row": in_a_row, "sources": sources})
        said, files = f"step {step} (epoch {epoch}): {fault.cause}", ", ".join(sources)
        if in_a_row >= most:
            raise TrainingError(
                f"{said}. Its sources: {files}. It is bad step {in_a_row} in a row (max_bad_steps). {self._where_to_go()}; or "
                "start another run from its weights (--init-weights) with a lower lr, a smaller clip or precision float32"
            )
        self._say(f"{said}: step skipped ({in_a_row} of {most} in a row); sources: {files}")
        if returned:
            self._returned(returned, "two bad steps in a row", step)

    def _returned(self, returned: Return, cause: str, step: int) -> None:
        """Log and print that the guard has put back a good state."""
        if returned.undone:
            self._progress.lost[f"going back after {cause}"] += returned.undone
        self._folder.log(
            {"kind": "rolled back", "cause": cause, "step": step, "epoch": self._progress.epoch + 1} | vars(returned)
        )
        self._say(f"step {step}: {cause}: back to the state after step {returned.to}")

    def _go_back(self, cause: str) -> bool:
        """Put back the state that the guard keeps, at an epoch's end; False where it has none."""
        if returned := self._learner.guard.put_back():
            self._copied = None
            self._returned(returned, cause, self._progress.step)
        return returned is not None

    def _where_to_go(self) -> str:
        """What a run that ends here has on disk. A state that nothing was good after gives way to the one before it."""
        aside = self._resumed and self._folder.set_aside()
        which = "The state that the run went on from is set aside, and --resume" if aside else "--resume"
        return f"{which} goes on from the last good state in {self._folder.out}"

    def _finish_epoch(self) -> None:
        """Validate, log and draw; save the weights if the epoch is the best so far."""
        progress, metric, started = self._progress, self._config.best_metric, time.perf_counter()
        scores, triptychs = self._run.validation()
        cause = "the model's output on the validation pairs is not a number"
        if any(map(math.isnan, scores.values())) and self._go_back(cause):
            scores, triptychs = self._run.validation()
        if any(map(math.isnan, scores.values())):
            raise TrainingError(f"epoch {progress.epoch + 1}: {cause}. {self._where_to_go()}")
        trained, waited = progress.epoch_seconds, progress.epoch_wait
        lr = self._run.schedule.lr(progress.epoch, progress.epoch_steps - 1)
        row = {"epoch": progress.epoch + 1, "step": progress.step, "lr": lr}
        row |= progress.train_means() | scores
        row |= {"seconds": round(trained + time.perf_counter() - started, 3), "data_wait": round(waited / trained, 4)}
        if self._config.stages:
            row["size"] = self._run.schedule.stages[self._run.schedule.stage(progress.epoch)].size
        self._seconds, self._waited = self._seconds + trained, self._waited + waited
        odd = progress.leave_out(max(1, len(self._run.batches.dataset) // 10))
        progress.end_epoch(row)
        self._folder.log({"kind": "epoch"} | row)
        for source in (str(self._run.batches.dataset.pairs[index].src) for index in odd):
            self._folder.log({"kind": "left out", "step": progress.step, "epoch": progress.epoch, "source": source})
            self._say(f"{source}: left out from here on: its loss was a spike in {SPIKES} epochs, and the next step's good")
        self._folder.show(progress.history, triptychs)
        is_best = progress.best(metric) is row
        if is_best:
            self._folder.wait()
            self._folder.save_best(self._learner.model, self._metadata(), self._learned()[1])
        self._say(
            f"epoch {progress.epoch:>3}/{self._config.epochs}  train L1 {row['train_l1']:.4f}  val L1 {row['val_l1']:.4f}  "
            f"PSNR {row['val_psnr']:.2f} dB  SSIM {row['val_ssim']:.3f}  {row['seconds']:.1f} s{'  best' * is_best}"
        )

    def _copy(self) -> Copies:
        """What is to be written, and no step changes."""
        self._save_at = time.monotonic() + 60 * (self._config.save_minutes or math.inf)
        learned, weights = self._learned()
        return self._metadata(), self._progress.state_dict() | self._identity | {"rng": rng_state()} | learned, weights

    def _learned(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The learner's state and the weights that validation measures, copied once between two steps."""
        if self._copied is None:
            state = self._learner.state_dict()
            self._copied = state, self._learner.measured_weights(state)
        return self._copied

    def _save(self, metadata: dict[str, Any], state: dict[str, Any], weights: dict[str, Tensor]) -> None:
        self._folder.wait()
        self._folder.save_last(self._learner.model, metadata, state, weights)

    def _save_now(self) -> None:
        """Save the present state, unless the last step was bad: then it may be ruined, and is saved after the next good one."""
        self._due = self._learner.guard.in_a_row > 0 and self._progress.epoch < self._config.epochs
        if not self._due:
            self._unproved = None
            self._save(*self._copy())

    def _may_stop(self) -> bool:
        """Whether a signal came, and the state can be saved: the last step was good."""
        return self._stopped > 0 and not self._learner.guard.in_a_row

    def _metadata(self) -> dict[str, Any]:
        """What the weights' files say beside the weights."""
        progress = self._progress
        if self._ranks.rank == 0:
            self._trained_on.update(self._replaced.digests())
        metadata = {"run": progress.run_id, "step": progress.step, "epoch": progress.epoch}
        metadata["metrics"] = progress.history[-1] if progress.history else {}
        return metadata | self._learner.objective.metadata() | self._teacher | {"trained_on": sorted(self._trained_on)}

    def _heed(self, signalled: Callable[[], int]) -> None:
        """Let all processes know whether one of them has received a signal, and whether the first one wants a save."""
        if failure := self._folder.failure():
            self._say(f"not saved: {failure}; training goes on, and tries again in {RETRY} s")
            progress = self._progress
            self._folder.note({"kind": "not saved", "cause": str(failure), "step": progress.step, "epoch": progress.epoch + 1})
            self._save_at = min(self._save_at, time.monotonic() + RETRY)
        signals, wanted = zip(*self._ranks.gather_floats(signalled(), time.monotonic() >= self._save_at), strict=True)
        self._stopped, self._due = int(max(signals)), self._due or bool(wanted[0])

    def _say(self, text: str) -> None:
        if self._ranks.rank == 0:
            tqdm.write(text)
