"""The map of docs/architecture.md, read off the imports: few rooms, in layers, without a circle."""

from __future__ import annotations

import ast
import functools
import re
from collections import defaultdict
from pathlib import Path

import compress

ROOT = Path(compress.__file__).parents[1]
ENTRIES, LAYERS = 15, 11


@functools.cache
def modules() -> dict[str, Path]:
    """Every module of the wheel by its name."""
    found = {}
    for folder, package in (("compress", "compress"), ("eval", "compress.eval")):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if "bench" not in parts:
                name = ".".join([package, *parts]).removesuffix(".__init__")
                found[name] = path
    return found


def room(name: str) -> str:
    """The folder that a module lies in; a module at the top is a room of its own."""
    if modules()[name].name == "__init__.py" or name.count(".") == 1:
        return name
    return name.rpartition(".")[0]


def imported(path: Path) -> set[str]:
    """Modules of ours that a file imports, also inside functions; not those for annotations."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    annotations = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    names = set()
    for node in ast.walk(tree):
        if id(node) in annotations:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= (inner & modules().keys()) or {node.module}
    return {name for name in names if name in modules()}


@functools.cache
def arrows() -> dict[str, set[str]]:
    """Room -> rooms that it imports from. The package itself only names what it exports."""
    found: dict[str, set[str]] = defaultdict(set)
    for name, path in modules().items():
        if path.name == "__main__.py" or name == "compress":
            continue
        targets = {room(target) for target in imported(path)}
        found[room(name)] |= targets - {room(name), "compress"}
    return dict(found)


def layers() -> dict[str, int]:
    """Room -> 1 + the highest layer that it stands on.

    Raises:
        AssertionError: a circle.
    """
    known: dict[str, int] = {}

    def layer(name: str, path: tuple[str, ...] = ()) -> int:
        assert name not in path, f"a circle: {' -> '.join((*path, name))}"
        if name not in known:
            below = [layer(other, (*path, name)) for other in sorted(arrows().get(name, ()))]
            known[name] = 1 + max(below, default=0)
        return known[name]

    for name in sorted(arrows()):
        layer(name)
    return known


def test_no_room_stands_on_itself():
    folders = {n: at for n, at in layers().items() if modules()[n].name == "__init__.py"}
    assert len(set(folders.values())) <= LAYERS


def test_the_top_of_the_package_is_small():
    top = {
        path.name
        for path in (ROOT / "compress").iterdir()
        if not path.name.startswith("__") and (path.is_dir() or path.suffix == ".py")
    }
    assert len(top) <= ENTRIES


def test_rooms_stand_in_the_order_of_the_map():
    """The map names the rooms from the bottom to the top; nobody imports from further up."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    places = re.findall(r"^\| `((?:compress|eval)/[\w/]*(?:\.py)?)`", page, re.MULTILINE)
    order = [
        re.sub("^eval", "compress.eval", name.removesuffix(".py").strip("/").replace("/", "."))
        for name in places
    ]
    place = {name: index for index, name in enumerate(order)}
    assert set(arrows()) == set(order)
    upwards = [(a, b) for a in order for b in arrows()[a] if place[b] > place[a]]
    assert not upwards
