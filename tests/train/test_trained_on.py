"""Weights carry the digests of every photo they were trained on, from run to run, and `eval` refuses those."""

import shutil

import pytest
from PIL import Image, ImageOps
from runs import blank_curve, interrupt_at_step, patch_steps  # noqa: F401  blank_curve is a fixture

from autohdr.cli import main
from autohdr.data.pairs import photo_digests, read_pairs
from autohdr.models import load_checkpoint
from autohdr.train.loop import train


def digests(*files):
    return sorted({digest for file in files for digest in photo_digests(read_pairs(file)).values()})


def carried(out, which="best"):
    return load_checkpoint(out / f"checkpoint_{which}.safetensors").metadata["trained_on"]


@pytest.fixture
def own_pairs(tmp_path, pair_files):
    """The pairs to train on, in a folder of the test's own."""
    shutil.copytree(pair_files[0].parent, tmp_path / "own")
    return tmp_path / "own" / "pairs.jsonl"


def test_a_run_leaves_the_digests_of_its_photos(make_config, pair_files):
    summary = train(make_config(epochs=1))
    assert carried(summary.out) == carried(summary.out, "last") == digests(pair_files[0])
    assert len(carried(summary.out)) == 12 and not set(carried(summary.out)) & set(digests(pair_files[1]))


def test_digests_of_earlier_training_are_carried_on(make_config, pair_files, tmp_path):
    shutil.copytree(pair_files[0].parent, tmp_path / "other")
    other = tmp_path / "other" / "pairs.jsonl"
    for photo in other.parent.glob("*.png"):
        ImageOps.invert(Image.open(photo)).save(photo)
    first = train(make_config(epochs=1))
    second = train(make_config("second", epochs=1, train_pairs=other, init_weights=first.out / "checkpoint_best.safetensors"))
    assert carried(second.out) == digests(pair_files[0], other)


def test_a_photo_replaced_before_resuming_is_carried_beside_the_new_one(make_config, own_pairs, monkeypatch):
    before = digests(own_pairs)
    config = make_config(epochs=2, train_pairs=own_pairs)
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, 2)
        assert train(config).interrupted
    Image.new("RGB", (32, 32), "red").save(own_pairs.parent / "3_tar.png")
    train(config, resume=True)
    assert carried(config.out, "last") == sorted({*before, *digests(own_pairs)})
    assert len(carried(config.out, "last")) == len(before) + 1


def test_a_photo_replaced_while_the_run_goes_on_is_carried_too(make_config, own_pairs, monkeypatch):
    before = digests(own_pairs)

    def replace(make, learner, number):
        if number == 2:
            Image.new("RGB", (32, 32), "red").save(own_pairs.parent / "3_tar.png")
        return make()

    patch_steps(monkeypatch, replace)
    config = make_config(epochs=1, train_pairs=own_pairs)
    train(config)
    assert len(carried(config.out)) == len(before) + 1
    assert carried(config.out) == carried(config.out, "last") == sorted({*before, *digests(own_pairs)})


def test_eval_refuses_what_was_trained_on(make_config, pair_files, tmp_path, capsys):
    weights = train(make_config(epochs=1)).out / "checkpoint_best.safetensors"
    call = ["eval", "--checkpoint", str(weights), "--out", str(tmp_path / "report"), "--device", "cpu", "--pairs"]
    assert main([*call, str(pair_files[1])]) == 0
    capsys.readouterr()
    assert main([*call, str(pair_files[0])]) == 2
    error = capsys.readouterr().err
    assert "trained on 6 of the 6 pairs" in error and f"{pair_files[0]}:6: " in error and "5_tar.png" in error
    assert main([*call, str(pair_files[0]), "--allow-trained"]) == 0
    assert "6 of these pairs were TRAINED ON" in capsys.readouterr().out
