"""Progressive training: sizes and batches by epoch, exact through an interruption, and the learning rates of the whole."""

import json
import math
from dataclasses import replace

import pytest
from runs import STATE, blank_curve, interrupt_at_step, same  # noqa: F401  blank_curve is a fixture

from autohdr.data import pairs as module
from autohdr.errors import UserError
from autohdr.plan import Plan
from autohdr.train import rehearsal
from autohdr.train.batches import Batches
from autohdr.train.checkpoint import load_state
from autohdr.train.checks import check_config
from autohdr.train.config import TrainConfig, dump_config, load_config
from autohdr.train.loop import train
from autohdr.train.rehearsal import rehearse
from autohdr.train.schedule import Schedule, lr_factor, stages
from autohdr.train.step import Step

STAGES = [{"epochs": 2, "size": 16, "batch_size": 3}, {"epochs": 1, "size": 24, "resize": "crop", "batch_size": 1}]


def outcome(out):
    state = load_state(out / STATE)
    for row in state["history"]:
        del row["seconds"], row["data_wait"]
    return {key: state[key] for key in ("model", "optimizer", "rng", "history", "step", "epoch_steps", "step_pairs")}


def test_each_stage_has_its_size_and_batch_and_resume_is_bitwise(make_config, monkeypatch):
    """Stopped within the first stage, between two, and within the second. Only the present stage's photos stay decoded."""
    seen, read = [], Batches.read
    monkeypatch.setattr(Batches, "read", lambda *args: (seen.append(tuple(batch[0].shape)) or batch for batch in read(*args)))
    settings = {"stages": STAGES, "epochs": 3, "ema": 0.9, "warmup_epochs": 0.5}
    whole = train(make_config("whole", **settings, cache_gb=0))
    assert seen == [(3, 3, 16, 16)] * 4 + [(1, 3, 24, 24)] * 6
    state = load_state(whole.out / STATE)
    assert (state["step"], state["step_pairs"]) == (10, [3, 1])
    assert [(row["step"], row["size"]) for row in state["history"]] == [(2, 16), (4, 16), (10, 24)]
    for step in (3, 4, 7):
        with monkeypatch.context() as patch:
            interrupt_at_step(patch, step)
            assert train(make_config("parts", **settings), resume=step > 3).interrupted
    kept = [module.np.load(file).shape[:2] for file in (make_config("parts").out / "cache").iterdir()]
    assert kept == [(32, 32)] * 2 * (3 + 2)  # of three pairs whole, as the second stage crops, and validation's
    parts = train(make_config("parts", **settings), resume=True)
    assert same(outcome(whole.out), outcome(parts.out))


def test_goes_on_with_another_batch_size_of_as_many_pairs(make_config, monkeypatch):
    """As it may in another number of processes. Another size, or other epochs, would not be the same run."""
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, 1)
        train(make_config(stages=STAGES, epochs=3))
    other = [STAGES[0] | {"batch_size": 1, "accumulate": 3}, STAGES[1]]
    assert train(make_config(stages=other, epochs=3), resume=True).epochs == 3
    with pytest.raises(UserError, match=r"takes \[3, 1\] pairs in a step, got 3 x 1 x 1, 2 x 1 x 1"):
        train(make_config(stages=[STAGES[0], STAGES[1] | {"batch_size": 2}], epochs=3), resume=True)
    with pytest.raises(UserError, match="--resume: stages: the run in .* has "):
        train(make_config(stages=[STAGES[0] | {"size": 20}, STAGES[1]], epochs=3), resume=True)


def test_a_recipe_has_stages(tmp_path):
    (tmp_path / "my.toml").write_text("stages = [{epochs = 2, size = 16}, {epochs = 3, batch_size = 4}]\n")
    config = load_config(tmp_path / "my.toml")
    assert config.epochs == 5 and config.stages[1] == {"epochs": 3, "batch_size": 4}
    (tmp_path / "again.toml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.toml", {"out": config.out}) == config


def test_the_progressive_recipe_ends_as_restormer_384():
    recipe, whole = load_config("restormer_progressive"), load_config("restormer_384")
    last = stages(recipe)[-1]
    assert recipe.epochs == 160 and last == replace(whole, epochs=40, out=recipe.out)
    assert (recipe.size, recipe.resize) == (last.size, last.resize)  # validated as it ends


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages = 3", "stages: expected a list, each a table, got 3"),
        ("stages = [3]", r"stages: expected a list, each a table, got \[3\]"),
        ("stages = [{}]", "stages: stage 1: expected epochs beside nothing"),
        ("stages = [{epochs = 1}, {size = 16}]", "stages: stage 2: expected epochs beside size"),
        ("stages = [{epochs = 1, lr = 1}]", "stages: stage 1: unknown key 'lr'; expected one of epochs, size, resize"),
        ("stages = [{epochs = 1.5}]", "stages: stage 1: epochs: expected an integer, got 1.5"),
        ('stages = [{epochs = 1, resize = "no"}]', "stages: stage 1: resize: expected 'squash' or"),
    ],
)
def test_rejects_stages_in_toml(tmp_path, text, message):
    (tmp_path / "my.toml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(tmp_path / "my.toml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": [{"epochs": 2}, {"epochs": 3}], "epochs": 100}, "epochs: expected 5, the sum of the stages' epochs, got 100"),
        ({"stages": [{"epochs": 0}]}, "stages: stage 1: epochs: expected at least 1, got 0"),
        ({"stages": [{"epochs": 2}, {"epochs": 1, "size": 8}]}, "stages: stage 2: size: expected at least 16, got 8"),
        ({"stages": [{"epochs": 2, "resize": "fit"}]}, "stages: stage 1: batch_size: expected 1, as resize = fit"),
        ({"min_lr": 1.0}, "min_lr: expected at most lr, 0.002, got 1.0"),
        ({"min_lr": -1.0}, "min_lr: expected at least 0, got -1.0"),
    ],
)
def test_rejects_settings(make_config, changes, message):
    with pytest.raises(UserError, match=message):
        check_config(make_config(**changes))


def test_the_smallest_stage_has_to_suit_the_losses(make_config, tmp_path):
    """A long photo that keeps its aspect ratio becomes 80 x 13 pixels, and 32 x 5 in a stage."""
    module.Image.new("RGB", (200, 32)).save(tmp_path / "src.png")
    (tmp_path / "long.jsonl").write_text('{"src": "src.png", "tar": "src.png"}\n')
    settings = {"train_pairs": tmp_path / "long.jsonl", "resize": "fit", "size": 80, "batch_size": 1, "losses": {"ssim": 1.0}}
    with pytest.raises(UserError, match="200x32 pixels become 32x5 with size 32 and resize fit"):
        train(make_config(**settings, stages=[{"epochs": 1, "size": 32}, {"epochs": 1}]))


def test_a_rehearsal_looks_at_every_stage(make_config, monkeypatch):
    """Its plan is of the stage that takes the most."""
    seen, call = [], Step.__call__
    monkeypatch.setattr(Step, "__call__", lambda self, group, *args, **to: seen.append(group) or call(self, group, *args, **to))
    monkeypatch.setattr(rehearsal, "plan", lambda model, size, batch, *args, **others: Plan(1_000_000 * size**2 * batch, {}))
    said = rehearse(make_config(stages=STAGES, epochs=3))
    assert [len(group[0]) for group in seen] == [3, 3, 1, 1]
    assert "stage 1    epochs 1 to 2, 16 x 16 pixels (squash), 3 pairs in a step\na step " in said
    assert "stage 2    epochs 3 to 3, 24 x 24 pixels (crop), 1 pairs in a step\na step " in said
    assert "planned    768 MB" in said


def test_shapes_of_the_learning_rate():
    linear, constant = ([lr_factor(step, 10, 2, shape, 0.2) for step in range(10)] for shape in ("linear", "constant"))
    assert linear[:3] == [0.5, 1.0, 1.0] and linear[6] == pytest.approx(0.6) and linear[9] == pytest.approx(0.3)
    assert constant == [0.5, *[1.0] * 9]
    assert lr_factor(6, 10, 2, "cosine", 0.2) == pytest.approx(0.6)
    assert lr_factor(9, 10, 2, floor=0.2) == pytest.approx(0.2 + 0.4 * (1 + math.cos(math.pi * 7 / 8)))


def test_the_schedule_counts_through_the_stages():
    """Six pairs: two steps in each of two epochs, then six in one. The warm-up takes one epoch and a half."""
    schedule = Schedule(TrainConfig(stages=STAGES, epochs=3, lr=1e-3, warmup_epochs=1.5, schedule="constant"), 6, 1)
    assert [schedule.epoch_steps(epoch) for epoch in range(3)] == [2, 2, 6] and schedule.steps == 10
    rates = [schedule.lr(epoch, step) for epoch in range(3) for step in range(schedule.epoch_steps(epoch))]
    assert rates == pytest.approx([1e-3 / 3, 2e-3 / 3, *[1e-3] * 8])


def test_a_run_ends_at_its_floor(make_config):
    out = train(make_config(schedule="linear", min_lr=1e-3, lr=2e-3, log_every=1, epochs=1)).out
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines] == pytest.approx([2e-3, 5e-3 / 3, 4e-3 / 3, 4e-3 / 3])
