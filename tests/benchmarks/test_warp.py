"""Warps walk through machine code as threads do through C++: kernels whose trips and addresses Python computes as well."""

import shutil
import struct
import sys
from pathlib import Path

import numpy
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import machine_code
import warp
from machine_code import ARCHITECTURES, build

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        build.toolkit() is None or shutil.which("g++") is None or machine_code.tool("nvdisasm") is None,
        reason="there is no nvcc, or no nvdisasm",
    ),
]
SOURCE = """
// (n / d + m % k) rows of 32 float4 are summed, the first `few` lanes read one more, each warp writes its sums.
extern "C" __global__ void follow(const float4* x, float* y, int n, int d, long m, long k, const float4* more, int few) {
  __shared__ const float4* kept;
  if (threadIdx.x == 0) kept = more;
  __syncthreads();
  const int lane = threadIdx.x % 32;
  const long trips = n / d + m % k;
  float4 sum = {};
  for (long i = 0; i < trips; ++i) {
    const float4 v = x[(blockIdx.x * trips + i) * 32 + lane];
    sum.x += v.x; sum.y += v.y; sum.z += v.z; sum.w += v.w;
  }
  if (lane < few) sum.x += kept[lane * 4].x;
  y[blockIdx.x * blockDim.x + threadIdx.x] = sqrtf(sum.x + sum.y) / (sum.z + sum.w);
}
"""
X, Y, MORE = 0x7F0000000000, 0x7F1000000000, 0x7F2000000000


@pytest.fixture(scope="module", params=ARCHITECTURES)
def walk(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("follow")
    (folder / "follow.cu").write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine_code, "CACHE", folder)
        cubin, _ = machine_code.compiled(folder / "follow.cu", request.param)
    program = warp.Program(machine_code.disassemble(cubin)["follow"], request.param)
    timing = warp.Timing({"operands": 10, "barrier": 20, "global": 300, "shared": 30, "cached": 40}, {})

    def walk(n=0, d=1, m=0, k=1, few=0, block=0, number=0):
        parameters = struct.pack("<QQiiqqQi", X, Y, n, d, m, k, MORE, few)
        launch, kept = warp.Launch("follow", (9, 1, 1), (64, 1, 1), 0, parameters), {}
        ways = [program.walk(launch, ((block, 0, 0), w), timing, kept) for w in range(number + 1)]
        return ways[number]

    return walk


@pytest.mark.parametrize(("n", "d", "m", "k"), [(0, 1, 0, 1), (7, 1, 0, 1), (1000, 7, 0, 1), (-1000, -9, 0, 1), (3, 5, 40, 64)])
def test_trips_and_addresses(walk, n, d, m, k):
    trips = int(n / d) + m % k
    for block, number in ((0, 0), (3, 1)):
        way = walk(n, d, m, k, block=block, number=number)
        assert way.loaded == {(X >> 5) + 16 * (block * trips + i) + s for i in range(trips) for s in range(16)}
        assert way.stored == {(Y >> 5) + 8 * block + 4 * number + s for s in range(4)}


def test_long_division(walk):
    """By the routine that the compiler calls for 64 bits."""
    assert len(walk(m=7 * 10**12 + 5, k=10**12).loaded) == 16 * 5


def test_lanes_that_part(walk):
    for number in (0, 1):  # the pointer was kept in shared memory by the first warp
        assert walk(few=5, number=number).loaded == {(MORE >> 5) + 2 * lane for lane in range(5)}


def test_counts_grow_with_the_trips(walk):
    few, many, more = (walk(n=n) for n in (64, 128, 192))
    assert many.issued - few.issued == more.issued - many.issued > 64
    assert many.accesses - few.accesses == 64 * 16
    assert many.cycles - few.cycles > 64 * 4
    assert few.unknown == many.unknown


def test_a_load_that_no_lane_takes_changes_nothing():
    lanes = warp.Lanes(warp.Launch("kernel", (1, 1, 1), (32, 1, 1), 0, b""), "sm_80", (0, 0, 0), 0)
    load = machine_code.Instruction("P0", "LDS", ("R3", "[R2]"), 0)
    for nobody, expected in ((False, 7), (True, 0)):
        lanes.banks["R"][3] = 0
        warp.keep(lanes, load, ("S", 0), 64, {(("S", 0), 64): 7}, numpy.full(32, not nobody))
        assert numpy.all(lanes.banks["R"][3] == expected)


def test_a_call_under_a_guard_is_a_branch():
    """As nvcc 13 leaves a loop on sm_80."""
    code = machine_code.Code("kernel", labels={"loop": 0, "end": 4})
    for guard, opcode, *operands in (
        ("", "IADD3", "R0", "R0", "0x1", "RZ"),
        ("", "ISETP.GE.AND", "P0", "PT", "R0", "0x5", "PT"),
        ("P0", "CALL.REL.NOINC", "`(end)"),
        ("", "BRA", "`(loop)"),
        ("", "EXIT"),
    ):
        code.instructions.append(machine_code.Instruction(guard, opcode, tuple(operands), 0))
    timing, launch = warp.Timing({"operands": 10}, {}), warp.Launch("kernel", (1, 1, 1), (32, 1, 1), 0, b"")
    assert warp.Program(code, "sm_80").walk(launch, ((0, 0, 0), 0), timing, {}).issued == 4 * 5  # no BRA at last, but EXIT


@pytest.mark.parametrize(("opcode", "flag", "expected"), [("OR", "PT", True), ("AND", "!PT", False), ("OR", "!PT", None)])
def test_a_flag_may_decide_what_is_unknown(opcode, flag, expected):
    step = machine_code.Instruction("", f"ISETP.NE.{opcode}", ("P0", "PT", "R3", "0x4", flag), 0)
    lanes = warp.Lanes(warp.Launch("kernel", (1, 1, 1), (32, 1, 1), 0, b""), "sm_80", (0, 0, 0), 0)
    lanes.banks["R"][3] = None
    warp.decode(step)(lanes, None)
    assert lanes.banks["P"][0] is expected
