"""Training from decoded photos on disk: bitwise the same run, and the disk is given back at its end."""

import pytest
from runs import STATE, blank_curve, interrupt_at_step, same  # noqa: F401  blank_curve is a fixture

from autohdr.data import pairs as module
from autohdr.errors import UserError
from autohdr.train.checkpoint import load_state
from autohdr.train.loop import train


def test_a_run_is_the_same_with_and_without(make_config, monkeypatch):
    without = train(make_config("without", cache_gb=0, resize="crop", size=24))
    config = make_config(resize="crop", size=24)
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, 4)  # in the second epoch: everything has been decoded
        train(config)
    assert len(list((config.out / "cache").iterdir())) == 2 * (6 + 2) and not (without.out / "cache").exists()
    monkeypatch.setattr(module, "read_samples", lambda path: pytest.fail(f"{path} was decoded"))
    train(config, resume=True)
    states = [load_state(out / STATE) for out in (without.out, config.out)]
    for key in ("model", "optimizer", "rng"):
        assert same(states[0][key], states[1][key])
    assert not (config.out / "cache").exists()


def test_a_negative_budget_is_refused(make_config):
    with pytest.raises(UserError, match="cache_gb: expected at least 0, got -1"):
        train(make_config(cache_gb=-1))
