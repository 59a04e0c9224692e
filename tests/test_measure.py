import time

import pytest
import torch

from autohdr import measure as module
from autohdr.measure import measure

MIB = 1 << 20


@pytest.mark.skipif(not module._reset_high_water_mark(), reason="/proc/self/clear_refs cannot be written here")
def test_high_water_mark_is_of_this_block():
    with measure() as large:
        torch.ones(64 * MIB, dtype=torch.uint8)
    with measure() as small:
        torch.ones(8 * MIB, dtype=torch.uint8)
    assert large.memory_source == small.memory_source == "VmHWM"
    assert 60 * MIB < large.growth_bytes < 80 * MIB
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
