"""The examples, as a user starts them, at a small size: what they print is what they claim."""

import hashlib
import json
import os
import re
import subprocess
import sys
import time
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


@pytest.mark.drill
def test_a_ray_cluster_that_loses_a_node_does_every_photo_once(tmp_path):
    """Two nodes on this machine, of which one is killed once a result is there; then the same call again has nothing to do."""
    cluster_utils = pytest.importorskip("ray.cluster_utils", reason="needs ray[data]")
    for number in range(40):
        level = 40 + 4 * number
        path = tmp_path / f"in/{number % 2}/{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((900, 1200, 3), (level, level - 9, level - 20), np.uint8)).save(path)
    (tmp_path / "in/damaged.jpg").write_bytes(path.read_bytes()[:5000])
    nodes = {"num_cpus": 1, "object_store_memory": 80 << 20}
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=nodes)
    other = cluster.add_node(**nodes)
    environment = os.environ | {"RAY_ADDRESS": cluster.address, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "examples/ray_enhance.py", tmp_path / "in", "--out", tmp_path / "out"]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    try:
        with subprocess.Popen(command, env=environment, **output) as running:
            while running.poll() is None and not list(tmp_path.glob("out/*/*.jpg")):
                time.sleep(0.1)
            cluster.remove_node(other, allow_graceful=False)
            assert running.poll() is None
            printed = running.communicate(timeout=400)[0]
        assert running.returncode == 1 and printed.splitlines()[-1].endswith("out: 40 written, 1 failed"), printed
        assert f"failed {tmp_path / 'in/damaged.jpg'}: the JPEG is damaged" in printed
        lines = [json.loads(line) for line in (tmp_path / "out/autohdr.jsonl").read_text().splitlines()]
        assert len({line["source"] for line in lines}) == len({line["result"] for line in lines}) == len(lines) == 41
        written = {line["result"]: line["result_sha256"] for line in lines if line["status"] == "written"}
        files = {str(path.relative_to(tmp_path / "out")): path for path in (tmp_path / "out").rglob("*.jpg")}
        assert {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()} == written
        (tmp_path / "in/damaged.jpg").unlink()
        refused = subprocess.run([*command[:-1], tmp_path / "in/"], env=environment, timeout=400, **output)
        assert refused.returncode == 1 and "ray_enhance: expected another place for the results" in refused.stdout
        times = {path: path.stat().st_mtime_ns for path in files.values()}
        again = subprocess.run(command, env=environment, timeout=400, **output)
        assert again.returncode == 0 and again.stdout.splitlines()[-1].endswith("out: 40 written, 0 failed"), again.stdout
        assert {path: path.stat().st_mtime_ns for path in files.values()} == times
    finally:
        cluster.shutdown()


def test_every_example_is_tested_and_named_in_the_readme():
    examples, readme = sorted(path.name for path in ROOT.glob("examples/*.py")), (ROOT / "README.md").read_text("utf-8")
    assert examples == ["enhance_from_python.py", "op_with_autograd.py", "own_training_loop.py", "ray_enhance.py"]
    assert all(f"examples/{name}" in readme for name in examples)
