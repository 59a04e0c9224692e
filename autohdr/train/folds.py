"""Cross-validation: a run for each fold, measured on what it held out, and the figures of all pairs together."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from autohdr.data.audit import audit
from autohdr.data.pairs import Pair, photo_digests, pictures, read_pairs
from autohdr.data.splits import write_splits
from autohdr.errors import UserError
from autohdr.evaluate import evaluate, summarise, write_json
from autohdr.measure import pick_device
from autohdr.models import load_checkpoint, read_metadata
from autohdr.report import format_table
from autohdr.train.checks import check_config
from autohdr.train.config import TrainConfig, dump_config
from autohdr.train.loop import train

REPORT = "cross_validation.json"


def cross_validate(
    config: TrainConfig, folds: int, *, resume: bool = False, baseline: Path | None = None
) -> dict[str, Any] | int:
    """Trains on `folds` - 1 parts of config.train_pairs and measures on the part left out, each part in turn.

    Pairs that share a picture (data.audit) are in one part. Every fold is a run of its own, out/fold_I, from the same seed;
    its last weights are measured, in float32 at the config's size: the best ones were chosen on the very pairs. Each pair
    counts once, by the model that has not seen it. The interval is over the pairs; as the folds' models share most of their
    training, it is an approximation (Bengio and Grandvalet, "No unbiased estimator of the variance of k-fold
    cross-validation", 2004).

    baseline: the folder of another cross-validation of the same pairs, compared pair by pair, as are the unedited source and
    auto-tone. resume: go on with the folds in config.out; the other arguments must be those of the start.

    Writes cross_validation.json, results.json's figures with each image's fold, and the table as cross_validation.txt, prints
    that and returns the figures; the signal's number where Ctrl-C or SIGTERM stopped a fold. Raises UserError as `train`
    does, for val_pairs, under torchrun, and for a baseline of other pairs or another size; TrainingError as `train` does.
    """
    if config.val_pairs is not None:
        raise UserError(f"val_pairs: --folds validates on each fold: leave it out (--val-pairs None), got {config.val_pairs}")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("--folds: trains one fold after the other in one process; start it without torchrun")
    check_config(replace(config, val_pairs=config.train_pairs))
    parts, mark = config.out / "pairs", config.out / "config.toml"
    if resume and not mark.is_file():
        raise UserError(f"--resume: nothing to resume: {config.out} holds no cross-validation (no config.toml)")
    if not resume and config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
        raise UserError(f"out: {config.out} already holds files: give another --out, or --resume to continue its folds")
    pairs = read_pairs(config.train_pairs)
    earlier = _figures(baseline, pairs, config) if baseline else None
    if resume:
        _check_parts(parts, folds, pairs)
    else:
        _refuse_seen(config.init_weights, pairs)
        found = audit([config.train_pairs])
        write_splits(found.pairs, parts, folds, config.seed, test=0, same=found.same)
        mark.write_text(dump_config(config, f"cross-validation, --folds {folds}"), encoding="utf-8")

    images: list[dict[str, Any]] = []
    for fold in range(folds):
        part, out = parts / f"fold_{fold}", config.out / f"fold_{fold}"
        print(f"fold {fold + 1} of {folds}")
        run = replace(config, train_pairs=part / "train.jsonl", val_pairs=part / "val.jsonl", out=out)
        if signal := train(run, resume=(out / "config.toml").is_file()).interrupted:
            return signal
        held_out, model = read_pairs(run.val_pairs), load_checkpoint(out / "checkpoint_last.safetensors")
        place = {"size": config.size, "resize": config.resize, "device": pick_device(config.device)}
        results = evaluate(held_out, out / "report", model=model, **place)
        for pair, image in zip(held_out, results["images"], strict=True):
            src, tar = _photos(pair)
            image |= {"fold": fold, "src": src, "tar": tar}
            if earlier:
                image["figures"]["baseline"] = earlier[src, tar]
        images += results["images"]

    others = ["source", "auto_tone"] + ["baseline"] * bool(baseline)
    results |= {"folds": folds, "summary": summarise([image["figures"] for image in images], others), "images": images}
    table = f"{folds} folds, each pair measured by the model that has not seen it\n{format_table(results)}"
    write_json(config.out / REPORT, results)
    (config.out / REPORT).with_suffix(".txt").write_text(table + "\n", encoding="utf-8")
    print(table)
    return results


def _photos(pair: Pair) -> tuple[str, str]:
    src, tar = pictures(pair)
    return str(src), str(tar)


def _check_parts(parts: Path, folds: int, pairs: Sequence[Pair]) -> None:
    """That the lists of a cross-validation that was begun are of so many folds and of these pairs."""
    lists = sorted(parts.glob("fold_*/val.jsonl"))
    if len(lists) != folds:
        raise UserError(f"--resume: folds: the cross-validation in {parts.parent} has {len(lists)}, got {folds}")
    if sorted(_photos(pair) for file in lists for pair in read_pairs(file)) != sorted(map(_photos, pairs)):
        raise UserError(f"--resume: train_pairs: the cross-validation in {parts.parent} was begun with other pairs")


def _refuse_seen(weights: Path | None, pairs: Sequence[Pair]) -> None:
    """Weights to start from must not have seen a pair already: no fold would hold it out."""
    seen = set(read_metadata(weights).get("trained_on", ())) if weights else set()
    for photo, digest in photo_digests(pairs).items() if seen else ():
        if digest in seen:
            raise UserError(f"init_weights: {weights} was trained on {photo}, which a fold is to hold out")


def _figures(baseline: Path, pairs: Sequence[Pair], config: TrainConfig) -> dict[tuple[str, str], dict[str, float]]:
    """The model's figures of each pair in another cross-validation."""
    file = baseline / REPORT
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        setting = {key: results["settings"][key] for key in ("size", "resize")}
        figures = {
            (image["src"], image["tar"]): {
                metric: math.inf if value is None else value for metric, value in image["figures"]["model"].items()
            }
            for image in results["images"]
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"baseline: expected the folder of a finished cross-validation; {file}: {error!r}") from error
    if setting != {"size": config.size, "resize": config.resize}:
        raise UserError(f"baseline: expected figures at size {config.size}, resize {config.resize}; {file} has {setting}")
    if missing := [pair for pair in pairs if _photos(pair) not in figures]:
        raise UserError(f"baseline: {file} lacks {len(missing)} of the {len(pairs)} pairs, the first {missing[0].where}")
    return figures
