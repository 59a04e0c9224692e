"""A run that begins where another one stands, and one that ends early."""

import hashlib
import json

import pytest
import torch
from runs import STATE, blank_curve, interrupt_at_step, patch_steps, same  # noqa: F401  blank_curve is a fixture

from autohdr.cli import main
from autohdr.errors import UserError
from autohdr.models import load_checkpoint, read_metadata, save_weights
from autohdr.train.checkpoint import load_state
from autohdr.train.config import load_config
from autohdr.train.folds import cross_validate
from autohdr.train.loop import train
from autohdr.train.validation import Validation


def contents(folder):
    return {file: hashlib.sha256(file.read_bytes()).digest() for file in folder.rglob("*") if file.is_file()}


def lines(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_a_branch_without_changes_is_the_run_going_on(make_config, monkeypatch):
    """Bitwise: weights, average and moments, from within an epoch. The parent stays as it was."""
    settings = {"epochs": 2, "ema": 0.9, "warmup_epochs": 0.5, "batch_size": 3}
    whole = load_state(train(make_config("whole", **settings)).out / STATE)
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, 3)
        parent = train(make_config("parent", **settings)).out
    before = contents(parent)
    out = train(make_config("branch", **settings, branch=parent)).out
    assert contents(parent) == before
    state = load_state(out / STATE)
    assert same(*([run[key] for key in ("model", "ema", "optimizer", "rng", "step", "epoch")] for run in (whole, state)))
    (row,) = state["history"]
    assert row["epoch"] == 2 and row["val_psnr"] == whole["history"][-1]["val_psnr"]
    first, parents = lines(out)[0], load_state(parent / STATE)["run_id"]
    assert first == {"kind": "branch", "step": 3, "epoch": 1, "parent": parents, "folder": str(parent)}
    assert state["run_id"] != parents and load_config(out / "config.toml").branch == parent


def test_a_branch_takes_other_settings(make_config, monkeypatch, capsys):
    """More epochs, another lr, batch, size and schedule, an average that the parent had not, other parameters frozen. Stopped, it
    goes on without its parent."""
    parent = train(make_config("parent", freeze=["encoder*"], epochs=1)).out
    settings = ["--epochs", "3", "--lr", "1e-4", "--schedule", "constant", "--batch-size", "3", "--size", "24", "--ema", "0.5"]
    call = ["train", str(parent / "config.toml"), "--branch", str(parent), *settings, "--freeze", "decoder*", "--log-every", "1"]
    out = parent.with_name("new")
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, 4)
        assert main([*call, "--out", str(out)]) == 130
    parent.rename(parent.with_name("gone"))
    assert main(["train", str(out / "config.toml"), "--resume"]) == 0
    state = load_state(out / STATE)
    assert state["step"] == 3 + 2 * 2 and [line["lr"] for line in lines(out) if line["kind"] == "step"] == [1e-4] * 4
    begun = load_state(parent.with_name("gone") / STATE)["model"]
    moved = {name.split(".")[0][:7] for name, weight in state["model"].items() if not torch.equal(weight, begun[name])}
    assert "encoder" in moved and "decoder" not in moved
    assert state["optimizer"]["state"]["encoder_level1.blocks.0.attn.qkv.weight"]["step"] == 4
    assert state["optimizer"]["state"]["output.weight"]["step"] == 3 + 4


def test_what_the_parents_weights_were_trained_on_stays_known(make_config, tmp_path):
    first = train(make_config("first", batch_size=6, epochs=1)).out / "checkpoint_last.safetensors"
    save_weights(tmp_path / "seen.safetensors", load_checkpoint(first), {"trained_on": ["0" * 64]})
    parent = train(make_config("parent", batch_size=6, epochs=1, init_weights=tmp_path / "seen.safetensors")).out
    (tmp_path / "seen.safetensors").unlink()
    branch = train(load_config(parent / "config.toml", {"branch": parent, "out": tmp_path / "branch", "epochs": 2}))
    assert "0" * 64 in read_metadata(branch.out / "checkpoint_best.safetensors")["trained_on"]


def test_refuses_what_cannot_be_branched(make_config, monkeypatch, pair_files):
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, 2)
        parent = train(make_config("parent")).out
    others = {
        "branch: expected the folder of a run, got .*: it has no checkpoint_last.state.pt": {"branch": pair_files[0].parent},
        "branch: model: the run in .* has 'restormer_nano', got 'restormer_tiny'": {"model": "restormer_tiny", "model_args": {}},
        "branch: model_args: ": {"model_args": {"dim": 8}},
        "branch: seed: the run in .* has 0, got 1": {"seed": 1},
        "branch: batch_size x accumulate x processes: the run takes 2 pairs in a step, got 3": {"batch_size": 3},
        "branch: train_pairs: expected the pairs": {"train_pairs": pair_files[1], "val_pairs": pair_files[0]},
    }
    for message, changes in others.items():
        with pytest.raises(UserError, match=message):
            train(make_config("new", **{"branch": parent} | changes))
    train(make_config("parent"), resume=True)
    with pytest.raises(UserError, match="branch: epochs: expected more than the 2 of the run in .*, got 2"):
        train(make_config("new", branch=parent))
    (parent / STATE).write_bytes(b"damaged")
    with pytest.raises(UserError, match="expected a training state, got a damaged"):
        train(make_config("new", branch=parent, epochs=3))
    assert not (make_config("new").out / "config.toml").exists()
    with pytest.raises(UserError, match="branch: --folds trains on other pairs"):
        cross_validate(make_config("new", branch=parent, val_pairs=None), 2)


@pytest.fixture
def scores(monkeypatch):
    """Validation's PSNR, epoch by epoch: the second is the best until the sixth."""
    monkeypatch.setattr(Validation, "__call__", lambda self: ({"val_l1": 0.1, "val_ssim": 0.5, "val_psnr": next(values)}, []))
    values = iter((20.0, 22.0, 21.0, 22.0, 21.5, 23.0, 20.0))


def test_patience_ends_a_run(make_config, scores, capsys):
    """Three epochs after the best one. Resumed it has ended; with more patience it goes on."""
    summary = train(make_config(batch_size=6, epochs=9, patience=3))
    assert (summary.epochs, summary.early, summary.interrupted, summary.best["epoch"]) == (5, True, 0, 2)
    assert "stopped early: 3 epochs without a better val_psnr than epoch 2's" in capsys.readouterr().out
    assert not (summary.out / "cache").exists()
    assert train(make_config(batch_size=6, epochs=9, patience=3), resume=True) == summary
    more = train(make_config(batch_size=6, epochs=6, patience=4), resume=True)
    assert (more.epochs, more.early, more.best["epoch"]) == (6, False, 6)


def test_patience_waits_for_a_good_step(make_config, monkeypatch, scores):
    """The last step of epoch 3 is bad: whether the weights are sound only the next one tells."""

    def bad(make, learner, number):
        if number == 3:
            learner.model.output.weight.register_hook(lambda gradient: gradient * float("nan"))
        result = make()
        learner.model.output.weight._backward_hooks.clear() if number == 3 else None
        return result

    patch_steps(monkeypatch, bad)
    assert train(make_config(batch_size=6, epochs=9, patience=1)).epochs == 4


def test_patience_would_choose_by_what_a_fold_measures(make_config):
    with pytest.raises(UserError, match="patience: --folds would end each fold by the pairs that measure it"):
        cross_validate(make_config(patience=2, val_pairs=None), 2)
