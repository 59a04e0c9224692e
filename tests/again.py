"""Tests run again in a process and an environment of their own, and checks that are not repeated on what passed them before."""

import functools
import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from autohdr.kernels import OPS

ROOT = Path(__file__).parents[1]
PASSED = ROOT / ".cache" / "passed"  # ignored by git: a clean checkout has none, and leaves no check out
KERNELS = ("csrc", "autohdr/kernels", "tests/kernels", "tests/emulation", "tests/conftest.py", "tests/again.py")


@functools.cache
def versions() -> str:
    """Of what compiles and runs the tests, and the instruction sets that PyTorch takes."""

    def said(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True).stdout
        except OSError:
            return ""

    packages = [f"{name} {getattr(sys.modules.get(name), '__version__', '')}" for name in ("torch", "triton", "numpy")]
    isa = [torch.backends.cpu.get_cpu_capability(), os.environ.get("ONEDNN_MAX_CPU_ISA", "")]
    return repr([platform.python_version(), *packages, *isa, said("g++", "--version"), said("nvcc", "--version")])


def digest(sources: Iterable[str], *more: object) -> str:
    """Of sources (files, or folders with all that they hold), versions, and more."""
    hashed = hashlib.sha256(repr((versions(), more)).encode())
    for source in map(ROOT.joinpath, sources):
        for file in sorted(source.rglob("*")) if source.is_dir() else [source]:
            if file.is_file() and file.suffix not in (".pyc", ".so"):
                hashed.update(f"\n{file.relative_to(ROOT)} {file.stat().st_size}\n".encode() + file.read_bytes())
    return hashed.hexdigest()[:32]


@contextmanager
def unless_passed(sources: Iterable[str], *more: object) -> Iterator[None]:
    """Skips the test where what stands inside has passed before on the same sources, versions and more."""
    passed = PASSED / digest(sources, *more)
    if passed.exists():
        pytest.skip("passed before on the same sources (.cache/passed)")
    yield
    passed.parent.mkdir(parents=True, exist_ok=True)
    passed.touch()


def ops_of(backend: str) -> list:
    """The ops that have the backend, as parameters of a test: some together, since to start a process takes as long as the tests
    of a small op."""
    ops = [op for op in OPS if backend in OPS[op]]
    return [pytest.param(several, id="-".join(several)) for several in (ops[first::4] for first in range(4))]


def run_tests(*arguments: str | Path, env: dict[str, str]) -> None:
    """Passes when these tests do with env on top of this process's."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *map(str, arguments)]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | env
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"exit status {done.returncode}\n{(done.stdout + done.stderr)[-20000:]}"
