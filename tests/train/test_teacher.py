"""Distillation: a run that learns from another model's outputs, and features, beside its targets."""

import json

import pytest
import torch
from runs import STATE, blank_curve, interrupt_at_step, same  # noqa: F401  blank_curve is a fixture

from autohdr.data.pairs import photo_digests, read_pairs
from autohdr.errors import UserError
from autohdr.models import create_model, load_checkpoint, read_metadata, save_weights
from autohdr.train.checkpoint import load_state
from autohdr.train.checks import check_teacher
from autohdr.train.distributed import Ranks
from autohdr.train.folds import cross_validate
from autohdr.train.learner import Learner
from autohdr.train.loop import train
from autohdr.train.teacher import feature_loss, outputs


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
    settings = {
        "teacher": teacher,
        "teacher_features_weight": 0.5,
        "mixup": 1.2,
        "stages": [{"epochs": 1, "size": 24}, {"epochs": 1}],
    }
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
    without = make_config("halves", **settings | {"teacher": None})
    with pytest.raises(UserError, match="teacher_features_weight: expected a teacher"):
        train(without, resume=True)
    with pytest.raises(UserError, match="has restormer_nano with SHA-256 .*, got none, None"):
        check_teacher(load_state(config.out / STATE), {}, without)
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


def test_features_are_learnt_where_both_have_the_same(make_config, teacher):
    settings = {"teacher": teacher, "teacher_features_weight": 0.5, "epochs": 5, "log_every": 1}
    lines = steps(train(make_config(**settings)).out)
    for line in lines:
        assert line["loss"] == pytest.approx(line["l1"] + 0.5 * line["teacher"] + 0.5 * line["teacher_features"])
    assert sum(line["teacher_features"] for line in lines[-3:]) < 0.8 * sum(line["teacher_features"] for line in lines[:3])
    without = steps(train(make_config("without", **settings | {"teacher_features_weight": 0})).out)
    assert "teacher_features" not in without[0]
    assert without[-1]["l1"] != lines[-1]["l1"]


def test_features_reach_the_student_alone(make_config, teacher):
    config = make_config(teacher=teacher, teacher_features_weight=1)
    learner = Learner(config, Ranks())
    # The teacher's stages, of 8 channels at first, are all there; the refinement has no block.
    assert len(learner.guided) == 7
    image = torch.rand(2, 3, 28, 20)
    with outputs(learner.guided) as features:
        learner.network(image)
    _, hints = learner.teacher(image)
    assert [list(hint.shape) for hint in hints][:4] == [[2, 8, 32, 24], [2, 16, 16, 12], [2, 32, 8, 6], [2, 64, 4, 3]]
    loss = feature_loss(features, hints)
    pairs = [pair for stage in zip(features, hints, strict=True) for pair in zip(*stage, strict=True)]  # of each sample by itself
    torch.testing.assert_close(loss, sum((f - h).square().sum() / h.square().sum() for f, h in pairs) / 14)
    assert feature_loss(hints, hints) == 0 and not any(hint.requires_grad for hint in hints)
    loss.backward()
    reached = {name for name, weight in learner.model.named_parameters() if weight.grad is not None}
    assert {name for name, _ in learner.model.named_parameters()} - reached == {"output.weight"}
    assert all(weight.grad is None for weight in learner.teacher._network.parameters())
    assert not any(module._forward_hooks for module in (*learner.model.modules(), *learner.teacher._network.modules()))


def test_another_family_and_another_padding(make_config, teacher):
    config = make_config(model="nafnet_nano", model_args={"width": 8}, teacher=teacher, teacher_features_weight=1)
    assert len(Learner(config, Ranks()).guided) == 7
    hint = torch.rand(1, 8, 16, 24)
    padded = torch.nn.functional.pad(2 * hint, (0, 8, 0, 16), value=9.0)
    torch.testing.assert_close(feature_loss([padded], [hint]), torch.tensor(1.0))
    torch.testing.assert_close(feature_loss([padded], [torch.zeros_like(hint)]) * 0, torch.tensor(0.0))  # no hint, no nan


def test_a_run_that_learns_features_goes_on_bitwise(make_config, teacher, monkeypatch):
    settings = {"teacher": teacher, "teacher_features_weight": 0.5}
    whole = load_state(train(make_config("whole", **settings)).out / STATE)
    config = make_config("halves", **settings)
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, 2)
        assert train(config).interrupted
    with pytest.raises(UserError, match="--resume: teacher_features_weight: the run in .* has 0.5, got 1"):
        train(make_config("halves", **settings | {"teacher_features_weight": 1}), resume=True)
    state = load_state(train(config, resume=True).out / STATE)
    assert same(*([run[key] for key in ("model", "optimizer", "rng", "step")] for run in (whole, state)))


def test_features_that_cannot_be_compared_are_refused(make_config, teacher):
    wide = make_config(teacher=teacher, teacher_features_weight=1, model_args={"dim": 12, "num_blocks": [1, 1, 1, 1]})
    with pytest.raises(
        UserError,
        match=r"teacher_features_weight: expected a stage .* the teacher has 8 channels at 1/1, 16 channels at 1/2, .*, "
        r"the model 12 channels at 1/1, 24 channels at 1/2, ",
    ):
        train(wide)
    with pytest.raises(UserError, match="the model no stages"):
        train(make_config(teacher=teacher, teacher_features_weight=1, model="swinir_nano", model_args={}))
    for changes, reason in [
        ({"teacher_features_weight": 1}, "teacher_features_weight: expected a teacher"),
        ({"teacher": teacher, "teacher_features_weight": 1, "compile": True}, "expected no compile and no cuda_graphs"),
        ({"teacher": teacher, "teacher_features_weight": 1, "cuda_graphs": True}, "expected no compile and no cuda_graphs"),
        ({"teacher": teacher, "teacher_features_weight": -1}, "teacher_features_weight: expected at least 0, got -1"),
    ]:
        with pytest.raises(UserError, match=reason):
            train(make_config(**changes))
