"""Cross-validation: a run for each fold, measured on what it held out, and the figures of all pairs together."""

import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from autohdr.data.audit import audit
from autohdr.data.pairs import Pair, photo_digests, pictures, read_pairs
from autohdr.data.splits import write_splits
from autohdr.errors import UserError
from autohdr.evaluate import evaluate, summarise, summarise_costs, write_json
from autohdr.files import replacing
from autohdr.measure import pick_device
from autohdr.models import load_checkpoint, read_metadata
from autohdr.report import format_table
from autohdr.train.checks import check_config, check_unused
from autohdr.train.config import Resume, TrainConfig, dump_config
from autohdr.train.folder import LAST
from autohdr.train.lock import Lock
from autohdr.train.loop import train

REPORT, MARK = "cross_validation.json", "config.toml"


def cross_validate(
    config: TrainConfig, folds: int, *, resume: Resume = False, baseline: Path | None = None
) -> dict[str, Any] | int:
    """Train on all parts of config.train_pairs but one, measure on that one, and so for each of the `folds` parts.

    Pairs that share a picture (data.audit) are in one part. Every fold is a run of its own, out/fold_I, from the same seed.
    Its last weights are measured, in float32 at the config's size, and not its best, which were chosen on the same pairs. Each
    pair counts once, by the model that has not seen it. The intervals are over the pairs. They are approximations, as the folds'
    models share most of their training pairs (Bengio and Grandvalet, "No unbiased estimator of the variance of k-fold
    cross-validation", 2004).

    The model is compared pair by pair with the unedited source, with auto-tone and, if given, with `baseline`, the folder of
    another cross-validation of the same pairs. resume: go on with the folds in config.out, with the same arguments; "auto": if
    there are any.

    Writes cross_validation.json, which is evaluate's results of all pairs with each image's fold, and their table as
    cross_validation.txt. Prints the table and returns the results, or the number of the signal (Ctrl-C, SIGTERM) that stopped a
    fold. Raises what train raises; UserError for val_pairs, patience and a branch, under torchrun, and for a baseline of other
    pairs or another size.
    """
    if config.val_pairs is not None:
        raise UserError(f"val_pairs: --folds validates on each fold: leave it out (--val-pairs None), got {config.val_pairs}")
    if config.patience:
        raise UserError(f"patience: --folds would end each fold by the pairs that measure it: expected 0, got {config.patience}")
    if config.branch:
        raise UserError(f"branch: --folds trains on other pairs than a run has: leave it out, got {config.branch}")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("--folds: trains one fold after the other in one process; start it without torchrun")
    check_config(replace(config, val_pairs=config.train_pairs))
    assert config.out and config.train_pairs  # check_config refuses None
    _check_folder(config.out, resume)
    pairs = read_pairs(config.train_pairs)
    earlier = _figures(baseline, pairs, config) if baseline else None
    lock = Lock(config.out)
    lock.take()
    try:
        return _all_folds(config, folds, pairs, earlier)
    finally:
        lock.release()


def _all_folds(
    config: TrainConfig, folds: int, pairs: Sequence[Pair], earlier: dict[tuple[str, str], dict[str, float]] | None
) -> dict[str, Any] | int:
    assert config.out
    parts = config.out / "pairs"
    if not parts.is_dir() or _moved(parts, folds, pairs):
        _divide(config, folds, pairs, parts)

    measured = []
    for fold in range(folds):
        print(f"fold {fold + 1} of {folds}")
        part, out = parts / f"fold_{fold}", config.out / f"fold_{fold}"
        run = replace(config, train_pairs=part / "train.jsonl", val_pairs=part / "val.jsonl", out=out)
        if signal := train(run, resume=(out / MARK).is_file()).interrupted:
            return signal
        measured.append(_measure(config, read_pairs(part / "val.jsonl"), out))
    results = _together(measured, earlier)
    table = f"{folds} folds, each pair measured by the model that has not seen it\n{format_table(results)}"
    write_json(config.out / REPORT, results)
    (config.out / REPORT).with_suffix(".txt").write_text(table + "\n", encoding="utf-8")
    print(table)
    return results


def _divide(config: TrainConfig, folds: int, pairs: Sequence[Pair], parts: Path) -> None:
    """Write config.toml and the folds' lists, which are whole once `parts` exists. A start or --resume after a kill redoes it.

    Lists that are there already are written anew where the photos lie now. Raises UserError where they are of other pairs.
    """
    assert config.train_pairs
    for name in ("init_weights", "teacher"):
        _refuse_seen(name, getattr(config, name), pairs)
    found, new = audit([config.train_pairs]), parts.with_name(f".{parts.name}.part")
    shutil.rmtree(new, ignore_errors=True)
    write_splits(found.pairs, new, folds, config.seed, test=0, same=found.same)
    if parts.is_dir() and _names(parts) != _names(new):
        shutil.rmtree(new)
        raise UserError(f"--resume: train_pairs: the cross-validation in {parts.parent} was begun with other pairs")
    with replacing(parts.with_name(MARK)) as mark:
        mark.write_text(dump_config(config, f"cross-validation, --folds {folds}", inside=True), encoding="utf-8")
    old = parts.with_name(f".{parts.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if parts.is_dir():
        os.replace(parts, old)  # a kill here leaves no lists, and they are made again
    os.replace(new, parts)  # the lists' paths are relative: all these folders have the same parent
    shutil.rmtree(old, ignore_errors=True)


def _measure(config: TrainConfig, held_out: Sequence[Pair], out: Path) -> dict[str, Any]:
    """evaluate's results for the last weights in a fold's folder, each image with its pair's paths and their files' digests."""
    model, device = load_checkpoint(out / LAST), pick_device(config.device)
    results = evaluate(held_out, out / "report", model=model, size=config.size, resize=config.resize, device=device)
    images = []
    for image, (src, tar), digests in zip(results["images"], map(_photos, held_out), _digests(held_out), strict=True):
        images.append(image | {"src": src, "tar": tar, "sha256": list(digests)})
    return results | {"images": images}


def _together(measured: Sequence[dict[str, Any]], earlier: dict[tuple[str, str], dict[str, float]] | None) -> dict[str, Any]:
    """One result of the folds' results: all images, each with its fold and, if `earlier` has them, the baseline's figures."""
    images = [image | {"fold": fold} for fold, results in enumerate(measured) for image in results["images"]]
    if earlier is not None:
        images = [image | {"figures": image["figures"] | {"baseline": earlier[tuple(image["sha256"])]}} for image in images]
    others = ["source", "auto_tone"] + ["baseline"] * (earlier is not None)
    trained = sum(results["model"]["trained_pairs"] for results in measured)
    return {
        "environment": measured[0]["environment"],  # the same process measured all of them, with the same settings
        "date": measured[-1]["date"],
        "settings": measured[0]["settings"]
        | {"checkpoint": None, "pairs": [p for m in measured for p in m["settings"]["pairs"]]},
        "model": measured[0]["model"] | summarise_costs(images) | {"trained_pairs": trained},
        "folds": len(measured),
        "summary": summarise([image["figures"] for image in images], others),
        "images": images,
    }


def _check_folder(out: Path, resume: Resume) -> None:
    """Raise UserError unless `out` is free for a new cross-validation, or for `resume` holds one."""
    if resume and (out / MARK).is_file():
        return
    if resume is True:
        raise UserError(f"--resume: nothing to resume: {out} holds no cross-validation ({MARK})")
    check_unused(out, "folds")


def _photos(pair: Pair) -> tuple[str, str]:
    src, tar = pictures(pair)
    return str(src), str(tar)


def _digests(pairs: Sequence[Pair]) -> list[tuple[str, str]]:
    """Of each pair, those of its source and its target: the same wherever the photos lie."""
    digests = photo_digests(pairs)
    return [(digests[pair.src], digests[pair.tar]) for pair in pairs]


def _names(parts: Path) -> dict[Path, list[tuple[str, str]]]:
    """The names of each list's photos, without folders."""
    lists = parts.glob("fold_*/*.jsonl")
    return {file.relative_to(parts): [(pair.src.name, pair.tar.name) for pair in read_pairs(file)] for file in lists}


def _moved(parts: Path, folds: int, pairs: Sequence[Pair]) -> bool:
    """Whether the lists in `parts` name other files than these pairs do. Raises UserError unless they are of so many folds."""
    lists = sorted(parts.glob("fold_*/val.jsonl"))
    if len(lists) != folds:
        raise UserError(f"--resume: folds: the cross-validation in {parts.parent} has {len(lists)}, got {folds}")
    return sorted(_photos(pair) for file in lists for pair in read_pairs(file)) != sorted(map(_photos, pairs))


def _refuse_seen(name: str, weights: Path | None, pairs: Sequence[Pair]) -> None:
    """Raise UserError where weights were trained on one of the pairs: no fold would hold it out. name: their setting."""
    seen = set(read_metadata(weights).get("trained_on", ())) if weights else set()
    for photo, digest in photo_digests(pairs).items() if seen else ():
        if digest in seen:
            raise UserError(f"{name}: {weights} was trained on {photo}, which a fold is to hold out")


def _figures(baseline: Path, pairs: Sequence[Pair], config: TrainConfig) -> dict[tuple[str, str], dict[str, float]]:
    """{a pair's digests: the model's figures} of another cross-validation."""
    file = baseline / REPORT
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        setting = {key: results["settings"][key] for key in ("size", "resize")}
        figures = {
            tuple(image["sha256"]): {
                metric: math.inf if value is None else value for metric, value in image["figures"]["model"].items()
            }
            for image in results["images"]
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"baseline: expected the folder of a finished cross-validation; {file}: {error!r}") from error
    if setting != {"size": config.size, "resize": config.resize}:
        raise UserError(f"baseline: expected figures at size {config.size}, resize {config.resize}; {file} has {setting}")
    if missing := [pair for pair, digests in zip(pairs, _digests(pairs), strict=True) if digests not in figures]:
        raise UserError(f"baseline: {file} lacks {len(missing)} of the {len(pairs)} pairs, the first {missing[0].where}")
    return figures
