"""The training loop: AdamW, linear warm-up then cosine, validation after each epoch, resumable at any step."""

import hashlib
import math
import platform
import shutil
import subprocess
import time
import tomllib
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from tqdm import tqdm

import autohdr
from autohdr import metrics
from autohdr.data.pairs import Pair, PairDataset, check_pairs, photo_digests, read_pairs, shared_photos
from autohdr.errors import UserError
from autohdr.measure import Measurement, format_bytes, free_bytes, measure, pick_device
from autohdr.models import create_model, load_checkpoint, load_weights, save_weights
from autohdr.models.mamba_diffusion import MambaDiffusion
from autohdr.plan import plan
from autohdr.train import record
from autohdr.train.checkpoint import PROGRESS, Background, load_newest, restore_rng, rng_state, save_state, to_cpu
from autohdr.train.config import LOSSES, TrainConfig, check_config, dump_config
from autohdr.train.distributed import Ranks, join, local
from autohdr.train.ema import Average
from autohdr.train.guards import Guard, TrainingError, deferred_signals, held_signals, not_finite, survive_signals
from autohdr.train.losses import Criterion
from autohdr.train.objective import Objective, parameter_groups

# What may differ between a run and its continuation: nothing that the weights depend on beyond rounding. How many pairs a
# step takes, batch_size x accumulate x processes, is checked apart.
_FREE_TO_CHANGE = {"out", "device", "compile", "recompute", "workers", "cache_gb", "log_every", "save_every", "keep", "samples"}
_FREE_TO_CHANGE |= {"tensorboard", "batch_size", "accumulate", "parallel", "rank_timeout"}

# States hold whole tensors by the model's own names, whatever shards them.
_WHOLE = StateDictOptions(full_state_dict=True)


@dataclass(frozen=True)
class RunSummary:
    """How a run ended: its folder, the epochs it has behind it, the best of them, and what stopped it."""

    out: Path
    epochs: int
    best: dict[str, float]
    """Log row of the epoch that is best by `best_metric`, the one in checkpoint_best; {} before the first."""
    interrupted: int
    """The signal that stopped it before its last epoch's end: SIGINT (Ctrl-C) or SIGTERM; 0: none did."""
    data_wait: float = field(default=0.0, compare=False)
    """Share of the training time of the epochs that this call ended that was spent waiting for a batch."""


def train(config: TrainConfig, *, resume: bool = False) -> RunSummary:
    """Train as `config` says, or take up the run in `config.out` again where its last checkpoint stands.

    The run folder then holds config.toml, log.jsonl, log.csv, curve.png, samples/, the weights checkpoint_best and
    checkpoint_last (.safetensors, for load_checkpoint), and for `resume` checkpoint_last.state.pt with those before it,
    checkpoint_last.state.previous.pt and so on. Under torchrun every process calls this, and the first one alone writes.
    SIGINT (Ctrl-C) and SIGTERM finish the step, save and return. Raises UserError for bad settings or data, before
    anything is written, and TrainingError after `max_bad_steps` steps in a row whose loss or gradient will not do.
    """
    check_config(config)
    ranks = join(pick_device(config.device), config.rank_timeout)
    trainer = _Trainer(config, *ranks.first(_checked_run, config, resume), ranks, fresh=not resume)
    trainer.resume() if resume else trainer.start()
    return trainer.run()


def rehearse(config: TrainConfig) -> str:
    """What train(config) would take, measured: everything is built and checked, two steps are made and one pair is validated.

    Nothing is written. Raises what train does, TrainingError at once where a step's loss or gradient is not finite.
    """
    check_config(config)
    ranks = join(pick_device(config.device), config.rank_timeout)
    trainer = _Trainer(replace(config, max_bad_steps=1, cache_gb=0), *ranks.first(_checked_run, config, False), ranks)
    return trainer.rehearse()


def lr_factor(step: int, total: int, warmup: int) -> float:
    """Share of the peak rate at step 0 .. total - 1: linear up to 1 in `warmup` steps, then a cosine towards 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def _precision(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        name = "float32" if device.type == "cpu" else "bfloat16"
    return getattr(torch, name)


class _Trainer:
    def __init__(
        self, config: TrainConfig, train_pairs: list[Pair], val_pairs: list[Pair], ranks: Ranks | None = None, fresh: bool = True
    ):
        self.ranks = ranks or Ranks(device=pick_device(config.device))
        self.config, self.train_pairs, self.out, self.device = config, train_pairs, config.out, self.ranks.device
        torch.manual_seed(config.seed)
        self.model = create_model(config.model, **config.model_args)
        digests = self.ranks.first(photo_digests, train_pairs)
        self.trained_on = sorted(set(digests.values()))  # these and what the weights have seen before
        if config.init_weights and fresh:
            earlier = load_weights(self.model, config.init_weights).metadata.get("trained_on", [])
            self.trained_on = sorted({*self.trained_on, *earlier})
        sharded = config.parallel == "fsdp" and self.ranks.count > 1  # FSDP2 takes contiguous weights alone
        self.model.to(self.device, memory_format=torch.preserve_format if sharded else torch.channels_last)
        self.objective = Objective(config, self.model)
        self.criterion = Criterion(config, self.device)
        self.precision = _precision(config.precision, self.device)
        if config.recompute:
            if not isinstance(self.model, MambaDiffusion):
                raise UserError(f"recompute: for MambaDiffusion, got {config.model}, whose ops do so by themselves")
            self.model.recompute = True
        if config.compile:
            self.model.compile()
        self.network = self.ranks.wrap(self.model, config.parallel, self.precision)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, config.weight_decay), lr=config.lr)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision is torch.float16)
        self.average = Average(self.model, config.ema)
        self.guard = Guard(config.spike_factor, config.spike_window, config.snapshot_every, self._changing)
        self.train_set = PairDataset(train_pairs, config.size, config.resize, config.augment, config.seed)
        self.val_set = PairDataset(val_pairs, config.size, config.resize)
        room = config.cache_gb * 1e9
        for dataset in (self.train_set, self.val_set):
            room -= dataset.keep_decoded(self.out / "cache", room)
        self.batches: list[list[int]] = []  # what the loader is to read in this epoch
        self.loader = self._loader(self.train_set, self.batches, persistent=True)
        self.step_pairs = config.batch_size * config.accumulate * self.ranks.count
        self.steps_per_epoch = math.ceil(len(train_pairs) / self.step_pairs)
        self._gathered = replace(_WHOLE, cpu_offload=self.ranks.count > 1)  # one process's GPU has faster, page-locked copies
        self.background = Background()
        self.saved_step = -1
        self.tensorboard = None
        self.signalled: Callable[[], int] = lambda: 0
        self.stopped = 0  # the signal that some process has got
        self.run_seconds = self.run_wait = 0.0

        self.run_id = uuid.uuid4().hex
        self.epoch = 0  # epochs behind us
        self.epoch_steps = 0  # optimiser steps behind us in the current one
        # The sums of its samples' losses, the whole and each component, and how many they are: those of bad steps left out.
        self.epoch_losses: dict[str, float] = {}
        self.epoch_samples = 0
        self.epoch_seconds = 0.0
        self.epoch_wait = 0.0  # of them, spent waiting for a batch
        self.history: list[dict[str, Any]] = []  # one row for each epoch behind us

    @property
    def step(self) -> int:
        return self.epoch * self.steps_per_epoch + self.epoch_steps

    def start(self) -> None:
        if self.ranks.rank == 0:
            (self.out / "samples").mkdir(parents=True)
            header = f"autohdr {autohdr.__version__}, {_commit()}, torch {torch.__version__}, Python "
            header += f"{platform.python_version()}, {platform.platform()}, {self.device}, processes: {self.ranks.count}"
            (self.out / "config.toml").write_text(dump_config(self.config, header), encoding="utf-8")
        self._save_last()

    def resume(self) -> None:
        path, loaded = self.out / "checkpoint_last.state.pt", []
        self.ranks.first(lambda: loaded.append(load_newest(path)))  # names and renames a damaged one, once
        state = loaded[0] if loaded else load_newest(path)
        weights = self.out / "checkpoint_last.safetensors"
        if weights.exists():  # behind the state after a crash between the two, ahead of it where the newest is damaged
            metadata = load_checkpoint(weights).metadata
            if metadata.get("run") != state["run_id"]:
                raise UserError(f"--resume: {weights} and checkpoint_last.state.pt are not of one run")
            self.trained_on = sorted({*self.trained_on, *metadata.get("trained_on", [])})  # a photo may have been replaced since
        if state["step_pairs"] != self.step_pairs:
            raise UserError(
                f"--resume: batch_size x accumulate x processes: the run takes {state['step_pairs']} pairs in a step, "
                f"got {self.config.batch_size} x {self.config.accumulate} x {self.ranks.count}"
            )
        if state["train_pairs"] != _order_of(self.train_pairs):
            raise UserError(
                f"--resume: train_pairs: expected the pairs that the run began with, in their order; {self.config.train_pairs} "
                "names others now"
            )
        if state["ema"]:
            set_model_state_dict(self.model, state["ema"]["model"], options=_WHOLE)
            self.average.take(state["ema"]["updates"])
        set_model_state_dict(self.model, state["model"], options=_WHOLE)
        if state["optimizer"]:
            set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=_WHOLE)
        self.scaler.load_state_dict(state["scaler"])
        for name in PROGRESS:
            setattr(self, name, state[name])
        self.guard.load_state_dict(state["guard"])
        self.guard.keep(self.step)
        self.saved_step = self.step
        if self.ranks.rank == 0:
            record.rewind(self.out / "log.jsonl", self.step)
            for part in self.out.glob(".*.part"):  # what a killed run was writing
                part.unlink()
        restore_rng(state["rng"])
        self.ranks.gather(None)  # reading takes its time too

    def __str__(self) -> str:
        processes = f" in {self.ranks.count} processes ({self.config.parallel})" if self.ranks.count > 1 else ""
        return (
            f"{self.config.model}, {sum(weight.numel() for weight in self.model.parameters()):,} parameters, {self.device}"
            f"{processes}; {len(self.train_set)} pairs to train on, {len(self.val_set)} to validate; step {self.step} of "
            f"{self.config.epochs * self.steps_per_epoch}; {self.out}"
        )

    def rehearse(self) -> str:
        with self._workers():
            waits, steps = self._two_steps()
            with measure(self.device) as validation:
                self._validate(self.ranks.count)
        peak = max(max(row) for row in self.ranks.gather_floats(*(m.peak_bytes for m in (*steps, validation))))
        turns = math.ceil(len(self.val_set) / self.ranks.count)
        epoch = self.steps_per_epoch * steps[1].seconds + turns * validation.seconds
        memory = f"{format_bytes(int(peak))} at most in a process ({steps[1].memory_source})"
        config, precision = self.config, str(self.precision).removeprefix("torch.")
        settings = {"accumulate": config.accumulate, "averaged": config.ema > 0, "recompute": config.recompute}
        planned = plan(self.model, config.size, config.batch_size, precision, "training", self.device, **settings)
        return "\n".join(
            (
                f"{self}",
                f"memory     {memory}, {format_bytes(free_bytes(self.device))} still free",
                f"planned    {planned}; Python, PyTorch, other losses than L1 and the state to go back to come on top",
                f"a step     {steps[1].seconds:.3g} s, {waits[1]:.2g} s of it for data; the first {steps[0].seconds:.3g} s",
                f"an epoch   {_duration(epoch)}: {self.steps_per_epoch} steps, {turns} validations of {validation.seconds:.2g} s",
                f"the run    {_duration(self.config.epochs * epoch)}: {self.config.epochs} epochs",
                "nothing was written",
            )
        )

    def _two_steps(self) -> tuple[list[float], list[Measurement]]:
        """Seconds that each waited for data, and what it took."""
        groups = (self._groups() * 2)[:2]
        self.batches[:] = [self.ranks.part(batch)[0] for group in groups for batch in group]
        loader, waits, steps = self._start(self.loader), [], []
        for group in groups:
            with measure(self.device) as step:
                self._train_step(group, loader, 0.0)
            waits.append(self.epoch_wait - sum(waits))
            steps.append(step)
        return waits, steps

    @contextmanager
    def _workers(self) -> Iterator[None]:
        """Of the loader: they end with the block, also where it fails."""
        try:
            yield
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # they hold the loader's iterator, and this its workers
            raise
        finally:
            del self.loader

    def run(self) -> RunSummary:
        self._say(str(self))
        total = self.config.epochs * self.steps_per_epoch
        if self.config.tensorboard and self.ranks.rank == 0:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(self.out / "tensorboard", purge_step=self.step + 1)
        hidden = None if self.ranks.rank == 0 else True  # None: where there is no terminal
        bar = tqdm(total=total, initial=self.step, unit="step", desc="train", disable=hidden, dynamic_ncols=True)
        with bar, deferred_signals() as self.signalled:
            try:
                with self._workers():
                    while self.epoch < self.config.epochs and not self.stopped:
                        if self._train_epoch(bar):
                            self._save_last()  # whoever sends a signal may not wait until validation is over
                            self._finish_epoch(bar)
                            self._heed_signals()
                        self._save_last()
                self._wait_until_written()  # torchrun ends the first process once another has ended
            finally:
                self.background.wait()
                if self.tensorboard:
                    self.tensorboard.close()
        if self.epoch == self.config.epochs and self.ranks.rank == 0:
            shutil.rmtree(self.out / "cache", ignore_errors=True)
        wait = self.run_wait / self.run_seconds if self.run_seconds else 0.0
        if self.run_seconds:
            self._say(f"{wait:.1%} of the time of training was spent waiting for data")
        best = max(self.history, key=self._merit, default={})
        stopped = self.stopped if self.epoch < self.config.epochs else 0
        return RunSummary(self.out, self.epoch, best, stopped, wait)

    def _train_epoch(self, bar: tqdm) -> bool:
        """Train from where this epoch stands to its end; False where a signal came first."""
        config, mark, groups = self.config, time.perf_counter(), self._groups()
        self.model.train()
        self.train_set.set_epoch(self.epoch)
        self.batches[:] = [self.ranks.part(batch)[0] for group in groups[self.epoch_steps :] for batch in group]
        loader = self._start(self.loader)
        for group in groups[self.epoch_steps :]:
            lr = config.lr * lr_factor(
                self.step, config.epochs * self.steps_per_epoch, round(config.warmup_epochs * self.steps_per_epoch)
            )
            losses, norm = self._train_step(group, loader, lr)
            counted = sum(map(len, group)) if self.guard.in_a_row == 0 else 0
            for name, value in losses.items():
                self.epoch_losses[name] = self.epoch_losses.get(name, 0.0) + (value * counted if counted else 0.0)
            self.epoch_samples += counted
            self.epoch_steps += 1
            bar.update()
            bar.set_postfix_str(f"epoch {self.epoch + 1}/{config.epochs}, loss {losses['loss']:.4f}, lr {lr:.1e}", refresh=False)
            if counted and self.step % config.log_every == 0:
                entry = {"kind": "step", "step": self.step, "epoch": self.epoch + 1} | losses | {"lr": lr}
                entry["grad_norm"] = norm if math.isfinite(norm) else None  # None: float16 overflowed, the step was skipped
                self._log(entry)
            self.epoch_seconds += time.perf_counter() - mark
            mark = time.perf_counter()
            self._heed_signals()
            if self.stopped:
                break
            if config.save_every and self.step % config.save_every == 0 and self.epoch_steps < len(groups):
                self._save_last()
        return self.epoch_steps == len(groups)

    def _heed_signals(self) -> None:
        self.stopped = int(max(self.ranks.gather_floats(self.signalled()))[0])

    def _wait_until_written(self) -> None:
        """No process goes on before: its next exchange with the first one would wait for the disk, and not for ever."""
        if self.ranks.rank == 0:
            self.background.wait()
        self.ranks.gather(None)

    def _groups(self) -> list[list[list[int]]]:
        """The pairs of this epoch: for each step the batches, for all processes together."""
        order = np.random.default_rng([self.config.seed, self.epoch]).permutation(len(self.train_pairs)).tolist()
        size, count = self.config.batch_size * self.ranks.count, self.config.accumulate
        batches = [order[i : i + size] for i in range(0, len(order), size)]
        return [batches[i : i + count] for i in range(0, len(batches), count)]

    def _train_step(self, group: list[list[int]], loader: Iterator[dict], lr: float) -> tuple[dict[str, float], float]:
        """One optimiser step over the batches of `group`; its samples' mean losses, the whole first, and its gradient's norm.

        Both are those of all processes. A step whose loss or gradient will not do changes nothing, or takes the run back:
        guard.in_a_row is then above 0.
        """
        samples = sum(map(len, group))
        means = 0.0
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = lr
        self.optimizer.zero_grad()
        for number, batch in enumerate(group, 1):
            indices, counted = self.ranks.part(batch)
            started = time.perf_counter()
            source, target = self._to_device(next(loader))
            self.epoch_wait += time.perf_counter() - started
            share = counted / samples  # so that batches of unequal size weigh as one big batch would
            with self.ranks.exchanging(self.network, last=number == len(group)):
                with self._autocast():
                    said, wanted = self.objective.predict(self.network, source, target, self.epoch, indices)
                loss, components = self.criterion(said, wanted)
                self.scaler.scale(loss * (share * self.ranks.count)).backward()  # gradients are averaged over the processes
            means = means + share * torch.stack((loss.detach(), *components.values()))
        self.scaler.unscale_(self.optimizer)
        parameters = list(self.model.parameters())
        length = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        length = length.full_tensor() if isinstance(length, DTensor) else length
        (norm, *_), *_ = rows = self.ranks.gather_floats(length.item(), *means.tolist())
        losses = dict(zip(("loss", *components), map(sum, list(zip(*rows, strict=True))[1:]), strict=True))
        total = losses["loss"]
        # In float16 a gradient that overflows says that the scale is too large; at scale 1 it says what it says elsewhere.
        overflow = math.isfinite(total) and not math.isfinite(norm) and self.scaler.get_scale() > 1
        if not overflow:
            if fault := self._fault(total, norm):
                self._skip(fault, group)
                return losses, norm
            self.guard.passed(self.step, total)
        torch.nn.utils.clip_grads_with_norm_(parameters, self.config.clip or math.inf, length)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if not overflow:
            self.average.update()
        return losses, norm

    def _fault(self, loss: float, norm: float) -> dict[str, Any] | None:
        """What is wrong with a step, as the log says it; None where nothing is. The same on all processes."""
        limit, numbers = self.guard.limit(), f"(loss {loss}, gradient norm {norm})"
        if not math.isfinite(loss):
            return {"kind": "skipped", "cause": f"the loss is not finite {numbers}", "tensors": ["loss"]}
        if not math.isfinite(norm):
            found = {name for names in self.ranks.gather(not_finite(self.model)) for name in names}
            names = [name for name, _ in self.model.named_parameters() if name in found]
            where = f"in {len(names)} parameters, first {names[0]}" if names else "in its norm alone, which is too large"
            return {"kind": "skipped", "cause": f"the gradient is not finite {where} {numbers}", "tensors": names}
        if loss > limit:
            return {
                "kind": "rolled back",
                "cause": f"the loss {loss:.4g} is a spike, above {limit:.4g}",
                "to": self.guard.kept_at,
            }
        return None

    def _skip(self, fault: dict[str, Any], group: list[list[int]]) -> None:
        """Leave the step out, and after a spike those since the last good state too. Raises TrainingError after too many."""
        self.scaler.update(self.scaler.get_scale())  # ready for the next step, its scale as it was
        if "to" in fault:
            self.guard.roll_back()
        self.guard.in_a_row += 1
        files = [str(self.train_pairs[index].src) for batch in group for index in batch]
        where = {"step": self.step + 1, "epoch": self.epoch + 1, "in_a_row": self.guard.in_a_row}
        self._log(fault | where | {"sources": files})
        done = f"back to the state after step {fault['to']}" if "to" in fault else "step skipped"
        said = f"step {self.step + 1} (epoch {self.epoch + 1}): {fault['cause']}"
        if self.guard.in_a_row >= self.config.max_bad_steps:
            raise TrainingError(
                f"{said}. Its sources: {', '.join(files)}. It is bad step {self.guard.in_a_row} in a row (max_bad_steps). The "
                f"checkpoints in {self.out} are from before it; start another run from one of them (--init-weights) with a lower "
                "lr, a smaller clip or precision float32"
            )
        self._say(f"{said}: {done} ({self.guard.in_a_row} of {self.config.max_bad_steps} in a row); sources: {', '.join(files)}")

    def _finish_epoch(self, bar: tqdm) -> None:
        """Validate, log, draw, and keep the weights where they are the best so far."""
        started, trained, wait = time.perf_counter(), self.epoch_seconds, self.epoch_wait
        scores, triptychs = self._validate()
        row = {"epoch": self.epoch + 1, "step": self.step, "lr": self.optimizer.param_groups[0]["lr"]}
        samples = self.epoch_samples or math.nan  # nan: every step was bad
        row |= {f"train_{name}": total / samples for name, total in self.epoch_losses.items()} | scores
        row["seconds"] = round(trained + time.perf_counter() - started, 3)
        row["data_wait"] = round(wait / trained, 4)
        if any(math.isnan(value) for value in scores.values()):
            raise TrainingError(f"epoch {self.epoch + 1}: the model's output on the validation pairs is not a number")
        is_best = all(self._merit(row) > self._merit(earlier) for earlier in self.history)
        self.history.append(row)
        self.epoch, self.epoch_steps, self.epoch_losses, self.epoch_samples = self.epoch + 1, 0, {}, 0
        self.epoch_seconds = self.epoch_wait = 0.0
        self.run_seconds, self.run_wait = self.run_seconds + trained, self.run_wait + wait

        self._log({"kind": "epoch"} | row)
        if self.ranks.rank == 0:
            record.write_csv(self.out / "log.csv", self.history)
            record.draw_curve(self.out / "curve.png", self.history)
            if triptychs:
                record.write_triptychs(self.out / "samples" / f"epoch_{self.epoch:03d}.jpg", triptychs)
        if is_best:
            self._save_weights("best")
        self._say(
            f"epoch {self.epoch:>3}/{self.config.epochs}  train L1 {row['train_l1']:.4f}  val L1 {row['val_l1']:.4f}  "
            f"PSNR {row['val_psnr']:.2f} dB  SSIM {row['val_ssim']:.3f}  {row['seconds']:.1f} s{'  best' * is_best}"
        )

    @torch.no_grad()  # not inference_mode: FSDP2 would gather weights that no later step can differentiate
    def _validate(self, pairs: int | None = None) -> tuple[dict[str, float], list[tuple[torch.Tensor, ...]]]:
        """Means over the validation pairs, or so many of them, one at a time so that each weighs the same; the first triptychs.

        The processes take turns, and each pair counts once; who has none in the last round works on the last pair again.
        """
        model = self.objective.photographer(self.model).eval()
        names = ("val_l1", "val_psnr", "val_ssim")
        pairs = min(pairs or len(self.val_set), len(self.val_set))
        turns = range(self.ranks.rank, self.ranks.rank + pairs, self.ranks.count)
        scores, triptychs = {}, {}
        loader = self._start(self._loader(self.val_set, [[min(turn, pairs - 1)] for turn in turns]))
        with self.average.applied():
            for index, batch in zip(turns, loader, strict=True):
                source, target = self._to_device(batch)
                with self._autocast():
                    output = model(source).float().clamp(0, 1)
                if index < pairs:
                    scores[index] = [getattr(metrics, name.removeprefix("val_"))(output, target).item() for name in names]
                if index < min(self.config.samples, pairs):
                    triptychs[index] = (source[0].cpu(), output[0].cpu(), target[0].cpu())
        for others, shown in self.ranks.gather((scores, triptychs)):
            scores, triptychs = scores | others, triptychs | shown
        columns = zip(*(scores[index] for index in sorted(scores)), strict=True)
        means = {name: math.fsum(column) / len(scores) for name, column in zip(names, columns, strict=True)}
        return means, [triptychs[index] for index in sorted(triptychs)]

    def _merit(self, row: dict[str, Any]) -> float:
        """What the best epoch has most of."""
        value = row[self.config.best_metric]
        return -value if self.config.best_metric == "val_l1" else value

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.precision, enabled=self.precision is not torch.float32)

    def _loader(self, dataset: PairDataset, batches: list[list[int]], persistent: bool = False) -> DataLoader:
        workers = {"prefetch_factor": 4, "persistent_workers": persistent} if self.config.workers else {}
        # A generator of its own, so that drawing the workers' seeds leaves the global one alone.
        return DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=self.config.workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=survive_signals,
            generator=torch.Generator(),
            **workers,
        )

    def _start(self, loader: DataLoader) -> Iterator[dict]:
        with held_signals():
            return iter(loader)

    def _to_device(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(
            batch[key].to(self.device, non_blocking=True).contiguous(memory_format=torch.channels_last) for key in ("src", "tar")
        )

    def _log(self, entry: dict[str, Any]) -> None:
        if self.ranks.rank == 0 and self.out.is_dir():  # a rehearsal has no folder
            record.append_line(self.out / "log.jsonl", entry)
            if self.tensorboard:
                record.write_scalars(self.tensorboard, entry)

    def _say(self, text: str) -> None:
        if self.ranks.rank == 0:
            tqdm.write(text)

    def _changing(self) -> list[torch.Tensor]:
        """All tensors of this process that a step changes; none before the first."""
        if not self.optimizer.state:
            return []
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        moments = [value for weight in weights for value in self.optimizer.state[weight].values()]
        return [local(tensor) for tensor in (*weights, *moments)] + self.average.tensors

    def _weights(self) -> dict[str, torch.Tensor]:
        """A copy of the weights, on the CPU; {} on all processes but the first."""
        return to_cpu(get_model_state_dict(self.model, options=self._gathered))

    def _metadata(self) -> dict[str, Any]:
        metadata = {"run": self.run_id, "step": self.step, "epoch": self.epoch, "metrics": (self.history or [{}])[-1]}
        return metadata | self.objective.metadata() | {"trained_on": self.trained_on}

    def _save_weights(self, which: str) -> None:
        """Those that validation measures."""
        self._wait_until_written()
        with self.average.applied():
            weights = self._weights()
        if self.ranks.rank == 0:
            self.background(save_weights, self.out / f"checkpoint_{which}.safetensors", self.model, self._metadata(), weights)

    def _save_last(self) -> None:
        self._wait_until_written()
        state = {name: getattr(self, name) for name in PROGRESS} | {"step": self.step, "step_pairs": self.step_pairs}
        state["train_pairs"] = _order_of(self.train_pairs)
        state |= {"rng": rng_state(), "scaler": self.scaler.state_dict(), "guard": self.guard.state_dict(), "optimizer": {}}
        if self.optimizer.state:  # without one, torch would make a step to have it
            state["optimizer"] = get_optimizer_state_dict(self.model, self.optimizer, options=self._gathered)
        state = to_cpu(state) | {"model": self._weights(), "ema": {}}
        if self.config.ema:
            with self.average.applied():
                state["ema"] = {"updates": self.average.updates, "model": self._weights()}
        if self.ranks.rank == 0:
            # A state of the same step, from before validation, is replaced: those kept are to be of other steps.
            keep = self.config.keep if self.saved_step != self.step else 1
            self.background(self._write_last, state, self._metadata(), keep)
        self.saved_step = self.step

    def _write_last(self, state: dict[str, Any], metadata: dict[str, Any], keep: int) -> None:
        save_state(self.out / "checkpoint_last.state.pt", state, keep)
        weights = (state["ema"] or state)["model"]
        save_weights(self.out / "checkpoint_last.safetensors", self.model, metadata, weights)


def _order_of(pairs: list[Pair]) -> str:
    """SHA-256 of the photos' names in a list of pairs, wherever they lie."""
    return hashlib.sha256("\n".join(f"{pair.src.name}\t{pair.tar.name}" for pair in pairs).encode()).hexdigest()


def _duration(seconds: float) -> str:
    unit, size = next((unit, size) for unit, size in (("h", 3600), ("min", 60), ("s", 0)) if seconds >= 2 * size)
    return f"{seconds / (size or 1):.3g} {unit}"


def _commit() -> str:
    """The commit of this package's sources, where they are a checkout's."""
    git = partial(subprocess.run, cwd=Path(autohdr.__file__).parent, check=True, capture_output=True, text=True)
    try:
        git(["git", "ls-files", "--error-unmatch", "__init__.py"])  # not a checkout that only surrounds an installed package
        return "commit " + git(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "commit unknown"


def _checked_run(config: TrainConfig, resume: bool) -> tuple[list[Pair], list[Pair]]:
    """_checked_pairs, once the run folder is as it should be."""
    if resume:
        _check_same_run(config)
    elif config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
        raise UserError(f"out: {config.out} already holds files: give another --out, or --resume to continue its run")
    return _checked_pairs(config)


def _check_same_run(config: TrainConfig) -> None:
    saved = config.out / "config.toml"
    if not saved.is_file():
        raise UserError(f"--resume: nothing to resume: {config.out} holds no run (no config.toml)")
    before, now = tomllib.loads(saved.read_text(encoding="utf-8")), tomllib.loads(dump_config(config))
    for key in (before.keys() | now.keys()) - _FREE_TO_CHANGE:
        if before.get(key) != now.get(key):
            raise UserError(
                f"--resume: {key}: the run in {config.out} has {before.get(key)!r}, got {now.get(key)!r}; "
                f"`autohdr train {saved} --resume` goes on with its own settings"
            )


def _checked_pairs(config: TrainConfig) -> tuple[list[Pair], list[Pair]]:
    """The pairs to train on and those to validate on, all of them sound, none with a photo of the others."""
    train_pairs, val_pairs = read_pairs(config.train_pairs), read_pairs(config.val_pairs)
    for photo, trained, pair in shared_photos(train_pairs, val_pairs):
        raise UserError(
            f"{pair.where}: {photo} is also in {trained.where}: no photo may be both trained and validated on; "
            "`autohdr data split` keeps them apart"
        )
    needy = max(config.losses, key=LOSSES.get)
    _check_sides(config, train_pairs, "training", LOSSES[needy], f"the loss {needy}")
    _check_sides(config, val_pairs, "validation", metrics.SSIM_WINDOW, "SSIM")
    return train_pairs, val_pairs


def _check_sides(config: TrainConfig, pairs: list[Pair], use: str, least: int, reason: str) -> None:
    """All photos can be read, and no side is shorter than `least` once they are resized."""
    dataset = PairDataset(pairs, config.size, config.resize)
    for pair, size in zip(pairs, check_pairs(pairs), strict=True):
        height, width = dataset.resized(*size)
        if min(height, width) < least:
            raise UserError(
                f"{pair.where}: expected {use} pairs with sides of at least {least} pixels, as {reason} needs; "
                f"{size[1]}x{size[0]} pixels become {width}x{height} with size {config.size} and resize {config.resize}"
            )
