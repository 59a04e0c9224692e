"""A run whose pairs are varied in every way: exact through an interruption, and shown before it begins."""

import numpy as np
import pytest
from PIL import Image
from runs import STATE, blank_curve, interrupt_at_step, same  # noqa: F401  blank_curve is a fixture

from autohdr.cli import main
from autohdr.data.pairs import PairDataset, read_pairs
from autohdr.errors import UserError
from autohdr.plan import Plan
from autohdr.train import loop, rehearsal
from autohdr.train.checkpoint import load_state
from autohdr.train.checks import check_config
from autohdr.train.config import dump_config
from autohdr.train.loop import train
from autohdr.train.run import prepare

ALL = {"zoom": 1.5, "rotate": True, "flip": True, "exposure_jitter": 1.0, "white_balance_jitter": 0.5, "mixup": 1.2}


def test_resume_is_bitwise(make_config, monkeypatch):
    """In mid-epoch, with decoded photos and without, in the training process and in a worker."""
    settings = ALL | {"batch_size": 3}
    whole = train(make_config("whole", **settings, cache_gb=0))
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, 3)
        train(make_config("parts", **settings))
    train(make_config("parts", **settings, workers=1), resume=True)
    states = [load_state(out / STATE) for out in (whole.out, make_config("parts").out)]
    assert same(*([state[key] for key in ("model", "optimizer")] for state in states))


def test_what_is_left_out_is_mixed_into_no_other(make_config):
    batches = prepare(make_config(**ALL)).batches
    for epoch in range(8):
        batches.read([], epoch, left_out=[2, 3])
        assert not {batches.dataset.mixed(index)[0] for index in range(6)} & {2, 3}
    batches.read([], 0)
    sources = batches.sources([[0]])
    assert sources == [str(batches.dataset.pairs[index].src) for index in (0, batches.dataset.mixed(0)[0])]


def test_the_sheet_shows_what_the_network_sees(make_config, tmp_path, capsys, monkeypatch, pair_files):
    """Two rows of a stage with three pairs are those of its first epoch and of the next."""
    monkeypatch.setattr(rehearsal, "plan", lambda *args, **others: Plan(0, {}))  # takes a while
    stages = [{"epochs": 1, "size": 16}, {"epochs": 2, "size": 24}]
    (tmp_path / "my.toml").write_text(dump_config(make_config(stages=stages, epochs=3, **ALL)))
    call = ("train", str(tmp_path / "my.toml"), "--show", str(tmp_path / "sheet.jpg"))
    assert main([*call, "--dry-run"]) == 0
    assert capsys.readouterr().out.endswith(f"written    {tmp_path}/sheet.jpg, and nothing else\n")
    assert not make_config().out.exists()
    sheet = np.asarray(Image.open(tmp_path / "sheet.jpg")).astype(float)
    assert sheet.shape == (4 * (16 + 8) + 4 * (24 + 8) - 8, 4 * (24 + 8) - 8, 3)
    run = prepare(make_config(stages=stages, epochs=3, **ALL))
    index = run.batches.groups(1)[0][0][0]
    run.batches.read([], 2)  # the second stage's second epoch
    sample, top = run.batches.dataset[index], 4 * (16 + 8)
    for left, photo in ((2 * 32, sample["src"]), (3 * 32, sample["tar"])):
        shown = sheet[top : top + 24, left : left + 24]
        assert abs(shown - 255 * photo.permute(1, 2, 0).numpy()).mean() < 8  # JPEG
    plain = PairDataset(read_pairs(pair_files[0]), 24)[index]["src"]
    assert abs(sample["src"] - plain).mean() > 0.02
    monkeypatch.setattr(loop, "train", lambda *args, **others: pytest.fail("it trained"))
    assert main([*call]) == 2 and "--show: shows pairs without training" in capsys.readouterr().err
    assert main([*call[:-1], "sheet.gif", "--dry-run"]) == 2 and "expected a file .jpg or .jpeg" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zoom": 0.0}, "zoom: expected 1 to 16, got 0.0"),
        ({"white_balance_jitter": 9.0}, "white_balance_jitter: expected 0 to 8, got 9.0"),
        ({"mixup": -1.0}, "mixup: expected at least 0, got -1.0"),
        ({"mixup": 1.0, "resize": "fit", "batch_size": 1}, "zoom, mixup: expected resize squash or crop"),
        ({"zoom": 2.0, "stages": [{"epochs": 2, "resize": "fit"}]}, "stages: stage 1: zoom, mixup: expected resize squash"),
    ],
)
def test_rejects_settings(make_config, changes, message):
    with pytest.raises(UserError, match=message):
        check_config(make_config(**changes))
