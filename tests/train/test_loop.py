import csv
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager

import pytest
import torch
from PIL import Image
from runs import STATE, blank_curve, interrupt_at_step, patch_steps, same  # noqa: F401  blank_curve is a fixture
from torch.nn.utils import parameters_to_vector
from torch.utils.data._utils import signal_handling

from autohdr.cli import main
from autohdr.data.pairs import PairDataset
from autohdr.errors import UserError
from autohdr.models import create_model, load_checkpoint
from autohdr.signals import ENDING, deferred_signals
from autohdr.train import loop, record
from autohdr.train.checkpoint import load_state, previous, save_state
from autohdr.train.config import dump_config, load_config
from autohdr.train.guards import TrainingError
from autohdr.train.learner import Learner
from autohdr.train.loop import Loop, train
from autohdr.train.losses import Criterion
from autohdr.train.objective import Objective
from autohdr.train.run import prepare
from autohdr.train.schedule import lr_factor
from autohdr.train.step import Step
from autohdr.train.validation import Validation


def outcome(out):
    """Everything in a run's last state but its name and its timings."""
    state = load_state(out / STATE)
    for row in state["history"]:
        del row["seconds"], row["data_wait"]
    return {key: value for key, value in state.items() if key not in ("run_id", "epoch_seconds", "epoch_wait")}


def test_learns(make_config):
    summary = train(make_config(epochs=8, warmup_epochs=1, samples=1))
    state = load_state(summary.out / STATE)
    losses = [row["train_l1"] for row in state["history"]]
    assert losses[-1] < 0.6 * losses[0]
    assert summary.epochs == 8 and not summary.interrupted
    assert summary.best["val_psnr"] == max(row["val_psnr"] for row in state["history"])


def test_run_folder(make_config):
    config = make_config(samples=1, log_every=2)
    summary = train(config)
    assert sorted(path.name for path in config.out.iterdir()) == [
        "checkpoint_best.safetensors",
        "checkpoint_last.safetensors",
        "checkpoint_last.state.previous.pt",
        STATE,
        "config.toml",
        "curve.png",
        "log.csv",
        "log.jsonl",
        "samples",
    ]
    assert load_config(config.out / "config.toml") == config
    assert "torch" in (config.out / "config.toml").read_text().splitlines()[0]

    rows = list(csv.DictReader((config.out / "log.csv").open()))
    lines = [json.loads(line) for line in (config.out / "log.jsonl").read_text().splitlines()]
    assert [int(row["epoch"]) for row in rows] == [1, 2]
    assert [line["step"] for line in lines if line["kind"] == "step"] == [2, 4, 6]
    epochs = [line for line in lines if line["kind"] == "epoch"]
    for key in ("train_l1", "val_l1", "val_psnr", "val_ssim"):
        assert [float(row[key]) for row in rows] == [line[key] for line in epochs]

    assert [path.name for path in sorted((config.out / "samples").iterdir())] == ["epoch_001.jpg", "epoch_002.jpg"]
    assert Image.open(config.out / "samples" / "epoch_002.jpg").size == (3 * 32 + 2 * 8, 32)

    best = load_checkpoint(config.out / "checkpoint_best.safetensors")
    assert best.metadata["metrics"] == summary.best
    assert same(
        load_checkpoint(config.out / "checkpoint_last.safetensors").state_dict(),
        load_state(config.out / STATE)["model"],
    )


def test_the_curve_is_drawn_beside_training_and_not_in_every_epoch(make_config, monkeypatch):
    drawn = []

    def draw(path, history):
        drawn.append((len(history), threading.current_thread() is threading.main_thread()))

    monkeypatch.setattr(record, "draw_curve", draw)
    train(make_config(epochs=4, batch_size=6))
    assert drawn == [(1, False), (4, True)]  # and at the end


def test_a_state_is_copied_once_between_two_steps(make_config, monkeypatch):
    """Saved before and after validation and, the weights, as the best: a copy at the start, and one at each epoch's end."""
    copy, copies = Learner.state_dict, []
    monkeypatch.setattr(Learner, "state_dict", lambda learner: copies.append(learner) or copy(learner))
    train(make_config(ema=0.9))
    assert len(copies) == 1 + 2


def test_validation_matches_the_saved_weights(make_config, pair_files):
    """The best epoch's figures are those of the weights in checkpoint_best, measured apart from the trainer."""
    from autohdr import metrics
    from autohdr.data.pairs import PairDataset, read_pairs

    summary = train(make_config())
    model = load_checkpoint(summary.out / "checkpoint_best.safetensors")
    with torch.inference_mode():
        samples = [(item["src"][None], item["tar"][None]) for item in PairDataset(read_pairs(pair_files[1]), 32)]
        values = [metrics.psnr(model(source).clamp(0, 1), target).item() for source, target in samples]
    torch.testing.assert_close(summary.best["val_psnr"], sum(values) / len(values), rtol=1e-5, atol=0)


@pytest.mark.parametrize("step", [2, 6], ids=["in mid-epoch", "between epochs"])
def test_resume_is_bitwise(make_config, monkeypatch, step):
    config = {"epochs": 4, "warmup_epochs": 1, "batch_size": 1, "accumulate": 2, "resize": "crop", "size": 24, "ema": 0.9}
    train(make_config("whole", **config))
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, step)
        summary = train(make_config("parts", **config))
    assert summary.interrupted and summary.epochs == step // 3
    assert load_state(summary.out / STATE)["step"] == step
    assert not train(make_config("parts", **config), resume=True).interrupted
    assert same(outcome(make_config("whole").out), outcome(make_config("parts").out))
    for name in ("log.csv", "log.jsonl"):
        whole, parts = ((make_config(run).out / name).read_text().splitlines() for run in ("whole", "parts"))
        assert len(whole) == len(parts)


def test_resume_with_other_workers_is_bitwise(make_config, monkeypatch):
    train(make_config("whole"))
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, 1)
        train(make_config("parts"))
    train(make_config("parts", workers=1), resume=True)
    assert same(outcome(make_config("whole").out), outcome(make_config("parts").out))


def test_a_run_is_its_folder(make_config, pair_files, tmp_path, monkeypatch):
    """Copied with its pairs to another disk, it goes on there; the original stays as it was, and may go."""
    first = train(make_config("first", epochs=1)).out / "checkpoint_last.safetensors"
    settings = {"init_weights": first, "epochs": 2}
    train(make_config("whole", **settings))
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, 2)
        train(make_config("parts", **settings))
    first.unlink()
    disk, original = tmp_path / "disk", make_config("parts").out
    for name, folder in (("copy", original), ("train", pair_files[0].parent), ("val", pair_files[1].parent)):
        shutil.copytree(folder, disk / name)
    before = {file: file.read_bytes() for file in original.iterdir() if file.is_file()}
    paths = ("--train-pairs", disk / "train" / "pairs.jsonl", "--val-pairs", disk / "val" / "pairs.jsonl")
    call = ("train", disk / "copy" / "config.toml", "--resume")
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, 4)
        assert main([*map(str, (*call, *paths))]) == 130
    assert {file: file.read_bytes() for file in original.iterdir() if file.is_file()} == before
    assert main([*map(str, call)]) == 0  # config.toml has the new paths
    assert same(outcome(make_config("whole").out), outcome(disk / "copy"))
    header = (disk / "copy" / "config.toml").read_text().splitlines()[:3]
    assert [line.split(":")[0] for line in header[1:]] == ["# from step 2 on", "# from step 4 on"]


@pytest.mark.parametrize(("which", "message"), [(0, None), (1, "--resume: val_pairs: .* are not the photos that .* were")])
def test_a_list_is_its_photos(make_config, pair_files, tmp_path, which, message):
    """Under other names they are the same pairs. One that was replaced may be trained on, with a warning, not validated on."""
    folder = shutil.copytree(pair_files[which].parent, tmp_path / "pairs")
    key = ("train_pairs", "val_pairs")[which]
    config = make_config(epochs=1, **{key: folder / "pairs.jsonl"})
    train(config)
    (folder / "1_src.png").rename(folder / "renamed.png")
    (folder / "pairs.jsonl").write_text((folder / "pairs.jsonl").read_text().replace("1_src.png", "renamed.png"))
    train(config, resume=True)
    Image.new("RGB", (32, 32), "red").save(folder / "0_src.png")
    with pytest.raises(UserError, match=message) if message else pytest.warns(UserWarning, match="replaced.*: 0_src.png"):
        train(config, resume=True)


def test_a_run_of_an_older_version_goes_on(make_config):
    """Its config.toml lacks a setting that this version has."""
    config = make_config(epochs=1)
    train(config)
    text = (config.out / "config.toml").read_text()
    (config.out / "config.toml").write_text(text.replace("spike_window = 50\n", ""))
    assert train(config, resume=True).epochs == 1
    (config.out / "config.toml").write_text(text.replace("spike_window = 50\n", ""))
    with pytest.raises(UserError, match="spike_window: the run in .* has 50, got 40"):
        train(make_config(epochs=1, spike_window=40), resume=True)


def test_resume_after_a_crash_repeats_what_was_not_saved(make_config, monkeypatch):
    """The log has lines, one of them cut short, from after the last save; the resumed run writes them once."""
    train(make_config("whole", log_every=1))

    def crash(self):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_finish_epoch", crash)
        with pytest.raises(MemoryError):
            train(make_config("parts", log_every=1))
    with open(make_config("parts").out / "log.jsonl", "a") as log:
        log.write('{"kind": "st')
    train(make_config("parts", log_every=1), resume=True)
    assert same(outcome(make_config("whole").out), outcome(make_config("parts").out))
    lines = [json.loads(line) for line in (make_config("parts").out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == [1, 2, 3, 4, 5, 6]


def test_resume_of_a_finished_run_changes_nothing(make_config):
    first = train(make_config())
    before = (first.out / STATE).read_bytes()
    assert train(make_config(), resume=True) == first
    assert (first.out / STATE).read_bytes() == before


def test_accumulation_equals_a_bigger_batch(make_config):
    """Six pairs in steps of four and two: each sample weighs the same in its step. Rounding decides AdamW's direction where a
    gradient is next to nothing, so that single weights may differ: all together hardly do."""
    changes = {"epochs": 1, "clip": 0.0, "augment": False}
    train(make_config("big", batch_size=4, **changes))
    train(make_config("small", batch_size=1, accumulate=4, **changes))
    torch.manual_seed(make_config("big").seed)
    first = parameters_to_vector(create_model("restormer_nano", **make_config("big").model_args).parameters())
    files = [make_config(name).out / "checkpoint_last.safetensors" for name in ("big", "small")]
    big, small = (parameters_to_vector(load_checkpoint(file).parameters()) for file in files)
    assert (small - big).norm() <= 2e-4 * (big - first).norm()


def test_lr_factor():
    factors = [lr_factor(step, total=10, warmup=4) for step in range(10)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert factors[7] == pytest.approx(0.5)
    assert factors[9] == pytest.approx(0.5 * (1 + math.cos(math.pi * 5 / 6)))
    assert lr_factor(0, total=10, warmup=0) == 1.0


def rates(out):
    """The learning rates that a run has logged."""
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [line["lr"] for line in lines if line["kind"] == "step"]


def test_schedule_is_by_step(make_config):
    config = make_config(epochs=2, warmup_epochs=0.5, batch_size=1, log_every=1, lr=1e-3)
    train(config)
    assert rates(config.out) == [1e-3 * lr_factor(step, total=12, warmup=3) for step in range(12)]


def test_a_warm_up_takes_half_of_a_short_run_at_most(make_config):
    config = make_config(epochs=1, warmup_epochs=5, batch_size=1, log_every=1, lr=1e-3)
    train(config)
    assert rates(config.out) == [1e-3 * lr_factor(step, total=6, warmup=3) for step in range(6)]


def test_a_finished_run_takes_more_epochs(make_config):
    out = train(make_config(epochs=1, log_every=1)).out
    assert train(make_config(epochs=2, log_every=1), resume=True).epochs == 2
    assert load_config(out / "config.toml").epochs == 2
    assert rates(out)[3:] == [2e-3 * lr_factor(step, total=6, warmup=0) for step in (3, 4, 5)]
    with pytest.raises(UserError, match="--resume: epochs: expected at least 2, which the run has begun, got 1"):
        train(make_config(epochs=1), resume=True)


def test_clipping_bounds_the_gradient(make_config):
    seen = []

    class Spy(torch.optim.SGD):
        def step(self):
            gradients = [p.grad for group in self.param_groups for p in group["params"]]
            seen.append(torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients])).item())

    config = make_config(clip=1e-3)
    run = prepare(config)
    run.learner.optimizer = Spy(run.learner.model.parameters(), lr=0.0)
    groups = run.batches.groups(0)
    assert run.step(groups[0], run.batches.read(groups, 0), epoch=0, step=0, lr=0.0).norm > 1e-3
    assert seen == [pytest.approx(1e-3, rel=1e-3)]


def test_init_weights(make_config, capsys):
    first = train(make_config("first", epochs=1))
    train(make_config("second", epochs=1, lr=1e-30, weight_decay=0.0, init_weights=first.out / "checkpoint_last.safetensors"))
    assert "loaded" in capsys.readouterr().out
    assert same(*(load_state(make_config(run).out / STATE)["model"] for run in ("first", "second")))


def test_bfloat16_keeps_float32_weights(make_config):
    summary = train(make_config(epochs=1, precision="bfloat16"))
    assert {w.dtype for w in load_state(summary.out / STATE)["model"].values()} == {torch.float32}
    assert math.isfinite(summary.best["val_psnr"])


def test_stops_at_a_loss_that_is_not_finite(make_config, monkeypatch):
    """In epoch 2, step 5: the message names step and files, and what is saved is from before."""
    original = Criterion.__call__
    calls = []

    def criterion(self, output, target):
        calls.append(0)
        loss, components = original(self, output, target)
        return loss * (math.nan if len(calls) == 5 else 1), components

    monkeypatch.setattr(Criterion, "__call__", criterion)
    config = make_config(epochs=3, max_bad_steps=1)
    with pytest.raises(TrainingError, match=r"step 5 \(epoch 2\): the loss is not finite .*_src.png.*_src.png"):
        train(config)
    state = load_state(config.out / STATE)
    assert state["epoch"] == 1 and all(weight.isfinite().all() for weight in state["model"].values())


def test_refuses_a_folder_with_files(make_config):
    config = make_config()
    config.out.mkdir()
    (config.out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="already holds files: give another --out, or --resume"):
        train(config)
    assert [path.name for path in config.out.iterdir()] == ["notes.txt"]


def test_refuses_a_model_in_8_bits(make_config):
    with pytest.raises(UserError, match="model_args: expected a model to train, got restormer_nano in 8 bits"):
        train(make_config(model_args={"int8": True}))


def test_refuses_to_resume_nothing(make_config):
    with pytest.raises(UserError, match="nothing to resume"):
        train(make_config(), resume=True)


def test_refuses_to_resume_with_other_settings(make_config):
    train(make_config(epochs=1))
    with pytest.raises(UserError, match="lr: the run in .* has 0.002, got 0.1; .*config.toml --resume"):
        train(make_config(epochs=1, lr=0.1), resume=True)


def test_resume_goes_on_from_the_state_before_a_damaged_one(make_config):
    """One flipped byte in the newest state: it is named, and the run from the one before it ends bitwise as it did."""
    train(make_config("whole"))
    train(make_config("parts"))
    path = make_config("parts").out / STATE
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=f"{STATE}: .*SHA-256 does not match.*; going on from .*previous.pt, step 3"):
        train(make_config("parts"), resume=True)
    assert same(outcome(make_config("whole").out), outcome(make_config("parts").out))


def test_refuses_to_resume_files_of_two_runs(make_config):
    for run in ("a", "b"):
        train(make_config(run, epochs=1))
    weights = make_config("b").out / "checkpoint_last.safetensors"
    weights.replace(make_config("a").out / weights.name)
    with pytest.raises(UserError, match="are not of one run"):
        train(make_config("a", epochs=1), resume=True)


@pytest.mark.parametrize("which", ["train_pairs", "val_pairs"])
def test_refuses_bad_pairs_before_anything_is_written(make_config, tmp_path, which):
    bad = tmp_path / "bad.jsonl"
    for content, message in (("", "at least one pair, got none"), ('{"src": "a.png", "tar": "b.png"}\n', "a.png")):
        bad.write_text(content)
        config = make_config(**{which: bad})
        with pytest.raises(UserError, match=message):
            train(config)
        assert not config.out.exists()


def test_refuses_validation_pairs_too_small_for_ssim(make_config, tmp_path):
    """SSIM needs 11 pixels; a long photo that keeps its aspect ratio would have 5 of them after a whole epoch."""
    for name in ("src.png", "tar.png"):
        Image.new("RGB", (200, 32)).save(tmp_path / name)
    long = tmp_path / "long.jsonl"
    long.write_text('{"src": "src.png", "tar": "tar.png"}\n')
    config = make_config(val_pairs=long, resize="fit", batch_size=1)
    with pytest.raises(UserError, match="long.jsonl:1: .*at least 11 pixels.* 200x32 pixels become 32x5 with size 32"):
        train(config)
    assert not config.out.exists()
    assert train(make_config(train_pairs=long, resize="fit", batch_size=1, epochs=1)).epochs == 1


@pytest.mark.parametrize("shared", ["src", "tar"])
def test_refuses_to_validate_on_a_photo_that_it_trains_on(make_config, pair_files, tmp_path, shared):
    trained, validated = (json.loads(file.read_text().splitlines()[1]) for file in pair_files)
    other = "src" if shared == "tar" else "tar"
    line = {shared: f"{pair_files[0].parent}/../train/{trained[shared]}", other: str(pair_files[1].parent / validated[other])}
    (tmp_path / "val.jsonl").write_text(json.dumps(line) + "\n")
    config = make_config(val_pairs=tmp_path / "val.jsonl")
    with pytest.raises(UserError, match=f"val.jsonl:1: .*1_{shared}.png is also in .*pairs.jsonl:2: .*both trained and valid"):
        train(config)
    assert not config.out.exists()


def test_refuses_to_resume_a_foreign_state(make_config):
    config = make_config(epochs=1)
    train(config)
    save_state(config.out / STATE, {"model": {}})
    previous(config.out / STATE).unlink()
    with pytest.raises(UserError, match="expected a training state, got a file without ema, epoch, .*"):
        train(config, resume=True)


@pytest.mark.parametrize("device", ["tpu", "meta"])
def test_refuses_a_device_that_cannot_be_worked_on(make_config, device):
    config = make_config(device=device)
    with pytest.raises(UserError, match=f"device: '{device}' is not available here"):
        train(config)
    assert not config.out.exists()


def test_the_largest_seed_trains(make_config):
    assert train(make_config(epochs=1, seed=2**64 - 1)).epochs == 1


@pytest.mark.parametrize("file", ["log.jsonl", "config.toml"])
def test_refuses_to_resume_with_a_strange(make_config, file):
    config = make_config(epochs=1)
    train(config)
    content = (config.out / file).read_bytes()
    (config.out / file).write_bytes(b"\xff\n" + content)
    with pytest.raises(UserError, match=rf"{file}.*expected a run's log|--resume: .*{file}: not valid TOML"):
        train(config, resume=True)
    assert (config.out / file).read_bytes() == b"\xff\n" + content


@pytest.mark.parametrize("killed_at", ["config.toml", STATE])
def test_a_run_killed_before_its_first_state_begins_again(make_config, monkeypatch, killed_at):
    """Before config.toml is whole by a new start, after it by --resume."""
    config, put = make_config("parts", epochs=1), os.replace

    def kill(part, path):
        if path.name == killed_at:
            shutil.copyfile(part, f"{part}.1.part")  # what stays: nothing tidies up behind a SIGKILL
            raise MemoryError
        put(part, path)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(os, "replace", kill)
        train(config)
    assert list(config.out.glob(".*.part"))
    train(config, resume=(config.out / "config.toml").exists())
    train(make_config("whole", epochs=1))
    assert same(outcome(config.out), outcome(make_config("whole").out)) and not list(config.out.glob(".*"))


def test_a_run_that_has_lost_its_states_does_not_begin_again(make_config):
    config = make_config(epochs=1)
    train(config)
    for file in config.out.glob("checkpoint_*"):
        file.unlink()
    with pytest.raises(UserError, match="no training state"):
        train(config, resume=True)


def test_saves_within_an_epoch(make_config, monkeypatch):
    """A crash in step 6 of 6 costs what came after step 4."""

    def crash(make, learner, number):
        if number == 6:
            raise MemoryError
        return make()

    settings = {"batch_size": 1, "save_every": 2, "epochs": 1, "ema": 0.9}
    train(make_config("whole", **settings))
    with monkeypatch.context() as patch:
        patch_steps(patch, crash)
        with pytest.raises(MemoryError):
            train(make_config("parts", **settings))
    out = make_config("parts").out
    assert [load_state(file)["step"] for file in (out / STATE, previous(out / STATE))] == [4, 2]
    train(make_config("parts", **settings), resume=True)
    assert same(outcome(make_config("whole").out), outcome(out))


def test_saves_by_the_clock(make_config, monkeypatch):
    """A minute passes in each step, and a save is due after two. A crash in step 6 of 6 costs what came after step 4."""
    clock = [0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def tick(make, learner, number):
        clock[0] += 60
        if number == 6:
            raise MemoryError
        return make()

    patch_steps(monkeypatch, tick)
    with pytest.raises(MemoryError):
        train(make_config(batch_size=1, save_minutes=2, epochs=1))
    out = make_config().out
    assert [load_state(file)["step"] for file in (out / STATE, previous(out / STATE))] == [4, 2]


@pytest.mark.parametrize(("metric", "best"), [("val_psnr", max), ("val_ssim", max), ("val_l1", min)])
def test_best_by_a_metric(make_config, monkeypatch, metric, best):
    values = (0.3, 20.0, 0.8), (0.1, 22.0, 0.7), (0.2, 21.0, 0.9)
    scores = iter({"val_l1": a, "val_psnr": b, "val_ssim": c} for a, b, c in values)
    monkeypatch.setattr(Validation, "__call__", lambda self: (next(scores), []))
    summary = train(make_config(epochs=3, best_metric=metric))
    assert summary.best[metric] == best({"val_l1": (0.1, 0.3), "val_psnr": (20, 22), "val_ssim": (0.7, 0.9)}[metric])
    assert load_checkpoint(summary.out / "checkpoint_best.safetensors").metadata["metrics"] == summary.best


def test_the_folder_says_what_made_the_run(make_config):
    header = (train(make_config(epochs=1)).out / "config.toml").read_text().splitlines()[0]
    commit = r"commit ([0-9a-f]{40}(-dirty)?|unknown)"
    assert re.fullmatch(rf"# autohdr \S+, {commit}, torch \S+, Python \S+, .*, cpu, processes: 1", header)


def test_says_how_long_it_waited_for_data(make_config, monkeypatch, capsys):
    """By a clock that goes on by 1 as a pair is read and by 4 as a step of two pairs ends: a third of the time."""
    clock = [0.0]

    def then(owner, name, seconds):
        original = getattr(owner, name)

        def call(*args, **others):
            result = original(*args, **others)
            clock[0] += seconds
            return result

        monkeypatch.setattr(owner, name, call)

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    then(PairDataset, "__getitem__", 1)
    then(Step, "__call__", 4)
    summary = train(make_config(epochs=1))
    row = load_state(summary.out / STATE)["history"][0]
    assert row["data_wait"] == pytest.approx(1 / 3, abs=1e-4) and summary.data_wait == pytest.approx(1 / 3)
    assert "33.3% of the time of training was spent waiting for data" in capsys.readouterr().out


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_a_signal_finishes_the_step_and_saves(make_config, tmp_path, number, status):
    """Sent to the run's whole process group, loader's workers and all, as a terminal and a batch system do."""
    config = make_config(epochs=20, workers=1, log_every=1)
    (tmp_path / "run.toml").write_text(dump_config(config))
    command = [sys.executable, "-m", "autohdr", "train", str(tmp_path / "run.toml")]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while run.poll() is None and not (config.out / "log.jsonl").exists():
        time.sleep(0.05)
    os.killpg(run.pid, number)
    out, err = run.communicate(timeout=600)
    assert run.returncode == status, err
    assert f"go on: autohdr train {config.out / 'config.toml'} --resume" in out and "Traceback" not in err
    step = load_state(config.out / STATE)["step"]
    assert 0 < step < 60 and len((config.out / "log.jsonl").read_text().splitlines()) == step + step // 3


def test_refuses_to_go_on_with_other_pairs(make_config, pair_files, tmp_path):
    pairs = shutil.copytree(pair_files[0].parent, tmp_path / "pairs") / pair_files[0].name
    config = make_config(epochs=1, train_pairs=pairs)
    train(config)
    first, *others = pairs.read_text().splitlines(keepends=True)
    pairs.write_text("".join((*others, first)))
    with pytest.raises(UserError, match="--resume: train_pairs: expected the pairs that the run began with, in their order"):
        train(config, resume=True)


def test_the_state_before_validation_is_kept(make_config, monkeypatch):
    """A crash while validating costs the validation alone."""

    def crash(self):
        raise MemoryError

    train(make_config("whole", epochs=2))
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Validation, "__call__", crash)
        train(make_config("parts", epochs=2))
    assert load_state(make_config("parts").out / STATE)["step"] == 3
    train(make_config("parts", epochs=2), resume=True)
    assert same(outcome(make_config("whole").out), outcome(make_config("parts").out))


def test_a_worker_survives_a_signal_as_it_starts(make_config, monkeypatch):
    """Signalled where PyTorch has set its handlers and survive_signals was not yet called."""
    set_handlers = signal_handling._set_worker_signal_handlers

    def set_handlers_and_signal():  # in the worker
        set_handlers()
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(signal_handling, "_set_worker_signal_handlers", set_handlers_and_signal)
    assert train(make_config(workers=1, epochs=1)).epochs == 1
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGINT, signal.SIGTERM}


def test_a_failure_ends_the_workers(make_config, monkeypatch):
    """They outlive a SIGTERM for a while: the process that failed must not wait for them as it exits."""

    def crash(*args):
        assert multiprocessing.active_children()
        raise MemoryError

    for name, owner, method in (("step", Objective, "predict"), ("validation", Loop, "_finish_epoch")):
        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(owner, method, crash)
            train(make_config(name, workers=1, epochs=1))
        assert multiprocessing.active_children() == []


@pytest.mark.parametrize("number", ENDING)
def test_every_signal_that_ends_a_run_saves_first(make_config, monkeypatch, number):
    def send(make, learner, step):
        if step == 2:
            signal.raise_signal(number)
        return make()

    patch_steps(monkeypatch, send)
    before = signal.signal(number, signal.SIG_DFL)  # under nohup SIGHUP is ignored
    try:
        summary = train(make_config())
    finally:
        signal.signal(number, before)
    assert summary.interrupted == number and load_state(summary.out / STATE)["step"] == 2


def test_what_is_ignored_stays_ignored():
    """As SIGHUP is under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with deferred_signals("stopping") as signalled:
            signal.raise_signal(signal.SIGHUP)
            assert signalled() == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@contextmanager
def full_disk(size):
    """No file that this process writes can be larger."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_costs_no_training(make_config, monkeypatch, capsys):
    """It is full from step 2 to step 4 of 6, when epoch 1 ends: the run goes on, says so, and has saved all in the end."""
    train(make_config("whole", log_every=1))
    monkeypatch.setattr(loop, "RETRY", 0)
    disk = ExitStack()

    def fill(make, learner, number):
        if number == 2:
            disk.enter_context(full_disk(60))
        if number == 5:
            disk.close()
        return make()

    with disk:
        patch_steps(monkeypatch, fill)
        parts = train(make_config("parts", log_every=1, cache_gb=0)).out
    said = capsys.readouterr().out
    assert re.search(r"not saved: \[Errno 27\] File too large: '.*'; training goes on, and tries again in 0 s", said)
    assert same(outcome(make_config("whole").out), outcome(parts))
    assert load_state(previous(parts / STATE))["step"] > 3
    logs = [(out / "log.jsonl").read_text().splitlines() for out in (make_config("whole").out, parts)]
    noted = [line for line in map(json.loads, logs[1]) if line["kind"] == "not saved"]
    assert noted and all("File too large" in line["cause"] and 2 <= line["step"] <= 5 for line in noted)
    assert len(logs[1]) - len(noted) == len(logs[0])
    assert len((parts / "log.csv").read_text().splitlines()) == 3
    assert load_checkpoint(parts / "checkpoint_best.safetensors").metadata["step"] == 6


def test_a_disk_that_stays_full_ends_in_an_error(make_config, monkeypatch):
    """The last state is not on disk: that is no success. The one before it is whole, and resuming repeats the rest."""
    disk = ExitStack()

    def fill(make, learner, number):
        if number == 4:
            disk.enter_context(full_disk(1000))
        return make()

    with disk, monkeypatch.context() as patch, pytest.raises(OSError, match="File too large: .*checkpoint_last.state.pt"):
        patch_steps(patch, fill)
        train(make_config("parts"))
    assert load_state(make_config("parts").out / STATE)["step"] == 3
    assert not list(make_config("parts").out.glob(".*"))
    train(make_config("parts"), resume=True)
    train(make_config("whole"))
    assert same(outcome(make_config("whole").out), outcome(make_config("parts").out))


def test_auto_starts_or_goes_on(make_config, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, 2)
        assert train(make_config("parts"), resume="auto").interrupted
    assert train(make_config("parts"), resume="auto").epochs == 2
    train(make_config("whole"))
    assert same(outcome(make_config("whole").out), outcome(make_config("parts").out))


def test_a_full_disk_ends_the_run_readably(make_config, tmp_path):
    """The disk takes 200 kB a file: the run stops with the reason, exit status 1 and nothing half written."""
    config = make_config()
    (tmp_path / "run.toml").write_text(dump_config(config))
    code = "import resource, sys; from autohdr.cli import main; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000,) * 2); "
    command = [sys.executable, "-c", code + "sys.exit(main(sys.argv[1:]))", "train", tmp_path / "run.toml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert re.fullmatch(r"error: \[Errno 27\] File too large: '.*checkpoint_last.state.pt'\n", done.stderr)
    assert not list(config.out.glob("*.pt")) and not list(config.out.glob(".*"))


def test_refuses_to_resume_with_another_number_of_pairs_in_a_step(make_config):
    train(make_config(epochs=1))
    with pytest.raises(UserError, match="batch_size x accumulate x processes: the run takes 2 pairs in a step, got 3 x 1 x 1"):
        train(make_config(epochs=1, batch_size=3), resume=True)


def test_recomputing_is_a_mamba_diffusions(make_config):
    config = make_config(recompute=True)
    with pytest.raises(UserError, match="recompute: restormer_nano has no such choice"):
        train(config)
    assert not config.out.exists()
