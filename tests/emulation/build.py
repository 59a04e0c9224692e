"""Compiles CUDA sources for the CPU with g++ and AddressSanitizer (cuda_emulation.h), once for each state of the sources."""

import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
CACHE = ROOT / "build" / "emulation"
FLAGS = "-std=c++17 -fPIC -DAUTOHDR_EMULATION -w".split()
CHECKED = "-Og -g1 -fsanitize=address,alignment,bounds -fno-sanitize-recover=alignment,bounds".split()
# Leaks are Python's own; no stack use after return, because of the fibers; fresh memory holds NaN.
SANITIZER = (
    "detect_leaks=0:detect_stack_use_after_return=0:malloc_context_size=2:max_malloc_fill_size=1073741824:malloc_fill_byte=255"
)


@functools.cache
def toolkit() -> Path | None:
    """CUDA's root folder, for its headers, or None."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = str(Path(home) / "bin" / "nvcc") if home else shutil.which("nvcc")
    if not nvcc or not Path(nvcc).exists():
        return None
    dryrun = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", dryrun, re.MULTILINE)
    return Path(top.group(1).strip()).resolve() if top else None


def why_not() -> str:
    """Why nothing can be emulated here, or an empty string."""
    if os.uname().machine != "x86_64":
        return "the emulation of CUDA is written for x86-64"
    if shutil.which("g++") is None:
        return "there is no g++"
    return "" if toolkit() else "there is no CUDA toolkit, whose headers the emulation of CUDA needs"


def with_headers(sources: list[Path]) -> list[Path]:
    """The sources, and all headers of this project that they include, one through another."""
    found = list(sources)
    for file in found:
        for name in re.findall(r'^\s*#\s*include\s+["<](.+)[">]', file.read_text(), re.MULTILINE):
            for header in (folder / name for folder in (file.parent, ROOT / "csrc", HERE)):
                if header not in found and header.is_file():
                    found.append(header)
    return found


def hash_of(command: list[str], sources: list[Path]) -> str:
    """Of a command, its sources, and all headers that they include."""
    digest = hashlib.sha256(" ".join(map(str, command)).encode())
    for file in with_headers(sources):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def build(name: str, sources: list[Path], flags: list[str], link: list[str], checked: bool = True) -> Path:
    """The compiled program or library; unchecked, what launches are recorded with: a fifth of the time, and no kernel runs.

    Raises:
        RuntimeError: it does not compile, with the compiler's output.
    """
    include = [f"-I{folder}" for folder in (ROOT / "csrc", HERE, toolkit() / "include")]
    checks = CHECKED if checked else ["-O0"]
    command = ["g++", *FLAGS, *checks, *include, *flags]

    def run(arguments: list[str]) -> None:
        done = subprocess.run(arguments, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(arguments)}\n{done.stderr}")

    def compiled(source: Path) -> Path:
        target = CACHE / f"{source.name}-{hash_of(command, [source])}.o"
        if not target.exists():
            made = target.with_suffix(f".{os.getpid()}")
            run([*command, "-x", "c++", "-c", str(source), "-o", str(made)])
            made.replace(target)
        return target

    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock, ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process of tests waits, and finds everything compiled
        objects = [str(o) for o in pool.map(compiled, sources)]
        target = CACHE / f"{name}-{hashlib.sha256(' '.join((*objects, *link)).encode()).hexdigest()[:16]}"
        if not target.exists():
            made = target.with_suffix(f".{os.getpid()}")
            run(["g++", *checks, *objects, *link, "-o", str(made)])
            made.replace(target)
    return target


def emulated_kernels(checked: bool = True) -> Path:
    """All CUDA kernels and their host files, registered for CPU tensors in place of the CPU kernels."""
    from torch.utils.cpp_extension import include_paths, library_paths

    sources = [*(ROOT / "csrc").rglob("*.cu"), *(ROOT / "csrc").rglob("*_cuda.cpp")]
    sources.sort(reverse=True)  # the scan, which takes longest, first
    flags = ["-DTORCH_TARGET_VERSION=0x020b000000000000", *(f"-isystem{p}" for p in include_paths())]
    link = ["-shared", "-Wl,--no-as-needed", *(f"-L{p}" for p in library_paths()), "-ltorch", "-ltorch_cpu"]
    return build("autohdr_emulated" if checked else "autohdr_recording", sources, flags, link, checked)


def environment() -> dict[str, str]:
    """Of a process that runs tests/kernels with emulated_kernels()."""

    def find(name: str) -> str:
        return subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()

    return os.environ | {
        # The sanitizer looks for __cxa_throw when it starts, long before Python loads a library that has it.
        "LD_PRELOAD": f"{find('libasan.so')} {find('libstdc++.so')}",
        "ASAN_OPTIONS": SANITIZER,
        "AUTOHDR_EMULATED_LIBRARY": str(emulated_kernels()),
        "AUTOHDR_TEST_BACKEND": "cuda",
        "OMP_NUM_THREADS": "1",
    }
