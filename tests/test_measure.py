import math
import time
from types import SimpleNamespace

import pytest
import torch

from autohdr import measure as module
from autohdr.errors import UserError
from autohdr.measure import (
    expected_seconds,
    format_bytes,
    format_seconds,
    free_bytes,
    give_back,
    is_out_of_memory,
    measure,
    parse_bytes,
    resident_bytes,
)

MIB = 1 << 20


@pytest.mark.skipif(not module._reset_high_water_mark(), reason="/proc/self/clear_refs cannot be written here")
def test_high_water_mark_is_of_this_block():
    with measure() as large:
        torch.ones(256 * MIB, dtype=torch.uint8)
    give_back()  # if malloc had so much from earlier tests
    with measure() as small:
        torch.ones(8 * MIB, dtype=torch.uint8)
    assert large.memory_source == small.memory_source == "VmHWM"
    assert 250 * MIB < large.growth_bytes < 270 * MIB
    assert small.growth_bytes < 20 * MIB and small.peak_bytes < large.peak_bytes


def test_falls_back_to_the_lifetime_peak(monkeypatch):
    monkeypatch.setattr(module, "_reset_high_water_mark", lambda: False)
    with measure() as first:
        torch.ones(8 * MIB, dtype=torch.uint8)
    assert first.memory_source == "ru_maxrss"
    assert first.peak_bytes >= first.start_bytes > 20 * MIB and first.growth_bytes >= 0


def test_filled_in_when_the_block_raises():
    with pytest.raises(RuntimeError), measure() as result:
        time.sleep(0.01)
        raise RuntimeError
    assert result.seconds >= 0.01 and result.peak_bytes > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_counts_tensors():
    with measure("cuda") as result:
        torch.ones(64 * MIB, dtype=torch.uint8, device="cuda")
    assert result.memory_source == "cuda" and 64 * MIB <= result.growth_bytes < 80 * MIB


def test_resident_bytes_follow_an_allocation():
    resident = resident_bytes()
    block = torch.ones(256 * MIB, dtype=torch.uint8)
    assert 250 * MIB < resident_bytes() - resident < 270 * MIB
    del block


def test_free_bytes_of_a_gpu_has_what_freed_tensors_left(monkeypatch):
    for name, value in (("mem_get_info", (500, 900)), ("memory_reserved", 300), ("memory_allocated", 100)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_bytes("cuda") == 500 + 300 - 100


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


def test_expected_seconds_are_a_range(clock):
    def run(side):
        clock[0] += 2 + 0.01 * side**2

    assert expected_seconds(run, 64, 10**6) == pytest.approx((0.01 * 10**6, (2 / 64**2 + 0.01) * 10**6))
    assert expected_seconds(run, 64, 32**2) == pytest.approx((0.01 * 32**2, 2 + 0.01 * 64**2))  # a pass at least


@pytest.mark.parametrize("slower", [16, 32])  # the half, by so much that the whole seems to take nothing; or the whole
def test_other_processes_make_no_work_seem_free(clock, slower):
    def run(side):
        clock[0] += 0.01 * side**2 + (50 if side == slower else 0)

    least, most = expected_seconds(run, 32, 10**6)
    assert 0.99 * 0.01 * 10**6 / 4 <= least <= most and most >= 0.99 * 0.01 * 10**6


def test_a_range_is_read_easily():
    assert format_seconds((0.8123, 12.4)) == "0.81 to 12 s" and format_seconds((99.6, 1234)) == "100 to 1234 s"


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("600\n", 600 - (300 - 100)), ("max\n", 2000 * 1024), ("99999999\n", 2000 * 1024), (None, 2000 * 1024)],
)
def test_free_bytes_knows_a_containers_limit(tmp_path, monkeypatch, limit, expected):
    """What is cached of files can be had."""
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    2000 kB\n")
    if limit:
        (tmp_path / "memory.max").write_text(limit)
        (tmp_path / "memory.current").write_text("300\n")
        (tmp_path / "memory.stat").write_text("anon 200\ninactive_file 100\nactive_file 0\n")
    paths = {"/proc/meminfo": tmp_path / "meminfo", "/sys/fs/cgroup": tmp_path}
    monkeypatch.setattr(module, "Path", lambda path: paths[path])
    assert free_bytes() == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("3GB", 3 * 10**9), ("2.5 GiB", 5 * 2**29), ("800m", 8 * 10**8), ("123456", 123456), ("1 TB", 10**12), ("64k", 64000)],
)
def test_parse_bytes(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-3GB", "3 apples", "3GBB", "1e9"])
def test_parse_bytes_refuses(text):
    with pytest.raises(UserError, match="expected an amount of memory such as 3GB"):
        parse_bytes(text)


def test_format_bytes():
    assert [format_bytes(n) for n in (1_400_000_000, 64_000_000, 400_000)] == ["1.40 GB", "64 MB", "0 MB"]


def test_is_out_of_memory():
    errors = [
        MemoryError(),
        torch.OutOfMemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: 5"),
        RuntimeError("could not create a primitive"),
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported", 2),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
    ]
    assert [e for e in errors if not is_out_of_memory(e)] == []
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)


def test_memory_that_was_freed_before_is_seen_to_grow():
    """malloc keeps it: what takes it again would seem to need none."""
    kept = [b"x" * 100_000 for _ in range(320)]
    del kept[:300]  # the others stay above: the end of a heap goes back by itself, or, of a thread's own heap, not at all
    give_back()
    with measure() as measured:
        again = [b"x" * 100_000 for _ in range(300)]
    assert len(again) and measured.growth_bytes > 20e6


def test_joules_are_those_of_all_packages_and_counters_begin_again(tmp_path, monkeypatch):
    """The parts of a package, and the platform, have counters that would count again what it counts."""
    monkeypatch.setattr(module, "POWERCAP", tmp_path)
    zones = {"intel-rapl:0": "package-0", "intel-rapl:0:0": "core", "intel-rapl:1": "package-1", "intel-rapl:2": "psys"}

    def count(**microjoules):
        for zone, name in zones.items():
            (tmp_path / zone).mkdir(exist_ok=True)
            (tmp_path / zone / "name").write_text(name + "\n")
            (tmp_path / zone / "energy_uj").write_text(f"{microjoules.get(name[:7] + name[-2:], 7)}\n")
            (tmp_path / zone / "max_energy_range_uj").write_text("262143328850\n")

    count(**{"package-0": 1_000_000, "package-1": 262143328850 - 500_000})
    with measure() as measured:
        count(**{"package-0": 3_000_000, "package-1": 1_000_000})
    assert measured.joules == pytest.approx(2 + 1.5)
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()  # as where only root may read
    with measure() as measured:
        pass
    assert math.isnan(measured.joules)


def test_joules_of_a_gpu(monkeypatch):
    spent = iter((5_000, 12_500))  # millijoules

    class Library:
        def nvmlInit_v2(self):
            return 0

        def nvmlDeviceGetHandleByUUID(self, name, handle):
            return 0 if name == b"GPU-1234" else 6

        def nvmlDeviceGetTotalEnergyConsumption(self, handle, energy):
            energy._obj.value = next(spent)
            return 0

    monkeypatch.setattr(module.ctypes, "CDLL", lambda name: Library())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))
    device = torch.device("cuda")
    assert module._spent(module._energy(device), module._energy(device)) == 7.5
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="other"))
    assert math.isnan(module._spent(module._energy(device), module._energy(device)))
