"""The way of a warp through machine code, which its integers alone decide: indices, addresses, trip counts.

A value is an int where all lanes have the same, an array of 32 where not, and None where it follows from floating point or from
what memory held. Of lanes that part, those furthest behind go first, and meet the others where these wait. A branch on an unknown
value is taken by every other lane, but by none where it leads back, or to the slow path of an exact division.
"""

import operator
import re
import struct
from collections import Counter, defaultdict
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from functools import cache

import numpy
from machine_code import Code, Instruction

Value = int | numpy.ndarray | None
Place = tuple[tuple[int, ...], int]
LANES, WORD, LONG = 32, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
MOST = 4_000_000  # instructions of a warp
PARAMETERS = {"sm_80": 0x160, "sm_90": 0x210}  # where they begin in the constant bank
UNITS = {
    "fma": "FFMA FMUL FADD HFMA2 HADD2 HMUL2",
    "multiply": "IMAD",
    "tensor": "HMMA HGMMA",
    "special": "MUFU I2F F2I F2F",
    "double": "DADD DMUL DFMA DSETP",
    "global": "LDG STG LD ST ATOMG RED LDGSTS",
    "shared": "LDS STS LDSM STSM SHFL ATOMS",
    "local": "LDL STL",
    "branch": "BRA CALL RET EXIT BSSY BSYNC BREAK WARPSYNC",
    "barrier": "BAR DEPBAR LDGDEPBAR",
    "uniform": "ULDC UMOV UIADD3 UIMAD USHF ULEA ULOP3 USEL UISETP UPRMT UPLOP3 USGXT S2UR R2UR",
    "constant": "LDC",
}
"""Opcodes by the unit that executes them; all others are "integer"."""
UNIT = {opcode: unit for unit, opcodes in UNITS.items() for opcode in opcodes.split()}


@dataclass(frozen=True)
class Launch:
    """A kernel's: its name, blocks, threads, dynamic shared memory in bytes, and its parameters as they lie in memory."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    parameters: bytes


@dataclass(frozen=True)
class Timing:
    """Cycles until a unit's result can be used, where the code says to wait for it, and that it is busy with an instruction."""

    latency: dict[str, float]
    busy: dict[str, float]


@dataclass
class Way:
    """What a warp did: instructions, work by unit (see amount_of), cycles that it takes alone, cycles of shared memory's banks,
    accesses to sectors (32 bytes) of global memory, these each once; branches and accesses that could not be followed."""

    issued: int = 0
    units: Counter = field(default_factory=Counter)
    cycles: float = 0.0
    wavefronts: int = 0
    accesses: int = 0
    loaded: set[int] = field(default_factory=set)
    stored: set[int] = field(default_factory=set)
    unknown: int = 0


def amount_of(i: Instruction) -> float:
    """Work of its unit: of tensor cores in 2,048 multiply-adds of 16 bits for a warp, of others in instructions."""
    base, shape, *kinds = (*i.opcode.split("."), "")
    twice = 2 if "TF32" in kinds else 1
    if base == "HGMMA":  # of four warps
        m, n, k = map(int, shape.split("x"))
        return m * n * k / 4 / 2048 * twice
    return 16 * 8 * int(shape[3:]) / 2048 * twice if base == "HMMA" else 1


class Lanes:
    """A warp's registers, predicates, and what it reads beside them."""

    def __init__(self, launch: Launch, architecture: str, block: tuple[int, ...], warp: int):
        self.banks: dict[str, list] = {"R": [0] * 256, "UR": [0] * 256, "P": [True] * 8, "UP": [True] * 8}
        head = struct.pack("<6I", *launch.block, *launch.grid).ljust(PARAMETERS[architecture], b"\0")
        self.constants = head + launch.parameters + bytes(64)
        x, y, z = launch.block
        thread = warp * LANES + numpy.arange(LANES)
        self.present = thread < x * y * z
        self.special: dict[str, Value] = {"SR_LANEID": numpy.arange(LANES), "SR_CgaCtaId": 0}
        for axis, index, place in zip("XYZ", (thread % x, thread // x % y, thread // (x * y)), block, strict=True):
            self.special[f"SR_TID.{axis}"] = int(index[0]) if (index == index[0]).all() else index
            self.special[f"SR_CTAID.{axis}"] = place

    def put(self, bank: str, index: int, value: Value, mask) -> None:
        if index >= len(self.banks[bank]):
            return
        old = self.banks[bank][index]
        if bank[0] == "U" and isinstance(value, numpy.ndarray):
            value = value[0 if mask is None else mask.argmax()].item()
        whole = mask is None or value is None or bank[0] == "U"
        self.banks[bank][index] = value if whole else numpy.where(mask, value, 0 if old is None else old)


# ---------------------------------------------------------------------------------------------------------------------
# Operands.

Getter = Callable[[Lanes], Value]
CONSTANT = re.compile(r"c\[0x0\]\[(?:(U?R\w+)\+?)?(0x[0-9a-f]+)?\]")


@cache
def operand(text: str) -> Getter:
    """Its value, which is None for what is no integer."""
    if text[0] in "!~-" and not re.match(r"-[\d.]", text):
        inner, sign = operand(text[1:]), text[0]
        change = {"!": numpy.logical_not, "~": lambda v: v ^ WORD, "-": lambda v: (v ^ WORD) + 1}[sign]
        return lambda w: None if (v := inner(w)) is None else change(v) if sign != "!" or not isinstance(v, bool) else not v
    if text in ("PT", "UPT"):
        return lambda w: True
    if text in ("RZ", "URZ", "SRZ"):
        return lambda w: 0
    if text == "PR":
        return lambda w: w.banks["P"]
    if found := re.fullmatch(r"(UR|UP|R|P)(\d+)", text):
        bank, register = found[1], int(found[2])
        return lambda w: w.banks[bank][register]
    if found := CONSTANT.fullmatch(text):
        index, at = operand(found[1] or "RZ"), int(found[2] or "0", 16)
        return lambda w: int.from_bytes(w.constants[at + i : at + i + 4], "little") if isinstance(i := index(w), int) else None
    if re.fullmatch(r"-?0x[0-9a-f]+", text):
        value = int(text, 16) & WORD
        return lambda w: value
    if re.fullmatch(r"-?\d+(\.\d+)?(e[+-]?\d+)?", text):
        return lambda w: int(numpy.float16(float(text)).view(numpy.uint16))
    return lambda w: w.special.get(text)


@cache
def pair(text: str) -> Getter:
    """64 bits, signed: of two registers, or of two words of the constants."""
    upper = "RZ"
    if found := re.fullmatch(r"([-~]?U?R)(\d+)", text):
        upper = f"{found[1]}{int(found[2]) + 1}"
    elif found := CONSTANT.fullmatch(text):
        upper = f"c[0x0][{found[1] or 'RZ'}+{int(found[2] or '0', 16) + 4:#x}]"
    low, high = operand(text), operand(upper)
    return lambda w: None if (a := low(w)) is None or (b := high(w)) is None else joined(a, b)


def address(text: str) -> Getter:
    """Of a memory operand: [R2.64+0x10], desc[UR4][R2.64+UR6], [R3+UR4+0x800]."""
    inside = text[text.rindex("[") + 1 : text.rindex("]")]
    wide = ".64" in inside or ".U32" in inside
    parts = []
    for part in inside.split("+"):
        name, _, width = part.partition(".")
        if part.startswith(("0x", "-0x")):
            parts.append(lambda w, offset=int(part, 16): offset)
        else:
            parts.append(pair(name) if width == "64" or (wide and name.startswith("UR")) else operand(name))

    def total(w: Lanes) -> Value:
        values = [part(w) for part in parts]
        return None if any(v is None for v in values) else sum(values)

    return total


def is_predicate(text: str) -> bool:
    return re.fullmatch(r"!?U?P[T\d]", text) is not None


# ---------------------------------------------------------------------------------------------------------------------
# What instructions do: functions of an opcode's modifiers, of its sources that are numbers and those that are predicates, to the
# results, all in their order. 64 bits are a tuple of two results.


def signed(v):
    return v - ((v >> 31) << 32)


def joined(low, high):
    """64 bits as a signed number, which numpy's integers hold."""
    if isinstance(low, int) and isinstance(high, int):
        v = (high << 32 | low) & LONG
        return v - (v >> 63 << 64)
    return (numpy.asarray(high, numpy.int64) << 32) | low


def halves(v) -> tuple:
    return v & WORD, v >> 32 & WORD


def add(kinds, n, p):
    total = sum(n) + (sum(p) if "X" in kinds else 0)
    return [total & WORD, total >> 32 >= 1, total >> 32 >= 2]


def multiply(kinds, n, p):
    a, b, c = n
    if kinds[:1] == ["MOV"]:
        return [c]
    if "WIDE" not in kinds and "HI" not in kinds:
        return [((a & WORD) * (b & WORD) & WORD) + c + (sum(p) if "X" in kinds else 0) & WORD]
    a, b = (v & WORD if "U32" in kinds else signed(v & WORD) for v in (a, b))
    if all(isinstance(v, int) for v in n):
        total, carry = a * b + c, (a * b & LONG) + (c & LONG) > LONG
    else:
        product = numpy.asarray(a, numpy.int64) * b
        total = product + c
        carry = total.astype(numpy.uint64) < product.astype(numpy.uint64)
    return [halves(total)[1] if "HI" in kinds else halves(total), carry]


COMPARISONS = {"LT": operator.lt, "LE": operator.le, "GT": operator.gt, "GE": operator.ge, "EQ": operator.eq, "NE": operator.ne}


def compare(kinds, n, p):
    a, b = (v & WORD if "U32" in kinds else signed(v & WORD) for v in n)
    name = kinds[0]
    if "EX" not in kinds:
        outcome = COMPARISONS[name](a, b)
    elif name == "NE":
        outcome = (a != b) | p[1]  # p[1]: of the lower halves
    else:
        outcome = (name != "EQ" and COMPARISONS[name[0] + "T"](a, b)) | (a == b) & p[1]
    opposite = ~outcome if isinstance(outcome, numpy.ndarray) else not outcome
    return [v | p[0] if "OR" in kinds else v & p[0] for v in (outcome, opposite)]


def decided(kinds, flag: Value):
    """Of unknown numbers, where the flag that the outcome is combined with says enough."""
    if flag is not None and numpy.all(flag == ("OR" in kinds)):
        return ["OR" in kinds] * 2
    return None


def look_up(table: int, a, b, c):
    """A function of three bits, for every bit."""
    found = 0
    for case in range(8):
        if table >> case & 1:
            x, y, z = (v if case >> place & 1 else v ^ WORD for v, place in ((a, 2), (b, 1), (c, 0)))
            found = found | x & y & z
    return found


def look_up_predicates(kinds, n, p):
    bits = [v * WORD if isinstance(v, bool) else numpy.where(v, WORD, 0) for v in p[:3]]
    return [look_up(table, *bits) != 0 for table in n]


def scale(kinds, n, p):
    a, b, by = n[0] & WORD, n[1], n[-1]
    if "HI" in kinds:
        upper = n[2] & WORD if len(n) == 4 else signed(a) >> 31 & WORD if "SX32" in kinds else 0
        product = joined(a, upper) >> (32 - by) & WORD
    else:
        product = a << by & WORD
    total = product + b + (sum(p) if "X" in kinds else 0)
    return [total & WORD, total >> 32 >= 1]


def shift(kinds, n, p):
    """A funnel of 64 bits, of which the low or the high half is kept."""
    low, by, high = n[0] & WORD, n[1] & (31 if "W" in kinds else 63), n[2] & WORD
    value = joined(low, high)
    if "L" in kinds:
        value = value << by
    elif kinds[1:2] and kinds[1][0] == "S":
        value = value >> by
    elif isinstance(value, int):
        value = (value & LONG) >> by
    else:
        value = (value.view(numpy.uint64) >> numpy.asarray(by, numpy.uint64)).view(numpy.int64)
    return [halves(value)["HI" in kinds]]


def permute(kinds, n, p):
    selector = n[1]
    if not isinstance(selector, int):
        return None
    bytes_, found = [v >> 8 * i & 255 for v in (n[0], n[2]) for i in range(4)], 0
    for i in range(4):
        byte = bytes_[selector >> 4 * i & 7]
        found = found | ((byte >> 7) * 255 if selector >> 4 * i & 8 else byte) << 8 * i
    return [found]


def choose(kinds, n, p):
    return [(n[0] if p[0] else n[1]) if isinstance(p[0], bool) else numpy.where(p[0], *n)]


def least(kinds, n, p):
    a, b = (n[0] + n[1] & WORD, n[2]) if len(n) == 3 else n
    a, b = (v & WORD if "U32" in kinds else signed(v & WORD) for v in (a, b))
    found = (numpy.minimum if p[0] else numpy.maximum)(a, b) & WORD
    return [found if found.ndim else int(found)]


def to_float(kinds, n, p):
    """An integer's bits as a float32, rounded up: divisions by integers begin so."""
    exact = numpy.asarray(n[0] & LONG if isinstance(n[0], int) else n[0].astype(numpy.uint64), numpy.float64)
    found = exact.astype(numpy.float32)
    return [bits_of(numpy.where(found < exact, numpy.nextafter(found, numpy.float32(numpy.inf)), found))]


def bits_of(v) -> Value:
    with numpy.errstate(over="ignore"):
        bits = numpy.asarray(v, numpy.float32).view(numpy.uint32).astype(numpy.int64)
    return bits if bits.ndim else int(bits)


def float_of(bits):
    return numpy.asarray(bits).astype(numpy.uint32).view(numpy.float32).astype(numpy.float64)


def to_integer(kinds, n, p):
    found = numpy.nan_to_num(float_of(n[0]), posinf=0).clip(0, 2.0**63 - 2**10).astype(numpy.int64)
    return [halves(found if found.ndim else int(found)) if "U64" in kinds else (found if found.ndim else int(found)) & WORD]


def reciprocal(kinds, n, p):
    with numpy.errstate(divide="ignore"):
        return [bits_of(1 / float_of(n[0]))] if kinds == ["RCP"] else None


def pack(kinds, n, p):
    flags, rest, kept = n
    chosen = [(flags[k], k) for k in range(7) if kept >> k & 1]
    if kinds or any(flag is None for flag, _ in chosen):
        return None
    return [(rest & ~kept) + sum(flag * (1 << k) for flag, k in chosen)]


def constant_halves(kinds, n, p):
    """A move of two numbers of 16 bits in the guise of a multiplication by zero."""
    return [int(n[2]) << 16 | int(n[3])] if n[:2] == [WORD + 1, 0] and len(n) == 4 else None


def move(kinds, n, p):
    narrow = {"U8": 0xFF, "U16": 0xFFFF}.get(kinds[0], WORD) if kinds else WORD
    return [halves(n[-1]) if "64" in kinds else n[-1] & narrow]


def extend(kinds, n, p):
    value, bits = n[0] & (1 << n[1]) - 1, n[1]
    return [value if "U32" in kinds else value - ((value >> bits - 1) << bits) & WORD]


def broadcast(kinds, n, p):
    value, lane, _ = n
    if kinds != ["IDX"] or not isinstance(lane, int):
        return None
    return [True, value if isinstance(value, int) else int(value[lane & 31])]


MEANINGS: dict[str, Callable] = {
    **dict.fromkeys(("MOV", "S2R", "S2UR", "R2UR", "LDC", "CS2R"), move),
    **dict.fromkeys(("IADD3", "VIADD"), add),
    **dict.fromkeys(("IMNMX", "VIMNMX", "VIADDMNMX"), least),
    "IMAD": multiply,
    "ISETP": compare,
    "LOP3": lambda kinds, n, p: [look_up(n[3], *(v & WORD for v in n[:3]))],
    "PLOP3": look_up_predicates,
    "LEA": scale,
    "SHF": shift,
    "PRMT": permute,
    "SEL": choose,
    "IABS": lambda kinds, n, p: [abs(signed(n[0] & WORD))],
    "I2F": to_float,
    "F2I": to_integer,
    "MUFU": reciprocal,
    "P2R": pack,
    "SHFL": broadcast,
    "SGXT": extend,
    "R2P": lambda kinds, n, p: [(n[0] >> k & 1) != 0 for k in range(7) if n[1] >> k & 1],
    "HFMA2": constant_halves,
}


# ---------------------------------------------------------------------------------------------------------------------


def decode(i: Instruction) -> Callable[[Lanes, Value], None] | None:
    """What an instruction makes of registers, under a mask of lanes; None for nothing."""
    base, *kinds = i.opcode.split(".")
    unit, texts = UNIT.get(base), [text.replace(".reuse", "") for text in i.operands]
    base = base[1:] if base[0] == "U" else base
    if not texts or unit in ("branch", "barrier") or base in ("ST", "STG", "STS", "STL", "STSM", "RED", "LDGSTS"):
        return None
    if base == "CS2R" and not kinds:
        kinds = ["64"]
    if base == "R2P":
        targets, sources = [f"P{k}" for k in range(7) if int(texts[2], 16) >> k & 1], texts[1:]
    else:
        count = 2 if base in ("ISETP", "PLOP3", "SHFL", "FSETP", "DSETP") or (base == "LOP3" and is_predicate(texts[0])) else 1
        while base in ("IADD3", "LEA", "IMAD") and is_predicate(texts[count]):
            count += 1
        targets, sources = texts[:count], texts[count:]
    meaning = MEANINGS.get(base)
    wide = [text for text in sources if not is_predicate(text)]
    n = [operand(text) for text in wide]
    if base == "IMAD" and ("WIDE" in kinds or "HI" in kinds):
        n[2] = pair(wide[2])
    elif meaning and wide and ("64" in kinds or "U64" in kinds and base == "I2F"):
        n[-1] = pair(wide[-1])
    p = [operand(text) for text in sources if is_predicate(text)]
    places = [(found[1], int(found[2])) if (found := re.fullmatch(r"(UR|UP|R|P)(\d+)", text)) else None for text in targets]
    unknown = max(
        i.bits() // 32, 4 if base == "HMMA" else 2 if base[0] == "D" or {"64", "F64", "U64", "WIDE"} & set(kinds) else 1
    )
    with_test = base == "LOP3" and len(targets) == 2

    nothing = [(None,) * unknown if place and place[0][-1] == "R" else None for place in places]

    def run(w: Lanes, mask: Value) -> None:
        found = None
        if meaning:
            numbers, flags = [get(w) for get in n], [get(w) for get in p]
            if not any(v is None for v in numbers) and not any(v is None for v in flags):
                found = meaning(kinds, numbers, flags)
            elif base == "ISETP":
                found = decided(kinds, flags[0])
        if found is None:
            found = nothing
        elif with_test:
            found = [found[0] != 0, found[0]]
        for place, value in zip(places, found, strict=False):
            if place:
                for k, part in enumerate(value if isinstance(value, tuple) else (value,)):
                    w.put(place[0], place[1] + k, part, mask)

    return run


class Clock:
    """When a lone warp's instructions are issued: as soon as what they wait for is there, and their unit is free."""

    def __init__(self, timing: Timing):
        self.timing, self.now, self.ready, self.free = timing, 0.0, [0.0] * 8, defaultdict(float)
        self.copies: list[list[float]] = [[]]  # groups of asynchronous ones, and when they arrive

    def issue(self, i: Instruction, base: str, unit: str, amount: float, source: str) -> None:
        """source: what a result comes from: the unit, or the first-level cache."""
        control, latency, now = i.control, self.timing.latency, max(self.now, self.free[unit])
        stall, written, read, waited = control & 15, control >> 5 & 7, control >> 8 & 7, control >> 11 & 63
        self.now = max([now, *(self.ready[k] for k in range(6) if waited >> k & 1)]) if waited else now
        if base == "DEPBAR":
            left = int(i.operands[1], 16) if len(i.operands) > 1 else 0
            self.now = max([self.now, *(t for group in self.copies[: max(0, len(self.copies) - 1 - left)] for t in group)])
        elif base == "LDGDEPBAR":
            self.copies.append([])
        elif base == "LDGSTS":
            self.copies[-1].append(self.now + latency[source])
        self.free[unit] = self.now + self.timing.busy.get(unit, 1.0) * amount
        self.ready[written] = max(self.ready[written], self.now + latency.get(source, 0.0))
        self.ready[read] = max(self.ready[read], self.now + latency["operands"])
        self.now += max(stall, 1, latency["barrier"] if base == "BAR" else 0)


@dataclass(frozen=True)
class Step:
    instruction: Instruction
    base: str
    unit: str
    amount: float
    guard: Getter
    run: Callable[[Lanes, Value], None] | None
    target: int | None
    places: list[tuple[bool, Getter]]  # of accesses to memory: whether global, where


class Program:
    """A kernel's code, decoded."""

    def __init__(self, code: Code, architecture: str):
        self.architecture = architecture
        self.steps = [self._step(code, i) for i in code.instructions]

    @staticmethod
    def _step(code: Code, i: Instruction) -> Step:
        base = i.opcode.split(".")[0]
        texts = [text for text in i.operands if "[" in text and not text.startswith("c[")] if i.bits() else []
        kinds = [False, True] if base == "LDGSTS" else [UNIT.get(base) == "global"]
        places = [(kind, address(text)) for kind, text in zip(kinds, texts, strict=False)]
        guard = operand(i.guard) if i.guard else operand("PT")
        return Step(i, base, UNIT.get(base, "integer"), amount_of(i), guard, decode(i), code.target(i), places)

    def walk(self, launch: Launch, place: Place, timing: Timing, kept: dict, near: Set[int] = frozenset()) -> Way:
        """place: a block and a warp of it. kept: the integers in the block's shared memory, by address, to which this warp adds.
        near: sectors in the first-level cache; those that the warp touches are there from then on."""
        block, warp = place
        w, way, clock = Lanes(launch, self.architecture, block, warp), Way(), Clock(timing)
        waiting: dict[int, Value] = {0: None if w.present.all() else w.present}
        while waiting:
            at = min(waiting)
            mask, foremost = waiting.pop(at), min(waiting, default=len(self.steps))
            while at < foremost:
                step = self.steps[at]
                flag = step.guard(w)
                active = mask if flag is None or isinstance(flag, bool) else flag if mask is None else flag & mask
                source, where = step.unit, None
                for is_global, place in step.places if flag is not False else ():
                    where = place(w)
                    if touch(way, step, is_global, where, active, near):
                        source = "cached"
                clock.issue(step.instruction, step.base, step.unit, step.amount, source)
                way.issued += 1
                way.units[step.unit] += step.amount
                if way.issued > MOST:
                    raise RuntimeError(f"{launch.kernel}: a warp has more than {MOST} instructions")
                if step.base in ("BRA", "EXIT", "RET", "CALL"):
                    goes, target = self._branch(w, way, step, flag, at)
                    going, staying = divided(goes, mask)
                    if staying is False:
                        at = len(self.steps) if target is None else target
                        continue
                    if going is not False:
                        if target is not None:
                            waiting[target] = united(waiting.get(target, False), going)
                            foremost = min(foremost, target) if target > at else foremost
                        mask = staying
                        if target is not None and target <= at:  # they are behind now
                            waiting[at + 1] = united(waiting.get(at + 1, False), staying)
                            break
                elif flag is not False:
                    if step.run:
                        step.run(w, active)
                    if step.base in ("LDS", "STS", "LDL", "STL") and where is not None:
                        keep(w, step.instruction, (step.base[2], warp * (step.base[2] == "L")), where, kept, active)
                at += 1
            else:
                if at < len(self.steps):
                    waiting[at] = united(waiting.get(at, False), mask)
        way.cycles = clock.now
        return way

    def _branch(self, w: Lanes, way: Way, step: Step, flag: Value, at: int) -> tuple[Value, int | None]:
        """Who goes, and where to: None where it ends."""
        target, i = step.target, step.instruction
        if step.base == "EXIT":
            target = None
        elif step.base == "RET":
            back = pair(i.operands[0].split()[0])(w)
            target = None if back is None else int(numpy.asarray(back).flat[0]) >> 4
        elif i.opcode.startswith(("BRA.DIV", "BRA.CONV")):  # the lanes are where they should be
            return False, target
        elif len(i.operands) > 1:
            further = operand(i.operands[0])(w)
            flag = None if flag is None or further is None else flag & further
        if flag is None:
            way.unknown += 1
            if target is None or target <= at:
                return False, target
            if self._calls(at + 1, target):
                return True, target
            return False if self._calls(target, len(self.steps)) else numpy.arange(LANES) % 2 == 1, target
        return flag, target

    def _calls(self, begin: int, end: int) -> bool:
        """Whether there is a call straight on, before the way ends or leads elsewhere. A guarded one is a loop's way out."""
        for step in self.steps[begin : min(end, begin + 24)]:
            if step.base in ("CALL", "BRA", "EXIT", "RET") and not step.instruction.guard:
                return step.base == "CALL"
        return False


# Groups of lanes: None is all of them, False is nobody.


def divided(goes: Value, mask: Value) -> tuple:
    if isinstance(goes, bool):
        return (mask, False) if goes else (False, mask)
    going, staying = (goes, ~goes) if mask is None else (goes & mask, ~goes & mask)
    return (going if going.any() else False), (staying if staying.any() else False)


def united(a, b):
    if a is False or b is False:
        return b if a is False else a
    return None if a is None or b is None or (a | b).all() else a | b


def touch(way: Way, step: Step, is_global: bool, where: Value, mask: Value, near: Set[int]) -> bool:
    """Whether the first-level cache had it all."""
    if where is None:
        way.unknown += 1
        return False
    lanes = numpy.broadcast_to(where, LANES)
    lanes = lanes if mask is None else lanes[mask]
    if is_global:
        sectors = set((lanes >> 5).tolist())
        had = all(sector in way.loaded or sector in near for sector in sectors)
        way.accesses += len(sectors)
        (way.stored if step.base.startswith(("ST", "RED", "ATOM")) else way.loaded).update(sectors)
        return had
    if step.unit == "shared" or step.base == "LDGSTS":
        words = 4 if step.base == "LDSM" else max(1, step.instruction.bits() // 32)
        together = 8 if step.base == "LDSM" else LANES // words
        # 128 bytes a cycle go to registers, and twice as many where each lane n has the address of lane n^1, or each that of n^2:
        # so NVIDIA says (forums.developer.nvidia.com/t/77228) of compute capability 7; taken to hold for 8 and 9.
        every = numpy.arange(LANES)
        if step.base == "LDS" and len(lanes) == LANES and any((lanes == lanes[every ^ bit]).all() for bit in (1, 2)):
            together = min(LANES, 2 * together)
        for k in range(0, len(lanes), together):
            different = numpy.unique(lanes[k : k + together, None] // 4 + numpy.arange(words))
            way.wavefronts += int(numpy.bincount(different % 32).max(initial=0))
    return False


def keep(w: Lanes, i: Instruction, space: tuple, where: Value, kept: dict, mask: Value) -> None:
    """Integers on their way through shared memory or the stack."""
    stores = i.opcode.startswith("ST")
    found = re.fullmatch(r"(U?R)(\d+)", i.operands[stores].replace(".reuse", ""))
    if not found:
        return
    bank, first = found[1], int(found[2])
    active = numpy.ones(LANES, bool) if mask is None else mask
    places = numpy.broadcast_to(where, LANES)[active].tolist()
    for k in range(max(1, i.bits() // 32)):
        if stores:
            if (value := w.banks[bank][first + k]) is not None:
                values = numpy.broadcast_to(value, LANES)[active].tolist()
                kept.update({(space, a + 4 * k): v for a, v in zip(places, values, strict=True)})
        elif places and (space, places[0] + 4 * k) in kept:
            values = [kept.get((space, a + 4 * k)) for a in places]
            if values.count(values[0]) == len(values):
                w.put(bank, first + k, values[0], mask)
            elif None not in values:
                every = numpy.zeros(LANES, numpy.int64)
                every[active] = values
                w.put(bank, first + k, every, mask)
