"""For every test: uninitialised tensors and scratch memory hold NaN, so that an element nobody wrote cannot look right."""

import pytest
import torch

from autohdr import _C


@pytest.fixture(autouse=True)
def nan_in_empty():
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan().all()
    _C.poison_scratch(True)
    yield
    _C.poison_scratch(False)
    torch.use_deterministic_algorithms(False)
