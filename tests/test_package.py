"""What is handed out: an installation from git without kernels, the sdist and the wheel made from it, the binary's symbols."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from again import ROOT, unless_passed

from autohdr import _C, _C_arrays

MANYLINUX = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11), "GCC": (8, 0)}  # 2_28: AlmaLinux 8
EXTENSION = sysconfig.get_config_var("EXT_SUFFIX")
BUILD = "import sys, setuptools.build_meta as b; getattr(b, 'build_' + sys.argv[1])(sys.argv[2])"
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
    assert sorted(lines[3:]) == sorted(file.stem for file in ROOT.glob("configs/*.toml") if file.stem != "lite")
    return lines


@pytest.mark.long
def test_from_git_without_kernels(clone, tmp_path):
    """pip keeps nothing that it would hand out when kernels are asked for."""
    commit = run(["git", "rev-parse", "HEAD"], cwd=clone).strip()
    env = os.environ | {"AUTOHDR_BUILD": "none", "PIP_CACHE_DIR": str(tmp_path / "cache")}
    target, url = tmp_path / "target", f"git+file://{clone}@{commit}#egg=autohdr"
    run([sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--target", target, url], env=env)
    assert not list(target.glob("autohdr/_C*")) and use(target, tmp_path)[1].startswith("not compiled")
    assert not list(tmp_path.glob("cache/**/*.whl"))
    assert not run(["git", "tag"], cwd=clone)  # only pip's own copy was tagged


@pytest.fixture(scope="module")
def unpacked(clone, tmp_path_factory):
    """The sdist made of the clone, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    run([sys.executable, "-c", BUILD, "sdist", folder], cwd=clone, env=os.environ | {"AUTOHDR_BUILD": "none"})
    (sdist,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(sdist, folder)
    return folder / sdist.name.removesuffix(".tar.gz")


def installed(unpacked: Path, folder: Path, kernels: str) -> Path:
    """Where the wheel made of the sdist is installed: the whole package, and nothing beside it but the compiled module."""
    compiler = folder / "g++"  # which does not optimise: a quarter of the time
    compiler.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
    compiler.chmod(0o755)
    env = os.environ | {"AUTOHDR_BUILD": kernels, "CXX": str(compiler)}
    run([sys.executable, "-c", BUILD, "wheel", folder], cwd=unpacked, env=env)
    (wheel,) = folder.glob("*.whl")
    target = folder / "target"
    run([sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel])
    held = {str(file.relative_to(target)) for file in target.glob("autohdr/**/*") if file.is_file() and file.suffix != ".pyc"}
    package = {name for name in tracked() if name.startswith("autohdr/") and name != "autohdr/configs"}
    package |= {f"autohdr/{name}" for name in tracked() if name.startswith("configs/")}
    compiled = set() if kernels == "none" else {f"autohdr/{module}{EXTENSION}" for module in ("_C", "_C_arrays")}
    assert held - package == compiled and not package - held
    return target


@pytest.mark.long
def test_the_sdist_has_all_sources(unpacked, tmp_path):
    sources = [name for name in tracked() if name.startswith("csrc/")]
    assert sources and all((unpacked / name).is_file() for name in sources)
    assert use(installed(unpacked, tmp_path, "none"), tmp_path)[1].startswith("not compiled")


@pytest.mark.long
def test_the_wheel_has_kernels_that_run(unpacked, tmp_path):
    with unless_passed(["csrc", "autohdr/kernels", "setup.py", "pyproject.toml", "MANIFEST.in", "tests/test_package.py"]):
        assert use(installed(unpacked, tmp_path, "cpu"), tmp_path)[1] == "available"


def needed(binary: Path) -> set[str]:
    """The symbols that a library takes from others, without their versions."""
    return {line.split()[1].split("@")[0] for line in run(["nm", "-D", "--undefined-only", binary]).splitlines()}


def offered(library: Path) -> dict[str, set[tuple[str, tuple[int, ...]]]]:
    """The versions in which a library has each of its symbols, such as exp: {("GLIBC", (2, 2, 5)), ("GLIBC", (2, 29))}."""
    found = {}
    for name, family, version in re.findall(
        r" (\w+)@+([A-Z]+)_([\d.]+)$", run(["nm", "-D", "--defined-only", library]), re.MULTILINE
    ):
        found.setdefault(name, set()).add((family, tuple(map(int, version.split(".")))))
    return found


@pytest.fixture(scope="module")
def system() -> dict[str, set[tuple[str, tuple[int, ...]]]]:
    names = r"/\S+/(?:libc|libm|libstdc\+\+|libgcc_s|libpthread|libdl|librt|ld-linux-x86-64)\.so[\d.]*$"
    found = {}
    for library in set(re.findall(names, Path("/proc/self/maps").read_text(), re.MULTILINE)):
        for name, versions in offered(library).items():
            found.setdefault(name, set()).update(versions)
    return found


@pytest.mark.skipif(shutil.which("nm") is None, reason="there is no nm")
class TestSymbols:
    """One binary is to serve every torch from 2.11 on, and every Linux from manylinux_2_28 on."""

    shim = set((ROOT / "tests" / "torch_2_11_shim.txt").read_text().splitlines()[1:])
    python = re.compile(r"_?Py[A-Z_]\w*")
    weak = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__", "__cxa_finalize", "cublasGetMathMode"}

    def unknown(self, binary: Path, system) -> set[str]:
        return {n for n in needed(binary) - self.shim - self.weak - set(system) if not self.python.fullmatch(n)}

    def too_new(self, binary: Path, system) -> set[str]:
        """Those that the system's libraries have in no version that is old enough, so that a build on an older one fails."""
        names = needed(binary) & set(system)
        return {n for n in names if not any(version <= MANYLINUX.get(family, ()) for family, version in system[n])}

    def compiled(self, code: str, folder: Path) -> Path:
        (folder / "code.cpp").write_text(code)
        # Not optimised, so that it calls what an optimiser may inline in one program and not in the next.
        run(["g++", "-std=c++17", "-O0", "-fPIC", "-shared", folder / "code.cpp", "-o", folder / "code.so"])
        return folder / "code.so"

    def test_nothing_of_torch_but_the_stable_abi_of_2_11(self, system):
        assert self.shim & needed(_C.__file__) and not self.shim & needed(_C_arrays.__file__)
        assert not self.unknown(_C.__file__, system) | self.unknown(_C_arrays.__file__, system)

    def test_nothing_newer_than_manylinux(self, system, tmp_path):
        """But for what the compiler's own headers bring, of which manylinux's compiler links its own copies."""
        headers = """
            #include <exception>
            #include <memory>
            #include <sstream>
            #include <string>
            #include <vector>
            std::string own(const std::shared_ptr<int>& p, std::vector<std::exception_ptr>& errors, const char* text) {
              std::shared_ptr<int> copy = p;
              std::ostringstream out;
              std::stringstream both;
              both << text << out.str() << *copy << std::stoi(text);
              std::exception_ptr error = std::current_exception(), again = error;
              errors.push_back(again);
              return both.str();
            }"""
        own = self.too_new(self.compiled(headers, tmp_path), system)
        assert self.too_new(_C.__file__, system) | self.too_new(_C_arrays.__file__, system) <= own

    def test_what_is_unknown_or_too_new_is_found(self, system, tmp_path):
        code = """
            #include <filesystem>
            namespace c10 { int of_torch(); }
            int both() { return std::filesystem::current_path().empty() + c10::of_torch(); }"""
        binary = self.compiled(code, tmp_path)
        assert self.unknown(binary, system) == {"_ZN3c108of_torchEv"}
        assert any("filesystem" in name for name in self.too_new(binary, system))
