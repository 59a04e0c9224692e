"""setup.py's choices, an installation without kernels, and the Makefile's PATH."""

import os
import runpy
import shutil
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
    for release, compiled in (("12.0", False), ("12.8", True), ("12.10", True)):
        monkeypatch.setitem(choose.__globals__, "nvcc_release", lambda release=release: (Path("/cuda"), release))
        assert choose("auto", "12.6", ["a.cu"])[:2] == (True, compiled)
    monkeypatch.setitem(choose.__globals__, "nvcc_release", lambda: (Path("/cuda"), "12.0"))
    with pytest.raises(SystemExit, match="AUTOHDR_BUILD=cuda: nvcc is 12.0, 12.8 or newer is needed"):
        choose("cuda", "12.6", ["a.cu"])
    with pytest.raises(SystemExit, match="AUTOHDR_BUILD: expected auto, cpu, cuda or none, got 'gpu'"):
        choose("gpu", None, [])
    monkeypatch.setitem(choose.__globals__, "nvcc_release", lambda: None)
    with pytest.raises(SystemExit, match="AUTOHDR_BUILD=cuda: no nvcc was found"):
        choose("cuda", "13.0", ["a.cu"])


def test_nvcc_is_looked_for_where_cuda_is_installed(choose, tmp_path, monkeypatch):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 12.9, V12.9.86\n")
    nvcc.chmod(0o755)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name, path=None: str(nvcc) if path == "/usr/local/cuda/bin" else None)
    assert choose.__globals__["nvcc_release"]() == (tmp_path, "12.9")


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_gpu_check_runs_the_python_of_the_user():
    done = subprocess.run(["make", "-s", "gpu-check", "PYTHON=printenv PATH;:"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == os.environ["PATH"]


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
