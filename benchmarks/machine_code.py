"""Kernels as machine code: nvcc compiles them without a GPU, nvdisasm (of the CUDA toolkit, or inside Triton's wheel) lists them.

`python benchmarks/machine_code.py` writes the budgets of instructions, tests/kernels/instruction_budgets.json.
"""

import fcntl
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "emulation"))
import build  # noqa: E402

CACHE = ROOT / "build" / "machine_code"
SOURCES = sorted((ROOT / "csrc").rglob("*.cu"))
ARCHITECTURES = ("sm_80", "sm_90")


@dataclass(frozen=True)
class Instruction:
    guard: str  # the predicate it is executed under, such as "!P0", or an empty string
    opcode: str  # with its modifiers: LDG.E.128
    operands: tuple[str, ...]
    control: int  # what the scheduler is told: cycles to stall, scoreboards to set and to wait for

    def bits(self) -> int:
        """That a lane reads or writes in memory; 0 where it does neither."""
        if not re.match(r"(LD|ST|ATOM|RED)(G|S|L|GSTS|SM)?\b", self.opcode):
            return 0
        if self.opcode.startswith("LDSM"):
            return 32 * int(self.opcode[-1])
        width = re.search(r"\.[US]?(8|16|64|128)\b", self.opcode)
        return int(width[1]) if width else 32


@dataclass
class Code:
    """A kernel, and the subroutines that it calls."""

    symbol: str
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # index of the instruction after it

    def target(self, instruction: Instruction) -> int | None:
        """Where a branch or call goes to, an index; None where that is no label."""
        found = re.search(r"`\((.+?)\)", instruction.operands[-1]) if instruction.operands else None
        return self.labels.get(found[1]) if found else None

    def in_loops(self) -> list[Instruction]:
        """What stands between a label and a branch back to it."""
        inside = set()
        for at, instruction in enumerate(self.instructions):
            target = self.target(instruction) if instruction.opcode.startswith("BRA") else None
            if target is not None and target < at:
                inside.update(range(target, at + 1))
        return [self.instructions[at] for at in sorted(inside)]


def tool(name: str) -> str | None:
    """The path of nvdisasm or cuobjdump."""
    if found := shutil.which(name):
        return found
    try:
        import triton
    except ImportError:
        return None
    return getattr(triton.knobs.nvidia, name).path


def disassemble(cubin: Path) -> dict[str, Code]:
    """All kernels of a file, by their mangled names."""
    command = [tool("nvdisasm"), "-c", "-hex", cubin]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels: dict[str, Code] = {}
    code, waiting = None, None
    for line in listing.splitlines():
        if found := re.match(r"\.text\.(\S+):$", line):
            code = kernels[found[1]] = Code(found[1])
        elif line.startswith("\t.section"):
            code = None
        elif code and (found := re.match(r"(\S+):$", line)):
            code.labels[found[1]] = len(code.instructions)
        elif code and (found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@(\S+)\s+)?(\S+)(.*?);\s+/\*", line)):
            waiting = found[1] or "", found[2], tuple(part.strip() for part in found[3].split(",") if part.strip())
        elif code and waiting and (found := re.match(r"\s+/\* 0x([0-9a-f]{16}) \*/", line)):  # the upper half of its 128 bits
            code.instructions.append(Instruction(*waiting, int(found[1], 16) >> 41 & 0x1FFFFF))
            waiting = None
    return kernels


def release() -> str:
    """Of nvcc: machine code depends on it, and on nothing else of the machine."""
    said = subprocess.run([build.toolkit() / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V(\d+\.\d+\.\d+)", said)[1]


@contextmanager
def made_once(target: Path) -> Iterator[Path | None]:
    """A name to write the file under, or None where it is there: another process of tests waits, and finds it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            yield None
            return
        yield (part := target.with_suffix(".part"))
        part.replace(target)


def compiled(source: Path, architecture: str) -> tuple[Path, str]:
    """The cubin of a .cu file, as it is shipped, and what ptxas says of its kernels; made once for each state of the sources.

    Raises:
        RuntimeError: it does not compile, with the compiler's output.
    """
    command = ["nvcc", "-O3", "-std=c++17", f"-arch={architecture}", "-Xptxas=-v", f"-I{ROOT / 'csrc'}", "-cubin"]
    cubin = CACHE / f"{source.stem}-{architecture}-{build.hash_of([release(), *command], [source])}.cubin"
    with made_once(cubin) as part:
        if part:
            command[0] = str(build.toolkit() / "bin" / command[0])
            done = subprocess.run([*command, str(source), "-o", part], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stdout + done.stderr)
            cubin.with_suffix(".log").write_text(done.stdout + done.stderr)
    return cubin, cubin.with_suffix(".log").read_text()


@dataclass(frozen=True)
class Resources:
    """What ptxas says that a kernel takes: registers of a thread, bytes of its stack and spilled to it, of shared memory."""

    registers: int
    stack: int
    spilled: int
    shared: int


def resources(log: str) -> dict[str, Resources]:
    """Of every kernel of a file."""
    pattern = (
        r"entry function '(\w+)' for.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers(.*?)\n"
    )
    kernels = {}
    for name, stack, stores, loads, registers, rest in re.findall(pattern, log, re.DOTALL):
        shared = re.search(r"(\d+) bytes smem", rest)
        kernels[name] = Resources(int(registers), int(stack), int(stores) + int(loads), int(shared[1]) if shared else 0)
    assert len(kernels) == log.count("entry function"), log
    return kernels


def usage(cubin: Path) -> dict[str, Resources]:
    """The same of a cubin that others compiled, as cuobjdump tells; all of the stack counts as spilled."""
    command = [tool("cuobjdump"), "--dump-resource-usage", cubin]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", said)
    return {name: Resources(int(r), int(k), int(k) + int(loc), int(s)) for name, r, k, s, loc in found}


@cache
def demangled(symbols: tuple[str, ...]) -> list[str]:
    """The names of kernels as C++ writes them, with their parameters."""
    return subprocess.run(["c++filt", *symbols], capture_output=True, text=True, check=True).stdout.splitlines()


def short_name(name: str) -> str:
    """Of a demangled one, without our namespaces, result and parameters."""
    name = re.sub(r"@.*|\b(autohdr|image|scan|conv|edit|\(anonymous namespace\))::|^void ", "", name)
    depth = 0
    for at, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and not depth:
            return name[:at]
    return name


MEMORY = {"LDG": "global loads", "LDGSTS": "global loads", "STG": "global stores", "LDS": "shared loads", "STS": "shared stores"}
MEMORY |= {"LDSM": "shared loads", "LDL": "local loads", "STL": "local stores"}


def counts(code: Code) -> dict[str, int]:
    """Of a kernel's instructions, of those in loops, of the branches there, of accesses to memory by their bits."""
    inner = code.in_loops()
    found = {
        "instructions": sum(i.opcode != "NOP" for i in code.instructions),
        "in loops": len(inner),
        "branches in loops": sum(i.opcode.split(".")[0] in ("BRA", "CALL", "BRX") for i in inner),
    }
    memory = Counter(
        f"{MEMORY[i.opcode.split('.')[0]]} of {i.bits()}" for i in code.instructions if i.opcode.split(".")[0] in MEMORY
    )
    return found | dict(sorted(memory.items()))


def kernels(source: Path, architecture: str) -> dict[str, dict[str, int]]:
    """What a budget limits of every kernel of a file: registers and stack, and for the last architecture the counts of its code,
    which takes as long to read as to compile from PTX; what makes one worse makes the other worse."""
    cubin, log = compiled(source, architecture)
    taken = resources(log)
    found = {name: {"registers": r.registers, "stack": r.stack} for name, r in zip(names_of(taken), taken.values(), strict=True)}
    if architecture == ARCHITECTURES[-1]:
        code = disassemble(cubin)
        for name, symbol in zip(names_of(taken), taken, strict=True):
            found[name] |= counts(code[symbol])
    assert len(found) == len(taken), "kernels of one name"
    return dict(sorted(found.items()))


def names_of(symbols: Iterable[str]) -> list[str]:
    return list(map(short_name, demangled(tuple(symbols))))


class NoGPU:
    """What Triton asks of a GPU's driver before it launches a kernel."""

    def __init__(self, architecture: str):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)

    def get_current_device(self) -> int:
        return self.target.arch  # kernels are kept by device

    def get_current_stream(self, device) -> int:
        return 0

    def get_current_target(self):
        return self.target


BUDGETS = ROOT / "tests" / "kernels" / "instruction_budgets.json"


def write_budgets() -> None:
    """What the kernels take now becomes what they may take."""
    lines = []
    for source in SOURCES:
        for architecture in ARCHITECTURES:
            entries = [f"{json.dumps(name)}: {json.dumps(found)}" for name, found in kernels(source, architecture).items()]
            lines.append(f"{json.dumps(f'{source.stem} {architecture}')}: {{\n" + ",\n".join(entries) + "\n}")
    BUDGETS.write_text(f'{{"nvcc": "{release()}",\n' + ",\n".join(lines) + "}\n")


if __name__ == "__main__":
    write_budgets()
