"""Cross-validation: every pair measured once, by a model that has not seen it; resumable; paired intervals."""

import copy
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image, ImageOps
from runs import blank_curve, interrupt_at_step  # noqa: F401  blank_curve is a fixture

from autohdr.cli import main
from autohdr.data import splits
from autohdr.data.pairs import photo_digests, read_pairs, write_pairs
from autohdr.errors import UserError
from autohdr.evaluate import evaluate
from autohdr.metrics import METRICS, mean_interval
from autohdr.models import create_model, load_checkpoint, save_weights
from autohdr.train import folds
from autohdr.train.config import load_config
from autohdr.train.folds import cross_validate


@pytest.fixture
def config(make_config):
    return make_config(epochs=1, val_pairs=None, samples=0)


def figures(results):
    """{source: the model's figures}"""
    return {image["src"]: image["figures"]["model"] for image in results["images"]}


def test_every_pair_is_measured_once_by_a_model_that_has_not_seen_it(config, capsys):
    results = cross_validate(config, 3)
    pairs = read_pairs(config.train_pairs)
    assert sorted(figures(results)) == sorted(str(pair.src.resolve()) for pair in pairs)
    assert [image["fold"] for image in results["images"]] == [0, 0, 1, 1, 2, 2]
    for fold in range(3):
        weights = config.out / f"fold_{fold}" / "checkpoint_last.safetensors"
        held_out = read_pairs(config.out / "pairs" / f"fold_{fold}" / "val.jsonl")
        assert not set(load_checkpoint(weights).metadata["trained_on"]) & set(photo_digests(held_out).values())
        alone = evaluate(held_out, config.out / "again", model=load_checkpoint(weights), size=32)
        assert [image["figures"]["model"] for image in alone["images"]] == [
            image["figures"]["model"] for image in results["images"] if image["fold"] == fold
        ]
    for other in ("source", "auto_tone"):
        for metric in METRICS:
            differences = [image["figures"]["model"][metric] - image["figures"][other][metric] for image in results["images"]]
            assert results["summary"][f"model_minus_{other}"][metric] == mean_interval(differences)

    stored = json.loads((config.out / "cross_validation.json").read_text())
    assert stored["folds"] == 3 and figures(stored) == figures(results) and stored["model"]["trained_pairs"] == 0
    table = (config.out / "cross_validation.txt").read_text()
    mean, half = results["summary"]["model_minus_source"]["psnr"]
    assert f"{mean:+.2f} ± {half:.2f}" in table and table.startswith("3 folds, each pair") and "6 pairs, squash to 32×32" in table
    assert table in capsys.readouterr().out


def test_resumed_folds_end_as_uninterrupted_ones(config, monkeypatch, capsys):
    config = replace(config, epochs=2)
    whole = cross_validate(replace(config, out=config.out.with_name("whole")), 2)
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, 3)  # in each fold's second epoch
        assert cross_validate(config, 2) == signal.SIGINT
    assert not (config.out / "fold_1").exists() and not (config.out / "cross_validation.json").exists()
    with pytest.raises(UserError, match="folds: .* has 2, got 3"):
        cross_validate(config, 3, resume=True)
    assert figures(cross_validate(load_config(config.out / "config.toml", {"out": config.out}), 2, resume=True)) == figures(whole)


def test_moved_folds_go_on(config, pair_files, tmp_path, monkeypatch):
    """With their pairs on another disk; the fold that is done is not done again."""
    whole = cross_validate(replace(config, out=config.out.with_name("whole")), 2)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(folds, "_measure", lambda *args: (_ for _ in ()).throw(MemoryError))
        cross_validate(config, 2)
    disk = tmp_path / "disk"
    shutil.copytree(pair_files[0].parent, disk / "pairs")
    shutil.move(config.out, disk / "moved")
    moved = load_config(disk / "moved" / "config.toml", {"train_pairs": disk / "pairs" / "pairs.jsonl"})
    assert moved.out == disk / "moved"
    results = cross_validate(moved, 2, resume=True)
    assert [*figures(results).values()] == [*figures(whole).values()] and not config.out.exists()
    (disk / "pairs" / "0_src.png").rename(disk / "pairs" / "other.png")
    lines = (disk / "pairs" / "pairs.jsonl").read_text().replace("0_src.png", "other.png")
    (disk / "pairs" / "pairs.jsonl").write_text(lines)
    with pytest.raises(UserError, match="--resume: train_pairs: .* was begun with other pairs"):
        cross_validate(moved, 2, resume=True)


def test_a_picture_that_comes_again_is_in_one_fold(config, tmp_path):
    pairs = read_pairs(config.train_pairs)
    again = replace(pairs[2], src=tmp_path / "again_src.png", tar=tmp_path / "again_tar.png")
    ImageOps.mirror(Image.open(pairs[2].src)).save(again.src)
    ImageOps.mirror(Image.open(pairs[2].tar)).save(again.tar)
    write_pairs(tmp_path / "more.jsonl", [*pairs, again])
    results = cross_validate(replace(config, train_pairs=tmp_path / "more.jsonl"), 2)
    fold = {image["src"]: image["fold"] for image in results["images"]}
    assert len(fold) == 7 and fold[str(again.src)] == fold[str(pairs[2].src.resolve())]


def test_two_cross_validations_are_compared_pair_by_pair(config, tmp_path, capsys):
    first = cross_validate(config, 2)
    elsewhere = shutil.copytree(config.train_pairs.parent, tmp_path / "elsewhere") / config.train_pairs.name
    changed = replace(config, out=tmp_path / "second", lr=1e-2, train_pairs=elsewhere)
    second = cross_validate(changed, 3, baseline=config.out)
    before = {Path(src).name: found for src, found in figures(first).items()}
    differences = [found["psnr"] - before[Path(src).name]["psnr"] for src, found in figures(second).items()]
    assert any(differences) and second["summary"]["model_minus_baseline"]["psnr"] == mean_interval(differences)
    assert "model − baseline" in capsys.readouterr().out
    third = replace(config, out=tmp_path / "third")
    with pytest.raises(UserError, match="baseline: expected figures at size 48"):
        cross_validate(replace(third, size=48), 2, baseline=config.out)
    with pytest.raises(UserError, match="baseline: expected the folder of a finished cross-validation"):
        cross_validate(third, 2, baseline=tmp_path)
    stored = json.loads((config.out / "cross_validation.json").read_text())
    (config.out / "cross_validation.json").write_text(json.dumps(stored | {"images": stored["images"][:-2]}))
    with pytest.raises(UserError, match=r"baseline: .* lacks 2 of the 6 pairs, the first .*pairs.jsonl:\d"):
        cross_validate(third, 2, baseline=config.out)
    assert not third.out.exists()


def test_refuses_before_anything_is_written(config, pair_files, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(UserError, match="--folds: .* start it without torchrun"):
        patch.setenv("WORLD_SIZE", "2")
        cross_validate(config, 2)
    with pytest.raises(UserError, match="val_pairs: --folds validates"):
        cross_validate(replace(config, val_pairs=pair_files[1]), 2)
    with pytest.raises(UserError, match="from 2 folds to 6, .*got 7"):
        cross_validate(config, 7)
    with pytest.raises(UserError, match="holds no cross-validation"):
        cross_validate(config, 2, resume=True)
    seen = sorted(photo_digests(read_pairs(pair_files[0])[3:4]).values())
    save_weights(tmp_path / "w.safetensors", create_model(config.model, **config.model_args), {"trained_on": seen})
    with pytest.raises(UserError, match=r"w.safetensors was trained on .*3_(src|tar).png, which a fold is to hold out"):
        cross_validate(replace(config, init_weights=tmp_path / "w.safetensors"), 2)
    assert not config.out.exists()
    config.out.mkdir()
    (config.out / "mine").touch()
    with pytest.raises(UserError, match="already holds files"):
        cross_validate(config, 2)


@pytest.mark.parametrize("killed_at", ["train.jsonl", "config.toml", "pairs"])
def test_folds_killed_before_the_first_one_begin_again(config, monkeypatch, killed_at):
    """Before the lists are whole, before config.toml is, and before the lists have their place."""
    put, write = os.replace, splits.write_pairs

    def kill(part, path):
        if path.name == killed_at:
            raise MemoryError
        put(part, path)

    def kill_writing(path, pairs):
        if path.name == killed_at:
            raise MemoryError
        write(path, pairs)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(os, "replace", kill)
        patch.setattr(splits, "write_pairs", kill_writing)
        cross_validate(config, 2)
    assert not (config.out / "pairs").exists()
    again = cross_validate(config, 2, resume=(config.out / "config.toml").exists())
    assert figures(again) == figures(cross_validate(replace(config, out=config.out.with_name("whole")), 2))
    assert not list(config.out.glob(".*"))


def test_command_line(config, pair_files, capsys, monkeypatch):
    call = ["train", "demo", "--train-pairs", pair_files[0], "--out", config.out, "--size", 32, "--epochs", 1, "--workers", 0]
    call += ["--warmup-epochs", 0, "--samples", 0, "--model-args", json.dumps(config.model_args), "--device", "cpu"]
    call = [str(argument) for argument in call]
    assert main([*call, "--baseline", str(config.out)]) == 2
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, 1)
        assert main([*call, "--folds", "2"]) == 130
    go_on = capsys.readouterr().out.splitlines()[-1].partition("go on: autohdr ")[2]
    assert main(go_on.split()) == 0
    assert "2 folds, each pair" in capsys.readouterr().out


def test_the_models_costs_are_those_of_all_folds(config, monkeypatch):
    """One fold is slow, another one takes much memory: the figures of the whole know both, and each fold's stay its own."""
    alone = []

    def evaluate_and_tell(*args, **others):
        found = evaluate(*args, **others)
        cost = {"seconds": (1.0, 30.0, 2.0)[len(alone)], "growth_bytes": (7e9, 1e9, 2e9)[len(alone)]}
        for image in found["images"]:
            image |= cost | {"peak_bytes": int(cost["growth_bytes"] * 2), "memory_source": "VmHWM"}
        found["model"] |= {"trained_pairs": len(alone), "seconds_per_megapixel": -1.0, "memory_source": "VmHWM"}
        alone.append(copy.deepcopy(found))
        results.append(found)
        return found

    results = []
    monkeypatch.setattr(folds, "evaluate", evaluate_and_tell)
    model = cross_validate(config, 3)["model"]
    megapixels = 32 * 32 / 1e6
    assert model["seconds_per_megapixel"] == pytest.approx(2.0 / megapixels)  # the median of 1, 1, 30, 30, 2, 2
    assert model["bytes_per_megapixel"] == pytest.approx(7e9 / megapixels)
    assert (model["peak_bytes"], model["trained_pairs"]) == (14_000_000_000, 0 + 1 + 2)
    assert results == alone
