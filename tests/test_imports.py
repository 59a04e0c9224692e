"""Who imports whom: no two modules of autohdr import each other, not even through others, for types, or late."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import autohdr

ROOT = Path(autohdr.__file__).parent


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(source: str, modules: set[str]) -> set[str]:
    """The modules among `modules` that a source imports anywhere: at its top, in a function, under TYPE_CHECKING.

    `from package import name` imports the package's module of that name, where there is one, and else the package.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "autohdr imports by absolute names"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in modules else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & modules


def test_no_two_modules_import_each_other():
    sources = {module_name(file): file.read_text("utf-8") for file in ROOT.rglob("*.py")}
    graph = {name: imported(source, set(sources)) - {name} for name, source in sources.items()}
    assert graph["autohdr.models.tiling"] and len(graph) > 50
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.mark.parametrize(
    "source",
    [
        "import a.b",
        "from a import b",
        "from a.b import c",
        "def f():\n    from a.b import c",
        "if TYPE_CHECKING:\n    from a import b",
    ],
)
def test_every_way_to_import_is_seen(source):
    assert imported(source, {"a.b", "c"}) == {"a.b"}
