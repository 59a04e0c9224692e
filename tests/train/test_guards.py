import json
import math
import multiprocessing
import re

import pytest
from PIL import Image
from runs import STATE, blank_curve, interrupt_at_step, patch_steps, same, write_pairs  # noqa: F401  blank_curve is a fixture

from autohdr.train.checkpoint import load_state, previous, save_state
from autohdr.train.guards import Guard, TrainingError
from autohdr.train.loop import Loop, train
from autohdr.train.objective import Objective
from autohdr.train.rehearsal import rehearse
from autohdr.train.run import prepare
from autohdr.train.step import Step


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
    assert load_state(config.out / STATE)["step"] == 0  # after no other was the next step good


def test_two_spikes_in_a_row_roll_back(make_config, monkeypatch, capsys):
    """Batches 100 times as bright in steps 9 and 10: the first is skipped, after the second the state before the last good step
    that was due is put back, bit for bit."""
    scale_sources(monkeypatch, {9, 10}, 100)
    states = {}

    def step(make, learner, number):
        states[number - 1] = everything(learner)
        return make()

    patch_steps(monkeypatch, step)
    summary = train(make_config(epochs=4, ema=0.9, spike_window=4, snapshot_every=4))
    (entry,) = entries(summary.out, "rolled back")
    assert (entry["step"], entry["to"], entry["undone"]) == (10, 5, 3)
    assert same(states[9], states[8]) and same(states[10], states[5]) and not same(states[8], states[5])
    said = capsys.readouterr().out
    assert re.search(r"step 9 \(epoch 3\): the loss [\d.]+ is a spike, above [\d.]+: step skipped \(1 of 5 in a row\)", said)
    assert "step 10: two bad steps in a row: back to the state after step 5" in said
    assert summary.lost == {"a spike": 2, "going back after two bad steps in a row": 3}
    assert "5 of 12 steps lost: 3 by going back after two bad steps in a row, 2 by a spike" in said


@pytest.fixture
def nine_pairs(tmp_path):
    """Nine pairs to train on; the fifth is odd: black that becomes white."""
    pairs = write_pairs(tmp_path / "nine", 9, seed=0)
    for name, colour in (("src", "black"), ("tar", "white")):
        Image.new("RGB", (32, 32), colour).save(tmp_path / "nine" / f"4_{name}.png")
    return pairs


def test_an_odd_pair_is_left_out_after_three_epochs(make_config, nine_pairs, capsys):
    """It costs the step that it is in, three times; then it is named once, and another pair has its place."""
    summary = train(make_config(train_pairs=nine_pairs, batch_size=1, epochs=6, spike_window=8, samples=0))
    odd = str(nine_pairs.with_name("4_src.png"))
    assert summary.lost == {"a spike": 3} and entries(summary.out, "rolled back") == []
    skipped = entries(summary.out, "skipped")
    assert [entry["sources"] for entry in skipped] == [[odd]] * 3
    (named,) = entries(summary.out, "left out")
    assert named["source"] == odd and named["epoch"] == skipped[-1]["epoch"]
    assert "4_src.png: left out from here on: its loss was a spike in 3 epochs" in capsys.readouterr().out
    assert load_state(summary.out / STATE)["left_out"] == [4]  # and so after resuming


def test_the_place_of_a_pair_left_out_goes_to_another(make_config):
    batches = prepare(make_config(batch_size=1)).batches
    before, after = (sum(sum(batches.groups(3, left_out), []), []) for left_out in ([], [2]))
    (place,) = (number for number, (one, other) in enumerate(zip(before, after, strict=True)) if one != other)
    assert before[place] == 2 and after[place] != 2


def ruin_weights(monkeypatch, step):
    """Before that step, counted from 1, all weights are scaled by 1e20."""

    def ruin(make, learner, number):
        if number == step:
            for weight in learner.model.parameters():
                weight.data.mul_(1e20)
        return make()

    patch_steps(monkeypatch, ruin)


def test_ruined_weights_are_put_back(make_config, monkeypatch):
    """The second step whose loss is not finite goes back; what was saved meanwhile is from before."""
    seen = []
    config = make_config(epochs=4, save_every=1)

    def look(make, learner, number):
        result = make()
        if number == 9:
            seen.extend(load_state(file) for file in (config.out / STATE, previous(config.out / STATE)))
        return result

    ruin_weights(monkeypatch, 8)
    patch_steps(monkeypatch, look)
    summary = train(config)
    assert summary.lost == {"a loss that is not finite": 2, "going back after two bad steps in a row": 6}
    assert [state["step"] for state in seen] == [6, 5] and math.isfinite(summary.best["val_psnr"])
    assert all(weight.abs().max() < 100 for state in seen for weight in state["model"].values())


@pytest.mark.parametrize("step", [8, 9], ids=["in mid-epoch", "at an epoch's end"])
def test_a_run_that_ends_after_bad_steps_goes_on_from_before(make_config, monkeypatch, step):
    """Bitwise: nothing was saved after the weights were ruined."""
    settings = {"epochs": 4, "save_every": 1}
    train(make_config("whole", **settings))
    with monkeypatch.context() as patch, pytest.raises(TrainingError, match="--resume goes on from the last good state in"):
        ruin_weights(patch, step)
        train(make_config("parts", **settings, max_bad_steps=1))
    for name in (STATE, previous(make_config("parts").out / STATE).name):
        assert all(weight.abs().max() < 100 for weight in load_state(make_config("parts").out / name)["model"].values())
    train(make_config("parts", **settings, max_bad_steps=1), resume=True)
    assert same(*(load_state(make_config(run).out / STATE)["model"] for run in ("whole", "parts")))


def test_a_signal_waits_for_a_good_step(make_config, monkeypatch):
    scale_sources(monkeypatch, {4, 5}, math.nan)
    interrupt_at_step(monkeypatch, 4)
    summary = train(make_config(epochs=4))
    state = load_state(summary.out / STATE)
    assert summary.interrupted and state["step"] == 6 and state["guard"]["in_a_row"] == 0


def test_validation_tells_ruined_weights(make_config, monkeypatch):
    """They are ruined after the last step of an epoch: the state kept is put back and validated."""
    finish = Loop._finish_epoch

    def ruin(self):
        if self._progress.epoch == 1:
            for weight in self._learner.model.parameters():
                weight.data.mul_(1e20)
        finish(self)

    monkeypatch.setattr(Loop, "_finish_epoch", ruin)
    summary = train(make_config(epochs=3))
    (entry,) = entries(summary.out, "rolled back")
    assert entry["step"] == 6 and "not a number" in entry["cause"] and summary.epochs == 3
    assert all(weight.abs().max() < 100 for weight in load_state(previous(summary.out / STATE))["model"].values())


def test_a_ruined_state_gives_way_to_the_one_before_it(make_config, monkeypatch):
    train(make_config("whole", epochs=4))
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, 8)
        train(make_config("parts", epochs=4))
    path = make_config("parts").out / STATE
    state = load_state(path)
    save_state(path, state | {"model": {name: weight * 1e20 for name, weight in state["model"].items()}})
    with pytest.raises(TrainingError, match="The state that the run went on from is set aside, and --resume goes on from"):
        train(make_config("parts", epochs=4), resume=True)
    train(make_config("parts", epochs=4), resume=True)
    assert same(*(load_state(make_config(run).out / STATE)["model"] for run in ("whole", "parts")))


def test_no_spike_where_none_is_looked_for(make_config, monkeypatch):
    scale_sources(monkeypatch, {9}, 100)
    summary = train(make_config(epochs=4, spike_window=4, spike_factor=0.0))
    assert entries(summary.out, "skipped") == []


def test_a_resumed_run_can_roll_back_at_once(make_config, monkeypatch):
    config = make_config(epochs=4, spike_window=4, snapshot_every=4)
    with monkeypatch.context() as patch:
        fill_gradient(patch, "output.weight", {7, 8}, math.nan)
        with pytest.raises(TrainingError):
            train(make_config(epochs=4, spike_window=4, snapshot_every=4, max_bad_steps=2))
    scale_sources(monkeypatch, {7, 8}, 100)
    (config.out / "config.toml").write_text((config.out / "config.toml").read_text().replace("bad_steps = 2", "bad_steps = 5"))
    train(config, resume=True)
    (entry,) = entries(config.out, "rolled back")
    assert (entry["step"], entry["to"], entry["undone"]) == (8, 6, 0)


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


def test_a_rehearsal_measures_whole_steps(make_config, monkeypatch):
    """Six pairs make a step of four and one of two."""
    seen, call = [], Step.__call__

    def see(self, group, *args, **others):
        seen.append(group)
        return call(self, group, *args, **others)

    monkeypatch.setattr(Step, "__call__", see)
    rehearse(make_config(batch_size=4))
    assert [len(group[0]) for group in seen] == [4, 4]


def test_a_rehearsal_says_what_is_not_finite(make_config, monkeypatch):
    fill_gradient(monkeypatch, "output.weight", {1}, math.nan)
    config = make_config(workers=1)
    with pytest.raises(TrainingError, match="step 1 .*first output.weight"):
        rehearse(config)
    assert not config.out.exists() and not multiprocessing.active_children()
