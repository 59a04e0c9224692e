"""Distillation: a run that learns from another model's outputs beside its targets."""

import json

import pytest
import torch
from runs import STATE, blank_curve, interrupt_at_step, same  # noqa: F401  blank_curve is a fixture

from autohdr.data.pairs import photo_digests, read_pairs
from autohdr.errors import UserError
from autohdr.models import create_model, load_checkpoint, read_metadata, save_weights
from autohdr.train.checkpoint import load_state
from autohdr.train.folds import cross_validate
from autohdr.train.loop import train


@pytest.fixture
def teacher(tmp_path):
    """A network of random weights that was trained on a photo."""
    torch.manual_seed(7)
    small = {"dim": 8, "num_blocks": [1, 1, 1, 1], "num_refinement_blocks": 0, "num_heads": [1, 1, 1, 1]}
    save_weights(tmp_path / "teacher.safetensors", create_model("restormer_nano", **small), {"trained_on": ["0" * 64]})
    return tmp_path / "teacher.safetensors"


def steps(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "step"]


def test_the_outputs_of_the_teacher_are_learnt_beside_the_targets(make_config, teacher, pair_files):
    out = train(make_config(teacher=teacher, teacher_weight=2, epochs=4, log_every=1, ema=0.9)).out
    lines = steps(out)
    assert all(line["loss"] == pytest.approx(line["l1"] + 2 * line["teacher"]) for line in lines)
    assert sum(line["teacher"] for line in lines[-3:]) < 0.8 * sum(line["teacher"] for line in lines[:3])
    plain = train(make_config("plain", epochs=4, log_every=1, ema=0.9)).out
    assert steps(plain)[0]["l1"] == pytest.approx(lines[0]["l1"])  # the same first weights, and the same pairs
    metadata = read_metadata(out / "checkpoint_best.safetensors")
    assert metadata["teacher"].keys() == {"name", "sha256"} and metadata["teacher"]["name"] == "restormer_nano"
    assert load_state(out / STATE)["teacher"] == metadata["teacher"]
    assert set(metadata["trained_on"]) == {"0" * 64, *photo_digests(read_pairs(pair_files[0])).values()}
    assert "teacher" not in read_metadata(plain / "checkpoint_best.safetensors")


def test_a_run_that_is_stopped_goes_on_bitwise_with_its_teacher_alone(make_config, teacher, monkeypatch):
    settings = {"teacher": teacher, "mixup": 1.2, "stages": [{"epochs": 1, "size": 24}, {"epochs": 1}]}
    whole = load_state(train(make_config("whole", **settings)).out / STATE)
    config = make_config("halves", **settings)
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, 2)
        assert train(config).interrupted
    kept = teacher.read_bytes()
    save_weights(teacher, load_checkpoint(teacher), {"trained_on": []})
    with pytest.raises(
        UserError, match=r"--resume: teacher: the run in .*halves has restormer_nano with SHA-256 .*, got restormer"
    ):
        train(config, resume=True)
    teacher.unlink()
    with pytest.raises(UserError, match="teacher: no such file: .*teacher.safetensors; give one with --teacher PATH"):
        train(config, resume=True)
    with pytest.raises(UserError, match="has restormer_nano with SHA-256 .*, got none, None"):
        train(make_config("halves", **settings | {"teacher": None}), resume=True)
    moved = teacher.with_name("moved.safetensors")
    moved.write_bytes(kept)
    out = train(make_config("halves", **settings | {"teacher": moved}), resume=True).out
    state = load_state(out / STATE)
    assert same(*([run[key] for key in ("model", "optimizer", "rng", "step", "epoch", "teacher")] for run in (whole, state)))


def test_what_no_model_can_learn_from_is_refused(make_config, teacher, tmp_path, pair_files):
    time = {"time_embedding": True}
    with pytest.raises(UserError, match="teacher: expected objective = direct"):
        train(make_config(teacher=teacher, objective="bridge", model="mamba_diffusion_nano", model_args=time))
    bridge = {"bridge": {"prediction": "x0", "noise_scale": 0.05, "steps": 4}}
    save_weights(tmp_path / "bridge.safetensors", create_model("mamba_diffusion_nano", **time), bridge)
    with pytest.raises(UserError, match="teacher: expected a model that makes a photo in one pass, got a diffusion bridge"):
        train(make_config(teacher=tmp_path / "bridge.safetensors"))
    with pytest.raises(UserError, match="teacher_weight: expected a positive number, got 0"):
        train(make_config(teacher=teacher, teacher_weight=0))
    seen = {"trained_on": list(photo_digests(read_pairs(pair_files[0])).values())}
    save_weights(teacher, load_checkpoint(teacher), seen)
    with pytest.raises(UserError, match=r"teacher: .*teacher.safetensors was trained on .*, which a fold is to hold out"):
        cross_validate(make_config(teacher=teacher, val_pairs=None), 2)
    assert not (tmp_path / "run").exists()
