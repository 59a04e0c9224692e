"""The reference has every public name, and no page of ours points to a file that isn't there. `make docs` checks the anchors."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")))
MODULES = [name for page in ROOT.glob("docs/api/*.md") for name in re.findall(r"^::: (\S+)", page.read_text("utf-8"), re.M)]


def documented():
    """Every object that a page of the reference shows: what its modules define or export, and has a docstring."""
    for module in map(importlib.import_module, MODULES):
        exported = getattr(module, "__all__", [name for name in vars(module) if not name.startswith("_")])
        yield from (value for value in (getattr(module, name) for name in exported) if inspect.getdoc(value))


@pytest.mark.parametrize("package", ["autohdr", "autohdr.kernels", "autohdr.models", "autohdr.data.synthetic"])
def test_every_exported_name_is_in_the_reference(package):
    shown = [id(value) for value in documented()]
    values = {name: getattr(importlib.import_module(package), name) for name in importlib.import_module(package).__all__}
    missing = [name for name, value in values.items() if callable(value) and id(value) not in shown]
    assert not missing


@pytest.mark.parametrize("module", sorted(set(MODULES)))
def test_every_public_function_says_what_it_does(module):
    module = importlib.import_module(module)
    public = {name: value for name, value in vars(module).items() if not name.startswith("_") and callable(value)}
    own = {name: value for name, value in public.items() if value.__module__ == module.__name__}
    assert not [name for name, value in own.items() if not inspect.getdoc(value)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_page_points_to_a_file_that_is_not_there(page):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text("utf-8"))
    assert not [link for link in links if not re.match(r"[a-z]+:", link) and not (page.parent / link).exists()]
