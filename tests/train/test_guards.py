import json
import math
import multiprocessing
import re

import pytest
from runs import STATE, blank_curve, patch_steps, same  # noqa: F401  blank_curve is a fixture

from autohdr.train.checkpoint import load_state
from autohdr.train.guards import Guard, TrainingError
from autohdr.train.loop import train
from autohdr.train.objective import Objective
from autohdr.train.rehearsal import rehearse


def entries(out, *kinds):
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] in kinds]


def fill_gradient(monkeypatch, name, steps, value):
    """That parameter's gradient holds `value` in one place, in those steps, counted from 1."""

    def spoil(gradient):
        gradient = gradient.clone()
        gradient[(-1,) * gradient.ndim] = value
        return gradient

    def step(make, learner, number):
        hook = learner.model.get_parameter(name).register_hook(spoil) if number in steps else None
        try:
            return make()
        finally:
            if hook:
                hook.remove()

    patch_steps(monkeypatch, step)


def scale_sources(monkeypatch, steps, factor):
    """The sources of those steps, counted from 1, are so many times as bright."""
    predict = Objective.predict

    def step(make, learner, number):
        with monkeypatch.context() as patch:
            if number in steps:
                patch.setattr(
                    Objective, "predict", lambda self, network, source, *args: predict(self, network, source * factor, *args)
                )
            return make()

    patch_steps(monkeypatch, step)


def everything(learner):
    return [tensor.clone() for tensor in learner.tensors()]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_skips_the_step(make_config, monkeypatch, capsys, value):
    """Weights, moments and average stay bit for bit; the parameter is named in the log and on the terminal."""
    name, seen = "latent.blocks.0.attn.qkv.weight", {}
    fill_gradient(monkeypatch, name, {3}, value)

    def step(make, learner, number):
        before = everything(learner)
        result = make()
        seen[number] = same(before, everything(learner))
        return result

    patch_steps(monkeypatch, step)
    summary = train(make_config(ema=0.9, log_every=1))
    assert seen == {1: False, 2: False, 3: True, 4: False, 5: False, 6: False}
    (entry,) = entries(summary.out, "skipped")
    assert (entry["step"], entry["epoch"], entry["tensors"], entry["in_a_row"]) == (3, 1, [name], 1)
    assert len(entry["sources"]) == 2
    assert [line["step"] for line in entries(summary.out, "step")] == [1, 2, 4, 5, 6]
    assert f"step 3 (epoch 1): the gradient is not finite in 1 parameters, first {name}" in capsys.readouterr().out
    assert load_state(summary.out / STATE)["ema"]["updates"] == 5
    assert all(math.isfinite(row["train_l1"]) for row in entries(summary.out, "epoch"))


def test_a_loss_that_is_not_finite_skips_the_step(make_config, monkeypatch):
    scale_sources(monkeypatch, {2}, math.nan)
    summary = train(make_config())
    (entry,) = entries(summary.out, "skipped")
    assert (entry["step"], entry["tensors"]) == (2, ["loss"])
    assert all(weight.isfinite().all() for weight in load_state(summary.out / STATE)["model"].values())


def test_stops_after_so_many_bad_steps_in_a_row(make_config, monkeypatch):
    """Steps 2 to 4 are bad, then 6 and on: three in a row may be, four may not."""
    fill_gradient(monkeypatch, "output.weight", {2, 3, 4, 6, 7, 8, 9}, math.nan)
    config = make_config(epochs=6, max_bad_steps=4)
    with pytest.raises(TrainingError, match=r"step 9 \(epoch 3\): the gradient is .*first output.weight.*bad step 4 in a row"):
        train(config)
    assert [line["in_a_row"] for line in entries(config.out, "skipped")] == [1, 2, 3, 1, 2, 3, 4]
    assert load_state(config.out / STATE)["step"] == 6


def test_a_spike_rolls_back(make_config, monkeypatch, capsys):
    """A batch 100 times as bright in step 9: the state before the last good step that was due is put back, bit for bit."""
    scale_sources(monkeypatch, {9}, 100)
    states = {}

    def step(make, learner, number):
        states[number - 1] = everything(learner)
        return make()

    patch_steps(monkeypatch, step)
    summary = train(make_config(epochs=4, ema=0.9, spike_window=4, snapshot_every=4))
    (entry,) = entries(summary.out, "rolled back")
    assert (entry["step"], entry["to"], entry["in_a_row"]) == (9, 5, 1)
    assert same(states[9], states[5]) and not same(states[8], states[5])
    assert re.search(
        r"step 9 \(epoch 3\): the loss [\d.]+ is a spike, above [\d.]+: back to the state after step 5", capsys.readouterr().out
    )


def test_no_spike_where_none_is_looked_for(make_config, monkeypatch):
    scale_sources(monkeypatch, {9}, 100)
    summary = train(make_config(epochs=4, spike_window=4, spike_factor=0.0))
    assert entries(summary.out, "rolled back") == []


def test_a_resumed_run_can_roll_back_at_once(make_config, monkeypatch):
    config = make_config(epochs=4, spike_window=4, snapshot_every=4)
    with monkeypatch.context() as patch:
        fill_gradient(patch, "output.weight", {7, 8}, math.nan)
        with pytest.raises(TrainingError):
            train(make_config(epochs=4, spike_window=4, snapshot_every=4, max_bad_steps=2))
    scale_sources(monkeypatch, {7}, 100)
    (config.out / "config.toml").write_text((config.out / "config.toml").read_text().replace("bad_steps = 2", "bad_steps = 5"))
    train(config, resume=True)
    (entry,) = entries(config.out, "rolled back")
    assert (entry["step"], entry["to"]) == (7, 6)


def test_the_limit_is_robust():
    guard = Guard(5.0, 20, 1, lambda: [])
    for step, loss in enumerate((0.9, 1.0, 1.1) * 3):
        guard.passed(step, loss)
        assert guard.limit() == math.inf  # too few to judge by
    guard.passed(9, 1.0)
    assert guard.limit() == 5.0
    for step in range(10, 14):
        guard.passed(step, 1000.0)
    assert guard.limit() == pytest.approx(5, rel=0.1)  # outliers do not move it
    guard = Guard(1.5, 20, 1, lambda: [])
    for step in range(20):
        guard.passed(step, 1.0 + step % 2)
    assert guard.limit() == pytest.approx(1.5 + 10 * 1.4826 * 0.5)  # wide by nature: the deviations decide


def test_a_rehearsal_says_what_is_not_finite(make_config, monkeypatch):
    fill_gradient(monkeypatch, "output.weight", {1}, math.nan)
    config = make_config(workers=1)
    with pytest.raises(TrainingError, match="step 1 .*first output.weight"):
        rehearse(config)
    assert not config.out.exists() and not multiprocessing.active_children()
