"""For every test: uninitialised tensors hold NaN, so that an element nobody wrote cannot look right."""

import pytest
import torch


@pytest.fixture(autouse=True)
def nan_in_empty():
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
