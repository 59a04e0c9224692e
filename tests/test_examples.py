"""The examples, as a user starts them, at a small size: what they print is what they claim."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autohdr.models import create_model, save_weights

ROOT = Path(__file__).parents[1]


def run(name, *arguments, folder, status=0):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::UserWarning", str(ROOT / "examples" / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == status, done.stderr
    return done.stdout + done.stderr


def numbers(pattern, text):
    return [float(value) for value in re.search(pattern, text).groups()]


def test_op_with_autograd(tmp_path):
    printed = run("op_with_autograd.py", "--channels", 8, "--side", 16, folder=tmp_path)
    errors = [float(error) for error in re.findall(r"^\w+ +(\d\.\de[-+]\d+)$", printed, re.M)]
    assert len(errors) == 8 and max(errors) < 1e-3 and "\nright\n" in printed
    before, after = numbers(r"loss ([\d.]+), after one step ([\d.]+)", printed)
    assert after < before


def test_own_training_loop(tmp_path):
    sizes = "--rooms", 8, "--side", 32, "--steps", 30
    printed = run("own_training_loop.py", *sizes, "--out", tmp_path / "own.safetensors", folder=tmp_path)
    losses = [float(loss) for loss in re.findall(r"L1 ([\d.]+)", printed)]
    assert len(losses) == 5 and losses[-1] < 0.6 * losses[0]
    unedited, edited = numbers(r"unedited ([\d.]+) dB, edited ([\d.]+) dB", printed)
    assert edited > unedited + 3
    saved, measured = numbers(r"restormer_nano, ([\d.]+) dB, measured ([\d.]+) dB", printed)
    assert saved == measured == edited


def test_enhance_a_rendered_room(tmp_path):
    printed = run("enhance_from_python.py", "--out", tmp_path, "--height", 48, "--width", 64, folder=tmp_path)
    assert "rendered_room.png: 64 x 48, PNG of 8 bits" in printed
    before, after = numbers(r"mean ([\d.]+) before, ([\d.]+) after", printed)
    pictures = [
        np.asarray(Image.open(path)) / 255 for path in (tmp_path / "rendered_room.png", tmp_path / "enhanced/rendered_room.png")
    ]
    assert after > before
    assert [picture.mean() for picture in pictures] == [pytest.approx(before, abs=2e-3), pytest.approx(after, abs=2e-3)]


def test_enhance_with_a_checkpoint(tmp_path):
    torch.manual_seed(0)
    save_weights(tmp_path / "m.safetensors", create_model("restormer_nano", dim=8), {})
    Image.fromarray(np.full((20, 30, 3), 90, np.uint8)).save(tmp_path / "grey.jpg")
    arguments = tmp_path / "grey.jpg", "--checkpoint", tmp_path / "m.safetensors", "--out", tmp_path / "out"
    printed = run("enhance_from_python.py", *arguments, folder=tmp_path)
    assert "grey.jpg: 30 x 20, JPEG of 8 bits" in printed
    (mean,) = numbers(r"8 bits, mean ([\d.]+)", printed)
    before, after = numbers(r"mean ([\d.]+) before, ([\d.]+) after", printed)
    assert before == pytest.approx(90 / 255, abs=1e-3) and mean == pytest.approx(after, abs=5e-3) and after != before


def test_enhance_says_what_is_wrong_without_a_traceback(tmp_path):
    printed = run("enhance_from_python.py", "absent.jpg", folder=tmp_path, status=1)
    assert "absent.jpg: expected a photo" in printed and "Traceback" not in printed


def test_every_example_is_tested_and_named_in_the_readme():
    examples, readme = sorted(path.name for path in ROOT.glob("examples/*.py")), (ROOT / "README.md").read_text("utf-8")
    assert examples == ["enhance_from_python.py", "op_with_autograd.py", "own_training_loop.py"]
    assert all(f"examples/{name}" in readme for name in examples)
