"""The verb quantize: writes a checkpoint in 8 bits with its figures, or refuses it with them."""

import re
import shutil

import pytest
import torch
from PIL import Image

from autohdr.cli import main
from autohdr.demo import SAMPLES
from autohdr.edits import SHIPPED
from autohdr.models import create_model, load_checkpoint, save_weights


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    save_weights(tmp_path / "float.safetensors", create_model("restormer_nano"), {"trained_on": ["1f"]})
    return tmp_path / "float.safetensors"


@pytest.fixture
def pairs(tmp_path):
    """The sample photos, small, in a folder of their own."""
    (tmp_path / "photos").mkdir()
    for file in SAMPLES.parent.glob("*.jpg"):
        with Image.open(file) as photo:
            photo.resize((96, 64)).save(tmp_path / "photos" / file.name)
    return shutil.copy(SAMPLES, tmp_path / "photos")


@pytest.fixture
def run(checkpoint, pairs, tmp_path):
    def run(*words, of=checkpoint, photos="photos", out="coded.safetensors"):
        options = "--calibrate", tmp_path / photos, "--pairs", pairs, "--out", tmp_path / out
        return main(["quantize", *map(str, (of, *options, *words))])

    return run


def test_writes_a_checkpoint(run, tmp_path, capsys):
    assert run() == 0
    before, after, loss = capsys.readouterr().out.splitlines()
    figures = r"([\d.]+) dB PSNR, [\d.]+ s a pair, ([\d.]+) MB"
    psnr, size = re.fullmatch(f"float32: {figures}", before).groups()
    coded_psnr, coded_size = re.fullmatch(f"8 bits:  {figures}", after).groups()
    assert float(coded_size) < float(size) and abs(float(psnr) - float(coded_psnr)) < 0.05
    assert re.fullmatch(r"loses -?0\.0\d\d ± \d\.\d{3} dB", loss)
    model = load_checkpoint(tmp_path / "coded.safetensors")
    assert model.config.int8 and model.metadata == {"trained_on": ["1f"]}


def test_a_checkpoint_may_take_its_own_place(run, checkpoint, capsys):
    size = f"{checkpoint.stat().st_size / 1e6:.2f} MB"
    assert run(out=checkpoint.name) == 0 and load_checkpoint(checkpoint).config.int8
    before, after, _ = capsys.readouterr().out.splitlines()
    assert before.endswith(size) and not after.endswith(size)


def test_refuses_what_loses_more(run, tmp_path, capsys):
    assert run("--most-loss=-1") == 2 and not (tmp_path / "coded.safetensors").exists()
    said = capsys.readouterr().err
    figures = r"8 bits lose -?0\.\d{3} ± \d\.\d{3} dB on 2 pairs, -1 are allowed: [\d.]+ dB PSNR become [\d.]+"
    assert re.search(f"coded.safetensors: not written: {figures}", said)


@pytest.mark.parametrize(
    ("out", "message"), [("model.onnx", "ends in .safetensors"), ("none/q.safetensors", "a folder that exists")]
)
def test_refuses_another_file(run, capsys, out, message):
    assert run(out=out) == 2
    assert re.search(f"--out: expected a file .*{message}", capsys.readouterr().err)


def test_refuses_a_folder_without_photos(run, capsys):
    assert run(photos="empty") == 2
    assert "expected at least one photo to calibrate with, got none" in capsys.readouterr().err


def test_refuses_another_model(run, capsys):
    assert run(of=SHIPPED) == 2
    assert "8 bits: expected a Restormer in floats, got lite" in capsys.readouterr().err
