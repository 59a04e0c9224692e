"""Fixtures of the kernels' tests."""

import pytest
from backend import BACKEND

from autohdr import _C


@pytest.fixture(params=_C.build_info()["cpu_isas_here"] if BACKEND == "cpu" else [BACKEND])
def isa(request):
    """Each instruction set that runs here in turn; no matter to any other backend than cpu."""
    before = _C.build_info()["cpu_isa"]
    if BACKEND == "cpu":
        _C.use_cpu_isa(request.param)
    yield
    _C.use_cpu_isa(before)
