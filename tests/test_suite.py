"""The suite itself."""

import pytest


def test_a_file_stays_in_one_worker(request):
    """Else the fixtures of a file are made once a worker."""
    if not request.config.getoption("loadgroup", False):
        pytest.skip("xdist spreads no tests over workers here, or not by groups")
    assert request.node.nodeid.endswith(f"@{request.path}")
