"""What is handed out: an installation from git without kernels."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
USES_AN_OP = """
import warnings
warnings.filterwarnings("ignore", "autohdr's compiled kernels", RuntimeWarning)
import autohdr, torch
from autohdr.kernels import backends, gdfn
from autohdr.train.config import recipes
x, ones = torch.ones(1, 3, 9, 8), torch.ones
y = gdfn(x, ones(3), ones(3), ones(4, 3, 1, 1), ones(4, 1, 3, 3), ones(3, 2, 1, 1))
print(autohdr.__file__, backends("gdfn")["cpu"], tuple(y.shape), *recipes(), sep="\\n")
"""


def run(command: list, **more) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tracked() -> list[str]:
    """The checkout's files, as a clone has them; a folder of links is followed."""
    done = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout: the tree may hold built files")
    return [name for name in done.stdout.splitlines() if (ROOT / name).exists() and not name.startswith(".")]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A repository of one commit, with what git would take of the checkout now."""
    folder = tmp_path_factory.mktemp("clone") / "autohdr"
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    author = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "--all", "--force"], [*author, "commit", "-q", "--no-verify", "-m", "all"]):
        run(["git", *command], cwd=folder)
    return folder


def use(target: Path, folder: Path) -> list[str]:
    """What an installation outside of any checkout prints: its file, its CPU kernels' state, an output's shape, the recipes."""
    # -S: without the path hooks of the environment's own, editable installation.
    path = os.pathsep.join((str(target), str(Path(torch.__file__).parents[1])))
    lines = run([sys.executable, "-S", "-c", USES_AN_OP], cwd=folder, env=os.environ | {"PYTHONPATH": path}).splitlines()
    assert lines[0] == str(target / "autohdr" / "__init__.py") and lines[2] == "(1, 3, 9, 8)"
    assert sorted(lines[3:]) == sorted(file.stem for file in ROOT.glob("configs/*.toml"))
    return lines


def test_from_git_without_kernels(clone, tmp_path):
    """pip keeps nothing that it would hand out when kernels are asked for."""
    commit = run(["git", "rev-parse", "HEAD"], cwd=clone).strip()
    env = os.environ | {"AUTOHDR_BUILD": "none", "PIP_CACHE_DIR": str(tmp_path / "cache")}
    target, url = tmp_path / "target", f"git+file://{clone}@{commit}#egg=autohdr"
    run([sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--target", target, url], env=env)
    assert not list(target.glob("autohdr/_C*")) and use(target, tmp_path)[1].startswith("not compiled")
    assert not list(tmp_path.glob("cache/**/*.whl"))
    assert not run(["git", "tag"], cwd=clone)  # only pip's own copy was tagged
