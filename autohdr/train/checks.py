"""May this run start, may it go on? Checks its settings, its folder, its pairs and its state, and writes nothing."""

import importlib.util
import re
import tomllib
import warnings
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from autohdr import metrics
from autohdr.data.augment import Augmentation
from autohdr.data.pairs import Pair, PairDataset, check_pairs, read_pairs, shared_photos
from autohdr.errors import UserError
from autohdr.files import leftovers
from autohdr.measure import check_workers
from autohdr.train import lock
from autohdr.train.config import LOSSES, Resume, TrainConfig, check_stages, dump_config, saved_settings
from autohdr.train.folder import STATE
from autohdr.train.optimizers import PACKAGE
from autohdr.train.schedule import stages

_FREE_TO_CHANGE = {"out", "device", "compile", "recompute", "workers", "cache_gb", "log_every", "save_every", "keep", "samples"}
_FREE_TO_CHANGE |= {"save_minutes", "epochs", "patience", "branch", "cuda_graphs"}
_OF_PROCESSES = {"batch_size", "accumulate"}
_FREE_TO_CHANGE |= {"tensorboard", "wandb", "parallel", "sharded_states", "rank_timeout", *_OF_PROCESSES}
_FREE_TO_CHANGE |= {"train_pairs", "val_pairs", "init_weights", "teacher", "vgg_weights"}
"""Settings that may be others when a run is resumed: but for epochs they change its weights by rounding at most. How many pairs a
step takes, batch_size x accumulate x processes, may not change, nor may the pairs and the teacher, wherever they lie: check_state
and check_teacher."""


def check_config(config: TrainConfig, resume: Resume = False) -> None:
    """Raise UserError naming the first field that is out of range, missing, or names a file that does not exist.

    resume: init_weights need not exist: a run that goes on from a state does not read them. A branch does not either.
    """
    at_least = dict.fromkeys(("epochs", "batch_size", "accumulate", "log_every", "sample_steps", "keep"), 1)
    at_least |= dict.fromkeys(("max_bad_steps", "snapshot_every", "adversarial_start"), 1)
    at_least |= dict.fromkeys(("warmup_epochs", "min_lr", "weight_decay", "clip", "ema", "spike_factor"), 0)
    at_least |= {"teacher_features_weight": 0}
    at_least |= dict.fromkeys(("workers", "cache_gb", "seed", "save_every", "save_minutes", "samples", "patience"), 0)
    at_least |= {"size": 16, "spike_window": 4, "rank_timeout": 1}
    for name, least in at_least.items():
        if not getattr(config, name) >= least:
            raise UserError(f"{name}: expected at least {least}, got {getattr(config, name)}")
    for name in ("lr", "noise_scale", "teacher_weight"):
        if not 0 < getattr(config, name) < float("inf"):
            raise UserError(f"{name}: expected a positive number, got {getattr(config, name)}")
    if config.seed >= 2**64:
        raise UserError(f"seed: expected a number of 64 bits, less than 2**64, got {config.seed}")
    check_workers(config.workers)
    if config.ema >= 1:
        raise UserError(f"ema: expected less than 1, got {config.ema}")
    _check_losses(config)
    for pattern, factor in config.lr_groups.items():
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < float("inf"):
            raise UserError(f"lr_groups: {pattern}: expected a number above 0, got {factor!r}; freeze takes out what is to stay")
    if not config.min_lr <= config.lr:
        raise UserError(f"min_lr: expected at most lr, {config.lr}, got {config.min_lr}")
    Augmentation.of(config).check()
    if config.resize == "fit" and (config.zoom > 1 or config.mixup):
        raise UserError("zoom, mixup: expected resize squash or crop, as resize = fit makes sizes differ")
    if config.resize == "fit" and config.batch_size > 1:
        raise UserError(f"batch_size: expected 1, as resize = fit makes sizes differ; got {config.batch_size}")
    for name in ("tensorboard", "wandb"):
        if getattr(config, name) and importlib.util.find_spec(name) is None:
            raise UserError(f"{name}: expected the package {name}, and it is not installed: pip install {name}")
    if config.optimizer != "adamw":
        if importlib.util.find_spec(PACKAGE) is None:
            raise UserError(f"optimizer: {config.optimizer} needs {PACKAGE}, and it is not installed: pip install {PACKAGE}")
        if config.parallel == "fsdp":
            raise UserError(f"optimizer: expected adamw with parallel = fsdp, got {config.optimizer!r}")
    if config.cuda_graphs and config.compile:
        raise UserError("cuda_graphs: expected compile = false: what torch.compile makes is not captured")
    if config.sharded_states and config.parallel != "fsdp":
        raise UserError("sharded_states: expected parallel = fsdp; under ddp each process has all of a state, and one writes it")
    for name in ("train_pairs", "val_pairs", "out"):
        if getattr(config, name) is None:
            raise UserError(f"{name}: required; give --{name.replace('_', '-')} PATH or set it in the TOML file")
    if config.teacher and config.objective == "bridge":
        raise UserError("teacher: expected objective = direct: a bridge learns no photos that another model could make")
    if config.teacher_features_weight:
        if not config.teacher:
            raise UserError("teacher_features_weight: expected a teacher; give one with --teacher PATH")
        if config.compile or config.cuda_graphs:
            raise UserError("teacher_features_weight: expected no compile and no cuda_graphs, which leave out the hooks it needs")
    for name in ("out", "train_pairs", "val_pairs", "init_weights", "teacher", "branch"):
        file = getattr(config, name)
        if file is not None and re.search("[\udc80-\udcff]", str(file.resolve())):  # how Python reads other bytes
            raise UserError(f"{name}: expected a path in UTF-8, as config.toml is; got {str(file)!r}")
        needed = name in ("train_pairs", "val_pairs", "teacher") or name == "init_weights" and not (resume or config.branch)
        if needed and file is not None and not file.is_file():
            raise UserError(f"{name}: no such file: {file}; give one with --{name.replace('_', '-')} PATH")
    if config.branch and not resume and not (config.branch / STATE).is_file():
        raise UserError(f"branch: expected the folder of a run, got {config.branch}: it has no {STATE}")
    check_stages(config.stages)
    for number, stage in enumerate(stages(config) if config.stages else (), 1):
        try:
            check_config(stage, resume)
        except UserError as error:
            raise UserError(f"stages: stage {number}: {error}") from None
    if config.stages and config.epochs != (total := sum(stage["epochs"] for stage in config.stages)):
        raise UserError(f"epochs: expected {total}, the sum of the stages' epochs, got {config.epochs}")


def _check_losses(config: TrainConfig) -> None:
    for name, weight in config.losses.items():
        if name not in LOSSES:
            raise UserError(f"losses: unknown component {name!r}; expected one of {', '.join(LOSSES)}")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
            raise UserError(f"losses: {name}: expected a number, at least 0, got {weight!r}")
    if not any(config.losses.values()):
        raise UserError(f"losses: expected at least one weight above 0, got {config.losses}")
    if "adversarial" in config.losses and config.adversarial_start > config.epochs:
        raise UserError(
            f"adversarial_start: expected at most {config.epochs}, the last epoch, as the loss adversarial would else never "
            f"begin; got {config.adversarial_start}"
        )
    of_photos = [name for name in config.losses if LOSSES[name] > 1]
    if of_photos and config.objective == "bridge" and config.prediction != "x0":
        raise UserError(
            f"losses: {', '.join(of_photos)}: expected l1 and charbonnier alone, as a bridge with prediction = "
            f"{config.prediction} makes no photos in training; prediction = x0 takes every component"
        )


def check_unused(out: Path, what: str) -> None:
    """Raise UserError unless the folder `out` is absent or empty. What a killed start left half written does not count."""
    if out.exists() and (not out.is_dir() or set(out.iterdir()) - {out / lock.NAME, *leftovers(out)}):
        raise UserError(f"out: {out} already holds files: give another --out, or --resume to continue its {what}")


def check_folder(config: TrainConfig, resume: Resume) -> bool:
    """Whether the run goes on from a state in config.out. If not it is new, or was killed before it had written a state.

    Raises UserError unless the folder is free for a new run, or, for `resume`, holds one with the same settings.
    """
    out = config.out
    assert out  # check_config refuses None
    saved = out / "config.toml"
    if not resume or resume == "auto" and not saved.is_file():
        check_unused(out, "run")
        return False
    if not saved.is_file():
        raise UserError(f"--resume: nothing to resume: {out} holds no run (no config.toml)")
    try:
        before, now = saved_settings(out), tomllib.loads(dump_config(config))
    except ValueError as error:
        raise UserError(f"--resume: {saved}: not valid TOML: {error}") from None
    for settings in (before, now):
        settings["stages"] = [{key: stage[key] for key in stage.keys() - _OF_PROCESSES} for stage in settings["stages"]]
    for key in (before.keys() | now.keys()) - _FREE_TO_CHANGE:
        if before.get(key) != now.get(key):
            raise UserError(
                f"--resume: {key}: the run in {out} has {before.get(key)!r}, got {now.get(key)!r}; "
                f"`autohdr train {saved} --resume` goes on with its own settings"
            )
    return (out / "log.jsonl").exists() or any(out.glob("checkpoint_*"))


def checked_pairs(config: TrainConfig) -> tuple[list[Pair], list[Pair]]:
    """The pairs to train on and those to validate on.

    Raises UserError for a photo that cannot be read, is too small, or is in both lists.
    """
    assert config.train_pairs and config.val_pairs  # check_config refuses None
    train_pairs, val_pairs = read_pairs(config.train_pairs), read_pairs(config.val_pairs)
    for photo, trained, pair in shared_photos(train_pairs, val_pairs):
        raise UserError(
            f"{pair.where}: {photo} is also in {trained.where}: no photo may be both trained and validated on; "
            "`autohdr data split` keeps them apart"
        )
    needy = max(config.losses, key=lambda name: LOSSES[name])
    _check_sides(stages(config), train_pairs, "training", LOSSES[needy], f"the loss {needy}")
    _check_sides([config], val_pairs, "validation", metrics.SSIM_WINDOW, "SSIM")
    return train_pairs, val_pairs


def _check_sides(settings: list[TrainConfig], pairs: list[Pair], use: str, least: int, reason: str) -> None:
    """Raise UserError unless all photos can be read, and no side is shorter than `least` pixels as these settings resize it."""
    resized = [(config, PairDataset([], config.size, config.resize).resized) for config in settings]
    for (pair, size), (config, to) in product(zip(pairs, check_pairs(pairs), strict=True), resized):
        height, width = to(*size)
        if min(height, width) < least:
            raise UserError(
                f"{pair.where}: expected {use} pairs with sides of at least {least} pixels, as {reason} needs; "
                f"{size[1]}x{size[0]} pixels become {width}x{height} with size {config.size} and resize {config.resize}"
            )


def identity(
    train_pairs: list[Pair], val_pairs: list[Pair], digests: Mapping[Path, str], step_pairs: list[int]
) -> dict[str, Any]:
    """What a state says of the pairs: how many a step takes (of each stage, where there are several), and each one's photos by
    name, without folders, and SHA-256."""
    lists = {"train_pairs": train_pairs, "val_pairs": val_pairs}
    return {"step_pairs": step_pairs if len(step_pairs) > 1 else step_pairs[0]} | {
        key: [[pair.src.name, pair.tar.name, digests[pair.src], digests[pair.tar]] for pair in pairs]
        for key, pairs in lists.items()
    }


def check_teacher(state: dict[str, Any], now: dict[str, Any], config: TrainConfig) -> None:
    """Raise UserError unless the state's run has the same teacher as `now`, by Teacher.record, wherever its file lies."""
    records = [of.get("teacher") for of in (state, now)]
    if records[0] != records[1]:
        was, got = (f"{record['name']} with SHA-256 {record['sha256'][:12]}…" if record else "none" for record in records)
        raise UserError(f"--resume: teacher: the run in {config.out} has {was}, got {got}, {config.teacher}")


def check_state(
    state: dict[str, Any], now: dict[str, Any], config: TrainConfig, processes: int, option: str = "--resume"
) -> None:
    """Raise UserError unless the state is of a run over the same pairs, wherever they lie now. now: the pairs' identity().

    A pair is the same if its photos are. One to train on may also have been replaced under its name, of which a warning tells;
    one to validate on may not: the best epoch would be chosen across two sets.
    """
    if state["step_pairs"] != now["step_pairs"]:
        raise UserError(
            f"{option}: batch_size x accumulate x processes: the run takes {state['step_pairs']} pairs in a step, "
            f"got {', '.join(f'{stage.batch_size} x {stage.accumulate} x {processes}' for stage in stages(config))}"
        )
    begun = state["epoch"] + (state["epoch_steps"] > 0)
    if config.epochs < begun:
        raise UserError(f"{option}: epochs: expected at least {begun}, which the run has begun, got {config.epochs}")
    for key in ("train_pairs", "val_pairs"):
        file, before, after = getattr(config, key), state[key], now[key]
        expected = f"{option}: {key}: expected the pairs that the run began with, in their order"
        if len(before) != len(after):
            raise UserError(f"{expected}: {len(before)}; {file} lists {len(after)}")
        replaced = [(was, there) for was, there in zip(before, after, strict=True) if was[2:] != there[2:]]
        for was, there in replaced:
            if key == "val_pairs" or was[:2] != there[:2]:
                raise UserError(
                    f"{expected}; in {file} {' and '.join(there[:2])} are not the photos that {' and '.join(was[:2])} were"
                )
        if replaced:
            names = ", ".join(there[0] for _, there in replaced)
            warnings.warn(f"{file}: pairs replaced since the run was saved: {names}", stacklevel=2)
