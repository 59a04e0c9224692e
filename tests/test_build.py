"""setup.py's choices, what it says of tools that are missing or broken, and the Makefile's PATH."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parents[1]
RELEASE = "#!/bin/sh\necho Cuda compilation tools, release 13.0, V13.0.88\n"


@pytest.fixture
def setup_py(monkeypatch):
    """setup.py's names, from a run of it that builds nothing and finds nothing to remove."""
    with monkeypatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **_: None)
        patch.setattr(Path, "glob", lambda *_: iter(()))
        patch.setenv("AUTOHDR_BUILD", "none")
        names = runpy.run_path(str(ROOT / "setup.py"))
    return names["choose"].__globals__


@pytest.fixture
def choose(setup_py):
    return setup_py["choose"]


def program(path: Path, text: str, mode: int = 0o755) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode("latin1"))
    path.chmod(mode)
    return path


def test_the_choices(choose, setup_py, monkeypatch):
    def release(number: str):
        monkeypatch.setitem(setup_py, "nvcc_release", lambda: (Path("/cuda"), number))

    release("13.0")
    assert choose("none", "13.0", ["a.cu"])[:2] == (False, False)
    assert choose("cpu", "13.0", ["a.cu"])[:2] == (True, False)
    assert choose("auto", "13.0", ["a.cu"])[:2] == (True, True)
    assert choose("auto", None, ["a.cu"]) == (True, False, "CPU kernels; no CUDA kernels: torch was built without CUDA")
    assert choose("cuda", None, ["a.cu"])[:2] == (True, True)  # compiles beside a CPU-only torch too
    assert "nvcc is 13.0, torch was built with CUDA 12.8" in choose("auto", "12.8", ["a.cu"])[2]
    for number, compiled in (("12.0", False), ("12.8", True), ("12.10", True)):
        release(number)
        assert choose("auto", "12.6", ["a.cu"])[:2] == (True, compiled)
    release("12.0")
    with pytest.raises(SystemExit, match="AUTOHDR_BUILD=cuda: nvcc is 12.0, 12.8 or newer is needed"):
        choose("cuda", "12.6", ["a.cu"])
    with pytest.raises(SystemExit, match="AUTOHDR_BUILD: expected auto, cpu, cuda or none, got 'gpu'"):
        choose("gpu", None, [])


@pytest.mark.parametrize(
    ("nvcc", "said"),
    {
        "fails": ("#!/bin/sh\nexit 1\n", "nvcc fails: it says nothing"),
        "is killed": ("#!/bin/sh\nkill -9 $$\n", "nvcc fails: it says nothing"),
        "is no program": ("\x7fELF garbage", "nvcc does not run: Exec format error"),
        "is a script for nothing": ("#!/no/such/shell\n", "nvcc does not run: No such file or directory"),
        "hangs": ("#!/bin/sh\nsleep 9\n", "nvcc did not answer within 0.2 s"),
        "prints nothing": ("#!/bin/sh\n", "nvcc --version names no release"),
        "prints bytes": ("#!/bin/sh\necho '\xff\xfe release x.y'\n", "nvcc --version names no release"),
        "knows its version alone": (
            RELEASE + "[ $1 = --version ] && exit\necho 'error -- unsupported GNU version!' >&2\necho 1 error >&2\nexit 1\n",
            "nvcc fails: error -- unsupported GNU version!",
        ),
    }.values(),
)
def test_a_broken_nvcc_costs_the_cuda_kernels_alone(choose, setup_py, nvcc, said, tmp_path, monkeypatch):
    program(tmp_path / "bin" / "nvcc", nvcc)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    if said.endswith("within 0.2 s"):
        monkeypatch.setitem(setup_py, "ANSWERS_WITHIN", 0.2)
    assert choose("auto", "13.0", ["a.cu"]) == (True, False, f"CPU kernels; no CUDA kernels: {tmp_path}/bin/{said}")
    with pytest.raises(SystemExit) as stop:
        choose("cuda", "13.0", ["a.cu"])
    assert stop.value.code == f"AUTOHDR_BUILD=cuda: {tmp_path}/bin/{said}"


@pytest.mark.parametrize("home", ["empty", "file", "link", "folder", "locked"])
def test_a_cuda_home_without_an_nvcc(choose, home, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder" / "bin" / "nvcc").mkdir(parents=True)
    program(tmp_path / "locked" / "bin" / "nvcc", RELEASE, 0o644)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / home))
    cpu, cuda, said = choose("auto", "13.0", ["a.cu"])
    assert cpu and not cuda and f"{tmp_path / home}/bin/nvcc does not run: " in said


def test_nvcc_is_looked_for_where_cuda_is_installed(choose, setup_py, tmp_path, monkeypatch):
    nvcc = program(tmp_path / "bin" / "nvcc", RELEASE)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name, path=None: str(nvcc) if path == "/usr/local/cuda/bin" else None)
    assert setup_py["nvcc_release"]() == (tmp_path, "13.0")
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    with pytest.raises(SystemExit, match="AUTOHDR_BUILD=cuda: no nvcc was found"):
        choose("cuda", "13.0", ["a.cu"])


def stopped(folder: Path, **env) -> str:
    """The one line with which a copy of setup.py ends a build."""
    shutil.copy(ROOT / "setup.py", folder)
    env = os.environ | {"AUTOHDR_BUILD": "cpu", "PYTHONPATH": str(folder)} | env
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_a_torch_that_cannot_serve_is_named(tmp_path):
    for code, said in (
        ("import nothing_of_that_name", "autohdr: PyTorch is installed, but does not import: No module named"),
        ("raise OSError('libcudart.so.13: not found')", "autohdr: PyTorch is installed, but does not import: libcudart.so.13"),
        ("__version__ = '2.8.0+cpu'", "autohdr: torch is 2.8.0+cpu, 2.11 or newer is needed"),
        (
            "raise ModuleNotFoundError(name='torch')",
            "autohdr compiles its kernels against your PyTorch: install torch >= 2.11 first",
        ),
    ):
        (tmp_path / "torch.py").write_text(code)
        assert stopped(tmp_path).startswith(said)


def test_a_compiler_that_cannot_serve_is_named(tmp_path):
    torch = "__version__ = '2.13.0'\n"
    (tmp_path / "torch.py").write_text(torch)
    needs = "autohdr needs g++ and Python's headers to compile its kernels: "
    assert stopped(tmp_path, CXX="/no/g++").startswith(needs + "/no/g++ does not run: No such file or directory")
    failing = program(tmp_path / "g++", "#!/bin/sh\necho fatal error: Python.h: No such file >&2\nexit 1\n")
    assert stopped(tmp_path, CXX=str(failing)).startswith(f"{needs}{failing} fails: fatal error: Python.h: No such file")


def test_a_build_that_fails_ends_in_one_line(tmp_path):
    """Here because ninja does, which stands for a compiler that does."""
    program(tmp_path / "ninja", "#!/bin/sh\n[ $1 = --version ] && echo 1.11\n")
    path = os.pathsep.join((str(tmp_path), os.environ["PATH"]))
    assert stopped(tmp_path, PATH=path).startswith("autohdr: the kernels did not compile (")


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_gpu_check_runs_the_python_of_the_user():
    done = subprocess.run(["make", "-s", "gpu-check", "PYTHON=printenv PATH;:"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == os.environ["PATH"]
