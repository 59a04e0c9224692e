import json
import math

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from autohdr.errors import UserError
from autohdr.train import record

HISTORY = [{"epoch": e, "train_l1": 0.2 / e, "val_l1": 0.3 / e, "val_psnr": 14.0 + e, "val_ssim": 0.5} for e in (1, 2)]


def test_curve(tmp_path):
    for epochs in (1, 2):
        record.draw_curve(tmp_path / "curve.png", HISTORY[:epochs])
        with Image.open(tmp_path / "curve.png") as curve:
            assert curve.convert("L").getextrema()[0] < 100


def test_curve_shows_components_where_l1_is_not_all(tmp_path):
    sizes = []
    for more in ({"train_loss": 0.3}, {"train_loss": 0.3, "train_edge": 0.1}):
        record.draw_curve(tmp_path / "curve.png", [row | more for row in HISTORY])
        with Image.open(tmp_path / "curve.png") as curve:
            sizes.append(curve.size)
    assert sizes == [(1320, 396), (1760, 396)]


def test_the_curve_of_a_loss_below_zero_is_linear(tmp_path, monkeypatch):
    """As the adversarial one; before its start there is none."""
    scales = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **others: scales.append(figure.axes[-1].get_yscale()))
    for value in (0.1, math.nan, -0.1):
        record.draw_curve(tmp_path / "curve.png", [row | {"train_loss": 0.3, "train_adversarial": value} for row in HISTORY])
    assert scales == ["log", "log", "linear"]


def test_csv(tmp_path):
    record.write_csv(tmp_path / "log.csv", HISTORY)
    lines = (tmp_path / "log.csv").read_text().splitlines()
    assert lines == ["epoch,train_l1,val_l1,val_psnr,val_ssim", "1,0.2,0.3,15.0,0.5", "2,0.1,0.15,16.0,0.5"]


def test_a_number_that_is_not_finite_is_null_in_the_log(tmp_path):
    record.append_lines(tmp_path / "log.jsonl", [{"kind": "epoch", "val_psnr": math.inf, "grad_norm": math.nan, "lr": 0.5}])
    assert (tmp_path / "log.jsonl").read_text() == '{"kind": "epoch", "val_psnr": null, "grad_norm": null, "lr": 0.5}\n'


def test_rewind_drops_later_and_broken_lines(tmp_path):
    log = tmp_path / "log.jsonl"
    for step in (1, 2, 3):
        record.append_lines(log, [{"step": step}])
    with open(log, "a") as file:
        file.write('{"step": 2')
    record.rewind(log, 2)
    assert [json.loads(line) for line in log.read_text().splitlines()] == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize(
    "line", [b"a note", b"[2]", b"2", b'{"loss": 1}', b'{"step": "2"}', b'{"step": null}', b"\xff\xfe", b"\0\0"]
)
def test_rewind_refuses_what_is_no_log(tmp_path, line):
    """In its midst; at the end, with no line feed after it, it is what a crash cut short."""
    log = tmp_path / "log.jsonl"
    log.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"log.jsonl:2: expected a run's log, objects with a step, got"):
        record.rewind(log, 2)
    assert log.read_bytes() == b'{"step": 1}\n' + line + b'\n{"step": 3}\n'
    log.write_bytes(b'{"step": 1}\n' + line)
    record.rewind(log, 2)
    assert log.read_bytes() == b'{"step": 1}\n'


def test_rewind_keeps_a_last_line_without_line_feed_and_makes_a_missing_log(tmp_path):
    log = tmp_path / "log.jsonl"
    record.rewind(log, 1)
    assert log.read_bytes() == b""
    log.write_bytes(b'{"step": 1}\n\n{"step": 2, "name": "\xc3\xa4"}')
    record.rewind(log, 2)
    assert log.read_bytes() == b'{"step": 1}\n{"step": 2, "name": "\xc3\xa4"}\n'


def test_triptychs_of_different_sizes(tmp_path):
    """A row for each pair: its three pictures from the left, a gap of white between."""
    colours = [torch.tensor(rgb).view(3, 1, 1) for rgb in ((1.0, 0, 0), (0, 1.0, 0), (0, 0, 1.0))]
    rows = [tuple(colour.expand(3, 32, width) for colour in colours) for width in (48, 32)]
    record.write_sheet(tmp_path / "sheet.jpg", rows, gap=8)
    sheet = Image.open(tmp_path / "sheet.jpg")
    assert sheet.size == (3 * 48 + 2 * 8, 32 + 8 + 32)
    for x, y, expected in ((24, 16, (255, 0, 0)), (80, 16, (0, 255, 0)), (136, 16, (0, 0, 255)), (96, 56, (0, 0, 255))):
        assert max(abs(a - b) for a, b in zip(sheet.getpixel((x, y)), expected, strict=True)) < 8
    assert min(sheet.getpixel((150, 60))) > 247
