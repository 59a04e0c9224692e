"""The suite itself."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import pytest

def test_short():
    pass

@pytest.mark.long
def test_long():
    pass
"""


def test_a_file_stays_in_one_worker(request):
    """Else the fixtures of a file are made once a worker."""
    if not request.config.getoption("loadgroup", False):
        pytest.skip("xdist spreads no tests over workers here, or not by groups")
    assert request.node.nodeid.endswith(f"@{request.path}")


@pytest.mark.parametrize(
    ("until", "order", "outcome"),
    [
        ("inf", "any_size long, emulated_cuda long, instructions long, any_size short, emulated_cuda short", "PASSED"),
        ("1e12", "emulated_cuda long, any_size short, emulated_cuda short, instructions long, any_size long", "PASSED"),
        ("1", "emulated_cuda long, any_size short, emulated_cuda short, instructions long, any_size long", "SKIPPED"),
    ],
    ids=["unlimited", "in time", "too late"],
)
def test_long_tests_have_until_then(tmp_path, until, order, outcome):
    files = ["test_any_size.py", "test_emulated_cuda.py", "test_instructions.py"]
    shutil.copy(Path(__file__).parent / "conftest.py", tmp_path)
    for name in files:
        (tmp_path / name).write_text(TESTS if name != files[-1] else TESTS.replace("def test_short", "def no_test"))
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore", *files]
    env = os.environ | {"AUTOHDR_TEST_LONG_UNTIL": until}
    said = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True).stdout
    ran = re.findall(r"test_(\w+)\.py::test_(\w+) (PASSED|SKIPPED)", said)
    assert ", ".join(f"{file} {test}" for file, test, _ in ran) == order, said
    assert {done for _, test, done in ran if test == "long"} == {outcome}
    assert ("3 long tests left out" in said) == (outcome == "SKIPPED")
