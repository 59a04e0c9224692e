"""setup.py's choices, and an installation without kernels."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import torch

ROOT = Path(__file__).parents[1]
WITHOUT = os.environ | {"AUTOHDR_BUILD": "none"}


@pytest.fixture(scope="module")
def choose():
    """setup.py's function, from a run of setup.py that builds nothing and finds nothing to remove."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **_: None)
        patch.setattr(Path, "glob", lambda *_: iter(()))
        patch.setenv("AUTOHDR_BUILD", "none")
        return runpy.run_path(str(ROOT / "setup.py"))["choose"]


def test_the_choices(choose, monkeypatch):
    monkeypatch.setitem(choose.__globals__, "nvcc_release", lambda: (Path("/cuda"), "13.0"))
    assert choose("none", "13.0", ["a.cu"])[:2] == (False, False)
    assert choose("cpu", "13.0", ["a.cu"])[:2] == (True, False)
    assert choose("auto", "13.0", ["a.cu"])[:2] == (True, True)
    assert choose("auto", None, ["a.cu"]) == (True, False, "CPU kernels; no CUDA kernels: torch was built without CUDA")
    assert choose("cuda", None, ["a.cu"])[:2] == (True, True)  # compiles beside a CPU-only torch too
    assert "nvcc is 13.0, torch was built with CUDA 12.8" in choose("auto", "12.8", ["a.cu"])[2]
    with pytest.raises(SystemExit, match="AUTOHDR_BUILD: expected auto, cpu, cuda or none, got 'gpu'"):
        choose("gpu", None, [])
    monkeypatch.setitem(choose.__globals__, "nvcc_release", lambda: None)
    with pytest.raises(SystemExit, match="AUTOHDR_BUILD=cuda: no nvcc was found"):
        choose("cuda", "13.0", ["a.cu"])


def test_an_installation_without_kernels(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip("not a git checkout: the tree may hold built files")
    for name in files.stdout.splitlines():
        file = ROOT / name
        if name.startswith(("autohdr/", "configs/")) or "/" not in name:
            if file.is_file():
                (source / name).parent.mkdir(parents=True, exist_ok=True)
                (source / name).write_bytes(file.read_bytes())
    (source / "autohdr" / "configs").symlink_to("../configs")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", target, source]
    subprocess.run(pip, env=WITHOUT, check=True)
    assert not list(target.glob("autohdr/_C*"))
    code = (
        "import autohdr, torch\n"
        "print(autohdr.__file__)\n"
        "print(autohdr.create_model('restormer_nano')(torch.zeros(1, 3, 9, 8)).shape)"
    )
    # -S: without the path hooks of the environment's own, editable installation.
    path = os.pathsep.join((str(target), str(Path(torch.__file__).parents[1])))
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [str(target / "autohdr" / "__init__.py"), "torch.Size([1, 3, 9, 8])"]
    assert done.stderr.count("autohdr's compiled kernels are not available: not compiled into this installation") == 1
    assert (target / "autohdr" / "configs" / "restormer_384.toml").is_file()
