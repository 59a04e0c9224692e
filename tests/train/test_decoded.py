"""Training from decoded photos on disk: bitwise the same run, and the disk is given back at its end."""

import shutil

import pytest
from runs import STATE, blank_curve, interrupt_at_step, patch_steps, same  # noqa: F401  blank_curve is a fixture

from autohdr.data import pairs as module
from autohdr.errors import UserError
from autohdr.train import batches
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


@pytest.fixture
def own(tmp_path, pair_files):
    """The pairs to train on, in a folder of the test's own."""
    return shutil.copytree(pair_files[0].parent, tmp_path / "own") / "pairs.jsonl"


def take_away(monkeypatch, photo, step):
    def gone(make, learner, number):
        if number == step:
            photo.rename(photo.with_suffix(".gone"))
        return make()

    patch_steps(monkeypatch, gone)


def test_photos_that_are_gone_are_read_from_the_cache(make_config, own, monkeypatch):
    """Bitwise, and at once: everything has been decoded in the first epoch."""
    whole = train(make_config("whole", train_pairs=own))
    monkeypatch.setattr(batches.time, "sleep", lambda seconds: pytest.fail("it waited"))
    take_away(monkeypatch, own.with_name("2_src.png"), 4)
    parts = train(make_config("parts", train_pairs=own))
    assert same(*(load_state(out / STATE)["model"] for out in (whole.out, parts.out)))


def test_a_photo_that_is_gone_for_a_while_is_waited_for(make_config, own, monkeypatch):
    whole = train(make_config("whole", train_pairs=own, cache_gb=0))
    photo = own.with_name("2_src.png")
    waited = []

    def sleep(seconds):
        waited.append(seconds)
        if len(waited) == 3:
            photo.with_suffix(".gone").rename(photo)

    monkeypatch.setattr(batches.time, "sleep", sleep)
    take_away(monkeypatch, photo, 4)
    parts = train(make_config("parts", train_pairs=own, cache_gb=0))
    assert waited == list(batches.WAITS[:3])
    assert same(*(load_state(out / STATE)["model"] for out in (whole.out, parts.out)))


def test_a_photo_that_stays_away_is_left_out_with_a_word(make_config, own, pair_files, monkeypatch):
    monkeypatch.setattr(batches.time, "sleep", lambda seconds: None)
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="left out this time, another.*: .*2_src.png"):
        take_away(patch, own.with_name("2_src.png"), 4)
        assert train(make_config(train_pairs=own, cache_gb=0)).epochs == 2
    take_away(monkeypatch, own.with_name("1_src.png"), 2)
    with pytest.raises(UserError, match="1_src.png"):  # validation would be on other pairs
        train(make_config("validation", train_pairs=pair_files[0], val_pairs=shorter(own), cache_gb=0))


def shorter(pairs):
    """The second pair alone, at other places than those to train on."""
    lines = pairs.read_text().splitlines(keepends=True)
    pairs.with_name("second.jsonl").write_text(lines[1])
    return pairs.with_name("second.jsonl")


def test_a_negative_budget_is_refused(make_config):
    with pytest.raises(UserError, match="cache_gb: expected at least 0, got -1"):
        train(make_config(cache_gb=-1))
