"""TensorBoard and Weights & Biases get the log's numbers, and cannot stop a run."""

import json
import sys
import types

import pytest
from runs import STATE, blank_curve, interrupt_at_step  # noqa: F401  blank_curve is a fixture

from autohdr.errors import UserError
from autohdr.train.checkpoint import load_state
from autohdr.train.loop import train


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package: it keeps the settings of its runs, and (step, numbers) of what is logged."""
    module, calls = types.ModuleType("wandb"), []
    module.__spec__ = types.SimpleNamespace()
    module.runs, module.logged, module.broken = [], calls, False

    def init(**settings):
        module.runs.append(settings)
        return types.SimpleNamespace(log=log, finish=lambda: module.runs.append("finished"))

    def log(numbers, step):
        if module.broken:
            raise ConnectionError("no network")
        calls.append((step, numbers))

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_writes_tensorboard(make_config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    summary = train(make_config(tensorboard=True, log_every=1))
    events = EventAccumulator(str(summary.out / "tensorboard"))
    events.Reload()
    assert [scalar.step for scalar in events.Scalars("step/loss")] == [1, 2, 3, 4, 5, 6]
    history = [row["val_psnr"] for row in load_state(summary.out / STATE)["history"]]
    assert [scalar.value for scalar in events.Scalars("epoch/val_psnr")] == pytest.approx(history)


def test_wandb_gets_the_numbers_of_the_log(make_config, monkeypatch, wandb):
    """In a run of two parts: one run there, by the run's own name."""
    settings = {"wandb": True, "log_every": 1}
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, 4)
        train(make_config(**settings))
    out = train(make_config(**settings), resume=True).out
    (first, _, second, _), run_id = wandb.runs, load_state(out / STATE)["run_id"]
    assert first["id"] == second["id"] == run_id and second["resume"] == "allow" and first["config"]["lr"] == "0.002"
    assert [what for what in wandb.runs if what == "finished"] == ["finished"] * 2
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [step for step, _ in wandb.logged] == [line["step"] for line in lines]
    assert [numbers["step/loss"] for _, numbers in wandb.logged if "step/loss" in numbers] == [
        line["loss"] for line in lines if line["kind"] == "step"
    ]


def test_a_tracker_that_fails_is_named_once(make_config, wandb):
    wandb.broken = True
    with pytest.warns(UserWarning, match="wandb: nothing more is logged there: no network") as warned:
        assert train(make_config(wandb=True, log_every=1)).epochs == 2
    assert len(warned) == 1


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_refuses_what_is_absent(make_config, monkeypatch, name):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"{name}: expected the package {name}.*pip install {name}"):
        train(make_config(**{name: True}))
