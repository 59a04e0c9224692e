"""Faults at full length: `make drills`. docs/reliability.md has the figures."""

import multiprocessing
import signal
import time

import numpy as np
import pytest
import torch
from runs import STATE, blank_curve, interrupt_at_step, same  # noqa: F401  blank_curve is a fixture
from test_guards import entries, scale_sources
from test_loop import outcome

from autohdr.train.checkpoint import load_newest, load_state
from autohdr.train.loop import train

pytestmark = pytest.mark.drill


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_twenty_steps_are_ten_and_ten(make_config, monkeypatch, precision):
    """Bitwise, in mid-epoch, with another number of workers: weights, average, moments, scaler, log."""
    settings = {"epochs": 7, "batch_size": 1, "accumulate": 2, "ema": 0.99, "warmup_epochs": 1, "precision": precision}
    settings |= {"resize": "crop", "size": 24, "log_every": 1}
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, 20)
        train(make_config("whole", **settings))
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, 10)
        train(make_config("parts", **settings))
        assert load_state(make_config("parts").out / STATE)["step"] == 10
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, 20)
        train(make_config("parts", **settings, workers=2), resume=True)
    assert load_state(make_config("parts").out / STATE)["step"] == 20
    assert same(outcome(make_config("whole").out), outcome(make_config("parts").out))
    logs = [entries(make_config(run).out, "step") for run in ("whole", "parts")]
    assert logs[0] == logs[1] and len(logs[0]) == 20


def test_a_batch_100_times_as_bright_costs_nothing(make_config, monkeypatch, capsys):
    """The last epoch's training and validation losses are within 1 % of those of a run that never saw it."""
    settings = {"epochs": 80, "snapshot_every": 2, "warmup_epochs": 2}
    clean = train(make_config("clean", **settings)).out
    scale_sources(monkeypatch, {100}, 100)
    spiked = train(make_config("spiked", **settings)).out
    monkeypatch.undo()
    scale_sources(monkeypatch, {100}, 100)
    unguarded = train(make_config("unguarded", **settings, spike_factor=0.0, clip=0.0)).out
    (entry,) = entries(spiked, "skipped")
    assert entry["step"] == 100
    rows = [load_state(out / STATE)["history"][-1] for out in (clean, spiked, unguarded)]
    with capsys.disabled():
        for name in ("train_loss", "val_l1"):
            print(f"\n{name}: clean {rows[0][name]:.6f}, rolled back {rows[1][name]:.6f}, unguarded {rows[2][name]:.6f}")
    for name in ("train_loss", "val_l1"):
        assert rows[1][name] == pytest.approx(rows[0][name], rel=0.01)


def run_or_resume(config):
    torch.set_num_threads(1)  # a fork has none of its parent's other OpenMP threads, and would wait for them
    train(config, resume=(config.out / "config.toml").exists())


def test_fifty_kills_cost_nothing(make_config, capsys):
    """SIGKILL to a run that saves after every step, 50 times, at random moments: the newest state loads each time, and the
    run that goes on from it 50 times ends bitwise where one that nobody killed does."""
    settings = {"epochs": 150, "save_every": 1, "ema": 0.9, "log_every": 1, "samples": 0}
    run_or_resume(make_config("whole", **settings))  # on one thread too: two add up in another order
    config, context = make_config("parts", **settings), multiprocessing.get_context("fork")
    path, loaded, steps, torn = config.out / STATE, 0, [], 0
    for delay in np.random.default_rng(0).uniform(0, 0.5, 50):
        before = load_newest(path)["step"] if path.exists() else 0
        run = context.Process(target=run_or_resume, args=(config,))
        run.start()
        # It has written a state of its own before the clock starts.
        deadline = time.monotonic() + 60
        while run.is_alive() and time.monotonic() < deadline and not (path.exists() and load_newest(path)["step"] > before):
            time.sleep(0.01)
        time.sleep(delay)
        run.kill()
        run.join()
        assert run.exitcode == -signal.SIGKILL, "the run was over before it was killed 50 times"
        steps.append(load_newest(path)["step"])
        loaded += 1
        torn += any(file.name.endswith(".part") for file in config.out.iterdir())
    run_or_resume(config)
    with capsys.disabled():
        print(f"\n{loaded} of 50 loaded, {torn} times with a file half written beside it; killed after steps {steps}")
    assert loaded == 50
    assert same(outcome(make_config("whole").out), outcome(config.out))


def test_a_compiled_network_trains_as_an_eager_one(make_config, capsys):
    """torch.compile with its own backend: three epochs end where they end without it, but for rounding."""
    rows = [load_state(train(make_config(str(on), compile=on, epochs=3)).out / STATE)["history"][-1] for on in (False, True)]
    with capsys.disabled():
        print(f"\nval_l1: eager {rows[0]['val_l1']:.6f}, compiled {rows[1]['val_l1']:.6f}")
    assert rows[1]["val_l1"] == pytest.approx(rows[0]["val_l1"], rel=1e-3)
