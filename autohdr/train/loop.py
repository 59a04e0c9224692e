"""The training loop: AdamW, linear warm-up then cosine, validation after each epoch, resumable at any step."""

import math
import platform
import signal
import threading
import time
import tomllib
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import autohdr
from autohdr import metrics
from autohdr.data.pairs import Pair, PairDataset, check_pairs, read_pairs, shared_photos
from autohdr.errors import UserError
from autohdr.models import create_model, load_checkpoint, load_weights, save_weights
from autohdr.train import record
from autohdr.train.checkpoint import PROGRESS, load_newest, restore_rng, rng_state, save_state
from autohdr.train.config import LOSSES, TrainConfig, check_config, dump_config
from autohdr.train.losses import Criterion
from autohdr.train.objective import Objective, parameter_groups

# What may differ between a run and its continuation: nothing that the weights depend on.
_FREE_TO_CHANGE = {"out", "device", "workers", "log_every", "samples"}


class TrainingError(RuntimeError):
    """Training cannot go on. The message names the step and the files of its batch; the last checkpoint is good."""


@dataclass(frozen=True)
class RunSummary:
    """How a run ended: its folder, the epochs it has behind it, the best of them, and whether Ctrl-C stopped it."""

    out: Path
    epochs: int
    best: dict[str, float]
    """Log row of the epoch with the highest validation PSNR, the one in checkpoint_best; {} before the first."""
    interrupted: bool


def train(config: TrainConfig, *, resume: bool = False) -> RunSummary:
    """Train as `config` says, or take up the run in `config.out` again where its last checkpoint stands.

    The run folder then holds config.toml, log.jsonl, log.csv, curve.png, samples/, the weights checkpoint_best and
    checkpoint_last (.safetensors, for load_checkpoint), and for `resume` checkpoint_last.state.pt with the one before
    it, checkpoint_last.state.previous.pt. Ctrl-C finishes the step, saves and returns. Raises UserError for bad settings
    or data, before anything is written, and TrainingError when the loss or a gradient is no longer finite.
    """
    check_config(config)
    if resume:
        _check_same_run(config)
    elif config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
        raise UserError(f"out: {config.out} already holds files: give another --out, or --resume to continue its run")
    trainer = _Trainer(config, *_checked_pairs(config))
    trainer.resume() if resume else trainer.start()
    return trainer.run()


def lr_factor(step: int, total: int, warmup: int) -> float:
    """Share of the peak rate at step 0 .. total - 1: linear up to 1 in `warmup` steps, then a cosine towards 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto": CUDA where there is one. Raises UserError where it is absent."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device: {name!r} is not available here: {str(error).splitlines()[0]}") from None
    return device


def _precision(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        name = "float32" if device.type == "cpu" else "bfloat16"
    return getattr(torch, name)


class _Trainer:
    def __init__(self, config: TrainConfig, train_pairs: list[Pair], val_pairs: list[Pair]):
        self.config, self.train_pairs, self.out = config, train_pairs, config.out
        self.device = pick_device(config.device)
        torch.manual_seed(config.seed)
        self.model = create_model(config.model, **config.model_args)
        self.model.to(self.device, memory_format=torch.channels_last)
        self.objective = Objective(config, self.model)
        self.criterion = Criterion(config, self.device)
        self.precision = _precision(config.precision, self.device)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, config.weight_decay), lr=config.lr)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision is torch.float16)
        self.train_set = PairDataset(train_pairs, config.size, config.resize, config.augment, config.seed)
        self.val_set = PairDataset(val_pairs, config.size, config.resize)
        self.steps_per_epoch = math.ceil(len(train_pairs) / (config.batch_size * config.accumulate))

        self.run_id = uuid.uuid4().hex
        self.epoch = 0  # epochs behind us
        self.epoch_steps = 0  # optimiser steps behind us in the current one
        self.epoch_losses: dict[str, float] = {}  # the sums of its samples' losses: the whole, and each component
        self.epoch_seconds = 0.0
        self.history: list[dict[str, Any]] = []  # one row for each epoch behind us

    @property
    def step(self) -> int:
        return self.epoch * self.steps_per_epoch + self.epoch_steps

    def start(self) -> None:
        if self.config.init_weights:
            load_weights(self.model, self.config.init_weights)
        (self.out / "samples").mkdir(parents=True)
        versions = f"autohdr {autohdr.__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        versions += f"{platform.platform()}, {self.device}"
        (self.out / "config.toml").write_text(dump_config(self.config, versions), encoding="utf-8")
        self._save_last()

    def resume(self) -> None:
        state = load_newest(self.out / "checkpoint_last.state.pt")
        weights = self.out / "checkpoint_last.safetensors"
        if weights.exists():  # behind the state after a crash between the two, ahead of it where the newest is damaged
            if load_checkpoint(weights).metadata.get("run") != state["run_id"]:
                raise UserError(f"--resume: {weights} and checkpoint_last.state.pt are not of one run")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        for name in PROGRESS:
            setattr(self, name, state[name])
        record.rewind(self.out / "log.jsonl", self.step)
        restore_rng(state["rng"])

    def run(self) -> RunSummary:
        total = self.config.epochs * self.steps_per_epoch
        print(
            f"{self.config.model}, {sum(weight.numel() for weight in self.model.parameters()):,} parameters, {self.device}; "
            f"{len(self.train_set)} pairs to train on, {len(self.val_set)} to validate; step {self.step} of {total}; {self.out}"
        )
        bar = tqdm(total=total, initial=self.step, unit="step", desc="train", disable=None, dynamic_ncols=True)
        with bar, _deferred_interrupt() as interrupted:
            while self.epoch < self.config.epochs and not interrupted():
                finished = self._train_epoch(bar, interrupted)
                if finished:
                    self._finish_epoch(bar)
                self._save_last()
        best = max(self.history, key=lambda row: row["val_psnr"], default={})
        return RunSummary(self.out, self.epoch, best, interrupted=self.epoch < self.config.epochs)

    def _train_epoch(self, bar: tqdm, interrupted: Callable[[], bool]) -> bool:
        """Train from where this epoch stands to its end; False where an interrupt came first."""
        config, started = self.config, time.perf_counter()
        self.model.train()
        self.train_set.set_epoch(self.epoch)
        order = np.random.default_rng([config.seed, self.epoch]).permutation(len(self.train_pairs)).tolist()
        batches = [order[i : i + config.batch_size] for i in range(0, len(order), config.batch_size)]
        groups = [batches[i : i + config.accumulate] for i in range(0, len(batches), config.accumulate)]
        loader = iter(self._loader(self.train_set, [batch for group in groups[self.epoch_steps :] for batch in group]))
        for group in groups[self.epoch_steps :]:
            lr = config.lr * lr_factor(
                self.step, config.epochs * self.steps_per_epoch, round(config.warmup_epochs * self.steps_per_epoch)
            )
            losses, norm = self._train_step(group, loader, lr)
            for name, value in losses.items():
                self.epoch_losses[name] = self.epoch_losses.get(name, 0.0) + value * sum(map(len, group))
            self.epoch_steps += 1
            bar.update()
            bar.set_postfix_str(f"epoch {self.epoch + 1}/{config.epochs}, loss {losses['loss']:.4f}, lr {lr:.1e}", refresh=False)
            if self.step % config.log_every == 0:
                entry = {"kind": "step", "step": self.step, "epoch": self.epoch + 1} | losses | {"lr": lr}
                entry["grad_norm"] = norm if math.isfinite(norm) else None  # None: float16 overflowed, the step was skipped
                record.append_line(self.out / "log.jsonl", entry)
            if interrupted():
                break
        self.epoch_seconds += time.perf_counter() - started
        return self.epoch_steps == len(groups)

    def _train_step(self, group: list[list[int]], loader: Iterator[dict], lr: float) -> tuple[dict[str, float], float]:
        """One optimiser step over the batches of `group`; its samples' mean losses, the whole first, and its gradient's norm."""
        samples = sum(map(len, group))
        means = 0.0
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = lr
        self.optimizer.zero_grad()
        for indices in group:
            source, target = self._to_device(next(loader))
            share = len(indices) / samples  # so that batches of unequal size weigh as one big batch would
            with self._autocast():
                said, wanted = self.objective.predict(self.model, source, target, self.epoch, indices)
            loss, components = self.criterion(said, wanted)
            self.scaler.scale(loss * share).backward()
            means = means + share * torch.stack((loss.detach(), *components.values()))
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip or math.inf).item()
        losses = dict(zip(("loss", *components), means.tolist(), strict=True))
        total = losses["loss"]
        # In float16 a gradient that overflows says that the scale is too large; at scale 1 it says what it says elsewhere.
        overflow = math.isfinite(total) and not math.isfinite(norm) and self.scaler.get_scale() > 1
        if not overflow and not (math.isfinite(total) and math.isfinite(norm)):
            what = "gradient" if math.isfinite(total) else "loss"
            files = ", ".join(str(self.train_pairs[index].src) for batch in group for index in batch)
            raise TrainingError(
                f"step {self.step + 1} (epoch {self.epoch + 1}): the {what} is not finite (loss {total}, gradient norm "
                f"{norm}). Its sources: {files}. The checkpoints in {self.out} are from before it; start another run "
                "from one of them (--init-weights) with a lower lr, a smaller clip or precision float32"
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return losses, norm

    def _finish_epoch(self, bar: tqdm) -> None:
        """Validate, log, draw, and keep the weights where they are the best so far."""
        started = time.perf_counter()
        scores, triptychs = self._validate()
        self.epoch_seconds += time.perf_counter() - started
        row = {"epoch": self.epoch + 1, "step": self.step, "lr": self.optimizer.param_groups[0]["lr"]}
        row |= {f"train_{name}": total / len(self.train_pairs) for name, total in self.epoch_losses.items()} | scores
        row["seconds"] = round(self.epoch_seconds, 3)
        if any(math.isnan(value) for value in scores.values()):
            raise TrainingError(f"epoch {self.epoch + 1}: the model's output on the validation pairs is not a number")
        is_best = all(row["val_psnr"] > earlier["val_psnr"] for earlier in self.history)
        self.history.append(row)
        self.epoch, self.epoch_steps, self.epoch_losses, self.epoch_seconds = self.epoch + 1, 0, {}, 0.0

        record.append_line(self.out / "log.jsonl", {"kind": "epoch"} | row)
        record.write_csv(self.out / "log.csv", self.history)
        record.draw_curve(self.out / "curve.png", self.history)
        if triptychs:
            record.write_triptychs(self.out / "samples" / f"epoch_{self.epoch:03d}.jpg", triptychs)
        if is_best:
            self._save_weights("best")
        bar.write(
            f"epoch {self.epoch:>3}/{self.config.epochs}  train L1 {row['train_l1']:.4f}  val L1 {row['val_l1']:.4f}  "
            f"PSNR {row['val_psnr']:.2f} dB  SSIM {row['val_ssim']:.3f}  {row['seconds']:.1f} s{'  best' * is_best}"
        )

    @torch.inference_mode()
    def _validate(self) -> tuple[dict[str, float], list[tuple[torch.Tensor, ...]]]:
        """Means over the validation pairs, one at a time so that each weighs the same; and the first triptychs."""
        model = self.objective.photographer(self.model).eval()
        scores: dict[str, list[float]] = {"val_l1": [], "val_psnr": [], "val_ssim": []}
        triptychs = []
        for batch in self._loader(self.val_set, [[index] for index in range(len(self.val_set))]):
            source, target = self._to_device(batch)
            with self._autocast():
                output = model(source).float().clamp(0, 1)
            for name, values in scores.items():
                values.append(getattr(metrics, name.removeprefix("val_"))(output, target).item())
            if len(triptychs) < self.config.samples:
                triptychs.append((source[0], output[0], target[0]))
        return {name: math.fsum(values) / len(values) for name, values in scores.items()}, triptychs

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.precision, enabled=self.precision is not torch.float32)

    def _loader(self, dataset: PairDataset, batches: list[list[int]]) -> DataLoader:
        # A generator of its own, so that drawing the workers' seeds leaves the global one alone.
        return DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=self.config.workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_ignore_interrupt,
            generator=torch.Generator(),
        )

    def _to_device(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(
            batch[key].to(self.device, non_blocking=True).contiguous(memory_format=torch.channels_last) for key in ("src", "tar")
        )

    def _save_weights(self, which: str) -> None:
        metadata = {"run": self.run_id, "step": self.step, "epoch": self.epoch, "metrics": (self.history or [{}])[-1]}
        metadata |= self.objective.metadata()
        save_weights(self.out / f"checkpoint_{which}.safetensors", self.model, metadata)

    def _save_last(self) -> None:
        state = {name: getattr(self, name) for name in PROGRESS} | {"step": self.step, "rng": rng_state()}
        state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        save_state(self.out / "checkpoint_last.state.pt", state)
        self._save_weights("last")


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


def _ignore_interrupt(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the workers too, and the step under way needs them


@contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C raises no exception but makes the function it gives true; a second Ctrl-C is the usual one."""
    seen = []
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield lambda: False
        return

    def handle(number: int, frame: Any) -> None:
        seen.append(number)
        signal.signal(signal.SIGINT, previous)
        tqdm.write("stopping after this step ...")

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, previous)
