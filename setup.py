"""Build policy: which kernels to compile. Everything else is in pyproject.toml.

AUTOHDR_BUILD=auto|cpu|cuda|none   auto (the default): the CPU kernels, and the CUDA kernels iff torch was built with CUDA and an
                                   nvcc of the same major version, 12.8 or newer, is there. Never asks whether a GPU is present.
TORCH_CUDA_ARCH_LIST               narrows the GPU architectures, as for any PyTorch extension.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent
ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0+PTX"
ANSWERS_WITHIN = 30  # seconds that a compiler may take over a line of code; one on a network drive can hang


def output_of(command: list[str]) -> str:
    """What a program prints.

    Raises:
        LookupError: it does not run, does not answer, or fails; why, in one line.
    """
    name = command[0]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=ANSWERS_WITHIN
        )
    except OSError as error:
        raise LookupError(f"{name} does not run: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise LookupError(f"{name} did not answer within {ANSWERS_WITHIN} s") from None
    lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("#")] or ["it says nothing"]
    if done.returncode:
        raise LookupError(f"{name} fails: {next((line for line in lines if 'error' in line), lines[-1]).strip()}")
    return done.stdout + done.stderr


def nvcc_release() -> tuple[Path, str]:
    """CUDA's root folder and nvcc's release, such as 13.0.

    Raises:
        LookupError: there is no nvcc, or none that compiles; why, in one line.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = str(Path(home, "bin", "nvcc")) if home else shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if not nvcc:
        raise LookupError("no nvcc was found (set CUDA_HOME)")
    release = re.search(r"release (\d+\.\d+)", output_of([nvcc, "--version"]))
    if not release:
        raise LookupError(f"{nvcc} --version names no release")
    with tempfile.TemporaryDirectory() as folder:  # an nvcc that knows its version may still lack headers, or refuse this g++
        said = output_of([nvcc, "-v", "-x", "cu", "-c", "/dev/null", "-o", f"{folder}/nothing.o"])
    if not home:  # nvcc may be a script that starts the real one: the compiler itself says where it lies
        top = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
        home = top.group(1).strip() if top else Path(nvcc).resolve().parent.parent
    return Path(home).resolve(), release.group(1)


def choose(build: str, torch_cuda: str | None, cuda_sources: list[str]) -> tuple[bool, bool, str]:
    """(compile the CPU kernels, compile the CUDA kernels, what to tell the user)."""
    if build not in ("auto", "cpu", "cuda", "none"):
        raise SystemExit(f"AUTOHDR_BUILD: expected auto, cpu, cuda or none, got {build!r}")
    if build == "none":
        return False, False, "no kernels (AUTOHDR_BUILD=none): the reference backend will be used"
    if build == "cpu":
        return True, False, "CPU kernels (AUTOHDR_BUILD=cpu)"
    try:
        if not cuda_sources:
            raise LookupError("this version has no CUDA kernels")
        if build == "auto" and torch_cuda is None:
            raise LookupError("torch was built without CUDA")
        release = nvcc_release()[1]
        if torch_cuda is not None and release.split(".")[0] != torch_cuda.split(".")[0]:
            raise LookupError(f"nvcc is {release}, torch was built with CUDA {torch_cuda}")
        if tuple(map(int, release.split("."))) < (12, 8):  # knows no 10.0
            raise LookupError(f"nvcc is {release}, 12.8 or newer is needed")
    except LookupError as missing:
        if build == "cuda":
            raise SystemExit(f"AUTOHDR_BUILD=cuda: {missing}") from None
        return True, False, f"CPU kernels; no CUDA kernels: {missing}"
    return True, True, f"CPU kernels and CUDA kernels with nvcc {release}"


def keep_out_of_pips_cache() -> None:
    """pip keeps a wheel built from a git URL that names a commit, and hands it out for the same commit whatever AUTOHDR_BUILD and
    the compilers have become. It keeps none of a tag, which may move: so tag the clone, which pip has made for this build alone,
    with the commit's own name."""
    if (ROOT / ".git").exists() and any(part.startswith("pip-install-") for part in ROOT.resolve().parts):
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        subprocess.run(["git", "tag", "--force", commit], cwd=ROOT, capture_output=True)


def check_tools() -> None:
    """Ends the build in one line where PyTorch or the C++ compiler can't serve it."""
    without = "AUTOHDR_BUILD=none installs without kernels."
    try:
        import torch
    except (ImportError, OSError, RuntimeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "torch":
            raise SystemExit(
                "autohdr compiles its kernels against your PyTorch: install torch >= 2.11 first, then build with"
                f" pip install --no-build-isolation. {without}"
            ) from None
        raise SystemExit(f"autohdr: PyTorch is installed, but does not import: {error}. {without}") from None
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < (2, 11):
        raise SystemExit(f"autohdr: torch is {torch.__version__}, 2.11 or newer is needed. {without}")
    try:
        import pybind11  # noqa: F401
    except ImportError as error:
        raise SystemExit(f"autohdr: {error}: pip install pybind11 ninja. {without}") from None
    try:
        # torch compiles with the first, setuptools links with the second.
        for compiler in {os.environ.get("CXX") or "c++", os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "g++"}:
            with tempfile.TemporaryDirectory() as folder:
                source = Path(folder, "nothing.cpp")
                source.write_text("#include <Python.h>\n#include <vector>\n")
                flags = ["-std=c++17", "-fPIC", "-shared", f"-I{sysconfig.get_path('include')}"]
                output_of([*shlex.split(compiler), *flags, str(source), "-o", f"{folder}/nothing.so"])
    except LookupError as error:
        raise SystemExit(f"autohdr needs g++ and Python's headers to compile its kernels: {error}. {without}") from None


def extension() -> tuple[list, dict]:
    keep_out_of_pips_cache()
    build = os.environ.get("AUTOHDR_BUILD", "auto")
    if build == "none":
        print("autohdr:", choose(build, None, [])[2])
        for built in ROOT.glob("autohdr/_C*.so"):  # an earlier editable installation's would be loaded all the same
            built.unlink()
        return [], {}
    check_tools()
    import pybind11
    import torch

    cuda_sources = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.cu"))
    cpu, cuda, message = choose(build, torch.version.cuda, cuda_sources)
    print("autohdr:", message)
    cuda_home, release = nvcc_release() if cuda else (None, "none")
    from torch.utils import cpp_extension

    class Build(cpp_extension.BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            # An editable installation would drop its objects: with them, the next one compiles only what has changed.
            self.build_temp = f"build/temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"

        def build_extensions(self):
            try:
                super().build_extensions()
            except (RuntimeError, OSError) as error:
                raise SystemExit(
                    f"autohdr: the kernels did not compile ({error}); what the compiler said stands above."
                    " AUTOHDR_BUILD=none installs without kernels."
                ) from None

    if cuda:
        cpp_extension.CUDA_HOME = str(cuda_home)  # None where torch was built without CUDA
    architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES) if cuda else "none"

    def find(pattern: str) -> list[str]:
        return sorted(str(p.relative_to(ROOT)) for p in ROOT.glob(f"csrc/**/{pattern}"))

    sources = [
        "csrc/module.cpp",
        "csrc/common/cpu_isa.cpp",
        *find("*_cpu.cpp"),
        *(find("*_cuda.cpp") + cuda_sources if cuda else []),
    ]
    macros = [
        ("TORCH_TARGET_VERSION", "0x020b000000000000"),  # one binary for every torch from 2.11 on
        ("AUTOHDR_TORCH_VERSION", torch.__version__),
        ("AUTOHDR_CUDA_VERSION", release),
        ("AUTOHDR_CUDA_ARCHITECTURES", architectures.replace(";", " ")),
    ]
    # Error messages name source files: by their place in csrc, not on the machine that built.
    prefix = f"-fmacro-prefix-map={ROOT / 'csrc'}/="
    flags = [prefix, "-O3", "-std=c++17", "-g0", "-fvisibility=hidden", "-Wall", "-Wno-psabi", "-Wno-unknown-pragmas"]
    # Not CUDAExtension, which links torch's CUDA libraries: the kernels need CUDA's runtime alone, and fit a torch without them.
    module = cpp_extension.CppExtension(
        "autohdr._C",
        sources,
        include_dirs=[str(ROOT / "csrc"), pybind11.get_include(), *([str(cuda_home / "include")] if cuda else [])],
        library_dirs=[str(cuda_home / "lib64")] if cuda else [],
        libraries=["cudart_static", "dl", "rt", "pthread"] if cuda else [],
        define_macros=macros,
        extra_compile_args={"cxx": flags, "nvcc": ["-O3", "-std=c++17"]} if cuda else flags,
        # Without --no-as-needed the linker drops libtorch, whose stream functions are weak symbols of the stable ABI.
        extra_link_args=["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"] if os.uname().sysname == "Linux" else [],
    )
    arrays = Extension(
        "autohdr._C_arrays",
        ["csrc/apply_edit/apply_edit_arrays.cpp", "csrc/common/cpu_isa.cpp"],
        include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],
        extra_compile_args=[*flags, "-pthread"],
        extra_link_args=["-pthread"],
    )
    return [module, arrays], {"build_ext": Build}


modules, commands = extension()
setup(ext_modules=modules, cmdclass=commands)
