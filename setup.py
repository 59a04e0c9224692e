"""Build policy: which kernels to compile. Everything else is in pyproject.toml.

AUTOHDR_BUILD=auto|cpu|cuda|none   auto (the default): the CPU kernels, and the CUDA kernels iff torch was built with CUDA and an
                                   nvcc of the same major version, 12.8 or newer, is there. Never asks whether a GPU is present.
TORCH_CUDA_ARCH_LIST               narrows the GPU architectures, as for any PyTorch extension.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0+PTX"


def nvcc_release() -> tuple[Path, str] | None:
    """CUDA's root folder and nvcc's release, such as 13.0."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = Path(home) / "bin" / "nvcc" if home else shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if not nvcc or not Path(nvcc).exists():
        return None
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+\.\d+)", text)
    if not release:
        return None
    if not home:  # nvcc may be a script that starts the real one: the compiler itself says where it lies
        dryrun = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
        top = re.search(r"^#\$ TOP=(.+)$", dryrun, re.MULTILINE)
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
    missing = ""
    nvcc = nvcc_release()
    if nvcc is None:
        missing = "no nvcc was found (set CUDA_HOME)"
    elif not cuda_sources:
        missing = "this version has no CUDA kernels"
    elif build == "auto" and torch_cuda is None:
        missing = "torch was built without CUDA"
    elif torch_cuda is not None and nvcc[1].split(".")[0] != torch_cuda.split(".")[0]:
        missing = f"nvcc is {nvcc[1]}, torch was built with CUDA {torch_cuda}"
    elif tuple(map(int, nvcc[1].split("."))) < (12, 8):  # knows no 10.0
        missing = f"nvcc is {nvcc[1]}, 12.8 or newer is needed"
    if missing and build == "cuda":
        raise SystemExit(f"AUTOHDR_BUILD=cuda: {missing}")
    if missing:
        return True, False, f"CPU kernels; no CUDA kernels: {missing}"
    return True, True, f"CPU kernels and CUDA kernels with nvcc {nvcc[1]}"


def extension() -> tuple[list, dict]:
    build = os.environ.get("AUTOHDR_BUILD", "auto")
    if build == "none":
        print("autohdr:", choose(build, None, [])[2])
        for built in ROOT.glob("autohdr/_C*.so"):  # an earlier editable installation's would be loaded all the same
            built.unlink()
        return [], {}
    try:
        import torch
    except ImportError:
        raise SystemExit(
            "autohdr compiles its kernels against your PyTorch: install torch >= 2.11 first, then build with"
            " pip install --no-build-isolation. AUTOHDR_BUILD=none installs without kernels."
        ) from None
    import pybind11

    cuda_sources = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.cu"))
    cpu, cuda, message = choose(build, torch.version.cuda, cuda_sources)
    print("autohdr:", message)
    cuda_home, release = nvcc_release() if cuda else (None, "none")
    from torch.utils import cpp_extension

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
    return [module], {"build_ext": cpp_extension.BuildExtension.with_options(use_ninja=True)}


modules, commands = extension()
setup(ext_modules=modules, cmdclass=commands)
