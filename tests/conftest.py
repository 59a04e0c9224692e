"""For every test: uninitialised tensors and scratch memory hold NaN, so that an element nobody wrote cannot look right.

The environment may ask for what another processor would do: ATEN_CPU_CAPABILITY limits our kernels too, and AUTOHDR_TEST_ONEDNN=0
leaves oneDNN out, as PyTorch does in bfloat16 where the processor has no instructions for it. AUTOHDR_TEST_LONG_UNTIL is a time
(seconds since 1970): long tests come last but for the emulation of CUDA, those that guard most first, and none begins later.
"""

import math
import os
import signal
import time

import pytest
import torch

from autohdr import _C, _C_arrays

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would what tests start
if os.environ.get("AUTOHDR_TEST_ONEDNN") == "0":
    torch._C._set_mkldnn_enabled(False)
ISA = {"avx2": "avx2", "default": "baseline"}.get(os.environ.get("ATEN_CPU_CAPABILITY", ""))
if ISA in _C.build_info()["cpu_isas_here"]:
    _C.use_cpu_isa(ISA), _C_arrays.use_cpu_isa(ISA)
LONG_UNTIL = float(os.environ.get("AUTOHDR_TEST_LONG_UNTIL", "inf"))
# Of files with long tests, before the others; "": what is not long.
ORDER = ["test_emulated_cuda", "", "test_emulation", "test_warp", "test_instructions", "test_interpreted_triton"]
LATE = "its turn came after AUTOHDR_TEST_LONG_UNTIL"


def is_long(item):
    return item.get_closest_marker("long") is not None


def place(item):
    if math.isinf(LONG_UNTIL):
        return not is_long(item)
    file = item.path.stem if is_long(item) else ""
    return ORDER.index(file) if file in ORDER else len(ORDER)


@pytest.hookimpl(tryfirst=True)  # before xdist's, which reads the groups
def pytest_collection_modifyitems(items):
    """Long tests are spread one by one, and come first where nothing limits them; all others file by file: a fixture may serve a
    whole file. Of a test with several parameters coverage traces the first, and of long ones none, since tracing slows all Python
    down."""
    items.sort(key=place)
    traced = set()
    for item in items:
        if not is_long(item):
            item.add_marker(pytest.mark.xdist_group(str(item.path)))
        name = item.nodeid.partition("[")[0]
        if name in traced or is_long(item):
            item.add_marker(pytest.mark.no_cover)
        traced.add(name)


def pytest_runtest_setup(item):
    if is_long(item) and time.time() > LONG_UNTIL:
        pytest.skip(LATE)


def pytest_terminal_summary(terminalreporter):
    late = [report.nodeid for report in terminalreporter.stats.get("skipped", []) if LATE in str(report.longrepr)]
    if late:
        terminalreporter.section(f"{len(late)} long tests left out: {LATE}")
        terminalreporter.write_line("\n".join(late))


@pytest.fixture(autouse=True)
def nan_in_empty():
    # What torch.use_deterministic_algorithms does, but for an import of PyTorch's compiler: a second of every process.
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan().all()
    _C.poison_scratch(True), _C_arrays.poison_scratch(True)
    yield
    _C.poison_scratch(False), _C_arrays.poison_scratch(False)
    torch._C._set_deterministic_algorithms(False)
